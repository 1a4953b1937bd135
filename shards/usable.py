"""Which videos of a set are trained on, numbered without gaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.reader import ShardSet

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
