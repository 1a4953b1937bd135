"""Sets of many shards: opened by their list of videos, they give what all indexes give."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

import pipelines._prepare
import shards.verify
import shards.videos
from cli import run
from shards.dataset import ShardSet
from shards.errors import InputError
from shards.format import ShardInfo
from shards.index import read_index, write_index
from shards.opening import open_shards
from shards.storage import UnreadableFrame
from shards.stream import TripletStream
from shards.verify import reindex
from shards.videos import IndexesOnDisk, VideoList, read_videos, write_videos
from tests.data import shared
from tests.made_shards import drawn_frame, make_set


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shards.videos, shards.verify, pipelines._prepare):
        monkeypatch.setattr(module, "MANY_SHARDS", 3)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    """A set of six shards, some of whose videos are too short, with its list of videos."""
    made = make_set(tmp_path, videos=24, frames=lambda video: 2 + video % 5, per_shard=4)
    reindex(made)
    assert (tmp_path / "made.videos").is_file()
    return made


def opened(spec: str) -> ShardSet:
    found = open_shards(spec)
    assert isinstance(found.indexes, IndexesOnDisk)
    return found


def all_read(spec: str, monkeypatch: pytest.MonkeyPatch) -> ShardSet:
    with monkeypatch.context() as patch:
        patch.setattr(shards.videos, "MANY_SHARDS", 10**6)
        found = open_shards(spec)
    assert isinstance(found.indexes, list)
    return found


@pytest.mark.parametrize("split", [None, "1"])
@pytest.mark.parametrize("window", [0, 2])
def test_the_same_samples_in_the_same_order(
    spec: str, split: str | None, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, reference = opened(spec), all_read(spec, monkeypatch)
    assert ours.keys == reference.keys
    assert ours.labels.tolist() == reference.labels.tolist()
    assert ours.splits == reference.splits
    assert (ours.total_bytes, ours.name) == (reference.total_bytes, reference.name)
    streams = [
        TripletStream(one, 4, "uniform", 7, window_shards=window, split=split)
        for one in (pickle.loads(pickle.dumps(ours)), reference)
    ]
    one, other = streams
    assert one.digest() == other.digest()
    assert one.left_out == other.left_out
    assert one.usable.counts.tolist() == other.usable.counts.tolist()
    for epoch in range(2):
        for step in range(one.steps_per_epoch):
            assert one.read(epoch, step, range(4)) == other.read(epoch, step, range(4))
    assert ours.records(range(24)) == reference.records(range(24))


def test_only_the_indexes_of_frames_that_are_read_are_read(spec: str) -> None:
    for path in Path(spec).parent.glob("*.idx"):
        if path.stem != "made-002":
            path.write_bytes(b"")
    found = opened(spec)
    assert found.read_frame(9, 1) == drawn_frame(9, 1)
    damaged, good = found.read_frames([(0, 0), (8, 0)])
    assert good == drawn_frame(8, 0)
    assert isinstance(damaged, UnreadableFrame)
    assert "made-000.idx" in str(damaged)
    assert "seco index" in str(damaged)
    unknown, known = found.records([0, 8])
    assert isinstance(unknown, UnreadableFrame)
    assert not isinstance(known, UnreadableFrame)


def test_few_indexes_are_kept(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.videos, "_MOST_INDEXES", 2)
    found = opened(spec)
    read = [found.read_frame(video, 0) for video in [*range(24), *range(24)]]
    assert read == [drawn_frame(video, 0) for video in [*range(24), *range(24)]]
    assert len(found.indexes._held) == 2  # type: ignore[attr-defined]


def test_shards_that_have_changed_are_opened_without_the_list(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_set(tmp_path, videos=24, frames=lambda video: 3 + video % 5, per_shard=4)
    changed = open_shards(spec)
    assert changed.frame_counts.tolist() == [3 + video % 5 for video in range(24)]
    assert changed.indexes == list(changed.indexes)
    reindex(spec)
    assert opened(spec).frame_counts.tolist() == changed.frame_counts.tolist()
    # Only a part of the set, or in another order.
    some = sorted(map(str, tmp_path.glob("*.tar")), reverse=True)
    assert isinstance(open_shards(some).indexes, list)


def test_an_index_of_other_videos_is_told(spec: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    # As many bytes: other keys of the same length.
    make_set(other, videos=24, frames=lambda video: 2 + video % 5, per_shard=4, first=1000)
    index = read_index(other / "made-003.idx")
    mine = read_index(tmp_path / "made-003.idx")
    write_index(tmp_path / "made-003.idx", type(index)(**{**vars(index), "info": mine.info}))
    (found,) = opened(spec).read_frames([(12, 0)])
    assert isinstance(found, UnreadableFrame)
    assert "has other videos than the list of its dataset" in str(found)
    assert "seco index" in str(found)


def test_a_damaged_list_is_one_line(spec: str, tmp_path: Path) -> None:
    path = tmp_path / "made.videos"
    whole, drawn = path.read_bytes(), random.Random(3)
    refused: list[str] = []
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(drawn.randint(1, 4)):
            damaged[drawn.randrange(len(damaged))] = drawn.randrange(256)
        path.write_bytes(damaged[: drawn.choice([len(whole)] * 3 + [drawn.randrange(len(whole))])])
        try:
            found = open_shards(spec)
        except InputError as error:
            refused.append(str(error))
        else:
            wanted = [(video, 0) for video in range(len(found)) if found.frame_count(video)]
            assert len(found.read_frames(wanted)) == len(wanted)
            assert len(found.keys) == len(found)
    assert 100 < len(refused) < 400
    assert all("made.videos" in line and "seco index" in line for line in refused)
    path.unlink()
    os.mkfifo(path)
    assert len(open_shards(spec)) == 24  # as if there were none


def test_the_list_is_what_the_indexes_say(spec: str, tmp_path: Path) -> None:
    first = (tmp_path / "made.videos").read_bytes()
    reindex(spec, force=True)
    assert (tmp_path / "made.videos").read_bytes() == first
    indexes = [read_index(path) for path in sorted(tmp_path.glob("*.idx"))]
    listed = read_videos(tmp_path / "made.videos")
    assert listed.infos == [index.info for index in indexes]
    assert listed.keys == [key for index in indexes for key in index.keys]
    assert np.array_equal(listed.labels, np.concatenate([index.label for index in indexes]))


def test_shards_without_videos(tmp_path: Path) -> None:
    make_set(tmp_path, videos=8, per_shard=4)
    indexes = [read_index(path) for path in sorted(tmp_path.glob("*.idx"))]
    empty = VideoList.of([])
    assert (empty.keys, len(empty.labels)) == ([], 0)
    listed = VideoList.of(indexes)
    nothing = ShardInfo(file="e.tar", bytes=9, sha256="", videos=0, frames=0)
    infos = [listed.infos[0], nothing, listed.infos[1]]
    write_videos(tmp_path / "e.videos", VideoList(**{**vars(listed), "infos": infos}))
    assert read_videos(tmp_path / "e.videos").counts.tolist() == [4, 0, 4]


def test_videos_that_occur_twice_are_refused(tmp_path: Path) -> None:
    spec = make_set(tmp_path, videos=12, per_shard=4)
    tar = tmp_path / "made-002.tar"
    tar.write_bytes((tmp_path / "made-000.tar").read_bytes())
    tar.with_suffix(".idx").unlink()
    with pytest.raises(InputError, match=r"4 videos occur twice.*again in made-002\.tar"):
        reindex(spec)
    assert not (tmp_path / "made.videos").exists()


def test_prepare_writes_the_list(tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.avi").symlink_to(shared("ucf101/UCF-101/Diving/v_Diving_g01_c01.avi"))
    given = ["prepare", "folder", "--src", str(source), "--out", str(tmp_path / "out")]
    given += ["--frames", "3", "--short-edge", "32", "--videos-per-shard", "1"]
    assert run(given) == 0
    listed = read_videos(tmp_path / "out" / "raw.videos")
    assert sorted(listed.keys) == ["0", "1", "2", "3"]
    assert isinstance(opened(str(tmp_path / "out" / "raw.json")), ShardSet)


def test_a_file_that_is_gone_makes_its_frames_unreadable(spec: str, tmp_path: Path) -> None:
    found = opened(spec)
    (tmp_path / "made-000.idx").unlink()
    (tmp_path / "made-001.tar").unlink()
    (tmp_path / "made-001.idx").unlink()
    for read in (found.read_frames([(0, 0), (4, 0), (8, 0)]), found.records([0, 4, 8])):
        assert [isinstance(one, UnreadableFrame) for one in read] == [True, True, False]
        assert "made-000.idx: cannot be read (No such file or directory)" in str(read[0])


def test_numbers_too_large_for_anything(spec: str, tmp_path: Path) -> None:
    path = tmp_path / "made.videos"
    for length in (2**63 - 1, 2**64 - 1):
        path.write_bytes(b"SECOSET1" + length.to_bytes(8, "little") + b"{}")
        with pytest.raises(InputError, match="is not a complete list of videos"):
            read_videos(path)
    huge = {"file": "a.tar", "bytes": 1, "sha256": "", "videos": 2**53 - 1, "frames": 1}
    text = json.dumps({"infos": [huge] * 1100, "text_bytes": 1}).encode()
    path.write_bytes(b"SECOSET1" + len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="is not a complete list of videos"):
        read_videos(path)


def test_a_list_that_could_not_be_read_is_not_written(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.videos, "MAX_INDEX_BYTES", 500)
    reindex(spec, force=True)
    assert not (tmp_path / "made.videos").exists()
    assert isinstance(open_shards(spec).indexes, list)


def test_indexing_a_part_keeps_the_list_of_the_whole(spec: str, tmp_path: Path) -> None:
    before = (tmp_path / "made.videos").stat().st_mtime_ns
    reindex([str(tmp_path / f"made-{number:03d}.tar") for number in (3, 2, 1, 0)], force=True)
    assert (tmp_path / "made.videos").stat().st_mtime_ns == before
    reindex(spec)
    before = (tmp_path / "made.videos").stat().st_mtime_ns
    reindex(spec)  # nothing has changed
    assert (tmp_path / "made.videos").stat().st_mtime_ns == before
    reindex(sorted(map(str, tmp_path.glob("*.tar")), reverse=True), force=True)
    assert (tmp_path / "made.videos").stat().st_mtime_ns > before
    opened(spec)
