"""A contact sheet: some videos of a set as strips of frames, to see what was stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from seco.inspect.set_summary import Videos, label_of
from seco.pages.text import printable
from seco.pages.thumbnails import small_picture
from shards.access import UnreadableFrame
from shards.atomic import atomic_path

TILE_PX = (144, 108)  # width, height
_GAP_PX = 4
_CAPTION_PX = 20
_PAPER = (250, 250, 250)
_INK = (40, 44, 48)
_EMPTY = (228, 231, 234)
_BROKEN = (190, 40, 40)


@dataclass(frozen=True)
class Strip:
    """One video: its frames side by side, in time order."""

    key: str
    label: str
    frames: int  # stored, not drawn
    image: Image.Image
    broken: int  # tiles that could not be decoded


def contact_sheet(
    shard_set: Videos, videos: int = 24, frames_per_video: int = 6, seed: int = 0
) -> Image.Image:
    """A picture of ``videos`` random videos with their keys and labels.

    A frame that cannot be decoded is a crossed tile; ``image.info["broken"]`` counts them.

    Args:
        frames_per_video: spread evenly from the first to the last.
        seed: which videos; the same seed gives the same picture.
    """
    return compose(draw_strips(shard_set, videos, frames_per_video, seed))


def write_contact_sheet(image: Image.Image, path: Path) -> None:
    """Write the sheet as PNG, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def draw_strips(
    shard_set: Videos, videos: int = 24, frames_per_video: int = 6, seed: int = 0
) -> list[Strip]:
    """The strips of a contact sheet, in the order of the set."""
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = rng.choice(len(shard_set), size=min(videos, len(shard_set)), replace=False)
    return [_strip(shard_set, int(video), frames_per_video) for video in sorted(chosen)]


def compose(strips: list[Strip]) -> Image.Image:
    """The strips below each other, each under its caption."""
    row_px = _CAPTION_PX + TILE_PX[1] + _GAP_PX
    width = max((strip.image.width for strip in strips), default=TILE_PX[0]) + 2 * _GAP_PX
    broken = sum(strip.broken for strip in strips)
    height = row_px * len(strips) + (_CAPTION_PX if broken else 0) + _GAP_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for row, strip in enumerate(strips):
        top = row * row_px
        caption = printable(f"{strip.key}   {strip.label}   {strip.frames} frames")
        caption = _shortened(caption, width - 2 * _GAP_PX, lambda text: draw.textlength(text, font))
        draw.text((_GAP_PX, top + 3), caption, fill=_INK, font=font)
        sheet.paste(strip.image, (_GAP_PX, top + _CAPTION_PX))
    if broken:
        text = f"{broken} of these frames cannot be decoded"
        draw.text((_GAP_PX, height - _CAPTION_PX), text, fill=_BROKEN, font=font)
    sheet.info["broken"] = broken
    return sheet


def _strip(shard_set: Videos, video: int, frames_per_video: int) -> Strip:
    stored = shard_set.frame_count(video)
    shown = min(stored, frames_per_video)
    image = Image.new(
        "RGB", (frames_per_video * (TILE_PX[0] + _GAP_PX) - _GAP_PX, TILE_PX[1]), _EMPTY
    )
    broken = 0
    for column, frame in enumerate(np.linspace(0, stored - 1, shown).round().astype(int)):
        tile = _tile(shard_set, video, int(frame))
        broken += tile is None
        image.paste(tile or _crossed_tile(), (column * (TILE_PX[0] + _GAP_PX), 0))
    try:
        record = shard_set.record(video)
    except UnreadableFrame:
        record = None
    label = label_of(shard_set, video, record)
    return Strip(str(shard_set.keys[video]), label, stored, image, broken)


def _tile(shard_set: Videos, video: int, frame: int) -> Image.Image | None:
    """The frame within a tile, its aspect kept; None when it cannot be decoded."""
    try:
        picture = small_picture(shard_set.read_frame(video, frame), TILE_PX)
    except UnreadableFrame:
        return None
    if picture is None:
        return None
    tile = Image.new("RGB", TILE_PX, _EMPTY)
    tile.paste(picture, ((TILE_PX[0] - picture.width) // 2, (TILE_PX[1] - picture.height) // 2))
    return tile


def _crossed_tile() -> Image.Image:
    tile = Image.new("RGB", TILE_PX, _EMPTY)
    draw = ImageDraw.Draw(tile)
    right, bottom = TILE_PX[0] - 1, TILE_PX[1] - 1
    draw.rectangle((0, 0, right, bottom), outline=_BROKEN, width=2)
    draw.line((0, 0, right, bottom), fill=_BROKEN, width=2)
    draw.line((0, bottom, right, 0), fill=_BROKEN, width=2)
    return tile


def _shortened(text: str, width_px: float, measure: Callable[[str], float]) -> str:
    if measure(text) <= width_px:
        return text
    text = text[: int(width_px)]  # no glyph of use is narrower than a px
    while text and measure(text + "…") > width_px:
        text = text[:-1]
    return text + "…"
