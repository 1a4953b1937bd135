"""``seco probe``: how well frozen features are classified by a linear SVM or nearest neighbours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from seco.eval_config import ProbeConfig
from seco.eval_splits import TrainTest, read_train_test
from seco.pages import percent, printable
from seco.unit_rows import unit_rows
from shards.atomic import atomic_path, write_json
from shards.errors import InputError
from shards.progress import progress

RESULT, CONFUSION = "probe.json", "probe-confusion.png"
_ROWS_SHOWN = 30
_NAMES_DRAWN = 60


@dataclass(frozen=True)
class ClassAccuracy:
    """One class of the test rows: ``accuracy`` over its ``count`` videos."""

    label: int
    label_name: str
    accuracy: float
    count: int


@dataclass(frozen=True)
class SweptC:
    """The figures of one more value of C."""

    c: float
    top1: float
    top5: float
    mean_class: float


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies as fractions; ``confusion`` (U, U) counts rows of true by predicted class."""

    method: str
    settings: dict[str, Any]  # C, or neighbours and temperature; normalise
    top1: float
    top5: float
    mean_class: float
    per_class: list[ClassAccuracy]
    n_train: int
    n_test: int
    train_split: str
    test_split: str
    dataset: str
    encoder: dict[str, Any]
    sweep: list[SweptC]
    notes: list[str]
    class_names: list[str]
    confusion: NDArray[np.int64]

    def to_json(self) -> dict[str, Any]:
        """``probe.json``."""
        sweep = [
            {"C": s.c, "top1": s.top1, "top5": s.top5, "mean_class": s.mean_class}
            for s in self.sweep
        ]
        return {
            "method": self.method,
            **self.settings,
            "top1": self.top1,
            "top5": self.top5,
            "mean_class": self.mean_class,
            "n_train": self.n_train,
            "n_test": self.n_test,
            "split": self.test_split,
            "train_split": self.train_split,
            "dataset": self.dataset,
            "encoder": self.encoder,
            "sweep": sweep,
            "notes": self.notes,
            "per_class": [dataclasses.asdict(row) for row in self.per_class],
        }

    def table(self) -> str:
        """The figures as lines for a terminal."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines = [
            f"{self.method} ({settings}), trained on {self.n_train} videos ({self.train_split}), "
            f"tested on {self.n_test} ({self.test_split})",
            f"top-1 {percent(self.top1)}%   top-5 {percent(self.top5)}%   "
            f"mean class {percent(self.mean_class)}%",
        ]
        lines += [
            f"C {row.c:g}: top-1 {percent(row.top1)}%   top-5 {percent(row.top5)}%   "
            f"mean class {percent(row.mean_class)}%"
            for row in self.sweep
        ]
        lines += class_lines(self.per_class)
        return "\n".join(lines + [f"note: {printable(note)}" for note in self.notes])


def probe(config: ProbeConfig) -> ProbeResult:
    """Fit on the training rows, test on the others; write ``probe.json`` and the confusion matrix.

    Raises:
        InputError: settings or feature folders cannot be used.
    """
    sweep = _checked(config)
    rows = read_train_test(
        config.features, config.test_features, config.split, config.train_split, config.test_split
    )
    train, test = normalised(
        np.asarray(rows.train.features[rows.train_rows]),
        np.asarray(rows.test.features[rows.test_rows]),
        config.normalise,
    )
    notes = rows.notes()
    classes, scores = _classify(config, config.c, rows, train, test, notes)
    swept = []
    for c in sweep:
        swept_notes: list[str] = []
        _, swept_scores = _classify(config, c, rows, train, test, swept_notes)
        notes += [f"C {c:g}: {note}" for note in swept_notes]
        swept.append(SweptC(c, *accuracies(classes, swept_scores, rows.test_labels)))
    result = _result(config, rows, classes, scores, swept, notes)
    out = Path(config.out or config.features)
    with atomic_path(out / CONFUSION) as temporary:
        draw_confusion(result).savefig(temporary, format="png", dpi=100)
    write_json(out / RESULT, result.to_json())
    return result


def accuracies(
    classes: NDArray[np.int64], scores: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Top-1, top-5 and mean class accuracy of scores (M, K) for labels (M,).

    A tie counts against the true class in top-5, so that equal scores earn nothing. With 5 classes
    or fewer top-5 says nothing.
    """
    right = classes[scores.argmax(axis=1)] == labels
    column = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
    known = classes[column] == labels
    own = np.take_along_axis(scores, column[:, None], axis=1)
    among_five = right | (known & ((scores >= own).sum(axis=1) <= 5))
    mean_class = np.mean([right[labels == label].mean() for label in np.unique(labels)])
    return float(right.mean()), float(among_five.mean()), float(mean_class)


