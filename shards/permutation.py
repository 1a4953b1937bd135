"""A keyed pseudo-random permutation of 0 … N-1, computed point by point without any list.

A balanced Feistel network over the next even number of bits, with cycle walking into 0 … N-1
(Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): each value outside the
range is fed back, which on average takes fewer than four rounds.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.draws import mix

_ROUNDS = 6
_STEP = np.uint64(0x9E3779B97F4A7C15)


class Permutation:
    """A permutation of 0 … N-1; equal N and key give the same one on every machine.

    Args:
        count: N.
        key: any text; every key has a permutation of its own.
    """

    def __init__(self, count: int, key: str) -> None:
        if count < 1:
            raise ValueError(f"a permutation of {count} values")
        self.count = count
        half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
        self._shift = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        digest = hashlib.sha256(key.encode()).digest()
        digest += hashlib.sha256(digest).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")[:_ROUNDS].astype(np.uint64)

    def __getitem__(self, position: int) -> int:
        """Where a position is sent, both in 0 … N-1."""
        return int(self.at([position])[0])

    def at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """(n,) positions in 0 … N-1 to (n,) values, the same as one by one.

        Raises:
            IndexError: a position outside.
        """
        given = np.asarray(positions, dtype=np.int64)
        outside = (given < 0) | (given >= self.count)
        if outside.any():
            raise IndexError(f"position {given[outside][0]} of {self.count}")
        values = self._permute(given.astype(np.uint64))
        while len(astray := np.flatnonzero(values >= np.uint64(self.count))):
            values[astray] = self._permute(values[astray])
        return values.astype(np.int64)

    def _permute(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._shift, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix((right ^ key) + _STEP) & self._mask)
        permuted: NDArray[np.uint64] = (left << self._shift) | right
        return permuted
