"""Which video stands at each position of an epoch, and which of its frames make a triplet.

Random numbers depend on the run, the epoch and the video, never on who draws them. They are
counter-based: number i of a sample is SplitMix64's i-th output from the sample's own start (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), so the numbers of a
whole batch are one numpy expression; a generator object per sample would cost 20 to 30 µs.

The order of an epoch is computed and never listed: any rank, worker or resumed run finds the video
at a position in O(1). It is a keyed pseudo-random permutation of 0 … N-1: a balanced Feistel
network over the next even number of bits, with cycle walking into the range (Black and Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002). A value outside is fed back, which takes
fewer than four rounds on average.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Golden-ratio step and the finaliser's constants; every output bit depends on every input bit.
_STREAM_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_TO_UNIT = np.uint64(11), 2.0**-53


def sample_starts(seed: int, epoch: int, keys: Sequence[str], purpose: str) -> NDArray[np.uint64]:
    """Return (n,) starts for the videos with these keys.

    A start depends on the video's key rather than its number, so adding shards to a dataset does
    not change the random numbers of the other videos.
    """
    before = hashlib.blake2b(f"seco/{purpose}/{seed}/{epoch}/".encode(), digest_size=8)
    digests = []
    for key in keys:
        digest = before.copy()
        digest.update(key.encode("utf-8", "surrogateescape"))
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def uniforms(starts: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Map (n,) starts to (n, count) numbers, uniform in [0, 1)."""
    counters = starts[:, None] + _STREAM_STEP * np.arange(1, count + 1, dtype=np.uint64)
    shift, scale = _TO_UNIT
    # numpy computes this modulo 2**64.
    numbers: NDArray[np.float64] = (mix(counters) >> shift) * scale
    return numbers


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's finaliser, a permutation of 64-bit numbers."""
    values = values ^ (values >> _SHIFTS[0])
    values *= _FIRST
    values ^= values >> _SHIFTS[1]
    values *= _SECOND
    values ^= values >> _SHIFTS[2]
    return values


