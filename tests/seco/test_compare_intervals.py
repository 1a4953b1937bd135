"""Intervals of ``seco compare``: how often they hold the truth, and what they decide."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from seco.evaluation.intervals import BETTER, UNDECIDED, WORSE, GroupBootstrap, Interval, decide

SIMULATIONS = 150
RESAMPLES = 2000


def outcomes(
    rng: np.random.Generator, bias: tuple[float, float], draws: int
) -> tuple[list[str], list[NDArray[np.float64]]]:
    """Groups of 150 or so videos, and what two encoders get right of them (draws, M).

    Videos of a group are alike in how hard they are, and draws of labels in how good they are; the
    probability of being right is that of a normal variable of variance 2 above -bias.
    """
    sizes = 1 + rng.poisson(rng.gamma(2.0, 2.0, size=35))
    place = np.repeat(np.arange(35), sizes)
    common = 0.8 * rng.standard_normal(35)[place] + 0.5 * rng.standard_normal(len(place))
    found = []
    for mean in bias:
        luck = (0.3 if draws > 1 else 0.0) * rng.standard_normal((draws, 1))
        own = 0.5 * rng.standard_normal(len(place))
        variance = 2 - 0.8**2 - 0.5**2 - 0.5**2 - (0.3**2 if draws > 1 else 0)
        noise = np.sqrt(variance) * rng.standard_normal((draws, len(place)))
        found.append((mean + common + own + luck + noise > 0).astype(np.float64))
    return [f"group {number}" for number in place], found


def expected(bias: float) -> float:
    """The probability of being right, by the normal distribution."""
    return NormalDist(0, np.sqrt(2)).cdf(bias)


def held(bias: tuple[float, float], draws: int, grouped: bool = True) -> tuple[float, list[str]]:
    """How often the interval holds the true difference, and all verdicts."""
    truth = expected(bias[0]) - expected(bias[1])
    hits, verdicts = 0, []
    for seed in range(SIMULATIONS):
        groups, (first, second) = outcomes(np.random.default_rng(seed), bias, draws)
        if not grouped:
            groups = [str(number) for number in range(len(groups))]
        interval = GroupBootstrap(groups, RESAMPLES, seed).mean(first - second, -1, 1)
        assert interval.low is not None and interval.high is not None
        hits += interval.low <= truth <= interval.high
        verdicts.append(decide(interval, 35)[0])
    return hits / SIMULATIONS, verdicts


# 150 draws at 95 %: below 0.895 or above 0.994 with a probability of less than a thousandth each.
@pytest.mark.parametrize("draws", [1, 10])
def test_intervals_hold_a_known_difference_as_often_as_they_say(draws: int) -> None:
    share, verdicts = held((0.7, 0.2), draws)
    assert 0.895 < share < 0.995
    assert verdicts.count(BETTER) > 0.5 * SIMULATIONS
    assert WORSE not in verdicts


def test_equally_good_encoders_cannot_be_told_apart() -> None:
    share, verdicts = held((0.4, 0.4), 1)
    assert 0.895 < share < 0.995
    assert verdicts.count(UNDECIDED) > 0.895 * SIMULATIONS


def test_an_encoders_own_value_is_held_and_videos_in_place_of_groups_would_not_do() -> None:
    truth, hits = expected(0.4), {True: 0, False: 0}
    for seed in range(SIMULATIONS):
        groups, (first, _) = outcomes(np.random.default_rng(seed), (0.4, 0.4), 1)
        for grouped in hits:
            names = groups if grouped else [str(number) for number in range(len(groups))]
            interval = GroupBootstrap(names, RESAMPLES, seed).mean(first, 0, 1)
            assert interval.low is not None and interval.high is not None
            assert interval.value == first.mean()
            hits[grouped] += interval.low <= truth <= interval.high
    assert 0.895 < hits[True] / SIMULATIONS < 0.995
    assert hits[False] / SIMULATIONS < 0.88


def test_copies_are_never_told_apart_and_a_few_videos_are_not_enough() -> None:
    groups = [str(number // 4) for number in range(120)]
    bootstrap = GroupBootstrap(groups, RESAMPLES, 0)
    same = bootstrap.mean(np.zeros((1, 120)), -1, 1)
    assert same.value == 0 and decide(same, 30) == (
        UNDECIDED,
        "the interval of the difference holds 0",
    )
    verdicts = []
    for videos in (3, 5, 12):
        won = np.zeros((1, 120))
        won[0, : 4 * videos : 4] = 1  # each in another group
        verdicts.append(decide(bootstrap.mean(won, -1, 1), 30)[0])
        assert decide(bootstrap.mean(-won, -1, 1), 30)[0] == verdicts[-1].replace(BETTER, WORSE)
    # A sign test needs six of six.
    assert verdicts == [UNDECIDED, UNDECIDED, BETTER]


def test_few_groups_decide_nothing() -> None:
    verdict, reason = decide(Interval(0.5, 0.4, 0.6), 9)
    assert verdict == UNDECIDED and "9 groups" in reason and "10" in reason
    assert decide(Interval(0.5, 0.4, 0.6), 10) == (BETTER, "")
    assert decide(Interval(-0.5, -0.6, -0.4), 10) == (WORSE, "")
    alone = GroupBootstrap(["a"] * 20, RESAMPLES, 0)
    assert alone.mean(np.ones((1, 20)), 0, 1) == Interval(1.0, None, None)
    assert decide(Interval(0.5, None, None), 1)[0] == UNDECIDED


def test_an_interval_does_not_depend_on_those_before_and_values_stay_within_bounds() -> None:
    rng = np.random.default_rng(0)
    groups = [str(n) for n in rng.integers(20, size=100)]
    right = (rng.random((5, 100)) < 0.97).astype(float)
    bootstrap = GroupBootstrap(groups, RESAMPLES, 3)
    first = bootstrap.mean(right, 0, 1)
    bootstrap.mean(right[:1], 0, 1)
    bootstrap.of_influence(0.0, rng.standard_normal(20))
    assert bootstrap.mean(right, 0, 1) == first == GroupBootstrap(groups, 2000, 3).mean(right, 0, 1)
    assert GroupBootstrap(groups, RESAMPLES, 4).mean(right, 0, 1) != first
    perfect = bootstrap.mean(np.ones((1, 100)), 0, 1)
    assert perfect.value == perfect.high == 1 and perfect.low is not None and 0.9 < perfect.low < 1


def test_many_groups_are_gathered_into_blocks_with_the_same_interval() -> None:
    rng = np.random.default_rng(1)
    groups = [str(n // 2) for n in range(6000)]
    right = (rng.random((1, 6000)) < 0.7).astype(float)
    gathered = GroupBootstrap(groups, RESAMPLES, 0)
    assert gathered.groups == 3000 and len(gathered.sizes) == 1000
    for n in range(0, 6000, 2):
        assert gathered.blocks[n] == gathered.blocks[n + 1]
    whole = GroupBootstrap(groups, RESAMPLES, 0, most_blocks=3000).mean(right, 0, 1)
    few = gathered.mean(right, 0, 1)
    assert few.low == pytest.approx(whole.low, abs=0.002)
    assert few.high == pytest.approx(whole.high, abs=0.002)
