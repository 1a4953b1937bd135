"""The shard plan: which video goes into which shard, and which of its frames are kept.

The plan is fixed before the first decode. A frame chooser is offered every decoded frame in time
order and returns those to store as early as it can: :meth:`offer` what is certain so far,
:meth:`finish` the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines._adapter import Video, VideoSet, read_part, source_bytes, tar_metadata
from pipelines._config import PrepareConfig
from pipelines._decode import Frame
from pipelines._order import PIECE_SECONDS, VideoTable, digest_row, rank_text
from pipelines._remote import NO_SPOOL, Spool

_BUDGET_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class FrameChoice:
    """``count`` frames per video, ``fps`` frames per second, or (neither) all of them."""

    count: int | None = None
    fps: float | None = None

    def chooser(self, budget_bytes: int = _BUDGET_BYTES) -> Chooser:
        """Return a new chooser, for one video; frames that wait take so much memory at most."""
        if self.count is not None:
            return Evenly(self.count, budget_bytes)
        return AtRate(self.fps) if self.fps is not None else Every()


class Chooser(Protocol):
    """See the module's docstring."""

    def offer(self, frame: Frame) -> list[Frame]: ...

    def finish(self) -> list[Frame]: ...


class Every:
    """All frames."""

    def offer(self, frame: Frame) -> list[Frame]:
        return [frame]

    def finish(self) -> list[Frame]:
        return []


