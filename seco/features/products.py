"""Matrix products with features that may be larger than memory, for many classes at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seco.features.matrix import FeatureMatrix

_RESIDENT_BYTES = 1 << 30  # up to this size, rows are read once; larger ones in every pass
_DEVICE_SHARE = 0.4  # of a GPU's free memory, for features


class Products:
    """Products with the features X (N, D) float32 from both sides; counts passes and FLOPs."""

    def __init__(self, rows: FeatureMatrix, device: torch.device) -> None:
        self.count, self.dimension = len(rows), rows.dimension
        self.device = device
        self.passes = 0
        self.pass_seconds = 0.0
        self.flops = {torch.float32: 0.0, torch.float64: 0.0}
        self._rows = rows
        self._all: Tensor | None = None
        limit = float(_RESIDENT_BYTES)
        if device.type == "cuda":
            limit = _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
        if rows.bytes <= limit:
            self._all = torch.empty(self.count, self.dimension, device=device)
            for place, block in rows.blocks():
                self._all[place] = torch.from_numpy(_writable(block)).to(device)

    def rows_a_block(self, dtype: torch.dtype = torch.float32) -> int:
        """Rows per block of :meth:`blocks`; all of them if they are in a GPU's memory."""
        if self._all is not None and self.device.type == "cuda" and dtype == torch.float32:
            return self.count
        return self._rows.rows_a_block

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield all rows in blocks (n, D), on the device."""
        self.passes += 1
        began = time.perf_counter()
        step = self.rows_a_block(dtype)
        for start in range(0, self.count, step):
            place = slice(start, min(start + step, self.count))
            if self._all is not None:
                yield place, self._all[place].to(dtype)
            else:
                block = torch.from_numpy(_writable(self._rows.block(place.start, place.stop)))
                yield place, block.to(self.device, dtype)
        self.pass_seconds += time.perf_counter() - began

    def take(self, index: Tensor) -> Tensor:
        """Return rows by index, (n, D) float32."""
        if self._all is not None:
            return self._all[index]
        return torch.from_numpy(_writable(self._rows.take(index.cpu().numpy()))).to(self.device)

    def scores(self, weights: Tensor) -> Tensor:
        """Compute W Xᵀ in the weights' precision: (K, D) to (K, N)."""
        out = weights.new_empty((len(weights), self.count))
        for place, block in self.blocks(weights.dtype):
            torch.mm(weights, block.T, out=out[:, place])
        self.worked(len(weights), weights.dtype)
        return out

    def combine(self, coefficients: Tensor) -> Tensor:
        """Compute A X in float64: (K, N) to (K, D)."""
        out = coefficients.new_zeros((len(coefficients), self.dimension), dtype=torch.float64)
        for place, block in self.blocks(torch.float64):
            out.addmm_(coefficients[:, place].double(), block)
        self.worked(len(coefficients), torch.float64)
        return out

    def curve(self, vectors: Tensor, active: Tensor) -> Tensor:
        """Compute Xᵀ A_k X v_k (K, D) for active rows (K, N) bool, in the vectors' precision."""
        out = torch.zeros_like(vectors)
        for place, block in self.blocks(vectors.dtype):
            out.addmm_((vectors @ block.T).mul_(active[:, place]), block)
        self.worked(2 * len(vectors), vectors.dtype)
        return out

    def gram(self) -> Tensor:
        """Compute Xᵀ X (D, D) in float64, from float32 products of each block."""
        out = torch.zeros(self.dimension, self.dimension, dtype=torch.float64, device=self.device)
        for _, block in self.blocks(torch.float32):
            out += block.T @ block
        self.worked(self.dimension, torch.float32)
        return out

    @cached_property
    def largest_square(self) -> float:
        """max ||x||²; NaN if a feature is NaN."""
        squares = [b.square().sum(1).max() for _, b in self.blocks(torch.float32)]
        return float(torch.stack(squares).max())

    def worked(self, vectors: int, dtype: torch.dtype, rows: int | None = None) -> None:
        """Count the FLOPs of products of so many vectors with the rows (default: all rows)."""
        size = (self.count if rows is None else rows) * self.dimension
        self.flops[dtype] += 2.0 * vectors * size


class OneVsRest:
    """Labels y of one-vs-rest problems: +1 for a class's own rows, -1 for the others.

    They are never materialised as (K, N): ``own`` has the rows of each class.
    """

    def __init__(self, target: Tensor, classes: Tensor) -> None:
        self.own = [(target == k).nonzero().flatten() for k in classes]

    def part(self, chosen: Tensor) -> OneVsRest:
        """Return the problems of some of the classes."""
        part = OneVsRest.__new__(OneVsRest)
        part.own = [self.own[k] for k in chosen.tolist()]
        return part

    def signed_(self, values: Tensor) -> Tensor:
        """Multiply values (K, N) by y, in place."""
        values.neg_()
        for row, own in zip(values, self.own, strict=True):
            row[own] *= -1
        return values

    def margins(self, scores: Tensor) -> Tensor:
        """Turn scores w·x (K, N) into 1 - y w·x, in place."""
        scores.add_(1)
        for row, own in zip(scores, self.own, strict=True):
            row[own] = 2 - row[own]
        return scores


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    """Copy an array if it is read-only, as memory-mapped ones are, which torch does not accept."""
    return np.require(array, requirements=["C", "W"])
