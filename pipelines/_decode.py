"""Decode a video in one pass: ffmpeg scales, and the pictures come back through a pipe.

ffmpeg is asked for the size only, never for colour: its 8-bit conversions between ranges and
matrices shift the chroma by up to half a level (measured), so ``_colour.py`` does them exactly.

The sample tables of an MP4 or MOV file tell when its frames are shown. This is a forecast only;
decoding tells what is really there. It lets ffmpeg scale and hand over only the few frames that
will be stored, where otherwise every frame would have to be scaled and kept until the last is
known.

ffmpeg's log gives times, colour and complaints. Its parts are threads and write their lines in
pieces: pieces of one part come in order, but others may stand between and even within lines. So
nothing here depends on how a line begins or ends, and of many complaints the one reported is the
same in every run.
"""

from __future__ import annotations

import itertools
import math
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ffmpeg
import numpy as np
from numpy.typing import NDArray

from pipelines._ffmpeg import FfmpegStream, local_url
from shards.untrusted import max_pixels, open_regular, require_pixels

_MAX_MOOV_BYTES = 64 << 20
_MAX_FRAMES = 4_000_000
_MAX_BOXES = 10_000
# H.264 profiles with 8 bits and 4:2:0, the only pictures whose colour the scaler leaves alone.
_PROFILES = (66, 77, 88, 100)


Inside = tuple[int, int] | None  # first byte and size of a video in a file of many; None: all


def forecast_times(path: Path, inside: Inside = None) -> NDArray[np.float64] | None:
    """Return (F,) seconds at which the frames of the first video track are shown, sorted.

    None for everything except 8-bit 4:2:0 H.264 with complete sample tables.
    """
    try:
        with open_regular(path) as file:
            moov = _moov(file, inside[0] if inside is not None else 0)
        return _track_times(moov) if moov is not None else None
    except (OSError, struct.error, ValueError, IndexError, KeyError, OverflowError):
        return None


def _moov(file: BinaryIO, position: int) -> bytes | None:
    """Return the box that describes the video; boxes before it are skipped, not read."""
    for _ in range(_MAX_BOXES):
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return None
        size, kind = struct.unpack_from(">I4s", header)
        start = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", header, 8)
            start = 16
        if size < start:
            return None
        if kind == b"moov":
            if size > _MAX_MOOV_BYTES:
                return None
            file.seek(position + start)
            return file.read(size - start)
        position += size
    return None


def _mp4_boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if size < 8 or position + size > len(data):
            return
        yield kind, data[position + 8 : position + size]
        position += size


def _inside(data: bytes, *path: bytes) -> bytes:
    """Return the contents of the first box at a path; raises KeyError if there is none."""
    for kind in path:
        data = dict(reversed(list(_mp4_boxes(data))))[kind]
    return data


def _track_times(moov: bytes) -> NDArray[np.float64] | None:
    for kind, track in _mp4_boxes(moov):
        if kind == b"trak" and _inside(track, b"mdia", b"hdlr")[8:12] == b"vide":
            table = _inside(track, b"mdia", b"minf", b"stbl")
            if not _is_plain_h264(_inside(table, b"stsd")):
                return None
            shown = _composition_ticks(table)
            header = _inside(track, b"mdia", b"mdhd")
            (scale,) = struct.unpack_from(">I", header, 20 if header[0] == 1 else 12)
            if shown is None or not scale:
                return None
            times: NDArray[np.float64] = np.sort(_edited(shown, track, moov, scale)) / scale
            return times
    return None


def _is_plain_h264(stsd: bytes) -> bool:
    if struct.unpack_from(">I", stsd, 4)[0] != 1 or stsd[12:16] not in (b"avc1", b"avc3"):
        return False
    entry = stsd[8 : 8 + struct.unpack_from(">I", stsd, 8)[0]]
    configuration = dict(_mp4_boxes(entry[8 + 78 :])).get(b"avcC", b"")
    return len(configuration) > 1 and configuration[1] in _PROFILES


