"""The one way text for people reaches a terminal or a log: without characters that could act."""

from __future__ import annotations

import sys
import unicodedata


def printable(text: object) -> str:
    r"""Return the text with control, direction-changing and surrogate characters escaped.

    Names in files of others may hold them, and a terminal would obey. They are shown as Python
    writes them, for example ``\x1b``; line breaks as ``\n``.
    """
    given = str(text)
    return given if given.isprintable() else "".join(map(_shown, given))


def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def say(text: object) -> None:
    """Print a message to standard error."""
    print(_lines(text), file=sys.stderr, flush=True)


def show(text: object) -> None:
    """Print a result to standard output."""
    print(_lines(text))


def _lines(text: object) -> str:
    return "\n".join(map(printable, str(text).split("\n")))


def show_everywhere() -> None:
    """Escape what the terminal's encoding lacks, instead of ending in an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # it may be closed, or replaced
            stream.reconfigure(errors="backslashreplace")