def below(uniform: NDArray[np.float64], count: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Map uniform numbers in [0, 1) to whole numbers 0 … count - 1."""
    whole: NDArray[np.int64] = np.minimum((uniform * count).astype(np.int64), np.asarray(count) - 1)
    return whole


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Return ``wanted`` frame numbers from the first to the last of ``count``, or all if fewer.

    Rounds ``linspace``, as the authors' code does: places half-way between two frames, which only
    an odd ``wanted`` has, go where their float64 values put them. A single frame is the middle one.
    """
    if wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [count // 2]
    numbers: list[int] = np.linspace(0, count - 1, wanted).round().astype(int).tolist()
    return numbers


_ROUNDS = 6
_STEP = np.uint64(0x9E3779B97F4A7C15)


class Permutation:
    """A permutation of 0 … N-1; equal N and key give the same one on every machine.

    Args:
        count: N.
        key: any text; every key gives its own permutation.
    """

    def __init__(self, count: int, key: str) -> None:
        if count < 1:
            raise ValueError(f"cannot permute {count} values")
        self.count = count
        half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
        self._shift = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        digest = hashlib.sha256(key.encode()).digest()
        digest += hashlib.sha256(digest).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")[:_ROUNDS].astype(np.uint64)

    def __getitem__(self, position: int) -> int:
        """Return the value at a position, both in 0 … N-1."""
        return int(self.at([position])[0])

    def at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Map (n,) positions in 0 … N-1 to (n,) values, the same as one by one.

        Raises:
            IndexError: a position is out of range.
        """
        given = np.asarray(positions, dtype=np.int64)
        outside = (given < 0) | (given >= self.count)
        if outside.any():
            raise IndexError(f"position {given[outside][0]} is out of range: N is {self.count}")
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


class Order(Protocol):
    """An order of N videos."""

    count: int  # N

    def at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Map (n,) positions in 0 … N-1 to the (n,) videos there; raises IndexError outside."""

    def shards_from(self, position: int) -> NDArray[np.int64]:
        """Return the shards needed from this position on, in the order in which they are needed."""


class EpochOrder:
    """Any video may follow any other: for datasets whose shards are all at hand.

    Args:
        counts: (S,) videos of each shard; N is their sum.
        seed: the run's seed.
        epoch: its number; every epoch has its own order.
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

    For datasets whose shards are fetched: only a window's shards need to be at hand. Costs O(S) per
    epoch, for S shards.

    Args:
        counts: (S,) videos of each shard; N is their sum.
        window: W, shards per window.
        seed: the run's seed.
        epoch: its number.
    """

    def __init__(self, counts: NDArray[np.int64], window: int, seed: int, epoch: int) -> None:
        if window < 1:
            raise ValueError(f"a window needs at least one shard, not {window}")
        self.count = int(counts.sum())
        self._window = window
        self._name = f"seco-window-order/{seed}/{epoch}"
        shards = Permutation(len(counts), self._name).at(np.arange(len(counts)))
        self._shards = shards[counts[shards] > 0]
        first_of_shard = np.cumsum(counts) - counts
        self._first_video = first_of_shard[self._shards]
        # Position of each shard's first video in the new order of the shards, and the end of all.
        self._starts = np.concatenate([[0], np.cumsum(counts[self._shards])])

    def at(self, positions: ArrayLike) -> NDArray[np.int64]:
        given = np.asarray(positions, dtype=np.int64)
        outside = (given < 0) | (given >= self.count)
        if outside.any():
            raise IndexError(f"position {given[outside][0]} is out of range: N is {self.count}")
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
        """Return the first position of a window, and the one after its last."""
        first = window * self._window
        last = min(first + self._window, len(self._shards))
        return int(self._starts[first]), int(self._starts[last])


def substitute_position(place: int, batch_begin: int, batch_size: int, count: int) -> int:
    """Return the position of the video that replaces an unreadable one, outside its own batch.

    Args:
        place: row in the batch + (attempt - 1) · batch size; attempts count from 1.
        batch_begin: position of the batch's first row.
        batch_size: B.
        count: N, positions per epoch.

    Returns:
        The same place in the ``attempt``-th next batch. Past the end of the epoch, it continues at
        the beginning, shifted by one place.
    """
    others = count - batch_size
    if others:
        rounds, place = divmod(place, others)
        position = batch_begin + batch_size + (place + rounds) % others
    else:  # the batch is the whole epoch
        attempt, row = divmod(place, batch_size)
        position = batch_begin + row + attempt + 1
    return position % count


ANCHOR_FIRST = 0
ANCHOR_LAST = 1
SAMPLINGS = ("uniform", "halves")
MIN_FRAMES = 3
DRAWS = 4  # uniform numbers per triplet
NEAR_DRAWS = 5  # with a largest distance

Integers = NDArray[np.int64]


class Triplets(NamedTuple):
    """Frame numbers within n videos and the order labels y of Eq. 4.

    ``frames[:, 0]`` is the anchor and gives the query and k1; the other two, in time order, give k2
    and k3 (they may coincide under ``halves``). ``order`` is 0 if the anchor is before them, 1 if
    after.
    """

    frames: Integers  # (n, 3)
    order: Integers  # (n,)


def draw_triplets(uniform: NDArray[np.float64], frame_counts: Integers, sampling: str) -> Triplets:
    """Draw one triplet from each of n videos.

    ``uniform`` (paper §4.1): three distinct random frames; the first or the last in time is the
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
        raise ValueError(f"a triplet needs {MIN_FRAMES} frames, a video has {frame_counts.min()}")
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


def draw_near_triplet(
    uniform: NDArray[np.float64], times: NDArray[np.float64], seconds: float, sampling: str
) -> tuple[list[int], int] | None:
    """Draw a triplet from one video, none of whose frames are further apart than ``seconds``.

    ``uniform``: every such set of three frames is equally likely. ``halves``: the frames come from
    the halves of a stretch of that length, which begins at any frame that leaves three.

    Args:
        uniform: (5,) numbers in [0, 1).
        times: (F,) seconds of the stored frames, not decreasing.
        seconds: from the first frame to the last.
        sampling: as for :func:`draw_triplets`.

    Returns:
        Frame numbers and order as in :class:`Triplets`; None if no three frames are so near.
    """
    # A nanosecond for the rounding of decimal times.
    last = np.searchsorted(times, times + seconds + 1e-9, side="right") - 1
    after = last - np.arange(len(times))  # frames that may follow each as the first
    sets = after * (after - 1) // 2 if sampling == "uniform" else (after >= 2).astype(np.int64)
    totals = np.cumsum(sets)
    if not len(times) or not totals[-1]:
        return None
    first = int(np.searchsorted(totals, below(uniform[4:], int(totals[-1]))[0], side="right"))
    if sampling == "halves":
        drawn = draw_triplets(uniform[None, :4], after[first : first + 1] + 1, sampling)
        frames, order = drawn.frames[0] + first, int(drawn.order[0])
        return frames.tolist(), order
    order = int(uniform[0] >= 0.5)
    two = int(below(uniform[1:2], after[first : first + 1])[0])
    three = int(below(uniform[2:3], after[first : first + 1] - 1)[0])
    three += three >= two
    near = [first, first + 1 + min(two, three), first + 1 + max(two, three)]
    return (near[2:] + near[:2] if order == ANCHOR_LAST else near), order


def _three_distinct(uniform: NDArray[np.float64], frame_counts: Integers) -> Integers:
    """Draw (n, 3) frames in time order, every set of three equally likely."""
    one = below(uniform[:, 0], frame_counts)
    two = below(uniform[:, 1], frame_counts - 1)
    two += two >= one  # skips the first …
    low, high = np.minimum(one, two), np.maximum(one, two)
    three = below(uniform[:, 2], frame_counts - 2)
    three += three >= low  # … and skips both
    three += three >= high
    return np.sort(np.column_stack([low, high, three]), axis=1)
