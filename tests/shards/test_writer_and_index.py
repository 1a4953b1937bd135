"""Shards: what is written is what is read, stock WebDataset reads it, damage is named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from shards.errors import InputError
from shards.format import VideoRecord
from shards.index import build_index, read_index, sha256_of
from shards.opening import open_shards
from shards.storage import UnreadableFrame
from shards.verify import reindex
from shards.writer import ShardWriter, member_header
from tests import commands
from tests.made_shards import drawn_frame, make_set


def test_every_frame_comes_back_by_random_access(tmp_path: Path) -> None:
    shards = open_shards(make_set(tmp_path, videos=12, frames=4, per_shard=5))
    assert len(shards) == 12
    assert shards.frame_counts.tolist() == [4] * 12
    for video in range(12):
        assert shards.keys[video] == f"video_{video:04d}"
        for frame in range(4):
            assert shards.read_frame(video, frame) == drawn_frame(video, frame)
        record = shards.record(video)
        assert (record.key, record.label) == (f"video_{video:04d}", shards.labels[video])
    assert shards.splits["1"].count("test") == sum(v // 3 % 3 == 0 for v in range(12))
    assert shards.label_names == ["Circle", "Square", "Triangle"]


def test_stock_webdataset_reads_the_tars(tmp_path: Path) -> None:
    make_set(tmp_path, videos=7, frames=3, per_shard=4)
    tars = sorted(str(p) for p in tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert [s["__key__"] for s in samples] == [f"video_{v:04d}" for v in range(7)]
    for video, sample in enumerate(samples):
        assert sample["json"]["label"] == video % 3
        pictures = [name for name in sample if name.endswith(".jpg") or name == "jpg"]
        assert sorted(pictures) == [f"{f:04d}.jpg" for f in range(3)]
        expected = np.asarray(Image.open(io.BytesIO(drawn_frame(video, 2))))
        assert np.array_equal(np.asarray(sample["0002.jpg"]), expected)


def test_the_index_rebuilt_from_the_tar_is_the_one_written(tmp_path: Path) -> None:
    make_set(tmp_path, videos=5, frames=3)
    tar = tmp_path / "made-000.tar"
    written, rebuilt = read_index(tar.with_suffix(".idx")), build_index(tar)
    assert written.info == rebuilt.info
    assert written.info.sha256 == sha256_of(tar)
    assert written.keys == rebuilt.keys
    assert written.splits == rebuilt.splits
    for name in ("first_frame", "frame_offset", "frame_size", "record_offset", "record_size"):
        assert np.array_equal(getattr(written, name), getattr(rebuilt, name)), name
    assert np.array_equal(written.label, rebuilt.label)


def test_names_too_long_for_plain_tar_headers_survive(tmp_path: Path) -> None:
    key = "a" * 180
    with ShardWriter(tmp_path / "long-000.tar") as writer:
        writer.add(VideoRecord(key=key, dataset="d", source="s"), [drawn_frame(0, 0)])
    shards = open_shards(str(tmp_path / "long-000.tar"))
    assert shards.keys == [key]
    assert shards.read_frame(0, 0) == drawn_frame(0, 0)
    assert build_index(tmp_path / "long-000.tar").keys == [key]


def test_a_set_without_indexes_is_indexed_in_memory(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, videos=6)
    for index in tmp_path.glob("*.idx"):
        index.unlink()
    assert open_shards(manifest).read_frame(5, 1) == drawn_frame(5, 1)


@pytest.mark.parametrize("keep_index", [True, False])
@pytest.mark.parametrize("cut", [5000, 10_240, 20_000])
def test_a_truncated_tar_is_refused_by_name(tmp_path: Path, keep_index: bool, cut: int) -> None:
    manifest = make_set(tmp_path, videos=6)
    tar = tmp_path / "made-000.tar"
    content = tar.read_bytes()
    content = content[: len(content.rstrip(b"\0")) + 1024]  # without the padding of whole records
    tar.write_bytes(content[:-cut])
    if not keep_index:
        tar.with_suffix(".idx").unlink()
    with pytest.raises(InputError, match=r"made-000\.tar: is truncated"):
        open_shards(manifest)


def test_padding_may_be_cut_and_the_tar_still_opens(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, videos=6)
    tar = tmp_path / "made-000.tar"
    tar.with_suffix(".idx").unlink()
    content = tar.read_bytes()
    used = len(content.rstrip(b"\0"))
    tar.write_bytes(content[: -(-used // 512) * 512 + 1024])
    assert len(open_shards(manifest)) == 6


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, videos=6)
    tar = tmp_path / "made-000.tar"
    tar.with_suffix(".idx").unlink()
    content = bytearray(tar.read_bytes())
    content[content.index(b"video_0003.0002.jpg")] ^= 1
    tar.write_bytes(content)
    with pytest.raises(InputError, match=r"made-000\.tar: .*damaged header"):
        open_shards(manifest)


def test_a_tar_cut_while_open_is_an_unreadable_frame(tmp_path: Path) -> None:
    shards = open_shards(make_set(tmp_path, videos=4))
    tar = tmp_path / "made-000.tar"
    with open(tar, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(UnreadableFrame, match=r"made-000\.tar"):
        shards.read_frame(3, 5)


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"SECOIDX2" + b"\xff" * 40])
def test_a_damaged_index_is_named(tmp_path: Path, damage: bytes) -> None:
    make_set(tmp_path, videos=2)
    index = tmp_path / "made-000.idx"
    index.write_bytes(damage)
    with pytest.raises(InputError, match=r"made-000\.idx: is not a complete index"):
        read_index(index)


def test_an_index_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    make_set(tmp_path, videos=2)
    (tmp_path / "made-000.idx").write_bytes(b"SECOIDX1" + bytes(40))
    with pytest.raises(InputError, match=r"made-000\.idx: is an index of another version.*--force"):
        open_shards(str(tmp_path))
    reindex(str(tmp_path / "made-000.tar"), force=True)
    assert len(open_shards(str(tmp_path))) == 2


def test_an_index_may_not_point_outside_its_tar(tmp_path: Path) -> None:
    make_set(tmp_path, videos=2)
    path = tmp_path / "made-000.idx"
    data = bytearray(path.read_bytes())
    offset = read_index(path).frame_offset
    at = bytes(data).index(np.asarray(offset).tobytes())
    data[at : at + 8] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match="not a complete index"):
        read_index(path)


def test_a_failure_inside_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path / "x-000.tar") as writer:
        writer.add(VideoRecord(key="a", dataset="d", source="s"), [b"jpeg"])
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), ShardWriter(tmp_path / "file/x.tar"):
        pass


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a.json", 0),
        ("k" * 91 + ".0001.jpg", 123_456),
        ("x-1.0000.jpg", 8**11 - 1),
        ("n" * 101, 1),
        ("ü.jpg", 4),
        ("large.jpg", 9 << 30),
    ],
)
def test_headers_are_those_of_the_standard_library(name: str, size: int) -> None:
    expected = tarfile.TarInfo(name)
    expected.size, expected.mode = size, 0o644
    assert member_header(name, size) == expected.tobuf(tarfile.PAX_FORMAT)


def test_a_tar_of_videos_is_not_indexed_as_frames(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        for name in ("0.mp4", "0.json", "1.webm", "1.txt"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(InputError, match=r"web.tar: holds no JPEG frames, but mp4, txt, webm"):
        build_index(tmp_path / "web.tar")
    process = commands.start("index", tmp_path)
    assert process.wait(60) == 1 and not list(tmp_path.glob("*.idx"))
    # One without any member is a shard all of whose videos were excluded.
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert build_index(tmp_path / "empty.tar").info.videos == 0
