"""What a plan will cost, from the headers of a few of its videos: for ``--dry-run``.

Nothing is decoded. The rates were measured on one core of a server of 2023 (benchmarks/results/
prepare.md); real ones differ by a factor of two either way, so the result says "about".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pipelines._adapter import Video, source_bytes
from pipelines._decode import CONTAINERS
from pipelines._ffmpeg import FfmpegStream, local_url
from pipelines._frames import FrameChoice
from pipelines._plan import SetPlan, ShardPlan
from shards.progress import size_text

_SAMPLE = 24
_START_SECONDS = 0.03  # ffmpeg's start and end
_DECODE_SECONDS = 0.3e-3  # a frame, and
_DECODE_SECONDS_A_PIXEL = 2.5e-9  # of the source
_ENCODE_SECONDS_A_PIXEL = 2.5e-9  # of the stored frame
_BYTES_A_PIXEL = 0.2  # of a JPEG of quality 90
_COPY_SECONDS = 0.1e-3  # a frame that passes through
_PROBE_SECONDS = 10.0

_SIZE = re.compile(rb"Video: .*?\b(\d{2,5})x(\d{2,5})\b")
_RATE = re.compile(rb"Video: .*?([\d.]+) fps")
_DURATION = re.compile(rb"Duration: (\d+):(\d+):([\d.]+)")


@dataclass(frozen=True)
class _Header:
    width: int  # px
    height: int
    frames: float
    seconds: float


def forecast(plan: SetPlan, workers: int) -> Iterable[str]:
    """Lines for people: videos, shards, and about how many bytes and how much time."""
    shard = plan.shards[0]
    videos = len(plan.videos.videos)
    names = f"{shard.tar} to {plan.shards[-1].tar}" if len(plan.shards) > 1 else shard.tar
    yield (
        f"{plan.name}: {videos} videos, {len(plan.videos.label_names)} labels, "
        f"{_frames_text(shard.choice)} -> {len(plan.shards)} shards, {names}"
    )
    costs = [cost for video in _sample(plan) if (cost := _cost(video, shard))]
    if not costs:
        yield f"{plan.name}: no header could be read, so neither bytes nor time are known"
        return
    stored, size, seconds = (
        sum(column) / len(costs) * videos for column in zip(*costs, strict=True)
    )
    yield (
        f"{plan.name}: about {stored:.0f} frames, {size_text(size)} and "
        f"{_time_text(seconds / workers)} with {workers} workers (from {len(costs)} of them)"
    )


def _frames_text(choice: FrameChoice) -> str:
    if choice.fps is not None:
        return f"{choice.fps:g} frames a second"
    return f"{choice.count} frames a video" if choice.count else "all frames"


def _time_text(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, seconds):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _sample(plan: SetPlan) -> list[Video]:
    videos = [video for shard in plan.shards for video in shard.videos]
    step = max(1, len(videos) // _SAMPLE)
    return videos[::step][:_SAMPLE]


def _probe(video: Video, binary: str) -> _Header | None:
    """What the header says; None when it says too little."""
    argv = [
        *(binary, "-nostdin", "-hide_banner", "-protocol_whitelist", "file"),
        *("-format_whitelist", ",".join(CONTAINERS)),
        *("-i", local_url(video.path)),
    ]
    with FfmpegStream(argv, _PROBE_SECONDS) as stream:
        stream.wait()  # in an error: no output is named
        log = stream.read_log()
    size, rate, clock = (pattern.search(log) for pattern in (_SIZE, _RATE, _DURATION))
    if not (size and rate and clock):
        return None
    hours, minutes, rest = (float(part) for part in clock.groups())
    seconds = hours * 3600 + minutes * 60 + rest
    return _Header(int(size[1]), int(size[2]), seconds * float(rate[1]), seconds)


def _cost(video: Video, shard: ShardPlan) -> tuple[float, float, float] | None:
    """Stored frames, their bytes, and seconds of one core; None when the header says too little."""
    if video.frames is not None:
        frames = len(list((video.path / video.frames.images).glob("*.jp*g")))
        return frames, max(0, source_bytes(video)), frames * _COPY_SECONDS
    header = _probe(video, shard.binary)
    if header is None or shard.short_edge is None:
        return None
    pixels = header.width * header.height
    scale = min(1.0, shard.short_edge / max(1, min(header.width, header.height)))
    small = pixels * scale**2
    stored = header.frames
    if shard.choice.fps is not None:
        stored = min(stored, header.seconds * shard.choice.fps)
    elif shard.choice.count is not None:
        stored = min(stored, float(shard.choice.count))
    decoding = header.frames * (_DECODE_SECONDS + _DECODE_SECONDS_A_PIXEL * pixels)
    encoding = stored * _ENCODE_SECONDS_A_PIXEL * small
    return stored, stored * _BYTES_A_PIXEL * small, _START_SECONDS + decoding + encoding
