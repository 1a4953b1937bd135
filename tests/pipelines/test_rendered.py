"""The demo set: layout, lists, codecs, motion, and that colour does not decide the class."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines import _demo_set as scenes
from pipelines._demo_set import CLIPS_PER_GROUP, render_demo_set
from pipelines._ffmpeg import local_url, run_ffmpeg
from shards.errors import InputError

CLIPS = 12  # a class: four groups, so 96 videos
CHANCE = 1 / 8
MARGIN = 0.12


@dataclass
class Clip:
    path: Path
    class_name: str
    group: str
    codec: str
    size: tuple[int, int]
    frames: NDArray[np.uint8]  # (T, H, W, 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    render_demo_set(folder, clips_per_class=CLIPS, workers=2)
    return folder


@pytest.fixture(scope="module")
def clips(root: Path) -> list[Clip]:
    return [_decoded(path) for path in sorted((root / "UCF-101").glob("*/*"))]


def _decoded(path: Path) -> Clip:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        codec = stream.codec_context.name
    _, class_name, group, _ = path.stem.split("_")
    return Clip(path, class_name, group, codec, (frames.shape[2], frames.shape[1]), frames)


def _lines(root: Path, name: str) -> list[str]:
    return (root / "ucfTrainTestlist" / f"{name}.txt").read_text().splitlines()


def _group(listed: str) -> str:
    return listed.split("_")[-2]


def test_the_lists_name_every_video_once_in_ucf101s_layout(root: Path) -> None:
    index = {name: int(number) for number, name in (x.split() for x in _lines(root, "classInd"))}
    assert list(index) == sorted(index)
    assert list(index.values()) == list(range(1, 9))
    train = [line.split() for line in _lines(root, "trainlist01")]
    test = _lines(root, "testlist01")
    for listed, label in train:
        assert index[listed.split("/")[0]] == int(label)
    listed_names = [listed for listed, _ in train] + test
    on_disk = {str(path.relative_to(root / "UCF-101")) for path in (root / "UCF-101").glob("*/*")}
    assert set(listed_names) == on_disk
    assert len(listed_names) == len(on_disk) == 8 * CLIPS
    for listed in listed_names:
        class_name, file_name = listed.split("/")
        assert file_name.startswith(f"v_{class_name}_g")


def test_no_group_is_in_both_lists_and_each_class_is_in_both(root: Path) -> None:
    train = [line.split()[0] for line in _lines(root, "trainlist01")]
    test = _lines(root, "testlist01")
    assert {_group(x) for x in train}.isdisjoint({_group(x) for x in test})
    for names in (train, test):
        counts = Counter(name.split("/")[0] for name in names)
        assert set(counts) == set(scenes.CLASSES)
        assert len(set(counts.values())) == 1


def test_the_full_set_is_split_two_to_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipelines._demo_set._write_clip", lambda *_: None)
    render_demo_set(tmp_path, workers=1)
    assert len(_lines(tmp_path, "trainlist01")) == 8 * 24
    assert len(_lines(tmp_path, "testlist01")) == 8 * 12


def test_every_class_has_the_same_mix_of_containers_codecs_and_sizes(clips: list[Clip]) -> None:
    mixes = defaultdict(Counter)
    for clip in clips:
        mixes[clip.class_name][(clip.path.suffix, clip.codec, clip.size)] += 1
    first = mixes[clips[0].class_name]
    assert all(mix == first for mix in mixes.values())
    assert {(suffix, codec) for suffix, codec, _ in first} == {
        (".avi", "mpeg4"),
        (".mp4", "h264"),
        (".webm", "vp8"),
        (".webm", "vp9"),
        (".mkv", "mjpeg"),
        (".mov", "h264"),
    }
    sizes = Counter(clip.size for clip in clips)
    assert sizes.most_common(1)[0][0] == (160, 120)
    assert len(sizes) >= 4
    assert any(height > width for width, height in sizes)


def test_the_ffmpeg_of_the_pipelines_reads_one_video_of_each_kind(clips: list[Clip]) -> None:
    one_of_each = {(clip.path.suffix, clip.codec): clip for clip in clips}
    assert len(one_of_each) == 6
    for clip in one_of_each.values():
        raw = run_ffmpeg(
            [
                *("-i", local_url(clip.path), "-fps_mode", "passthrough"),
                *("-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"),
            ]
        )
        assert len(raw) == clip.frames.size


def test_frame_counts_are_in_range_and_frames_differ_over_time(clips: list[Clip]) -> None:
    low, high = scenes.FRAMES_PER_CLIP
    for clip in clips:
        count = len(clip.frames)
        assert low <= count <= high
        height, width = (side // 8 for side in clip.frames.shape[1:3])
        eight = clip.frames[np.linspace(1, count - 2, 8).astype(int), : 8 * height, : 8 * width]
        # Means of 8x8 pixels: noise of the sensor (sigma 5 of 255) and of the codec falls below 2.
        blocks = eight.reshape(8, height, 8, width, 8, 3).mean((2, 4, 5))
        differ = [(np.abs(one - other) > 6).mean() > 0.02 for one, other in combinations(blocks, 2)]
        # What swings or bounces comes back to where it was, so not all pairs have to.
        assert np.mean(differ) > 0.75, (clip.path.name, np.mean(differ))


def test_growth_and_fall_show_the_direction_of_time() -> None:
    for seed in range(5):
        grow = scenes.MOTIONS["grow"](np.random.default_rng(seed))
        sizes = [grow(t).size for t in np.linspace(0, 1, 9)]
        assert all(later > earlier for earlier, later in pairwise(sizes))
        drop = scenes.MOTIONS["drop"](np.random.default_rng(seed))
        steps = np.diff([drop(t).y for t in np.linspace(0, 1, 101)])
        falls = int((steps < 0).sum())  # a return to the top for the next fall
        assert 1 <= falls <= 3
        assert (steps > 0).sum() == 100 - falls


def test_a_moving_object_is_blurred_along_its_motion(monkeypatch: pytest.MonkeyPatch) -> None:
    def sharpness() -> float:
        frames = scenes.render_clip(
            "DropStar",
            width=160,
            height=120,
            scene=np.random.default_rng(3),
            palette=np.random.default_rng(0),
            take=np.random.default_rng(4),
        )
        return float(np.abs(np.diff(frames.astype(float), axis=1)).mean())

    blurred = sharpness()
    monkeypatch.setattr(scenes, "SHUTTER", 0.0)
    assert blurred < 0.95 * sharpness()


def test_classes_in_the_same_group_share_the_background_pattern_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scenes, "BACKGROUND_CONTRAST", (0.2, 0.2))  # above the noise

    def corner(class_name: str, scene: int) -> NDArray[np.float64]:
        frames = scenes.render_clip(
            class_name,
            width=160,
            height=120,
            scene=np.random.default_rng(scene),
            palette=np.random.default_rng(0),
            take=np.random.default_rng(0),
        )
        return np.asarray(frames.mean(axis=(0, 3))[-24:, :24].ravel(), np.float64)

    same = np.corrcoef(corner("SpinStar", 1), corner("SpinChecker", 1))[0, 1]
    other = np.corrcoef(corner("SpinStar", 1), corner("SpinChecker", 2))[0, 1]
    assert abs(same) > abs(other)


def _colour_features(clips: list[Clip]) -> NDArray[np.float64]:
    pixels = [clip.frames[::4].reshape(-1, 3) / 255.0 for clip in clips]
    return np.stack([np.concatenate([x.mean(0), x.std(0)]) for x in pixels])


def _held_out_accuracy(features: NDArray[np.float64], clips: list[Clip], method: str) -> float:
    """Each group is held out once; ridge one-vs-rest or the nearest class mean."""
    labels = np.array([list(scenes.CLASSES).index(clip.class_name) for clip in clips])
    groups = np.array([clip.group for clip in clips])
    right = 0
    for group in np.unique(groups):
        train, test = groups != group, groups == group
        z = (features - features[train].mean(0)) / features[train].std(0)
        if method == "ridge":
            z = np.c_[z, np.ones(len(z))]
            targets = 2.0 * np.eye(8)[labels[train]] - 1
            gram = z[train].T @ z[train] + np.eye(z.shape[1])
            scores = z[test] @ np.linalg.solve(gram, z[train].T @ targets)
        else:
            means = np.stack([z[train & (labels == c)].mean(0) for c in range(8)])
            scores = -((z[test][:, None] - means) ** 2).sum(-1)
        right += int((scores.argmax(1) == labels[test]).sum())
    return right / len(clips)


@pytest.mark.parametrize("method", ["ridge", "nearest mean"])
def test_colour_alone_does_not_decide_the_class(clips: list[Clip], method: str) -> None:
    colours = _colour_features(clips)
    assert _held_out_accuracy(colours, clips, method) < CHANCE + MARGIN
    # The same classifier does find a class that has a colour of its own.
    tints = 0.3 * np.random.default_rng(0).standard_normal((8, 6))
    tinted = colours + tints[[list(scenes.CLASSES).index(clip.class_name) for clip in clips]]
    assert _held_out_accuracy(tinted, clips, method) > CHANCE + 2 * MARGIN


def test_the_same_seed_gives_the_same_bytes_however_many_workers(
    root: Path, tmp_path: Path
) -> None:
    render_demo_set(tmp_path, clips_per_class=4, workers=1)
    made = sorted((tmp_path / "UCF-101").glob("*/*"))
    assert len(made) == 32
    for path in made:
        assert path.read_bytes() == (root / path.relative_to(tmp_path)).read_bytes(), path.name


def test_another_seed_or_take_gives_other_pixels() -> None:
    def frames(scene: int, take: int) -> NDArray[np.uint8]:
        return scenes.render_clip(
            "GrowRings",
            width=64,
            height=48,
            scene=np.random.default_rng(scene),
            palette=np.random.default_rng(0),
            take=np.random.default_rng(take),
        )[:20]

    assert np.array_equal(frames(0, 0), frames(0, 0))
    assert not np.array_equal(frames(0, 0), frames(1, 0))
    assert not np.array_equal(frames(0, 0), frames(0, 1))


def test_too_few_clips_for_two_lists_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 4"):
        render_demo_set(tmp_path, clips_per_class=CLIPS_PER_GROUP)
    assert not list(tmp_path.iterdir())


def test_foreign_videos_are_not_mixed_in(tmp_path: Path) -> None:
    foreign = tmp_path / "UCF-101" / "Archery" / "v_Archery_g01_c01.avi"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"mine")
    with pytest.raises(InputError, match="not part of this demo dataset"):
        render_demo_set(tmp_path, clips_per_class=4, workers=1)
    assert foreign.read_bytes() == b"mine"


def test_an_ffmpeg_without_the_encoder_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = (".avi", "avi", ("-c:v", "no_such_encoder"))
    monkeypatch.setattr("pipelines._demo_set.ENCODINGS", (encoding,))
    with pytest.raises(InputError, match="no_such_encoder") as caught:
        render_demo_set(tmp_path, clips_per_class=4, workers=1)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "UCF-101").glob("*/*"))
    assert not (tmp_path / "ucfTrainTestlist").exists()


def test_an_interruption_leaves_no_half_drawn_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault stands for Ctrl-C, after the first clip."""

    def interrupted(jobs: Any) -> Any:
        yield next(iter(as_completed(jobs)))
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_demo_set(tmp_path, clips_per_class=40, workers=2)
    drawn = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert 1 <= len(drawn) < 100 and not list(tmp_path.rglob("*.part"))  # of 320


def test_a_killed_parent_leaves_no_worker_behind(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from pipelines._demo_set import render_demo_set; "
        f"render_demo_set(Path({str(tmp_path)!r}), workers=2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        _wait_until(lambda: any((tmp_path / "UCF-101").glob("*/*")))
        parent.kill()
        parent.wait()
        # The workers and their resource tracker are all that is left of the process group.
        _wait_until(lambda: not _group_lives(parent.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
    assert not (tmp_path / "ucfTrainTestlist").exists()


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_until(done: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.1)
