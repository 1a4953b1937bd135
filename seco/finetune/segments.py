"""Which frames of a video make a clip, in fine-tuning and its test (authors' code). No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.draws import below

Integers = NDArray[np.int64]


def segment_frames(uniform: NDArray[np.float64], counts: Integers) -> Integers:
    """A random frame of each of T equal segments.

    A segment is of ``count // T`` frames, so the last few frames of a video belong to none. Of a
    video with fewer than T frames, T frames evenly spaced, some of them more than once.

    Args:
        uniform: (n, T) numbers in [0, 1).
        counts: (n,) stored frames of each video.

    Returns:
        (n, T) frame numbers in time order.
    """
    segments = uniform.shape[1]
    length = counts // segments
    number = np.arange(segments)
    inside = below(uniform, length[:, None].clip(min=1)) + number * length[:, None]
    spread = _spread(counts, segments)
    return np.where(length[:, None] > 0, inside, spread)


def segment_middles(count: int, segments: int) -> list[int]:
    """The middle frame of each segment: what :func:`segment_frames` draws around."""
    length = count // segments
    if not length:
        spread: list[int] = _spread(np.array([count]), segments)[0].tolist()
        return spread
    return [number * length + length // 2 for number in range(segments)]


def _spread(counts: Integers, segments: int) -> Integers:
    """(n, T) frames of videos that have fewer than T."""
    spread: Integers = np.arange(segments) * (counts[:, None] - 1) // segments
    return spread


def clip_starts(count: int, clips: int, clip_frames: int) -> list[int]:
    """Where the clips of a test video begin: clip i of n at floor((count - frames) · i / n).

    So the last clip ends before the video does, as in the authors' code. A video that is no longer
    than a clip is one clip, of all its frames, ``clips`` times (the authors' code refuses shorter
    ones, of 15 frames or fewer).
    """
    return [max(0, count - clip_frames) * number // clips for number in range(clips)]
