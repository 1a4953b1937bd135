"""``seco inspect``: what shards hold, as lines, as a page and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seco.inspect.contact_sheet import compose, draw_strips, write_contact_sheet
from seco.inspect.set_page import write_set_page
from seco.inspect.set_summary import lines, summarise
from shards.opening import open_shards


def inspect_set(spec: Sequence[str], html: str | None = None, png: str | None = None) -> str:
    """The set's figures as text; with ``html`` or ``png`` also its page or contact sheet.

    Raises:
        InputError: the shards cannot be read, or a file cannot be written.
    """
    shards = open_shards(spec)
    summary = summarise(shards)
    strips = draw_strips(shards) if html or png else []
    if html:
        write_set_page(summary, strips, Path(html), title=shards.name)
    if png:
        write_contact_sheet(compose(strips), Path(png))
    return lines(summary)
