"""Sets behind fsspec: read by ranges, kept in a cache, over a bad line."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from shards import opening as cache
from shards import storage as remote
from shards.errors import InputError
from shards.format import ShardInfo
from shards.opening import CachedAccess, CacheSettings, ShardCache, open_shards, open_stream
from shards.storage import ByteRange, RangeAccess, UnreadableFrame, joined_ranges
from shards.stream import TripletFrames
from tests.data import ROOT
from tests.made_shards import drawn_frame, make_set
from tests.s3_server import bad_line, s3_bucket

SIZE = (16, 16)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A set of 40 videos in 8 shards; the waits between tries are short."""
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.01)
    make_set(tmp_path / "made", videos=40, frames=5, per_shard=5, size=SIZE)
    with s3_bucket(monkeypatch) as address:
        fsspec.filesystem("s3").put(f"{tmp_path / 'made'}/", f"{address}/", recursive=True)
        yield address


def described(stream: Any, steps: range = range(4)) -> list[tuple[str, ...]]:
    found = []
    for step in steps:
        for sample in stream.read(0, step, range(stream.rows)):
            assert isinstance(sample, TripletFrames), sample
            found.append((sample.key, str(sample.order), *map(str, sample.jpegs)))
    return found


def local(tmp_path: Path, **options: Any) -> list[tuple[str, ...]]:
    return described(open_stream(str(tmp_path / "made"), 10, "uniform", 1, **options))


