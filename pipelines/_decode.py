"""Decoding a video in one pass: ffmpeg scales, the pictures come back through a pipe.

ffmpeg is asked for size only, never for colour: measured, its 8-bit conversions between ranges
and matrices shift the chroma by up to half a level, so ``_colour.py`` does them exactly.
"""

from __future__ import annotations

import itertools
import math
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ffmpeg
import numpy as np
from numpy.typing import NDArray

from pipelines._ffmpeg import FfmpegStream, local_url
from pipelines._ffmpeg_log import FfmpegLog, Shown

# Containers and raw streams of video. Nothing that only names other files or addresses: hls,
# dash, concat, sdp and image2 dressed up as a video must not be followed.
CONTAINERS = (
    *("mov", "avi", "matroska", "mpeg", "mpegts", "mpegvideo", "flv", "asf", "ogg", "rm", "dv"),
    *("mxf", "nut", "ivf", "obu", "h264", "hevc", "m4v", "gif", "wtv"),
)
_MAX_PICTURE_BYTES = 256 << 20
_MARKER = b"FRAME\n"  # before each picture of YUV4MPEG2


class DecodeError(Exception):
    """A video that cannot be stored; ``kind`` as in :class:`shards.format.Exclusion`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return DecodeError, (self.kind, self.message)


class Frame(NamedTuple):
    """One decoded picture, in the source's own matrix and range."""

    time: float  # seconds from the video's start
    planes: NDArray[np.uint8]  # Y (H, W), then U and V (H/2, W/2), flat


def pictures(path: Path) -> Any:
    """The ffmpeg-python stream of ``path``'s pictures as they decode, turned upright."""
    source = ffmpeg.input(
        local_url(path),
        protocol_whitelist="file",
        format_whitelist=",".join(CONTAINERS),
        # One thread a video: the workers fill the cores, and damaged streams decode the same
        # way every time.
        threads=1,
    )
    return source["V:0"]  # V: no cover art


def scaled(stream: Any, short_edge: int) -> Any:
    """The stream with square pixels, in 4:2:0, scaled."""
    width, height = scaled_size(short_edge)
    # bitexact: the same on every processor
    flags = "bicubic+accurate_rnd+bitexact"
    return (
        stream.filter("scale", w=width, h=height, flags=flags)
        .filter("setsar", "1")
        .filter("format", "yuv420p")
    )


def _told(stream: Any) -> Any:
    """The stream, each of whose frames leaves a line in the log."""
    # Side data may hold anything, of any length, and showinfo would print it.
    return stream.filter("sidedata", mode="delete").filter("showinfo", checksum=0)


def scaled_size(short_edge: int) -> tuple[str, str]:
    """Width and height as expressions of the scale filter.

    Autorotation has happened when the filters begin. `sar` makes pixels square. A video is never
    enlarged: views are cropped and resized later, and each interpolation blurs. Sides are even
    because 4:2:0 needs it; halves round down so that an odd side loses a line, not gains one.
    """
    scale = f"min(1,{short_edge}/min(iw*sar,ih))"
    return f"max(2,2*ceil(iw*sar*{scale}/2-0.5))", f"max(2,2*ceil(ih*{scale}/2-0.5))"


def output_argv(stream: Any, binary: str) -> list[str]:
    """The whole command of an ffmpeg-python output stream, with the options of all our runs."""
    quiet = ("-nostdin", "-hide_banner", "-nostats", "-filter_complex_threads", "1")
    return [str(word) for word in stream.global_args(*quiet).compile(cmd=binary)]


def decode_argv(
    path: Path, short_edge: int, binary: str, only: Sequence[int] | None = None
) -> list[str]:
    """The command that writes the frames of ``path`` as YUV4MPEG2 and their times to its log.

    Args:
        only: numbers of the frames to write, increasing; the log still has the times of all.
    """
    if only is None:
        stream = _told(scaled(pictures(path), short_edge))
    else:
        wanted = "+".join(f"eq(n,{number})" for number in only)
        stream = scaled(_told(pictures(path)).filter("select", wanted), short_edge)
    output = stream.output(
        "pipe:1", format="yuv4mpegpipe", strict=-1, fps_mode="passthrough", filter_threads=1
    )
    return output_argv(output, binary)


class WrongForecast(Exception):
    """The frames asked for cannot be told to be the right ones: all have to be decoded."""


