"""``seco retrieve evaluate``: recalls of test videos among training videos.

Similarity is the cosine: the inner product of unit vectors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seco.config import ALL_SPLITS, EvaluateConfig
from seco.data.splits import UNLABELLED, choose_split
from seco.evaluation.index import build_index, index_kind, recall_line, stated_recall
from seco.evaluation.nearest import NearestIndex
from seco.evaluation.splits import HELD_OUT, TrainTest, read_train_test
from seco.features.matrix import FeatureMatrix, unit_vectors
from seco.features.store import Features, read_features
from seco.text import percent
from shards.atomic import require_writable, write_json
from shards.errors import InputError
from shards.terminal import printable

RESULT = "retrieval.json"
LABEL_KS = (1, 5, 10, 20, 50)
SAME_VIDEO_KS = (1, 5, 10)


@dataclass(frozen=True)
class SplitRecalls:
    """R@k of one split by label, as fractions."""

    label: dict[int, float]
    queries: int
    gallery: int
    train_split: str
    test_split: str
    recall: dict[str, Any] | None  # of an approximate index, against exact search


@dataclass(frozen=True)
class RetrievalResult:
    """Recalls as fractions, by k.

    ``label``: a test video is a hit at k if one of its k nearest training videos has its label.
    Empty without labels; with several splits, their mean (``queries`` and ``gallery`` are sums).
    ``same_video``: the first half of a video is a hit if it finds its own second half among those
    of all videos.
    """

    label: dict[int, float]
    same_video: dict[int, float]
    queries: int
    gallery: int
    videos: int
    train_split: str
    test_split: str
    index: str  # "flat" or "ivfpq", for the largest gallery
    same_video_recall: dict[str, Any] | None  # see SplitRecalls.recall
    dataset: str
    encoder: dict[str, Any]
    notes: list[str]
    splits: list[SplitRecalls]

    def to_json(self) -> dict[str, Any]:
        """The content of ``retrieval.json``."""
        return {
            "label": _by_name(self.label),
            "same_video": _by_name(self.same_video),
            "queries": self.queries,
            "gallery": self.gallery,
            "videos": self.videos,
            "split": self.test_split,
            "train_split": self.train_split,
            "index": self.index,
            "same_video_recall": self.same_video_recall,
            "dataset": self.dataset,
            "encoder": self.encoder,
            "notes": self.notes,
            "splits": [
                {**dataclasses.asdict(one), "label": _by_name(one.label)} for one in self.splits
            ],
        }

    def table(self) -> str:
        """The metrics as lines for a terminal."""

        def line(title: str, recalls: dict[int, float]) -> str:
            cells = "   ".join(f"R@{k} {percent(value)}%" for k, value in recalls.items())
            return f"{title}: {cells or 'not measured'}"

        lines = [
            line(
                f"same label, {one.queries} videos ({one.test_split}) in {one.gallery} "
                f"({one.train_split})",
                one.label,
            )
            for one in self.splits
        ] or [line("same label", {})]
        if len(self.splits) > 1:
            lines.append(line(f"mean of {len(self.splits)} splits", self.label))
        lines.append(line(f"own second half among {self.videos} videos", self.same_video))
        found = [*((one.test_split, one.recall) for one in self.splits)]
        found.append(("halves", self.same_video_recall))
        lines += [f"IVF-PQ, {what}, {recall_line(recall)}" for what, recall in found if recall]
        return "\n".join([*lines, *(f"note: {printable(note)}" for note in self.notes)])


def evaluate(config: EvaluateConfig) -> RetrievalResult:
    """Compute R@k of test among training videos, and of halves; write ``retrieval.json``.

    Raises:
        InputError: settings or feature folders cannot be used.
    """
    out = Path(config.out or config.features)
    require_writable(out)  # before anything slow
    features = read_features(config.features)
    if config.split not in (None, ALL_SPLITS, HELD_OUT):
        choose_split(features, config.split)
    found, notes = _labelled_rows(config, features)
    splits = [_split_recalls(config, rows) for rows in found]
    queried = found[0].test if found else features
    same_video, videos, same_video_recall = _halves(config, queried)
    if videos < len(queried):
        notes.append(f"{len(queried) - videos} videos of one frame have no halves")
    largest = max([videos, *(one.gallery for one in splits)])
    result = RetrievalResult(
        label={k: float(np.mean([one.label[k] for one in splits])) for k in LABEL_KS if splits},
        same_video=same_video,
        queries=sum(one.queries for one in splits),
        gallery=sum(one.gallery for one in splits),
        videos=videos,
        train_split=", ".join(one.train_split for one in splits) or "none",
        test_split=", ".join(one.test_split for one in splits) or "none",
        index=index_kind(largest, config),
        same_video_recall=same_video_recall,
        dataset=queried.dataset,
        encoder=features.encoder,
        notes=list(dict.fromkeys(notes)),
        splits=splits,
    )
    write_json(out / RESULT, result.to_json())
    return result


def _split_recalls(config: EvaluateConfig, rows: TrainTest) -> SplitRecalls:
    gallery = unit_vectors(rows.train.features, rows.train_rows)
    index, recall = _searched(config, gallery)
    queries = unit_vectors(rows.test.features, rows.test_rows)
    _, found = index.search(queries, max(LABEL_KS), f"R@k of {rows.test_split}")
    # -1: an approximate index found fewer rows than requested.
    right = (rows.train_labels[found] == rows.test_labels[:, None]) & (found >= 0)
    return SplitRecalls(
        label=_recalls(right, LABEL_KS),
        queries=len(queries),
        gallery=len(gallery),
        train_split=rows.train_split,
        test_split=rows.test_split,
        recall=recall,
    )


def _searched(
    config: EvaluateConfig, gallery: FeatureMatrix
) -> tuple[NearestIndex, dict[str, Any] | None]:
    """An index, and if it is approximate, its recall against exact search."""
    index = build_index(gallery, config, config.device, "Adding")
    exact = index_kind(len(gallery), config) == "flat"
    return index, None if exact else stated_recall(index, gallery, config.device)


def _halves(
    config: EvaluateConfig, queried: Features
) -> tuple[dict[int, float], int, dict[str, Any] | None]:
    """Same-video R@k, the number of videos with two halves, and the index's recall."""
    rows = np.flatnonzero(queried.frames >= 2)
    if not len(rows):
        return {}, 0, None
    index, recall = _searched(config, unit_vectors(queried.halves[:, 1], rows))
    first = unit_vectors(queried.halves[:, 0], rows)
    _, found = index.search(first, max(SAME_VIDEO_KS), "R@k of halves")
    return _recalls(found == np.arange(len(rows))[:, None], SAME_VIDEO_KS), len(rows), recall


