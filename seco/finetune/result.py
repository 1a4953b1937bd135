"""What a test of a fine-tuned network found: ``finetune.json``, confusion matrix, table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seco import __version__
from seco.evaluation.class_results import (
    ClassAccuracy,
    class_accuracies,
    class_lines,
    confusions,
    draw_confusion,
)
from seco.evaluation.predictions import judge
from seco.evaluation.splits import split_notes
from seco.finetune.labelled_videos import LabelledVideos
from seco.finetune.video_classifier import Classes
from seco.pages.text import percent, printable
from shards.atomic import atomic_path, write_json
from shards.errors import InputError

RESULT, CONFUSION = "finetune.json", "finetune-confusion.png"


@dataclass(frozen=True)
class FinetuneResult:
    """Accuracies as fractions; ``confusion`` (U, U) counts videos of true by predicted class."""

    dataset: str
    split: str
    top1: float
    top5: float
    mean_class: float
    clips: int
    crops: int
    protocol: dict[str, Any]
    encoder: dict[str, Any]
    n_train: int
    n_test: int
    unreadable: int  # test videos that are left out
    classes: int
    notes: list[str]
    per_class: list[ClassAccuracy]
    class_names: list[str]
    confusion: NDArray[np.int64]
    method: str = "fine-tuned"

    def to_json(self) -> dict[str, Any]:
        """``finetune.json``."""
        left_out = ("class_names", "confusion", "method")
        fields = [f.name for f in dataclasses.fields(self) if f.name not in left_out]
        rows = [dataclasses.asdict(row) for row in self.per_class]
        given = {name: getattr(self, name) for name in fields}
        return {**given, "per_class": rows, "toolkit": __version__}

    def table(self) -> str:
        """The figures as lines for a terminal."""
        lines = [
            f"{printable(self.dataset)} split {printable(self.split)}: trained on {self.n_train} "
            f"videos, tested on {self.n_test} with {self.clips} clips x {self.crops} crops",
            f"top-1 {percent(self.top1)}%   top-5 {percent(self.top5)}%   "
            f"mean class {percent(self.mean_class)}%",
            *class_lines(self.per_class),
        ]
        return "\n".join(lines + [f"note: {printable(note)}" for note in self.notes])

    def write(self, folder: Path) -> Path:
        """Write ``finetune.json`` and the confusion matrix; returns the former's path."""
        with atomic_path(folder / CONFUSION) as temporary:
            draw_confusion(self).savefig(temporary, format="png", dpi=100)
        write_json(folder / RESULT, self.to_json())
        return folder / RESULT


def finetune_result(
    videos: LabelledVideos,
    classes: Classes,
    scores: NDArray[np.float64],
    protocol: dict[str, Any],
    encoder: dict[str, Any],
    dataset: str,
) -> FinetuneResult:
    """The result of the scores (M, K) of the test videos; rows of NaN could not be read.

    Raises:
        InputError: none could be read.
    """
    known = np.isfinite(scores).all(axis=1)
    if not known.any():
        raise InputError("not one test video could be read", videos.folder, "see `seco verify`")
    labels, scores = videos.labels[videos.test][known], scores[known]
    row_labels = np.array(classes.labels, dtype=np.int64)
    names = dict(zip(classes.labels, classes.names, strict=True))
    found = judge(row_labels, [(slice(None), scores)], labels)
    every, confusion = confusions(row_labels, found)
    class_names = [names.get(label, videos.class_name(label)) for label in every.tolist()]
    notes = split_notes(videos.unlabelled, row_labels, labels, videos.class_name)
    training = protocol["training"]
    epochs, planned = training["epochs"], training["epochs_planned"]
    if epochs is not None and epochs != planned:
        notes.append(f"its training stopped after {epochs:g} of {planned} epochs")
    if videos.empty:
        notes.append(f"{videos.empty} training videos without frames are left out")
    if not known.all():
        notes.append(f"{int((~known).sum())} test videos could not be read and are left out")
    top1, top5, mean_class = found.accuracies()
    return FinetuneResult(
        dataset=dataset,
        split=videos.split,
        top1=top1,
        top5=top5,
        mean_class=mean_class,
        clips=protocol["clips"],
        crops=protocol["crops"],
        protocol=protocol,
        encoder=encoder,
        n_train=len(videos.train),
        n_test=len(labels),
        unreadable=int((~known).sum()),
        classes=len(classes.labels),
        notes=notes,
        per_class=class_accuracies(every, class_names, confusion),
        class_names=class_names,
        confusion=confusion,
    )
