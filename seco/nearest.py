"""Exact and approximate nearest neighbours by cosine, with faiss."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from seco.unit_rows import unit_rows
from shards.errors import InputError
from shards.progress import progress

_IVFPQ_LEAST = 256  # a code book of 8 bits has 256 entries
_TRAINED_ON_LEAST = 39  # rows a list below which faiss warns of poor clusters
_PROBED_LISTS = 32
_CODE_BYTES = 64
_QUERIES_AT_ONCE = 4096


def build_index(features: NDArray[np.float32], ivfpq_above: int = 0) -> Any:
    """A faiss index of the cosine over the rows of features (V, D).

    Args:
        ivfpq_above: exact up to this many rows, an IVF-PQ past it (about 64 bytes a video and a
            few per cent of the recall); 0 for always exact.

    Raises:
        InputError: too few rows to train an IVF-PQ on.
    """
    rows, dimension = features.shape
    if index_kind(rows, ivfpq_above) == "flat":
        exact = faiss.IndexFlatIP(dimension)
        for start in range(0, rows, _QUERIES_AT_ONCE):
            exact.add(unit_rows(features[start : start + _QUERIES_AT_ONCE]))
        return exact
    if rows < _IVFPQ_LEAST:
        raise InputError(
            f"{rows} videos are too few for an approximate index", "--ivfpq-above", "raise it"
        )
    unit = unit_rows(features)
    lists = max(1, min(round(4 * rows**0.5), rows // _TRAINED_ON_LEAST))
    codes = max(m for m in range(1, min(_CODE_BYTES, dimension) + 1) if dimension % m == 0)
    quantizer = faiss.IndexFlatIP(dimension)
    index = faiss.IndexIVFPQ(quantizer, dimension, lists, codes, 8, faiss.METRIC_INNER_PRODUCT)
    index.train(unit)
    index.add(unit)
    index.nprobe = min(_PROBED_LISTS, lists)
    return index


def index_kind(rows: int, ivfpq_above: int) -> str:
    """``flat`` or ``ivfpq``.

    Raises:
        InputError: a negative limit.
    """
    if ivfpq_above < 0:
        raise InputError("must be 0 or more", "--ivfpq-above")
    return "ivfpq" if 0 < ivfpq_above < rows else "flat"


def search(
    index: Any, queries: NDArray[np.float32], k: int, device: str = "auto", title: str = ""
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cosines and rows (Q, k) of the nearest to queries (Q, D), the nearest first.

    k is at most the size of the index; row -1 is nothing found (approximate indexes only).

    Args:
        device: ``auto`` takes the GPUs when faiss can use any; exact indexes only.
        title: shown with a progress bar, if given.

    Raises:
        InputError: a GPU is asked for and faiss can use none.
    """
    k = min(k, index.ntotal)
    index = _placed(index, device)
    similarity = np.empty((len(queries), k), dtype=np.float32)
    found = np.empty((len(queries), k), dtype=np.int64)
    if not title:
        similarity[:], found[:] = index.search(unit_rows(queries), k)
        return similarity, found
    with progress(title, len(queries), "queries") as shown:
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            block = slice(start, start + _QUERIES_AT_ONCE)
            similarity[block], found[block] = index.search(unit_rows(queries[block]), k)
            shown.advance(len(queries[block]))
    return similarity, found


def _placed(index: Any, device: str) -> Any:
    # faiss-cpu and faiss-gpu share a name; only the second moves indexes. An IVF-PQ stays on the
    # CPU: a GPU's look-up tables hold no codes of 64 bytes.
    gpus = faiss.get_num_gpus() if hasattr(faiss, "index_cpu_to_all_gpus") else 0
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device {device!r}", "--device", "cpu or cuda")
    if device == "cuda" and not gpus:
        raise InputError("faiss can use no GPU here", "--device", "install faiss-gpu or give cpu")
    movable = gpus and device != "cpu" and isinstance(index, faiss.IndexFlat)
    return faiss.index_cpu_to_all_gpus(index) if movable else index
