"""Are the intervals of ``seco compare`` right? Simulated features with known differences.

    python benchmarks/compare_coverage.py [--simulations 400] [--populations 8] [--processes 2]

A population of recordings and videos is drawn, seen by two encoders of unequal noise. Their
classifiers are fitted to one training set, as ``seco compare`` fits them; the true difference is
that on a test set of 1,500 recordings, averaged over 60 draws of the labelled videos. Then small
test sets are drawn, each with ten of these draws at random, and it is counted how often the 95 %
interval of the difference holds the true one. With equal noise the encoders are two
noisy copies of one: there the verdict should be "cannot be told".
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from seco.evaluation.compare import (
    Classified,
    Labelled,
    Rights,
    draw_labelled,
    effective_rank,
    hold_outs,
    same_video,
)
from seco.evaluation.intervals import UNDECIDED, GroupBootstrap, Interval, decide
from seco.evaluation.splits import TrainTest
from seco.evaluation.svm import LinearSVM
from seco.features.store import Features

PERCENTS = (1.0, 10.0, 100.0)
CLASSES, LATENT, DIMENSION = 6, 24, 48
TRAIN_A_CLASS = 30  # videos
_OTHERS = 200  # test sets whose mean is the truth of what depends on all videos of a set
_REPEATS = 10
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Population:
    """Videos of recordings of classes, as two encoders see them.

    Args:
        groups: recordings of a test set, for example 24 to 60.
        videos: of a test set on average, in recordings of unequal size.
        noise: standard deviation of each encoder's own noise; equal: two noisy copies.
        group_spread: how far recordings of a class are apart, in units of the classes'.
        video_spread: how far videos of a recording are apart.
        seed: of classes and training set.
    """

    groups: int
    videos: int
    noise: tuple[float, float]
    group_spread: float
    video_spread: float
    seed: int

    def draw(self, rng: np.random.Generator, groups: int) -> tuple[list[Features], list[str]]:
        """Both encoders' features of videos in so many recordings, and these."""
        fixed = np.random.default_rng(self.seed)
        centres = fixed.standard_normal((CLASSES, LATENT))
        mean = self.videos / self.groups
        sizes = 1 + rng.poisson(rng.gamma(1.5, (mean - 1) / 1.5, size=groups))
        place = np.repeat(np.arange(groups), sizes)
        labels = rng.integers(CLASSES, size=groups)[place]
        # Some recordings, and some videos, are harder than others.
        spread = self.group_spread * rng.gamma(4, 1 / 4, size=groups)
        shift = spread[:, None] * rng.standard_normal((groups, LATENT))
        seen = centres[labels] + shift[place]
        seen += self.video_spread * rng.standard_normal((len(place), LATENT))
        found = []
        for noise in self.noise:
            blur = 0.5 * noise * rng.standard_normal((groups, LATENT))[place]
            blur += noise * rng.standard_normal((len(place), LATENT))
            halves = (seen + blur)[:, None]
            halves = halves + 1.5 * noise * rng.standard_normal((len(place), 2, LATENT))
            # As a network's: unequal directions, none below 0.
            projection = np.geomspace(1, 0.1, LATENT)[:, None] * fixed.standard_normal(
                (LATENT, DIMENSION)
            )
            halves = np.maximum(0, halves @ projection + 1)
            found.append(_features(halves.mean(axis=1), halves, labels))
        return found, [f"recording {group}" for group in place]


def _features(
    features: NDArray[np.float64], halves: NDArray[np.float64], labels: NDArray[np.int64]
) -> Features:
    count = len(features)
    keys = [f"v{row}" for row in range(count)]
    return Features(
        folder=Path("simulated"),
        features=features.astype(np.float32),
        halves=halves.astype(np.float32),
        keys=keys,
        sources=keys,
        labels=labels.astype(np.int64),
        label_names=[f"class {label}" for label in labels],
        frames=np.full(count, 2),
        shards=[""] * count,
        splits={},
        meta={"encoder": {}},
    )