class Evenly:
    """The ``count`` frames nearest to evenly spaced times from the first frame to the last.

    How many frames there are is known only at the end (a container's count is often wrong), so
    frames wait in memory. Above ``budget_bytes``, but never below 16 x ``count`` frames, every
    second one is dropped. At least 8 x ``count`` remain, so with a constant frame rate a stored
    frame is at most 1/16 of the spacing from its place; without dropping it is the nearest there
    is. The first and the last decoded frame are always kept.
    """

    def __init__(self, count: int, budget_bytes: int = _BUDGET_BYTES) -> None:
        self._count = count
        self._budget_bytes = budget_bytes
        self._kept: list[Frame] = []
        self._stride = 1
        self._offered = 0
        self._last: Frame | None = None

    def offer(self, frame: Frame) -> list[Frame]:
        if self._offered % self._stride == 0:
            self._kept.append(frame)
        self._last = frame
        self._offered += 1
        most = max(16 * self._count, self._budget_bytes // max(1, len(frame.planes)))
        if len(self._kept) > most:
            self._kept = self._kept[::2]
            self._stride *= 2
        return []

    def finish(self) -> list[Frame]:
        if self._last is not None and self._kept[-1] is not self._last:
            self._kept.append(self._last)
        chosen = nearest_distinct([frame.time for frame in self._kept], self._count)
        return [self._kept[index] for index in chosen]


def nearest_distinct(times: list[float], count: int) -> list[int]:
    """Return the indices of the ``count`` times nearest to evenly spaced ones; all if fewer.

    Args:
        times: seconds, not decreasing.

    Returns:
        Increasing indices, each once: if two targets have the same nearest time, the later takes
        the next free one.
    """
    if len(times) <= count:
        return list(range(len(times)))
    if count == 1:
        targets = np.array([(times[0] + times[-1]) / 2])
    else:
        targets = np.linspace(times[0], times[-1], count)
    at = np.asarray(times)
    right = np.clip(np.searchsorted(at, targets), 1, len(at) - 1)
    nearest = np.where(targets - at[right - 1] <= at[right] - targets, right - 1, right)
    steps = np.arange(count)
    distinct = np.maximum.accumulate(nearest - steps) + steps
    distinct = np.minimum(distinct, len(at) - count + steps)
    return [int(index) for index in distinct]


class AtRate:
    """The frame nearest to each of first, first + 1/R, first + 2/R, …; none twice."""

    def __init__(self, fps: float) -> None:
        self._fps = fps
        self._start = 0.0
        self._next = 0  # the lowest target without a frame
        self._previous: Frame | None = None
        self._previous_given = False

    def offer(self, frame: Frame) -> list[Frame]:
        given: list[Frame] = []
        take = False
        if self._previous is None:
            self._start = frame.time
        reached = math.floor((frame.time - self._start) * self._fps + 1e-6)
        if self._next <= reached:
            if not self._previous_given and self._nearer_before(self._next, frame):
                given += [self._previous] if self._previous is not None else []
            take = not self._nearer_before(reached, frame)
            given += [frame] if take else []
            self._next = reached + 1
        self._previous, self._previous_given = frame, take
        return given

    def _nearer_before(self, target: int, frame: Frame) -> bool:
        if self._previous is None:
            return False
        time = self._start + target / self._fps
        return time - self._previous.time < frame.time - time

    def finish(self) -> list[Frame]:
        return []


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Everything one shard is made from."""

    folder: str  # a path, or an address fsspec knows
    name: str  # of the shard: NAME-000
    digest: str  # of the whole dataset's plan
    dataset: str
    videos: tuple[Video, ...]
    choice: FrameChoice
    short_edge: int | None  # px
    quality: int
    min_frames: int
    keep_damaged: bool
    timeout_seconds: float
    src: str  # the folder of the raw videos, or its address
    binary: str  # ffmpeg
    ffmpeg_version: str
    spool: Spool = NO_SPOOL
    keyframes: bool = False  # decode nothing else
    cut_scenes: bool = False  # of a clip, keep the longest part without a cut
    retry: bool = False  # copy what the finished shard contains, and retry the rest

    @property
    def tar(self) -> str:
        """The tar's file name."""
        return f"{self.name}.tar"

    @property
    def index(self) -> str:
        """The index's file name."""
        return f"{self.name}.idx"


class PlannedShards(Mapping[str, ShardPlan]):
    """The plans of the shards ``NAME-000``, ``NAME-001``, …; each is made when it is asked for.

    Args:
        common: what is the same in all of them; its name is the dataset's.
        ordered: the dataset's videos.
        videos_per_shard: all but the last have so many.
    """

    def __init__(self, common: ShardPlan, ordered: Sequence[Video], videos_per_shard: int) -> None:
        self._common = common
        self._ordered = ordered
        self._each = videos_per_shard
        count = -(-len(ordered) // videos_per_shard)
        digits = max(3, len(str(count - 1)))
        self._starts = {
            f"{common.name}-{number:0{digits}d}": number * videos_per_shard
            for number in range(count)
        }

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._starts)

    def __getitem__(self, name: str) -> ShardPlan:
        start = self._starts[name]
        return replace(
            self._common, name=name, videos=tuple(self._ordered[start : start + self._each])
        )

    def videos_in(self, name: str) -> int:
        """Return how many videos are planned for a shard."""
        return min(self._each, len(self._ordered) - self._starts[name])


class Todo(Collection[ShardPlan]):
    """Some shards of a plan, in order.

    Args:
        shards: of the whole dataset.
        names: those to build.
        retried: those of them of which only the failures are built.
    """

    def __init__(self, shards: PlannedShards, names: list[str], retried: set[str]) -> None:
        self._shards, self.names, self.retried = shards, names, retried

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[ShardPlan]:
        for name in self.names:
            yield replace(self._shards[name], retry=name in self.retried)

    def __contains__(self, plan: object) -> bool:
        return isinstance(plan, ShardPlan) and plan.name in self.names


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """All shards of a dataset, and what its manifest says about them."""

    name: str
    dataset: str
    settings: dict[str, Any]
    shards: PlannedShards
    ordered: Sequence[Video]  # as they are stored
    videos: VideoSet


def plan_set(
    videos: VideoSet,
    config: PrepareConfig,
    *,
    choice: FrameChoice,
    short_edge: int | None,
    root: Path | str,
    binary: str,
    ffmpeg_version: str,
    spool: Spool,
) -> SetPlan:
    """Divide a dataset into shards ``NAME-000.tar``, ``NAME-001.tar``, …

    Videos are ordered by the SHA-1 of their keys, so that each shard is a mixture of classes and
    the order depends on nothing else. Clips of a recording stay together for some minutes, because
    they are decoded in one pass.
    """
    found = videos.videos
    ordered = found if isinstance(found, VideoTable) else sorted(found, key=_rank)
    settings = byte_settings(config, choice, short_edge)
    common = ShardPlan(
        # Absolute, because the nodes of a cluster start in other folders.
        folder=config.out if "://" in config.out else os.path.abspath(config.out),
        name=videos.name,
        digest=_digest(ordered, settings, ffmpeg_version),
        dataset=config.dataset,
        videos=(),
        choice=choice,
        short_edge=short_edge,
        quality=config.quality,
        min_frames=config.min_frames,
        keep_damaged=config.keep_damaged,
        timeout_seconds=config.timeout,
        src=str(root),
        binary=binary,
        ffmpeg_version=ffmpeg_version,
        keyframes=config.keyframes,
        cut_scenes=config.cut_scenes,
        spool=spool,
    )
    return SetPlan(
        name=videos.name,
        dataset=config.dataset,
        settings=settings,
        shards=PlannedShards(common, ordered, config.videos_per_shard),
        ordered=ordered,
        videos=videos,
    )


def _rank(video: Video) -> tuple[bytes, str, float]:
    start = 0.0 if video.span is None else video.span[0]
    return (
        hashlib.sha1(rank_text(video.source, video.span, video.key).encode()).digest(),
        video.source,
        start,
    )


_SKIPPED_SECONDS = 10.0  # between two clips, which are decoded for nothing rather than sought


def pieces(videos: Sequence[Video]) -> Iterator[tuple[Video, ...]]:
    """Divide a shard's videos, in their order, into those that are decoded in one pass."""
    piece: list[Video] = []
    for video in videos:
        if piece and not _continues(piece, video):
            yield tuple(piece)
            piece = []
        piece.append(video)
    if piece:
        yield tuple(piece)


def _continues(piece: list[Video], video: Video) -> bool:
    first, last = piece[0], piece[-1]
    if first.span is None or last.span is None or video.span is None:
        return False
    start = video.span[0]
    near = last.span[0] <= start <= last.span[1] + _SKIPPED_SECONDS
    return (
        (video.path, video.inside) == (first.path, first.inside)
        and near
        and start // PIECE_SECONDS == first.span[0] // PIECE_SECONDS
    )


def byte_settings(
    config: PrepareConfig, choice: FrameChoice, short_edge: int | None
) -> dict[str, Any]:
    """Return the settings that change what is stored: not folders, workers or the time limit."""
    settings = {
        "dataset": config.dataset,
        "frames": choice.count,
        "fps": choice.fps,
        "all_frames": choice == FrameChoice(),
        "min_frames": config.min_frames,
        "keep_damaged": config.keep_damaged,
        "short_edge": short_edge,
        "quality": config.quality,
        "videos_per_shard": config.videos_per_shard,
    }
    # Only where they are given: the plans of earlier versions have no such settings.
    later = ("clip_seconds", "clip_stride", "cut_scenes", "keyframes", "frame_rate")
    given = {name: getattr(config, name) for name in later}
    return settings | {name: value for name, value in given.items() if value}


def _digest(videos: Iterable[Video], settings: dict[str, Any], ffmpeg_version: str) -> str:
    """Return the digest of what decides which bytes go where.

    Where a video was found and how large it is are not part of it: a broken file may be replaced
    by a complete one, for ``--retry-failed``. A shard's index has them for its videos.
    """
    digest = hashlib.sha256(json.dumps([settings, ffmpeg_version]).encode())
    rows = videos.digest_rows() if isinstance(videos, VideoTable) else map(_digest_row, videos)
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def _digest_row(video: Video) -> list[Any]:
    rate = None if video.frames is None else video.frames.rate
    named = (video.key, video.label, video.label_name, video.splits)
    return digest_row(*named, video.group, video.span, video.metadata, rate)


def described(video: Video, dataset: str) -> dict[str, Any]:
    """Return the fields of a :class:`shards.format.VideoRecord` that are known without decoding."""
    return {
        "key": video.key,
        "dataset": dataset,
        "source": video.source,
        "label": video.label,
        "label_name": video.label_name,
        "splits": video.splits,
        "source_bytes": source_bytes(video),
        "group": video.group,
        "start": video.span[0] if video.span is not None else None,
        "metadata": tar_metadata(video, partial(read_part, video.path))
        if video.texts
        else video.metadata,
    }
