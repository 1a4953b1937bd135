"""Shards without index, streamed: equal step counts, usable samples, faults counted."""

from __future__ import annotations

import functools
import http.server
import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from shards import streaming as sequential
from shards.errors import InputError
from shards.opening import open_shards, open_stream
from shards.stream import NothingToRead, Sample, TripletFrames, UnreadableTriplet
from shards.streaming import SequentialStream
from tests.http_server import serving
from tests.made_shards import drawn_frame

SIZE = (16, 16)


def foreign_tar(path: Path, videos: range, frames: int = 5, *, labels: bool = True) -> None:
    """As other people's WebDataset tars are: folders in names, no records, other members."""
    with tarfile.open(path, "w") as tar:
        for video in videos:
            members = {f"{f}.jpg": drawn_frame(video, f, SIZE) for f in range(frames)}
            for name, data in {**members, **({"cls": b"1"} if labels else {})}.items():
                info = tarfile.TarInfo(f"train/v{video}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(4):
        foreign_tar(tmp_path / f"f-{shard}.tar", range(shard * 10, shard * 10 + 10))
    return tmp_path


def stream_of(spec: str | list[str], rank: int = 0, world_size: int = 1) -> SequentialStream:
    stream = open_stream(spec, 8, "uniform", 3, steps_per_epoch=5, rank=rank, world_size=world_size)
    assert isinstance(stream, SequentialStream)
    return stream


def read(stream: SequentialStream, steps: int) -> list[Sample]:
    return [s for step in range(steps) for s in stream.read(0, step, range(stream.rows))]


def keys(samples: list[Sample]) -> list[str]:
    assert all(isinstance(s, TripletFrames) for s in samples), samples
    return [s.key for s in samples]


def test_a_command_is_streamed_without_end(folder: Path) -> None:
    stream = stream_of(f"pipe:cat {folder}/f-{{0..3}}.tar")
    assert (stream.steps_per_epoch, stream.name, stream.left_out) == (5, "stream", 0)
    samples = read(stream, 25)
    counts = Counter(keys(samples))
    assert set(counts) == {f"train/v{v}" for v in range(40)}
    assert max(counts.values()) <= 12  # 200 samples of 40 videos through a buffer of all
    triplets = set()
    for sample in samples:
        assert isinstance(sample, TripletFrames)
        video = int(sample.key.removeprefix("train/v"))
        of_bytes = {drawn_frame(video, f, SIZE): f for f in range(5)}
        anchor, second, third = (of_bytes[jpeg] for jpeg in sample.jpegs)
        assert second < third
        assert anchor < second if sample.order == 0 else anchor > third
        triplets.add((video, anchor, second, third))
    assert len(triplets) > 100  # drawn anew in each pass
    assert keys(read(stream_of(f"pipe:cat {folder}/f-{{0..3}}.tar"), 25)) == keys(samples)


def test_ranks_and_workers_read_their_own_shards(folder: Path) -> None:
    seen = []
    for rank in range(2):
        for worker in range(2):
            stream = stream_of(f"pipe:cat {folder}/f-{{0..3}}.tar", rank, 2)
            assert (stream.rows, stream.steps_per_epoch) == (4, 5)
            stream.set_worker(worker, 2)
            seen.append(set(keys(read(stream, 40))))
    assert sorted(map(len, seen)) == [10] * 4
    assert len(set.union(*seen)) == 40


def test_more_readers_than_shards_repeat_some(folder: Path) -> None:
    orders = []
    for worker in range(3):
        stream = stream_of(f"pipe:cat {folder}/f-0.tar")
        stream.set_worker(worker, 3)
        orders.append(keys(read(stream, 5)))
        assert len(set(orders[-1])) == 10
    assert orders[0] != orders[1] != orders[2]


def test_a_buffer_mixes_the_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "_BUFFERED", 40)
    samples = read(stream_of(f"pipe:cat {folder}/f-{{0..3}}.tar"), 20)
    shards = [int(key.removeprefix("train/v")) // 10 for key in keys(samples)]
    changes = sum(one != other for one, other in pairwise(shards))
    assert changes > 60


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *given: None  # type: ignore[attr-defined]
    with serving(handler) as url:
        yield url


def test_remote_tars_without_index_are_streamed(web: str) -> None:
    with pytest.raises(InputError, match=r"f-0\.tar\?token=a: has no index .* next to it"):
        open_shards(f"{web}/f-{{0..3}}.tar?token=a")
    with pytest.raises(InputError, match=r"length of an epoch is unknown — give --steps-per"):
        open_stream(f"{web}/f-{{0..3}}.tar", 8, "uniform", 3)
    stream = stream_of(f"{web}/f-{{0..3}}.tar")
    assert stream.name == "f"
    assert set(keys(read(stream, 20))) == {f"train/v{v}" for v in range(40)}


def test_a_server_without_ranges_gives_whole_tars(
    web: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own is one; fsspec reads 5 MB at a time where it can."""
    monkeypatch.setattr(sequential, "_BUFFERED", 8)  # else filled with hundreds of megabytes
    large = {f"x{n}.{f}.jpg": os.urandom(1 << 20) for n in range(4) for f in range(3)}
    with tarfile.open(folder / "large.tar", "w") as tar:
        for name, data in large.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    samples = read(stream_of(f"{web}/large.tar"), 5)
    assert set(keys(samples)) == {"x0", "x1", "x2", "x3"}


def test_a_server_that_fails_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"odd {one}")

    def fail(address: str) -> None:
        raise Odd(1, 2)

    monkeypatch.setattr(sequential, "_open", fail)
    with pytest.raises(NothingToRead, match=r"Odd: odd 1$"):
        read(stream_of("pipe:x"), 20)
    stream = stream_of("pipe:x")
    for _ in range(3):  # not just the first time
        with pytest.raises(NothingToRead):
            stream.read(0, 0, range(8))


def test_faults_are_named_and_the_rest_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folder / "f-1.tar").read_bytes()
    (folder / "f-1.tar").write_bytes(whole[: len(whole) // 2])
    foreign_tar(folder / "f-2.tar", range(20, 30), frames=2)
    (folder / "f-3.tar").unlink()
    samples = read(stream_of(f"pipe:cat {folder}/f-{{0..3}}.tar 2>/dev/null"), 20)
    reasons = [f"{s.key}: {s.reason}" for s in samples if isinstance(s, UnreadableTriplet)]
    assert any("f-1.tar" in reason and "ReadError" in reason for reason in reasons)
    assert "10 videos of fewer than 3 frames were left out" in capsys.readouterr().err
    assert any("f-3.tar" in reason for reason in reasons)
    good = {s.key for s in samples if isinstance(s, TripletFrames)}
    assert {f"train/v{v}" for v in range(14)} <= good | {"train/v14"}
    assert not any("\n" in reason for reason in reasons)


def test_nothing_at_all_to_read_ends(folder: Path) -> None:
    stream = stream_of(f"pipe:cat {folder}/none.tar 2>/dev/null")
    with pytest.raises(NothingToRead, match="no video can be read"):
        read(stream, 100)


def test_local_foreign_tars_are_indexed_in_memory(folder: Path) -> None:
    stream = open_stream(f"{folder}/f-*.tar", 40, "uniform", 3)
    assert sorted(keys(stream.read(0, 0, range(40)))) == sorted(f"train/v{v}" for v in range(40))


def test_other_commands_refuse_what_can_only_be_streamed(folder: Path) -> None:
    with pytest.raises(InputError, match=r"pipe:cat .*can only be streamed, in pre-training"):
        open_shards(f"pipe:cat {folder}/f-0.tar")
