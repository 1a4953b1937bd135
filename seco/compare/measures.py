"""What is measured of each encoder: right or wrong for every test video, and the effective rank.

Every measure by labels is taken with some of the training labels: the classifier, or the gallery of
R@1, has the labelled videos alone. All encoders get the same draws of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from seco.evaluation.predictions import judge
from seco.evaluation.splits import TrainTest, held_out
from seco.features.matrix import FeatureMatrix, FeaturesTooLarge, Scaling, fit_scaling, unit_vectors
from seco.probe.knn import knn_votes
from seco.probe.svm import LinearSVM, fit_svm
from seco.retrieve.nearest import ExactIndex
from shards.errors import InputError

SCALINGS = ("none", "l2", "standard")
EPSILON = 1e-7  # Garrido et al. 2023, Eq. 1
_MOST_HOLD_OUTS = 5
_ENOUGH_HELD_OUT = 1000  # videos: a standard error of 1.6 points at most

Rights = NDArray[np.bool_]  # (R, M) of R draws and M test videos
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Labelled:
    """Draws of labelled training videos: ``rows`` (n,) are positions in the training rows."""

    percent: float
    draws: list[NDArray[np.int64]]

    @property
    def videos(self) -> int:
        """n."""
        return len(self.draws[0])

    @property
    def key(self) -> str:
        """The percentage as text."""
        return f"{self.percent:g}"


def draw_labelled(
    labels: NDArray[np.int64], percents: Sequence[float], repeats: int, seed: int
) -> list[Labelled]:
    """Draws for each percentage: that share of every class, and one video of each at least.

    Of percentages that come to the same numbers the last is kept; all videos are drawn once.
    """
    classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    found: dict[tuple[int, ...], Labelled] = {}
    for percent in percents:
        wanted = np.maximum(1, np.floor(counts * percent / 100 + 0.5).astype(np.int64))
        wanted = np.minimum(wanted, counts)
        every = bool((wanted == counts).all())
        draws = []
        for repeat in range(1 if every else repeats):
            rng = np.random.Generator(np.random.PCG64([seed, round(1000 * percent), repeat]))
            order = rng.permutation(len(labels))
            chosen = [
                order[place[order] == k][:n]
                for k, n in zip(range(len(classes)), wanted, strict=True)
            ]
            draws.append(np.sort(np.concatenate(chosen)))
        found.pop(tuple(wanted.tolist()), None)
        found[tuple(wanted.tolist())] = Labelled(percent, draws)
    return list(found.values())


@dataclass(frozen=True)
class SvmChoice:
    """How one encoder's features are given to the SVM.

    Args:
        c: the C chosen for each scaling.
        held_out: the mean accuracy over classes of each scaling with it on held-out training
            videos; empty where none could be held out.
        scaling: the best of them.
    """

    c: dict[str, float]
    held_out: dict[str, float]
    scaling: str


class Classified:
    """The training and test rows of one encoder, and what classifies them.

    Args:
        rows: its own.
        values_of_c: to choose the SVM's from.
        device: where products are computed.
        advance: told how many more SVMs are fitted.
    """

    def __init__(
        self,
        rows: TrainTest,
        values_of_c: Sequence[float],
        device: torch.device,
        advance: Advance = lambda count: None,
    ) -> None:
        self._rows = rows
        self._values_of_c = list(values_of_c)
        self._device = device
        self._advance = advance
        self._train = FeatureMatrix(rows.train.features, rows.train_rows)
        self._test = FeatureMatrix(rows.test.features, rows.test_rows)
        self._labels = rows.train_labels
        # Means and deviations take no labels: those of all training rows, however few are labelled.
        self._scalings = {how: fit_scaling(self._train, how) for how in SCALINGS}
        self.not_converged = 0

    def choose(self, parts: Sequence[NDArray[np.bool_]]) -> SvmChoice:
        """Scaling and C of the best mean accuracy over the classes of held-out training videos.

        Over classes, since the test videos may have other shares of them: where videos are few, an
        SVM of a small C may do nothing but prefer the frequent classes. Of equal ones the first:
        raw features and the smallest C. Test videos have no influence.

        Args:
            parts: of :func:`hold_outs`.
        """
        accuracy = {how: dict.fromkeys(self._values_of_c, 0.0) for how in SCALINGS}
        for outside in parts:
            inner, held = np.flatnonzero(~outside), np.flatnonzero(outside)
            for how in SCALINGS:
                scaling = fit_scaling(self._train.part(inner), how)
                test = self._train.part(held).scaled(scaling)
                for c in self._values_of_c:
                    svm = self._fit(inner, scaling, c)
                    right = _rights(svm, test, self._labels[held])
                    accuracy[how][c] += mean_over_classes(right, self._labels[held]) / len(parts)
        if not parts:
            middle = self._values_of_c[len(self._values_of_c) // 2]
            return SvmChoice(dict.fromkeys(SCALINGS, middle), {}, SCALINGS[0])
        chosen = {how: max(found, key=found.__getitem__) for how, found in accuracy.items()}
        best = {how: accuracy[how][c] for how, c in chosen.items()}
        return SvmChoice(chosen, best, max(SCALINGS, key=best.__getitem__))

    def fit_svms(self, labelled: Labelled, how: str, c: float) -> list[LinearSVM]:
        """A linear SVM for each draw, on features scaled ``how``."""
        return [self._fit(rows, self._scalings[how], c) for rows in labelled.draws]

    def svm(self, svms: Sequence[LinearSVM], how: str) -> Rights:
        """Of the test videos, by SVMs of :meth:`fit_svms` on features scaled ``how``."""
        test = self._test.scaled(self._scalings[how])
        return np.stack([_rights(svm, test, self._rows.test_labels) for svm in svms])

    def knn(self, labelled: Labelled, neighbours: int, temperature: float) -> Rights:
        """Of the nearest neighbours' votes."""
        found = []
        for rows in labelled.draws:
            labels = self._labels[rows]
            votes = knn_votes(
                self._train.part(rows), labels, self._test,
                neighbours=neighbours, temperature=temperature, device=self._device,
            )  # fmt: skip
            found.append(judge(np.unique(labels), votes, self._rows.test_labels).right)
        return np.stack(found)

    def nearest(self, labelled: Labelled) -> Rights:
        """R@1: whether the nearest labelled video is of the same class."""
        queries = unit_vectors(self._rows.test.features, self._rows.test_rows)
        found = []
        for rows in labelled.draws:
            gallery = unit_vectors(self._rows.train.features, self._rows.train_rows[rows])
            _, nearest = exact_index(gallery, self._device).search(queries, 1)
            found.append(self._labels[rows][nearest[:, 0]] == self._rows.test_labels)
        return np.stack(found)

    def _fit(self, rows: NDArray[np.int64], scaling: Scaling, c: float) -> LinearSVM:
        """An SVM of these of the training rows."""
        train = self._train.part(rows).scaled(scaling)
        try:
            svm = fit_svm(train, self._labels[rows], c=c, device=self._device)
        except FeaturesTooLarge as error:
            raise InputError(
                "holds values too large for float32", self._rows.train.folder
            ) from error
        self.not_converged += not svm.converged.all()
        self._advance(1)
        return svm


