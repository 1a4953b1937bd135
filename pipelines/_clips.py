"""Clips of recordings: where they lie, and many decoded in one pass.

A recording may take hours. Its clips are planned from its duration, before anything is decoded, so
that they can be spread over workers and shards like videos. Some minutes of neighbouring clips are
decoded together (:func:`pipelines._plan.pieces`), beginning with a seek.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines._adapter import Video, VideoSet, keyed
from pipelines._config import PrepareConfig
from pipelines._decode import (
    CONTAINERS,
    CUT_SHORT,
    DecodeError,
    Decoding,
    FfmpegLog,
    Frame,
    Inside,
    decoding,
    protocols,
)
from pipelines._ffmpeg import FfmpegStream, local_url, require_going
from pipelines._plan import Chooser, ShardPlan, described
from pipelines._remote import Spool, outline
from shards.format import Exclusion, VideoRecord

Encode = Callable[[Frame], bytes]
Stored = tuple[VideoRecord, list[bytes]]
_HEADER_SECONDS = 60.0
_READING_SECONDS = 600.0  # without decoding
_MOST_CLIPS = 1_000_000  # of a recording; a header may claim any length
# Seconds before the first clip at which decoding begins. Some containers (MPEG-TS, MPEG-PS) are
# sought to the next key frame, not to the one before.
_MARGINS = (0.0, 30.0)
_BEFORE_KEY_SECONDS = 5.0  # where that key frame is known
_BUDGET_BYTES = 48 << 20  # of frames that wait for the end of their clip
# ffmpeg's scdet: a cut scores 8 to 14 or more, and its default is 10.
_CUT_SCORE = 10.0
_PROGRESS = re.compile(rb"out_time_us=(\d+)")
# ffmpeg's framecrc: number of the stream, dts, pts; key frames have no flags.
_TIME_BASE = re.compile(rb"#tb 0: (\d+)/(\d+)")
_PACKET = re.compile(rb"0, *(-?\d+), *(-?\d+),")
_NO_TIME = -(1 << 63)
_MOST_PACKETS = 20_000_000  # a week at 30 a second
_NEAR_SECONDS = 1.0  # by which a container's times may differ from those of the decoded frames
_MOST_MINUTES = 24 * 60  # for which the time limit is granted: a list may name any end
_MOST_READINGS = 3  # of a recording whose ffmpeg was killed from outside


def with_clips(
    videos: VideoSet, config: PrepareConfig, binary: str, workers: int, spool: Spool
) -> VideoSet:
    """Return the set with clips in place of its recordings.

    A recording of unknown length becomes a single clip, which is most likely to fail. One whose
    length cannot be read to the end is excluded: another time it may be, and give other clips.

    Args:
        workers: headers read at once.
        spool: where remote recordings are fetched to, if their headers do not suffice.
    """
    assert config.clip_seconds is not None
    stride = config.clip_stride or config.clip_seconds
    most_seconds = config.clip_seconds + _MOST_CLIPS * stride
    files = {(video.path, video.inside): video for video in videos.videos}

    def length(video: Video) -> float | DecodeError | None:
        for attempt in range(1, _MOST_READINGS + 1):
            try:
                found = _duration(video, binary, config.timeout, spool)
                return found if found <= most_seconds else None
            except DecodeError as error:
                if error.kind not in CUT_SHORT:
                    return None
                if error.kind == "timeout" or attempt == _MOST_READINGS:
                    return error
        raise AssertionError("unreachable")

    with ThreadPoolExecutor(workers) as pool:
        lengths = dict(zip(files, pool.map(length, files.values()), strict=True))
    clips: list[Video] = []
    parts = any(video.span is not None for video in videos.videos)  # rows of a list may overlap
    labels: dict[tuple[str, object, tuple[float, float]], str | None] = {}
    excluded = list(videos.excluded)
    for video in videos.videos:
        first, last = video.span or (0.0, math.inf)
        found = lengths[video.path, video.inside]
        if isinstance(found, DecodeError):
            excluded.append(
                Exclusion(source=video.shown, kind=found.kind, message=f"length: {found.message}")
            )
            continue
        spans = [(first, last)]
        if found is not None and first < found:
            spans = clip_spans(first, min(last, found), config.clip_seconds, stride)
        group = video.group or video.source
        for span in spans:
            clip = replace(video, key="", group=group, span=span)
            same = (video.source, video.inside, span)
            if same in labels:
                message = "a clip of another row has these seconds"
                if labels[same] != video.label_name:
                    message += ", and another label"
                excluded.append(Exclusion(source=clip.shown, kind="duplicate", message=message))
                continue
            clips.append(clip)
            if parts:
                labels[same] = video.label_name
    return replace(videos, videos=keyed(clips), excluded=excluded)


def clip_spans(
    first: float, last: float, seconds: float, stride: float
) -> list[tuple[float, float]]:
    """Divide the seconds ``first`` to ``last`` into clips.

    The rest at the end is a clip if it is at least half as long as the others; a recording that is
    shorter than a clip is one.
    """
    spans = []
    for number in range(max(1, math.ceil((last - first) / stride))):
        start = round(first + number * stride, 6)
        end = round(min(start + seconds, last), 6)
        if number == 0 or end - start >= seconds / 2:
            spans.append((start, end))
        if end >= last:
            break
    return spans


def _duration(video: Video, binary: str, timeout_seconds: float, spool: Spool) -> float:
    if video.address is not None:
        with suppress(DecodeError), outline(video) as headers:
            found = _claimed_duration(headers.path, binary, headers.inside)
            if found is not None:
                return found
    with spool.at_hand(video) as here:
        return duration_of(here.path, binary, here.inside, timeout_seconds)


def duration_of(
    path: Path, binary: str, inside: Inside = None, timeout_seconds: float | None = None
) -> float:
    """Return a video's seconds: as its header says, or after reading it where that is silent.

    Args:
        inside: where in the file the video lies.
        timeout_seconds: for reading it; at least ten minutes.

    Raises:
        DecodeError: it cannot be opened, holds no video, or takes too long to read.
    """
    claimed = _claimed_duration(path, binary, inside)
    if claimed is not None:
        return claimed
    # Recordings of live streams often lack it.
    copied = ("-map", "0:V:0", "-c", "copy", "-f", "null", "-progress", "pipe:1", "-")
    said = b""
    patience = None if timeout_seconds is None else max(_READING_SECONDS, timeout_seconds)
    argv = _opening(path, binary, inside)
    with FfmpegStream([*argv, *copied], patience, reads=path) as stream:
        while line := stream.read_line(1 << 16):
            said = line if line.startswith(b"out_time_us=") else said
        _require_whole(stream, patience)
    found = _PROGRESS.match(said)
    if found is None:
        raise DecodeError("no-video-stream", "it has no video stream of known length")
    return int(found[1]) / 1e6


def _claimed_duration(path: Path, binary: str, inside: Inside) -> float | None:
    log = FfmpegLog()
    with FfmpegStream(_opening(path, binary, inside), _HEADER_SECONDS, reads=path) as stream:
        _require_whole(stream, _HEADER_SECONDS)  # it fails all the same: no output is given
        log.update(stream.read_log() + b"\n")
    if log.duration is None and not log.opened:
        raise DecodeError("unreadable", log.failure(path, inside) or "its header cannot be read")
    return log.duration


def _require_whole(stream: FfmpegStream, patience: float | None) -> None:
    """Wait for the end of a reading; what was cut short says nothing about the file.

    Raises:
        Interrupted: the run is to stop.
        DecodeError: the reading took too long (``timeout``), or was killed (``crashed``).
    """
    code = stream.wait()
    require_going()
    if stream.timed_out:
        raise DecodeError("timeout", f"reading it took more than {patience or 0.0:.0f} s")
    if code < 0:
        raise DecodeError("crashed", f"ffmpeg was killed by signal {-code}")


def _opening(path: Path, binary: str, inside: Inside) -> list[str]:
    whitelists = ["-protocol_whitelist", protocols(inside)]
    whitelists += ["-format_whitelist", ",".join(CONTAINERS)]
    return [binary, "-nostdin", "-hide_banner", *whitelists, "-i", local_url(path, inside)]


class CutDetector:
    """Tells scene cuts as ffmpeg's scdet does: by a jump in how much the picture changes."""

    def __init__(self) -> None:
        self._before: NDArray[np.uint8] | None = None
        self._change = 0.0

    def is_cut(self, luma: NDArray[np.uint8]) -> bool:
        """Whether a scene begins with this picture; pictures come in order, all of one size."""
        before, self._before = self._before, luma
        if before is None:
            return False
        apart = np.maximum(luma, before) - np.minimum(luma, before)
        change = float(apart.sum(dtype=np.uint64)) * 100 / (256 * luma.size)
        last, self._change = self._change, change
        return min(change, abs(change - last)) >= _CUT_SCORE


