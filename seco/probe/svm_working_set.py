"""A class's SVM on few of the rows, solved exactly in the span of these rows.

The minimum depends only on the rows within the margin, a few per cent of them as a rule. With
w = X_Wᵀ b for the n rows W, every quantity is one of the kernel matrix X_W X_Wᵀ (n, n): Newton's
steps cost n³/3 instead of passes over the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seco.probe.svm_line_search import factor, line_search

_MAX_NEWTON = 30
_FILLED_AT_ONCE = 128  # rows


@dataclass
class WorkingSet:
    """The rows of one class, their kernel matrix and coefficients."""

    index: Tensor  # (n,) row numbers
    sign: Tensor  # (n,) y, float64
    kernel: Tensor  # (n, n) float32 or float64
    coefficients: Tensor  # (n,) b = y a with a >= 0, float64

    @classmethod
    def empty(cls, device: torch.device, dtype: torch.dtype) -> WorkingSet:
        """No rows yet; ``dtype`` is the kernel's."""
        nothing = torch.zeros(0, dtype=torch.float64, device=device)
        return cls(nothing.long(), nothing, nothing.to(dtype)[:, None].expand(0, 0), nothing)

    def replace(self, kept: Tensor, new: Tensor, new_sign: Tensor, x: Tensor) -> int:
        """Keep some rows and add others; returns the entries of the kernel matrix computed.

        Args:
            kept: (m,) which of the rows stay.
            new: (p,) row numbers that are added, with ``new_sign`` (p,).
            x: (m + p, D) the features of all of them, in this order.
        """
        m = len(kept)
        kernel = self.kernel.new_empty((len(x), len(x)))
        kernel[:m, :m] = self.kernel[kept][:, kept]
        x = x.to(kernel.dtype)
        computed = _fill(kernel, x, m)
        self.kernel = kernel
        self.index = torch.cat([self.index[kept], new])
        self.sign = torch.cat([self.sign[kept], new_sign])
        self.coefficients = torch.cat([self.coefficients[kept], new_sign.new_zeros(len(new))])
        return computed

    def solve(self, margin: Tensor, c: float) -> None:
        """Coefficients of the minimum over these rows alone.

        Only changes go through the kernel matrix. Its rounding therefore shrinks with each call, as
        in iterative refinement.

        Args:
            margin: (n,) 1 - y w·x in float64, at the coefficients there are.
        """
        kernel = self.kernel.double()
        b, sign = self.coefficients, self.sign
        active = margin > 0
        for _ in range(_MAX_NEWTON):
            inside = active.nonzero().flatten()
            target = -b  # rows outside the margin lose their coefficient
            right = (sign * margin - b / (2 * c))[inside]
            leaving = (~active & (b != 0)).nonzero().flatten()
            if len(leaving):
                right = right + (b[leaving] @ kernel[leaving])[inside]
            matrix = self.kernel[inside][:, inside].double()  # float32 rows are copied faster
            matrix.diagonal().add_(1 / (2 * c))
            target[inside] = torch.cholesky_solve(right[:, None], factor(matrix))[:, 0]
            product = kernel @ target
            change = sign * product
            step = line_search(
                (b @ product)[None], (target @ product)[None], margin[None], change[None], c
            )[0]
            b = b + step * target
            margin = margin - step * change
            before, active = active, margin > 0
            if abs(float(step) - 1) < 1e-6 and torch.equal(before, active):
                break
        # The bound needs a >= 0.
        self.coefficients = sign * (sign * b).clamp(min=0)

    def lower_bound(self, square: Tensor, c: float) -> Tensor:
        """The dual objective, below the minimum over all rows; ``square`` is ||X_Wᵀ b||²."""
        a = self.coefficients.abs()
        return a.sum() - square / 2 - a.square().sum() / (4 * c)


def _fill(kernel: Tensor, x: Tensor, start: int) -> int:
    """Rows and columns of X Xᵀ from ``start`` on; of what is symmetric nearly a half is spared.

    Returns the number of entries computed.
    """
    computed = 0
    step = max(_FILLED_AT_ONCE, (len(x) - start) // 8)
    for first in range(start, len(x), step):
        last = min(first + step, len(x))
        torch.mm(x[first:last], x[:last].T, out=kernel[first:last, :last])
        kernel[:first, first:last] = kernel[first:last, :first].T
        computed += (last - first) * last
    return computed
