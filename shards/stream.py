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
    EpochOrder,
    Order,
    WindowOrder,
    draw_triplets,
    sample_starts,
    substitute_position,
    uniforms,
)
from shards.storage import UnreadableFrame

TRAIN = "train"  # the value of a split's training videos


class UsableVideos:
    """The videos with ``min_frames`` or more, 0 … N-1 in the order of the shards.

    Holds a list for those shards alone that have other videos.

    Args:
        shards: the set.
        min_frames: stored frames a video needs.
        split: the name of a split: its training videos only.

    Attributes:
        counts: (S,) usable videos of each shard.
        left_out: how many videos are too short.

    Raises:
        InputError: the split has no training videos.
    """

    def __init__(self, shards: ShardSet, min_frames: int, split: str | None = None) -> None:
        self.counts: NDArray[np.int64] = shards.counts.copy()
        self.left_out = 0
        self._rows: dict[int, NDArray[np.int64]] = {}
        for shard, index in enumerate(shards.indexes):
            wanted = np.ones(len(index.frame_counts), dtype=bool)
            if split is not None:
                wanted = np.array([row.get(split) == TRAIN for row in index.splits], dtype=bool)
            usable = wanted & (index.frame_counts >= min_frames)
            self.left_out += int(wanted.sum() - usable.sum())
            if not usable.all():
                self._rows[shard] = np.flatnonzero(usable)
                self.counts[shard] = len(self._rows[shard])
        if split is not None and not self.left_out and not self.counts.any():
            raise InputError(
                f"no video is in the training list of split {split!r}",
                "--split",
                f"the splits are {', '.join(shards.splits) or 'none'}",
            )
        self._ends: NDArray[np.int64] = np.cumsum(self.counts)
        self._first_video: NDArray[np.int64] = np.cumsum(shards.counts) - shards.counts

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def numbers(self, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) of 0 … N-1 to (n,) numbers in the set."""
        shard = np.searchsorted(self._ends, ordinals, side="right")
        row = ordinals - (self._ends[shard] - self.counts[shard])
        for number in np.unique(shard):
            if int(number) in self._rows:
                there = shard == number
                row[there] = self._rows[int(number)][row[there]]
        numbers: NDArray[np.int64] = self._first_video[shard] + row
        return numbers


@dataclass(frozen=True)
class TripletFrames:
    """One sample: the video, the draw, and the JPEG bytes of anchor, second and third frame."""

    key: str
    video: int  # its number in the set
    order: int  # 0 when the anchor is before the others, 1 when after
    jpegs: tuple[bytes, bytes, bytes]


@dataclass(frozen=True)
class UnreadableTriplet:
    """What stands in the place of a sample whose frames could not be read."""

    key: str
    reason: str


class NothingToRead(Exception):
    """So many videos in a row cannot be read that there is no point in going on."""


Sample = TripletFrames | UnreadableTriplet
_MOST_SUBSTITUTES = 20
_Read = TypeVar("_Read")


def first_readable(
    read: Callable[[int], _Read],
    note: Callable[[UnreadableFrame], object],
    what: str = "videos in a row cannot be read",
) -> _Read:
    """The one rule for samples that cannot be read: what is next in their place.

    Args:
        read: called with 0 for the sample itself, with 1, 2, … for its substitutes; raises
            UnreadableFrame.
        note: told of each that cannot be read, so that it is counted and named.
        what: of the message.

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
    """Where a trainer's samples come from; may be pickled and used after a fork."""

    name: str  # of the set
    seed: int
    batch_size: int  # B, the global batch
    rows: int  # of it on this rank
    steps_per_epoch: int
    left_out: int  # videos that are too short
    window_shards: int  # within which it is shuffled; 0: all

    def set_worker(self, worker: int, workers: int) -> None:
        """Told once to each of several loader processes, before it reads."""

    def read(self, epoch: int, step: int, rows: Sequence[int]) -> list[Sample]:
        """Samples at these rows (0 … ``rows`` - 1) of this rank's slice of a batch."""

    def substitute(self, epoch: int, step: int, row: int, attempt: int) -> Sample:
        """The sample that takes the place of an unreadable one, at the 1st, 2nd, … attempt."""

    def prefetch(self, epoch: int, step: int) -> None:
        """Hint: the batches from this one on will be read next."""

    def digest(self) -> str:
        """Of what is trained on: equal for runs that may go on from each other's checkpoints."""

    def close(self) -> None:
        """Stop what goes on in the background."""