@dataclass
class _Part:
    """A stretch of a clip without a cut."""

    start: float  # seconds from the beginning of the recording, of the first frame
    end: float  # of the last
    decoded: int = 0
    times: list[float] = field(default_factory=list)  # of the chosen frames, from start
    frames: list[bytes] = field(default_factory=list)  # JPEG

    def take(self, chosen: Sequence[Frame], encode: Callable[[Frame], bytes]) -> None:
        for frame in chosen:
            self.times.append(round(frame.time - self.start, 6))
            self.frames.append(encode(frame))


class _Clip:
    """Collects the frames of one clip while its recording is decoded.

    What it keeps depends on the frames of the clip alone, not on those before it.
    """

    def __init__(self, video: Video, plan: ShardPlan) -> None:
        assert video.span is not None
        self.start, self.end = video.span
        self._video = video
        self._plan = plan
        self._detector = CutDetector() if plan.cut_scenes else None
        self._chooser: Chooser | None = None
        self._part: _Part | None = None
        self._longest: _Part | None = None

    def offer(self, frame: Frame, luma: NDArray[np.uint8], encode: Encode) -> None:
        """Take a frame of the clip."""
        if self._detector is not None and self._detector.is_cut(luma):
            self._finish_part(encode)
        if self._part is None or self._chooser is None:
            self._chooser = self._plan.choice.chooser(_BUDGET_BYTES)
            self._part = _Part(frame.time, frame.time)
        self._part.take(self._chooser.offer(frame), encode)
        self._part.end = frame.time
        self._part.decoded += 1

    def _finish_part(self, encode: Encode) -> None:
        part, chooser, longest = self._part, self._chooser, self._longest
        self._part = self._chooser = None
        if part is None or chooser is None:
            return
        if longest is None or part.end - part.start > longest.end - longest.start:
            part.take(chooser.finish(), encode)
            self._longest = part

    def finish(self, decoded: Decoding, encode: Encode) -> Stored | DecodeError:
        """Return the record and the frames, or why there are too few."""
        self._finish_part(encode)
        part = self._longest
        if part is None:
            return DecodeError("zero-frames", "no frame could be decoded")
        if len(part.frames) < self._plan.min_frames:
            return DecodeError(
                "too-short", f"{len(part.frames)} frames, fewer than {self._plan.min_frames}"
            )
        known = described(self._video, self._plan.dataset)
        known |= {"start": round(part.start, 6), "duration": round(part.end - part.start, 6)}
        record = VideoRecord(
            **known,
            width=decoded.width,
            height=decoded.height,
            frame_times=part.times,
            source_fps=decoded.source_fps,
            source_frames=part.decoded,
            source_duration=decoded.source_duration,
        )
        return record, part.frames