def _labelled_rows(config: EvaluateConfig, features: Features) -> tuple[list[TrainTest], list[str]]:
    """The training and test rows of each split, and notes for the reader."""
    if (features.labels == UNLABELLED).all():
        return [], ["no video has a label: only same-video recall is computed"]
    if config.test_features is None and not features.splits and config.split != HELD_OUT:
        return [], ["the videos have no splits: only same-video recall is computed"]
    splits: list[str | None] = [config.split]
    if config.split == ALL_SPLITS and ALL_SPLITS not in features.splits:
        splits = [*sorted(name for name in features.splits if name.isdigit())]
        if len(splits) < 2:
            raise InputError(
                f"a mean needs two numbered splits, found {', '.join(features.splits)}",
                features.folder,
                "remove --split, or choose one split",
            )
    found = [
        read_train_test(
            config.features, config.test_features, split, config.train_split, config.test_split
        )
        for split in splits
    ]
    return found, [note for rows in found for note in rows.notes()]


def _recalls(right: NDArray[np.bool_], ks: tuple[int, ...]) -> dict[int, float]:
    """The fraction of rows (Q, k) with a hit among the first k, for each k."""
    return {k: float(right[:, :k].any(axis=1).mean()) for k in ks}


def _by_name(recalls: dict[int, float]) -> dict[str, float]:
    return {str(k): value for k, value in recalls.items()}
