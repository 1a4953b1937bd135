"""The order of an epoch: a keyed pseudo-random permutation computed point by point.

Position p of epoch e maps to a video without any list being built, whatever the number of ranks
and workers. The permutation is a balanced Feistel network over the next even number of bits, with
cycle walking into 0 … N-1 (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
2002): each step outside the range is fed back, which on average takes fewer than four rounds.
"""

from __future__ import annotations

import hashlib

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


class EpochOrder:
    """The order in which an epoch visits N videos.

    Args:
        count: N, the number of videos.
        seed: the run's seed.
        epoch: its number; every epoch has an order of its own.
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        if count < 1:
            raise ValueError(f"an order of {count} videos")
        self.count = count
        self._half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        digest = hashlib.sha256(f"seco-epoch-order/{seed}/{epoch}".encode()).digest()
        digest += hashlib.sha256(digest).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """The video at a position, both in 0 … N-1."""
        if not 0 <= position < self.count:
            raise IndexError(f"position {position} of {self.count}")
        value = position
        while True:
            value = self._permute(value)
            if value < self.count:
                return value

    def _permute(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right


def _mix(value: int) -> int:
    """The finaliser of SplitMix64: every output bit depends on every input bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
