"""Training runs: they learn from the shards, stop and go on exactly, and fail in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import seco.training.pretrain
from seco.api import pretrain
from seco.checkpoints.io import load_checkpoint
from seco.config import PretrainConfig, resolve_pretrain
from shards.errors import InputError, Stopped
from tests import commands
from tests.made_shards import make_set

SMALL: dict[str, Any] = {
    "arch": "resnet10_w16",
    "epochs": 3,
    "batch_size": 4,
    "bn_group": 2,
    "queue_size": 20,
    "crop_size": 32,
    "workers": 0,
    "log_every": 1,
    "lr": 0.05,
    "device": "cpu",
    "checkpoint_every_steps": 4,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(tmp_path_factory.mktemp("shards"), videos=18, frames=5, per_shard=7)


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    pretrain(PretrainConfig(shards=(shards,), out=str(out), **SMALL))
    return out


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_design_names(undisturbed: Path) -> None:
    rows = lines(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["epoch"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    for row in rows:
        parts = row["loss_inter"] + row["loss_intra"] + row["loss_order"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert 0 <= row["acc_inter"] <= 1
    assert rows[0]["lr"] == 0.05
    assert rows[-1]["lr"] < 0.002
    assert rows[-1]["queue_fill"] == 1.0
    content = load_checkpoint(undisturbed / "last.pt")
    assert content["step"] == 12
    assert "preset" in (undisturbed / "config.toml").read_text()
    assert list((undisturbed / "tensorboard").iterdir())
    page = (undisturbed / "report.html").read_text()
    assert page.count("<svg") > 3
    assert f"loss {rows[-1]['loss']:.4g}" in page


def test_a_page_that_cannot_be_written_costs_no_run(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").mkdir()
    short = {**SMALL, "epochs": 1}
    last = pretrain(PretrainConfig(shards=(shards,), out=str(tmp_path), **short)).checkpoint
    assert load_checkpoint(last)["step"] == 4
    assert "no report was written" in capsys.readouterr().err


def test_the_same_settings_give_the_same_run_with_loader_processes(
    shards: str, undisturbed: Path, tmp_path: Path
) -> None:
    pretrain(PretrainConfig(shards=(shards,), out=str(tmp_path), **{**SMALL, "workers": 2}))
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    one = load_checkpoint(tmp_path / "last.pt")["model"]
    other = load_checkpoint(undisturbed / "last.pt")["model"]
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_two_runs_do_not_write_to_one_folder(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX)"
    hold += "; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        config = PretrainConfig(shards=(shards,), out=str(tmp_path), **SMALL)
        with pytest.raises(InputError, match="another process is training here — wait for it"):
            pretrain(config)
        assert not (tmp_path / "metrics.jsonl").exists()
        assert other.stdin is not None
        other.stdin.close()
        other.wait(timeout=600)
    assert pretrain(config).checkpoint.is_file()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_something_else_is_left_alone(
    kind: str, shards: str, tmp_path: Path
) -> None:
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.write_text("kept")
    out.mkdir()
    make = {"link": lambda at: at.symlink_to(precious), "pipe": os.mkfifo, "folder": Path.mkdir}
    make[kind](out / ".lock")
    config = PretrainConfig(shards=(shards,), out=str(out), **{**SMALL, "epochs": 1})
    if kind == "pipe":  # locked like any other
        pretrain(config)
    else:
        with pytest.raises(InputError, match=r"\.lock"):
            pretrain(config)
    assert precious.read_text() == "kept"


def test_killed_at_a_random_step_and_resumed(
    shards: str, undisturbed: Path, tmp_path: Path
) -> None:
    options = {**SMALL, "checkpoint_every_steps": 1, "out": tmp_path, "shards": shards}
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    stop_after = random.randrange(1, 10)
    run = commands.start("pretrain", *arguments, OMP_NUM_THREADS=str(torch.get_num_threads()))
    log = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) > stop_after):
        assert time.monotonic() < deadline
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    run.kill()
    run.wait()
    kept = load_checkpoint(tmp_path / "last.pt")["step"]
    assert kept < 12
    pretrain(PretrainConfig(**{**SMALL, "shards": (shards,), "out": str(tmp_path)}, resume="auto"))
    resumed = lines(tmp_path)
    assert [r for r in resumed if r["step"] > kept] == [
        r for r in lines(undisturbed) if r["step"] > kept
    ]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_a_run_that_ends_during_its_online_knn_loses_no_line(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def settings(run: str, **changes: Any) -> PretrainConfig:
        every = {"checkpoint_every_steps": 1, "knn_every_epochs": 1}
        out, sets = str(tmp_path / run), (shards,)
        return PretrainConfig(
            shards=sets, knn_shards=sets, out=out, **{**SMALL, **every, **changes}
        )

    pretrain(settings("undisturbed"))
    figures = seco.training.pretrain.OnlineKnn.figures
    votes: list[dict[str, float]] = []

    def killed_at_the_third(self: Any, model: Any) -> dict[str, float]:
        if len(votes) == 2:
            raise Killed
        votes.append(figures(self, model))
        return votes[-1]

    monkeypatch.setattr(seco.training.pretrain.OnlineKnn, "figures", killed_at_the_third)
    with pytest.raises(Killed):
        pretrain(settings("killed"))
    monkeypatch.undo()
    pretrain(settings("killed", resume="auto"))
    found, expected = ((tmp_path / n / "metrics.jsonl") for n in ("killed", "undisturbed"))
    assert found.read_bytes() == expected.read_bytes()


def test_sigterm_saves_and_says_how_to_go_on(
    shards: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of_trainer = seco.training.pretrain.Trainer._train_step

    def signalled(self: Any, *given: Any) -> Any:
        if self.state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of_trainer(self, *given)

    monkeypatch.setattr(seco.training.pretrain.Trainer, "_train_step", signalled)
    config = PretrainConfig(shards=(shards,), out=str(tmp_path), **SMALL)
    with pytest.raises(Stopped, match=r"saved step 6 of 12.*--resume auto"):
        pretrain(config)
    monkeypatch.undo()
    pretrain(PretrainConfig(shards=(shards,), out=str(tmp_path), **SMALL, resume="auto"))
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(
    shards: str, undisturbed: Path
) -> None:
    with pytest.raises(InputError, match=r"holds a run already.*--resume auto"):
        pretrain(PretrainConfig(shards=(shards,), out=str(undisturbed), **SMALL))
    with pytest.raises(InputError, match=r"was made with lr = 0\.05, not 0\.1"):
        pretrain(
            PretrainConfig(
                shards=(shards,), out=str(undisturbed), resume="auto", **{**SMALL, "lr": 0.1}
            )
        )


@pytest.mark.parametrize(
    ("preset", "batch_size", "lr"),
    [
        ("paper", 512, 0.2),  # §5.2
        ("paper", 96, 0.2),
        ("authors", 512, 0.2),  # 0.1 x batch size / 256
        ("authors", 256, 0.1),
        ("authors", 96, 0.0375),
    ],
)
def test_the_learning_rate_that_a_preset_gives(preset: str, batch_size: int, lr: float) -> None:
    given = PretrainConfig(preset=preset, batch_size=batch_size)
    assert resolve_pretrain(given).lr == pytest.approx(lr, rel=1e-12)
    assert resolve_pretrain(dataclasses.replace(given, lr=0.7)).lr == 0.7


def test_a_resumed_run_keeps_its_learning_rate(
    shards: str, undisturbed: Path, tmp_path: Path
) -> None:
    """Runs of earlier versions have 0.2 for every batch size."""
    shutil.copytree(undisturbed, tmp_path / "run")
    settings = {name: value for name, value in SMALL.items() if name != "lr"}
    config = PretrainConfig(
        shards=(shards,), out=str(tmp_path / "run"), resume="auto", preset="authors", **settings
    )
    paper = {"heads": "shared", "intra": "three-way", "sampling": "uniform", "queue_init": "unit"}
    config = dataclasses.replace(config, **paper, warmup_epochs=0, final_lr=0.0)
    last = pretrain(config).checkpoint  # refused if the learning rates differed
    assert load_checkpoint(last)["config"]["lr"] == 0.05
    assert "lr = 0.05\n" in (tmp_path / "run" / "config.toml").read_text()


def test_unreadable_samples_are_named_replaced_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_set(tmp_path / "shards", videos=12, frames=3)
    tar = tmp_path / "shards" / "made-000.tar"
    data = bytearray(tar.read_bytes())
    at = data.index(b"video_0004.0000.jpg") + 512  # all three frames of one video
    end = data.index(b"video_0005.json")
    for position in range(at, end):
        data[position] ^= 0x55
    tar.write_bytes(data)
    out = tmp_path / "run"
    pretrain(PretrainConfig(shards=(shards,), out=str(out), **{**SMALL, "epochs": 2}))
    assert lines(out)[-1]["unreadable"] == 2  # once an epoch
    assert "video_0004" in capsys.readouterr().err
    strict = {**SMALL, "epochs": 2, "max_unreadable": 0.0}
    with pytest.raises(InputError, match=r"1 samples could not be read.*--max-unreadable"):
        pretrain(PretrainConfig(shards=(shards,), out=str(tmp_path / "strict"), **strict))


def test_a_loss_that_is_not_finite_stops_the_run(shards: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(the loss|a weight).* is not finite at step"):
        pretrain(PretrainConfig(shards=(shards,), out=str(tmp_path), **{**SMALL, "lr": 1e12}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 64}, "do not fill a batch"),
        ({"tasks": "inter,colour"}, "unknown task 'colour'"),
        ({"tasks": ""}, "no task given"),
        ({"bn_group": 3}, "--bn-group: must be 2 or more and divide"),
        ({"lr": -1.0}, "--lr: must be above 0"),
        ({"arch": "vgg16"}, "unknown architecture 'vgg16'"),
        ({"device": "cuda:99"}, r"cuda:99: (no GPU|only \d+ GPUs) can be used here"),
        ({"init": "nowhere.pt"}, "nowhere.pt: cannot be read"),
        ({"epochs": 0}, "--epochs"),
        ({"decode": "nvjpeg"}, "--decode: nvjpeg needs a GPU"),
        ({"decode": "nvjpeg", "views_on": "workers"}, "--views-on: must be device"),
        ({"window_shards": -1}, "--window-shards: must not be negative"),
        ({"steps_per_epoch": 0}, "--steps-per-epoch: must be 1 or more"),
        ({"steps_per_epoch": 5}, "--steps-per-epoch: needs shards without an index"),
        ({"cache_gb": 0.0}, "--cache-gb: must be above 0"),
    ],
)
def test_settings_that_cannot_work(
    shards: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pretrain(PretrainConfig(shards=(shards,), out=str(tmp_path), **{**SMALL, **change}))
    assert "\n" not in str(caught.value)


def test_ablations_and_the_authors_preset_train(shards: str, tmp_path: Path) -> None:
    for tasks in ("inter", "inter,intra", "order"):
        out = tmp_path / tasks
        one_epoch = {**SMALL, "epochs": 1, "tasks": tasks, "preset": "authors", "warmup_epochs": 0}
        pretrain(PretrainConfig(shards=(shards,), out=str(out), **one_epoch))
        logged = {k for k in lines(out)[-1] if k.startswith("loss_")}
        assert logged == {f"loss_{task}" for task in tasks.split(",")}


def test_switches_of_speed_change_the_loss_by_rounding(shards: str, tmp_path: Path) -> None:
    """Groups of 8 views of 64 px: over two views of 32 px BatchNorm turns rounding into signs."""
    settings = {**SMALL, "batch_size": 8, "bn_group": 8, "crop_size": 64, "epochs": 1}
    first: dict[str, float] = {}
    for name, change in (
        ("plain", {}),
        ("channels_last", {"channels_last": True}),
        ("bf16", {"precision": "bf16"}),
    ):
        out = tmp_path / name
        pretrain(PretrainConfig(shards=(shards,), out=str(out), **{**settings, **change}))
        assert len(lines(out)) == 2
        first[name] = lines(out)[0]["loss"]
    assert first["channels_last"] == pytest.approx(first["plain"], rel=0.001)
    assert first["bf16"] == pytest.approx(first["plain"], rel=0.02)
    assert first["bf16"] != first["plain"]


def test_init_takes_an_earlier_runs_backbone(
    shards: str, undisturbed: Path, tmp_path: Path
) -> None:
    config = PretrainConfig(
        shards=(shards,), out=str(tmp_path), init=str(undisturbed / "last.pt"), **SMALL
    )
    trainer = seco.training.pretrain.Trainer(seco.training.pretrain.resolve_pretrain(config))
    trained = load_checkpoint(undisturbed / "last.pt")["model"]
    for side in ("query", "key"):
        encoder = getattr(trainer.model, f"{side}_encoder").backbone.state_dict()
        for name, tensor in encoder.items():
            assert torch.equal(tensor, trained[f"query_encoder.backbone.{name}"])


def test_the_blur_scales_with_the_view() -> None:
    assert seco.training.pretrain.view_config(PretrainConfig()).blur_sigma == (0.1, 2.0)
    small = seco.training.pretrain.view_config(PretrainConfig(crop_size=56, min_crop_area=0.5))
    assert small.blur_sigma == pytest.approx((0.025, 0.5))
    assert small.crop_scale == (0.5, 1.0)
