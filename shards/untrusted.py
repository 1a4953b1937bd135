"""Untrusted files: regular, of bounded size, and decoded into declared types before any use.

Whatever a user names may have been made by anybody. A fault is one :class:`InputError` with the
file, the field and what was expected there.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import msgspec

from shards.errors import InputError

MAX_TEXT_BYTES = 256 << 20  # of a manifest, list, result or description
MAX_PIXELS = 64_000_000  # of a picture
_MAX_PIXELS_VARIABLE = "SECO_MAX_PIXELS"
SANDBOX_VARIABLE = "SECO_SANDBOX"
VARIABLES = (_MAX_PIXELS_VARIABLE, SANDBOX_VARIABLE)  # which a cluster's nodes are to have, too

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Label = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
FileName = Annotated[str, msgspec.Meta(pattern=r"\A(?!\.{1,2}\Z)[^/\x00]{1,255}\Z")]

_T = TypeVar("_T")
_AT = re.compile(r" - at `\$?\.?(.*)`$")


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; nothing else is opened, and nothing waited for.

    Raises:
        OSError: it cannot be opened.
        InputError: it is a folder, a pipe, a socket or a device.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError("is not a file", path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, most: int = MAX_TEXT_BYTES, fix: str | None = None) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    Args:
        path: of the file.
        most: its greatest size in bytes.
        fix: advice to the user if it cannot be read.

    Raises:
        InputError: it cannot be read, is not a regular file, or is too large.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(size + 1) if size <= most else b""
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", path, fix) from error
    if max(size, len(content)) > most:
        raise InputError(f"is larger than {most >> 20} MiB", path, fix)
    return content


def decode_json(
    kind: type[_T], content: bytes, where: object, what: str, fix: str | None = None
) -> _T:
    """Decode JSON into ``kind``, a type with annotations that msgspec checks.

    Args:
        kind: a dataclass, or another type that msgspec knows.
        content: untrusted bytes.
        where: names the file in errors.
        what: completes "the file …" in errors, for example ``is not a manifest``.
        fix: advice to the user.

    Raises:
        InputError: it is not JSON, or a field is missing, of another type or out of range.
    """
    try:
        decoded: _T = _decoder(kind).decode(content)  # type: ignore[arg-type]
        return decoded
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{what} ({fault(error)})", where, fix) from error


def convert(kind: type[_T], value: Any, where: object, what: str, fix: str | None = None) -> _T:
    """Check plain values, as loaded from a checkpoint or TOML, and return them as ``kind``.

    Raises:
        InputError: as for :func:`decode_json`.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InputError(f"{what} ({fault(error)})", where, fix) from error


def fault(error: Exception) -> str:
    """Return what was expected in which field, in one line."""
    text = str(error)
    at = _AT.search(text)
    if at is None:
        return text[:200]
    return f"{at[1] or 'its content'}: {text[: at.start()][:200].lower()}"


def real_path(path: str | Path) -> Path:
    """Return the path without links; ``Path.resolve`` fails for one that leads to itself."""
    return Path(os.path.realpath(path))


@functools.cache  # asked for every frame
def max_pixels() -> int:
    """Return the greatest size of a picture that is decoded; ``seco --max-pixels`` sets it."""
    given = os.environ.get(_MAX_PIXELS_VARIABLE, "")
    if given and not (given.isascii() and given.isdigit()):
        raise InputError("is not a whole number", _MAX_PIXELS_VARIABLE, "unset it")
    return int(given or MAX_PIXELS)


def set_max_pixels(number: int) -> None:
    """Set the limit for this process and those it starts."""
    os.environ[_MAX_PIXELS_VARIABLE] = str(number)
    max_pixels.cache_clear()


def require_pixels(width: int, height: int) -> None:
    """Check the size a header claims, before memory is taken for the picture.

    Raises:
        ValueError: it is larger than :func:`max_pixels`.
    """
    if width * height > max_pixels():
        raise ValueError(
            f"{width}x{height} px are more than {max_pixels() / 1e6:.0f} megapixels; "
            "raise the limit with seco --max-pixels"
        )


@functools.cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)
