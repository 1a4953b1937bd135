"""The epoch order: properties that training relies on."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.sampling import EpochOrder, Order, Permutation, WindowOrder

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any)


def order_of(counts: list[int], window: int, seed: int, epoch: int) -> Order:
    """Of windows of so many shards; 0: of the whole set."""
    videos = np.array(counts)
    return WindowOrder(videos, window, seed, epoch) if window else EpochOrder(videos, seed, epoch)


@settings(max_examples=80, deadline=None)
@given(
    counts=COUNTS,
    window=st.integers(0, 14),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 10**6),
)
def test_an_epoch_visits_every_video_once(
    counts: list[int], window: int, seed: int, epoch: int
) -> None:
    order = order_of(counts, window, seed, epoch)
    assert order.count == sum(counts)
    visited = order.at(range(order.count))
    np.testing.assert_array_equal(np.sort(visited), np.arange(sum(counts)))
    # One by one, in any order of asking, the same.
    some = np.random.default_rng(seed).permutation(order.count)[:5]
    for position in some:
        assert order.at([position])[0] == visited[position]


@pytest.mark.parametrize("window", [0, 3, 50])
def test_orders_differ_between_epochs_and_seeds_and_from_the_identity(window: int) -> None:
    counts = [10] * 50
    orders = [
        order_of(counts, window, seed, epoch).at(range(500))
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        # A random permutation has one fixed point on average; 10 would be a chance of 1e-7.
        assert (order == np.arange(500)).sum() < 10
        if window != 3:
            assert np.abs(np.diff(order)).mean() == pytest.approx(500 / 3, rel=0.15)


@pytest.mark.parametrize("window", [1, 3, 4, 11, 40])
def test_a_window_holds_the_videos_of_its_shards_alone(window: int) -> None:
    counts = [7, 0, 12, 1, 30, 5, 5, 9, 0, 14, 3]
    order = WindowOrder(np.array(counts), window, seed=3, epoch=2)
    shard_of = np.repeat(np.arange(len(counts)), counts)
    visited = shard_of[order.at(range(sum(counts)))]
    shards = order.shards_from(0)
    assert sorted(shards) == [s for s, n in enumerate(counts) if n]
    begin = 0
    for first in range(0, len(shards), window):
        members = shards[first : first + window]
        size = sum(counts[s] for s in members)
        assert set(visited[begin : begin + size]) == set(members)
        for position in range(begin, begin + size):
            np.testing.assert_array_equal(order.shards_from(position), shards[first:])
        begin += size
    assert begin == sum(counts)


def test_windows_mix_their_shards() -> None:
    order = WindowOrder(np.array([100] * 8), window=4, seed=0, epoch=0)
    first = order.at(range(400)) // 100
    changes = (first[1:] != first[:-1]).mean()
    assert changes == pytest.approx(3 / 4, abs=0.08)


@pytest.mark.parametrize("count", [10**9, 2**33 + 7, 2**62])
def test_billions_of_videos_need_no_list(count: int) -> None:
    order = EpochOrder(np.array([count]), seed=3, epoch=7)
    videos = order.at(np.arange(1000) * (count // 1000))
    assert len(np.unique(videos)) == 1000
    assert videos.min() >= 0
    assert videos.max() < count
    assert np.abs(np.diff(videos.astype(float))).mean() == pytest.approx(count / 3, rel=0.15)
    assert not hasattr(order, "__len__")
    held = [v for v in vars(order._permutation).values() if isinstance(v, np.ndarray)]
    assert sum(array.nbytes for array in held) < 100


def test_positions_outside_are_refused() -> None:
    for order in (order_of([3, 4], 0, 0, 0), order_of([3, 4], 1, 0, 0)):
        for position in (-1, 7):
            with pytest.raises(IndexError, match="out of range: N is 7"):
                order.at([0, position])
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"cannot permute {count} values"):
            Permutation(count, "x")


def test_every_position_is_equally_likely_to_hold_every_video() -> None:
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), EpochOrder(np.array([8]), 0, epoch).at(range(8))] += 1
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 90  # 49 degrees of freedom: p < 0.001


def test_following_videos_are_independent() -> None:
    """Pairs of neighbours in the order are as frequent as those of a true shuffle."""
    pairs = np.zeros((6, 6))
    for epoch in range(3000):
        for one, other in pairwise(EpochOrder(np.array([6]), 1, epoch).at(range(6))):
            pairs[one, other] += 1
    assert (np.diag(pairs) == 0).all()
    off = pairs[~np.eye(6, dtype=bool)]
    assert ((off - 500) ** 2 / 500).sum() < 62  # 29 degrees: p < 0.001
