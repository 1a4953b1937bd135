"""Small feature folders for tests, written by the real writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seco.features.store import write_features

META: dict[str, Any] = {
    "encoder": {"arch": "resnet18", "checkpoint": "random", "sha256": "ab" * 32, "seed": 0},
    "shards": ["shards/made.json"],
    "frames": 30,
    "short_edge": 256,
    "crop_size": 224,
    "toolkit": "0.1.0",
}


def clusters(
    videos: int, dimension: int, classes: int, spread: float, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features (V, D) around one centre a class, and labels (V,) 0, 1, …, 0, 1, …"""
    rng = np.random.default_rng(seed)
    labels = np.arange(videos) % classes
    centres = rng.standard_normal((classes, dimension))
    x = centres[labels] + spread * rng.standard_normal((videos, dimension))
    return x.astype(np.float32), labels


def made_rows(labels: list[int | None], splits: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {
            "key": f"v{number:03d}",
            "source": f"class{label}/v{number:03d}.avi",
            "label": label,
            "label_name": None if label is None else f"class{label}",
            "frames": 30,
            "shard": "made-000.tar",
            "splits": split,
        }
        for number, (label, split) in enumerate(zip(labels, splits, strict=True))
    ]


def write_clusters(
    folder: Path,
    videos: int = 60,
    dimension: int = 16,
    classes: int = 3,
    spread: float = 0.3,
    rows: list[dict[str, Any]] | None = None,
    sha256: str = "ab" * 32,
    shift: float = 0.0,
) -> NDArray[np.float32]:
    """A folder of clusters, two thirds of every class in train; returns the features."""
    features, labels = clusters(videos, dimension, classes, spread)
    features += np.float32(shift)
    if rows is None:
        values = ["test" if n // classes % 3 == 0 else "train" for n in range(videos)]
        rows = made_rows(labels.tolist(), [{"1": value} for value in values])
    rng = np.random.default_rng(1)
    noise = 0.01 * rng.standard_normal((videos, 2, dimension)).astype(np.float32)
    meta = {**META, "encoder": {**META["encoder"], "sha256": sha256}}
    write_features(folder, features, features[:, None] + noise, rows, meta)
    return features
