"""Triplets: which three frames of a video are taken, and which end is the anchor."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.draws import below

ANCHOR_FIRST = 0
ANCHOR_LAST = 1
SAMPLINGS = ("uniform", "halves")
MIN_FRAMES = 3
DRAWS = 4  # uniform numbers a triplet takes

Integers = NDArray[np.int64]


class Triplets(NamedTuple):
    """Frame numbers within n videos and the order labels y of Eq. 4.

    ``frames[:, 0]`` is the anchor and gives the query and k1; the other two, in time order, give k2
    and k3 (they may coincide under ``halves``). ``order`` is 0 when the anchor is before them, 1
    when after.
    """

    frames: Integers  # (n, 3)
    order: Integers  # (n,)


def draw_triplets(uniform: NDArray[np.float64], frame_counts: Integers, sampling: str) -> Triplets:
    """Draw a triplet from each of n videos.

    ``uniform`` (paper §4.1): three distinct frames at random, the first or the last in time is the
    anchor. ``halves`` (authors' code): the anchor from one half of the video, the other two from
    the other half, where they may coincide.

    Args:
        uniform: (n, 4) numbers in [0, 1).
        frame_counts: (n,) stored frames of each video.
        sampling: ``uniform`` or ``halves``.

    Raises:
        ValueError: fewer than 3 frames, or an unknown sampling.
    """
    if len(frame_counts) and frame_counts.min() < MIN_FRAMES:
        raise ValueError(f"a triplet needs {MIN_FRAMES} frames, one has {frame_counts.min()}")
    order = (uniform[:, 0] >= 0.5).astype(np.int64)
    if sampling == "uniform":
        frames = _three_distinct(uniform[:, 1:], frame_counts)
        anchor_last = frames[:, [2, 0, 1]]
        return Triplets(np.where((order == ANCHOR_LAST)[:, None], anchor_last, frames), order)
    if sampling == "halves":
        half = frame_counts // 2
        rest = frame_counts - half
        first = order == ANCHOR_FIRST
        anchor = below(uniform[:, 1], np.where(first, half, rest)) + np.where(first, 0, half)
        size, start = np.where(first, rest, half), np.where(first, half, 0)
        others = np.sort(below(uniform[:, 2:], size[:, None]) + start[:, None], axis=1)
        return Triplets(np.column_stack([anchor, others]), order)
    raise ValueError(f"unknown sampling {sampling!r}")


def _three_distinct(uniform: NDArray[np.float64], frame_counts: Integers) -> Integers:
    """(n, 3) frames in time order, every set of three equally likely."""
    one = below(uniform[:, 0], frame_counts)
    two = below(uniform[:, 1], frame_counts - 1)
    two += two >= one  # counted without the first …
    low, high = np.minimum(one, two), np.maximum(one, two)
    three = below(uniform[:, 2], frame_counts - 2)
    three += three >= low  # … and without both
    three += three >= high
    return np.sort(np.column_stack([low, high, three]), axis=1)
