"""What both ways of solving an SVM share: the step along a direction, and a safe factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_ROUNDS = 30
_TOLERANCE = 1e-2


def line_search(inner: Tensor, square: Tensor, margin: Tensor, change: Tensor, c: float) -> Tensor:
    """The step (K,) to each class's minimum along its direction d.

    The objective's derivative along a line is piecewise linear and rising, so that Newton's method,
    kept between the last step too short and the last too long, finds its zero in a few rounds.

    Args:
        inner: (K,) w·d.
        square: (K,) d·d.
        margin: (K, N) 1 - y w·x at step 0.
        change: (K, N) y d·x.
    """
    step = torch.ones_like(inner)
    low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
    slope, _ = _derivatives(torch.zeros_like(step), inner, square, margin, change, c)
    for _ in range(_MAX_ROUNDS):
        first, second = _derivatives(step, inner, square, margin, change, c)
        if (first.abs() <= _TOLERANCE * slope.abs()).all():
            break
        low, high = torch.where(first < 0, step, low), torch.where(first > 0, step, high)
        step = step - first / second
        middle = torch.where(high.isinf(), 2 * low, (low + high) / 2)
        step = torch.where((step > low) & (step < high), step, middle)
    return step


def _derivatives(
    step: Tensor, inner: Tensor, square: Tensor, margin: Tensor, change: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """The objective's first and second derivative (K,) by the step; a class's rows at a time."""
    first, second = torch.empty_like(step), torch.empty_like(step)
    for k in range(len(step)):
        inside = (margin[k] - step[k] * change[k]).clamp_(min=0)
        first[k] = change[k] @ inside
        second[k] = (change[k] * (inside > 0)) @ change[k]
    return inner + step * square - 2 * c * first, square + 2 * c * second


def factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a matrix that is positive-definite but for rounding.

    Features of 10⁸ and more (a network after a few steps) swamp the identity in float64. A larger
    diagonal changes the direction's length and slant, not that it goes down, and the line search
    takes care of the rest.
    """
    more = torch.finfo(matrix.dtype).eps * float(matrix.diagonal().abs().mean())
    while True:
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return lower
        matrix.diagonal().add_(more)
        more *= 10