def decode_clips(
    piece: Sequence[Video],
    wanted: Sequence[Video],
    plan: ShardPlan,
    encoder: Callable[[Decoding], Encode],
    again: bool = False,
) -> list[Stored | DecodeError]:
    """Decode a piece of a recording in one pass; return the outcome of every wanted clip, in order.

    Args:
        piece: the neighbouring clips that decide where decoding begins and ends.
        wanted: some of them.
        encoder: given the pass, returns what makes JPEGs of its frames.
        again: they have failed as part of a larger piece: the recording is not decoded from its
            beginning once more.

    Raises:
        DecodeError: the piece as a whole cannot be decoded.
    """
    spans = [video.span for video in piece if video.span is not None]
    start, end = spans[0][0], max(end for _, end in spans)

    def attempt(
        margin: float, first: float, sure: bool = True
    ) -> list[Stored | DecodeError] | None:
        begin = max(0.0, start - margin)
        try:
            return _pass(piece[0], wanted, plan, encoder, begin=begin, first=first, end=end)
        except DecodeError as error:
            # Near the end there may be no other key frame. And what is wrong may lie before the
            # key frame that the clips need, where it is not sure which that is.
            if begin and (error.kind == "zero-frames" or not (sure or error.kind in CUT_SHORT)):
                return None
            raise

    for margin in _MARGINS:
        found = attempt(margin, start, sure=margin == 0.0)
        if found is not None:
            return found
    # Was it sought too far, or is there no frame at the start? Decoding would tell too slowly.
    first = start
    packets = packets_of(piece[0], plan.binary, plan.timeout_seconds)
    if packets is not None:
        times = packets.keys if plan.keyframes else packets.times
        if not np.any((times >= start - _NEAR_SECONDS) & (times < end + _NEAR_SECONDS)):
            return [_nothing_there(times, start)] * len(wanted)
        first = float(next(iter(times[times >= start]), start))
        before = packets.keys[packets.keys <= first]
        if len(before):
            margin = max(0.0, start - float(before[-1]) + _BEFORE_KEY_SECONDS)
            found = attempt(margin, first)
            if found is not None:
                return found
    if again:
        return [NothingThere("zero-frames", "no frame could be decoded")] * len(wanted)
    found = attempt(math.inf, first)
    assert found is not None, "nothing comes before the beginning"
    return found


class NothingThere(DecodeError):
    """No frame is shown in the seconds of these clips; decoding them singly finds none either."""


