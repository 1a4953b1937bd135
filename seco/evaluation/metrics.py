"""Predictions and what follows: accuracies, per-class accuracies, the confusion matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from seco.text import percent
from shards.terminal import printable


@dataclass(frozen=True)
class Predictions:
    """For M rows with true ``labels``: the top-scoring class, and whether top-5 is correct."""

    labels: NDArray[np.int64]  # (M,)
    predicted: NDArray[np.int64]  # (M,)
    among_five: NDArray[np.bool_]  # (M,)

    @property
    def right(self) -> NDArray[np.bool_]:
        """(M,) whether the prediction is correct."""
        same: NDArray[np.bool_] = self.predicted == self.labels
        return same

    def accuracies(self) -> tuple[float, float, float]:
        """Top-1, top-5 and mean class accuracy, as fractions."""
        _, place, counts = np.unique(self.labels, return_inverse=True, return_counts=True)
        by_class = np.bincount(place, self.right) / counts
        return float(self.right.mean()), float(self.among_five.mean()), float(by_class.mean())


def predictions_of(
    classes: NDArray[np.int64],
    blocks: Iterable[tuple[slice, NDArray[np.float64]]],
    labels: NDArray[np.int64],
) -> Predictions:
    """Collect predictions from blocks of scores.

    A tie counts against the true class in top-5, so that constant scores earn nothing. With 5
    classes or fewer, top-5 is meaningless.

    Args:
        classes: (K,) the ascending labels of the score columns.
        blocks: row slices and their scores (m, K).
        labels: (M,) true labels; those not in ``classes`` count as wrong.
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


_ROWS_SHOWN = 30
_NAMES_DRAWN = 60


@dataclass(frozen=True)
class ClassAccuracy:
    """One class of the test rows: ``accuracy`` over its ``count`` videos."""

    label: int
    label_name: str
    accuracy: float
    count: int


def confusions(
    classes: NDArray[np.int64], found: Predictions
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All labels (U,) of classes and rows, and counts (U, U) of true by predicted labels."""
    every = np.union1d(classes, found.labels)
    counts = np.zeros((len(every), len(every)), dtype=np.int64)
    places = np.searchsorted(every, found.labels), np.searchsorted(every, found.predicted)
    np.add.at(counts, places, 1)
    return every, counts


def class_accuracies(
    labels: NDArray[np.int64], names: Sequence[str], confusion: NDArray[np.int64]
) -> list[ClassAccuracy]:
    """Accuracies of the classes (U,) that have rows in the confusion matrix (U, U)."""
    return [
        ClassAccuracy(int(label), name, float(row[i] / row.sum()), int(row.sum()))
        for i, (label, name, row) in enumerate(zip(labels, names, confusion, strict=True))
        if row.sum()
    ]


def class_lines(per_class: Sequence[ClassAccuracy]) -> list[str]:
    """Lines for a terminal, one per class; only the lowest if there are many."""
    shown, lines = list(per_class), []
    if len(shown) > _ROWS_SHOWN:
        shown = sorted(shown, key=lambda row: row.accuracy)[:_ROWS_SHOWN]
        lines.append(f"the {len(shown)} lowest of {len(per_class)} classes:")
    names = [printable(row.label_name) for row in shown]
    width = max(map(len, names), default=0)
    return lines + [
        f"  {name:<{width}}  {percent(row.accuracy):>5}%  of {row.count}"
        for name, row in zip(names, shown, strict=True)
    ]


class Confused(Protocol):
    """A result with a confusion matrix to draw."""

    @property
    def method(self) -> str:
        """Method name, for the title."""

    @property
    def top1(self) -> float:
        """Top-1 accuracy as a fraction."""

    @property
    def class_names(self) -> list[str]:
        """(U,) names of the classes."""

    @property
    def confusion(self) -> NDArray[np.int64]:
        """(U, U) counts of true by predicted class."""


def draw_confusion(result: Confused) -> Figure:
    """Draw the confusion matrix, each row as fractions of its true class."""
    count = len(result.class_names)
    side = min(14.0, 4.0 + 0.16 * count)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    totals = result.confusion.sum(axis=1, keepdims=True)
    image = axes.imshow(
        result.confusion / totals.clip(min=1), vmin=0, vmax=1, cmap="Blues", interpolation="nearest"
    )
    figure.colorbar(image, ax=axes, shrink=0.8, label="fraction of the true class")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{result.method}, top-1 {percent(result.top1)}%")
    if count <= _NAMES_DRAWN:
        # A dollar sign would start math text in matplotlib.
        names = [printable(name)[:30].replace("$", r"\$") for name in result.class_names]
        axes.set_xticks(range(count), names, rotation=90, fontsize=7)
        axes.set_yticks(range(count), names, fontsize=7)
    return figure
