"""Clips of recordings: where they lie, and many decoded in one pass.

A recording may take hours. Its clips are planned from its duration, before anything is decoded, so
that they can be spread over workers and shards like videos. Some minutes of neighbouring clips are
decoded together (:func:`pipelines._plan.pieces`), beginning with a seek.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines._adapter import Video, VideoSet, keyed
from pipelines._config import PrepareConfig
from pipelines._decode import (
    CONTAINERS,
    DecodeError,
    Decoding,
    FfmpegLog,
    Frame,
    Inside,
    decoding,
    protocols,
)
from pipelines._ffmpeg import FfmpegStream, local_url
from pipelines._plan import Chooser, ShardPlan, described
from shards.format import Exclusion, VideoRecord

_HEADER_SECONDS = 60.0
_BUDGET_BYTES = 48 << 20  # of frames that wait for the end of their clip
# ffmpeg's scdet: a cut scores 8 to 14 or more, and its default is 10.
_CUT_SCORE = 10.0
_PROGRESS = re.compile(rb"out_time_us=(\d+)")


def with_clips(videos: VideoSet, config: PrepareConfig, binary: str, workers: int) -> VideoSet:
    """Return the set with clips in place of its recordings; those of unknown length are excluded.

    Args:
        workers: headers read at once.
    """
    assert config.clip_seconds is not None
    stride = config.clip_stride or config.clip_seconds
    clips: list[Video] = []
    excluded = list(videos.excluded)

    def length(video: Video) -> float | DecodeError:
        try:
            return duration_of(video.path, binary, video.inside)
        except DecodeError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        for video, found in zip(videos.videos, pool.map(length, videos.videos), strict=True):
            if isinstance(found, DecodeError):
                row = Exclusion(source=video.shown, kind=found.kind, message=found.message)
                excluded.append(row)
                continue
            first, last = video.span or (0.0, math.inf)
            group = video.group or video.source
            spans = clip_spans(first, min(last, found), config.clip_seconds, stride)
            clips += [replace(video, key="", group=group, span=span) for span in spans]
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


def duration_of(path: Path, binary: str, inside: Inside = None) -> float:
    """Return a video's seconds: as its header says, or after reading it where that is silent.

    Raises:
        DecodeError: it cannot be opened, or holds no video.
    """
    argv = [binary, "-nostdin", "-hide_banner", "-protocol_whitelist", protocols(inside)]
    argv += ["-format_whitelist", ",".join(CONTAINERS), "-i", local_url(path, inside)]
    log = FfmpegLog()
    with FfmpegStream(argv, _HEADER_SECONDS, reads=path) as stream:
        stream.wait()  # fails: no output is given
        log.update(stream.read_log() + b"\n")
    if log.duration is not None:
        return log.duration
    if not log.opened:
        raise DecodeError("unreadable", log.failure(path, inside) or "its header cannot be read")
    # Recordings of live streams often lack it.
    copied = ("-map", "0:V:0", "-c", "copy", "-f", "null", "-progress", "pipe:1", "-")
    said = b""
    with FfmpegStream([*argv, *copied], None, reads=path) as stream:
        while line := stream.read_line(1 << 16):
            said = line if line.startswith(b"out_time_us=") else said
        stream.wait()
    found = _PROGRESS.match(said)
    if found is None:
        raise DecodeError("no-video-stream", "it has no video stream of known length")
    return int(found[1]) / 1e6


class CutDetector:
    """Tells scene cuts as ffmpeg's scdet does: by a jump in how much the picture changes."""

    def __init__(self) -> None:
        self._before: NDArray[np.uint8] | None = None
        self._change: float | None = None

    def is_cut(self, luma: NDArray[np.uint8]) -> bool:
        """Whether a scene begins with this picture; pictures come in order, all of one size."""
        before, self._before = self._before, luma
        if before is None:
            return False
        apart = np.maximum(luma, before) - np.minimum(luma, before)
        change = float(apart.sum(dtype=np.uint64)) * 100 / (256 * luma.size)
        last, self._change = self._change, change
        return last is not None and min(change, abs(change - last)) >= _CUT_SCORE


