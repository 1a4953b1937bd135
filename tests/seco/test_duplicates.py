"""``seco retrieve duplicates``: planted copies are all found, videos of one class are not taken."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from cli import run
from pipelines._demo_set import render_demo_set
from pipelines._ffmpeg import local_url, run_ffmpeg
from seco.config import DuplicatesConfig
from seco.evaluation.duplicates import COPY, NEAR, Fingerprint, compare, duplicates, fingerprint
from seco.features.store import write_features
from shards.dataset import ShardSet
from shards.errors import InputError
from shards.opening import open_shards
from tests.browser import PHONE_PX, open_page
from tests.data import shared
from tests.made_shards import drawn_frame, make_set
from tests.seco.made_features import META, clusters, made_rows, write_clusters

H264 = ("-c:v", "libx264", "-preset", "veryfast", "-threads", "1")
# What is done to a copy: options of ffmpeg. Two frames are cut at either end, sizes change.
PLANTED = {
    "exact": ("-c", "copy"),
    "encoded again": (*H264, "-crf", "36"),
    "resized": ("-vf", "scale=96:96", *H264, "-crf", "23"),
    "trimmed": ("-vf", "trim=start_frame=2,setpts=PTS-STARTPTS", *H264, "-crf", "23"),
    "mirrored": ("-vf", "hflip", *H264, "-crf", "23"),
    "all at once": (
        *("-vf", "trim=start_frame=2,setpts=PTS-STARTPTS,hflip,scale=120:90,eq=brightness=0.05"),
        *(*H264, "-crf", "32"),
    ),
}


def alter(source: Path, target: Path, options: tuple[str, ...]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    run_ffmpeg(["-i", local_url(source), *options, "-an", "-y", local_url(target)])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A UCF101 tree with altered copies of train videos in the test list: {copy: original}."""
    out = tmp_path_factory.mktemp("planted") / "raw"
    render_demo_set(out, clips_per_class=4, seed=3)
    lists = out / "ucfTrainTestlist"
    train = [line.split()[0] for line in (lists / "trainlist01.txt").read_text().splitlines()]
    planted = {}
    for number, (source, options) in enumerate(
        zip(train[:: len(train) // len(PLANTED)], PLANTED.values(), strict=False)
    ):
        original = out / "UCF-101" / source
        suffix = original.suffix if options == ("-c", "copy") else ".mp4"
        copy = f"{original.parent.name}/v_{original.parent.name}_g90_c{number:02d}{suffix}"
        alter(original, out / "UCF-101" / copy, options)
        with open(lists / "testlist01.txt", "a") as file:
            file.write(f"{copy}\n")
        planted[Path(copy).stem] = original.stem
    assert len(planted) == len(PLANTED)
    return out, planted


@pytest.mark.parametrize("frames", ["--all-frames", "--frames=16"])
def test_planted_copies_are_found_and_nothing_else(
    tree: tuple[Path, dict[str, str]], frames: str, tmp_path: Path
) -> None:
    raw, planted = tree
    prepare = ["prepare", "ucf101", "--src", str(raw), "--out", str(tmp_path / "s"), frames]
    assert run([*prepare, "--workers", "2"]) == 0
    features, page = tmp_path / "f", tmp_path / "duplicates.html"
    # An untrained encoder: all its cosines are near 1, and it does not know mirror images.
    size = ["--frames", "4", "--short-edge", "32", "--crop-size", "32", "--workers", "0"]
    extract = ["extract-features", "--shards", str(tmp_path / "s/ucf101.json"), *size]
    extract += ["--checkpoint", "random", "--arch", "resnet18", "--out", str(features)]
    assert run(extract) == 0
    command = ["retrieve", "duplicates", "--features", str(features), "--html", str(page)]
    assert run([*command, "--workers", "2"]) == 0
    with open(features / "duplicates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row["key"]: row["near_key"] for row in rows}
    assert len(rows) == len(found)
    if frames == "--all-frames":
        assert found == planted
    else:
        # The stored frames of a trimmed copy are others than the original's. Where what is shown
        # turns or shakes faster than frames are stored, they have nothing in common.
        names = dict(zip(planted, PLANTED, strict=True))
        planted = {k: v for k, v in planted.items() if k in found or not is_trimmed(names[k])}
        assert found == planted
        assert len(planted) >= 4
    assert {(row["split"], row["near_split"]) for row in rows} == {("test", "train")}
    flipped = {row["key"] for row in rows if row["mirrored"]}
    flips = dict(zip(tree[1], (" ".join(options) for options in PLANTED.values()), strict=True))
    assert flipped == {key for key in planted if "hflip" in flips[key]}
    if frames == "--all-frames":
        assert {row["kind"] for row in rows} == {COPY}

    opened = open_page(page, size_px=PHONE_PX, dark=True)
    assert opened.faults() == []
    assert len(opened.images) == len(planted) * 2 * 4
    for copy, original in planted.items():
        assert copy in opened.text
        assert original in opened.text
    assert opened.background != open_page(page).background


def is_trimmed(name: str) -> bool:
    return any("trim" in option for option in PLANTED[name])


def prints(shards: ShardSet) -> dict[str, Fingerprint]:
    found = {}
    for video, key in enumerate(shards.keys):
        count = shards.frame_count(video)
        jpegs = [shards.read_frame(video, number) for number in range(count)]
        made = fingerprint(jpegs, shards.record(video).frame_times)
        assert made is not None
        found[key] = made
    return found


def test_copies_of_real_clips(tmp_path: Path) -> None:
    videos = sorted(shared("hmdb51/videos").glob("*/*.avi"))
    raw = tmp_path / "raw"
    chosen = videos[:: len(videos) // 8]
    raw.mkdir()
    for number, video in enumerate(chosen):
        shutil.copy(video, raw / f"{number}-plain.avi")
        for name in ("encoded again", "trimmed", "all at once"):
            alter(video, raw / f"{number}-{name[:3]}.mp4", PLANTED[name])
    prepare = ["prepare", "folder", "--src", str(raw), "--out", str(tmp_path / "s")]
    assert run([*prepare, "--all-frames", "--workers", "2"]) == 0
    found = prints(open_shards(str(tmp_path / "s/raw.json")))
    plain = {k: v for k, v in found.items() if k.endswith("-plain")}
    others = {k: v for k, v in found.items() if k not in plain}
    assert len(plain) >= 8
    assert len(others) == 3 * len(plain)
    for key, altered in others.items():
        same = [k for k, original in plain.items() if compare(original, altered).kind is not None]
        assert same == [f"{key.partition('-')[0]}-plain"]
        assert compare(plain[same[0]], altered).kind == COPY


def moving(seed: int, count: int = 20, background: int | None = None) -> Fingerprint:
    """A picture of its own with a spot that goes its own way."""
    rng = np.random.default_rng(seed if background is None else background)
    y, x = np.mgrid[0:16, 0:16]
    scene = 80 + 40 * rng.standard_normal((16, 16))
    path = np.cumsum(np.random.default_rng(seed).uniform(-1.5, 1.5, (count + 1, 2)), axis=0) + 8
    spots = [160 * np.exp(-((x - a) ** 2 + (y - b) ** 2) / 6) for a, b in path[:count]]
    frames = np.stack([scene + spot for spot in spots]).astype(np.float32)
    return Fingerprint(np.arange(count) / 10, frames.reshape(count, -1))


def part(video: Fingerprint, frames: slice) -> Fingerprint:
    times = video.times[frames]
    return Fingerprint(times - times[0], video.frames[frames])


def test_what_moves_decides() -> None:
    a = moving(1)
    assert compare(a, a).kind == COPY
    assert compare(a, moving(2)).kind is None
    same_place = compare(a, moving(2, background=1))
    assert same_place.kind is None  # a camera that stands still, another time
    assert same_place.appearance > 0.6
    trimmed = compare(a, part(a, slice(6, None)))
    assert (trimmed.kind, round(trimmed.shift_seconds, 2)) == (COPY, 0.6)
    assert compare(part(a, slice(6, None)), a).shift_seconds == pytest.approx(-0.6, abs=0.01)
    mirrored = compare(a, a.mirrored())
    assert (mirrored.kind, mirrored.mirrored) == (COPY, True)
    brighter = Fingerprint(a.times, a.frames * 0.8 + 30)
    assert compare(a, brighter).kind == COPY
    assert compare(a, part(a, slice(None, None, 2))).kind is not None  # half the frames stored
    assert compare(part(a, slice(0, 8)), part(a, slice(10, 18))).kind is None


def test_stills_are_compared_as_pictures() -> None:
    a = moving(1)
    still = Fingerprint(a.times, np.repeat(a.frames[:1], 20, axis=0))
    noise = np.random.default_rng(0).standard_normal(still.frames.shape).astype(np.float32)
    assert compare(still, Fingerprint(still.times, still.frames + 0.3 * noise)).kind == NEAR
    other = moving(5)
    assert compare(still, Fingerprint(a.times, np.repeat(other.frames[:1], 20, 0))).kind is None
    one = part(a, slice(0, 1))
    assert compare(one, one).kind == NEAR
    assert compare(one, part(a, slice(9, 10))).kind is None
    gray = Fingerprint(a.times, np.full((20, 256), 128, np.float32))
    assert compare(gray, gray).kind is None  # nothing to see is no evidence


def test_a_video_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "s", videos=12, per_shard=6)
    shards = open_shards(manifest)
    features, labels = clusters(12, 8, 3, 1.0)
    rows = made_rows(labels.tolist(), [{"1": "train" if n < 6 else "test"} for n in range(12)])
    for row, key in zip(rows, shards.keys, strict=True):
        row["key"] = key
    folder = tmp_path / "f"
    write_features(
        folder, features, np.stack([features] * 2, 1), rows, {**META, "shards": [manifest]}
    )
    for number in range(6):  # every frame of one video
        damage_frame(tmp_path / "s/made-001.tar", shards.read_frame(8, number))
    found = duplicates(DuplicatesConfig(features=str(folder), candidates=6, workers=1))
    assert found.unreadable == [shards.keys[8]]
    assert shards.keys[8] in found.table()
    assert found.pairs == []
    assert found.compared == 36


def damage_frame(tar: Path, jpeg: bytes) -> None:
    data = tar.read_bytes()
    at = data.index(jpeg) + len(jpeg) // 2
    tar.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])


def test_by_features_alone(tmp_path: Path) -> None:
    features, labels = clusters(60, 64, 60, 0.0)
    features[3] = 2 * features[40]  # train and test: the same direction
    features[5] = features[7]  # both in train
    features[9] = features[41]  # train and unused
    values = ["train"] * 30 + ["test"] * 11 + ["unused"] * 19
    rows = made_rows(labels.tolist(), [{"1": v} for v in values])
    write_features(tmp_path, features, np.stack([features] * 2, 1), rows, META)
    found = duplicates(DuplicatesConfig(features=str(tmp_path), features_only=True))
    (pair,) = found.pairs
    assert (pair.key, pair.split, pair.near_key, pair.near_split) == (
        *("v040", "test"),
        *("v003", "train"),
    )
    assert pair.similarity == pytest.approx(1)
    lines = (tmp_path / "duplicates.csv").read_text().splitlines()
    assert lines[0].startswith("key,split,near_key,near_split,kind,mirrored,similarity,")
    assert len(lines) == 2
    assert "v040" in found.table()


def test_two_folders_and_what_is_refused(tmp_path: Path) -> None:
    labels: list[int | None] = [n % 3 for n in range(60)]
    for name, value in (("a", "train"), ("b", "val")):
        write_clusters(tmp_path / name, rows=made_rows(labels, [{"official": value}] * 60))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    two = DuplicatesConfig(features=a, test_features=b, features_only=True, threshold=0.99999)
    assert {(p.key, p.near_key) for p in duplicates(two).pairs} == {
        (f"v{n:03d}",) * 2 for n in range(60)
    }
    with pytest.raises(InputError, match="fewer than two splits"):
        duplicates(DuplicatesConfig(features=a))
    with pytest.raises(InputError, match="--features-only"):  # the shards are not there
        duplicates(DuplicatesConfig(features=a, test_features=b))
    with pytest.raises(InputError, match="needs frames"):
        duplicates(DuplicatesConfig(features=a, test_features=b, features_only=True, html="x"))
    with pytest.raises(InputError, match="--threshold: must be a cosine"):
        duplicates(DuplicatesConfig(features=a, features_only=True, threshold=float("nan")))
    with pytest.raises(InputError, match="candidates"):
        duplicates(DuplicatesConfig(features=a, test_features=b, candidates=0))


def test_a_frame_that_is_no_picture_is_left_out() -> None:
    frames = [drawn_frame(1, number) for number in range(6)]
    times = [number / 5 for number in range(6)]
    made = fingerprint([b"no jpeg", *frames[1:]], times)
    assert made is not None
    assert len(made.frames) == 5
    assert made.times[0] == 0
    assert fingerprint([b""], [0.0]) is None


@pytest.mark.parametrize("features_only", [True, False])
def test_clips_of_one_recording_on_both_sides_are_told(
    features_only: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Videos 0 and 3 are of one recording; every third is a test video, whatever its recording.
    shards = make_set(tmp_path, videos=6, group=lambda video: "tape" if video in (0, 3) else None)
    features = tmp_path / "f"
    size = ["--frames", "4", "--short-edge", "32", "--crop-size", "32", "--workers", "0"]
    extract = ["extract-features", "--shards", shards, *size, "--out", str(features)]
    assert run([*extract, "--checkpoint", "random", "--arch", "resnet10_w16"]) == 0
    command = ["retrieve", "duplicates", "--features", str(features), "--split", "1"]
    if features_only:
        command += ["--features-only", "--threshold", "-1", "--candidates", "3"]
    assert run(command) == 0
    with open(features / "duplicates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    together = [row for row in rows if row["same_group"]]
    if features_only:
        assert len(rows) == 9
        (pair,) = together
        assert {pair["key"], pair["near_key"]} == {"video_0000", "video_0003"}
        said = capsys.readouterr().out
        assert "1 of them are of one group, such as clips of one recording" in said
        assert "unverified, same group  " in said
    else:
        assert len(rows) == len(together) == 0  # they show different things
