"""The features of whole shards: loader, backbone and means put together."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seco.extract.config import ExtractConfig
from seco.extract.forwards import Forwards
from seco.extract.parts import ShardFeatures
from seco.loading.frame_loader import FrameBatch, FrameLoader
from seco.processes.device import loader_workers
from seco.processes.stopping import StopRequest
from seco.views.video_frames import VideoFrames
from shards.reader import ShardSet


def shard_features(
    shards: ShardSet,
    numbers: Sequence[int],
    forwards: Forwards,
    config: ExtractConfig,
    stop: StopRequest,
    on_videos: Callable[[int], object] = lambda count: None,
) -> Generator[tuple[int, ShardFeatures], None, None]:
    """Shard after shard: its number, and the features of its videos.

    Args:
        shards: the set.
        numbers: which of its shards.
        forwards: of the backbone.
        config: resolved settings.
        stop: ends the waiting for data.
        on_videos: told how many more videos have been computed.

    Raises:
        StopWaiting: a signal came; the shard that was begun is lost.
    """
    assert config.frames is not None and config.batch_size is not None
    frames = VideoFrames(shards, config.frames, config.short_edge, config.crop_size)
    # Where no video has a frame, nothing is loaded and nothing would be heard of the shard.
    blank = [number for number in numbers if not frames.counts(number).any()]
    for number in blank:
        yield number, _Collected(frames, number, keep=config.per_frame).finish()
    loader = FrameLoader(
        frames,
        [number for number in numbers if number not in blank],
        config.batch_size,
        workers=loader_workers(config.workers, forwards.device),
        kept=forwards.at_once,
        pin=forwards.on_gpu,
    )
    pending: deque[tuple[FrameBatch, Future[NDArray[np.float32]]]] = deque()
    collected: _Collected | None = None
    with loader, contextlib.closing(iter(loader)) as batches:
        more = True
        while more or pending:
            if more:
                with stop.while_waiting():
                    batch = next(batches, None)
                if batch is not None:
                    pending.append((batch, forwards.submit(batch.parts)))
                more = batch is not None
            if len(pending) > forwards.at_once or (pending and not more):
                batch, computed = pending.popleft()
                if collected is None:
                    collected = _Collected(frames, batch.shard, keep=config.per_frame)
                on_videos(collected.add(batch, computed.result()))
                loader.release(batch)
                if batch.ends_shard:
                    yield batch.shard, collected.finish()
                    collected = None


class _Collected:
    """The features of a shard's frames, as they come in.

    Args:
        frames: of the set.
        shard: its number.
        keep: the features of single frames, too.
    """

    def __init__(self, frames: VideoFrames, shard: int, *, keep: bool) -> None:
        self._shards = frames.shards
        self._shard = shard
        self._keep = keep
        self._counts = frames.counts(shard)
        self._ends = np.cumsum(self._counts)
        self._first_video = int(frames.shards.counts[:shard].sum())
        self._values: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._rows: dict[int, dict[str, Any]] = {}
        self._failures: dict[int, str] = {}

    def add(self, batch: FrameBatch, values: NDArray[np.float32]) -> int:
        """Take the (n, D) features of a batch; returns how many videos they complete."""
        if not len(self._values):
            self._values = np.empty((int(self._ends[-1]), values.shape[1]), dtype=np.float32)
        last = batch.first + len(batch)
        self._values[batch.first : last] = values
        self._rows |= batch.rows
        self._failures = batch.failures | self._failures  # the first frame's reason
        return int(np.searchsorted(self._ends, last, "right")) - int(
            np.searchsorted(self._ends, batch.first, "right")
        )

    def finish(self) -> ShardFeatures:
        """All frames are there."""
        name = Path(self._shards.addresses[self._shard]).name
        rows, failures, means, halves, kept = [], [], [], [], []
        for place, count in enumerate(self._counts.tolist()):
            video = self._first_video + place
            if not count or video in self._failures:
                reason = self._failures.get(video, "has no frames")
                failures.append((self._shards.key(video), name, reason))
                continue
            end = int(self._ends[place])
            values = self._values[end - count : end]
            mean, both = pooled(values)
            rows.append(self._rows[video])
            means.append(mean)
            halves.append(both)
            kept.append(values)
        shape = (len(rows), self._values.shape[1])
        return ShardFeatures(
            rows=rows,
            failures=failures,
            features=np.array(means, dtype=np.float32).reshape(shape),
            halves=np.array(halves, dtype=np.float32).reshape(shape[0], 2, shape[1]),
            frames=np.concatenate([self._values[:0], *kept]) if self._keep else None,
        )


def pooled(frames: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(F, D) features of a video's frames to their mean (D,) and those of both halves (2, D).

    Added up in float64, frame after frame. The middle one of an odd number is in neither half.
    """
    middle = max(1, len(frames) // 2)
    mean, *halves = (
        some.mean(axis=0, dtype=np.float64).astype(np.float32)
        for some in (frames, frames[:middle], frames[-middle:])
    )
    return mean, np.stack(halves)
