"""Read byte ranges of shards and write files, in local folders or behind fsspec (``s3://`` etc.).

What cannot be read is returned in the place of its bytes, not raised: one lost shard must not take
the other samples of a batch with it. Writing a dataset means naming files in one flat folder.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import tenacity

from shards.atomic import require_writable, unwritable, write_text
from shards.errors import InputError

_EXTRAS = {"s3": "s3", "s3a": "s3"}
_ATTEMPTS = 5
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.25, 30.0
# Asking again would give the same answer.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, InputError)
_LASTING_ELSEWHERE = ("NoCredentialsError", "PartialCredentialsError")  # botocore's
_Result = TypeVar("_Result")


def is_remote(address: str) -> bool:
    """Whether fsspec has to fetch it."""
    return "://" in address and not address.startswith("file://")


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for ``url``, and the address without its protocol.

    To be asked for anew in every process: what is open does not survive a fork.

    Raises:
        InputError: no such kind of address, or its package is not installed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        advice = f'pip install "seco-video[{extra}]"' if extra else "install what it names"
        raise InputError(f"cannot be opened ({error})", url, advice) from error
    except ValueError as error:
        raise InputError(f"cannot be opened ({error})", url, "is the address right?") from error
    return system, path


def is_transient(error: BaseException) -> bool:
    """Whether another try may succeed: a server that is busy, a connection that was cut."""
    lasting = isinstance(error, _LASTING) or type(error).__name__ in _LASTING_ELSEWHERE
    return isinstance(error, Exception) and not lasting


def try_again(fetch: Callable[[], _Result]) -> _Result:
    """What ``fetch`` returns; tried five times when faults are transient, then the last is raised.

    The waits grow and are jittered, so that many processes do not return at once.
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
    """After the second failure: what is being waited for."""
    fault = state.outcome.exception() if state.outcome else None
    if state.attempt_number == 2 and fault is not None:
        print(f"seco: trying again: {in_words(fault)}", file=sys.stderr, flush=True)


def fetch_parts(
    parts: Sequence[tuple[str, int | None, int | None]],
) -> list[bytes | Exception]:
    """Parts of files of one kind of place, many at a time; in the place of one why it failed.

    Args:
        parts: (address, first byte, the byte after the last); None stands for the file's ends.
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
    """What :func:`fetch_parts` fetched.

    Raises:
        InputError: it could not be.
    """
    if isinstance(content, Exception):
        raise InputError(
            f"cannot be read ({in_words(content)})", address, "check address and credentials"
        ) from content
    return content


def in_words(error: BaseException) -> str:
    """A fault of whichever library stands behind an address, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_MOST_OPEN = 256  # files; a process may usually have 1,024 open, and a set has more shards
_GAP_BYTES = 64 << 10  # reading this much in vain is quicker than asking once more


class UnreadableFrame(Exception):
    """A frame's bytes could not be read: its shard was cut, altered or deleted, or is far away."""


def readable(data: bytes | UnreadableFrame) -> bytes:
    """What was read; raises UnreadableFrame where it could not be."""
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
        """The byte after its last."""
        return self.offset + self.size


class Access(Protocol):
    """A way to the bytes; may be pickled to other processes and used after a fork."""

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes | UnreadableFrame]:
        """The bytes of each range, or why they cannot be had."""

    def prefetch(self, addresses: Sequence[str]) -> None:
        """Hint: these shards will be read next, in this order."""

    def close(self) -> None:
        """Stop what goes on in the background."""


class LocalAccess:
    """Files of this machine, or of a disk that all machines share, read with ``pread``."""

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
            self._forget(wanted.address)  # a file replaced on a shared disk can be opened anew
            return UnreadableFrame(f"{wanted.address}: {error.strerror}")
        if len(data) != wanted.size:
            self._forget(wanted.address)
            return UnreadableFrame(f"{wanted.address}: ends before byte {wanted.end}")
        return data

    def _descriptor(self, address: str) -> int:
        descriptor = self._descriptors.get(address)
        if descriptor is None:
            descriptor = os.open(self._path(address), os.O_RDONLY | os.O_CLOEXEC)
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
    """Shards behind fsspec, of which only the ranges asked for are fetched, many at a time.

    Ranges that lie close together are fetched as one. What fails is tried again with growing waits.
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
    """Fewer, longer ranges that cover these, with at most ``gap`` bytes in vain at each joint."""
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
        return UnreadableFrame(f"{wanted.address}: the server ignores ranges: give --cache-dir")
    start = wanted.offset - whole.offset
    part = data[start : start + wanted.size]
    if len(part) != wanted.size:
        return UnreadableFrame(f"{wanted.address}: ends before byte {wanted.end}")
    return part


# A put there appears whole or not at all; elsewhere it takes a temporary name and a move.
_OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"))


class Storage(Protocol):
    """One folder of a set's files."""

    url: str
    append_every_seconds: float  # no log should be added to more often

    def require_writable(self) -> None:
        """Make the folder; raises InputError when nothing can be written to it."""

    def sizes(self) -> dict[str, int]:
        """The files there are, by name, and their sizes in bytes."""

    def reading(self, name: str) -> Any:
        """A context that gives a local path of the file."""

    def writing(self) -> Any:
        """A context that gives a local folder; what is in it at the end is there, whole."""

    def write_text(self, name: str, text: str) -> None:
        """Replace a small file, whole or not at all."""

    def append(self, name: str, text: str) -> None:
        """Add lines to a log."""

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    def writer_lock(self, name: str) -> Any:
        """A context in which this process is the only writer of the set ``name``."""


