"""Weighted nearest-neighbour classification of features by cosine similarity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from seco.features.matrix import FeatureMatrix
from seco.features.products import Products

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
    """Votes of the nearest training rows: each adds exp((s - t) / temperature) to its class.

    s is its cosine and t that of the nearest row. Subtracting t keeps the votes distinguishable at
    any temperature.

    Args:
        train: (N, D), with ``labels`` (N,).
        test: (M, D).
        neighbours: number of voters; all rows if there are fewer.

    Returns:
        The classes (K,) in ascending order and the votes (M, K).

    Raises:
        ValueError: there are no training rows, or a setting is not above 0.
    """
    if not len(labels) or neighbours < 1 or not temperature > 0:
        raise ValueError("kNN needs training rows, neighbours >= 1 and a temperature above 0")
    classes = np.unique(labels).astype(np.int64)
    votes = np.empty((len(test), len(classes)))
    rows = FeatureMatrix(train), FeatureMatrix(test)
    for place, block in knn_votes(
        rows[0], labels, rows[1], neighbours=neighbours, temperature=temperature, device=device
    ):
        votes[place] = block
    return classes, votes


def knn_votes(
    train: FeatureMatrix,
    labels: NDArray[Any],
    test: FeatureMatrix,
    *,
    neighbours: int,
    temperature: float,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield the votes (m, K) for a block of test rows at a time, without loading all features.

    For every block of test rows, training rows are read block by block and the nearest so far are
    kept.
    """
    classes, targets = np.unique(labels, return_inverse=True)
    gallery = Products(train, torch.device(device))
    target = torch.from_numpy(targets.astype(np.int64)).to(gallery.device)
    k = min(neighbours, gallery.count)
    width = max(k + gallery.rows_a_block(), train.dimension)
    rows = max(1, _BLOCK_BYTES // (4 * width))
    for start in range(0, len(test), rows):
        place = slice(start, min(start + rows, len(test)))
        block = torch.tensor(test.block(place.start, place.stop)).to(gallery.device)
        similarity, nearest = _nearest(gallery, _unit(block), k)
        away = similarity.double() - similarity.amax(1, keepdim=True)
        weight = (away / temperature).exp()
        counted = torch.zeros(len(block), len(classes), dtype=torch.float64, device=gallery.device)
        counted.scatter_add_(1, target[nearest], weight)
        yield place, counted.cpu().numpy()


def _nearest(gallery: Products, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and rows (m, k) of the nearest training rows to unit queries (m, D)."""
    best = queries.new_empty((len(queries), 0))
    found = best.long()
    for place, block in gallery.blocks(torch.float32):
        similarity = queries @ _unit(block).T
        values, columns = similarity.topk(min(k, len(block)), dim=1)
        best = torch.cat([best, values], dim=1)
        found = torch.cat([found, columns + place.start], dim=1)
        if best.shape[1] > k:
            best, chosen = best.topk(k, dim=1)
            found = found.gather(1, chosen)
    return best, found


def _unit(rows: Tensor) -> Tensor:
    """Scale rows to length 1 without overflow or underflow; zero rows stay zero."""
    largest = rows.abs().amax(1, keepdim=True)
    return normalize(rows / largest.where(largest > 0, 1), dim=1)
