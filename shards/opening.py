"""Open what a user names as a :class:`~shards.dataset.ShardSet`; cache remote shards locally.

The cache is a folder of this machine, shared by all its processes, with a size limit. One process
fetches a shard while the others wait for it; it appears under its name only once it is complete.
The least recently used shards make room for new ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

from shards.atomic import atomic_path, require_writable
from shards.dataset import (
    PIPE,
    ShardSet,
    beside,
    expand_spec,
    read_remote_manifest,
)
from shards.errors import InputError
from shards.format import read_manifest
from shards.index import ShardIndex, build_index, parse_index, read_index
from shards.progress import size_text
from shards.storage import (
    Access,
    ByteRange,
    LocalAccess,
    RangeAccess,
    UnreadableFrame,
    fetch_parts,
    in_words,
    is_remote,
    open_filesystem,
    told_of,
    try_again,
)
from shards.stream import Stream, TripletStream
from shards.streaming import SequentialStream
from shards.videos import IndexesOnDisk, VideoList, videos_beside

_LOST_FOR_SECONDS = 60.0  # before a failed fetch is retried
_MAKES_WAY = 3  # times in a row that a shard may be evicted before it is opened
_ROOM_SECONDS = 0.1  # between checks for free space
_FETCHERS = 4  # shards prefetched at a time, per process


class CacheableFile(Protocol):
    """What is known of a file before it is fetched: a shard's row in its manifest, for example."""

    @property
    def bytes(self) -> int:
        """Its size."""

    @property
    def sha256(self) -> str:
        """Its digest, if that is known: files of different digests are different files."""


