"""Small pictures of stored frames, for pages and sheets; a frame that does not decode is None."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

from PIL import Image

from seco.pages.html import data_uri
from shards.access import UnreadableFrame
from shards.draws import evenly_spaced
from shards.reader import ShardSet

THUMBNAIL_PX = (320, 180)  # twice what a page shows, for sharp screens
_JPEG_QUALITY = 78
_UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,  # Pillow's for a broken PNG
    struct.error,
    Image.DecompressionBombError,
)

# (key, how many) -> JPEG bytes in time order, fewer or none if there are no more.
FramesOf = Callable[[str, int], list[bytes]]


def small_picture(data: bytes, box_px: tuple[int, int]) -> Image.Image | None:
    """The picture in RGB at most as large as the box (width, height), its aspect kept."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as stored:
            stored.draft("RGB", box_px)  # libjpeg decodes at a fraction of the size
            picture: Image.Image = stored.convert("RGB")
    except _UNDECODABLE:
        return None
    picture.thumbnail(box_px)
    return picture


def thumbnail(data: bytes, box_px: tuple[int, int] = THUMBNAIL_PX) -> str | None:
    """The small picture as a data URI: encoded anew, so nothing of the file itself gets through."""
    picture = small_picture(data, box_px)
    if picture is None:
        return None
    encoded = io.BytesIO()
    picture.save(encoded, format="JPEG", quality=_JPEG_QUALITY)
    return data_uri(encoded.getvalue(), "image/jpeg")


def frames_of(shards: ShardSet) -> FramesOf:
    """Evenly spaced stored frames of a video; those that cannot be read are left out."""

    def read(key: str, count: int) -> list[bytes]:
        video = shards.find(key)
        numbers = evenly_spaced(shards.frame_count(video), count)
        found = shards.read_frames([(video, number) for number in numbers])
        return [data for data in found if not isinstance(data, UnreadableFrame)]

    return read
