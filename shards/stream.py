"""The triplet stream: which videos make up each batch, and the frames of each triplet.

Global batch b of an epoch is positions b·B … (b+1)·B-1 of the epoch's order, whatever the number of
ranks and workers; rank r takes its slice. Every rank therefore has the same number of steps, and a
run resumes at any step without replaying the epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.dataset import ShardSet
from shards.errors import InputError
from shards.sampling import (
    DRAWS,
    MIN_FRAMES,
    NEAR_DRAWS,
    EpochOrder,
    Order,
    WindowOrder,
    draw_near_triplet,
    draw_triplets,
    sample_starts,
    substitute_position,
    uniforms,
)
from shards.storage import UnreadableFrame
from shards.videos import per_shard

TRAIN = "train"  # a split's value for training videos
_PIECE = 1 << 20  # videos whose numbers are hashed at a time


class UsableVideos:
    """The videos with ``min_frames`` or more, 0 … N-1 in the order of the shards.

    Args:
        shards: the dataset.
        min_frames: stored frames a video needs.
        split: the name of a split; use only its training videos.

    Attributes:
        counts: (S,) usable videos of each shard.
        left_out: how many videos are too short.

    Raises:
        InputError: the split has no training videos.
    """

    def __init__(self, shards: ShardSet, min_frames: int, split: str | None = None) -> None:
        wanted = np.ones(len(shards), dtype=bool)
        if split is not None:
            values = shards.splits.get(split, [None] * len(shards))
            wanted = np.array([value == TRAIN for value in values], dtype=bool)
        usable = wanted & (shards.videos.frame_counts >= min_frames)
        self.left_out = int(wanted.sum() - usable.sum())
        self.counts = per_shard(usable, shards.counts)
        # None where all are usable: a list of millions is worth avoiding.
        self._numbers = None if usable.all() else np.flatnonzero(usable)
        if split is not None and not wanted.any():
            raise InputError(
                f"no video is in the training list of split {split!r}",
                "--split",
                f"the splits are {', '.join(shards.splits) or 'none'}",
            )
        self._count = int(self.counts.sum())

    def __len__(self) -> int:
        return self._count

    def numbers(self, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Map (n,) ordinals in 0 … N-1 to (n,) video numbers in the dataset."""
        return ordinals if self._numbers is None else self._numbers[ordinals]


@dataclass(frozen=True)
class TripletFrames:
    """One sample: the video, its order label, and the JPEGs of anchor, second and third frame."""

    key: str
    video: int  # its number in the dataset, or its group's
    order: int  # 0 if the anchor is before the others, 1 if after
    jpegs: tuple[bytes, bytes, bytes]


@dataclass(frozen=True)
class UnreadableTriplet:
    """Stands for a sample whose frames could not be read."""

    key: str
    reason: str


class NothingToRead(Exception):
    """Too many videos in a row cannot be read for the run to continue."""


Sample = TripletFrames | UnreadableTriplet
MAX_GAP = "--max-gap-seconds"  # in the reasons of samples that it excludes
_MOST_SUBSTITUTES = 20
_Read = TypeVar("_Read")


def first_readable(
    read: Callable[[int], _Read],
    note: Callable[[UnreadableFrame], object],
    what: str = "videos in a row cannot be read",
) -> _Read:
    """Return the first of a sample and its substitutes that can be read.

    Args:
        read: called with 0 for the sample itself, with 1, 2, … for its substitutes; raises
            UnreadableFrame.
        note: called with each failure, to count and name it.
        what: wording of the message.

    Raises:
        NothingToRead: neither the sample nor any of 20 substitutes can be read.
    """
    for attempt in range(_MOST_SUBSTITUTES + 1):
        try:
            return read(attempt)
        except UnreadableFrame as error:
            note(error)
            last = error
    raise NothingToRead(f"{attempt + 1} {what}, the last: {last}")


class Stream(Protocol):
    """A trainer's source of samples; can be pickled and used after a fork."""

    name: str  # of the dataset
    seed: int
    batch_size: int  # B, the global batch
    rows: int  # per-rank batch
    steps_per_epoch: int
    left_out: int  # videos that are too short
    window_shards: int  # shards shuffled at a time; 0: all

    def set_worker(self, worker: int, workers: int) -> None:
        """Called once in each of several workers, before it reads."""

    def read(self, epoch: int, step: int, rows: Sequence[int]) -> list[Sample]:
        """Return the samples at these rows (0 … ``rows`` - 1) of the per-rank batch."""

    def substitute(self, epoch: int, step: int, row: int, attempt: int) -> Sample:
        """Return the sample that replaces an unreadable one, at the 1st, 2nd, … attempt."""

    def prefetch(self, epoch: int, step: int) -> None:
        """Hint: the batches from this one on will be read next."""

    def digest(self) -> str:
        """Digest of the training data; runs with equal digests may use each other's checkpoints."""

    def close(self) -> None:
        """Stop background work."""