class ShardCache:
    """The cache folder.

    Args:
        folder: may be shared by any number of processes and datasets.
        limit_bytes: for all shards in it, including those being fetched.
        infos: what is known of each shard, by address.
        option: of the limit, for messages.

    Raises:
        InputError: the folder is not writable, or the limit is below the size of the largest shard.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        infos: Mapping[str, CacheableFile],
        option: str = "--cache-gb",
    ) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._infos = dict(infos)
        require_writable(folder)
        largest = max((info.bytes for info in infos.values()), default=0)
        if largest > limit_bytes:
            raise InputError(
                f"{size_text(limit_bytes)} is less than the largest file, {size_text(largest)}",
                option,
                "raise it",
            )

    def path(self, address: str) -> Path:
        """Return the path of the shard once it is cached."""
        digest = hashlib.sha256(f"{address}\n{self._infos[address].sha256}".encode()).hexdigest()
        return self.folder / f"{digest[:24]}.tar"

    def fetch(self, address: str, wait: bool = True) -> Path | None:
        """Return the shard's file, fetching it if it is not cached yet.

        Args:
            address: of the shard.
            wait: for another process that is fetching it, or for space that others are filling;
                otherwise return None in these cases.

        Raises:
            OSError, and whatever fsspec raises: it could not be fetched.
        """
        path = self.path(address)
        while not _touch(path):
            with _locked(_lock_of(path), wait) as lock:
                if lock is None:
                    return None
                if _touch(path):
                    break
                if self._reserve(path, lock, self._infos[address].bytes):
                    try:
                        self._download(address)
                    finally:
                        os.ftruncate(lock, 0)
                    break
            if not wait:
                return None
            time.sleep(_ROOM_SECONDS)
        return path

    def link(self, address: str, to: Path) -> bool:
        """Give a cached file a second name, under which it stays; return False if it is gone."""
        with _locked(self.folder / ".room.lock", True), suppress(FileNotFoundError):
            os.link(self.path(address), to)
            return True
        return False

    def drop(self, address: str) -> None:
        """Remove a shard that nobody will ask for again."""
        path = self.path(address)
        path.unlink(missing_ok=True)
        _lock_of(path).unlink(missing_ok=True)

    def _download(self, address: str) -> None:
        path, size = self.path(address), self._infos[address].bytes
        try_again(lambda: _download(address, path, size))

    def _reserve(self, path: Path, lock: int, size: int) -> bool:
        """Evict the least recently used shards until ``size`` more bytes fit, and reserve these.

        Returns:
            False if shards that are being fetched take the space.
        """
        with _locked(self.folder / ".room.lock", True):
            # In this order, a shard that arrives in between counts twice rather than never.
            coming = self._coming(path)
            held = self._held()
            excess = sum(bytes_ for _, bytes_, _ in held) + coming + size - self.limit_bytes
            for last, bytes_, old in sorted(held):
                if excess <= 0 or last == math.inf:
                    break
                old.unlink(missing_ok=True)  # still readable where it is open
                _lock_of(old).unlink(missing_ok=True)
                excess -= bytes_
            if excess > 0:
                return False
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(size).encode(), 0)
            return True

    def _held(self) -> list[tuple[float, int, Path]]:
        """Return (last use, bytes, path) of the cached shards."""
        found = []
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):
                status = path.stat()
                # One with another name is in use: deleting it would not free its space.
                last = math.inf if status.st_nlink > 1 else status.st_mtime
                found.append((last, status.st_size, path))
        return found

    def _coming(self, path: Path) -> int:
        """Return the bytes reserved by fetching processes; remove what dead ones left behind."""
        coming = 0
        for lock_path in self.folder.glob("*.tar.lock"):
            # Taking a lock without a reservation would turn away a process about to fetch.
            if lock_path == _lock_of(path) or not _booked(lock_path):
                continue
            with _locked(lock_path, False) as lock:
                if lock is None:
                    coming += _booked(lock_path)
                else:
                    for left in self.folder.glob(f"{lock_path.stem}.*.part"):
                        left.unlink(missing_ok=True)
                    os.ftruncate(lock, 0)
        return coming


class CachedAccess(LocalAccess):
    """Shards behind a :class:`ShardCache`, fetched to its folder on first use and read there."""

    def __init__(self, cache: ShardCache) -> None:
        super().__init__()
        self.cache = cache
        self._lost: dict[str, tuple[float, str]] = {}
        self._ahead: deque[str] = deque()
        self._seen: set[str] = set()
        self._fetchers: list[threading.Thread] = []

    def __getstate__(self) -> dict[str, object]:
        state = super().__getstate__()
        return {**state, "_ahead": deque(), "_seen": set(), "_fetchers": []}

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes | UnreadableFrame]:
        self._close_deleted()
        reasons: dict[str, str] = {}
        for address in dict.fromkeys(wanted.address for wanted in ranges):
            if address not in self._descriptors:
                reason = self._bring(address)
                if reason:
                    reasons[address] = reason
        return [
            UnreadableFrame(f"{wanted.address}: {reasons[wanted.address]}")
            if wanted.address in reasons
            else self._read(wanted)
            for wanted in ranges
        ]

    def prefetch(self, addresses: Sequence[str]) -> None:
        """Fetch these in the background, in order; failed shards are retried when read."""
        self._seen &= set(addresses)
        self._ahead.clear()
        self._ahead.extend(address for address in addresses if address not in self._seen)
        self._fetchers = [thread for thread in self._fetchers if thread.is_alive()]
        while len(self._fetchers) < min(_FETCHERS, len(self._ahead)):
            # Daemons: a stalled download must not keep the process from exiting. Partial files are
            # removed by the next process that needs space.
            thread = threading.Thread(target=self._fetch_ahead, name="shard-fetcher", daemon=True)
            self._fetchers.append(thread)
            thread.start()

    def close(self) -> None:
        """Stop prefetching."""
        self._ahead.clear()

    def _fetch_ahead(self) -> None:
        while True:
            try:
                address = self._ahead.popleft()
            except IndexError:
                return
            self._seen.add(address)
            with suppress(Exception):
                self.cache.fetch(address, wait=False)

    def _bring(self, address: str) -> str | None:
        """Open a descriptor of the shard, or return why that failed."""
        when, reason = self._lost.get(address, (0.0, ""))
        if reason and time.monotonic() - when < _LOST_FOR_SECONDS:
            return reason
        for attempt in range(_MAKES_WAY):
            try:
                self.cache.fetch(address)
                self._descriptor(address)
                return None
            except Exception as error:
                # It may have been evicted between the two calls.
                if attempt == _MAKES_WAY - 1 or not isinstance(error, FileNotFoundError):
                    self._lost[address] = (time.monotonic(), in_words(error))
                    return in_words(error)
        return None

    def _path(self, address: str) -> str:
        return str(self.cache.path(address))

    def _close_deleted(self) -> None:
        """Close evicted shards: their disk space is freed only then."""
        for address, descriptor in list(self._descriptors.items()):
            if os.fstat(descriptor).st_nlink == 0:
                self._forget(address)


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _booked(lock_path: Path) -> int:
    """Return the bytes reserved in a lock file."""
    try:
        return int(lock_path.read_text() or 0)
    except OSError:  # its shard has been evicted
        return 0


def _touch(path: Path) -> bool:
    """Record the use of a shard; return False if it is not cached."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _download(address: str, path: Path, size: int) -> None:
    system, remote = open_filesystem(address)
    with atomic_path(path) as temporary:
        system.get_file(remote, str(temporary))
        got = temporary.stat().st_size
        if got != size:
            raise OSError(f"received {got} bytes, its index says {size}")


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[int | None]:
    """Hold the lock file exclusively, open for writing; yield None if another process holds it."""
    lock = _acquired(path, wait)
    try:
        yield lock
    finally:
        if lock is not None:
            os.close(lock)