def _rights(svm: LinearSVM, test: FeatureMatrix, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(M,) whether an SVM is right."""
    scores = ((place, svm.scores(block)) for place, block in test.blocks())
    return judge(svm.classes, scores, labels).right


def hold_outs(labels: NDArray[np.int64], groups: Sequence[str]) -> list[NDArray[np.bool_]]:
    """Some ways to hold out a fifth of the training videos, groups whole; more where they are few.

    Empty where nothing can be held out or less than two classes would be left.
    """
    parts: list[NDArray[np.bool_]] = []
    for number in range(_MOST_HOLD_OUTS):
        # Another name gives a group another digest, and so another place in the order.
        outside = held_out(labels, [f"{number} {group}" for group in groups])
        if outside.any() and len(np.unique(labels[~outside])) > 1:
            parts.append(outside)
        if sum(int(part.sum()) for part in parts) >= _ENOUGH_HELD_OUT:
            break
    return parts


def exact_index(vectors: FeatureMatrix, device: torch.device) -> ExactIndex:
    """On a GPU where torch computes on one and faiss can use it, too."""
    return ExactIndex(vectors, "cpu" if device.type == "cpu" else "auto")


def mean_over_classes(right: NDArray[np.bool_], labels: NDArray[np.int64]) -> float:
    """Of the classes there are, the mean share of right answers; both (M,)."""
    _, rows, videos = np.unique(labels, return_inverse=True, return_counts=True)
    return float((np.bincount(rows, weights=right) / videos).mean())


def same_video(
    halves: NDArray[np.float32], rows: NDArray[np.int64], device: torch.device
) -> Rights:
    """(1, M) whether the first half of each video finds its own second half among all of them.

    Args:
        halves: (V, 2, D).
        rows: (M,) the videos.
    """
    index = exact_index(unit_vectors(halves[:, 1], rows), device)
    _, nearest = index.search(unit_vectors(halves[:, 0], rows), 1)
    return np.asarray(nearest[:, 0] == np.arange(len(rows)))[None]


def effective_rank(
    features: NDArray[np.float32], rows: NDArray[np.int64], blocks: NDArray[np.int64]
) -> tuple[float, NDArray[np.float64]]:
    """RankMe: exp of the entropy of the singular values' shares (Garrido et al. 2023, Eq. 1).

    Args:
        features: (V, D).
        rows: (M,) the videos.
        blocks: (M,) groups of them, 0 … B-1.

    Returns:
        the effective rank of features (M, D), and the influence (B,) of each block on it: its
        jackknife pseudo-value less the mean of all. (A bootstrap would draw videos twice, which add
        nothing to a rank.)
    """
    count, dimension = len(rows), features.shape[1]
    number = int(blocks.max()) + 1
    places = [np.flatnonzero(blocks == block) for block in range(number)]
    without = np.empty(number)
    if count <= dimension:
        x = features[rows].astype(np.float64)
        gram = x @ x.T
        whole = _rank(gram)
        for block in range(number):
            kept = np.flatnonzero(blocks != block)
            without[block] = _rank(gram[np.ix_(kept, kept)])
    else:
        parts = (features[rows[place]].astype(np.float64) for place in places)
        gram = np.zeros((dimension, dimension))
        for part in parts:
            gram += part.T @ part
        whole = _rank(gram)
        for block, place in enumerate(places):
            part = features[rows[place]].astype(np.float64)
            without[block] = _rank(gram - part.T @ part)
    return whole, (number - 1) * (without.mean() - without)


def _rank(gram: NDArray[np.float64]) -> float:
    """Of a matrix whose squared singular values are the eigenvalues of ``gram``."""
    if not len(gram):
        return 0.0
    values = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0))
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total + EPSILON
    return float(np.exp(-(shares * np.log(shares)).sum()))
