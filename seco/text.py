"""Text for pages and terminals, without any other package."""

from __future__ import annotations


def percent(fraction: float | None, digits: int = 1) -> str:
    """Format 0.6191 as "61.9", and None (not measured) as a dash."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f}"