def _acquired(path: Path, wait: bool) -> int | None:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Its shard may have been evicted meanwhile, and the lock file with it.
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass
        os.close(lock)


_READERS = 16  # indexes read at a time: a shared disk answers many as quickly as one
_STATS = 100  # files that one of them looks at before the next are given to it
DEFAULT_CACHE_GB = 100.0


_WINDOW_SHARDS = 64  # for cached shards: about 15,000 videos of Kinetics, 11 GB


class NoIndex(InputError):
    """Remote shards without an index, which can only be streamed."""


@dataclass(frozen=True)
class CacheSettings:
    """Where remote shards are cached, and how much space they may take."""

    folder: str
    limit_gb: float = DEFAULT_CACHE_GB


def open_shards(spec: str | Iterable[str], cache: CacheSettings | None = None) -> ShardSet:
    """Open the shards a specification names (:func:`shards.dataset.expand_spec`).

    A local shard without an index, or with an outdated one, is indexed in memory.

    Args:
        spec: local or remote, not both.
        cache: cache remote shards there; without it, their frames are fetched one by one.

    Raises:
        InputError: no shards match, a tar is truncated, or there are no videos.
        NoIndex: remote shards without indexes, or ``pipe:`` addresses.
    """
    addresses = expand_spec(spec)
    kinds = {address.partition("://")[0] if is_remote(address) else "" for address in addresses}
    if any(address.startswith(PIPE) for address in addresses):
        raise NoIndex("can only be streamed, in pre-training", addresses[0], "copy it to a folder")
    if len(kinds) > 1:
        raise InputError("not all shards are in the same place", addresses[0], "copy them to one")
    access: Access = LocalAccess()
    videos: VideoList | None = None
    indexes: Sequence[ShardIndex]
    if kinds == {""}:
        with ThreadPoolExecutor(_READERS) as readers:
            videos = _listed_videos(addresses, readers)
            if videos is None:
                indexes = list(readers.map(_index_of, map(Path, addresses)))
            else:
                indexes = IndexesOnDisk(addresses, videos)
    else:
        indexes = _remote_indexes(addresses)
        access = RangeAccess()
        if cache is not None:
            infos = {a: index.info for a, index in zip(addresses, indexes, strict=True)}
            limit = int(cache.limit_gb * 1e9)
            access = CachedAccess(ShardCache(Path(cache.folder), limit, infos))
    shards = ShardSet(addresses, indexes, _label_names(addresses), access, videos)
    if not len(shards):
        raise InputError("no videos found", addresses[0] if len(addresses) == 1 else spec)
    if videos is None:  # `seco prepare` and `seco index` list distinct videos only
        shards.videos.require_distinct(spec if isinstance(spec, str) else ", ".join(spec))
    return shards