class IndexedStream:
    """Chooses the videos of each batch from an indexed dataset, by epoch and step.

    Args:
        shards: the dataset.
        batch_size: B, the global batch.
        seed: the run's seed.
        min_frames: videos with fewer stored frames are left out and counted.
        rank: of this process, among ``world_size`` ranks; each takes B / world_size.
        window_shards: W, shuffle within windows of this many shards; 0: within the whole dataset.
        split: use only the training videos of this split.

    Raises:
        InputError: fewer usable videos than one batch needs, or B is not divisible by the ranks.
    """

    def __init__(
        self,
        shards: ShardSet,
        batch_size: int,
        seed: int,
        *,
        min_frames: int,
        rank: int = 0,
        world_size: int = 1,
        window_shards: int = 0,
        split: str | None = None,
    ) -> None:
        self.shards = shards
        self.name = shards.name
        self.batch_size = batch_size
        self.rows = rows_of_rank(batch_size, world_size)
        self.seed = seed
        self._first_row = rank * self.rows
        self.window_shards = window_shards
        self._split = split
        self.usable = UsableVideos(shards, min_frames, split)
        self.left_out = self.usable.left_out
        # Full global batches; the videos left out differ in every epoch.
        self.steps_per_epoch = len(self.usable) // batch_size
        self._wanted: tuple[str, ...] = ()
        if not len(self.usable) and min_frames == MIN_FRAMES:
            raise InputError(
                f"none of the {self.left_out} videos has {MIN_FRAMES} stored frames, which a "
                "triplet needs",
                "--shards",
                "features of pictures and of short videos can be extracted all the same",
            )
        if not self.steps_per_epoch:
            raise InputError(
                f"{len(self.usable)} videos of {min_frames} frames or more do not fill a batch "
                f"of {batch_size}",
                "--shards",
                "lower --batch-size or add videos",
            )

    def order(self, epoch: int) -> Order:
        """Return the order in which the epoch visits the usable videos."""
        return _order(self.usable, self.window_shards, self.seed, epoch)

    def videos(self, epoch: int, positions: Sequence[int]) -> NDArray[np.int64]:
        """Return the (n,) dataset numbers of the videos at these positions of an epoch."""
        return self.usable.numbers(self.order(epoch).at(positions))

    def set_worker(self, worker: int, workers: int) -> None:
        pass  # batches do not depend on the worker

    def positions(self, step: int, rows: Sequence[int]) -> list[int]:
        """Return the epoch's positions of these rows of the per-rank batch."""
        start = step * self.batch_size + self._first_row
        return [start + row for row in rows]

    def substitute_position(self, step: int, row: int, attempt: int) -> int:
        """Return the position of the video that replaces a row, outside the row's batch."""
        place = (attempt - 1) * self.batch_size + self._first_row + row
        begin = step * self.batch_size
        return substitute_position(place, begin, self.batch_size, len(self.usable))

    def prefetch(self, epoch: int, step: int) -> None:
        if self.window_shards:
            shards = self.order(epoch).shards_from(step * self.batch_size)[: 2 * self.window_shards]
            if len(shards) < 2 * self.window_shards:
                following = self.order(epoch + 1).shards_from(0)
                shards = np.concatenate([shards, following])[: 2 * self.window_shards]
            wanted = tuple(self.shards.addresses[shard] for shard in shards)
            if wanted != self._wanted:
                self._wanted = wanted
                self.shards.access.prefetch(wanted)

    def digest(self) -> str:
        """Return a digest of the videos in their order; the shards matter only with windows."""
        texts, lengths, counts = (hashlib.sha256() for _ in range(3))
        videos = self.shards.videos
        texts.update(videos.key_text.data)
        for first in range(0, len(self.shards), _PIECE):
            rows = slice(first, first + _PIECE)
            start = int(videos.key_end[first - 1]) if first else 0
            key_end = videos.key_end[rows].astype(np.int64)
            lengths.update(np.diff(key_end, prepend=start).tobytes())
            counts.update(videos.frame_counts[rows].astype(np.int64).tobytes())
        whole = hashlib.sha256(texts.digest() + lengths.digest() + counts.digest())
        if self.window_shards:
            whole.update(self.shards.counts.tobytes())
        if self._split is not None:
            whole.update(self.usable.numbers(np.arange(len(self.usable))).tobytes())
        return whole.hexdigest()

    def close(self) -> None:
        self.shards.access.close()


