"""95 % intervals by a bootstrap over groups of videos, and what they decide.

Clips of one recording are alike, so that groups are drawn, not videos. The plain percentile
bootstrap is too narrow for few groups, and certain where a handful of videos differ. Two remedies,
whose coverage is measured in ``benchmarks/results/compare.md``:

* deviations are widened as Student's t widens the normal distribution, with the effective number of
  groups (Σ n)² / Σ n² for groups of n videos, less one, as degrees of freedom;
* two made-up videos, one with the highest and one with the lowest value, are drawn like groups of
  their own (after Agresti and Coull 1998, Agresti and Min 2005); the estimate is without them.

Where a value is the mean over draws of the labelled videos, the draws are resampled as well, and
the intervals are about the mean over all possible draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
FEWEST_GROUPS = 10  # with fewer, every verdict is undecided
MOST_BLOCKS = 1000
BETTER, WORSE, UNDECIDED = "better", "worse", "cannot be told"
HOLDS_ZERO = "the interval of the difference holds 0"


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; ``low`` and ``high`` are None for a single group."""

    value: float
    low: float | None
    high: float | None


class GroupBootstrap:
    """Bootstrap over the groups of M videos; all measures on these videos share the resamples.

    Args:
        groups: (M,) the group of each video.
        resamples: number of resamples.
        seed: seed of the resamples.
        most_blocks: if there are more groups, they are merged at random into this many blocks,
            which are resampled instead.
    """

    def __init__(
        self, groups: Sequence[str], resamples: int, seed: int, most_blocks: int = MOST_BLOCKS
    ) -> None:
        names, blocks = np.unique(np.asarray(groups), return_inverse=True)
        self.groups = len(names)
        self._seed = seed
        if self.groups > most_blocks:
            blocks = self._generator(0).permutation(self.groups)[blocks] % most_blocks
        self.blocks = blocks.astype(np.int64)  # (M,)
        self.sizes = np.bincount(self.blocks).astype(np.float64)
        self.resamples = resamples
        effective = max(2.0, self.sizes.sum() ** 2 / (self.sizes**2).sum())
        self._widening = _student(self._generator(1), effective, resamples)
        self._counts: dict[int, Floats] = {}

    def mean(self, outcomes: NDArray[Any], lowest: float, highest: float) -> Interval:
        """The mean of outcomes (R, M) over R draws of the labelled videos, within the bounds."""
        by_block: Floats = np.stack(
            [np.bincount(self.blocks, row.astype(np.float64)) for row in outcomes]
        )
        total = self.sizes.sum()
        means = by_block.sum(axis=1) / total  # (R,)
        value = float(means.mean())
        if self.groups < 2:
            return Interval(value, None, None)
        sums = np.append(by_block.mean(axis=0), (lowest, highest))
        sizes = np.append(self.sizes, (1.0, 1.0))
        counts = self._drawn(len(sizes))
        drawn = (counts @ sums) / (counts @ sizes) - sums.sum() / sizes.sum()
        deviations = drawn * self._widening + self._between_draws(by_block, means)
        low, high = (float(x) for x in np.clip(value + _ends(deviations), lowest, highest))
        return Interval(value, low, high)

    def _between_draws(self, by_block: Floats, means: Floats) -> Floats | float:
        """Deviations due to the choice of labelled videos, from sums (R, blocks) and means (R,).

        The means of R draws differ also because each draw errs on different test videos. The
        resampled groups cover that part already, so it is removed: it is the variance that rows
        and columns of ``by_block`` leave unexplained.
        """
        draws = len(means)
        if draws == 1:
            return 0.0
        away = means - means.mean()
        variance = (away**2).sum() / (draws * (draws - 1))
        if variance == 0:
            return 0.0
        expected = by_block.mean(axis=0) + away[:, None] * self.sizes
        blocks = len(self.sizes)
        unexplained = ((by_block - expected) ** 2).sum() * blocks / (blocks - 1)
        unexplained /= self.sizes.sum() ** 2 * draws * (draws - 1)
        kept = np.sqrt(max(0.0, 1 - unexplained / variance))
        rng = self._generator(2, draws)
        picked = rng.multinomial(draws, np.full(draws, 1 / draws), size=self.resamples)
        widening = _student(rng, draws, self.resamples)
        deviations: Floats = (picked @ away) / draws * widening * kept
        return deviations

    def of_influence(self, value: float, influence: Floats) -> Interval:
        """The interval of a value that is not a mean, from the influence of each block on it.

        Args:
            influence: (blocks,) jackknife pseudo-values minus their mean.
        """
        if self.groups < 2:
            return Interval(value, None, None)
        counts = self._drawn(len(influence))
        deviations = (counts @ influence) / len(influence) * self._widening
        low, high = (float(x) for x in value + _ends(deviations))
        return Interval(value, low, high)

    def _drawn(self, blocks: int) -> Floats:
        """(resamples, blocks) how often each block is drawn."""
        if blocks not in self._counts:
            shares = np.full(blocks, 1 / blocks)
            drawn = self._generator(3, blocks).multinomial(blocks, shares, size=self.resamples)
            self._counts[blocks] = drawn.astype(np.float64)
        return self._counts[blocks]

    def _generator(self, *use: int) -> np.random.Generator:
        """A generator per use, so that no interval depends on which others were computed."""
        return np.random.Generator(np.random.PCG64([self._seed, *use]))


def decide(difference: Interval, groups: int) -> tuple[str, str]:
    """The verdict on a difference, and the reason if it is undecided."""
    if groups < FEWEST_GROUPS or difference.low is None or difference.high is None:
        return UNDECIDED, f"{groups} groups of videos; at least {FEWEST_GROUPS} are needed"
    if difference.low > 0:
        return BETTER, ""
    if difference.high < 0:
        return WORSE, ""
    return UNDECIDED, HOLDS_ZERO


def _ends(deviations: Floats) -> Floats:
    ends: Floats = np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return ends


def _student(rng: np.random.Generator, count: float, size: int) -> Floats:
    """(size,) factors that make bootstrapped deviations of a mean of ``count`` values t-like.

    A bootstrap's variance is too small by the factor (count - 1) / count, and a normal deviate
    divided by the root of a chi-squared one over its count - 1 degrees of freedom is Student's.
    """
    factors: Floats = np.sqrt(count / rng.chisquare(count - 1, size))
    return factors