class Simulation:
    """The training set of a population, and its encoders' classifiers.

    Args:
        population: what is simulated.
        percents: of the labels.
        what: of ``svm``, ``knn``, ``r1``.
        draws: of the labelled videos there are; each test set gets ten of them at random.
        truth_groups: recordings of the large test set.
    """

    def __init__(
        self,
        population: Population,
        percents: Sequence[float] = PERCENTS,
        what: Sequence[str] = ("svm", "knn", "r1"),
        draws: int = 60,
        truth_groups: int = 1500,
    ) -> None:
        self.population, self.what = population, what
        rng = np.random.default_rng([population.seed, 1])
        mean = population.videos / population.groups
        self.train, groups = population.draw(rng, round(CLASSES * TRAIN_A_CLASS / mean))
        labels = self.train[0].labels
        self.drawn = draw_labelled(labels, percents, draws, population.seed)
        parts = hold_outs(labels, groups)
        self.scalings: list[str] = []
        self.svms: list[dict[str, list[LinearSVM]]] = []
        for train in self.train if "svm" in what else ():
            classified = self._classified(train, train)
            choice = classified.choose(parts)
            how = choice.scaling
            self.scalings.append(how)
            self.svms.append(
                {one.key: classified.fit_svms(one, how, choice.c[how]) for one in self.drawn}
            )
        large, _ = population.draw(rng, truth_groups)
        every = [np.arange(len(one.draws)) for one in self.drawn]
        first, second = (
            {key: float(right.mean()) for key, right in self._rights(n, large[n], every).items()}
            for n in range(2)
        )
        self.accuracies = {key: (first[key], second[key]) for key in first}
        self.truth = {key: first[key] - second[key] for key in first}
        unlabelled = [
            self._unlabelled(*population.draw(rng, population.groups)) for _ in range(_OTHERS)
        ]
        for key in unlabelled[0]:
            self.truth[key] = float(np.mean([found[key].value for found in unlabelled]))

    def run(self, seed: int) -> dict[str, Interval]:
        """The differences' intervals for one small test set with its own draws of labels."""
        rng = np.random.default_rng([self.population.seed, 2, seed])
        test, groups = self.population.draw(rng, self.population.groups)
        picked = [
            rng.integers(len(one.draws), size=_REPEATS if len(one.draws) > 1 else 1)
            for one in self.drawn
        ]
        bootstrap = GroupBootstrap(groups, 2000, seed)
        first, second = (self._rights(n, test[n], picked) for n in range(2))
        found = {
            key: bootstrap.mean(first[key].astype(float) - second[key], -1, 1) for key in first
        }
        return found | self._unlabelled(test, groups)

    def _rights(
        self, number: int, test: Features, picked: Sequence[NDArray[np.int64]]
    ) -> dict[str, Rights]:
        """Of one encoder on these test videos, with these of the draws."""
        classified = self._classified(self.train[number], test)
        found = {}
        for one, draws in zip(self.drawn, picked, strict=True):
            amount = Labelled(one.percent, [one.draws[draw] for draw in draws])
            if "svm" in self.what:
                svms = [self.svms[number][one.key][draw] for draw in draws]
                found[f"svm@{one.key}"] = classified.svm(svms, self.scalings[number])
            if "knn" in self.what:
                found[f"knn@{one.key}"] = classified.knn(amount, 20, 0.07)
            if "r1" in self.what:
                found[f"r1@{one.key}"] = classified.nearest(amount)
        return found

    def _unlabelled(self, test: Sequence[Features], groups: list[str]) -> dict[str, Interval]:
        rows = np.arange(len(groups))
        bootstrap = GroupBootstrap(groups, 2000, 0, most_blocks=64)
        first, second = (same_video(one.halves, rows, _CPU) for one in test)
        (rank, influence), (other, others) = (
            effective_rank(one.features, rows, bootstrap.blocks) for one in test
        )
        return {
            "same_video": bootstrap.mean(first.astype(float) - second, -1, 1),
            "effective_rank": bootstrap.of_influence(rank - other, influence - others),
        }

    def _classified(self, train: Features, test: Features) -> Classified:
        rows = TrainTest(
            train=train,
            train_rows=np.arange(len(train)),
            train_split="train",
            test=test,
            test_rows=np.arange(len(test)),
            test_split="test",
            unlabelled=0,
        )
        return Classified(rows, [0.01, 1.0, 100.0], _CPU)


