"""Triplets: which three frames of a video are taken, and which end is the anchor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

ANCHOR_FIRST = 0
ANCHOR_LAST = 1
SAMPLINGS = ("uniform", "halves")
MIN_FRAMES = 3


@dataclass(frozen=True)
class Triplet:
    """Frame numbers within a video and the order label y of Eq. 4.

    ``anchor`` gives the query and k1; ``second`` < ``third`` in time give k2 and k3 (they may
    coincide under ``halves``). ``order`` is 0 when the anchor is before them, 1 when after.
    """

    anchor: int
    second: int
    third: int
    order: int

    @property
    def frames(self) -> tuple[int, int, int]:
        """(anchor, second, third)."""
        return self.anchor, self.second, self.third


def sample_generator(seed: int, epoch: int, key: str, purpose: str) -> np.random.Generator:
    """Random draws that depend on the run, the epoch and the video, never on who loads it.

    The video enters by its key rather than its number, so that adding shards to a set does not
    change the draws of the others.
    """
    digest = hashlib.sha256(f"seco/{purpose}/{seed}/{epoch}/{key}".encode()).digest()
    words = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
    return np.random.Generator(np.random.PCG64(words))


def sample_triplet(rng: np.random.Generator, frames: int, sampling: str) -> Triplet:
    """Draw a triplet from a video of ``frames`` stored frames.

    ``uniform`` (paper §4.1): three distinct frames at random, the first or the last in time is the
    anchor. ``halves`` (authors' code): the anchor from one half of the video, the other two from
    the other half, where they may coincide.

    Raises:
        ValueError: fewer than 3 frames, or an unknown sampling.
    """
    if frames < MIN_FRAMES:
        raise ValueError(f"a triplet needs {MIN_FRAMES} frames, the video has {frames}")
    order = int(rng.integers(2))
    if sampling == "uniform":
        first, middle, last = sorted(int(f) for f in rng.choice(frames, size=3, replace=False))
        if order == ANCHOR_FIRST:
            return Triplet(first, middle, last, order)
        return Triplet(last, first, middle, order)
    if sampling == "halves":
        half = frames // 2
        early, late = (0, half), (half, frames)
        anchor_range, others_range = (early, late) if order == ANCHOR_FIRST else (late, early)
        anchor = int(rng.integers(*anchor_range))
        second, third = sorted(int(f) for f in rng.integers(*others_range, size=2))
        return Triplet(anchor, second, third, order)
    raise ValueError(f"unknown sampling {sampling!r}")