class Decoding:
    """The frames of one video as they come; what is known of it grows while they do.

    Attributes:
        width, height: px, of the frames given; known from the first frame on.
        matrix, full_range: of the frames given, in ffmpeg's names; known from the first frame on.
        source_fps, source_duration: as the container says; None when it does not.
        times: seconds of the frames decoded so far, not decreasing; at the end, of all.
        damage: ffmpeg's complaint of a packet or frame that does not decode, if any; known
            at the end.
    """

    def __init__(self, stream: FfmpegStream, path: Path, only: Sequence[int] | None = None) -> None:
        self.width = self.height = 0
        self.matrix = ""
        self.full_range = False
        self.source_fps: float | None = None
        self.source_duration: float | None = None
        self.times: list[float] = []
        self.damage: str | None = None
        self._only = only
        self._stream = stream
        self._path = path
        self._log = FfmpegLog()

    def __iter__(self) -> Iterator[Frame]:
        """Every frame that decodes (or those asked for), in time order.

        Raises:
            DecodeError: no frame came, or ffmpeg gave up.
            WrongForecast: only some frames were asked for, and their colour or size is in doubt.
        """
        try:
            yield from self._frames()
        except EOFError as error:
            # Only ffmpeg's end makes the pipe end early; how it ended says more than the pipe.
            self._raise_failure(str(error))
        except ValueError as error:
            self._stream.kill()
            self._raise_failure(str(error), killed=True)
        self._raise_failure(None)

    def _frames(self) -> Iterator[Frame]:
        header = self._stream.read_line(4096)
        if not header:
            return
        if not header.endswith(b"\n") and len(header) < 4096:
            raise EOFError("ffmpeg's output ends in its first line")
        self.width, self.height = _picture_size(header)
        size = len(_MARKER) + self.width * self.height * 3 // 2
        numbers = iter(self._only) if self._only is not None else itertools.count()
        while received := self._stream.read_into((data := np.empty(size, np.uint8)).data):
            if data[: len(_MARKER)].tobytes() != _MARKER[:received]:
                raise ValueError("ffmpeg's output cannot be read")
            if received != size:
                raise EOFError("ffmpeg's output ends in the middle of a frame")
            number = next(numbers)
            # A frame's line is written before the frame is, so it is there by now.
            if len(self.times) <= number:
                self._read_log()
            if len(self.times) <= number:
                raise ValueError("ffmpeg did not tell a frame's time")
            if not self.matrix:
                self.matrix, self.full_range = self._log.colour()
            yield Frame(self.times[number], data[len(_MARKER) :])

    def _read_log(self) -> None:
        self._log.update(self._stream.read_log())
        self.source_fps, self.source_duration = self._log.fps, self._log.duration
        latest = self.times[-1] if self.times else 0.0
        for shown in self._log.shown[len(self.times) :]:
            self._require_same_picture(shown)
            guess = latest + 1.0 / (self.source_fps or 25.0) if self.times else 0.0
            # Damaged files go back in time; frames are stored in the order they are shown.
            latest = max(latest, guess if math.isnan(shown.time) else shown.time)
            self.times.append(latest)

    def _require_same_picture(self, shown: Shown) -> None:
        if self._only is not None:
            # These are the pictures before scaling: what comes of them must be the same for all,
            # and no other conversion than of the size.
            if shown.picture != self._log.shown[0].picture or shown.picture[0] != b"yuv420p":
                raise WrongForecast
        elif shown.size != (self.width, self.height):
            raise DecodeError(
                "unreadable",
                f"the picture changes from {self.width}x{self.height} "
                f"to {shown.size[0]}x{shown.size[1]} in the middle",
            )

    def _raise_failure(self, reading: str | None, killed: bool = False) -> None:
        # A stuck ffmpeg falls to the time limit.
        code = self._stream.wait()
        self._read_log()
        if self._stream.timed_out:
            raise DecodeError("timeout", "ffmpeg ran past the time limit and was killed")
        if code < 0 and not killed:
            raise DecodeError("crashed", f"ffmpeg was ended by signal {-code}")
        message = self._log.failure(self._path)
        if self._log.no_video_stream:
            raise DecodeError("no-video-stream", "it has no video stream")
        if code != 0 or reading is not None:
            opened = self._log.opened and not self.times and reading is None
            kind = "zero-frames" if opened else "unreadable"
            raise DecodeError(kind, message or reading or f"ffmpeg ended with code {code}")
        if not self.times:
            raise DecodeError("zero-frames", message or "no frame could be decoded")
        self.damage = self._log.damage()


@contextmanager
def decoding(
    path: Path,
    *,
    short_edge: int,
    timeout_seconds: float | None,
    binary: str,
    only: Sequence[int] | None = None,
) -> Iterator[Decoding]:
    """Decode ``path`` once; ffmpeg is gone when the block ends.

    Args:
        only: numbers of the frames to scale and give, increasing; all are decoded.

    Raises:
        DecodeError: there is no such file, or from the iteration, see :class:`Decoding`.
    """
    try:
        status = path.stat()
    except OSError as error:
        kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise DecodeError(kind, error.strerror or "cannot be read") from error
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise DecodeError("unreadable", "the file is empty")
    with FfmpegStream(decode_argv(path, short_edge, binary, only), timeout_seconds) as stream:
        yield Decoding(stream, path, only)


def _picture_size(header: bytes) -> tuple[int, int]:
    words = header.split()
    fields = {word[:1]: word[1:] for word in words[1:]}
    if words[:1] != [b"YUV4MPEG2"] or not {b"W", b"H"} <= set(fields):
        raise ValueError("ffmpeg's output cannot be read")
    width, height = int(fields[b"W"]), int(fields[b"H"])
    if width % 2 or height % 2 or not 0 < width * height * 3 // 2 <= _MAX_PICTURE_BYTES:
        raise ValueError(f"pictures of {width}x{height} cannot be stored")
    return width, height
