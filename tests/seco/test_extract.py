"""Features: the same bits from any number of processes, threads and interruptions."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

import cli
import seco.features.extract
from seco.checkpoints.weights import BackboneChanged, BackboneGuard, load_backbone
from seco.config import ExtractConfig, check_extract, frames_of
from seco.data.crops import center_crop, decode_jpeg
from seco.data.transforms import normalise
from seco.evaluation.splits import train_test, video_groups
from seco.features.extract import extract_features
from seco.features.plan import Extraction, Parts
from seco.features.store import read_features
from shards.errors import InputError, Stopped, TooManyExcluded
from shards.format import VideoRecord
from shards.opening import open_shards
from shards.sampling import evenly_spaced
from shards.writer import ShardWriter
from tests import commands
from tests.made_shards import drawn_frame, make_set

# 7 does not divide the frames of any shard, and no video's: batches begin in the middle of one.
SMALL: dict[str, Any] = {
    "checkpoint": "random",
    "arch": "resnet10_w16",
    "frames": 5,
    "short_edge": 36,
    "crop_size": 32,
    "batch_size": 7,
    "workers": 0,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Nine shards of 4 videos of 3 to 7 frames."""
    folder = tmp_path_factory.mktemp("shards")
    return make_set(folder, videos=36, frames=lambda v: 3 + v % 5, per_shard=4)


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Its files, per-frame features included."""
    return files(extract(shards, tmp_path_factory.mktemp("out"), per_frame=True))


def extract(shards: str, out: Path, **settings: Any) -> Path:
    return extract_features(ExtractConfig(shards=(shards,), out=str(out), **{**SMALL, **settings}))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def start(shards: str, out: Path, threads: int = 1, **settings: Any) -> commands.Command:
    options = {"shards": shards, "out": out, **SMALL, **settings}
    per_frame = ["--per-frame"] if options.pop("per_frame", False) else []
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return commands.start("extract-features", *given, *per_frame, OMP_NUM_THREADS=str(threads))


def test_frame_numbers_are_linspaces() -> None:
    for wanted in (2, 7, 15, 30, 31, 50, 51):
        for count in (*range(wanted + 1, 320), 1000, 17_999):
            expected = np.linspace(0, count - 1, wanted).round().astype(int).tolist()
            assert evenly_spaced(count, wanted) == expected
            if wanted % 2 == 0:  # never half-way between two frames
                spacing = Fraction(count - 1, wanted - 1)
                assert expected == [round(spacing * place) for place in range(wanted)]
    # Here an odd number of exact fractions rounds otherwise: 14.5 to 14.
    assert evenly_spaced(30, 15)[7] == 15
    assert evenly_spaced(9, 1) == [4] and evenly_spaced(10, 1) == [5]  # the middle
    assert evenly_spaced(3, 5) == [0, 1, 2]


def test_features_are_those_of_a_plain_loop(shards: str, tmp_path: Path) -> None:
    found = read_features(extract(shards, tmp_path, per_frame=True, workers=2))
    opened = open_shards([shards])
    network = load_backbone("random", SMALL["arch"]).network.eval()
    for video in range(0, len(opened), 5):
        numbers = evenly_spaced(opened.frame_count(video), 5)
        crops = [
            center_crop(decode_jpeg(opened.read_frame(video, number)), 36, 32).copy()
            for number in numbers
        ]
        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            expected = network(normalise(images)).numpy()
        frames = found.frames_of(video)
        assert frames.shape == (min(5, 3 + video % 5), 128)
        np.testing.assert_allclose(frames, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.features[video], frames.mean(0), rtol=1e-5, atol=1e-6)
        half = len(frames) // 2
        np.testing.assert_allclose(found.halves[video, 1], frames[-half:].mean(0), rtol=1e-5)
    assert found.keys == opened.keys
    assert found.splits == opened.splits
    assert found.labels.tolist() == opened.labels.tolist()
    assert found.label_names[:3] == ["Circle", "Square", "Triangle"]
    assert found.frames.tolist() == [min(5, 3 + video % 5) for video in range(36)]
    assert found.shards[::4] == [f"made-{number:03d}.tar" for number in range(9)]


def signal_when(process: commands.Command, parts: int, out: Path, send: Any) -> str:
    """Send the signal once so many shards are finished; returns what was said."""
    deadline = time.monotonic() + 120
    while process.poll() is None and len(list(out.glob("parts/*.npz"))) < parts:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert process.poll() is None, "it was done before the signal came"
    with contextlib.suppress(ProcessLookupError):
        send()
    return process.communicate(timeout=60)[1]


def test_groups_go_with_the_features(tmp_path: Path) -> None:
    spec = make_set(tmp_path / "s", videos=12, group=lambda video: f"film {video // 4}")
    found = read_features(extract(spec, tmp_path / "out"))
    assert found.groups == [f"film {int(key[-4:]) // 4}" for key in found.keys]
    names, kind = video_groups(found)
    assert kind == "groups" and len(set(names)) == 3
    # Split 1 tests on the first three videos of nine: 0 to 2 and 9 to 11.
    (note,) = train_test(found, found).notes()
    assert note.startswith("2 groups have training and test videos (film 0, film 2)")


def test_killed_and_stopped_and_gone_on_with_it_writes_the_same_bytes(
    shards: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL to one process and its loaders, SIGTERM to two, then two to the end."""
    process = start(shards, tmp_path, workers=1, per_frame=True)
    signal_when(process, 2, tmp_path, lambda: os.killpg(process.pid, signal.SIGKILL))
    assert not (tmp_path / "meta.json").exists()
    before = set(tmp_path.glob("parts/*.npz"))
    assert 2 <= len(before) < 9

    process = start(shards, tmp_path, processes=2, per_frame=True)
    error = signal_when(process, len(before) + 2, tmp_path, process.terminate)
    assert process.returncode == 75, error
    assert "Traceback" not in error and "9 shards are done and kept" in error
    assert "the same command" in error and "SIGTERM" in error
    after = set(tmp_path.glob("parts/*.npz"))
    assert before < after

    process = start(shards, tmp_path, processes=2, per_frame=True)
    said, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert said.split() == [str(tmp_path)]
    assert f"resuming: {len(after)} of 9 shards are done" in error
    assert files(tmp_path) == undisturbed
    assert len(undisturbed) == 5


