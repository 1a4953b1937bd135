"""What ``seco probe`` leaves behind: ``probe.json``, a table a class and the confusion matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seco.evaluation.class_results import ClassAccuracy, class_lines, draw_confusion
from seco.pages.text import percent, printable
from shards.atomic import atomic_path, write_json, write_text
from shards.csv_rows import csv_text

RESULT, CONFUSION, PER_CLASS = "probe.json", "probe-confusion.png", "probe-per-class.csv"


@dataclass(frozen=True)
class SweptC:
    """The figures of one value of C on the validation part."""

    c: float
    top1: float
    top5: float
    mean_class: float


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies as fractions; ``confusion`` (U, U) counts rows of true by predicted class."""

    method: str
    settings: dict[str, Any]  # C and tolerance, or neighbours and temperature, or SGD's; normalise
    solution: str  # of an SVM: exact, or where it stopped; else empty
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
    validation: dict[str, Any]  # what the sweep was chosen on; empty without one
    notes: list[str]
    class_names: list[str]
    confusion: NDArray[np.int64]
    folder: Path  # of the files

    def to_json(self) -> dict[str, Any]:
        """``probe.json``."""
        sweep = [
            {"C": s.c, "top1": s.top1, "top5": s.top5, "mean_class": s.mean_class}
            for s in self.sweep
        ]
        return {
            "method": self.method,
            **self.settings,
            **({"solution": self.solution} if self.solution else {}),
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
            "validation": self.validation,
            "notes": self.notes,
            "per_class": [dataclasses.asdict(row) for row in self.per_class],
        }

    def write(self) -> None:
        """All files; each appears only when whole."""
        with atomic_path(self.folder / CONFUSION) as temporary:
            draw_confusion(self).savefig(temporary, format="png", dpi=100)
        write_text(self.folder / PER_CLASS, self.per_class_csv())
        write_json(self.folder / RESULT, self.to_json())

    def per_class_csv(self) -> str:
        """A row a class: its accuracy, and the class its videos are most often mistaken for."""
        header = ("label", "label_name", "videos", "right", "accuracy", "mistaken_for", "times")
        rows: list[Sequence[object]] = [header]
        tested = [i for i, row in enumerate(self.confusion) if row.sum()]
        for i, found in zip(tested, self.per_class, strict=True):
            wrong = self.confusion[i].copy()
            right, wrong[i] = int(wrong[i]), 0
            most = int(wrong.argmax())
            mistaken = [self.class_names[most], int(wrong[most])] if wrong[most] else ["", 0]
            rows.append(
                [found.label, found.label_name, found.count, right, found.accuracy, *mistaken]
            )
        return csv_text(rows)

    def table(self) -> str:
        """The figures as lines for a terminal."""
        given = {name: value for name, value in self.settings.items() if value is not None}
        settings = ", ".join(f"{name} {value}" for name, value in given.items())
        lines = [
            f"{self.method} ({settings}), trained on {self.n_train} videos ({self.train_split}), "
            f"tested on {self.n_test} ({self.test_split})",
            f"top-1 {percent(self.top1)}%   top-5 {percent(self.top5)}%   "
            f"mean class {percent(self.mean_class)}%",
        ]
        lines += [f"SVM: {self.solution}"] if self.solution else []
        if self.sweep:
            lines.append(
                f"C was chosen on {self.validation['videos']} of the training videos "
                f"({self.validation['drawn_by']}):"
            )
        lines += [
            f"C {row.c:g}: top-1 {percent(row.top1)}%   top-5 {percent(row.top5)}%   "
            f"mean class {percent(row.mean_class)}%"
            for row in self.sweep
        ]
        lines += class_lines(self.per_class)
        lines += [f"note: {printable(note)}" for note in self.notes]
        return "\n".join([*lines, printable(str(self.folder / RESULT))])