def _nothing_there(times: NDArray[np.float64], start: float) -> NothingThere:
    if not len(times):
        said = "no frame could be decoded"
    elif times[-1] < start:
        said = f"the last frame of the recording is at {times[-1]:.1f} s"
    else:
        said = f"no frame is shown there; the next is at {times[times >= start][0]:.1f} s"
    return NothingThere("zero-frames", said)


class Packets(NamedTuple):
    """Seconds at which frames are shown, sorted."""

    times: NDArray[np.float64]  # (F,)
    keys: NDArray[np.float64]  # (K,) of the key frames among them


def packets_of(video: Video, binary: str, timeout_seconds: float) -> Packets | None:
    """Return the times of the frames, after reading the file without decoding it.

    Args:
        timeout_seconds: for reading; at least ten minutes.

    Returns:
        None if that takes too long, or the file has no times.

    Raises:
        DecodeError: ffmpeg was killed, or there are more frames than a recording has.
    """
    try:
        status = video.path.stat()
    except OSError as error:
        raise DecodeError("unreadable", error.strerror or "cannot be read") from error
    version = (status.st_size, status.st_mtime_ns)
    patience = max(_READING_SECONDS, timeout_seconds)
    return _packets(video.path, video.inside, binary, patience, version)


@lru_cache(maxsize=2)  # for the pieces of a recording
def _packets(
    path: Path, inside: Inside, binary: str, patience: float, version: tuple[int, int]
) -> Packets | None:
    copied = ("-map", "0:V:0", "-c", "copy", "-copyts", "-start_at_zero", "-f", "framecrc")
    times, keys = array("d"), array("d")
    scale = math.nan
    untimed = 0
    buffer, rest = bytearray(1 << 16), b""
    argv = _opening(path, binary, inside)
    with FfmpegStream([*argv, *copied, "pipe:1"], patience, reads=path) as stream:
        while size := stream.read_into(memoryview(buffer)):
            *lines, rest = (rest + buffer[:size]).split(b"\n")
            for line in lines:
                if found := _PACKET.match(line):
                    shown = [tick for tick in map(int, found.groups()) if tick != _NO_TIME]
                    if not shown:
                        untimed += 1
                        continue
                    times.append(shown[-1] * scale)
                    if b"F=" not in line:
                        keys.append(times[-1])
                elif found := _TIME_BASE.match(line):
                    scale = int(found[1]) / int(found[2])
            if len(times) > _MOST_PACKETS:
                raise DecodeError("unreadable", f"it has more than {_MOST_PACKETS:,} frames")
        try:
            _require_whole(stream, patience)
        except DecodeError as error:
            if error.kind != "timeout":
                raise
            return None
    if untimed > len(times):
        return None
    return Packets(np.sort(np.frombuffer(times)), np.sort(np.frombuffer(keys)))


def _pass(
    video: Video,
    wanted: Sequence[Video],
    plan: ShardPlan,
    encoder: Callable[[Decoding], Encode],
    *,
    begin: float,
    first: float,
    end: float,
) -> list[Stored | DecodeError] | None:
    """Decode from ``begin``; None if the first frame to come lies after ``first``."""
    assert plan.short_edge is not None, "only folders of frames are stored as they are"
    with decoding(
        video.path,
        short_edge=plan.short_edge,
        timeout_seconds=plan.timeout_seconds * _minutes(begin, end),
        binary=plan.binary,
        span=(begin, end),
        keyframes=plan.keyframes,
        inside=video.inside,
    ) as decoded:
        encode = encoder(decoded)
        outcomes: dict[int, Stored | DecodeError] = {}
        upcoming = deque(enumerate(_Clip(video, plan) for video in wanted))  # by their start
        active: dict[int, _Clip] = {}
        for count, frame in enumerate(decoded):
            if not count and begin and frame.time > first + 1.5 / (decoded.source_fps or 25.0):
                return None
            if count in decoded.strays:
                continue  # of no known second
            while upcoming and upcoming[0][1].start <= frame.time:
                number, clip = upcoming.popleft()
                active[number] = clip
            for number in [n for n, clip in active.items() if clip.end <= frame.time]:
                outcomes[number] = active.pop(number).finish(decoded, encode)
            luma = frame.planes[: decoded.width * decoded.height]
            for clip in active.values():
                clip.offer(frame, luma, encode)
        for number, clip in [*active.items(), *upcoming]:
            outcomes[number] = clip.finish(decoded, encode)
    if decoded.damage is not None and not plan.keep_damaged:
        raise DecodeError("damaged", decoded.damage)
    return [outcomes[number] for number in range(len(wanted))]


def _minutes(begin: float, end: float) -> int:
    """Return how often the time limit is granted: for every minute that has begun."""
    return min(max(1, math.ceil((end - begin) / 60)), _MOST_MINUTES) if end < math.inf else 1
