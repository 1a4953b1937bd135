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
_SQUARED = 1e-15, 1e15  # lengths whose squares float32 holds well


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


class FeatureMatrix:
    """Rows (N, D) float32 of an array, in the order of ``rows``.

    Args:
        array: (V, D); may be memory-mapped.
        rows: (N,) which of them; all if not given.
        scaling: how they are given out.
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
        """What all rows would take in memory."""
        return 4 * len(self) * self.dimension

    @property
    def rows_a_block(self) -> int:
        """Rows of one block of :meth:`blocks`."""
        return max(1, BLOCK_BYTES // (4 * self.dimension))

    def block(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start`` to ``stop``."""
        wanted = slice(start, stop) if self.rows is None else self.rows[start:stop]
        return self._scaling.apply(self.array[wanted])

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """All rows, (n, D) at a time."""
        for start in range(0, len(self), self.rows_a_block):
            stop = min(start + self.rows_a_block, len(self))
            block = self.block(start, stop)
            release(self.array)
            yield slice(start, stop), block

    def take(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some of the rows, (n, D), in the order asked for."""
        return self._scaling.apply(self.array[index if self.rows is None else self.rows[index]])

    def part(self, index: NDArray[np.int64]) -> FeatureMatrix:
        """Some of the rows as a matrix of their own."""
        chosen = index if self.rows is None else self.rows[index]
        return FeatureMatrix(self.array, chosen, self._scaling)

    def scaled(self, scaling: Scaling) -> FeatureMatrix:
        """The same rows with another scaling."""
        return FeatureMatrix(self.array, self.rows, scaling)

    def sample(self, count: int, seed: int) -> Iterator[NDArray[np.float32]]:
        """``count`` random rows, or all, in blocks and in their order, which disks like."""
        rng = np.random.Generator(np.random.PCG64(seed))
        chosen = np.sort(rng.permutation(len(self))[:count])
        # Scattered rows bring their neighbours on the disk along: fewer at a time.
        at_once = max(1, self.rows_a_block // 4)
        for start in range(0, len(chosen), at_once):
            block = self.take(chosen[start : start + at_once])
            release(self.array)
            yield block


def unit_vectors(array: NDArray[Any], rows: NDArray[np.int64] | None = None) -> FeatureMatrix:
    """Rows (N, D) of length 1, whose products are cosines."""
    return FeatureMatrix(array, rows, Scaling("l2"))


def fit_scaling(rows: FeatureMatrix, how: str) -> Scaling:
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


def unit_rows(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows (V, D) of length 1, contiguous, of finite ones; rows of zeros stay zero."""
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
    """Give the pages of a memory-mapped array back; they are read again when they are needed.

    The system would do so by itself, but not before memory is short, and a process that went
    through a file would seem to hold all of it. Other arrays are left alone.
    """
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    # Not what may be written: the pages of a private mapping are all there is of its changes.
    if not array.flags.writeable and isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
