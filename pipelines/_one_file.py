"""The frames of one video file that belongs to no set, as ``seco prepare`` would store them."""

from __future__ import annotations

from pathlib import Path

from pipelines._adapter import Video
from pipelines._build import store_video
from pipelines._decode import DecodeError
from pipelines._ffmpeg import ffmpeg_binary, ffmpeg_version
from pipelines._frames import FrameChoice
from pipelines._plan import ShardPlan
from shards.errors import InputError


def decode_file(
    path: Path, *, frames: int, short_edge: int, quality: int, timeout_seconds: float
) -> list[bytes]:
    """JPEGs of ``frames`` evenly spaced frames, or of all if there are fewer, in time order.

    The file is not trusted, as none is in preparing: ffmpeg runs apart, under a time limit, and
    opens this file alone.

    Args:
        short_edge: px; frames that are smaller stay as they are.
        quality: of the JPEGs, 1 to 100.

    Raises:
        InputError: it cannot be decoded, wholly and within the time.
    """
    if not timeout_seconds > 0:
        raise InputError("must be above 0", "--timeout")
    binary = ffmpeg_binary()
    plan = ShardPlan(
        folder="",
        name="",
        digest="",
        dataset="",
        videos=(),
        choice=FrameChoice(count=frames),
        short_edge=short_edge,
        quality=quality,
        min_frames=1,
        keep_damaged=False,
        timeout_seconds=timeout_seconds,
        src="",
        binary=binary,
        ffmpeg_version=ffmpeg_version(binary),
    )
    try:
        return store_video(Video(source=path.name, path=path), plan).frames
    except DecodeError as error:
        raise InputError(f"cannot be decoded ({error})", path, "give a whole video file") from error
