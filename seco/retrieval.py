"""``seco retrieve``: a faiss index over features, recalls and nearest videos.

Similarity is the cosine: the inner product of unit vectors.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from seco.eval_config import RetrieveConfig
from seco.eval_splits import TrainTest, read_train_test
from seco.feature_store import (
    UNLABELLED,
    Features,
    discard,
    encoder_name,
    read_features,
)
from seco.nearest import build_index, index_kind, search
from seco.pages import percent, printable
from shards.atomic import atomic_path, write_json
from shards.errors import InputError

RESULT, INDEX = "retrieval.json", "retrieval.faiss"
LABEL_KS = (1, 5, 10, 20, 50)
SAME_VIDEO_KS = (1, 5, 10)

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class RetrievalResult:
    """Recalls as fractions, by k.

    ``label``: a test video is found at k when one of its k nearest training videos has its label;
    empty for a set without labels. ``same_video``: the first half of a video finds its own second
    half among those of all videos.
    """

    label: dict[int, float]
    same_video: dict[int, float]
    queries: int
    gallery: int
    videos: int
    train_split: str
    test_split: str
    index: str  # "flat" or "ivfpq"
    dataset: str
    encoder: dict[str, Any]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """``retrieval.json``."""
        return {
            "label": {str(k): value for k, value in self.label.items()},
            "same_video": {str(k): value for k, value in self.same_video.items()},
            "queries": self.queries,
            "gallery": self.gallery,
            "videos": self.videos,
            "split": self.test_split,
            "train_split": self.train_split,
            "index": self.index,
            "dataset": self.dataset,
            "encoder": self.encoder,
            "notes": self.notes,
        }

    def table(self) -> str:
        """The figures as lines for a terminal."""

        def line(title: str, recalls: dict[int, float]) -> str:
            cells = "   ".join(f"R@{k} {percent(value)}%" for k, value in recalls.items())
            return f"{title}: {cells or 'not measured'}"

        searched = f"{self.queries} videos ({self.test_split}) in {self.gallery}"
        return "\n".join(
            [
                line(f"same label, {searched} ({self.train_split})", self.label),
                line(f"own second half among {self.videos} videos", self.same_video),
                *(f"note: {printable(note)}" for note in self.notes),
            ]
        )


@dataclass(frozen=True)
class Neighbour:
    """A video near another; ``right`` is None where one of the two has no label."""

    row: int
    key: str
    similarity: float
    label_name: str
    right: bool | None


def evaluate(config: RetrieveConfig) -> RetrievalResult:
    """R@k of test videos among training videos, and of videos' halves; writes ``retrieval.json``.

    Raises:
        InputError: settings or feature folders cannot be used.
    """
    features = read_features(config.features)
    rows, notes = _labelled_rows(config, features)
    label: dict[int, float] = {}
    queried = features
    if rows is not None:
        queried = rows.test
        index = build_index(rows.train.features[rows.train_rows], config.ivfpq_above)
        _, found = search(
            index, rows.test.features[rows.test_rows], max(LABEL_KS), config.device, "R@k by label"
        )
        # faiss gives row -1 where an approximate index finds fewer than asked for.
        right = (rows.train_labels[found] == rows.test_labels[:, None]) & (found >= 0)
        label = _recalls(right, LABEL_KS)
    halved = np.flatnonzero(queried.frames >= 2)
    if len(halved) < len(queried):
        notes.append(f"{len(queried) - len(halved)} videos of one frame have no halves")
    same_video: dict[int, float] = {}
    if len(halved):
        index = build_index(queried.halves[halved, 1], config.ivfpq_above)
        _, found = search(
            index, queried.halves[halved, 0], max(SAME_VIDEO_KS), config.device, "R@k of halves"
        )
        same_video = _recalls(found == np.arange(len(halved))[:, None], SAME_VIDEO_KS)
    largest = max(len(halved), 0 if rows is None else len(rows.train_rows))
    result = RetrievalResult(
        label=label,
        same_video=same_video,
        queries=0 if rows is None else len(rows.test_rows),
        gallery=0 if rows is None else len(rows.train_rows),
        videos=len(halved),
        train_split="none" if rows is None else rows.train_split,
        test_split="none" if rows is None else rows.test_split,
        index=index_kind(largest, config.ivfpq_above),
        dataset=queried.dataset,
        encoder=features.encoder,
        notes=notes,
    )
    write_json(_out(config) / RESULT, result.to_json())
    return result


def build(config: RetrieveConfig) -> Path:
    """Save an index of all videos, ``retrieval.faiss``, with a description of it; returns its path.

    Raises:
        InputError: the feature folder cannot be used, or the file not be written.
    """
    features = read_features(config.features)
    index = build_index(features.features, config.ivfpq_above)
    path = _out(config) / INDEX
    # The description is written last: without it the index is not used.
    discard(_description(path))
    with atomic_path(path) as temporary:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # faiss's for any failing write
            raise InputError("cannot be written", path, "free some space") from error
    write_json(_description(path), _identity(features))
    return path


def open_index(path: Path, features: Features) -> Any:
    """Open a saved index, which must be of these features.

    Raises:
        InputError: damaged, or an index of another encoder or of other videos.
    """
    again = "run `seco retrieve build` again"
    try:
        identity = json.loads(_description(path).read_bytes())
        encoder, videos = dict(identity["encoder"]), identity["keys_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("has no readable description", path, again) from error
    wanted = _identity(features)
    if encoder.get("sha256") != features.encoder["sha256"]:
        raise InputError(
            f"is of another encoder ({encoder_name(encoder)}) than {features.folder} "
            f"({encoder_name(features.encoder)})",
            path,
            again,
        )
    if videos != wanted["keys_sha256"]:
        raise InputError(f"is of other videos than {features.folder}", path, again)
    try:
        index = faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise InputError("is missing or damaged", path, again) from error
    if (index.ntotal, index.d) != features.features.shape:
        raise InputError(
            f"holds {index.ntotal} x {index.d} values, the features are "
            f"{features.features.shape[0]} x {features.features.shape[1]}",
            path,
            again,
        )
    return index


def query(
    features: Features, key: str, neighbours: int, index: Any = None, device: str = "auto"
) -> list[Neighbour]:
    """The videos nearest to one, itself left out, the nearest first.

    Args:
        index: of all rows of ``features``; built here if not given.

    Raises:
        InputError: there is no such video.
    """
    row = features.find(key)
    if neighbours < 1:
        raise InputError("must be 1 or more", "--neighbours")
    if index is None:
        index = build_index(features.features)
    similarity, found = search(index, features.features[row : row + 1], neighbours + 1, device)
    label = features.labels[row]
    nearest = []
    for other, s in zip(found[0].tolist(), similarity[0].tolist(), strict=True):
        if other in (row, -1):
            continue
        labelled = UNLABELLED not in (label, features.labels[other])
        right = bool(label == features.labels[other]) if labelled else None
        name = features.label_names[other]
        nearest.append(Neighbour(other, features.keys[other], s, name, right))
    return nearest[:neighbours]


def _labelled_rows(
    config: RetrieveConfig, features: Features
) -> tuple[TrainTest | None, list[str]]:
    if (features.labels == UNLABELLED).all():
        return None, ["no video has a label: only the halves are measured"]
    if config.test_features is None and not features.splits:
        return None, ["the videos have no splits: only the halves are measured"]
    rows = read_train_test(
        config.features, config.test_features, config.split, config.train_split, config.test_split
    )
    return rows, rows.notes()


def _recalls(right: NDArray[np.bool_], ks: tuple[int, ...]) -> dict[int, float]:
    """The share of rows (Q, k) with a hit among the first k, for each k."""
    return {k: float(right[:, :k].any(axis=1).mean()) for k in ks}


def _identity(features: Features) -> dict[str, Any]:
    keys = hashlib.sha256("\n".join(features.keys).encode()).hexdigest()
    return {
        "format_version": _FORMAT_VERSION,
        "encoder": features.encoder,
        "videos": len(features),
        "keys_sha256": keys,
    }


def _description(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _out(config: RetrieveConfig) -> Path:
    return Path(config.out or config.features)
