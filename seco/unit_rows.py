"""Feature vectors scaled to length 1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unit_rows(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows (V, D) of length 1, contiguous; rows of zeros stay zero."""
    x = np.ascontiguousarray(features, dtype=np.float32)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    return unit
