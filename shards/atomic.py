"""Files that appear complete or not at all: temporary name, fsync, rename. Also CSV in UTF-8."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import secrets
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

    It is ``path`` with eight random digits and ``.part``: where two processes make the same file
    (one of them taken for dead, on a cluster), each writes its own.

    The file is synced before the rename and its folder after it, so that a power cut leaves the
    old file or the new one. After any exception the temporary file is gone.

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
        _sync_folder(path.parent)
    except OSError as error:
        # Only faults of the place itself are the user's to mend; others keep their type.
        if error.errno in _DISK_FAULTS or str(error.filename) == str(temporary):
            raise unwritable(path, error) from error
        raise
    finally:
        # When the parent is unwritable or not a folder, nothing of ours can be lying there.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def default_folder() -> str:
    """Where shards go when nothing is said: ``shards``, or ``data/shards`` where that is code."""
    return "data/shards" if _is_code(Path("shards")) else "shards"


def _is_code(folder: Path) -> bool:
    return (folder / "__init__.py").is_file()


def require_writable(folder: Path) -> None:
    """Make ``folder`` if need be, and find out now rather than after hours of work.

    Raises:
        InputError: it cannot be made or written to.
    """
    if _is_code(folder):
        raise InputError(
            "is a folder of Python code", folder, "choose another, or start from your data folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without a name where the file system can: a kill here leaves nothing.
        with tempfile.TemporaryFile(dir=folder, prefix=".seco-"):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(path: Path, error: OSError) -> InputError:
    """What is told of a file or folder that cannot be written."""
    return InputError(
        f"cannot be written ({error.strerror or error})",
        path,
        "free some space or choose another folder",
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8, newlines as given) atomically; a file that holds it is left alone.

    So that a second run which finds everything done writes nothing.
    """
    content = text.encode("utf-8")
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON atomically; the same value gives the same bytes."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """``value`` as indented JSON, as all files of this toolkit have it."""
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False) + "\n"


class _LineFeeds:
    """Ends rows with a line feed alone."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def write_csv(file: TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Write rows to a file opened with ``newline=""``; None becomes an empty field."""
    # The csv module quotes a carriage return in a field only where it is part of a line's end;
    # unquoted it would split the row in two for whoever reads it.
    csv.writer(_LineFeeds(file), lineterminator="\r\n").writerows(rows)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """The same as one text."""
    text = io.StringIO(newline="")
    write_csv(text, rows)
    return text.getvalue()
