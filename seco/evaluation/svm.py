"""Linear SVM of LIBLINEAR's ``-s 2`` form, solved for all classes at once with matrix products.

Paper §5.2 and the authors' protocol: L2-regularised squared hinge, one-vs-rest, no bias. For every
class k, with y = +1 for its rows and -1 for the others, the weights are the minimum of

    0.5 ||w_k||² + C Σ_i max(0, 1 - y_ik w_k·x_i)²

which is strictly convex, so any solver that converges gives the same weights.

Rounds of working sets. Each round solves every class on a few rows, exactly and in their span: the
minimum depends only on the rows within the margin, usually a few per cent, and with w = X_Wᵀ b for
the n rows W every quantity is one of the kernel matrix X_W X_Wᵀ (n, n), where a Newton step costs
n³/3 instead of passes over the features. It then finds the margins of all rows for all classes in
one pass, drops rows outside the margin and adds those inside, the deepest first and at most as many
as there are. The solution on some of the rows bounds the objective over all rows from below, which
proves that a finished class is solved.

Truncated Newton, for classes with many rows within the margin. Newton's systems
(I + 2C X_aᵀ X_a) d = -gradient, where X_a are these rows, are solved by conjugate gradients in
float32, all classes in one pass over the features, preconditioned with the eigenvectors that all
classes share.

Features are float32, and so are products that only give a direction. Objectives, gradients, line
searches and the margins that prove a class solved are float64, so rounding costs steps and never
the result.

LIBLINEAR's way (``--tolerance``): trust-region Newton from weights of zero (Lin, Weng and Keerthi,
"Trust region Newton method for large-scale logistic regression", JMLR 2008). A class stops at

    ||gradient|| <= tolerance · min(positives, negatives) / N · ||gradient at zero||

With features of unequal directions this is many per cent above the minimum, and where it stops
depends on the steps taken. So the steps are LIBLINEAR's, in float64; another solver with the same
rule stops elsewhere and predicts other classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seco.features.matrix import FeatureMatrix, FeaturesTooLarge
from seco.features.products import OneVsRest, Products
from seco.processes.device import exact_products

_MAX_ROUNDS = 30
_TOLERANCE = 1e-2


def line_search(inner: Tensor, square: Tensor, margin: Tensor, change: Tensor, c: float) -> Tensor:
    """The step (K,) to each class's minimum along its direction d.

    The derivative along a line is piecewise linear and increasing, so Newton's method, bracketed by
    the last step too short and the last too long, finds its zero in a few rounds.

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
    """First and second derivative (K,) of the objective by the step, class by class."""
    first, second = torch.empty_like(step), torch.empty_like(step)
    for k in range(len(step)):
        inside = (margin[k] - step[k] * change[k]).clamp_(min=0)
        first[k] = change[k] @ inside
        second[k] = (change[k] * (inside > 0)) @ change[k]
    return inner + step * square - 2 * c * first, square + 2 * c * second


def factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a matrix that is positive-definite up to rounding.

    Features of 10⁸ and more (a network after a few steps) swamp the identity in float64. A larger
    diagonal changes the direction, but it still descends, and the line search does the rest.
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
_FEW = 0.1  # fraction of rows below which gathering them is cheaper than reading all
_GATHERED_BYTES = 256 << 20
_SMALL_DIMENSION = 256  # up to here the matrix is factorised
_EXACT_AFTER = 25  # steps, after which a class gets float64 directions


class Newton:
    """Truncated Newton for groups of classes; computes the eigenvectors once, when needed."""

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
        """Minimise from weights (K, D): the new weights, and objective, gap and steps (K,)."""
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
        """(K, D) Newton directions; ``progress`` (K,) is the gradient norm over the first one."""
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
        """(K, D) directions by factorising each class's matrix, summed over blocks of rows."""
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
        """Directions (K, D) in float64, and the number of rounds.

        Args:
            counts: (K,) numbers of rows within the margin.
            tolerance: (K,) relative squared residual in the preconditioner's norm.
            curve: Xᵀ A X v for vectors (k, D) of the chosen classes (k,).
        """
        values, vectors = (part.to(dtype) for part in self._spectrum)
        share = (counts / self.products.count).to(dtype)
        scale = 1 / (1 + 2 * self.c * share[:, None] * values.clamp(min=0))  # (K, D)

        def precondition(residual: Tensor, chosen: Tensor) -> Tensor:
            return ((residual @ vectors) * scale[chosen]) @ vectors.T

        # Scaled, because squares of the largest gradients overflow float32.
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


