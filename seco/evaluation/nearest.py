"""Exact nearest neighbours by cosine, in blocks."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from seco.features.matrix import FeatureMatrix
from shards.errors import InputError
from shards.progress import progress

_QUERIES_AT_ONCE = 8192

Found = tuple[NDArray[np.float32], NDArray[np.int64]]


class NearestIndex(Protocol):
    """Finds the nearest of its vectors."""

    def __len__(self) -> int: ...

    def search(self, queries: FeatureMatrix, k: int, title: str = "") -> Found:
        """Cosines and positions (Q, k) of the vectors nearest to each query, nearest first.

        k is capped at the index size. Position -1 means not found (approximate indexes only).

        Args:
            title: if given, shown with a progress bar.
        """


class ExactIndex:
    """Compares queries with every vector, read block by block; needs no index structure.

    Args:
        vectors: the vectors to search.
        device: ``auto`` uses a GPU if faiss can.

    Raises:
        InputError: a GPU is requested and faiss cannot use one.
    """

    def __init__(self, vectors: FeatureMatrix, device: str = "auto") -> None:
        self._vectors = vectors
        self._gpu = gpus_for(device) > 0

    def __len__(self) -> int:
        return len(self._vectors)

    def search(self, queries: FeatureMatrix, k: int, title: str = "") -> Found:
        """See :class:`NearestIndex`; ties go to the earlier block."""
        k = min(k, len(self))
        cosines, found = nothing_found(len(queries), k)
        passes = -(-len(queries) // _QUERIES_AT_ONCE)
        with progress(title, passes * len(self), "comparisons", quiet=not title) as shown:
            for first in range(0, len(queries), _QUERIES_AT_ONCE):
                some = slice(first, min(first + _QUERIES_AT_ONCE, len(queries)))
                asked = queries.take(np.arange(some.start, some.stop))
                for place, block in self._vectors.blocks():
                    near, at = self._compare(asked, block, min(k, len(block)))
                    _merge(cosines[some], found[some], near, at + place.start)
                    shown.advance(len(block))
        return cosines, found

    def _compare(self, queries: NDArray[np.float32], block: NDArray[np.float32], k: int) -> Found:
        compare = functools.partial(faiss.knn_gpu, _gpu_resources()) if self._gpu else faiss.knn
        cosines, found = compare(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
        return np.asarray(cosines), np.asarray(found)


def nothing_found(queries: int, k: int) -> Found:
    """Initial result: position -1 and cosine -inf everywhere."""
    return (
        np.full((queries, k), -np.inf, dtype=np.float32),
        np.full((queries, k), -1, dtype=np.int64),
    )


def gpus_for(device: str) -> int:
    """Number of GPUs for faiss to use.

    Raises:
        InputError: the device is unknown, or a GPU is requested and faiss cannot use one.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device {device!r}", "--device", "use auto, cpu or cuda")
    # faiss-cpu and faiss-gpu share a module name; only faiss-gpu has these resources.
    there = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if device == "cuda" and not there:
        raise InputError("faiss finds no GPU", "--device", "install faiss-gpu or use cpu")
    return 0 if device == "cpu" else there


@functools.lru_cache
def _gpu_resources() -> Any:
    return faiss.StandardGpuResources()  # takes gigabytes of GPU memory, so only once


def _merge(
    cosines: NDArray[np.float32],
    found: NDArray[np.int64],
    near: NDArray[np.float32],
    at: NDArray[np.int64],
) -> None:
    """Merge in place: keep the k best of both in ``cosines`` and ``found`` (Q, k)."""
    k = cosines.shape[1]
    both = np.concatenate([cosines, near], axis=1)
    order = np.argsort(-both, axis=1, kind="stable")[:, :k]
    cosines[:] = np.take_along_axis(both, order, axis=1)
    found[:] = np.take_along_axis(np.concatenate([found, at], axis=1), order, axis=1)
