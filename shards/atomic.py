"""Files that appear complete or not at all: temporary name, fsync, rename. Also CSV in UTF-8."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from shards.errors import InputError

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name; rename it to ``path`` when the block ends without an exception.

    The name is ``path`` plus eight random digits and ``.part``, so that two processes that make the
    same file (on a cluster, if one was presumed dead) do not share it.

    The file is synced before the rename and its folder after it, so that a power cut leaves the
    old file or the new one. The temporary file is removed after any exception.

    Raises:
        InputError: the folder cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        # Only faults of the location are for the user to fix; other errors keep their type.
        if error.errno in _DISK_FAULTS or str(error.filename) == str(temporary):
            raise unwritable(path, error) from error
        raise
    finally:
        # If the parent is unwritable or not a folder, there is nothing to remove.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder under a temporary name; rename it to ``path`` as :func:`atomic_path` does.

    Args:
        path: must not exist, or be an empty folder.

    Raises:
        InputError: the parent folder cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        sync_folder(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in _DISK_FAULTS or str(error.filename).startswith(str(temporary)):
            raise unwritable(path, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def default_folder() -> str:
    """Return the default output: ``shards``, or ``data/shards`` where ``shards`` is code."""
    return "data/shards" if _is_code(Path("shards")) else "shards"


def _is_code(folder: Path) -> bool:
    return (folder / "__init__.py").is_file()


def require_writable(folder: Path) -> None:
    """Create ``folder`` if needed, and check now rather than after hours of work.

    Raises:
        InputError: it cannot be created or written to.
    """
    if _is_code(folder):
        raise InputError(
            "is a folder of Python code", folder, "choose another, or run this in your data folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Unnamed where the file system allows it, so that a kill here leaves nothing.
        with tempfile.TemporaryFile(dir=folder, prefix=".seco-"):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(path: Path, error: OSError) -> InputError:
    """Return the error for a file or folder that cannot be written."""
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return InputError(
            "cannot be written: it is a file, not a folder", path, "choose another folder"
        )
    return InputError(
        f"cannot be written ({error.strerror or error})",
        path,
        "free some space or choose another folder",
    )


def sync_folder(folder: Path) -> None:
    """Make the names of files in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8, newlines as given) atomically, unless the file already holds it.

    A second run that finds everything done therefore writes nothing.
    """
    content = text.encode("utf-8", "backslashreplace")  # a lone surrogate
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON atomically; the same value gives the same bytes."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return ``value`` as indented JSON, in the style of all files of this toolkit."""
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False) + "\n"


class _LineFeeds:
    """Ends rows with a line feed only."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def write_csv(file: TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Write rows to a file opened with ``newline=""``; None becomes an empty field."""
    # The csv module quotes a carriage return in a field only if it is part of the line terminator;
    # unquoted, it would split the row in two for readers.
    csv.writer(_LineFeeds(file), lineterminator="\r\n").writerows(rows)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return what :func:`write_csv` writes, as one string."""
    text = io.StringIO(newline="")
    write_csv(text, rows)
    return text.getvalue()
