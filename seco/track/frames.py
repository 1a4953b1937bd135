"""The frames of stored sequences, decoded ahead while the tracker works on the ones before."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from seco.views.crops import BrokenJpeg, Pixels, decode_jpeg
from shards.access import UnreadableFrame, readable
from shards.reader import ShardSet

_READ_AT_ONCE = 8  # frames; remote shards answer for all of them in one round trip


def frames_ahead(shards: ShardSet, video: int) -> Iterator[Pixels | str]:
    """The (H, W, 3) frames of a sequence in time order; in the place of an unreadable one, why."""
    count = shards.frame_count(video)

    def read(first: int) -> list[Pixels | str]:
        numbers = range(first, min(first + _READ_AT_ONCE, count))
        return [_decoded(data) for data in shards.read_frames([(video, n) for n in numbers])]

    with ThreadPoolExecutor(1, thread_name_prefix="frames") as thread:
        ahead = thread.submit(read, 0)
        for first in range(0, count, _READ_AT_ONCE):
            frames = ahead.result()
            if first + _READ_AT_ONCE < count:
                ahead = thread.submit(read, first + _READ_AT_ONCE)
            yield from frames


def _decoded(data: bytes | UnreadableFrame) -> Pixels | str:
    try:
        return decode_jpeg(readable(data))
    except (UnreadableFrame, BrokenJpeg) as error:
        return str(error)
