"""Feature vectors scaled to length 1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SQUARED = 1e-15, 1e15  # lengths whose squares float32 holds well


def unit_rows(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows (V, D) of length 1, contiguous, of finite ones; rows of zeros stay zero."""
    x = np.ascontiguousarray(features, dtype=np.float32)
    with np.errstate(over="ignore"):
        length = np.linalg.norm(x, axis=1, keepdims=True)
    odd = np.flatnonzero(~((length > _SQUARED[0]) & (length < _SQUARED[1])).all(axis=1))
    if len(odd):
        largest = np.abs(x[odd]).max(axis=1, keepdims=True, initial=0)
        x = x.copy()
        x[odd] = np.divide(x[odd], largest, out=np.zeros_like(x[odd]), where=largest > 0)
        length[odd] = np.linalg.norm(x[odd], axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    return unit
