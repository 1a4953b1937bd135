"""Fine-tuning: its clips, its frozen layers, stopping and going on, many processes, its test."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image
from torch import nn
from torch.nn import functional as F

import cli
import seco.training.finetune
from pipelines._config import PrepareConfig
from pipelines._prepare import prepare
from seco.checkpoints.io import load_checkpoint, load_torch_file, save_torch_file
from seco.checkpoints.weights import BackboneChanged, load_backbone, load_finetuned
from seco.config import FinetuneConfig, FinetuneTestConfig, resolve_finetune
from seco.data.clips import (
    ClipBatch,
    ClipStream,
    LabelledVideos,
    clip_batches,
    clip_starts,
    segment_frames,
    segment_middles,
)
from seco.data.transforms import ViewConfig
from seco.evaluation.video_test import ClipProtocol, VideoScores, finetune_eval
from seco.features.store import read_features
from seco.models.classifier import VideoClassifier
from seco.processes.ranks import Ranks
from seco.schedule import step_decay
from seco.training.finetune import Finetuning, finetune
from shards.errors import InputError, Stopped, TooManyExcluded
from shards.format import VideoRecord
from shards.writer import ShardWriter
from tests import commands
from tests.data import shared
from tests.learning_sets import CARPETS, HUES, draw_video, still
from tests.made_shards import make_set

SMALL: dict[str, Any] = {
    "checkpoint": "random",
    "arch": "resnet10_w16",
    "epochs": 3,
    "batch_size": 8,
    "bn_group": 4,
    "segments": 3,
    "crop_size": 32,
    "lr": 0.001,
    "test_size": 36,
    "clips": 3,
    "clip_frames": 4,
    "workers": 0,
    "device": "cpu",
    "log_every": 1,
    "checkpoint_every_steps": 1,
    "validate_every_epochs": 1,
}
STEPS = 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    return make_set(folder, videos=30, frames=lambda v: 2 + v % 11, per_shard=11)


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    finetune(FinetuneConfig(shards=(shards,), out=str(out), **SMALL))
    return out


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def result(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "finetune.json").read_text())
    return content


def start(command: str, **settings: Any) -> commands.Command:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return commands.start(command, *arguments, OMP_NUM_THREADS=str(torch.get_num_threads()))


# Which frames, and what happens to the learning rate.


def test_segments_are_those_of_the_authors_code() -> None:
    rng = np.random.default_rng(0)
    for segments in (1, 3, 7):
        for count in (1, 2, 6, 7, 8, 13, 14, 100):
            uniform = rng.random((3000, segments))
            drawn = segment_frames(uniform, np.full(3000, count))
            average = count // segments
            for number in range(segments):
                if average >= 1:
                    allowed = {number * average + offset for offset in range(average)}
                else:
                    allowed = {int(number * (float(count - 1) / segments))}
                assert set(drawn[:, number].tolist()) == allowed, (count, segments, number)
            middles = segment_middles(count, segments)
            assert all(m in set(drawn[:, i].tolist()) for i, m in enumerate(middles))
    assert segment_middles(21, 7) == [1, 4, 7, 10, 13, 16, 19]


def test_test_clips_begin_where_those_of_the_authors_code_do() -> None:
    for count in (16, 17, 40, 300):
        theirs = [int(float(count - 16) * number / 20) for number in range(20)]
        assert clip_starts(count, 20, 16) == theirs
        frames = ClipProtocol(20, 16, 3, 256).frames(count)
        assert [clip[0] for clip in frames] == theirs
        assert all(clip == list(range(clip[0], clip[0] + 16)) for clip in frames)
    assert ClipProtocol(20, 16, 3, 256).frames(9) == [list(range(9))] * 20


def test_the_learning_rate_falls_twice() -> None:
    config = resolve_finetune(FinetuneConfig(shards=("x",), checkpoint="random"))
    assert config.decay_epochs() == (50, 100) and config.lr_decay_epochs == "50,100"
    rates = {"base_lr": 1e-3, "decay_epochs": (50, 100), "steps_per_epoch": 37}
    found = [step_decay(epoch * 37 + rest, **rates) for epoch, rest in ((49, 36), (50, 0))]  # type: ignore[arg-type]
    assert found == pytest.approx([1e-3, 1e-4])
    assert step_decay(149 * 37, **rates) == pytest.approx(1e-5)  # type: ignore[arg-type]
    short = resolve_finetune(FinetuneConfig(shards=("x",), checkpoint="random", epochs=30))
    assert short.decay_epochs() == (10, 20)


# Batches.


def stream(shards: str, rank: int = 0, size: int = 1) -> ClipStream:
    videos = LabelledVideos(shards, "1")
    return ClipStream(videos.shards, videos.train, 8, 3, 32, ViewConfig(), 5, rank, size)


def assert_same_clips(one: ClipBatch, other: ClipBatch) -> None:
    assert torch.equal(one.images, other.images)
    assert one.videos.tolist() == other.videos.tolist()
    assert one.views.hue.tolist() == other.views.hue.tolist()


def test_batches_are_the_same_for_any_number_of_workers_and_processes(shards: str) -> None:
    expected = list(clip_batches(stream(shards), 0, 5, workers=0))
    assert len({tuple(batch.videos) for batch in expected}) == 5
    for one, other in zip(expected, clip_batches(stream(shards), 0, 5, workers=2), strict=True):
        assert_same_clips(one, other)
    halves = [clip_batches(stream(shards, rank, 2), 2, 5, workers=0) for rank in (0, 1)]
    for one, *parts in zip(expected[2:], *halves, strict=True):
        assert_same_clips(one, ClipBatch.joined(parts))
    videos = LabelledVideos(shards, "1")
    for epoch in (expected[0:2], expected[2:4]):
        seen = [video for batch in epoch for video in batch.videos.tolist()]
        assert len(set(seen)) == 16 and set(seen) <= set(videos.train.tolist())


# The network.


def test_frozen_layers_stay_as_they_are(
    shards: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_backbone("random", SMALL["arch"], 0).network.state_dict()
    after, *_ = load_finetuned(undisturbed / "last.pt")
    names = [n for n, m in after.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert names[0] == "bn1" and len(names) == 12
    state = after.backbone.state_dict()
    for name in names:
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            same = torch.equal(before[f"{name}.{part}"], state[f"{name}.{part}"])
            assert same == (name != "bn1"), (name, part)
    moved = [n for n in state if not n.startswith("bn") and "conv" in n]
    assert moved and not any(torch.equal(before[n], state[n]) for n in moved)
    assert state["bn1.num_batches_tracked"] == STEPS
    # A run in which one moved would not go unnoticed.
    run = seco.training.finetune.Finetuning._train_step

    def spoiled(self: Finetuning, *given: Any) -> Any:
        self.model.frozen[3].running_mean.add_(1e-6)  # type: ignore[operator,union-attr]
        return run(self, *given)

    monkeypatch.setattr(Finetuning, "_train_step", spoiled)
    with pytest.raises(BackboneChanged, match="a frozen BatchNorm layer has changed"):
        finetune(FinetuneConfig(shards=(shards,), out=str(tmp_path), **SMALL))


@pytest.mark.parametrize(("frozen", "trained"), [("all", 0), ("all-but-first", 1), ("none", 20)])
def test_which_layers_are_frozen(frozen: str, trained: int) -> None:
    model = VideoClassifier("resnet18", 5, frozen)
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(layer.training for layer in layers) == trained
    assert sum(layer.weight.requires_grad for layer in layers) == trained
    assert not any(layer.training for layer in model.eval().train().frozen)


def test_clips_are_normalised_in_their_groups_and_scored_by_their_mean() -> None:
    torch.manual_seed(0)
    model = VideoClassifier("resnet18", 5, "none", dropout=0.5)
    images, uniform = torch.randn(6, 2, 3, 32, 32), torch.rand(6, 512)
    before = model.backbone.bn1.running_mean.clone()
    together = model(images, uniform, 2)
    mean = model.backbone.bn1.running_mean.clone()
    apart = torch.cat(
        [model(images[at : at + 2], uniform[at : at + 2], 2, first=False) for at in (0, 2, 4)]
    )
    torch.testing.assert_close(together, apart, atol=2e-4, rtol=1e-4)
    assert torch.equal(model.backbone.bn1.running_mean, mean)  # later parts leave it alone
    with torch.no_grad():
        statistics = model.backbone.conv1(images[:2].flatten(0, 1)).mean((0, 2, 3))
    torch.testing.assert_close(mean, before + 0.1 * statistics)  # of the first group
    # Mean of the frames' scores under one dropout.
    model = VideoClassifier("resnet18", 5, "all", dropout=0.5)
    scores = model(images, uniform, 6)
    for clip, kept in zip(range(6), uniform >= 0.5, strict=True):
        of_frames = [
            model.classifier(2 * kept * model.backbone(frame[None])[0]) for frame in images[clip]
        ]
        torch.testing.assert_close(scores[clip], sum(of_frames) / 2, atol=1e-4, rtol=1e-4)


# Runs.


def test_a_run_leaves_its_records(undisturbed: Path) -> None:
    rows = lines(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["lr"] for row in rows] == pytest.approx([1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2)
    assert [row["step"] for row in rows if "val_top1" in row] == [2, 4, 6]
    found = result(undisturbed)
    assert (found["dataset"], found["split"], found["classes"]) == ("made", "1", 3)
    assert (found["clips"], found["crops"], found["n_test"], found["n_train"]) == (3, 3, 12, 18)
    assert found["encoder"]["checkpoint"] == "random" and found["encoder"]["arch"] == SMALL["arch"]
    right = sum(row["accuracy"] * row["count"] for row in found["per_class"])
    assert found["top1"] == pytest.approx(right / 12)
    training = found["protocol"]["training"]
    assert training["freeze_bn"] == "all-but-first"
    assert (training["epochs"], training["epochs_planned"]) == (3, 3)
    assert (undisturbed / "finetune-confusion.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_tested_again_as_its_run_says(shards: str, undisturbed: Path, tmp_path: Path) -> None:
    last = str(undisturbed / "last.pt")
    again = FinetuneTestConfig(shards=(shards,), checkpoint=last, device="cpu", workers=0)
    before = (undisturbed / "finetune.json").read_bytes()
    finetune_eval(again)
    assert (undisturbed / "finetune.json").read_bytes() == before
    other = dataclasses.replace(again, crops=1)
    with pytest.raises(InputError, match=r"finetune\.json: .*\(crops 3, not 1\) — give --out"):
        finetune_eval(other)
    assert (undisturbed / "finetune.json").read_bytes() == before
    finetune_eval(dataclasses.replace(other, out=str(tmp_path)))
    assert (result(tmp_path)["crops"], result(tmp_path)["clips"]) == (1, 3)


def test_a_test_of_a_run_that_stopped_says_so(
    shards: str, undisturbed: Path, tmp_path: Path
) -> None:
    content = load_torch_file(undisturbed / "last.pt")
    save_torch_file(tmp_path / "last.pt", {**content, "step": 3})
    stopped = FinetuneTestConfig(
        shards=(shards,), checkpoint=str(tmp_path / "last.pt"), device="cpu", workers=0
    )
    finetune_eval(stopped)
    found = result(tmp_path)
    assert found["protocol"]["training"]["epochs"] == 1.5
    assert "training stopped after 1.5 of 3 epochs" in found["notes"]


def test_killed_and_stopped_it_goes_on_exactly(
    shards: str, undisturbed: Path, tmp_path: Path
) -> None:
    settings = {**SMALL, "shards": shards, "out": tmp_path, "resume": "auto"}
    log = tmp_path / "metrics.jsonl"
    last, kept = tmp_path / "last.pt", 0
    for tries, number in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
        process = start("finetune", **settings)
        deadline = time.monotonic() + 120

        def under_way(tries: int = tries, kept: int = kept) -> bool:
            opened = len(list(tmp_path.glob("tensorboard/*"))) == tries
            return opened and len(log.read_text().splitlines()) > kept and last.is_file()

        while not under_way():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        if number == signal.SIGTERM:
            assert process.returncode == 75 and "saved step" in error, error
        kept = load_checkpoint(last)["step"]
        assert kept < STEPS
    given = {**SMALL, "shards": (shards,), "out": str(tmp_path), "resume": "auto"}
    finetune(FinetuneConfig(**{**given, "checkpoint": "is not read any more", "arch": None}))
    assert log.read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert result(tmp_path) == result(undisturbed)
    one, other = (load_checkpoint(run / "last.pt")["model"] for run in (tmp_path, undisturbed))
    assert all(torch.equal(one[name], other[name]) for name in other)


EQUAL = {**SMALL, "crop_size": 64, "lr": 1e-4, "epochs": 2, "skip_test": True}


def test_processes_and_parts_change_nothing(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "s", videos=48, frames=5, per_shard=20, size=(72, 96))
    settings = {**EQUAL, "batch_size": 16, "freeze_bn": "all-but-first"}
    finetune(FinetuneConfig(shards=(shards,), out=str(tmp_path / "one"), **settings))
    del settings["skip_test"]
    process = start("finetune", shards=shards, out=tmp_path / "two", processes=2, **settings)
    parts = {**settings, "accumulate": 2, "workers": 1}
    finetune(FinetuneConfig(shards=(shards,), out=str(tmp_path / "parts"), **parts))
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    expected, start_weights = weights(tmp_path / "one"), untrained(load_backbone)
    for name in ("two", "parts"):
        for a, b in zip(lines(tmp_path / name), lines(tmp_path / "one"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), (name, a["step"])
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        apart = (weights(tmp_path / name) - expected).norm()
        assert apart < 0.02 * (expected - start_weights).norm(), name
    # The same checkpoint is tested alike by one process and by two.
    tested = FinetuneTestConfig(
        shards=(shards,),
        checkpoint=str(tmp_path / "two" / "last.pt"),
        out=str(tmp_path / "tested"),
        **{n: settings[n] for n in ("clips", "clip_frames", "test_size", "device", "workers")},
    )
    finetune_eval(tested)
    assert result(tmp_path / "tested") == result(tmp_path / "two")


def weights(run: Path) -> torch.Tensor:
    state = load_checkpoint(run / "last.pt")["model"]
    return torch.cat([state[n].double().flatten() for n in state if n.startswith("backbone.")])


def untrained(load: Callable[..., Any]) -> torch.Tensor:
    state = load("random", SMALL["arch"], 0).network.state_dict()
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def test_a_signal_while_testing(
    shards: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = VideoScores._features

    def signalled(self: VideoScores, *given: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return features(self, *given)

    monkeypatch.setattr(VideoScores, "_features", signalled)
    config = FinetuneTestConfig(
        shards=(shards,),
        checkpoint=str(undisturbed / "last.pt"),
        out=str(tmp_path),
        workers=0,
        device="cpu",
        test_size=36,
    )
    with pytest.raises(Stopped, match="SIGTERM: stopped while testing"):
        finetune_eval(config)
    assert not list(tmp_path.iterdir())


def damage(tar: Path, key: str) -> None:
    """Spoil every frame of a video."""
    data = bytearray(tar.read_bytes())
    at = data.index(f"{key}.0000.jpg".encode()) + 512
    for position in range(at, data.index(b"video_", at)):
        data[position] ^= 0x55
    tar.write_bytes(data)


def test_unreadable_videos_are_named_counted_and_survived(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_set(tmp_path / "s", videos=24, frames=1)
    damage(tmp_path / "s" / "made-000.tar", "video_0004")  # of the training videos
    damage(tmp_path / "s" / "made-000.tar", "video_0002")  # of the test videos
    out = tmp_path / "run"
    settings = {**SMALL, "batch_size": 5, "bn_group": None, "epochs": 2, "shards": (shards,)}
    finetune(FinetuneConfig(out=str(out), max_failures=12, **settings))
    said = capsys.readouterr().err
    assert "unreadable, replaced by another video: video_0004" in said
    assert "left out: video_0002" in said
    assert 1 <= lines(out)[-1]["unreadable"] <= 2  # at most once an epoch
    found = result(out)
    assert found["n_test"] == 8
    assert found["notes"] == ["1 test videos could not be read and are left out"]
    again = FinetuneTestConfig(
        shards=(shards,), checkpoint=str(out / "last.pt"), out=str(tmp_path / "again"),
        device="cpu", workers=0, test_size=SMALL["test_size"],
    )  # fmt: skip
    with pytest.raises(TooManyExcluded, match=r"1 of 9 test videos could not be read.*11"):
        finetune_eval(dataclasses.replace(again, max_failures=11))
    assert "top-1" in capsys.readouterr().out
    assert (tmp_path / "again" / "finetune.json").is_file()
    with pytest.raises(InputError, match=r"samples could not be read.*--max-unreadable"):
        finetune(FinetuneConfig(out=str(tmp_path / "b"), max_unreadable=0.0, **settings))


def test_a_loss_that_is_not_finite_stops_the_run(shards: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(the loss|a weight).* is not finite at step"):
        finetune(FinetuneConfig(shards=(shards,), out=str(tmp_path), **{**SMALL, "lr": 1e30}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 64}, "18 training videos do not fill a batch of 64"),
        ({"split": "4"}, "has no split '4'"),
        ({"dataset": "ucf101"}, "holds made, not ucf101"),
        ({"checkpoint": "nowhere.pt"}, "nowhere.pt: cannot be read"),
        ({"arch": "vgg16"}, "unknown architecture 'vgg16'"),
        ({"bn_group": 0}, "--bn-group: must be 1 or more"),
        ({"accumulate": 0}, "--accumulate: must be 1 or more"),
        ({"bn_group": 3}, "--bn-group: must divide the micro-batch of 4"),
        ({"accumulate": 3}, "--accumulate: must divide the per-rank batch of 8"),
        ({"crops": 2}, "--crops: must be 1 or 3"),
        ({"dropout": 1.0}, "--dropout"),
        ({"lr_decay_epochs": "3,x"}, "--lr-decay-epochs: '3,x' is not a list of epochs"),
        ({"clip_norm": 0.0}, "--clip-norm: must be above 0"),
        ({"shards": ()}, "DATASET, --shards: both are missing"),
        ({"shards": ("none.json",)}, "none.json"),
    ],
)
def test_settings_that_cannot_work(
    shards: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    given = {**SMALL, "accumulate": 2, "shards": (shards,), "out": str(tmp_path), **change}
    with pytest.raises(InputError, match=message) as caught:
        finetune(FinetuneConfig(**given))
    assert "\n" not in str(caught.value)


def test_what_does_not_go_together(shards: str, undisturbed: Path, tmp_path: Path) -> None:
    given = {**SMALL, "shards": (shards,), "out": str(undisturbed)}
    with pytest.raises(InputError, match="holds a run already"):
        finetune(FinetuneConfig(**given))
    with pytest.raises(InputError, match=r"was made with dropout = 0\.9, not 0\.5"):
        finetune(FinetuneConfig(**given, resume="auto", dropout=0.5))
    other = make_set(tmp_path / "other", videos=30, frames=3, name="other")
    manifest = json.loads(Path(other).read_text())
    manifest["label_names"] = ["Circle", "Hexagon", "Triangle"]
    Path(other).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="label 1 is 'Hexagon' here and 'Square' in"):
        finetune_eval(FinetuneTestConfig(shards=(other,), checkpoint=str(undisturbed / "last.pt")))
    with pytest.raises(InputError, match="was made on other videos"):
        finetune(FinetuneConfig(**{**given, "shards": (other,)}, resume="auto"))
    content = load_torch_file(undisturbed / "last.pt")
    save_torch_file(tmp_path / "a.pt", {k: v for k, v in content.items() if k != "finetuned"})
    with pytest.raises(InputError, match="has no classifier"):
        finetune_eval(FinetuneTestConfig(shards=(shards,), checkpoint=str(tmp_path / "a.pt")))
    content["model"]["classifier.bias"][0] = torch.nan
    save_torch_file(tmp_path / "nan.pt", content)
    spoiled = FinetuneTestConfig(
        shards=(shards,), checkpoint=str(tmp_path / "nan.pt"), test_size=36, workers=0, device="cpu"
    )
    with pytest.raises(InputError, match="video_0000: the network's scores are not finite"):
        finetune_eval(spoiled)
    del content["model"]["classifier.bias"]
    save_torch_file(tmp_path / "b.pt", content)
    with pytest.raises(InputError, match="is a damaged checkpoint of `seco finetune`"):
        finetune_eval(FinetuneTestConfig(shards=(shards,), checkpoint=str(tmp_path / "b.pt")))


def test_features_and_exports_of_a_fine_tuned_network(
    shards: str, undisturbed: Path, tmp_path: Path
) -> None:
    checkpoint = undisturbed / "last.pt"
    backbone = load_backbone(str(checkpoint))
    state = load_checkpoint(checkpoint)["model"]
    for name, tensor in backbone.network.state_dict().items():
        assert torch.equal(tensor, state[f"backbone.{name}"])
    assert backbone.tasks is None  # with labels, it is no row of the paper's tables
    out = tmp_path / "features"
    arguments = f"--checkpoint {checkpoint} --out {out} --frames 2 --short-edge 36 --crop-size 32"
    command = ["extract-features", "--shards", shards, *arguments.split(), "--workers", "0"]
    assert cli.run([*command, "--device", "cpu"]) == 0
    assert read_features(out).features.shape == (30, 128)
    exported = tmp_path / "backbone.pth"
    command = ["export", str(checkpoint), "--format", "torchvision", "--out", str(exported)]
    assert cli.run(command) == 0
    assert load_backbone(str(exported)).sha256 == backbone.sha256


# The test protocol on real clips.


@pytest.fixture(scope="module")
def hmdb51(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first clips of HMDB51's classes, through the toolkit's own preparation."""
    source, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("hmdb51")
    lists = shared("hmdb51/testTrainMulti_7030_splits")
    shutil.copytree(lists, source / lists.name)
    for path in sorted(lists.glob("*_test_split1.txt")):
        rows = [line.split() for line in path.read_text().splitlines()]
        name = path.name.removesuffix("_test_split1.txt")
        (source / name).mkdir()
        for part, many in (("1", 3), ("2", 1)):
            for video, _ in [row for row in rows if row[1] == part][:many]:
                shutil.copy(shared(f"hmdb51/videos/{name}/{video}"), source / name)
    settings = {"short_edge": 48, "workers": 2, "max_failures": 0.0}
    prepare(PrepareConfig(dataset="hmdb51", src=str(source), out=str(out), **settings))  # type: ignore[arg-type]
    return str(out / "hmdb51.json")


