"""Read byte ranges of shards and write files, in local folders or behind fsspec (``s3://`` etc.).

What cannot be read is returned in the place of its bytes, not raised: one lost shard must not take
the other samples of a batch with it. Writing a dataset means naming files in one flat folder.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import tenacity

from shards.atomic import require_writable, unwritable, write_text
from shards.errors import InputError
from shards.terminal import say

_EXTRAS = {"s3": "s3", "s3a": "s3"}
_ATTEMPTS = 5
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.25, 30.0
# Errors that a retry cannot fix.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, InputError)
_LASTING_ELSEWHERE = ("NoCredentialsError", "PartialCredentialsError")  # botocore's
_Result = TypeVar("_Result")


def is_remote(address: str) -> bool:
    """Whether the address has to be fetched by fsspec."""
    return "://" in address and not address.startswith("file://")


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for ``url``, and the address without its protocol.

    Call it in every process: open connections do not survive a fork.

    Raises:
        InputError: no such kind of address, or its package is not installed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        advice = f'pip install "seco-video[{extra}]"' if extra else "install the package it names"
        raise InputError(f"cannot be opened ({error})", url, advice) from error
    except Exception as error:  # what a package says of an address it does not understand
        raise InputError(
            f"cannot be opened ({in_words(error)})", url, "check the address"
        ) from error
    return system, path


def is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed: the server is busy, or a connection was cut."""
    lasting = isinstance(error, _LASTING) or type(error).__name__ in _LASTING_ELSEWHERE
    return isinstance(error, Exception) and not lasting


def try_again(fetch: Callable[[], _Result]) -> _Result:
    """Return what ``fetch`` returns; try up to five times on transient faults, then raise the last.

    The waits grow and are jittered, so that many processes do not retry at once.
    """
    patient = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=tenacity.wait_exponential_jitter(
            _FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS, jitter=_FIRST_WAIT_SECONDS
        ),
        retry=tenacity.retry_if_exception(is_transient),
        before_sleep=_tell,
        reraise=True,
    )
    return patient(fetch)


def _tell(state: tenacity.RetryCallState) -> None:
    """Print what is being waited for, once, after the second failure."""
    fault = state.outcome.exception() if state.outcome else None
    if state.attempt_number == 2 and fault is not None:
        say(f"seco: trying again: {in_words(fault)}")


def fetch_parts(
    parts: Sequence[tuple[str, int | None, int | None]],
) -> list[bytes | Exception]:
    """Return parts of files, fetched many at a time, or in their place why a part failed.

    Args:
        parts: (address, first byte, byte after the last) in one kind of location; None stands for
            the file's start or end.
    """
    found: list[Any] = [None] * len(parts)
    left = list(range(len(parts)))

    def fetch() -> None:
        nonlocal left
        system, _ = open_filesystem(parts[left[0]][0])
        addresses, starts, ends = zip(*(parts[i] for i in left), strict=True)
        answers = system.cat_ranges(list(addresses), list(starts), list(ends), on_error="return")
        for i, answer in zip(left, answers, strict=True):
            found[i] = answer
        left = [i for i in left if isinstance(found[i], Exception) and is_transient(found[i])]
        if left:
            raise found[left[0]]

    if parts:
        try:
            try_again(fetch)
        except InputError:
            raise
        except Exception as error:
            for i in left:
                found[i] = found[i] or error
    return found


def told_of(content: bytes | Exception, address: str) -> bytes:
    """Return what :func:`fetch_parts` fetched.

    Raises:
        InputError: the fetch failed.
    """
    if isinstance(content, Exception):
        raise InputError(
            f"cannot be read ({in_words(content)})", address, "check address and credentials"
        ) from content
    return content


def in_words(error: BaseException) -> str:
    """Format an error of any library in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_MOST_OPEN = 256  # files; the usual limit is 1,024 per process, and a dataset may have more shards
_GAP_BYTES = 64 << 10  # reading this many unused bytes is faster than another request


class UnreadableFrame(Exception):
    """A frame's bytes cannot be read: its shard was cut, altered or deleted, or is out of reach."""


def readable(data: bytes | UnreadableFrame) -> bytes:
    """Return what was read; raises UnreadableFrame if that failed."""
    if isinstance(data, UnreadableFrame):
        raise data
    return data


class ByteRange(NamedTuple):
    """A part of a shard."""

    address: str  # path or URL of the tar
    offset: int  # bytes
    size: int  # bytes

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.size


class Access(Protocol):
    """Reads bytes of shards; can be pickled to other processes and used after a fork."""

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes | UnreadableFrame]:
        """Return the bytes of each range, or why they cannot be read."""

    def prefetch(self, addresses: Sequence[str]) -> None:
        """Hint: these shards will be read next, in this order."""

    def close(self) -> None:
        """Stop background work."""


