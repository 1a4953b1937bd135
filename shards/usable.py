"""Which videos of a set can be trained on: those with enough frames, numbered without gaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.reader import ShardSet


class UsableVideos:
    """The videos with ``min_frames`` or more, 0 … N-1 in the order of the shards.

    Holds a list for those shards alone that have shorter videos.

    Attributes:
        counts: (S,) usable videos of each shard.
        left_out: how many videos are too short.
    """

    def __init__(self, shards: ShardSet, min_frames: int) -> None:
        self.counts: NDArray[np.int64] = shards.counts.copy()
        self._rows: dict[int, NDArray[np.int64]] = {}
        for shard, index in enumerate(shards.indexes):
            long_enough = index.frame_counts >= min_frames
            if not long_enough.all():
                self._rows[shard] = np.flatnonzero(long_enough)
                self.counts[shard] = len(self._rows[shard])
        self.left_out = int(shards.counts.sum() - self.counts.sum())
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