class IndexedStream:
    """Which videos of an indexed set make up each batch, by epoch and step.

    Args:
        shards: the set.
        batch_size: B, the global batch.
        seed: the run's seed.
        min_frames: videos with fewer stored frames are left out and counted.
        rank: this process's number of ``world_size`` processes; each takes B / world_size.
        window_shards: W, shuffle within windows of so many shards; 0: within the whole set.
        split: the training videos of this split only.

    Raises:
        InputError: fewer usable videos than one batch needs, or B does not divide.
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
        # Whole global batches; the rest of an epoch is left out and differs every epoch.
        self.steps_per_epoch = len(self.usable) // batch_size
        self._wanted: tuple[str, ...] = ()
        if not self.steps_per_epoch:
            raise InputError(
                f"{len(self.usable)} videos of {min_frames} frames or more do not fill a batch "
                f"of {batch_size}",
                "--shards",
                "lower --batch-size or add videos",
            )

    def order(self, epoch: int) -> Order:
        """In which the epoch visits the usable videos."""
        return _order(self.usable, self.window_shards, self.seed, epoch)

    def videos(self, epoch: int, positions: Sequence[int]) -> NDArray[np.int64]:
        """(n,) numbers, in the set, of the videos at these positions of an epoch."""
        return self.usable.numbers(self.order(epoch).at(positions))

    def set_worker(self, worker: int, workers: int) -> None:
        pass  # who reads makes no difference

    def positions(self, step: int, rows: Sequence[int]) -> list[int]:
        """Where the rows of this rank's slice of a batch stand in the epoch."""
        start = step * self.batch_size + self._first_row
        return [start + row for row in rows]

    def substitute_position(self, step: int, row: int, attempt: int) -> int:
        """Where the video stands that takes a row's place: not in the same batch."""
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
        """Equal for the same videos in the same order, however they are cut into shards."""
        texts, lengths, counts = (hashlib.sha256() for _ in range(3))
        for index in self.shards.indexes:
            texts.update(index.key_text.tobytes())
            lengths.update(np.diff(index.key_end.astype(np.int64), prepend=0).tobytes())
            counts.update(index.frame_counts.tobytes())
        whole = hashlib.sha256(texts.digest() + lengths.digest() + counts.digest())
        if self.window_shards:
            whole.update(self.shards.counts.tobytes())
        if self._split is not None:
            whole.update(self.usable.numbers(np.arange(len(self.usable))).tobytes())
        return whole.hexdigest()

    def close(self) -> None:
        self.shards.access.close()


class TripletStream(IndexedStream):
    """Batches of triplets of an indexed set, by epoch and step.

    Args:
        shards: the set; videos with fewer than 3 stored frames are left out and counted.
        batch_size: B, the global batch.
        sampling: ``uniform`` or ``halves`` (:func:`shards.sampling.draw_triplets`).
        seed: the run's seed.
        rank: this process's number of ``world_size`` processes; each takes B / world_size.
        window_shards: W, shuffle within windows of so many shards; 0: within the whole set.
        split: the training videos of this split only.

    Raises:
        InputError: fewer usable videos than one batch needs, or B does not divide.
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

    def read(self, epoch: int, step: int, rows: Sequence[int]) -> list[Sample]:
        return self.samples(epoch, self.videos(epoch, self.positions(step, rows)))

    def substitute(self, epoch: int, step: int, row: int, attempt: int) -> Sample:
        position = self.substitute_position(step, row, attempt)
        (sample,) = self.samples(epoch, self.videos(epoch, [position]))
        return sample

    def samples(self, epoch: int, numbers: NDArray[np.int64]) -> list[Sample]:
        """The samples of videos (n,): each is a function of (seed, epoch, video) alone."""
        videos = numbers.tolist()
        keys = [self.shards.key(video) for video in videos]
        counts = np.array([self.shards.frame_count(video) for video in videos])
        starts = sample_starts(self.seed, epoch, keys, "triplet")
        drawn = draw_triplets(uniforms(starts, DRAWS), counts, self._sampling)
        frames = drawn.frames.tolist()
        found = self.shards.read_frames(
            [(video, frame) for video, row in zip(videos, frames, strict=True) for frame in row]
        )
        samples: list[Sample] = []
        for i, (key, video, order) in enumerate(zip(keys, videos, drawn.order, strict=True)):
            jpegs = tuple(found[3 * i : 3 * i + 3])
            samples.append(sample_of(key, video, int(order), jpegs))
        return samples


def sample_of(key: str, video: int, order: int, jpegs: Sequence[bytes | UnreadableFrame]) -> Sample:
    """The sample of three frames that were read, or what says that one was not."""
    first, second, third = jpegs
    if isinstance(first, bytes) and isinstance(second, bytes) and isinstance(third, bytes):
        return TripletFrames(key, video, order, (first, second, third))
    return UnreadableTriplet(key, str(next(j for j in jpegs if isinstance(j, UnreadableFrame))))


def rows_of_rank(batch_size: int, world_size: int) -> int:
    """A rank's share of the global batch.

    Raises:
        InputError: it does not divide.
    """
    if batch_size % world_size:
        raise InputError(f"{batch_size} is not divisible by {world_size} ranks", "--batch-size")
    return batch_size // world_size


@lru_cache(maxsize=4)
def _order(videos: UsableVideos, window: int, seed: int, epoch: int) -> Order:
    if window:
        return WindowOrder(videos.counts, window, seed, epoch)
    return EpochOrder(videos.counts, seed, epoch)
