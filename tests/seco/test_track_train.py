"""Training of trackers: it learns, stops and goes on exactly, and leaves the backbone alone."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import seco.training.track
from cli import run
from seco.checkpoints.io import load_checkpoint
from seco.checkpoints.weights import BackboneChanged, load_backbone, load_tracker, random_backbone
from seco.config import TrackTrainConfig
from seco.models.backbones import tensors_sha256
from seco.models.siamfc import SiamFC
from seco.processes.ranks import Ranks
from seco.training.track import PairStep, track_train
from shards.errors import InputError, Stopped
from tests import commands
from tests.made_sequences import make_sequences
from tests.made_shards import make_set

SMALL: dict[str, Any] = {
    "checkpoint": "random",
    "arch": "resnet18",
    "feature_layer": "layer2",
    "channels": 32,
    "epochs": 2,
    "batch_size": 2,
    "workers": 0,
    "log_every": 1,
    "device": "cpu",
    "checkpoint_every_steps": 2,
    "keep_every_epochs": 1,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_sequences(tmp_path_factory.mktemp("sequences"), sequences=7)


def train(shards: str, out: Path, **changed: Any) -> Path:
    return track_train(TrackTrainConfig(shards=(shards,), out=str(out), **{**SMALL, **changed}))


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(shards, out)
    return out


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_log_and_a_frozen_backbone(undisturbed: Path) -> None:
    rows = lines(undisturbed)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1]
    # Geometric, by epochs.
    assert [row["lr"] for row in rows] == pytest.approx([1e-2] * 3 + [(1e-2 * 1e-5) ** 0.5] * 3)
    assert all(0 <= row["found"] <= 1 for row in rows)
    assert {path.name for path in undisturbed.glob("*.pt")} == {
        *("last.pt", "epoch-0001.pt", "epoch-0002.pt")
    }
    before = load_backbone("random", "resnet18", 0)
    model, said = load_tracker(undisturbed / "last.pt")
    assert tensors_sha256(model.backbone.network.state_dict()) == before.sha256
    assert said["encoder"] == {
        **{"arch": "resnet18", "checkpoint": "random", "sha256": before.sha256},
        **{"seed": 0, "tasks": None},
    }
    first, _ = load_tracker(undisturbed / "epoch-0001.pt")
    weight = model.head.exemplar_convolution.weight
    assert not torch.equal(weight, first.head.exemplar_convolution.weight)
    assert float(model.head.std.min()) > 0


def test_a_run_that_changed_its_backbone_does_not_end_well(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = seco.training.track.TrackTraining._train_step

    def careless(self: Any, *given: Any) -> Any:
        next(self.model.backbone.parameters()).data.mul_(1.001)
        return step(self, *given)

    monkeypatch.setattr(seco.training.track.TrackTraining, "_train_step", careless)
    with pytest.raises(BackboneChanged, match="its weights changed while the tracker was trained"):
        train(shards, tmp_path, epochs=1)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2  # the last before the end
    assert not (tmp_path / "epoch-0001.pt").exists()


def test_the_loss_falls(shards: str, tmp_path: Path) -> None:
    train(shards, tmp_path, epochs=3, final_lr=5e-3, raw_features=False)
    losses = [row["loss"] for row in lines(tmp_path)]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_res5_of_a_random_resnet50_does_not_diverge(tmp_path: Path) -> None:
    """Some of its channels are silent in search crops and not in exemplars."""
    spec = make_sequences(tmp_path / "set", sequences=4)
    settings = {"arch": "resnet50", "feature_layer": "layer4", "channels": 16}
    train(spec, tmp_path / "run", final_lr=5e-3, **settings)
    losses = [row["loss"] for row in lines(tmp_path / "run")]
    assert len(losses) == 4
    assert max(losses) < 1
    assert sum(losses[2:]) < sum(losses[:2])


def test_both_kinds_of_crops_are_measured() -> None:
    config = TrackTrainConfig(feature_layer="layer2", device="cpu")
    model = SiamFC(random_backbone("resnet18", 0), config)
    step = PairStep(model, config, Ranks(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    crops = [
        torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
        for side in (127, 239)
    ]
    exemplars, searches = (step.features(one).transpose(0, 1).flatten(1) for one in crops)
    mean, square = step.moments(*crops)
    torch.testing.assert_close(
        mean.float(), (exemplars.mean(1) + searches.mean(1)) / 2, rtol=1e-4, atol=1e-5
    )
    squares = (exemplars.square().mean(1) + searches.square().mean(1)) / 2
    torch.testing.assert_close(square.float(), squares, rtol=1e-4, atol=1e-5)


def test_the_mean_response_starts_at_zero(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = seco.training.track.TrackTraining._begin
    found = []

    def measured(self: Any, *given: Any) -> None:
        measure(self, *given)
        with self._batches(5, 6) as batches:
            (batch,) = batches  # the last that was measured
        responses = self.step.responses(batch.exemplars, batch.searches)
        found.append((float(responses.mean()), self.model.head.bias.item()))

    monkeypatch.setattr(seco.training.track.TrackTraining, "_begin", measured)
    train(shards, tmp_path)
    ((mean, bias),) = found
    assert abs(bias) > 0.01
    assert abs(mean) < 1e-3 * abs(bias)


def test_stopped_after_measuring_and_resumed(
    shards: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = seco.training.track.TrackTraining._begin

    def signalled(self: Any, *given: Any) -> None:
        measure(self, *given)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(seco.training.track.TrackTraining, "_begin", signalled)
    with pytest.raises(Stopped, match=r"saved step 0 of 6"):
        train(shards, tmp_path)
    monkeypatch.undo()
    train(shards, tmp_path, resume="auto")
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    one, other = (load_checkpoint(f / "last.pt")["model"] for f in (tmp_path, undisturbed))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_killed_and_resumed(shards: str, undisturbed: Path, tmp_path: Path) -> None:
    options = {**SMALL, "checkpoint_every_steps": 1, "out": tmp_path, "shards": shards}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    threads = str(torch.get_num_threads())
    process = commands.start("track", "train", *arguments, OMP_NUM_THREADS=threads)
    log = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) > 2):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert 0 < load_checkpoint(tmp_path / "last.pt")["step"] < 6
    # With loader processes, which change nothing.
    train(shards, tmp_path, resume="auto", workers=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    one, other = (load_checkpoint(f / "last.pt")["model"] for f in (tmp_path, undisturbed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_sigterm_saves(
    shards: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = seco.training.track.TrackTraining._train_step

    def signalled(self: Any, *given: Any) -> Any:
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *given)

    monkeypatch.setattr(seco.training.track.TrackTraining, "_train_step", signalled)
    with pytest.raises(Stopped, match=r"saved step 4 of 6.*--resume auto"):
        train(shards, tmp_path)
    monkeypatch.undo()
    train(shards, tmp_path, resume="auto")
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_two_processes_do_what_one_does(shards: str, undisturbed: Path, tmp_path: Path) -> None:
    options = {**SMALL, "out": tmp_path, "shards": shards, "processes": 2}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    process = commands.start("track", "train", *arguments, OMP_NUM_THREADS="1")
    said, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert said.split() == [str(tmp_path / "last.pt")]
    one, other = lines(tmp_path), lines(undisturbed)
    for name in ("loss", "found", "lr"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in other], rel=1e-3)
    trained, alone = (load_tracker(f / "last.pt")[0] for f in (tmp_path, undisturbed))
    torch.testing.assert_close(
        trained.head.state_dict(), alone.head.state_dict(), rtol=1e-3, atol=1e-4
    )


def test_sequences_that_are_of_no_use_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(number: int, fields: dict[str, Any]) -> None:
        if number == 1:
            fields["boxes"] = [[1.0, 1.0, 5.0, 5.0]] * len(fields["boxes"])

    spec = make_sequences(tmp_path / "set", sequences=4, change=change)
    train(spec, tmp_path / "run", convolutions="separate", raw_features=True)
    said = capsys.readouterr().err
    assert said.count("patch_001: no two frames within 99 have boxes") == 1
    assert lines(tmp_path / "run")[-1]["unreadable"] == 0


def test_a_set_in_which_nothing_can_be_paired_is_one_line(tmp_path: Path) -> None:
    def change(number: int, fields: dict[str, Any]) -> None:
        fields["boxes"] = fields["boxes"][:1]

    spec = make_sequences(tmp_path / "set", sequences=4, change=change)
    with pytest.raises(InputError, match=r"21 sequences in a row cannot be used.*no two frames"):
        train(spec, tmp_path / "run")


def test_damaged_frames_stop_a_run_when_they_are_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_sequences(tmp_path / "set", sequences=6, per_shard=6)
    tar = tmp_path / "set" / "patches-000.tar"
    data = bytearray(tar.read_bytes())
    start, end = data.index(b"patch_002.0000.jpg"), data.index(b"patch_003.json")
    data[start + 512 : end - 512] = bytes(end - start - 1024)
    tar.write_bytes(data)
    with pytest.raises(InputError, match=r"1 samples could not be read.*--max-unreadable 0.0 %"):
        train(spec, tmp_path / "run", max_unreadable=0.0)
    assert "unreadable, replaced by another sequence: patch_002: " in capsys.readouterr().err


def test_mistakes_are_one_line(
    shards: str, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*changed: str) -> str:
        options = {**SMALL, "out": tmp_path / "run", "shards": shards}
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        assert run(["track", "train", *arguments, *changed]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--batch-size: must be 1 or more" in said("--batch-size=0")
    assert "do not fill a batch of 64" in said("--batch-size=64")
    assert "must be 0 or more and below 112 px" in said("--positive-radius=112")
    assert "holds a run already" in said(f"--out={undisturbed}")
    other = said(f"--out={undisturbed}", "--resume=auto", "--seed=1")
    assert "was trained on another backbone" in other
    changed = said(f"--out={undisturbed}", "--resume=auto", "--max-gap=50")
    assert "was made with max_gap = 99, not 50" in changed


def test_shards_without_boxes_are_one_line(tmp_path: Path) -> None:
    videos = make_set(tmp_path / "videos", videos=4)
    with pytest.raises(InputError, match="has no boxes — prepare a tracking dataset"):
        train(videos, tmp_path / "run")
