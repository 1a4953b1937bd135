"""What a classifier says of the test rows, kept small: a label and two flags a row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Predictions:
    """Of M rows with true ``labels``: the class of the highest score, and whether five suffice."""

    labels: NDArray[np.int64]  # (M,)
    predicted: NDArray[np.int64]  # (M,)
    among_five: NDArray[np.bool_]  # (M,)

    @property
    def right(self) -> NDArray[np.bool_]:
        """(M,) whether the highest score is the true class's."""
        same: NDArray[np.bool_] = self.predicted == self.labels
        return same

    def accuracies(self) -> tuple[float, float, float]:
        """Top-1, top-5 and mean class accuracy, as fractions."""
        _, place, counts = np.unique(self.labels, return_inverse=True, return_counts=True)
        by_class = np.bincount(place, self.right) / counts
        return float(self.right.mean()), float(self.among_five.mean()), float(by_class.mean())


def judge(
    classes: NDArray[np.int64],
    blocks: Iterable[tuple[slice, NDArray[np.float64]]],
    labels: NDArray[np.int64],
) -> Predictions:
    """Take the predictions from scores that come a block at a time.

    A tie counts against the true class in top-5, so that equal scores earn nothing. With 5 classes
    or fewer top-5 says nothing.

    Args:
        classes: (K,) ascending labels the scores are of.
        blocks: rows and their scores (m, K).
        labels: (M,) true labels; those of no class count as wrong.
    """
    predicted = np.empty(len(labels), dtype=np.int64)
    among_five = np.empty(len(labels), dtype=bool)
    for place, scores in blocks:
        true = labels[place]
        predicted[place] = classes[scores.argmax(axis=1)]
        column = np.searchsorted(classes, true).clip(max=len(classes) - 1)
        known = classes[column] == true
        own = np.take_along_axis(scores, column[:, None], axis=1)
        few = (scores >= own).sum(axis=1) <= 5
        among_five[place] = (predicted[place] == true) | (known & few)
    return Predictions(labels, predicted, among_five)
