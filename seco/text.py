"""Text for pages and terminals, without any other package."""

from __future__ import annotations


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.6191 as "61.9"; a dash for what was not measured."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f}"


def printable(text: object) -> str:
    """``text`` without control characters, which could redraw a terminal or hide in a page."""
    given = str(text)
    if given.isprintable():
        return given
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in given)
