"""Where a set is kept: a local folder, or any place fsspec knows (``s3://bucket/shards``).

A set is written by naming files in one flat folder; this is all that writing needs of it.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from shards.atomic import require_writable, unwritable, write_text
from shards.errors import InputError
from shards.remote import in_words, open_filesystem

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