@pytest.mark.parametrize("fault", ["none", "drop", "error", "slow"])
def test_ranges_give_what_a_folder_gives(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    with bad_line(monkeypatch, fault) as line:
        line.every = 10 if fault != "none" else 10**9
        stream = open_stream(f"{bucket}/made.json", 10, "uniform", 1)
        assert described(stream) == local(tmp_path)
        assert (line.spoilt > 3) == (fault != "none")
        assert any(path.endswith(".tar") for path in line.paths)
        assert not any(path.endswith(".tar") for path in line.whole_reads)


def test_a_set_is_opened_with_its_labels(bucket: str) -> None:
    shards = open_shards(f"{bucket}/made-{{000..007}}.tar")
    assert shards.label_names == ["Circle", "Square", "Triangle"]
    assert len(shards) == 40
    assert shards.record(3).key == "video_0003"
    assert shards.read_frame(39, 4) == drawn_frame(39, 4, SIZE)


@pytest.mark.parametrize("fault", ["none", "drop", "error", "slow"])
def test_a_cache_gives_what_a_folder_gives(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    with bad_line(monkeypatch, fault) as line:
        line.every = 10 if fault != "none" else 10**9
        settings = CacheSettings(str(tmp_path / "cache"))
        stream = open_stream(
            f"{bucket}/made.json", 10, "uniform", 1, cache=settings, window_shards=2
        )
        assert described(stream) == local(tmp_path, window_shards=2)
        fetched = len(line.paths)
        assert described(stream) == local(tmp_path, window_shards=2)
        assert len(line.paths) == fetched  # all of it from the cache now
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 8


def read_all(spec: str, folder: str, limit_gb: float, out: Any) -> None:
    shards = open_shards(spec, CacheSettings(folder, limit_gb))
    reads = shards.read_frames([(video, 2) for video in range(40)])
    out.put([r for r in reads if isinstance(r, bytes)])


def test_the_processes_of_a_node_fetch_each_shard_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned = multiprocessing.get_context("spawn")
    with bad_line(monkeypatch, "slow") as line:
        line.every = 3
        out = spawned.Queue()
        given = (f"{bucket}/made.json", str(tmp_path / "cache"), 1.0, out)
        processes = [spawned.Process(target=read_all, args=given) for _ in range(3)]
        for process in processes:
            process.start()
        results = [out.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert results == [[drawn_frame(v, 2, SIZE) for v in range(40)]] * 3
        # s3fs reads a small object in one request.
        assert sum(path.endswith(".tar") for path in line.paths) <= 2 * 8


def info(size: int, digest: str) -> ShardInfo:
    return ShardInfo(file="x", bytes=size, sha256=digest, videos=1, frames=1)


def put(name: str, size: int) -> str:
    fsspec.filesystem("memory").pipe(f"/cache/{name}", os.urandom(size))
    return f"memory://cache/{name}"


def test_the_shards_used_longest_ago_make_way(tmp_path: Path) -> None:
    addresses = [put(f"{n}.tar", 1000) for n in range(5)]
    infos = {address: info(1000, "d") for address in addresses}
    held = ShardCache(tmp_path / "cache", 3000, infos)
    for address in addresses[:3]:
        held.fetch(address)
    for number, address in enumerate(addresses[:3]):
        os.utime(held.path(address), (number + 100, number + 100))
    held.fetch(addresses[0])  # used again
    held.fetch(addresses[3])
    here = [address for address in addresses if held.path(address).exists()]
    assert here == [addresses[0], addresses[2], addresses[3]]
    held.fetch(addresses[4])
    assert sum(path.stat().st_size for path in held.folder.glob("*.tar")) == 3000
    assert not list(held.folder.glob("*.part"))
    assert len(list(held.folder.glob("*.tar.lock"))) == 3


def test_what_is_being_fetched_counts_and_what_the_dead_left_does_not(tmp_path: Path) -> None:
    addresses = [put(f"{n}.tar", 1000) for n in range(3)]
    held = ShardCache(tmp_path / "cache", 2000, {a: info(1000, "d") for a in addresses})
    coming = held.path(addresses[0])
    with cache._locked(cache._lock_of(coming), wait=True) as lock:
        assert lock is not None
        os.pwrite(lock, b"1000", 0)  # another process fetches this one now
        assert held.fetch(addresses[0], wait=False) is None
        held.fetch(addresses[1])
        held.fetch(addresses[2])
        assert [held.path(a).exists() for a in addresses] == [False, False, True]
    left = coming.with_name(f"{coming.name}.0123abcd.part")
    left.write_bytes(b"half")
    held.fetch(addresses[1])  # now the other one is dead
    assert [held.path(a).exists() for a in addresses] == [False, True, True]
    assert not left.exists()


def test_a_shard_of_another_digest_is_another_file(tmp_path: Path) -> None:
    address = put("0.tar", 1000)
    first = ShardCache(tmp_path, 5000, {address: info(1000, "one")})
    again = ShardCache(tmp_path, 5000, {address: info(1000, "other")})
    assert first.path(address) != again.path(address)


def test_a_shard_that_came_short_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.001)
    address = put("0.tar", 900)
    access = CachedAccess(ShardCache(tmp_path, 5000, {address: info(1000, "d")}))
    (found,) = access.read([ByteRange(address, 0, 10)])
    assert isinstance(found, UnreadableFrame)
    assert "received 900 bytes, its index says 1000" in str(found)
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob("*.part"))


def test_a_lost_shard_is_not_asked_for_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(address: str, path: Path, size: int) -> None:
        asked.append(address)
        raise FileNotFoundError(address)

    monkeypatch.setattr(cache, "_download", download)
    address = put("0.tar", 1000)
    access = CachedAccess(ShardCache(tmp_path, 5000, {address: info(1000, "d")}))
    for _ in range(3):
        (found,) = access.read([ByteRange(address, 0, 10)])
        assert "FileNotFoundError" in str(found)
    assert len(asked) == cache._MAKES_WAY
    monkeypatch.undo()
    assert not isinstance(access.read([ByteRange(address, 0, 10)])[0], bytes)
    monkeypatch.setattr(cache, "_LOST_FOR_SECONDS", 0.0)
    assert isinstance(access.read([ByteRange(address, 0, 10)])[0], bytes)


def test_a_shard_may_make_way_while_it_is_read(tmp_path: Path) -> None:
    addresses = [put(f"{n}.tar", 1000) for n in range(4)]
    held = ShardCache(tmp_path, 1000, {a: info(1000, "d") for a in addresses})
    access = CachedAccess(held)
    first = access.read([ByteRange(addresses[0], 5, 10)])
    access.read([ByteRange(addresses[1], 5, 10)])
    assert not held.path(addresses[0]).exists()
    assert access.read([ByteRange(addresses[0], 5, 10)]) == first
    access.read([ByteRange(addresses[0], 0, 1)])
    assert list(access._descriptors) == [addresses[0]]  # or the others' room would not be free
    # Both in one batch: the first stays readable through its open file.
    both = access.read([ByteRange(addresses[2], 0, 1000), ByteRange(addresses[3], 0, 1000)])
    assert all(isinstance(part, bytes) for part in both)


def test_limits_that_cannot_work(bucket: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    with pytest.raises(InputError, match=r"--cache-gb: .* is less than the largest file"):
        open_shards(f"{bucket}/made.json", CacheSettings(folder, 1e-6))
    small = CacheSettings(folder, 60e-6)
    with pytest.raises(InputError, match=r"--cache-gb: .* two windows of 2 shards — raise it, or"):
        open_stream(f"{bucket}/made.json", 10, "uniform", 1, cache=small, window_shards=2)
    with pytest.raises(InputError, match="needed for the whole dataset"):
        open_stream(f"{bucket}/made.json", 10, "uniform", 1, cache=small, window_shards=0)
    with pytest.raises(InputError, match="not all shards are in the same place"):
        open_shards([f"{bucket}/made.json", str(tmp_path / "made")])
    with pytest.raises(InputError, match=r"--steps-per-epoch: needs shards without an index"):
        open_stream(str(tmp_path / "made"), 10, "uniform", 1, steps_per_epoch=3)


def test_shards_are_fetched_before_they_are_needed(bucket: str, tmp_path: Path) -> None:
    settings = CacheSettings(str(tmp_path / "cache"))
    stream = open_stream(f"{bucket}/made.json", 10, "uniform", 1, cache=settings, window_shards=2)
    stream.prefetch(0, 0)
    here = lambda: len(list((tmp_path / "cache").glob("*.tar")))  # noqa: E731
    deadline = time.monotonic() + 30
    while here() < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert here() == 4  # this window and the next, no more
    stream.prefetch(0, 3)  # the last window: the next is the following epoch's first
    stream.close()
    assert 4 <= here() <= 8


def test_a_server_that_is_gone_is_one_line_or_lost_samples(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own waits are seconds
    shards = open_shards(f"{bucket}/made.json")
    with bad_line(monkeypatch, "gone") as line:
        (found,) = shards.read_frames([(0, 0)])
        assert isinstance(found, UnreadableFrame)
        assert line.requests >= 5
        with pytest.raises(InputError, match=r"made\.json: cannot be read") as caught:
            open_shards(f"{bucket}/made.json")
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match=r"made-000\.idx: cannot be read"):
            open_shards(f"{bucket}/made-000.tar")


def test_ranges_close_together_are_fetched_as_one() -> None:
    ranges = [ByteRange("b", 0, 5), ByteRange("a", 100, 10), ByteRange("a", 0, 10)]
    assert joined_ranges(ranges, gap=90) == [ByteRange("a", 0, 110), ByteRange("b", 0, 5)]
    assert joined_ranges(ranges, gap=89) == [ranges[2], ranges[1], ranges[0]]
    inside = [ByteRange("a", 0, 100), ByteRange("a", 10, 10), ByteRange("a", 90, 20)]
    assert joined_ranges(inside, gap=0) == [ByteRange("a", 0, 110)]
    address = put("ranges.bin", 3000)
    content = fsspec.filesystem("memory").cat("/cache/ranges.bin")
    wanted = [ByteRange(address, 2990, 10), ByteRange(address, 5, 20), ByteRange(address, 2995, 9)]
    one, two, three = RangeAccess().read(wanted)
    assert (one, two) == (content[2990:], content[5:25])
    assert "ends before byte 3004" in str(three)
    assert RangeAccess().read([]) == []


def test_who_looks_for_room_turns_nobody_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (put(f"{n}.tar", 1000) for n in range(2))
    held = ShardCache(tmp_path, 2000, {a: info(1000, "d") for a in (one, other)})
    cache._lock_of(held.path(one)).touch()  # of a thread that is about to fetch it ...
    acquired, fetched = cache._acquired, []

    def acquired_then_wanted(path: Path, wait: bool) -> int | None:
        lock = acquired(path, wait)
        if not wait and threading.current_thread() is looking:
            fetcher = threading.Thread(
                target=lambda: fetched.append(held.fetch(one, wait=False))
            )  # ... just when another looks for room
            fetcher.start()
            fetcher.join(5)
        return lock

    looking = threading.Thread(target=lambda: held._coming(held.path(other)))
    monkeypatch.setattr(cache, "_acquired", acquired_then_wanted)
    looking.start()
    looking.join(30)
    assert None not in fetched
    assert held.fetch(one, wait=False) == held.path(one)


def test_who_needs_a_shard_waits_for_room(tmp_path: Path) -> None:
    addresses = [put(f"{n}.tar", 1000) for n in range(2)]
    held = ShardCache(tmp_path, 1000, {a: info(1000, "d") for a in addresses})
    access = CachedAccess(held)
    found: list[Any] = []
    reader = threading.Thread(
        target=lambda: found.extend(access.read([ByteRange(addresses[1], 0, 9)]))
    )
    with cache._locked(cache._lock_of(held.path(addresses[0])), wait=True) as lock:
        assert lock is not None
        os.pwrite(lock, b"1000", 0)  # another process fetches this one and fills all the room
        assert held.fetch(addresses[1], wait=False) is None
        reader.start()
        reader.join(0.5)
        assert reader.is_alive() and not found
    reader.join(30)
    assert isinstance(found[0], bytes)


def test_what_is_fetched_ahead_does_not_keep_a_process(tmp_path: Path) -> None:
    program = f"""
import threading, time
from pathlib import Path
from shards import opening
from shards.format import ShardInfo
def download(address, path, size):
    print("fetching", flush=True)
    begun.set()
    time.sleep(600)
begun = threading.Event()
opening._download = download
info = ShardInfo(file="x", bytes=10, sha256="d", videos=1, frames=1)
held = opening.ShardCache(Path({str(tmp_path)!r}), 1000, {{"s3://b/x.tar": info}})
access = opening.CachedAccess(held)
access.prefetch(["s3://b/x.tar"])
assert begun.wait(50)
access.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, "fetching\n"), done.stderr


def test_a_server_that_ignores_ranges_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    address = put("whole.bin", 3000)
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(
        type(memory),
        "cat_ranges",
        lambda self, paths, *given, **named: [self.cat(p) for p in paths],
    )
    (found,) = RangeAccess().read([ByteRange(address, 5, 20)])
    assert "the server ignores ranges; give --cache-dir" in str(found)


def test_some_indexes_missing_or_all_of_the_set(bucket: str) -> None:
    system = fsspec.filesystem("s3")
    system.rm_file(f"{bucket}/made-003.idx")
    with pytest.raises(InputError, match=r"made-003\.tar: 1 of 8 shards have no index"):
        open_stream(f"{bucket}/made.json", 10, "uniform", 1, steps_per_epoch=3)
    with pytest.raises(InputError, match=r"typo-000\.tar: no such shard"):
        open_stream(f"{bucket}/typo-{{000..003}}.tar", 10, "uniform", 1)


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    spec = make_set(tmp_path / "made", videos=10, frames=3)
    settings = CacheSettings(str(tmp_path / "cache"))
    with pytest.raises(InputError, match="--cache-dir: is only for remote shards"):
        open_stream(spec, 10, "uniform", 1, cache=settings)
    for options in ({"cache": settings}, {"window_shards": 3}):
        with pytest.raises(InputError, match="needs shards with an index"):
            open_stream("pipe:cat x.tar", 10, "uniform", 1, steps_per_epoch=2, **options)
