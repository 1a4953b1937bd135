"""Stored frames of videos: which ones, and batches of their centre crops for a backbone.

A batch holds frames of several videos and never of two shards: frames b·B … (b+1)·B-1 of a shard,
video after video. Where a frame lies depends on the shard alone, not on what can be read, on who
reads it, or on where an earlier run stopped; so features are equal to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from seco.data.crops import BrokenJpeg, FrameDecoder, center_crop
from seco.data.loader import BatchRing, forked_loader
from shards.dataset import ShardSet
from shards.sampling import evenly_spaced
from shards.storage import UnreadableFrame, readable


class VideoFrames:
    """Centre crops of evenly spaced frames of videos (paper §5.2).

    Args:
        shards: the dataset.
        frames: frames per video; all of a shorter one.
        short_edge: of the resized frames, px.
        crop_size: S, side of the crops, px.
    """

    def __init__(self, shards: ShardSet, frames: int, short_edge: int, crop_size: int) -> None:
        self.shards = shards
        self.crop_size = crop_size
        self._frames = frames
        self._short_edge = short_edge
        self._decoder = FrameDecoder()

    def counts(self, shard: int) -> NDArray[np.int64]:
        """Number of frames taken from each video of a shard, (v,)."""
        counts = self.shards.videos.frame_counts[self.shards.rows_of(shard)]
        return np.minimum(counts.astype(np.int64), self._frames)

    def numbers(self, video: int) -> list[int]:
        """Numbers of the stored frames to take."""
        return evenly_spaced(self.shards.frame_count(video), self._frames)

    def crop_into(self, out: NDArray[np.uint8], wanted: Sequence[tuple[int, int]]) -> list[str]:
        """Write the crops of (video, frame) pairs.

        Args:
            out: (n, S, S, 3); zeros for a frame that cannot be read.
            wanted: (n,)

        Returns:
            (n,) why a frame cannot be read, or "".
        """
        reasons = []
        for place, data in enumerate(self.shards.read_frames(wanted)):
            try:
                image = self._decoder.decode(readable(data))
                out[place] = center_crop(image, self._short_edge, self.crop_size)
                reasons.append("")
            except (UnreadableFrame, BrokenJpeg) as error:
                out[place] = 0
                reasons.append(str(error))
        return reasons

    def video(self, video: int) -> tuple[Tensor, str]:
        """Return one video's crops, (F, 3, S, S) uint8, and why it cannot be read or ""."""
        wanted = [(video, number) for number in self.numbers(video)]
        crops = np.empty((len(wanted), self.crop_size, self.crop_size, 3), dtype=np.uint8)
        reason = next(filter(None, self.crop_into(crops, wanted)), "")
        return torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous(), reason


_CHUNK_FRAMES = 32  # at 224 px about 40 ms of decoding and 5 MB
_CHUNKS_AHEAD = 2  # per worker

Row = dict[str, Any]  # of videos.csv


class _Task(NamedTuple):
    """Frames ``first`` … ``last`` - 1 of a shard, and their place in the ring."""

    shard: int
    first: int
    last: int
    place: int


class _Chunk(NamedTuple):
    """The result of a task, except for the pixels."""

    task: _Task
    rows: dict[int, Row]  # of the videos that begin in this chunk
    failures: dict[int, str]  # why a video cannot be read


@dataclass(frozen=True)
class FrameBatch:
    """Frames of one shard.

    ``parts`` is memory of the loader: valid until the batch is passed to
    :meth:`FrameLoader.release`.
    """

    shard: int
    first: int  # number of its first frame within the shard
    parts: list[NDArray[np.uint8]]  # (n, S, S, 3) each, in order
    rows: dict[int, Row]  # by video number in the dataset
    failures: dict[int, str]
    ends_shard: bool

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)


