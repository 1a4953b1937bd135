"""Remote shards kept in a folder of this machine, shared by all its processes, under a size limit.

A shard is fetched whole by one process while the others wait for it; it appears under its name only
when it is whole. The shards used longest ago make room for new ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.access import ByteRange, LocalAccess, UnreadableFrame
from shards.atomic import atomic_path, require_writable
from shards.errors import InputError
from shards.format import ShardInfo
from shards.progress import size_text
from shards.remote import in_words, open_filesystem, try_again

_LOST_FOR_SECONDS = 60.0  # before a shard that could not be fetched is asked for again
_MAKES_WAY = 3  # times in a row that a shard may be deleted before it is opened
_ROOM_SECONDS = 0.1  # between looks for room
_FETCHERS = 4  # shards fetched ahead at a time, by each process


class ShardCache:
    """The folder.

    Args:
        folder: may be shared by any number of processes and sets.
        limit_bytes: of all shards in it, those being fetched included.
        infos: size and digest of each shard, by address; a shard of another digest is another file.

    Raises:
        InputError: the folder cannot be written, or the limit is below the largest shard.
    """

    def __init__(self, folder: Path, limit_bytes: int, infos: Mapping[str, ShardInfo]) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._infos = dict(infos)
        require_writable(folder)
        largest = max((info.bytes for info in infos.values()), default=0)
        if largest > limit_bytes:
            raise InputError(
                f"{size_text(limit_bytes)} do not hold the largest shard of {size_text(largest)}",
                "--cache-gb",
                "raise it",
            )

    def path(self, address: str) -> Path:
        """Where the shard lies once it is here."""
        digest = hashlib.sha256(f"{address}\n{self._infos[address].sha256}".encode()).hexdigest()
        return self.folder / f"{digest[:24]}.tar"

    def fetch(self, address: str, wait: bool = True) -> Path | None:
        """The shard's file, fetched if it is not here yet.

        Args:
            address: of the shard.
            wait: for another process that is fetching it, or for room that others are filling;
                else return None then.

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

    def _download(self, address: str) -> None:
        path, size = self.path(address), self._infos[address].bytes
        try_again(lambda: _download(address, path, size))

    def _reserve(self, path: Path, lock: int, size: int) -> bool:
        """Delete the shards used longest ago until ``size`` more bytes fit, and book these.

        Returns:
            False when shards that are being fetched take the room.
        """
        with _locked(self.folder / ".room.lock", True):
            # In this order a shard that arrives in between counts twice, not never.
            coming = self._coming(path)
            held = self._held()
            excess = sum(bytes_ for _, bytes_, _ in held) + coming + size - self.limit_bytes
            for _, bytes_, old in sorted(held):
                if excess <= 0:
                    break
                old.unlink(missing_ok=True)  # who has it open keeps it until it is closed
                _lock_of(old).unlink(missing_ok=True)
                excess -= bytes_
            if excess > 0:
                return False
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(size).encode(), 0)
            return True

    def _held(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of the shards here."""
        found = []
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _coming(self, path: Path) -> int:
        """Bytes booked by the processes that are fetching; what dead ones left is cleared away."""
        coming = 0
        for lock_path in self.folder.glob("*.tar.lock"):
            # To hold a lock that nobody has booked with would turn away who is about to fetch.
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
    """Shards behind a :class:`ShardCache`: read in its folder, fetched there on first touch."""

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

    def want(self, addresses: Sequence[str]) -> None:
        """Fetch these in the background, in this order; what fails is met again by a reader."""
        self._seen &= set(addresses)
        self._ahead.clear()
        self._ahead.extend(address for address in addresses if address not in self._seen)
        self._fetchers = [thread for thread in self._fetchers if thread.is_alive()]
        while len(self._fetchers) < min(_FETCHERS, len(self._ahead)):
            # Daemons: a download that stalls must not keep the run from ending. What they leave
            # half-fetched is cleared away by the next process that needs room.
            thread = threading.Thread(target=self._fetch_ahead, name="shard-fetcher", daemon=True)
            self._fetchers.append(thread)
            thread.start()

    def close(self) -> None:
        """Fetch no more ahead."""
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
        """Make sure of a descriptor of the shard; why not, when it cannot be had."""
        when, reason = self._lost.get(address, (0.0, ""))
        if reason and time.monotonic() - when < _LOST_FOR_SECONDS:
            return reason
        for attempt in range(_MAKES_WAY):
            try:
                self.cache.fetch(address)
                self._descriptor(address)
                return None
            except Exception as error:
                # It may have made way between the two.
                if attempt == _MAKES_WAY - 1 or not isinstance(error, FileNotFoundError):
                    self._lost[address] = (time.monotonic(), in_words(error))
                    return in_words(error)
        return None

    def _path(self, address: str) -> str:
        return str(self.cache.path(address))

    def _close_deleted(self) -> None:
        """The room of a shard that has made way is free only when nobody has it open."""
        for address, descriptor in list(self._descriptors.items()):
            if os.fstat(descriptor).st_nlink == 0:
                self._forget(address)


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _booked(lock_path: Path) -> int:
    """Bytes of room booked with a lock file."""
    try:
        return int(lock_path.read_text() or 0)
    except OSError:  # its shard has made way
        return 0


def _touch(path: Path) -> bool:
    """Note the use of a shard; False when it is not here."""
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
            raise OSError(f"{got} bytes came, its index says {size}")


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[int | None]:
    """Hold the lock file exclusively, open for writing; None when another holds it."""
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
            # Its shard may have made way meanwhile, and the file with it.
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass
        os.close(lock)