def interrupted_after(
    monkeypatch: pytest.MonkeyPatch, parts: int, shards: str, out: Path, **settings: Any
) -> None:
    """A run that is told to stop when it has finished so many shards."""
    write, written = Parts.write, 0

    def stopping(self: Parts, shard: int, part: Any) -> None:
        nonlocal written
        write(self, shard, part)
        written += 1
        if written == parts:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Parts, "write", stopping)
    with pytest.raises(Stopped, match=f"SIGINT: {parts} of 9 shards are done"):
        extract(shards, out, **settings)
    monkeypatch.setattr(Parts, "write", write)
    assert len(list(out.glob("parts/*.npz"))) == parts


CHANGES: dict[str, dict[str, Any]] = {
    "frames": {"frames": 4},
    "crop": {"crop_size": 31},
    "weights": {"seed": 1},
    "precision": {"precision": "bf16"},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_parts_of_other_settings_are_not_taken(
    changed: str,
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted_after(monkeypatch, 3, shards, tmp_path / "out")
    expected = files(extract(shards, tmp_path / "fresh", **CHANGES[changed]))
    capsys.readouterr()
    extract(shards, tmp_path / "out", **CHANGES[changed])
    said = capsys.readouterr().err
    assert "3 finished shards with other settings" in said and "resuming" not in said
    assert files(tmp_path / "out") == expected


def test_a_shard_that_was_made_again_is_extracted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name, keys and counts are the same, its pictures are not."""
    settings = {"videos": 36, "frames": 3, "per_shard": 4}
    manifest = make_set(tmp_path / "s", **settings, size=(48, 64))
    interrupted_after(monkeypatch, 9, manifest, tmp_path / "out")
    make_set(tmp_path / "s", **settings, size=(60, 64))
    extract(manifest, tmp_path / "out")
    assert files(tmp_path / "out") == files(extract(manifest, tmp_path / "fresh"))


def test_damaged_parts(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was cut is made again; one whose numbers have changed is not put among the rest."""
    interrupted_after(monkeypatch, 9, shards, tmp_path / "out")
    first, second, *_ = sorted((tmp_path / "out" / "parts").glob("*.npz"))
    first.write_bytes(first.read_bytes()[:-200])
    extract(shards, tmp_path / "out")
    assert files(tmp_path / "out") == files(extract(shards, tmp_path / "fresh"))

    interrupted_after(monkeypatch, 9, shards, tmp_path / "other", seed=3)
    second = sorted((tmp_path / "other" / "parts").glob("*.npz"))[1]
    content = bytearray(second.read_bytes())
    content[content.index(b"features.npy") + 500] ^= 1
    second.write_bytes(content)
    with pytest.raises(InputError, match=r"made-001-.*is missing or damaged — delete it"):
        extract(shards, tmp_path / "other", seed=3)
    assert not (tmp_path / "other" / "meta.json").exists()


def test_what_is_done_is_done(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(shards, tmp_path)
    (tmp_path / "probe.json").write_text("{}")

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(seco.features.extract, "shard_features", never)
    extract(shards, tmp_path, workers=1)
    assert "already" in capsys.readouterr().err
    assert (tmp_path / "probe.json").exists()
    (tmp_path / "halves.npy").unlink()
    with pytest.raises(AssertionError):
        extract(shards, tmp_path)


@pytest.fixture
def damaged(shards: str, tmp_path: Path) -> tuple[str, list[str]]:
    """The set with two damaged frames and a damaged record, in three videos; their keys."""
    manifest = make_set(tmp_path / "s", videos=36, frames=lambda v: 3 + v % 5, per_shard=4)
    opened = open_shards([manifest])
    for video, frame in ((5, 0), (5, 1), (18, 4)):
        shard, row = opened._locate(video)
        at = opened.indexes[shard].frame_at(row, frame)
        with open(opened.addresses[shard], "r+b") as tar:
            tar.seek(at.offset + at.size // 2)
            tar.write(b"damaged")
    shard, row = opened._locate(27)
    with open(opened.addresses[shard], "r+b") as tar:
        tar.seek(int(opened.indexes[shard].record_offset[row]))
        tar.write(b"[")
    return manifest, ["video_0005", "video_0018", "video_0027"]


def test_unreadable_videos_are_named_and_change_no_other(
    damaged: tuple[str, list[str]],
    undisturbed: dict[str, bytes],
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest, lost = damaged
    with pytest.raises(TooManyExcluded, match=r"3 of 36 videos could not be read.*5"):
        extract(manifest, tmp_path / "out", per_frame=True)
    said = capsys.readouterr().err
    assert all(f"left out: {key}: " in said for key in lost)
    assert "(video_0005, video_0018, video_0027)" in said
    table = (tmp_path / "out" / "errors.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in table[1:]] == [
        [key, f"made-{number:03d}.tar"] for key, number in zip(lost, (1, 4, 6), strict=True)
    ]
    found = read_features(tmp_path / "out")
    assert found.meta["unreadable"] == 3
    whole = read_features(extract(shards, tmp_path / "whole", per_frame=True))
    rows = [row for row, key in enumerate(whole.keys) if key not in lost]
    assert found.keys == [whole.keys[row] for row in rows]
    np.testing.assert_array_equal(found.features, whole.features[rows])
    np.testing.assert_array_equal(found.frames_of(20), whole.frames_of(rows[20]))


def test_shards_that_lack_videos_are_tried_again_and_no_other(
    damaged: tuple[str, list[str]],
    undisturbed: dict[str, bytes],
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest, lost = damaged
    tried: list[list[int]] = []
    compute = seco.features.extract.shard_features

    def counted(shard_set: Any, numbers: Any, *others: Any) -> Any:
        tried.append(list(numbers))
        return compute(shard_set, numbers, *others)

    monkeypatch.setattr(seco.features.extract, "shard_features", counted)
    out = extract(manifest, tmp_path / "out", per_frame=True, max_failures=10)
    before = {path.name: path.stat() for path in out.iterdir() if path.is_file()}
    (out / "probe.json").write_text("{}")
    extract(manifest, out, per_frame=True, max_failures=10)
    said = capsys.readouterr().err
    assert "nothing has changed" in said
    assert all(f"left out: {key}: " in said for key in lost)
    assert (out / "probe.json").exists()
    assert all((out / name).stat().st_mtime_ns == old.st_mtime_ns for name, old in before.items())
    # Mended.
    for tar in Path(shards).parent.glob("*.tar"):
        shutil.copy(tar, Path(manifest).parent)
    extract(manifest, out, per_frame=True)
    assert tried == [[*range(9)], [1, 4, 6], [1, 4, 6]]
    assert not (out / "probe.json").exists()
    assert not (out / "parts").exists()
    whole = extract(shards, tmp_path / "whole", per_frame=True)
    for name in ("features.npy", "halves.npy", "frames.npy", "videos.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_features_of_another_encoder_are_not_replaced_unasked(shards: str, tmp_path: Path) -> None:
    out = extract(shards, tmp_path)
    before = (out / "features.npy").read_bytes()
    with pytest.raises(InputError, match=r"holds features of resnet10_w16 random .*--overwrite"):
        extract(shards, tmp_path, seed=5)
    assert (out / "features.npy").read_bytes() == before
    extract(shards, tmp_path, seed=5, overwrite=True)
    assert (out / "features.npy").read_bytes() != before


def test_two_processes_of_other_workers_and_threads_write_the_same_bytes(
    damaged: tuple[str, list[str]], tmp_path: Path
) -> None:
    """And end with the same exit code, here that of too many failures."""
    process = start(damaged[0], tmp_path / "two", threads=3, processes=2, workers=1)
    error = process.communicate(timeout=200)[1]
    assert process.returncode == 3, error
    assert error.count("seco: ") == 1 and "Traceback" not in error
    with pytest.raises(TooManyExcluded):
        extract(damaged[0], tmp_path / "one")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    names = {name for name in files(tmp_path / "one") if not name.startswith("parts/")}
    assert names == {"features.npy", "halves.npy", "videos.csv", "errors.csv", "meta.json"}


def test_a_set_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "s", videos=4, frames=3)
    tar = tmp_path / "s" / "made-000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(InputError, match="no video could be read"):
        extract(manifest, tmp_path / "out")
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_backbone_that_moves_is_found_out(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm in training mode: its statistics follow the batches."""
    monkeypatch.setattr(torch.nn.Module, "eval", lambda self: self)
    with pytest.raises(BackboneChanged, match="BatchNorm statistics changed"):
        extract(shards, tmp_path)
    assert files(tmp_path) == {}


def test_weights_that_move_are_found_out(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the shards that this run has finished are not kept."""
    keep = Extraction.keep

    def moving(self: Any, shard: int, part: Any) -> None:
        keep(self, shard, part)
        with torch.no_grad():
            self.backbone.network.layer1[0].conv1.weight[0, 0, 0, 0] += 1e-6

    monkeypatch.setattr(Extraction, "keep", moving)
    with pytest.raises(BackboneChanged, match="weights changed"):
        extract(shards, tmp_path)
    assert files(tmp_path) == {}


def test_the_guard_is_silent_about_what_stays() -> None:
    backbone = load_backbone("random", SMALL["arch"])
    guard = BackboneGuard(backbone)
    backbone.network.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    guard.require_same_statistics()
    guard.require_unchanged()


def without_a_statistic(state: dict[str, torch.Tensor]) -> None:
    del state["layer2.0.bn1.running_var"]


def with_a_key_of_nothing(state: dict[str, torch.Tensor]) -> None:
    state["layer2.0.bn9.weight"] = torch.ones(3)


@pytest.mark.parametrize("damage", [without_a_statistic, with_a_key_of_nothing])
def test_partly_loaded_weights_are_refused(
    damage: Callable[[dict[str, torch.Tensor]], None],
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "whole.pth")
    damage(state)
    torch.save(state, tmp_path / "partly.pth")
    small = "--frames 2 --short-edge 36 --crop-size 32 --workers 0 --device cpu"
    command = ["extract-features", "--shards", shards, *shlex.split(small), "--checkpoint"]
    assert cli.run([*command, str(tmp_path / "partly.pth"), "--out", str(tmp_path / "f")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "layer2.0.bn" in error and "partly.pth" in error
    assert files(tmp_path / "f") == {}
    assert cli.run([*command, str(tmp_path / "whole.pth"), "--out", str(tmp_path / "f")]) == 0


def test_weights_that_diverged_are_one_line(shards: str, tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    state["layer4.1.bn2.weight"] *= 1e38
    state["layer4.0.bn2.weight"] *= 1e38
    torch.save(state, tmp_path / "huge.pth")
    with pytest.raises(InputError, match="video_0000 are not finite"):
        extract(shards, tmp_path / "f", checkpoint=str(tmp_path / "huge.pth"), arch=None)
    assert files(tmp_path / "f") == {}


def test_activitynet_takes_fifty_frames(tmp_path: Path) -> None:
    assert frames_of(ExtractConfig(), "kinetics") == 30
    assert frames_of(ExtractConfig(frames=8), "activitynet") == 8
    with ShardWriter(tmp_path / "anet-000.tar") as writer:
        record = VideoRecord(key="v_a", dataset="activitynet", source="v_a.mp4")
        writer.add(record, [drawn_frame(0, frame, (36, 36)) for frame in range(60)])
    found = read_features(extract(str(tmp_path / "anet-000.tar"), tmp_path / "f", frames=None))
    assert found.meta["frames"] == 50
    assert found.frames.tolist() == [50]


def test_settings_that_cannot_work() -> None:
    for settings, option in (
        ({"frames": 0}, "--frames"),
        ({"batch_size": 0}, "--batch-size"),
        ({"workers": -1}, "--workers"),
        ({"short_edge": 200}, "--short-edge"),
        ({"max_failures": 101.0}, "--max-failures"),
        ({"ray_address": "x"}, "--ray-address"),
        ({"engine": "ray", "processes": 2}, "--processes"),
    ):
        with pytest.raises(InputError, match=option):
            check_extract(ExtractConfig(**settings))  # type: ignore[arg-type]
