"""Chosen rows of a feature array, read a block at a time and scaled on the way.

The array may be larger than memory (``features.npy``, memory-mapped): nothing here holds more of
it than was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seco.features.unit_rows import unit_rows

BLOCK_BYTES = 32 << 20


class FeaturesTooLarge(ValueError):
    """Their squares are beyond float32."""


@dataclass(frozen=True)
class Scaling:
    """``none``; ``l2``: rows of length 1; ``standard``: columns of mean 0 and variance 1.

    ``mean`` and ``deviation`` (D,) float64 are those of the training rows (``standard`` only).
    """

    how: str = "none"
    mean: NDArray[np.float64] | None = None
    deviation: NDArray[np.float64] | None = None

    def apply(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Rows (n, D) scaled; rows of zeros and constant columns become zero."""
        if self.how == "l2":
            return unit_rows(rows)
        if self.mean is not None and self.deviation is not None:
            return ((rows - self.mean) / self.deviation).astype(np.float32)
        return np.ascontiguousarray(rows, dtype=np.float32)


class FeatureRows:
    """Rows (N, D) float32 of an array, in the order of ``rows``."""

    def __init__(
        self,
        array: NDArray[Any],
        rows: NDArray[np.int64] | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        self._array = array
        self._rows = rows
        self._scaling = scaling or Scaling()
        self.dimension = int(array.shape[1])

    def __len__(self) -> int:
        return len(self._array) if self._rows is None else len(self._rows)

    @property
    def bytes(self) -> int:
        """What all rows would take in memory."""
        return 4 * len(self) * self.dimension

    @property
    def rows_a_block(self) -> int:
        """Rows of one block of :meth:`blocks`."""
        return max(1, BLOCK_BYTES // (4 * self.dimension))

    def block(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start`` to ``stop``."""
        if self._rows is None:
            return self._scaling.apply(self._array[start:stop])
        return self._scaling.apply(self._array[self._rows[start:stop]])

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """All rows, (n, D) at a time."""
        for start in range(0, len(self), self.rows_a_block):
            stop = min(start + self.rows_a_block, len(self))
            yield slice(start, stop), self.block(start, stop)

    def take(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some of the rows, (n, D)."""
        return self._scaling.apply(self._array[index if self._rows is None else self._rows[index]])

    def part(self, index: NDArray[np.int64]) -> FeatureRows:
        """Some of the rows as rows of their own."""
        chosen = index if self._rows is None else self._rows[index]
        return FeatureRows(self._array, chosen, self._scaling)

    def scaled(self, scaling: Scaling) -> FeatureRows:
        """The same rows with another scaling."""
        return FeatureRows(self._array, self._rows, scaling)


def fit_scaling(rows: FeatureRows, how: str) -> Scaling:
    """The scaling ``how`` of (unscaled) training rows; reads them once for ``standard``."""
    if how != "standard":
        return Scaling(how)
    count, mean, square = 0, np.zeros(rows.dimension), np.zeros(rows.dimension)
    for _, block in rows.blocks():
        # Chan's rule: sums of squares about a far origin would cancel.
        block_mean = block.mean(axis=0, dtype=np.float64)
        difference = block_mean - mean
        total = count + len(block)
        square += ((block - block_mean) ** 2).sum(axis=0)
        square += difference**2 * (count * len(block) / total)
        mean += difference * (len(block) / total)
        count = total
    deviation = np.sqrt(square / count)
    # A constant that float64 cannot sum exactly deviates by rounding, not by what float32 holds.
    deviation[deviation <= np.finfo(np.float32).eps * np.abs(mean)] = 1
    return Scaling(how, mean, deviation)