class _Chunks(Dataset[_Chunk]):
    """Item of a task: writes its crops to the ring."""

    def __init__(self, frames: VideoFrames, ring: BatchRing) -> None:
        self._frames = frames
        self._ring = ring
        self._shard = -1
        self._ends: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __getitem__(self, task: _Task) -> _Chunk:
        frames, shards = self._frames, self._frames.shards
        if task.shard != self._shard:
            self._shard, self._ends = task.shard, np.cumsum(frames.counts(task.shard))
        first_video = int(shards.counts[: task.shard].sum())
        positions = np.arange(task.first, task.last)
        rows = np.searchsorted(self._ends, positions, side="right")
        begins = np.concatenate([[0], self._ends])[rows]
        numbers = {row: frames.numbers(first_video + row) for row in np.unique(rows).tolist()}
        wanted = [
            (first_video + row, numbers[row][place])
            for row, place in zip(rows.tolist(), (positions - begins).tolist(), strict=True)
        ]
        out = self._ring[task.place][: len(wanted)].view(np.uint8)
        reasons = frames.crop_into(out, wanted)
        failures: dict[int, str] = {}
        for (video, _), reason in zip(wanted, reasons, strict=True):
            if reason:
                failures.setdefault(video, reason)
        table: dict[int, Row] = {}
        for row in np.unique(rows[positions == begins]).tolist():
            try:
                table[first_video + row] = self._row(first_video + row, task.shard)
            except UnreadableFrame as error:
                failures.setdefault(first_video + row, str(error))
        return _Chunk(task, table, failures)

    def _row(self, video: int, shard: int) -> Row:
        shards = self._frames.shards
        record = shards.record(video)
        return {
            "key": shards.key(video),
            "dataset": record.dataset,
            "source": record.source,
            "label": record.label,
            "label_name": record.label_name,
            "frames": len(self._frames.numbers(video)),
            "shard": Path(shards.addresses[shard]).name,
            "splits": record.splits,
            **({} if record.group is None else {"group": record.group}),
        }


class FrameLoader:
    """Iterates over the batches of some shards, in order. Can be iterated over once.

    Args:
        frames: which frames, and how they are cropped.
        shards: numbers of the shards.
        batch_size: B.
        workers: number of workers; 0: batches are made in this process, on demand.
        kept: most batches in use at a time.
        pin: pin the batches' memory for a GPU.
    """

    def __init__(
        self,
        frames: VideoFrames,
        shards: Sequence[int],
        batch_size: int,
        *,
        workers: int,
        kept: int,
        pin: bool = False,
    ) -> None:
        self._frames = frames
        self._shards = shards
        self._batch_size = batch_size
        self._workers = workers
        self._pin = pin
        self._chunk = min(batch_size, _CHUNK_FRAMES)
        chunks_a_batch = math.ceil(batch_size / self._chunk)
        ahead = _CHUNKS_AHEAD * workers if workers else 1
        self._places = ahead + (kept + 1) * chunks_a_batch
        size = frames.crop_size
        self._ring = BatchRing(self._places, (self._chunk, size, size, 3), np.uint8)
        self._handed_out = 0  # chunks
        self._released = 0

    def __enter__(self) -> FrameLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._frames.shards.access.close()
        self._ring.close()

    def __len__(self) -> int:
        """Return the number of batches."""
        return sum(1 for _ in self._batches())

    def release(self, batch: FrameBatch) -> None:
        """Allow a batch's memory to be reused; batches are released in order."""
        self._released += len(batch.parts)

    def __iter__(self) -> Generator[FrameBatch, None, None]:
        chunks_of = _Chunks(self._frames, self._ring)
        ahead = _CHUNKS_AHEAD if self._workers else None
        with forked_loader(chunks_of, self.tasks, self._workers, ahead) as chunks:
            # After the workers are forked, and before this process starts compute threads.
            if self._pin:
                self._ring.pin()
            for shard, first, last, ends_shard in self._batches():
                found = [next(chunks) for _ in range(first, last, self._chunk)]
                yield FrameBatch(
                    shard=shard,
                    first=first,
                    parts=[
                        self._ring[c.task.place][: c.task.last - c.task.first].view(np.uint8)
                        for c in found
                    ],
                    rows={video: row for c in found for video, row in c.rows.items()},
                    failures={v: why for c in reversed(found) for v, why in c.failures.items()},
                    ends_shard=ends_shard,
                )

    def tasks(self) -> Iterator[_Task]:
        """Yield all chunks in order; torch requests each one as it hands it out."""
        for shard, first, last, _ in self._batches():
            for begin in range(first, last, self._chunk):
                if self._handed_out - self._released >= self._places:
                    raise RuntimeError("frames would be overwritten while they are read")
                place = self._handed_out % self._places
                self._handed_out += 1
                yield _Task(shard, begin, min(begin + self._chunk, last), place)

    def _batches(self) -> Iterator[tuple[int, int, int, bool]]:
        """Yield (shard, first, last, whether it ends the shard) of every batch."""
        for shard in self._shards:
            count = int(self._frames.counts(shard).sum())
            for first in range(0, count, self._batch_size):
                last = min(first + self._batch_size, count)
                yield shard, first, last, last == count
