"""What ffmpeg's log tells of a decoding: times, colour, complaints.

ffmpeg's parts are threads, and write their lines in pieces: those of one part come in order, but
others may stand between and even within them. Only a piece is whole. So nothing here asks how a
line begins or ends, and of many complaints the one that is told is the same in every run.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from pipelines._ffmpeg import local_url

_TIME_BASE = re.compile(rb"config in time_base: (\d+)/(\d+)")
_SHOWN = re.compile(rb"\bn: *\d+ pts: *(-?\d+|NOPTS) .* fmt:(\S+) .*sar:(\d+/\d+) s:(\d+)x(\d+) i:")
_RANGE = re.compile(rb"color_range:(pc|jpeg)?")
# Names that matter: all others are taken for BT.601.
_MATRIX = re.compile(rb"color_space:(bt709|fcc|smpte240m|bt2020nc|bt2020c)?")
_DURATION = re.compile(rb"  Duration: (\d+):(\d+):(\d+(?:\.\d+)?)")
_FPS = re.compile(rb"  Stream #0:\d+.*: Video: .*?([\d.]+)(k?) fps")
_METADATA = re.compile(rb" {4,}[^:]{1,16}: ")  # may hold any words
_FAULT = re.compile(
    rb"error|invalid|not found|no such|could not|cannot|unsupported|denied|whitelist|truncat", re.I
)
# The verdicts on packets and frames, the same for all codecs: refused, or patched up.
_DAMAGE = re.compile(
    rb"Error submitting packet to decoder|Error while decoding stream|Decoding error|"
    rb"corrupt decoded frame|Packet corrupt|partial file"
)


# One of these is in everything that _FAULT or _DAMAGE finds (in lower case or as written).
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


class Shown(NamedTuple):
    """A frame that has passed the filters."""

    time: float  # seconds; nan when the stream has none
    size: tuple[int, int]  # px
    picture: tuple[bytes, ...]  # pixel format, sample aspect ratio, width, height


class FfmpegLog:
    """Reads the log in pieces while it grows.

    Attributes:
        shown: the frames so far.
        fps, duration: as the container says, in frames a second and seconds; None if it does not.
        opened: whether the container could be opened.
        no_video_stream: whether it is known to hold none.
    """

    def __init__(self) -> None:
        self.shown: list[Shown] = []
        self.fps: float | None = None
        self.duration: float | None = None
        self.opened = False
        self.no_video_stream = False
        self._matrix: str | None = None
        self._full_range: bool | None = None
        self._time_base = 0.0
        self._faults: dict[bytes, bytes] = {}
        self._damages: set[bytes] = set()
        self._rest = b""

    def update(self, piece: bytes) -> None:
        """Take in what has been written since the last call."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        # A search of the whole piece for parts of words costs little; of every line, much.
        complaints = any(part in piece or part in lines[0] for part in _COMPLAINTS) if lines else 0
        for line in lines:
            if self._matrix is not None and not complaints:
                # As good as all lines: a frame's, or its colour that is known by now.
                if b"pts_time" in line:
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
        if self._matrix is None and self.shown:
            if found := _RANGE.search(line):
                self._full_range = found[1] is not None
            if found := _MATRIX.search(line):
                self._matrix = (found[1] or b"unknown").decode("ascii")

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

    def colour(self) -> tuple[str, bool]:
        """Matrix (ffmpeg's name) and whether the range is full, of the first frame.

        Raises:
            ValueError: the log does not tell.
        """
        if self._matrix is None or self._full_range is None:
            raise ValueError("ffmpeg did not tell the colour space")
        return self._matrix, self._full_range

    def damage(self) -> str | None:
        """A sign that not all of the video decodes, if there is any."""
        return min(self._damages).decode("ascii") if self._damages else None

    def failure(self, path: Path) -> str:
        """A complaint, without addresses and places of this machine; empty when there is none.

        It is the first of one of ffmpeg's parts, and of one that reads, if any of those complains:
        the parts that write only follow.
        """
        if not self._faults:
            return ""
        follow = (b"[vost", b"[out", b"[fc", b"[af", b"[vf")
        speaker = min(self._faults, key=lambda part: (part.startswith(follow), part))
        text = self._faults[speaker].decode("utf-8", "replace")
        if "not on whitelist" in text:
            return "it is not in a format of videos; playlists are never followed"
        text = text.replace(local_url(path), path.name).replace(str(path.absolute()), path.name)
        return " ".join(re.sub(r" @ 0x[0-9a-f]+", "", text).split())[:300]


def _speaker(line: bytes) -> bytes:
    """The part of ffmpeg that wrote the line, for example ``[h264``."""
    return line.partition(b" ")[0] if line.startswith(b"[") else b"~"