def crop_of(picture: Image.Image, number: int, size: int) -> Image.Image:
    """Centre, left or top, right or bottom, on a picture whose short side is ``size``."""
    width, height = picture.size
    if number == 0:
        cropped: Image.Image = tvf.center_crop(picture, [size, size])
        return cropped
    if number == 1:
        return picture.crop((0, 0, size, size))
    return picture.crop((width - size, height - size, width, height))


def score_in_loops(
    model: VideoClassifier, videos: LabelledVideos, video: int, clips: int, frames: int, size: int
) -> np.ndarray:
    """The protocol as its description reads: clip by clip, crop by crop, frame by frame."""
    count = videos.shards.frame_count(video)
    total = np.zeros(model.classifier.out_features)
    for clip in range(clips):
        offset = int(float(count - frames) * clip / clips)
        for crop in range(3):
            feature = torch.zeros(model.classifier.in_features)
            for frame in range(offset, offset + frames):
                jpeg = videos.shards.read_frame(video, frame)
                picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
                picture = crop_of(tvf.resize(picture, [size]), crop, size)
                pixels = tvf.normalize(
                    tvf.to_tensor(picture), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
                )
                feature += model.backbone(pixels[None])[0] / frames
            total += F.linear(feature, model.classifier.weight, model.classifier.bias).numpy()
    return total / (3 * clips)