def populations(count: int, copies: bool) -> list[Population]:
    """Test sets of 24 to 60 recordings and 100 to 300 videos; accuracies of about 0.5 to 0.9."""
    rng = np.random.default_rng(7)
    found = []
    for seed in range(count):
        groups = int(rng.integers(24, 61))
        first = float(rng.uniform(0.1, 0.8))
        second = first if copies else first * float(rng.uniform(1.1, 1.6))
        found.append(
            Population(
                groups=groups,
                videos=int(np.clip(groups * rng.uniform(3, 7), 100, 300)),
                noise=(first, second),
                group_spread=float(rng.uniform(0.3, 0.8)),
                video_spread=float(rng.uniform(0.2, 0.6)),
                seed=seed,
            )
        )
    return found


def one_population(
    population: Population, simulations: int
) -> tuple[Simulation, list[dict[str, Interval]]]:
    """All simulations of a population."""
    torch.set_num_threads(1)
    simulation = Simulation(population)
    return simulation, [simulation.run(seed) for seed in range(simulations)]


def table(found: Sequence[tuple[Simulation, list[dict[str, Interval]]]]) -> str:
    """Markdown: for each measure how often the interval held the truth, and the verdicts."""
    covered: dict[str, list[bool]] = defaultdict(list)
    undecided: dict[str, list[bool]] = defaultdict(list)
    widths: dict[str, list[float]] = defaultdict(list)
    truths: dict[str, list[float]] = defaultdict(list)
    for simulation, runs in found:
        for key, truth in simulation.truth.items():
            truths[key].append(truth)
        for run in runs:
            for key, interval in run.items():
                assert interval.low is not None and interval.high is not None
                covered[key].append(interval.low <= simulation.truth[key] <= interval.high)
                undecided[key].append(decide(interval, 24)[0] == UNDECIDED)
                widths[key].append(interval.high - interval.low)
    lines = [
        "| measure | true differences | mean width | simulations | interval holds the truth | "
        "cannot be told |",
        "|---|---|---|---|---|---|",
    ]
    for key, held in covered.items():
        scale = 1 if key == "effective_rank" else 100
        least, most = scale * min(truths[key]), scale * max(truths[key])
        lines.append(
            f"| {key} | {least:+.1f} to {most:+.1f} | {scale * np.mean(widths[key]):.1f} | "
            f"{len(held)} | {np.mean(held):.1%} | {np.mean(undecided[key]):.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--simulations", type=int, default=400)
    parser.add_argument("--populations", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    each = given.simulations // given.populations
    for copies in (False, True):
        began = time.perf_counter()
        drawn = populations(given.populations, copies)
        with ProcessPoolExecutor(given.processes) as pool:
            found = list(pool.map(functools.partial(one_population, simulations=each), drawn))
        print("\n## Two noisy copies\n" if copies else "\n## Two encoders of unequal noise\n")
        for population, (simulation, _) in zip(drawn, found, strict=True):
            shown = ", ".join(
                f"{key} {first:.2f}/{second:.2f}"
                for key, (first, second) in simulation.accuracies.items()
                if key.startswith("svm")
            )
            print(f"* {population.groups} recordings, {population.videos} videos: {shown}")
        print(f"\n{table(found)}\n\n{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
