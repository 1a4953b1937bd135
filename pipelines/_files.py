"""Single video files: read for a query or the tracker, and written."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines._adapter import Video
from pipelines._build import store_video
from pipelines._colour import encode_jpeg, jpeg_planes
from pipelines._decode import DecodeError, Decoding, decoding
from pipelines._ffmpeg import FfmpegError, ffmpeg_binary, ffmpeg_version, local_url, run_ffmpeg
from pipelines._plan import FrameChoice, ShardPlan
from shards.atomic import atomic_path
from shards.errors import InputError
from shards.untrusted import open_regular

_QUALITY = 95
_ANY_SIZE = 1 << 20  # px: a short edge that no video has; nothing is scaled


class VideoFile:
    """The frames of a video file as they are decoded, upright and with square pixels.

    They are processed like prepared ones: exact colour, as JPEG files.

    Attributes:
        damage: ffmpeg's message about what did not decode, if any; known at the end.
    """

    def __init__(self, decoded: Decoding, path: Path) -> None:
        self.damage: str | None = None
        self._decoded = decoded
        self._path = path

    def __iter__(self) -> Iterator[tuple[float, bytes]]:
        """Yield (seconds, JPEG) of every frame that decodes; after damage, of those before it.

        Raises:
            InputError: nothing decodes, or the file is not a video.
        """
        given = 0
        try:
            for frame in self._decoded:
                width, height = self._decoded.width, self._decoded.height
                exact = jpeg_planes(frame.planes, width, height, *frame.colour)
                yield frame.time, encode_jpeg(exact, _QUALITY)
                given += 1
            self.damage = self._decoded.damage
        except DecodeError as error:
            if not given:
                raise InputError(error.message, self._path) from error
            self.damage = error.message

    def fps(self) -> float | None:
        """Return the container's frame rate; known once the first frame is decoded."""
        return self._decoded.source_fps


@contextmanager
def open_video(path: Path) -> Iterator[VideoFile]:
    """Decode a file; ffmpeg has exited when the block ends, however it ends.

    Raises:
        InputError: the file does not exist.
    """
    _require_regular(path)
    try:
        # No time limit: the consumer of the frames sets the pace.
        with decoding(
            path, short_edge=_ANY_SIZE, timeout_seconds=None, binary=ffmpeg_binary()
        ) as decoded:
            yield VideoFile(decoded, path)
    except DecodeError as error:
        raise InputError(error.message, path) from error


def _require_regular(path: Path) -> None:
    """Check that a file exists and can be read; ffmpeg would wait for a named pipe."""
    try:
        open_regular(path).close()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path, "check the path") from error


def write_video(path: Path, fps: float, frames: Iterable[NDArray[np.uint8]]) -> None:
    """Write (H, W, 3) frames of one size as H.264 in an mp4, atomically.

    Frames are requested as ffmpeg takes them.

    Raises:
        InputError: ffmpeg cannot write it.
        ValueError: there are no frames.
    """
    coming = iter(frames)
    first: Any = next(coming, None)
    if first is None:
        raise ValueError("no frames to write")
    height, width = first.shape[:2]
    with atomic_path(path) as temporary:
        arguments = [
            *("-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"),
            *("-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "pipe:0"),
            # 4:2:0 needs even sides.
            *("-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p"),
            *("-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-movflags", "+faststart"),
            *("-f", "mp4", "-y", local_url(temporary)),
        ]
        try:
            pieces = (np.ascontiguousarray(f).tobytes() for f in itertools.chain([first], coming))
            run_ffmpeg(arguments, stdin=pieces)
        except FfmpegError as error:
            raise InputError(
                f"ffmpeg could not write it ({error})",
                path,
                "unset SECO_FFMPEG to use imageio-ffmpeg's, which can",
            ) from error


def decode_file(
    path: Path, *, frames: int, short_edge: int, quality: int, timeout_seconds: float
) -> list[bytes]:
    """Return JPEGs of ``frames`` evenly spaced frames (or of all if fewer), in time order.

    The file is not trusted, as in ``seco prepare``: ffmpeg runs in its own process, with a time
    limit, and opens only this file.

    Args:
        short_edge: px; smaller frames stay as they are.
        quality: of the JPEGs, 1 to 100.

    Raises:
        InputError: it cannot be decoded completely within the time.
    """
    if not timeout_seconds > 0:
        raise InputError("must be above 0", "--timeout")
    _require_regular(path)
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
        raise InputError(f"cannot be decoded ({error})", path, "give an undamaged file") from error