def _composition_ticks(table: bytes) -> NDArray[np.int64] | None:
    """Return when each sample is shown, in file order; ISO 14496-12, 8.6.1."""
    counts, steps = _runs(_inside(table, b"stts"))
    if not 0 < counts.sum() <= _MAX_FRAMES:
        return None
    decoded = np.cumsum(np.repeat(steps, counts)) - np.repeat(steps, counts)
    boxes = dict(_mp4_boxes(table))
    if b"ctts" not in boxes:
        return decoded
    counts, offsets = _runs(boxes[b"ctts"])
    if counts.sum() != len(decoded):
        return None
    return decoded + np.repeat(offsets, counts)


def _runs(box: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (counts, values) of a run-length table; values are read as signed."""
    (length,) = struct.unpack_from(">I", box, 4)
    pairs = np.frombuffer(box, ">u4", 2 * length, 8).reshape(-1, 2)
    return pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.int32).astype(np.int64)


def _edited(shown: NDArray[np.int64], track: bytes, moov: bytes, scale: int) -> NDArray[np.int64]:
    """Apply an edit list of one entry to the samples."""
    try:
        edits = _inside(track, b"edts", b"elst")
    except KeyError:
        return shown
    (length,) = struct.unpack_from(">I", edits, 4)
    if length != 1:
        return shown
    duration, start = struct.unpack_from(">qq" if edits[0] == 1 else ">ii", edits, 8)
    movie = _inside(moov, b"mvhd")
    (movie_scale,) = struct.unpack_from(">I", movie, 20 if movie[0] == 1 else 12)
    end = start + duration * scale / max(1, movie_scale)
    kept = shown[(shown >= start) & (shown < end)] if duration else shown[shown >= start]
    return kept if len(kept) else shown


_TIME_BASE = re.compile(rb"config in time_base: (\d+)/(\d+)")
_SHOWN = re.compile(rb"\bn: *\d+ pts: *(-?\d+|NOPTS) .* fmt:(\S+) .*sar:(\d+/\d+) s:(\d+)x(\d+) i:")
_RANGE = re.compile(rb"color_range:(pc|jpeg)?")
# All other names are treated as BT.601.
_MATRIX = re.compile(rb"color_space:(bt709|fcc|smpte240m|bt2020nc|bt2020c)?")
_DURATION = re.compile(rb"  Duration: (\d+):(\d+):(\d+(?:\.\d+)?)")
_FPS = re.compile(rb"  Stream #0:\d+.*: Video: .*?([\d.]+)(k?) fps")
_METADATA = re.compile(rb" {4,}[^:]{1,16}: ")  # may contain any text
_FAULT = re.compile(
    rb"error|invalid|not found|no such|could not|cannot|unsupported|denied|whitelist|truncat", re.I
)
# Messages about packets and frames, the same for all codecs: rejected, or concealed.
_DAMAGE = re.compile(
    rb"Error submitting packet to decoder|Error while decoding stream|Decoding error|"
    rb"corrupt decoded frame|Packet corrupt|partial file"
)


# Every match of _FAULT or _DAMAGE contains one of these (in lower case or as written).
_COMPLAINTS = (
    b"rror",
    b"nvalid",
    b"ot found",
    b"o such",
    b"ould not",
    b"annot",
    b"nsupported",
    b"enied",
    b"hitelist",
    b"orrupt",
    b"artial file",
    b"runcat",
    b"config in",
)


class Colour(NamedTuple):
    """How a picture's planes are to be read."""

    matrix: str = "unknown"  # ffmpeg's name
    full_range: bool = False  # whether black is 0 rather than 16


class Shown(NamedTuple):
    """A frame that has passed the filters."""

    time: float  # seconds; nan if the stream has none
    size: tuple[int, int]  # px
    picture: tuple[bytes, ...]  # pixel format, sample aspect ratio, width, height


class FfmpegLog:
    """Parses the log in pieces while it grows.

    Attributes:
        shown: the frames so far.
        coloured: of how many of them the colour is known, too.
        fps, duration: from the container, in frames per second and seconds; None if unknown.
        opened: whether the container could be opened.
        no_video_stream: whether it is known to have none.
    """

    def __init__(self) -> None:
        self.shown: list[Shown] = []
        self.fps: float | None = None
        self.duration: float | None = None
        self.opened = False
        self.no_video_stream = False
        self.coloured = 0
        self._colours: list[tuple[int, Colour]] = []  # from which frame on
        self._colour_line = b""
        self._full_range: bool | None = None
        self._time_base = 0.0
        self._faults: dict[bytes, bytes] = {}
        self._damages: set[bytes] = set()
        self._rest = b""

    def update(self, piece: bytes) -> None:
        """Parse what has been written since the last call."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        # Searching the whole piece for parts of words is cheap; searching every line is not.
        complaints = any(part in piece or part in lines[0] for part in _COMPLAINTS) if lines else 0
        for line in lines:
            if self._colours and not complaints:
                # Almost every line: a frame, or its colour, which is that of the frame before.
                if line == self._colour_line:
                    self.coloured = len(self.shown)
                else:
                    self._read_showinfo(line)
                continue
            if _METADATA.match(line):
                continue
            if not self.shown:
                self._read_banner(line)
            self._read_showinfo(line)
            if found := _DAMAGE.search(line):
                self._damages.add(found[0])
            if not line.startswith((b" ", b"[Parsed_showinfo")) and _FAULT.search(line):
                self._faults.setdefault(_speaker(line), line)

    def _read_showinfo(self, line: bytes) -> None:
        if found := _TIME_BASE.search(line):
            self._time_base = int(found[1]) / max(1, int(found[2]))
        if found := _SHOWN.search(line):
            ticks, *picture = found.groups()
            size = (int(picture[2]), int(picture[3]))
            time = math.nan if ticks == b"NOPTS" else round(int(ticks) * self._time_base, 6)
            self.shown.append(Shown(time, size, tuple(picture)))
        elif self.shown:
            self._read_colour(line)

    def _read_colour(self, line: bytes) -> None:
        if found := _RANGE.search(line):
            self._full_range = found[1] is not None
        if (found := _MATRIX.search(line)) is None or self._full_range is None:
            return
        colour = Colour((found[1] or b"unknown").decode("ascii"), self._full_range)
        if not self._colours or colour != self._colours[-1][1]:
            self._colours.append((max(0, len(self.shown) - 1), colour))
        self.coloured = len(self.shown)
        self._colour_line = line if _RANGE.search(line) else b""

    def _read_banner(self, line: bytes) -> None:
        if line.startswith(b"Input #0"):
            self.opened = True
        elif b"matches no streams" in line:
            self.no_video_stream = True
        elif found := _DURATION.match(line):
            hours, minutes, seconds = (float(part) for part in found.groups())
            self.duration = round(hours * 3600 + minutes * 60 + seconds, 3)
        elif self.fps is None and (found := _FPS.match(line)):
            self.fps = float(found[1]) * (1000 if found[2] else 1) or None

    def colour(self, number: int) -> Colour:
        """Return the colour of a frame.

        Raises:
            ValueError: the log does not report it.
        """
        if not self._colours:
            raise ValueError("ffmpeg did not report the colour space")
        return next(
            (colour for first, colour in reversed(self._colours) if first <= number),
            self._colours[0][1],
        )

    def changes_colour(self) -> bool:
        """Whether not all frames are of one colour."""
        return len(self._colours) > 1

    def damage(self) -> str | None:
        """Return a sign that part of the video does not decode, or None."""
        return min(self._damages).decode("ascii") if self._damages else None

    def failure(self, path: Path, inside: Inside = None) -> str:
        """Return an error message without this machine's addresses and paths; empty if none.

        It is the first of one of ffmpeg's parts, preferably of one that reads: errors in the parts
        that write only follow from it.
        """
        if not self._faults:
            return ""
        follow = (b"[vost", b"[out", b"[fc", b"[af", b"[vf")
        speaker = min(self._faults, key=lambda part: (part.startswith(follow), part))
        text = self._faults[speaker].decode("utf-8", "replace")
        if "not on whitelist" in text:
            return "not a supported video format; playlists are not followed"
        for name in (local_url(path, inside), str(path.absolute())):
            text = text.replace(name, path.name)
        return " ".join(re.sub(r" @ 0x[0-9a-f]+", "", text).split())[:300]


def _speaker(line: bytes) -> bytes:
    """Return the part of ffmpeg that wrote the line, for example ``[h264``."""
    return line.partition(b" ")[0] if line.startswith(b"[") else b"~"


# Containers and raw streams of video. No formats that only name other files or addresses: hls,
# dash, concat, sdp and image2 disguised as a video must not be followed.
CONTAINERS = (
    *("mov", "avi", "matroska", "mpeg", "mpegts", "mpegvideo", "flv", "asf", "ogg", "rm", "dv"),
    *("mxf", "nut", "ivf", "obu", "h264", "hevc", "m4v", "gif", "wtv"),
)
_MAX_RATIO = 64  # of a picture's sides; a file may claim any shape for its pixels
_BACK_SECONDS = 1.0  # by which reordered frames may go back
_MARKER = b"FRAME\n"  # before each picture of YUV4MPEG2
CUT_SHORT = ("timeout", "crashed")  # kinds of failure that may pass, whatever the video


class DecodeError(Exception):
    """A video that cannot be stored; ``kind`` as in :class:`shards.format.Exclusion`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return DecodeError, (self.kind, self.message)


class Frame(NamedTuple):
    """One decoded picture."""

    time: float  # seconds from the video's start
    planes: NDArray[np.uint8]  # Y (H, W), then U and V (H/2, W/2), flat
    colour: Colour = Colour()


_INPUT = "file:"  # stands for the file: ffmpeg-python takes no names that are not UTF-8


def pictures(protocols: str = "file", **options: Any) -> Any:
    """Return the ffmpeg-python stream of a file's pictures as they decode, turned upright.

    Args:
        protocols: by which the file is opened.
        options: more options of ffmpeg's input.
    """
    source = ffmpeg.input(
        _INPUT,
        protocol_whitelist=protocols,
        format_whitelist=",".join(CONTAINERS),
        max_pixels=max_pixels(),
        # One thread per video: the workers fill the cores, and damaged streams decode the same
        # way every time.
        threads=1,
        **options,
    )
    return source["V:0"]  # V: no cover art


def protocols(inside: Inside) -> str:
    """Return the protocols that ffmpeg may use for a file, or for a part of one."""
    return "file" if inside is None else "file,subfile"


def scaled(stream: Any, short_edge: int) -> Any:
    """Return the stream with square pixels, in 4:2:0, scaled."""
    width, height = scaled_size(short_edge)
    # bitexact: the same on every processor
    flags = "bicubic+accurate_rnd+bitexact"
    return (
        stream.filter("scale", w=width, h=height, flags=flags)
        .filter("setsar", "1")
        .filter("format", "yuv420p")
    )


def _told(stream: Any) -> Any:
    """Return the stream with a filter that logs a line per frame, and leaves it without colour.

    Where colours change within a file, ffmpeg 7 and later convert all frames to the first one's.
    """
    # Side data may contain anything, of any length, and showinfo would print it.
    told = stream.filter("sidedata", mode="delete").filter("showinfo", checksum=0)
    return told.filter("setparams", range="unknown", colorspace="unknown")


def scaled_size(short_edge: int) -> tuple[str, str]:
    """Return width and height as expressions of the scale filter.

    Autorotation happens before the filters. `sar` makes pixels square. Videos are never enlarged:
    views are cropped and resized later, and each interpolation blurs. Sides are even for 4:2:0;
    halves round down so that an odd side loses a line rather than gaining one.
    """
    scale = f"min(1,{short_edge}/min(iw*sar,ih))"
    return f"max(2,2*ceil(iw*sar*{scale}/2-0.5))", f"max(2,2*ceil(ih*{scale}/2-0.5))"


def output_argv(stream: Any, binary: str, path: Path, inside: Inside = None) -> list[str]:
    """Return the whole command of an ffmpeg-python output stream, with the options of all runs."""
    quiet = ("-nostdin", "-hide_banner", "-nostats", "-filter_complex_threads", "1")
    words = [str(word) for word in stream.global_args(*quiet).compile(cmd=binary)]
    return [local_url(path, inside) if word == _INPUT else word for word in words]


def decode_argv(
    path: Path,
    short_edge: int,
    binary: str,
    only: Sequence[int] | None = None,
    span: tuple[float, float] | None = None,
    keyframes: bool = False,
    inside: Inside = None,
) -> list[str]:
    """Return the command that writes frames of ``path`` as YUV4MPEG2 and their times to its log.

    Args:
        only: numbers of the frames to write, increasing; the log still has the times of all.
        span: decode these seconds only; times count from the beginning of the file all the same.
        keyframes: decode key frames only.
        inside: where in the file the video lies.
    """
    options: dict[str, Any] = {"protocols": protocols(inside)}
    more: tuple[str, ...] = ()
    options |= {"skip_frame": "nokey"} if keyframes else {}
    if span is not None:
        start = span[0]
        options |= {"ss": f"{start:.6f}"} if start else {}
        more = ("-copyts", "-start_at_zero")  # the times of all frames as without a seek
    source = pictures(**options)
    if span is not None and span[1] < math.inf:
        # Not the option -t: after a change of size or colour, ffmpeg counts it from there.
        source = source.filter("trim", end=f"{span[1]:.6f}")
    if only is None:
        stream = _told(scaled(source, short_edge))
    else:
        wanted = "+".join(f"eq(n,{number})" for number in only)
        stream = scaled(_told(source).filter("select", wanted), short_edge)
    output = stream.output(
        "pipe:1", format="yuv4mpegpipe", strict=-1, fps_mode="passthrough", filter_threads=1
    )
    return output_argv(output.global_args(*more), binary, path, inside)


class WrongForecast(Exception):
    """The requested frames may not be the right ones: all frames have to be decoded."""


class Decoding:
    """The frames of one video as they are decoded; the attributes fill in meanwhile.

    Attributes:
        width, height: px, of the frames yielded; known from the first frame on.
        source_fps, source_duration: according to the container; None if unknown.
        times: seconds of the frames decoded so far, not decreasing; at the end, of all.
        strays: numbers of frames from where time goes back by more than a second, as after a clock
            that began anew, to where it is again what it was.
        damage: ffmpeg's message about a packet or frame that does not decode, if any; known
            at the end.
    """

    def __init__(
        self,
        stream: FfmpegStream,
        path: Path,
        only: Sequence[int] | None = None,
        inside: Inside = None,
    ) -> None:
        self.width = self.height = 0
        self.source_fps: float | None = None
        self.source_duration: float | None = None
        self.times: list[float] = []
        self.strays: set[int] = set()
        self._back = False  # whether the last one was a stray
        self.damage: str | None = None
        self._only = only
        self._stream = stream
        self._place = path, inside
        self._log = FfmpegLog()

    def __iter__(self) -> Iterator[Frame]:
        """Yield every frame that decodes (or those requested), in time order.

        Raises:
            DecodeError: no frame decodes, or ffmpeg gave up.
            WrongForecast: only some frames were requested, and their colour or size is in doubt.
        """
        try:
            yield from self._frames()
        except EOFError as error:
            # The pipe ends early only if ffmpeg exits; how it exited says more than the pipe.
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
            number = next(numbers, None)
            if number is None:
                raise WrongForecast
            # A frame's log lines are written before the frame, so they are already there.
            if self._log.coloured <= number:
                self._read_log()
            if len(self.times) <= number:
                raise ValueError("ffmpeg did not report a frame's time")
            yield Frame(self.times[number], data[len(_MARKER) :], self._log.colour(number))

    def _read_log(self) -> None:
        self._log.update(self._stream.read_log())
        self.source_fps, self.source_duration = self._log.fps, self._log.duration
        if self._only is not None and self._log.changes_colour():
            raise WrongForecast  # ffmpeg has begun to count anew
        latest = self.times[-1] if self.times else 0.0
        for shown in self._log.shown[len(self.times) :]:
            self._require_same_picture(shown)
            guess = latest + 1.0 / (self.source_fps or 25.0) if self.times else 0.0
            least = latest - (0.0 if self._back else _BACK_SECONDS)
            self._back = bool(self.times) and shown.time <= least
            if self._back:
                self.strays.add(len(self.times))
            # Times in damaged files may go back; frames are stored in the order they are shown.
            latest = max(latest, guess if math.isnan(shown.time) else shown.time)
            self.times.append(latest)

    def _require_same_picture(self, shown: Shown) -> None:
        if self._only is not None:
            # These are the pictures before scaling: the results must have the same format, and only
            # the size may be converted.
            if shown.picture != self._log.shown[0].picture or shown.picture[0] != b"yuv420p":
                raise WrongForecast
        elif self.width and shown.size != (self.width, self.height):
            raise DecodeError(
                "unreadable",
                f"the picture changes from {self.width}x{self.height} "
                f"to {shown.size[0]}x{shown.size[1]} in the middle",
            )

    def _raise_failure(self, reading: str | None, killed: bool = False) -> None:
        # A stuck ffmpeg is killed at the time limit.
        code = self._stream.wait()
        self._read_log()
        if self._stream.timed_out:
            raise DecodeError("timeout", "ffmpeg ran past the time limit and was killed")
        if code < 0 and not killed:
            raise DecodeError("crashed", f"ffmpeg was killed by signal {-code}")
        message = self._log.failure(*self._place)
        if self._log.no_video_stream:
            raise DecodeError("no-video-stream", "it has no video stream")
        if code != 0 or reading is not None:
            opened = self._log.opened and not self.times and reading is None
            kind = "zero-frames" if opened else "unreadable"
            if killed and reading is not None:
                message = reading  # why it was killed; it may have complained of something else
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
    span: tuple[float, float] | None = None,
    keyframes: bool = False,
    inside: Inside = None,
) -> Iterator[Decoding]:
    """Decode ``path`` once; ffmpeg has exited when the block ends.

    Args:
        only: numbers of the frames to scale and yield, increasing; all are decoded.
        span: first and last second to decode; times count from the beginning all the same.
        keyframes: decode key frames only.
        inside: where in the file the video lies.

    Raises:
        DecodeError: the file does not exist, or from the iteration, see :class:`Decoding`.
    """
    try:
        status = path.stat()
    except OSError as error:
        kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise DecodeError(kind, error.strerror or "cannot be read") from error
    size = inside[1] if inside is not None else status.st_size
    if stat.S_ISREG(status.st_mode) and size == 0:
        raise DecodeError("unreadable", "the file is empty")
    argv = decode_argv(path, short_edge, binary, only, span, keyframes, inside)
    with FfmpegStream(argv, timeout_seconds, reads=path) as stream:
        yield Decoding(stream, path, only, inside)


def _picture_size(header: bytes) -> tuple[int, int]:
    words = header.split()
    fields = {word[:1]: word[1:] for word in words[1:]}
    if words[:1] != [b"YUV4MPEG2"] or not {b"W", b"H"} <= set(fields):
        raise ValueError("ffmpeg's output cannot be read")
    width, height = int(fields[b"W"]), int(fields[b"H"])
    short, long = sorted((width, height))
    if width % 2 or height % 2 or not 0 < long <= _MAX_RATIO * short:
        raise ValueError(f"pictures of {width}x{height} cannot be stored")
    require_pixels(width, height)
    return width, height
