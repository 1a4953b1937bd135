"""Truncated Newton for classes that have many rows within the margin (``svm.py``).

Newton's systems (I + 2C X_aᵀ X_a) d = -gradient, X_a the rows within a class's margin, are solved
by conjugate gradients in float32, all classes in one pass over the features, preconditioned with
the eigenvectors that all classes share. Gradient, line search and objective are float64, so that
rounding in a direction costs steps and never the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from seco.probe.svm_rows import OneVsRest, Products

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


_MAX_CG = 200
_FIRST_TOLERANCE = 0.1
_FEW = 0.1  # share of rows below which a class gathers them: reading all costs more
_GATHERED_BYTES = 256 << 20
_SMALL_DIMENSION = 256  # up to this the matrix is factorised
_EXACT_AFTER = 25  # steps; a class that takes more needs better directions than float32 gives


class Newton:
    """Minimises for groups of classes; the eigenvectors are computed once, when needed."""

    def __init__(self, products: Products, c: float, gap: float) -> None:
        self.products, self.c, self.gap = products, c, gap

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (D,) and vectors (D, D) of XᵀX."""
        values, vectors = torch.linalg.eigh(self.products.gram())
        return values, vectors

    def minimise(
        self,
        weights: Tensor,
        rest: OneVsRest,
        max_steps: int,
        advance: Callable[[int], object],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From weights (K, D): the minimum's, its objective, relative gap and steps (K,)."""
        c, count = self.c, len(weights)
        weights = weights.clone()
        objective, gap = weights.new_empty(count), weights.new_empty(count)
        steps = torch.zeros(count, dtype=torch.int64, device=weights.device)
        live = torch.arange(count, device=weights.device)
        margin = rest.margins(self.products.scores(weights))
        first: Tensor | None = None
        for number in range(max_steps + 1):
            signs = rest.part(live)
            hinge = margin.clamp(min=0)
            objective[live] = 0.5 * weights[live].square().sum(1) + c * hinge.square().sum(1)
            gradient = weights[live] - 2 * c * self.products.combine(signs.signed_(hinge))
            del hinge
            # The objective is strongly convex: it lies at most ||gradient||² / 2 above its minimum.
            gap[live] = 0.5 * gradient.square().sum(1) / objective[live].clamp(min=1e-300)
            going = gap[live] > self.gap
            if not going.all():
                advance(int((~going).sum()))
                live, gradient, margin = live[going], gradient[going], margin[going]
                first = None if first is None else first[going]
                signs = rest.part(live)
            if not len(live) or number == max_steps:
                break
            norm = gradient.norm(dim=1)
            first = norm if first is None else torch.maximum(first, norm)
            direction = self._direction(gradient, margin > 0, norm / first, number)
            change = signs.signed_(self.products.scores(direction))
            inner, square = (weights[live] * direction).sum(1), direction.square().sum(1)
            step = line_search(inner, square, margin, change, c)
            weights[live] += step[:, None] * direction
            steps[live] += 1
            margin -= change.mul_(step[:, None])
            del change
        return weights, objective, gap, steps

    def _direction(self, gradient: Tensor, active: Tensor, progress: Tensor, number: int) -> Tensor:
        """(K, D); ``progress`` (K,) is the gradient's norm beside the first one."""
        products, direction = self.products, torch.empty_like(gradient)
        counts = active.sum(1)
        tolerance = torch.clamp(progress.sqrt(), max=_FIRST_TOLERANCE).square()
        dtype = torch.float64 if number >= _EXACT_AFTER else torch.float32
        if products.dimension <= _SMALL_DIMENSION:
            return self._factorised(gradient, active)
        few = counts < min(_FEW * products.count, _GATHERED_BYTES // (4 * products.dimension))
        if products.device.type == "cuda":
            few = torch.zeros_like(few)
        for k in few.nonzero().flatten().tolist():
            x = products.take(active[k].nonzero().flatten()).to(dtype)
            one = slice(k, k + 1)
            direction[one], took = self._conjugate_gradients(
                gradient[one], counts[one], tolerance[one], dtype,
                lambda v, _, x=x: (v @ x.T) @ x,  # type: ignore[misc]
            )  # fmt: skip
            products.worked(2 * took, dtype, len(x))
        many = (~few).nonzero().flatten()
        if len(many):
            mask = active if len(many) == len(active) else active[many]
            direction[many], _ = self._conjugate_gradients(
                gradient[many], counts[many], tolerance[many], dtype,
                lambda v, chosen: products.curve(v, mask[chosen]),
            )  # fmt: skip
        return direction

    def _factorised(self, gradient: Tensor, active: Tensor) -> Tensor:
        """The same (K, D) by factorising each class's matrix, summed a block of rows at a time."""
        dimension = gradient.shape[1]
        matrices = torch.eye(dimension, dtype=gradient.dtype, device=gradient.device)
        matrices = matrices.repeat(len(gradient), 1, 1)
        for place, block in self.products.blocks(torch.float64):
            for matrix, inside in zip(matrices, active[:, place], strict=True):
                x = block[inside]
                matrix.addmm_(x.T, x, alpha=2 * self.c)
                self.products.worked(dimension, torch.float64, len(x))
        solved = [
            torch.cholesky_solve(right[:, None], factor(matrix))[:, 0]
            for right, matrix in zip(gradient, matrices, strict=True)
        ]
        return -torch.stack(solved)

    def _conjugate_gradients(
        self,
        gradient: Tensor,
        counts: Tensor,
        tolerance: Tensor,
        dtype: torch.dtype,
        curve: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, int]:
        """Directions (K, D) float64 and the rounds taken.

        Args:
            counts: (K,) rows within the margin.
            tolerance: (K,) of the squared residual in the preconditioner's norm.
            curve: Xᵀ A X v of vectors (k, D) of the chosen classes (k,).
        """
        values, vectors = (part.to(dtype) for part in self._spectrum)
        share = (counts / self.products.count).to(dtype)
        scale = 1 / (1 + 2 * self.c * share[:, None] * values.clamp(min=0))  # (K, D)

        def precondition(residual: Tensor, chosen: Tensor) -> Tensor:
            return ((residual @ vectors) * scale[chosen]) @ vectors.T

        # Scaled, because float32 has no room for the squares of the largest gradients.
        size = gradient.norm(dim=1, keepdim=True).clamp(min=1e-300)
        live = torch.arange(len(gradient), device=gradient.device)
        residual = (-gradient / size).to(dtype)
        direction = torch.zeros_like(residual)
        search = precondition(residual, live)
        square = (residual * search).sum(1)
        goal = tolerance.to(dtype) * square
        rounds = 0
        for rounds in range(_MAX_CG):  # noqa: B007
            going = square > goal[live]
            if not going.all():
                live, residual, search, square = (
                    a[going] for a in (live, residual, search, square)
                )
            if not len(live):
                break
            curved = search + 2 * self.c * curve(search, live)
            length = square / (search * curved).sum(1)
            direction[live] += length[:, None] * search
            residual = residual - length[:, None] * curved
            better = precondition(residual, live)
            previous, square = square, (residual * better).sum(1)
            search = better + (square / previous)[:, None] * search
        return direction.double() * size, rounds