@dataclass
class _Part:
    """A stretch of a clip without a cut."""

    chooser: Chooser
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
    """Collects the frames of one clip while its recording is decoded."""

    def __init__(self, video: Video, plan: ShardPlan) -> None:
        assert video.span is not None
        self.video = video
        self.start, self.end = video.span
        self._plan = plan
        self._part: _Part | None = None
        self._longest: _Part | None = None

    def offer(self, frame: Frame, cut: bool, encode: Callable[[Frame], bytes]) -> None:
        """Take a frame of the clip; ``cut``: a scene begins with it."""
        if cut:
            self._finish_part(encode)
        if self._part is None:
            chooser = self._plan.choice.chooser(_BUDGET_BYTES)
            self._part = _Part(chooser, frame.time, frame.time)
        self._part.take(self._part.chooser.offer(frame), encode)
        self._part.end = frame.time
        self._part.decoded += 1

    def _finish_part(self, encode: Callable[[Frame], bytes]) -> None:
        part, self._part = self._part, None
        if part is None:
            return
        longest = self._longest
        if longest is None or part.end - part.start > longest.end - longest.start:
            part.take(part.chooser.finish(), encode)
            self._longest = part

    def finish(
        self, decoded: Decoding, encode: Callable[[Frame], bytes]
    ) -> tuple[VideoRecord, list[bytes]]:
        """Return the record and the frames.

        Raises:
            DecodeError: there are too few.
        """
        self._finish_part(encode)
        part = self._longest
        if part is None:
            raise DecodeError("zero-frames", "no frame could be decoded")
        if len(part.frames) < self._plan.min_frames:
            raise DecodeError(
                "too-short", f"{len(part.frames)} frames, fewer than {self._plan.min_frames}"
            )
        record = VideoRecord(
            **described(self.video, self._plan.dataset)
            | {"start": round(part.start, 6), "duration": round(part.end - part.start, 6)},
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
    encoder: Callable[[Decoding], Callable[[Frame], bytes]],
) -> Iterator[tuple[VideoRecord, list[bytes]] | DecodeError]:
    """Decode a piece of a recording in one pass; yield the outcome of every wanted clip, in order.

    Args:
        piece: the neighbouring clips that decide where decoding begins and ends.
        wanted: some of them.
        encoder: given the pass, returns what makes JPEGs of its frames.

    Raises:
        DecodeError: the piece as a whole cannot be decoded.
    """
    spans = [video.span for video in piece if video.span is not None]
    start, end = spans[0][0], max(end for _, end in spans)
    clips = [_Clip(video, plan) for video in wanted]
    detector = CutDetector() if plan.cut_scenes else None
    assert plan.short_edge is not None, "only folders of frames are stored as they are"
    with decoding(
        piece[0].path,
        short_edge=plan.short_edge,
        timeout_seconds=plan.timeout_seconds,
        binary=plan.binary,
        span=(start, end),
        keyframes=plan.keyframes,
        inside=piece[0].inside,
    ) as decoded:
        encode = encoder(decoded)
        finished: list[tuple[VideoRecord, list[bytes]] | DecodeError] = []

        def finish(clip: _Clip) -> None:
            try:
                finished.append(clip.finish(decoded, encode))
            except DecodeError as error:
                finished.append(error)

        waiting = list(clips)
        for frame in decoded:
            moment = frame._replace(time=frame.time + start)
            size = decoded.width * decoded.height
            cut = detector is not None and detector.is_cut(frame.planes[:size])
            while waiting and moment.time >= waiting[0].end:
                finish(waiting.pop(0))
            for clip in waiting:
                if clip.start <= moment.time < clip.end:
                    clip.offer(moment, cut, encode)
        for clip in waiting:
            finish(clip)
    if decoded.damage is not None and not plan.keep_damaged:
        raise DecodeError("damaged", decoded.damage)
    yield from finished
