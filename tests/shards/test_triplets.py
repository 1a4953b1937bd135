"""Triplets and the random numbers they are drawn from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.sampling import (
    ANCHOR_FIRST,
    DRAWS,
    NEAR_DRAWS,
    Triplets,
    below,
    draw_near_triplet,
    draw_triplets,
    sample_starts,
    uniforms,
)


def drawn(count: int, frames: int, sampling: str, seed: int = 0) -> Triplets:
    uniform = np.random.default_rng(seed).random((count, DRAWS))
    return draw_triplets(uniform, np.full(count, frames), sampling)


@pytest.mark.parametrize("sampling", ["uniform", "halves"])
@pytest.mark.parametrize("frames", [3, 4, 7, 30])
def test_triplets_satisfy_their_label(sampling: str, frames: int) -> None:
    found = drawn(2000, frames, sampling)
    assert found.frames.min() == 0
    assert found.frames.max() == frames - 1
    for (anchor, second, third), order in zip(found.frames, found.order, strict=True):
        assert second <= third
        if order == ANCHOR_FIRST:
            assert anchor < second
        else:
            assert anchor > third
        if sampling == "uniform":
            assert len({anchor, second, third}) == 3
        else:
            assert (anchor < frames // 2) != (second < frames // 2)
            assert (second < frames // 2) == (third < frames // 2)
    assert found.order.mean() == pytest.approx(0.5, abs=0.05)
    assert set(found.frames.flat) == set(range(frames))


def test_uniform_draws_every_triplet_equally_often() -> None:
    found = drawn(8000, 5, "uniform", seed=1)
    counts = np.unique(found.frames, axis=0, return_counts=True)[1]
    assert len(counts) == 20  # 10 sets of frames, either end the anchor
    assert ((counts - 400) ** 2 / 400).sum() < 44  # 19 degrees: p < 0.001


def test_halves_draws_evenly_within_each_half() -> None:
    found = drawn(9000, 7, "halves", seed=2)
    early = found.frames[found.order == ANCHOR_FIRST]
    assert np.unique(early[:, 0], return_counts=True)[1] == pytest.approx([1500] * 3, rel=0.12)
    pairs = np.unique(early[:, 1:], axis=0, return_counts=True)[1]
    assert len(pairs) == 10  # 4 frames twice: 4 coincide, 6 differ
    expected = len(early) / 16 * np.array([1, 2, 2, 2, 1, 2, 2, 1, 2, 1])
    assert ((pairs - expected) ** 2 / expected).sum() < 28  # 9 degrees: p < 0.001


@settings(max_examples=200, deadline=None)
@given(
    gaps=st.lists(st.floats(0.0, 3.0), min_size=0, max_size=40),
    seconds=st.floats(0.01, 20.0),
    sampling=st.sampled_from(["uniform", "halves"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_near_triplets_span_no_more_than_they_may(
    gaps: list[float], seconds: float, sampling: str, seed: int
) -> None:
    times = np.cumsum([0.0, *gaps]).round(6)
    uniform = np.random.default_rng(seed).random(NEAR_DRAWS)
    found = draw_near_triplet(uniform, times, seconds, sampling)
    possible = any(c - a <= seconds + 1e-9 for a, c in zip(times, times[2:], strict=False))
    assert (found is not None) == possible
    if found is None:
        return
    (anchor, second, third), order = found
    assert min(anchor, second) >= 0 and max(anchor, third) < len(times)
    span = max(times[[anchor, third]]) - min(times[[anchor, second]])
    assert span <= seconds + 1e-9
    assert anchor < second if order == ANCHOR_FIRST else anchor > third
    assert second < third or (sampling == "halves" and second == third)


def test_near_triplets_are_equally_likely() -> None:
    times = np.array([0.0, 1.0, 2.0, 3.0, 9.0, 10.0, 11.0])
    rng = np.random.default_rng(0)
    found = [draw_near_triplet(rng.random(NEAR_DRAWS), times, 3.0, "uniform") for _ in range(6000)]
    sets = [tuple(sorted(one[0])) for one in found if one is not None]
    counts = np.unique(sets, axis=0, return_counts=True)[1]
    assert len(counts) == 5  # four of the first four frames, and the last three
    assert ((counts - 1200) ** 2 / 1200).sum() < 18.5  # 4 degrees: p < 0.001
    assert np.mean([one[1] for one in found if one is not None]) == pytest.approx(0.5, abs=0.03)


def test_a_wide_gap_draws_like_no_gap_from_the_same_frames() -> None:
    rng = np.random.default_rng(1)
    found = [
        draw_near_triplet(rng.random(NEAR_DRAWS), np.arange(5.0), 100.0, "uniform")
        for _ in range(8000)
    ]
    rows = [one[0] for one in found if one is not None]
    counts = np.unique(rows, axis=0, return_counts=True)[1]
    assert len(counts) == 20
    assert ((counts - 400) ** 2 / 400).sum() < 44


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="needs 3 frames, a video has 2"):
        drawn(3, 2, "uniform")
    with pytest.raises(ValueError, match="unknown sampling 'thirds'"):
        drawn(3, 5, "thirds")


def test_draws_depend_on_run_epoch_video_and_purpose_alone() -> None:
    def start(seed: int, epoch: int, key: str, purpose: str) -> int:
        return int(sample_starts(seed, epoch, [key], purpose)[0])

    one = start(0, 1, "a", "triplet")
    assert one == start(0, 1, "a", "triplet")
    others = {start(1, 1, "a", "triplet"), start(0, 2, "a", "triplet")}
    others |= {start(0, 1, "b", "triplet"), start(0, 1, "a", "views"), start(0, 11, "", "triplet")}
    assert len(others | {one}) == 6
    keys = [f"video_{n}" for n in range(50)]
    together = uniforms(sample_starts(0, 0, keys, "x"), 7)
    for row, key in enumerate(keys):
        alone = uniforms(sample_starts(0, 0, [key], "x"), 7)
        np.testing.assert_array_equal(together[row], alone[0])
    longer = uniforms(sample_starts(0, 0, keys, "x"), 20)
    np.testing.assert_array_equal(longer[:, :7], together)


def test_numbers_are_uniform_and_independent() -> None:
    keys = [f"video_{n}" for n in range(3000)]
    numbers = uniforms(sample_starts(5, 1, keys, "views"), 40)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    bins = np.histogram(numbers, 100, (0, 1))[0]
    assert ((bins - 1200) ** 2 / 1200).sum() < 150  # 99 degrees: p < 0.001
    # 780 pairs of columns; 4.5 deviations for the largest of them.
    assert np.abs(np.corrcoef(numbers.T) - np.eye(40)).max() < 4.5 / 3000**0.5
    rows = np.corrcoef(numbers[:100])
    assert np.abs(rows - np.eye(100)).max() < 5 / 40**0.5


def test_whole_numbers_stay_below_their_limit() -> None:
    almost = np.array([0.0, 0.5, np.nextafter(1, 0)])
    np.testing.assert_array_equal(below(almost, 3), [0, 1, 2])
    np.testing.assert_array_equal(below(almost, np.array([1, 2, 9])), [0, 1, 8])
