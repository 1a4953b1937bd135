"""Feature vectors of any number, read a block at a time: the memory needed does not grow."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seco.features.unit_rows import unit_rows

BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Vectors:
    """Rows of an array that may be memory-mapped; given out in float32 with length 1.

    Args:
        array: (V, D).
        rows: which rows count, as positions 0 … N-1; all if not given.
    """

    array: NDArray[np.float32]
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.array if self.rows is None else self.rows)

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.array.shape[1])

    @property
    def block_rows(self) -> int:
        """Rows a block of :meth:`blocks` has."""
        return max(1, BLOCK_BYTES // (4 * self.dimension))

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The position of each block's first row, and the block (B, D)."""
        for start in range(0, len(self), self.block_rows):
            stop = min(start + self.block_rows, len(self))
            wanted = slice(start, stop) if self.rows is None else self.rows[start:stop]
            block = unit_rows(self.array[wanted])
            release(self.array)
            yield start, block

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """(P, D), in the order asked for."""
        wanted = positions if self.rows is None else self.rows[positions]
        return unit_rows(self.array[wanted])

    def sample(self, count: int, seed: int) -> Iterator[NDArray[np.float32]]:
        """``count`` random rows, or all, in blocks and in their order, which disks like."""
        rng = np.random.Generator(np.random.PCG64(seed))
        chosen = np.sort(rng.permutation(len(self))[:count])
        # Scattered rows bring their neighbours on the disk along: fewer at a time.
        at_once = max(1, self.block_rows // 8)
        for start in range(0, len(chosen), at_once):
            block = self.take(chosen[start : start + at_once])
            release(self.array)
            yield block


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