@pytest.mark.parametrize(("clips", "frames", "size"), [(20, 3, 40), (2, 16, 48), (2, 5, 56)])
def test_scores_equal_a_loop_over_clips_crops_and_frames(
    hmdb51: str, clips: int, frames: int, size: int
) -> None:
    videos = LabelledVideos(hmdb51, "1")
    assert len(videos.train) == 24 and len(videos.test) == 8
    torch.manual_seed(1)
    model = VideoClassifier("resnet18", 8)
    for layer in model.frozen:  # as if trained: statistics that matter
        torch.nn.init.uniform_(layer.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
        torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    few = videos.test[: 2 if clips * frames < 20 else 1]
    assert min(videos.shards.frame_count(int(v)) for v in few) >= frames
    scorer = VideoScores(
        videos,
        ClipProtocol(clips, frames, 3, size),
        torch.device("cpu"),
        Ranks(),
        bf16=False,
        workers=0,
        frames_a_forward=7,
    )
    found = scorer.of(model, few)
    assert model.training and not model.frozen[0].training
    model.eval()
    with torch.no_grad():
        expected = [score_in_loops(model, videos, int(v), clips, frames, size) for v in few]
    spread = np.ptp(np.stack(expected), axis=1).min()
    assert np.abs(found - np.stack(expected)).max() < 1e-4 * spread
    assert (found.argmax(1) == np.stack(expected).argmax(1)).all()


def test_from_real_clips_to_a_result(hmdb51: str, tmp_path: Path) -> None:
    settings = {**SMALL, "epochs": 1, "batch_size": 8, "test_size": 48, "crop_size": 48}
    text = finetune(
        FinetuneConfig(shards=(hmdb51,), dataset="hmdb51", out=str(tmp_path), **settings)
    )
    assert "hmdb51 split 1: trained on 24 videos, tested on 8 with 3 clips x 3 crops" in text
    found = result(tmp_path)
    assert found["n_test"] == 8 and found["classes"] == 8
    assert {row["label_name"] for row in found["per_class"]} >= {"clap", "golf", "pullup"}
    page = tmp_path / "report.html"
    assert cli.run(["report", str(tmp_path), "--out", str(page)]) == 0
    assert "hmdb51" in page.read_text()


def test_it_learns_what_the_videos_of_a_class_share(tmp_path: Path) -> None:
    """The hue of stripes, from random weights; stripes of the test have other angles."""
    with ShardWriter(tmp_path / "hues-000.tar", "digest") as writer:
        for video in range(48):
            carpet = video % CARPETS
            record = VideoRecord(
                key=f"video_{video:04d}",
                dataset="drawn",
                source=f"{video}.avi",
                label=carpet % len(HUES),
                splits={"1": "train" if carpet < CARPETS // 2 else "test"},
            )
            writer.add(record, draw_video(carpet, still(video // CARPETS)))
    settings = {**SMALL, "arch": "resnet18", "batch_size": 24, "bn_group": 24, "segments": 2}
    settings |= {"lr": 0.01, "epochs": 20}
    # Of 32 px the last layers see one place: at another size they would see another world.
    settings |= {"dropout": 0.0, "freeze_bn": "none", "test_size": 32, "validate_every_epochs": 20}
    shards = str(tmp_path / "hues-000.tar")
    finetune(FinetuneConfig(shards=(shards,), out=str(tmp_path / "run"), **settings))
    assert result(tmp_path / "run")["top1"] > 0.8  # chance is a quarter


def test_mistakes_on_the_command_line(
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, code, message in (
        (["finetune", "--checkpoint", "random"], 1, "DATASET, --shards: both are missing"),
        (["finetune", "made"], 2, "Missing option '--checkpoint'"),
        (["finetune", "made", "--checkpoint", "random"], 1, "shards/made.json"),
        (["finetune-eval", "--checkpoint", "x.pt", "--shards", shards], 1, "x.pt: cannot be read"),
        (["finetune-eval", "--checkpoint", "x.pt", "--shards", shards, "--crops=2"], 1, "--crops"),
    ):
        assert cli.run(arguments) == code
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