MAX_STEPS = 1000  # LIBLINEAR's
_CG_TOLERANCE = 0.1  # of the gradient's norm
# Ratios of actual to predicted decrease; a step is taken above the first.
_TAKEN, _POOR, _GOOD = 1e-4, 0.25, 0.75
# Factors of the radius: minimum, maximum after a poor step, maximum after a good one.
_LEAST, _POOR_MOST, _GOOD_MOST = 0.25, 0.5, 4.0


def fit_as_liblinear(
    products: Products,
    rest: OneVsRest,
    c: float,
    tolerance: float,
    advance: Callable[[int], object],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fit as LIBLINEAR does; return weights (K, D), and objective, gap, steps, converged (K,)."""
    count = len(rest.own)
    weights = torch.zeros(count, products.dimension, dtype=torch.float64, device=products.device)
    margin = rest.margins(products.scores(weights))
    objective = _objective(weights, margin, c)
    gradient = _gradient(products, rest, weights, margin, c)
    norm = gradient.norm(dim=1)
    fewer = torch.tensor([min(len(own), products.count - len(own)) for own in rest.own])
    goal = tolerance * fewer.clamp(min=1).to(norm) / products.count * norm
    radius = norm.clone()
    steps = torch.zeros(count, dtype=torch.int64, device=products.device)
    stuck = torch.zeros(count, dtype=torch.bool, device=products.device)
    live = torch.arange(count, device=products.device)
    for _ in range(MAX_STEPS):
        going = (norm[live] > goal[live]) & ~stuck[live]
        if not going.all():
            advance(int((~going).sum()))
            live, gradient, margin = live[going], gradient[going], margin[going]
        if not len(live):
            break
        signs = rest.part(live)
        step, residual = _conjugate_gradients(products, gradient, margin > 0, radius[live], c)
        moved = margin - signs.signed_(products.scores(step))
        reached = _objective(weights[live] + step, moved, c)
        slope = (gradient * step).sum(1)
        predicted = -0.5 * (slope - (step * residual).sum(1))
        actual = objective[live] - reached
        length = step.norm(dim=1)
        before = torch.where(steps[live] == 0, torch.minimum(radius[live], length), radius[live])
        radius[live] = _radius(before, length, slope, actual, predicted)
        taken = actual > _TAKEN * predicted
        # At float64 precision, neither the objective nor its model decreases any more.
        least = 1e-12 * objective[live]
        stuck[live] = (actual.abs() <= least) & (predicted.abs() <= least)
        chosen = live[taken]
        weights[chosen] += step[taken]
        objective[chosen] = reached[taken]
        margin[taken] = moved[taken]
        steps[chosen] += 1
        if taken.any():
            gradient[taken] = _gradient(
                products, rest.part(chosen), weights[chosen], margin[taken], c
            )
            norm[chosen] = gradient[taken].norm(dim=1)
    # The objective is strongly convex: it lies at most ||gradient||² / 2 above its minimum.
    gap = 0.5 * norm.square() / objective.clamp(min=1e-300)
    return weights, objective, gap, steps, norm <= goal


def _objective(weights: Tensor, margin: Tensor, c: float) -> Tensor:
    """(K,) objective at weights (K, D) with margins (K, N) 1 - y w·x."""
    return 0.5 * weights.square().sum(1) + c * margin.clamp(min=0).square_().sum(1)


def _gradient(
    products: Products, rest: OneVsRest, weights: Tensor, margin: Tensor, c: float
) -> Tensor:
    """(K, D) gradient of the objective."""
    return weights - 2 * c * products.combine(rest.signed_(margin.clamp(min=0)))


def _radius(
    radius: Tensor, length: Tensor, slope: Tensor, actual: Tensor, predicted: Tensor
) -> Tensor:
    """The next trust-region radius (K,), from how well the model predicted the step."""
    curvature = -actual - slope  # of the objective along the step
    factor = torch.where(curvature <= 0, _GOOD_MOST, (-0.5 * slope / curvature).clamp(min=_LEAST))
    wanted = factor * length
    poor = torch.minimum(wanted, _POOR_MOST * radius)
    good = torch.minimum(wanted, _GOOD_MOST * radius)
    return torch.where(
        actual < _TAKEN * predicted,
        poor,
        torch.where(
            actual < _POOR * predicted,
            torch.maximum(_LEAST * radius, poor),
            torch.where(
                actual < _GOOD * predicted,
                torch.maximum(_LEAST * radius, good),
                torch.maximum(radius, good),
            ),
        ),
    )


def _conjugate_gradients(
    products: Products, gradient: Tensor, active: Tensor, radius: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """The Newton step (K, D) within the trust region, and its residual (K, D)."""
    step, residual = torch.zeros_like(gradient), -gradient
    search, square = residual.clone(), residual.square().sum(1)
    enough = _CG_TOLERANCE * square.sqrt()
    inside = torch.ones_like(radius, dtype=torch.bool)
    for _ in range(products.dimension):
        live = (inside & (square.sqrt() > enough)).nonzero().flatten()
        if not len(live):
            break
        along, so_far = search[live], step[live]
        curved = along + 2 * c * products.curve(along, active[live])
        length = square[live] / (along * curved).sum(1)
        outside = (so_far + length[:, None] * along).norm(dim=1) > radius[live]
        length = torch.where(outside, _to_edge(so_far, along, radius[live]), length)
        inside[live] = ~outside
        step[live] = so_far + length[:, None] * along
        residual[live] -= length[:, None] * curved
        left = residual[live].square().sum(1)
        search[live] = residual[live] + (left / square[live])[:, None] * along
        square[live] = left
    return step, residual


def _to_edge(step: Tensor, along: Tensor, radius: Tensor) -> Tensor:
    """The a > 0 (K,) with ||step + a · along|| = radius, for steps inside the region."""
    inner, square = (step * along).sum(1), along.square().sum(1)
    room = (radius.square() - step.square().sum(1)).clamp(min=0)
    return room / (inner + (inner.square() + square * room).sqrt())


_MAX_NEWTON = 30
_FILLED_AT_ONCE = 128  # rows


@dataclass
class WorkingSet:
    """The working set of one class: rows, kernel matrix and coefficients."""

    index: Tensor  # (n,) row indices
    sign: Tensor  # (n,) y, float64
    kernel: Tensor  # (n, n) float32 or float64
    coefficients: Tensor  # (n,) b = y a with a >= 0, float64

    @classmethod
    def empty(cls, device: torch.device, dtype: torch.dtype) -> WorkingSet:
        """A set without rows; ``dtype`` is the kernel's."""
        nothing = torch.zeros(0, dtype=torch.float64, device=device)
        return cls(nothing.long(), nothing, nothing.to(dtype)[:, None].expand(0, 0), nothing)

    def replace(self, kept: Tensor, new: Tensor, new_sign: Tensor, x: Tensor) -> int:
        """Keep some rows and add others; return the number of kernel entries computed.

        Args:
            kept: (m,) positions of the rows to keep.
            new: (p,) indices of the rows to add, with ``new_sign`` (p,).
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
        """Set the coefficients to the minimum over these rows alone.

        Only changes go through the kernel matrix, so its rounding error shrinks with each call, as
        in iterative refinement.

        Args:
            margin: (n,) 1 - y w·x in float64, at the current coefficients.
        """
        kernel = self.kernel.double()
        b, sign = self.coefficients, self.sign
        active = margin > 0
        for _ in range(_MAX_NEWTON):
            inside = active.nonzero().flatten()
            target = -b  # rows outside the margin get coefficient 0
            right = (sign * margin - b / (2 * c))[inside]
            leaving = (~active & (b != 0)).nonzero().flatten()
            if len(leaving):
                right = right + (b[leaving] @ kernel[leaving])[inside]
            matrix = self.kernel[inside][:, inside].double()  # float32 is copied faster
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
        """The dual objective, a lower bound over all rows; ``square`` is ||X_Wᵀ b||²."""
        a = self.coefficients.abs()
        return a.sum() - square / 2 - a.square().sum() / (4 * c)


def _fill(kernel: Tensor, x: Tensor, start: int) -> int:
    """Fill rows and columns of X Xᵀ from ``start`` on, using its symmetry.

    Returns:
        The number of entries computed.
    """
    computed = 0
    step = max(_FILLED_AT_ONCE, (len(x) - start) // 8)
    for first in range(start, len(x), step):
        last = min(first + step, len(x))
        torch.mm(x[first:last], x[:last].T, out=kernel[first:last, :last])
        kernel[:first, first:last] = kernel[first:last, :first].T
        computed += (last - first) * last
    return computed


_PROOF_FROM = 1e-4  # above this gap, float32 margins are precise enough
_UNPROVEN_ROUNDS = 8  # after these, margins are always float64
_FIRST_ROWS = 512
_LEAST_GROWTH = 128
_MOST_ROWS = 2048  # where a Cholesky factor costs as much as a pass over many rows


class WorkingSets:
    """Working-set solver for K classes; results are valid where ``gap`` is finite."""

    def __init__(self, products: Products, rest: OneVsRest, c: float) -> None:
        device, count = products.device, len(rest.own)
        self._products, self._rest, self._c = products, rest, c
        self.weights = torch.zeros(count, products.dimension, dtype=torch.float64, device=device)
        self.objective = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
        self.gap = self.objective.clone()  # relative
        self.rounds = torch.zeros(count, dtype=torch.int64, device=device)
        self._bound = torch.zeros_like(self.objective)
        # Rounding of the kernel matrix must be small compared with the 1 / 2C on its diagonal.
        rounding = 2 * c * products.largest_square * torch.finfo(torch.float32).eps
        dtype = torch.float64 if rounding > 1e-3 else torch.float32
        self._sets = [WorkingSet.empty(device, dtype) for _ in range(count)]
        # With more rows than dimensions, the primal form of Newton's matrix is smaller.
        self._most = max(_LEAST_GROWTH, min(products.dimension, _MOST_ROWS))
        if device.type == "cuda":
            self._most = min(self._most, _FIRST_ROWS)  # many small factorisations do not fill a GPU

    def run(self, gap: float, most_rounds: int, advance: Callable[[int], object]) -> list[int]:
        """Solve; return the classes not proven to be within ``gap``."""
        live, left = list(range(len(self._sets))), []
        margin: Tensor | None = None  # (live, N) 1 - y w·x
        for number in range(most_rounds):
            going, proposed = [], []
            for place, k in enumerate(live):
                weights = self._solve(k, None if margin is None else margin[place])
                if weights is None:
                    left.append(k)
                    self._forget(k)
                else:
                    going.append(k)
                    proposed.append(weights)
            if not going:
                return sorted(left)
            index = torch.tensor(going, device=self.gap.device)
            self.rounds[index] += 1
            proven = number >= _UNPROVEN_ROUNDS or bool((self.gap[index] < _PROOF_FROM).any())
            margin = self._evaluate(index, torch.stack(proposed), proven)
            done = (self.gap[index] <= gap) & proven
            if done.any():
                advance(int(done.sum()))
                margin = margin[~done]
                for k in index[done].tolist():
                    self._forget(k)
            live = index[~done].tolist()
        return sorted(left + live)

    def _evaluate(self, index: Tensor, weights: Tensor, proven: bool) -> Tensor:
        """Margins (k, N) of weights (k, D); also keeps the best weights so far."""
        scores = self._products.scores(weights if proven else weights.float())
        margin = self._rest.part(index).margins(scores)
        # Class by class: the (k, N) products would need the same memory again.
        loss = torch.stack([row.clamp(min=0).double().square_().sum() for row in margin])
        value = 0.5 * weights.square().sum(1) + self._c * loss
        better = value < self.objective[index]
        self.weights[index[better]] = weights[better]
        objective = torch.minimum(self.objective[index], value)
        self.gap[index] = 1 - self._bound[index] / objective.clamp(min=1e-300)
        # A float32 objective must not count as the lowest so far.
        self.objective[index] = objective if proven else torch.inf
        return margin

    def _solve(self, k: int, margin: Tensor | None) -> Tensor | None:
        """Update class k's rows from the margins (N,) of all rows and solve for weights (D,).

        None if that would take too many rows.
        """
        own, ws = self._rest.own[k], self._sets[k]
        if margin is None:
            kept, new = ws.index, self._first_rows(own)
        else:
            kept = ((ws.coefficients != 0) | (margin[ws.index] > 0)).nonzero().flatten()
            outside = margin.clone()
            outside[ws.index] = 0
            growth = min(int((outside > 0).sum()), max(len(kept), _LEAST_GROWTH))
            new = outside.topk(growth).indices.sort().values
            if len(kept) + growth > self._most:
                return None
        rows = torch.cat([ws.index[kept], new])
        x = self._products.take(rows)
        sign = torch.isin(new, own).double() * 2 - 1
        computed = ws.replace(kept, new, sign, x)
        self._products.worked(computed, ws.kernel.dtype, rows=1)
        ws.solve(torch.ones_like(ws.sign) if margin is None else margin[rows].double(), self._c)
        weights = ws.coefficients @ x.double()
        bound = ws.lower_bound(weights @ weights, self._c)
        self._bound[k] = torch.maximum(self._bound[k], bound)
        return weights

    def _first_rows(self, own: Tensor) -> Tensor:
        """All rows if there are few; else some of the class's own, and evenly spaced others."""
        count = self._products.count
        if count <= self._most // 2:
            return torch.arange(count, device=own.device)
        some = own[: self._most // 4]
        wanted = min(max(_FIRST_ROWS - len(some), 3 * len(some)), count)
        others = torch.arange(wanted, device=own.device) * count // wanted
        return torch.cat([some, others[~torch.isin(others, own)]]).sort().values

    def _forget(self, k: int) -> None:
        """Free the class's kernel matrix."""
        self._sets[k] = WorkingSet.empty(self.gap.device, self._sets[k].kernel.dtype)


_Advance = Callable[[int], object]

# How far a class's objective may be above its minimum, relatively, by the dual bound. LIBLINEAR's
# rule compares gradients instead, and stops many per cent above it on ill-conditioned features.
RELATIVE_GAP = 1e-8

MAX_ROUNDS = 40
_GROUP = 64  # classes at a time: enough for fast matrix products
_GROUP_BYTES = 1 << 30  # for the (K, N) arrays of a group


@dataclass(frozen=True)
class LinearSVM:
    """A fitted one-vs-rest SVM."""

    classes: NDArray[np.int64]  # (K,) the labels in ascending order
    weights: NDArray[np.float64]  # (K, D)
    objective: NDArray[np.float64]  # (K,) reached
    gap: NDArray[np.float64]  # (K,) bound on its relative distance from the minimum
    rounds: NDArray[np.int64]  # (K,) working sets and Newton steps
    converged: NDArray[np.bool_]  # (K,) whether the requested precision was reached
    solution: str  # in words: exact, or where it stopped
    passes: int  # over the features, by all groups of classes
    pass_seconds: float  # their duration
    flops: dict[str, float]  # of the matrix products with the features, by precision

    def scores(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Decision values (M, K) of features (M, D)."""
        decision: NDArray[np.float64] = features.astype(np.float64) @ self.weights.T
        return decision

    def predict(self, features: NDArray[Any]) -> NDArray[np.int64]:
        """The class (M,) of the highest decision value."""
        best: NDArray[np.int64] = self.classes[self.scores(features).argmax(axis=1)]
        return best


def fit_svm(
    features: NDArray[Any] | FeatureMatrix,
    labels: NDArray[Any],
    *,
    c: float = 1.0,
    gap: float = RELATIVE_GAP,
    tolerance: float | None = None,
    device: str | torch.device = "cpu",
    max_rounds: int = MAX_ROUNDS,
    advance: _Advance = lambda count: None,
) -> LinearSVM:
    """Fit all classes of ``labels`` (N,) to ``features`` (N, D).

    Args:
        features: an array, or rows of one that may be larger than memory.
        c: LIBLINEAR's C, the weight of the loss against the regulariser.
        gap: a class is finished when its objective is proven to be within this relative distance
            of its minimum.
        tolerance: stop each class where LIBLINEAR's primal solver does at this tolerance, which is
            not the minimum; ``gap`` and ``max_rounds`` are then ignored.
        device: where the matrix products run.
        max_rounds: maximum number of working sets per class, and then of Newton steps.
        advance: called with the number of classes just finished.

    Raises:
        ValueError: there are no rows, sizes do not match, features are not finite, or C, gap or
            tolerance is not above 0.
    """
    if isinstance(features, FeatureMatrix):
        rows, shape = features, (len(features), features.dimension)
    elif features.ndim == 2:
        rows, shape = FeatureMatrix(features), features.shape
    else:
        raise ValueError(f"features {features.shape} are not (N, D)")
    if labels.shape != shape[:1] or not len(labels):
        raise ValueError(f"features {shape} and labels {labels.shape} do not match")
    if not (c > 0 and gap > 0 and (tolerance is None or tolerance > 0)):
        raise ValueError(f"must be above 0: C {c}, gap {gap}, tolerance {tolerance}")
    classes, targets = np.unique(labels, return_inverse=True)
    with exact_products():
        products = Products(rows, torch.device(device))
        if not products.largest_square < float("inf"):
            raise FeaturesTooLarge("features are not finite, or too large for float32")
        target = torch.from_numpy(targets.astype(np.int64)).to(products.device)
        newton = Newton(products, c, gap)
        arrays = 2 if tolerance is None else 4  # (K, N) float64 at a time
        size = max(1, _GROUP_BYTES // (arrays * 8 * products.count))
        if products.device.type == "cpu":
            size = min(size, _GROUP)
        parts = []
        for part in torch.arange(len(classes)).split(size):
            rest = OneVsRest(target, part)
            if tolerance is None:
                parts.append(_fit_group(products, rest, newton, max_rounds, advance))
            else:
                parts.append(fit_as_liblinear(products, rest, c, tolerance, advance))
    weights, objective, gaps, rounds, converged = (
        torch.cat(part).cpu() for part in zip(*parts, strict=True)
    )
    return LinearSVM(
        classes=classes.astype(np.int64),
        weights=weights.numpy(),
        objective=objective.numpy(),
        gap=gaps.numpy(),
        rounds=rounds.numpy(),
        converged=converged.numpy(),
        solution=_in_words(gap, tolerance, int((~converged).sum()), len(classes)),
        passes=products.passes,
        pass_seconds=products.pass_seconds,
        flops={str(d).removeprefix("torch."): n for d, n in products.flops.items()},
    )


def _fit_group(
    products: Products, rest: OneVsRest, newton: Newton, most_rounds: int, advance: _Advance
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fit some classes: weights (K, D), and objective, gap, rounds, whether proven (K,)."""
    sets = WorkingSets(products, rest, newton.c)
    left = sets.run(newton.gap, most_rounds, advance)
    if left:
        index = torch.tensor(left, device=products.device)
        sets.weights[index], sets.objective[index], sets.gap[index], steps = newton.minimise(
            sets.weights[index], rest.part(index), most_rounds, advance
        )
        sets.rounds[index] += steps
    return sets.weights, sets.objective, sets.gap, sets.rounds, sets.gap <= newton.gap


def _in_words(gap: float, tolerance: float | None, missed: int, classes: int) -> str:
    if tolerance is None:
        how = f"exact, proven to be within {gap:g} of the minimum"
    else:
        how = f"stopped at tolerance {tolerance:g} as LIBLINEAR"
    return f"{how}, except {missed} of {classes} classes" if missed else how