def open_stream(
    spec: str | Iterable[str],
    batch_size: int,
    sampling: str,
    seed: int,
    *,
    cache: CacheSettings | None = None,
    window_shards: int | None = None,
    steps_per_epoch: int | None = None,
    split: str | None = None,
    max_gap_seconds: float | None = None,
    by_group: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Stream:
    """Open the triplet stream of the shards a specification names.

    Args:
        spec: as for :func:`open_shards`; shards without an index are streamed in order.
        batch_size: B, the global batch.
        sampling: ``uniform`` or ``halves``.
        seed: of the run.
        cache: cache remote shards there.
        window_shards: shuffle within this many shards; 0: within the whole dataset; None: 64 for
            cached shards, otherwise the whole dataset.
        steps_per_epoch: length of an epoch, only for shards without an index.
        split: use only the training videos of this split.
        max_gap_seconds: from the first frame of a triplet to the last; None for any.
        by_group: number samples by the groups of their videos.
        rank: of this process, among ``world_size`` ranks.

    Raises:
        InputError: as for :func:`open_shards` and the streams, or the cache is too small for two
            windows.
    """
    try:
        shards = open_shards(spec, cache)
    except NoIndex:
        given = {
            "--cache-dir": cache,
            "--window-shards": window_shards,
            "--split": split,
            "--max-gap-seconds": max_gap_seconds,
            "--negatives other-groups": by_group or None,
        }
        for option, value in given.items():
            if value is not None:
                raise InputError("needs shards with an index", option, "leave it out") from None
        return SequentialStream(
            expand_spec(spec), batch_size, sampling, seed, steps_per_epoch, rank, world_size
        )
    if steps_per_epoch is not None:
        raise InputError(
            "needs shards without an index; these have one", "--steps-per-epoch", "leave it out"
        )
    window = chosen_window(shards, cache, window_shards)
    return TripletStream(
        shards,
        batch_size,
        sampling,
        seed,
        rank,
        world_size,
        window,
        split,
        max_gap_seconds,
        by_group,
    )


def chosen_window(shards: ShardSet, cache: CacheSettings | None, window_shards: int | None) -> int:
    """Return how many shards are shuffled at a time, 0 for the whole dataset.

    Args:
        shards: opened with this cache.
        cache: where they are cached, if anywhere.
        window_shards: the user's value; None: 64 for cached shards, otherwise the whole dataset.

    Raises:
        InputError: a cache for local shards, or one that is too small for two windows.
    """
    cached = isinstance(shards.access, CachedAccess)
    if cache is not None and not cached:
        raise InputError("is only for remote shards; these are on this machine", "--cache-dir")
    if window_shards is None:
        window_shards = _WINDOW_SHARDS if cached else 0
    if cached and cache is not None:
        _require_room(shards, window_shards, int(cache.limit_gb * 1e9))
    return min(window_shards, len(shards.counts))


def _require_room(shards: ShardSet, window: int, limit_bytes: int) -> None:
    """Check that the windows being read and fetched fit, or shards are fetched again and again."""
    sizes = sorted((info.bytes for info in shards.videos.infos), reverse=True)
    needed = sum(sizes[: 2 * window] if window else sizes)
    if needed > limit_bytes:
        raise InputError(
            f"limit of {size_text(limit_bytes)} is too small: {size_text(needed)} needed for "
            + (f"two windows of {window} shards" if window else "the whole dataset"),
            "--cache-gb",
            "raise it, or lower --window-shards",
        )


def _listed_videos(tars: Sequence[str], readers: ThreadPoolExecutor) -> VideoList | None:
    """Return the list of videos beside the shards, unless these have changed since."""
    videos = videos_beside(tars)
    if videos is None:
        return None
    parts = [tars[first : first + _STATS] for first in range(0, len(tars), _STATS)]
    sizes = readers.map(lambda part: [os.path.getsize(tar) for tar in part], parts)
    return videos if list(chain(*sizes)) == [info.bytes for info in videos.infos] else None


def _index_of(tar: Path) -> ShardIndex:
    path = tar.with_suffix(".idx")
    if not path.is_file():
        return build_index(tar)
    index = read_index(path)
    size = tar.stat().st_size
    if size < index.info.bytes:
        raise InputError(
            f"is truncated: {size} of {index.info.bytes} bytes", tar, "prepare or copy it again"
        )
    return index if size == index.info.bytes else build_index(tar)


def _remote_indexes(addresses: Sequence[str]) -> list[ShardIndex]:
    names = [beside(address, ".idx") for address in addresses]
    found = dict(zip(names, fetch_parts([(name, None, None) for name in names]), strict=True))
    missing = [a for a, n in zip(addresses, names, strict=True) if _is_missing(found[n])]
    if missing:
        _require_there(missing[0])
        if len(missing) < len(addresses):
            raise InputError(
                f"{len(missing)} of {len(addresses)} shards have no index (.idx) next to them",
                missing[0],
                "create them with `seco index` on a copy",
            )
        raise NoIndex(
            "has no index (.idx) next to it", missing[0], "create it with `seco index` on a copy"
        )
    return [parse_index(told_of(found[name], name), name) for name in names]


def _is_missing(content: bytes | Exception) -> bool:
    return isinstance(content, FileNotFoundError)


def _require_there(address: str) -> None:
    """Check that the tar exists; raises InputError if not, because the address is wrong."""
    system, path = open_filesystem(address)
    try:
        there = try_again(lambda: system.exists(path))
    except Exception as error:
        raise InputError(
            f"cannot be read ({in_words(error)})", address, "check address and credentials"
        ) from error
    if not there:
        raise InputError("no such shard", address, "check the address")


def _label_names(addresses: Sequence[str]) -> list[str]:
    """Return the label names of the datasets' manifests; empty if there are none or they differ."""
    found: list[list[str]] = []
    for stem in dict.fromkeys(a.removesuffix(".tar").rpartition("-")[0] for a in addresses):
        if is_remote(stem):
            with suppress(FileNotFoundError):
                found.append(read_remote_manifest(f"{stem}.json").label_names)
        elif Path(f"{stem}.json").is_file():
            found.append(read_manifest(Path(f"{stem}.json")).label_names)
    return found[0] if found and all(names == found[0] for names in found) else []