def open_storage(url: str) -> Storage:
    """The folder at ``url``: a path, ``file://…``, or another address fsspec knows.

    Raises:
        InputError: no such kind of address, or its package is not installed.
    """
    url = url.removeprefix("file://")
    return RemoteStorage(url) if "://" in url else LocalStorage(url)


class LocalStorage:
    """A folder of this machine, or of a disk that all machines share."""

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
                # Another set's temporary file may get its final name meanwhile.
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        yield self._folder / name

    @contextmanager
    def writing(self) -> Iterator[Path]:
        # Whatever is written there takes a temporary name of its own (atomic.py).
        yield self._folder

    def write_text(self, name: str, text: str) -> None:
        write_text(self._folder / name, text)

    def append(self, name: str, text: str) -> None:
        # One write to a file opened for appending: no reader sees half a line.
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
        """Also clears away what killed writers of this set have left, before and after.

        Raises:
            InputError: another process is writing it.
        """
        path = self._folder / f".{name}.lock"
        lock = self._lock(path, name)
        try:
            self._clear(name)
            yield
        finally:
            # A worker that is ended while it clears up after itself does not get to the end of it.
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
            # The last holder removes the file: one that is no longer there locks nobody out.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(path)):
                    return lock
            os.close(lock)


class RemoteStorage:
    """A folder behind fsspec. Files are made in a scratch folder (``TMPDIR``) and sent whole."""

    append_every_seconds = 60.0

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._protocol = url.partition("://")[0]
        self._system, self._root = open_filesystem(url)

    def require_writable(self) -> None:
        probe = ".seco-writable"  # always this name: what a killed run left, the next one deletes
        self.write_text(probe, "")
        self.delete(probe)

    def sizes(self) -> dict[str, int]:
        with _told_of(self.url):
            self._system.invalidate_cache()
            try:
                rows = self._system.ls(self._root, detail=True)
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
                self._system.get_file(self._address(name), str(local))
            yield local

    @contextmanager
    def writing(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="seco-") as scratch:
            yield Path(scratch)
            # Indexes last: a shard with an index is a finished one.
            for path in sorted(Path(scratch).iterdir(), key=lambda path: path.suffix == ".idx"):
                self._put(path, path.name)

    def write_text(self, name: str, text: str) -> None:
        with tempfile.NamedTemporaryFile("wb", prefix="seco-") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            self._put(Path(file.name), name)

    def append(self, name: str, text: str) -> None:
        # Objects cannot grow; they are read and put again.
        with _told_of(f"{self.url}/{name}"):
            try:
                before = self._system.cat_file(self._address(name)).decode("utf-8")
            except FileNotFoundError:
                before = ""
        self.write_text(name, before + text)

    def delete(self, name: str) -> None:
        with _told_of(f"{self.url}/{name}"), suppress(FileNotFoundError):
            self._system.rm_file(self._address(name))

    @contextmanager
    def writer_lock(self, name: str) -> Iterator[None]:
        yield  # object stores have no locks; puts are whole, and equal plans write equal bytes

    def _put(self, local: Path, name: str) -> None:
        address = self._address(name)
        with _told_of(f"{self.url}/{name}"):
            if self._protocol in _OBJECT_STORES:
                self._system.put_file(str(local), address)
            else:
                self._system.makedirs(self._root, exist_ok=True)
                self._system.put_file(str(local), f"{address}.part")
                self._system.mv(f"{address}.part", address)

    def _address(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


@contextmanager
def _told_of(address: str) -> Iterator[None]:
    """Whatever goes wrong behind fsspec, in each library's own types, is one line."""
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
