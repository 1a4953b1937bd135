"""The triplet stream: which videos make up each batch, and the frames of each triplet.

Global batch b of an epoch is positions b·B … (b+1)·B-1 of the epoch's order, whatever the number of
ranks and workers; rank r takes its slice. Every rank therefore has the same number of steps, and
a run resumes at any step without replaying the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.order import EpochOrder
from shards.reader import ShardSet, UnreadableFrame
from shards.triplets import MIN_FRAMES, Triplet, sample_generator, sample_triplet


@dataclass(frozen=True)
class TripletFrames:
    """One sample: the video, the draw, and the JPEG bytes of anchor, second and third frame."""

    video: int
    key: str
    triplet: Triplet
    jpegs: tuple[bytes, bytes, bytes]


class TripletStream:
    """Batches of triplets of a set, by epoch and step.

    Args:
        shards: the set; videos with fewer than 3 stored frames are left out and counted.
        batch_size: B, the global batch.
        sampling: ``uniform`` or ``halves`` (:func:`shards.triplets.sample_triplet`).
        seed: the run's seed.
        rank: this process's number of ``world_size`` processes; each takes B / world_size.

    Raises:
        InputError: fewer usable videos than one batch needs.
    """

    def __init__(
        self,
        shards: ShardSet,
        batch_size: int,
        sampling: str,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise InputError(
                f"{batch_size} does not divide over {world_size} processes", "--batch-size"
            )
        self.shards = shards
        self.batch_size = batch_size
        self.sampling = sampling
        self.seed = seed
        self.usable: NDArray[np.int64] = np.flatnonzero(shards.frame_counts >= MIN_FRAMES)
        self.too_short = len(shards) - len(self.usable)
        self._first = rank * (batch_size // world_size)
        self._count = batch_size // world_size
        if len(self.usable) < batch_size:
            raise InputError(
                f"{len(self.usable)} videos of {MIN_FRAMES} frames or more do not fill a batch "
                f"of {batch_size}",
                "--shards",
                "lower --batch-size or add videos",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; the rest is left out and differs every epoch."""
        return len(self.usable) // self.batch_size

    def batch_videos(self, epoch: int, step: int) -> list[int]:
        """The videos of this rank's slice of a global batch, in order."""
        order = EpochOrder(len(self.usable), self.seed, epoch)
        start = step * self.batch_size + self._first
        return [int(self.usable[order[start + i]]) for i in range(self._count)]

    def sample(self, epoch: int, video: int) -> TripletFrames:
        """The triplet of a video in an epoch: a function of (seed, epoch, video) alone.

        Raises:
            UnreadableFrame: its bytes cannot be read.
        """
        key = self.shards.keys[video]
        rng = sample_generator(self.seed, epoch, key, "triplet")
        triplet = sample_triplet(rng, self.shards.frame_count(video), self.sampling)
        first, second, third = (self.shards.read_frame(video, f) for f in triplet.frames)
        return TripletFrames(video, key, triplet, (first, second, third))

    def substitute(self, epoch: int, video: int, attempt: int) -> int:
        """The video that takes the place of an unreadable one: the ``attempt``-th next in order.

        Which one it is depends on the epoch's order and the video alone, so ranks stay in step.
        """
        position = int(np.searchsorted(self.usable, video))
        order = EpochOrder(len(self.usable), self.seed ^ 0x5EC0, epoch)
        return int(self.usable[order[(position + attempt) % len(self.usable)]])


__all__ = ["TripletFrames", "TripletStream", "UnreadableFrame"]