class LocalAccess:
    """Files on this machine, or on a disk that all machines share, read with ``pread``."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_descriptors"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._descriptors = OrderedDict()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes | UnreadableFrame]:
        return [self._read(wanted) for wanted in ranges]

    def prefetch(self, addresses: Sequence[str]) -> None:
        pass  # the page cache does it

    def close(self) -> None:
        pass

    def _read(self, wanted: ByteRange) -> bytes | UnreadableFrame:
        try:
            data = os.pread(self._descriptor(wanted.address), wanted.size, wanted.offset)
        except OSError as error:
            self._forget(wanted.address)  # a file replaced on a shared disk can be reopened
            return UnreadableFrame(f"{wanted.address}: {error.strerror}")
        if len(data) != wanted.size:
            self._forget(wanted.address)
            return UnreadableFrame(f"{wanted.address}: ends before byte {wanted.end}")
        return data

    def _descriptor(self, address: str) -> int:
        descriptor = self._descriptors.get(address)
        if descriptor is None:
            # Without O_NONBLOCK, opening a named pipe would wait; reading at an offset refuses it.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self._path(address), flags)
            self._descriptors[address] = descriptor
            if len(self._descriptors) > _MOST_OPEN:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(address)
        return descriptor

    def _path(self, address: str) -> str:
        return address

    def _forget(self, address: str) -> None:
        descriptor = self._descriptors.pop(address, None)
        if descriptor is not None:
            os.close(descriptor)


class RangeAccess:
    """Shards behind fsspec; only the requested ranges are fetched, many at a time.

    Ranges close together are fetched as one. Failed fetches are retried with growing waits.
    """

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes | UnreadableFrame]:
        joined = joined_ranges(ranges)
        answers = fetch_parts([(r.address, r.offset, r.end) for r in joined])
        fetched = dict(zip(joined, answers, strict=True))
        parts: list[bytes | UnreadableFrame] = []
        for wanted in ranges:
            whole = next(r for r in joined if _within(wanted, r))
            parts.append(_part(wanted, whole, fetched[whole]))
        return parts

    def prefetch(self, addresses: Sequence[str]) -> None:
        pass  # there is nowhere to keep them

    def close(self) -> None:
        pass


def joined_ranges(ranges: Sequence[ByteRange], gap: int = _GAP_BYTES) -> list[ByteRange]:
    """Return fewer, longer ranges that cover these, with at most ``gap`` unused bytes per joint."""
    joined: list[ByteRange] = []
    for wanted in sorted(ranges):
        last = joined[-1] if joined else None
        if last and last.address == wanted.address and wanted.offset <= last.end + gap:
            size = max(last.end, wanted.end) - last.offset
            joined[-1] = ByteRange(last.address, last.offset, size)
        else:
            joined.append(wanted)
    return joined


def _within(wanted: ByteRange, whole: ByteRange) -> bool:
    same = wanted.address == whole.address
    return same and whole.offset <= wanted.offset and wanted.end <= whole.end


def _part(wanted: ByteRange, whole: ByteRange, data: bytes | Exception) -> bytes | UnreadableFrame:
    if isinstance(data, Exception):
        return UnreadableFrame(f"{wanted.address}: {in_words(data)}")
    if len(data) > whole.size:
        return UnreadableFrame(f"{wanted.address}: the server ignores ranges; give --cache-dir")
    start = wanted.offset - whole.offset
    part = data[start : start + wanted.size]
    if len(part) != wanted.size:
        return UnreadableFrame(f"{wanted.address}: ends before byte {wanted.end}")
    return part


# Uploads there are atomic; elsewhere a file gets a temporary name and is then moved.
_OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"))


class Storage(Protocol):
    """One folder with a dataset's files."""

    url: str
    append_every_seconds: float  # least time between two appends to a log

    def require_writable(self) -> None:
        """Create the folder; raises InputError if it is not writable."""

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the files in bytes, by name."""

    def reading(self, name: str) -> Any:
        """Return a context that gives a local path of the file."""

    def writing(self) -> Any:
        """Return a context that gives a local folder; its files are stored, whole, at the end."""

    def write_text(self, name: str, text: str) -> None:
        """Replace a small file atomically."""

    def append(self, name: str, text: str) -> None:
        """Add lines to a log."""

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""

    def writer_lock(self, name: str) -> Any:
        """Return a context in which this process is the only writer of dataset ``name``."""


def open_storage(url: str) -> Storage:
    """Return the folder at ``url``: a path, ``file://…``, or another address fsspec knows.

    Raises:
        InputError: no such kind of address, or its package is not installed.
    """
    url = url.removeprefix("file://")
    return RemoteStorage(url) if "://" in url else LocalStorage(url)


class LocalStorage:
    """A folder on this machine, or on a disk that all machines share."""

    append_every_seconds = 0.0

    def __init__(self, url: str) -> None:
        self.url = url
        self._folder = Path(url)

    def require_writable(self) -> None:
        require_writable(self._folder)

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                # A temporary file of another dataset may be renamed meanwhile.
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        yield self._folder / name

    @contextmanager
    def writing(self) -> Iterator[Path]:
        # Writers use temporary names of their own (atomic.py).
        yield self._folder

    def write_text(self, name: str, text: str) -> None:
        write_text(self._folder / name, text)

    def append(self, name: str, text: str) -> None:
        # A single write in append mode: no reader sees half a line.
        path = self._folder / name
        try:
            with open(path, "ab", buffering=0) as log:
                log.write(text.encode("utf-8"))
        except OSError as error:
            raise unwritable(path, error) from error

    def delete(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    @contextmanager
    def writer_lock(self, name: str) -> Iterator[None]:
        """Hold the dataset's lock; remove what killed writers left, before and after.

        Raises:
            InputError: another process is writing the dataset.
        """
        path = self._folder / f".{name}.lock"
        lock = self._lock(path, name)
        try:
            self._clear(name)
            yield
        finally:
            # A worker killed during its own cleanup may leave files.
            with suppress(OSError):
                self._clear(name)
            path.unlink(missing_ok=True)
            os.close(lock)

    def _clear(self, name: str) -> None:
        leftover = re.compile(re.escape(name) + r"(-\d{3,})?\.[a-z.]+\.[0-9a-f]{8}\.part")
        for entry in self._folder.iterdir():
            if leftover.fullmatch(entry.name):
                entry.unlink(missing_ok=True)

    def _lock(self, path: Path, name: str) -> int:
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise InputError(
                    f"another `seco prepare` is writing {name} here",
                    self.url,
                    "wait for it, or choose another --out",
                ) from None
            except OSError:
                return lock  # a file system without locks
            # The last holder deletes the file; a lock on a deleted file excludes nobody.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(path)):
                    return lock
            os.close(lock)


class RemoteStorage:
    """A folder behind fsspec. Files are written to a scratch folder (``TMPDIR``) and sent whole."""

    append_every_seconds = 60.0

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._protocol = url.partition("://")[0]
        self._system, self._root = open_filesystem(url)

    def require_writable(self) -> None:
        probe = ".seco-writable"  # a fixed name: the next run deletes what a killed one left
        self.write_text(probe, "")
        self.delete(probe)

    def sizes(self) -> dict[str, int]:
        with _told_of(self.url):
            self._system.invalidate_cache()
            try:
                rows = try_again(lambda: self._system.ls(self._root, detail=True))
            except FileNotFoundError:
                return {}
        return {
            row["name"].rstrip("/").rpartition("/")[2]: int(row["size"] or 0)
            for row in rows
            if row["type"] == "file"
        }

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="seco-") as scratch:
            local = Path(scratch, name)
            with _told_of(f"{self.url}/{name}"):
                try_again(lambda: self._system.get_file(self._address(name), str(local)))
            yield local

    @contextmanager
    def writing(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="seco-") as scratch:
            yield Path(scratch)
            # Indexes last: a shard with an index is finished.
            for path in sorted(Path(scratch).iterdir(), key=lambda path: path.suffix == ".idx"):
                self._put(path, path.name)

    def write_text(self, name: str, text: str) -> None:
        with tempfile.NamedTemporaryFile("wb", prefix="seco-") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            self._put(Path(file.name), name)

    def append(self, name: str, text: str) -> None:
        # Objects cannot be appended to; read and rewrite them.
        with _told_of(f"{self.url}/{name}"):
            try:
                content: bytes = try_again(lambda: self._system.cat_file(self._address(name)))
                before = content.decode("utf-8")
            except FileNotFoundError:
                before = ""
        self.write_text(name, before + text)

    def delete(self, name: str) -> None:
        with _told_of(f"{self.url}/{name}"), suppress(FileNotFoundError):
            try_again(lambda: self._system.rm_file(self._address(name)))

    @contextmanager
    def writer_lock(self, name: str) -> Iterator[None]:
        yield  # object stores have no locks; uploads are atomic, and equal plans write equal bytes

    def _put(self, local: Path, name: str) -> None:
        address = self._address(name)
        with _told_of(f"{self.url}/{name}"):
            if self._protocol in _OBJECT_STORES:
                try_again(lambda: self._system.put_file(str(local), address))
            else:
                self._system.makedirs(self._root, exist_ok=True)
                self._system.put_file(str(local), f"{address}.part")
                self._system.mv(f"{address}.part", address)

    def _address(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


@contextmanager
def _told_of(address: str) -> Iterator[None]:
    """Turn an error of any library behind fsspec into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"cannot be reached or written ({in_words(error)})",
            address,
            "check address and credentials",
        ) from error
