"""Weighted nearest-neighbour classification of features by cosine similarity."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

_BLOCK_BYTES = 256 << 20


def knn_scores(
    train: NDArray[Any],
    labels: NDArray[Any],
    test: NDArray[Any],
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Votes of the nearest training rows: each gives exp((s - 1) / temperature) to its class.

    Args:
        train: (N, D), with ``labels`` (N,).
        test: (M, D).
        neighbours: how many vote; all if there are fewer.

    Returns:
        The classes (K,) in ascending order and the votes (M, K).

    Raises:
        ValueError: no training rows, or a setting that is not above 0.
    """
    if not len(labels) or neighbours < 1 or not temperature > 0:
        raise ValueError("kNN needs training rows, neighbours >= 1 and a temperature above 0")
    classes, targets = np.unique(labels, return_inverse=True)
    target = torch.from_numpy(targets.astype(np.int64)).to(device)
    gallery = normalize(torch.tensor(train, dtype=torch.float32, device=device), dim=1)
    k = min(neighbours, len(labels))
    votes = np.empty((len(test), len(classes)))
    rows = max(1, _BLOCK_BYTES // (4 * len(labels)))
    for start in range(0, len(test), rows):
        block = torch.tensor(test[start : start + rows], dtype=torch.float32, device=device)
        similarity, nearest = (normalize(block, dim=1) @ gallery.T).topk(k, dim=1)
        weight = ((similarity.double() - 1) / temperature).exp()
        counted = torch.zeros(len(block), len(classes), dtype=torch.float64, device=device)
        counted.scatter_add_(1, target[nearest], weight)
        votes[start : start + rows] = counted.cpu().numpy()
    return classes.astype(np.int64), votes