def confusions(
    classes: NDArray[np.int64], scores: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All labels (U,) and the counts (U, U) of true by predicted ones, of scores (M, K)."""
    predicted = classes[scores.argmax(axis=1)]
    every = np.union1d(classes, labels)
    counts = np.zeros((len(every), len(every)), dtype=np.int64)
    np.add.at(counts, (np.searchsorted(every, labels), np.searchsorted(every, predicted)), 1)
    return every, counts


def class_accuracies(
    labels: NDArray[np.int64], names: Sequence[str], confusion: NDArray[np.int64]
) -> list[ClassAccuracy]:
    """Of the classes (U,) that have rows in the confusion matrix (U, U)."""
    return [
        ClassAccuracy(int(label), name, float(row[i] / row.sum()), int(row.sum()))
        for i, (label, name, row) in enumerate(zip(labels, names, confusion, strict=True))
        if row.sum()
    ]


def class_lines(per_class: Sequence[ClassAccuracy]) -> list[str]:
    """For a terminal: a line a class, of many the lowest."""
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


def normalised(
    train: NDArray[np.float32], test: NDArray[np.float32], how: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features scaled by ``how``: ``none`` (the paper's), ``l2`` or ``standard``.

    ``standard`` takes mean and deviation from the training rows alone. Rows of zeros and constant
    columns stay zero.
    """
    if how == "none":
        return train, test
    if how == "l2":
        return unit_rows(train), unit_rows(test)
    mean = train.mean(axis=0, dtype=np.float64)
    deviation = train.std(axis=0, dtype=np.float64)
    deviation[deviation == 0] = 1
    scaled = [((x - mean) / deviation).astype(np.float32) for x in (train, test)]
    return scaled[0], scaled[1]


class Confused(Protocol):
    """A result of which a confusion matrix can be drawn."""

    @property
    def method(self) -> str:
        """For the title."""

    @property
    def top1(self) -> float:
        """A fraction."""

    @property
    def class_names(self) -> list[str]:
        """(U,)"""

    @property
    def confusion(self) -> NDArray[np.int64]:
        """(U, U) counts of true by predicted class."""


def draw_confusion(result: Confused) -> Figure:
    """The confusion matrix, each row as shares of its true class."""
    count = len(result.class_names)
    side = min(14.0, 4.0 + 0.16 * count)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    totals = result.confusion.sum(axis=1, keepdims=True)
    image = axes.imshow(
        result.confusion / totals.clip(min=1), vmin=0, vmax=1, cmap="Blues", interpolation="nearest"
    )
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{result.method}, top-1 {percent(result.top1)}%")
    if count <= _NAMES_DRAWN:
        # A dollar sign would start matplotlib's mathematics.
        names = [printable(name)[:30].replace("$", r"\$") for name in result.class_names]
        axes.set_xticks(range(count), names, rotation=90, fontsize=7)
        axes.set_yticks(range(count), names, fontsize=7)
    return figure


def _checked(config: ProbeConfig) -> list[float]:
    """Refuse settings that cannot be used; returns the values of ``--sweep``."""
    try:
        sweep = [float(value) for value in (config.sweep or "").split(",") if value.strip()]
    except ValueError:
        raise InputError(f"{config.sweep!r} is no list of numbers", "--sweep") from None
    if config.method != "svm" and sweep:
        raise InputError("only the SVM has a C", "--sweep", "leave it out or use --method svm")
    if not all(value > 0 and math.isfinite(value) for value in [config.c, *sweep]):
        raise InputError("must be above 0", "-C, --sweep")
    if config.neighbours < 1 or not config.temperature > 0:
        raise InputError("must be above 0", "--neighbours, --temperature")
    return sweep


def _classify(
    config: ProbeConfig,
    c: float,
    rows: TrainTest,
    train: NDArray[np.float32],
    test: NDArray[np.float32],
    notes: list[str],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Classes (K,) and the test rows' scores (M, K)."""
    from seco.device import resolve_device
    from seco.knn import knn_scores
    from seco.svm import fit_svm

    device = resolve_device(config.device)
    labels = rows.train_labels
    if config.method == "knn":
        return knn_scores(
            train,
            labels,
            test,
            neighbours=config.neighbours,
            temperature=config.temperature,
            device=device,
        )
    with progress(f"SVM, C {c:g}", len(np.unique(labels)), "classes") as shown:
        svm = fit_svm(train, labels, c=c, device=device, advance=shown.advance)
    if not svm.converged.all():
        notes.append(f"{int((~svm.converged).sum())} classes of the SVM did not converge")
    return svm.classes, svm.scores(test)


def _result(
    config: ProbeConfig,
    rows: TrainTest,
    classes: NDArray[np.int64],
    scores: NDArray[np.float64],
    sweep: Sequence[SweptC],
    notes: Sequence[str],
) -> ProbeResult:
    true = rows.test_labels
    every, confusion = confusions(classes, scores, true)
    names = [rows.class_name(int(label)) for label in every]
    settings: dict[str, Any] = {"C": config.c}
    if config.method == "knn":
        settings = {"neighbours": config.neighbours, "temperature": config.temperature}
    top1, top5, mean_class = accuracies(classes, scores, true)
    return ProbeResult(
        method=config.method,
        settings={**settings, "normalise": config.normalise},
        top1=top1,
        top5=top5,
        mean_class=mean_class,
        per_class=class_accuracies(every, names, confusion),
        n_train=len(rows.train_rows),
        n_test=len(rows.test_rows),
        train_split=rows.train_split,
        test_split=rows.test_split,
        dataset=rows.test.dataset,
        encoder=rows.train.encoder,
        sweep=list(sweep),
        notes=list(notes),
        class_names=names,
        confusion=confusion,
    )
