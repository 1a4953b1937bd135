"""Chosen rows of a feature array, read a block at a time and scaled on the way.

The array may be larger than memory (``features.npy``, memory-mapped): nothing here holds more of
it than was asked for.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 32 << 20
_SQUARED = 1e-15, 1e15  # range of lengths whose squares are accurate in float32


class FeaturesTooLarge(ValueError):
    """The squares of the features exceed float32."""


@dataclass(frozen=True)
class Scaling:
    """Feature scaling: ``none``, ``l2`` (rows of length 1) or ``standard`` (mean 0, variance 1).

    ``mean`` and ``deviation`` (D,) float64 are those of the training rows' columns (``standard``
    only).
    """

    how: str = "none"
    mean: NDArray[np.float64] | None = None
    deviation: NDArray[np.float64] | None = None

    def apply(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Scale rows (n, D); rows of zeros and constant columns become zero."""
        if self.how == "l2":
            return unit_rows(rows)
        if self.mean is not None and self.deviation is not None:
            return ((rows - self.mean) / self.deviation).astype(np.float32)
        return np.ascontiguousarray(rows, dtype=np.float32)


class FeatureMatrix:
    """Rows (N, D) of an array as float32, in the order of ``rows``.

    Args:
        array: (V, D); may be memory-mapped.
        rows: (N,) row numbers; None: all.
        scaling: applied to the rows on access.
    """

    def __init__(
        self,
        array: NDArray[Any],
        rows: NDArray[np.int64] | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        self.array = array
        self.rows = rows
        self._scaling = scaling or Scaling()
        self.dimension = int(array.shape[1])

    def __len__(self) -> int:
        return len(self.array if self.rows is None else self.rows)

    @property
    def bytes(self) -> int:
        """Size of all rows in memory."""
        return 4 * len(self) * self.dimension

    @property
    def rows_a_block(self) -> int:
        """Rows per block of :meth:`blocks`."""
        return max(1, BLOCK_BYTES // (4 * self.dimension))

    def block(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows ``start`` … ``stop`` - 1."""
        wanted = slice(start, stop) if self.rows is None else self.rows[start:stop]
        return self._scaling.apply(self.array[wanted])

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield all rows in blocks (n, D)."""
        for start in range(0, len(self), self.rows_a_block):
            stop = min(start + self.rows_a_block, len(self))
            block = self.block(start, stop)
            release(self.array)
            yield slice(start, stop), block

    def take(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows by index, (n, D), in the order of ``index``."""
        return self._scaling.apply(self.array[index if self.rows is None else self.rows[index]])

    def part(self, index: NDArray[np.int64]) -> FeatureMatrix:
        """Return a matrix of some of the rows."""
        chosen = index if self.rows is None else self.rows[index]
        return FeatureMatrix(self.array, chosen, self._scaling)

    def scaled(self, scaling: Scaling) -> FeatureMatrix:
        """Return the same rows with another scaling."""
        return FeatureMatrix(self.array, self.rows, scaling)

    def sample(self, count: int, seed: int) -> Iterator[NDArray[np.float32]]:
        """Yield ``count`` random rows (at most all) in blocks, sorted for sequential reads."""
        rng = np.random.Generator(np.random.PCG64(seed))
        chosen = np.sort(rng.permutation(len(self))[:count])
        # Smaller blocks: reading scattered rows also brings their neighbours on disk into memory.
        at_once = max(1, self.rows_a_block // 4)
        for start in range(0, len(chosen), at_once):
            block = self.take(chosen[start : start + at_once])
            release(self.array)
            yield block


def unit_vectors(array: NDArray[Any], rows: NDArray[np.int64] | None = None) -> FeatureMatrix:
    """Return rows (N, D) scaled to length 1, whose products are cosines."""
    return FeatureMatrix(array, rows, Scaling("l2"))


def fit_scaling(rows: FeatureMatrix, how: str) -> Scaling:
    """Fit the scaling ``how`` to (unscaled) training rows; ``standard`` reads them once."""
    if how != "standard":
        return Scaling(how)
    count, mean, square = 0, np.zeros(rows.dimension), np.zeros(rows.dimension)
    for _, block in rows.blocks():
        # Chan's algorithm: plain sums of squares cancel if the mean is far from 0.
        block_mean = block.mean(axis=0, dtype=np.float64)
        difference = block_mean - mean
        total = count + len(block)
        square += ((block - block_mean) ** 2).sum(axis=0)
        square += difference**2 * (count * len(block) / total)
        mean += difference * (len(block) / total)
        count = total
    deviation = np.sqrt(square / count)
    # The sum of a constant column may round, which must not count as a deviation.
    deviation[deviation <= np.finfo(np.float32).eps * np.abs(mean)] = 1
    return Scaling(how, mean, deviation)


def unit_rows(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale finite rows (V, D) to length 1, contiguous; rows of zeros stay zero."""
    x = np.ascontiguousarray(features, dtype=np.float32)
    with np.errstate(over="ignore"):
        length = np.linalg.norm(x, axis=1, keepdims=True)
    odd = np.flatnonzero(~((length > _SQUARED[0]) & (length < _SQUARED[1])).all(axis=1))
    if len(odd):
        largest = np.abs(x[odd]).max(axis=1, keepdims=True, initial=0)
        x = x.copy()
        x[odd] = np.divide(x[odd], largest, out=np.zeros_like(x[odd]), where=largest > 0)
        length[odd] = np.linalg.norm(x[odd], axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    return unit


def release(array: NDArray[np.float32]) -> None:
    """Release the pages of a memory-mapped array; they are read again when needed.

    The system does this only when memory is short, so a process that has read a whole file would
    seem to hold all of it. Other arrays are left alone.
    """
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    # Never a writable array: dropping the pages of a private mapping would lose its changes.
    if not array.flags.writeable and isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