class TripletStream(IndexedStream):
    """Batches of triplets from an indexed dataset, by epoch and step.

    Args:
        shards: the dataset; videos with fewer than 3 stored frames are left out and counted.
        batch_size: B, the global batch.
        sampling: ``uniform`` or ``halves`` (:func:`shards.sampling.draw_triplets`).
        seed: the run's seed.
        rank: of this process, among ``world_size`` ranks; each takes B / world_size.
        window_shards: W, shuffle within windows of this many shards; 0: within the whole dataset.
        split: use only the training videos of this split.
        max_gap_seconds: from the first frame of a triplet to the last; None for any.
        by_group: give samples the number of the video's group instead of the video's own.

    Raises:
        InputError: fewer usable videos than one batch needs, or B is not divisible by the ranks;
            all are of one group, with ``by_group``.
    """

    def __init__(
        self,
        shards: ShardSet,
        batch_size: int,
        sampling: str,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        window_shards: int = 0,
        split: str | None = None,
        max_gap_seconds: float | None = None,
        by_group: bool = False,
    ) -> None:
        super().__init__(
            shards,
            batch_size,
            seed,
            min_frames=MIN_FRAMES,
            rank=rank,
            world_size=world_size,
            window_shards=window_shards,
            split=split,
        )
        self._sampling = sampling
        self._max_gap_seconds = max_gap_seconds
        self._owners = shards.groups if by_group else None
        if self._owners is not None:
            used = self._owners[self.usable.numbers(np.arange(len(self.usable)))]
            if (used == used[0]).all():
                raise InputError(
                    "all videos are of one group, which leaves no negatives",
                    "--negatives other-groups",
                    "prepare several recordings, or give other-videos",
                )

    def read(self, epoch: int, step: int, rows: Sequence[int]) -> list[Sample]:
        return self.samples(epoch, self.videos(epoch, self.positions(step, rows)))

    def substitute(self, epoch: int, step: int, row: int, attempt: int) -> Sample:
        position = self.substitute_position(step, row, attempt)
        (sample,) = self.samples(epoch, self.videos(epoch, [position]))
        return sample

    def samples(self, epoch: int, numbers: NDArray[np.int64]) -> list[Sample]:
        """Return the samples of (n,) videos; each is a function of (seed, epoch, video) alone."""
        videos = numbers.tolist()
        keys = [self.shards.key(video) for video in videos]
        starts = sample_starts(self.seed, epoch, keys, "triplet")
        if self._max_gap_seconds is None:
            counts = np.array([self.shards.frame_count(video) for video in videos])
            drawn = draw_triplets(uniforms(starts, DRAWS), counts, self._sampling)
            triplets = list(zip(drawn.frames.tolist(), drawn.order.tolist(), strict=True))
            return self._read(videos, keys, triplets)
        near = self._near(videos, uniforms(starts, NEAR_DRAWS), self._max_gap_seconds)
        there = [row for row, one in enumerate(near) if not isinstance(one, str)]
        read = iter(
            self._read(
                [videos[row] for row in there],
                [keys[row] for row in there],
                [one for one in near if not isinstance(one, str)],
            )
        )
        return [
            UnreadableTriplet(key, one) if isinstance(one, str) else next(read)
            for key, one in zip(keys, near, strict=True)
        ]

    def _near(
        self, videos: list[int], uniform: NDArray[np.float64], seconds: float
    ) -> list[tuple[list[int], int] | str]:
        """Draw triplets of near frames, whose times only the records have; or say why not."""
        found: list[tuple[list[int], int] | str] = []
        for row, record in enumerate(self.shards.records(videos)):
            if isinstance(record, UnreadableFrame):
                found.append(str(record))
                continue
            times = np.array(record.frame_times)
            if len(times) != self.shards.frame_count(videos[row]) or (np.diff(times) < 0).any():
                found.append(f"no times in order, which {MAX_GAP} needs")
                continue
            drawn = draw_near_triplet(uniform[row], times, seconds, self._sampling)
            found.append(drawn or f"no three frames within {seconds:g} s ({MAX_GAP})")
        return found

    def _read(
        self, videos: list[int], keys: list[str], triplets: list[tuple[list[int], int]]
    ) -> list[Sample]:
        found = self.shards.read_frames(
            [
                (video, frame)
                for video, (row, _) in zip(videos, triplets, strict=True)
                for frame in row
            ]
        )
        samples: list[Sample] = []
        for i, (key, video, (_, order)) in enumerate(zip(keys, videos, triplets, strict=True)):
            owner = video if self._owners is None else int(self._owners[video])
            samples.append(sample_of(key, owner, order, tuple(found[3 * i : 3 * i + 3])))
        return samples


def sample_of(key: str, video: int, order: int, jpegs: Sequence[bytes | UnreadableFrame]) -> Sample:
    """Return the sample of three frames, or an UnreadableTriplet if one could not be read."""
    first, second, third = jpegs
    if isinstance(first, bytes) and isinstance(second, bytes) and isinstance(third, bytes):
        return TripletFrames(key, video, order, (first, second, third))
    return UnreadableTriplet(key, str(next(j for j in jpegs if isinstance(j, UnreadableFrame))))


def rows_of_rank(batch_size: int, world_size: int) -> int:
    """Return the size of the per-rank batch.

    Raises:
        InputError: the global batch is not divisible by the ranks.
    """
    if batch_size % world_size:
        raise InputError(f"{batch_size} is not divisible by {world_size} ranks", "--batch-size")
    return batch_size // world_size


@lru_cache(maxsize=4)
def _order(videos: UsableVideos, window: int, seed: int, epoch: int) -> Order:
    if window:
        return WindowOrder(videos.counts, window, seed, epoch)
    return EpochOrder(videos.counts, seed, epoch)
