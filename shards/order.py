"""The order of an epoch: which video stands at each position, computed and never listed.

Both orders are functions of (seed, epoch) alone, so any rank, worker or resumed run finds the same
video at the same position in O(1).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.permutation import Permutation


class Order(Protocol):
    """An order of N videos."""

    count: int  # N

    def at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """(n,) positions in 0 … N-1 to the (n,) videos there; raises IndexError outside."""

    def shards_from(self, position: int) -> NDArray[np.int64]:
        """The shards needed from this position on, in the order in which they are needed."""


class EpochOrder:
    """Any video may follow any other: for sets whose shards are all at hand.

    Args:
        counts: (S,) videos of each shard; N is their sum.
        seed: the run's seed.
        epoch: its number; every epoch has an order of its own.
    """

    def __init__(self, counts: NDArray[np.int64], seed: int, epoch: int) -> None:
        self.count = int(counts.sum())
        self._shards = len(counts)
        self._permutation = Permutation(self.count, f"seco-epoch-order/{seed}/{epoch}")

    def at(self, positions: ArrayLike) -> NDArray[np.int64]:
        return self._permutation.at(positions)

    def shards_from(self, position: int) -> NDArray[np.int64]:
        return np.arange(self._shards)


class WindowOrder:
    """Shards in random order, ``window`` at a time; within a window any video may follow any other.

    For sets whose shards are fetched: only a window's shards need to be at hand. Costs O(S) once
    an epoch, for S shards.

    Args:
        counts: (S,) videos of each shard; N is their sum.
        window: W, shards in a window.
        seed: the run's seed.
        epoch: its number.
    """

    def __init__(self, counts: NDArray[np.int64], window: int, seed: int, epoch: int) -> None:
        if window < 1:
            raise ValueError(f"a window of {window} shards")
        self.count = int(counts.sum())
        self._window = window
        self._name = f"seco-window-order/{seed}/{epoch}"
        shards = Permutation(len(counts), self._name).at(np.arange(len(counts)))
        self._shards = shards[counts[shards] > 0]
        first_of_shard = np.cumsum(counts) - counts
        self._first_video = first_of_shard[self._shards]
        # Position of the first video of each shard in the shards' new order, and the end of all.
        self._starts = np.concatenate([[0], np.cumsum(counts[self._shards])])

    def at(self, positions: ArrayLike) -> NDArray[np.int64]:
        given = np.asarray(positions, dtype=np.int64)
        outside = (given < 0) | (given >= self.count)
        if outside.any():
            raise IndexError(f"position {given[outside][0]} of {self.count}")
        windows = self._window_of(given)
        within = np.empty_like(given)
        for window in np.unique(windows):
            chosen = windows == window
            start, end = self._bounds(int(window))
            permutation = Permutation(end - start, f"{self._name}/{window}")
            within[chosen] = start + permutation.at(given[chosen] - start)
        rank = np.searchsorted(self._starts, within, side="right") - 1
        videos: NDArray[np.int64] = self._first_video[rank] + within - self._starts[rank]
        return videos

    def shards_from(self, position: int) -> NDArray[np.int64]:
        window = int(self._window_of(np.array([position]))[0])
        return self._shards[window * self._window :]

    def _window_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        rank = np.searchsorted(self._starts, positions, side="right") - 1
        return np.asarray(rank // self._window, dtype=np.int64)

    def _bounds(self, window: int) -> tuple[int, int]:
        """The positions of a window: its first, and the one after its last."""
        first = window * self._window
        last = min(first + self._window, len(self._shards))
        return int(self._starts[first]), int(self._starts[last])


def substitute_position(place: int, batch_begin: int, batch_size: int, count: int) -> int:
    """The position of what takes the place of something unreadable: not one of its own batch.

    Args:
        place: row in the batch + (attempt - 1) · batch size, attempts counted from 1.
        batch_begin: position of the batch's first row.
        batch_size: B.
        count: N, positions of an epoch.

    Returns:
        The same place of the ``attempt``-th next batch. After the epoch's end it goes on at its
        beginning, a place further.
    """
    others = count - batch_size
    if others:
        rounds, place = divmod(place, others)
        position = batch_begin + batch_size + (place + rounds) % others
    else:  # this batch is all there is
        attempt, row = divmod(place, batch_size)
        position = batch_begin + row + attempt + 1
    return position % count
