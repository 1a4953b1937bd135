"""Linear SVM of LIBLINEAR's ``-s 2`` form, solved for all classes at once with matrix products.

Paper §5.2 and the authors' protocol: L2-regularised squared hinge, one-vs-rest, no bias. For every
class k, with y = +1 for its rows and -1 for the others, the weights are the minimum of

    0.5 ||w_k||² + C Σ_i max(0, 1 - y_ik w_k·x_i)²

which is strictly convex, so that any solver that converges gives the same weights. This one is
Newton's method with an exact line search. Products with the features are matrix products over all
unfinished classes, where LIBLINEAR walks the rows once for every class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LIBLINEAR_EPS = 0.01
# The objective is strongly convex, so it lies at most ||gradient||² / 2 above its minimum.
# LIBLINEAR's rule compares the gradient with the one at 0 instead, and on features of unequal
# directions stops many per cent above (measured: 1 to 10 % on a class, test rows near a border
# falling either way). The last Newton steps gain several digits each, so a proven gap is cheap.
RELATIVE_GAP = 1e-10

_MAX_NEWTON = 200
_MAX_CG = 500
_CG_STEPS_EXPECTED = 30  # as many as would cost what factorising does (measured: 15 to 50 alike)
_MAX_LINE_SEARCH = 30
_LINE_TOLERANCE = 1e-3
_RESIDENT_BYTES = 8 << 30  # features become float64 once if they fit in this, else block by block
_BLOCK_BYTES = 256 << 20
_GROUP_BYTES = 4 << 30  # classes solved together: five (K, N) float64 arrays at a time


@dataclass(frozen=True)
class LinearSVM:
    """A fitted one-vs-rest SVM."""

    classes: NDArray[np.int64]  # (K,) the labels in ascending order
    weights: NDArray[np.float64]  # (K, D)
    objective: NDArray[np.float64]  # (K,) the minimum reached
    newton_steps: NDArray[np.int64]  # (K,)
    converged: NDArray[np.bool_]  # (K,) false where the stopping rule was not met

    def scores(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Decision values (M, K) of features (M, D)."""
        decision: NDArray[np.float64] = features.astype(np.float64) @ self.weights.T
        return decision

    def predict(self, features: NDArray[Any]) -> NDArray[np.int64]:
        """The class (M,) of the highest decision value."""
        best: NDArray[np.int64] = self.classes[self.scores(features).argmax(axis=1)]
        return best


def fit_svm(
    features: NDArray[Any],
    labels: NDArray[Any],
    *,
    c: float = 1.0,
    eps: float | None = None,
    device: str | torch.device = "cpu",
    advance: Callable[[int], object] = lambda count: None,
) -> LinearSVM:
    """Fit all classes of ``labels`` (N,) to ``features`` (N, D).

    Args:
        c: LIBLINEAR's C, the weight of the loss against the regulariser.
        eps: LIBLINEAR's rule (its default is 0.01): stop a class when ||gradient|| <=
            eps · min(positives, negatives) / N · ||gradient at 0||. None: when the objective is
            proven to be within 1e-10 of its minimum, relatively.
        device: where the matrix products run. All arithmetic is float64.
        advance: told how many more classes are finished.

    Raises:
        ValueError: no rows, sizes that do not match, or a C or eps that is not above 0.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(f"features {features.shape} and labels {labels.shape} do not match")
    if not (c > 0 and (eps is None or eps > 0)):
        raise ValueError(f"C and eps must be above 0, got {c} and {eps}")
    classes, targets = np.unique(labels, return_inverse=True)
    rows = _Rows(features, torch.device(device))
    target = torch.from_numpy(targets.astype(np.int64)).to(rows.device)
    group = max(1, _GROUP_BYTES // (5 * 8 * rows.count))
    parts = [
        _fit_group(rows, target, torch.arange(k, min(k + group, len(classes))), c, eps, advance)
        for k in range(0, len(classes), group)
    ]
    weights, objective, steps, converged = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    return LinearSVM(
        classes=classes.astype(np.int64),
        weights=weights.cpu().numpy(),
        objective=objective.cpu().numpy(),
        newton_steps=steps.cpu().numpy(),
        converged=converged.cpu().numpy(),
    )


class _Rows:
    """The features X (N, D), multiplied from both sides in float64."""

    def __init__(self, features: NDArray[Any], device: torch.device) -> None:
        self.count, self.dimension = features.shape
        self.device = device
        # torch takes no read-only arrays, which memory-mapped files are.
        self._x = torch.from_numpy(np.require(features, requirements=["C", "W"])).to(device)
        self._block = self.count
        if 8 * features.size <= _RESIDENT_BYTES:
            self._x = self._x.double()
        else:
            self._block = max(1, _BLOCK_BYTES // (8 * self.dimension))

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.count, self._block):
            rows = slice(start, start + self._block)
            yield rows, self._x[rows].double()

    def scores(self, weights: Tensor) -> Tensor:
        """W Xᵀ: (K, D) -> (K, N)."""
        out = weights.new_empty((len(weights), self.count))
        for rows, block in self._blocks():
            out[:, rows] = weights @ block.T
        return out

    def combine(self, coefficients: Tensor) -> Tensor:
        """A X: (K, N) -> (K, D)."""
        out = coefficients.new_zeros((len(coefficients), self.dimension))
        for rows, block in self._blocks():
            out += coefficients[:, rows] @ block
        return out

    def take(self, index: Tensor) -> Tensor:
        """Some of the rows, (n, D)."""
        return self._x[index].double()

    def gram(self) -> Tensor:
        """Xᵀ X, (D, D)."""
        out = torch.zeros(self.dimension, self.dimension, dtype=torch.float64, device=self.device)
        for _, block in self._blocks():
            out += block.T @ block
        return out


def _fit_group(
    rows: _Rows,
    target: Tensor,
    classes: Tensor,
    c: float,
    eps: float | None,
    advance: Callable[[int], object],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights (K, D), objective, steps and convergence (K,) of some of the classes."""
    sign = (target == classes.to(rows.device)[:, None]).to(torch.int8) * 2 - 1  # y, (K, N)
    weights = torch.zeros(len(classes), rows.dimension, dtype=torch.float64, device=rows.device)
    objective = torch.zeros(len(classes), dtype=torch.float64, device=rows.device)
    steps = torch.zeros(len(classes), dtype=torch.int64, device=rows.device)
    positives = (sign > 0).sum(1)
    rarest = torch.minimum(positives, rows.count - positives).clamp(min=1)
    margin = torch.ones(sign.shape, dtype=torch.float64, device=rows.device)  # 1 - y w·x
    gradient = _gradient(rows, weights, margin, sign, c)
    first_norm = gradient.norm(dim=1)

    live = torch.arange(len(classes), device=rows.device)  # classes still being solved
    for _ in range(_MAX_NEWTON):
        loss = margin.clamp(min=0).square_().sum(1)
        objective[live] = 0.5 * weights[live].square().sum(1) + c * loss
        if eps is None:
            going = 0.5 * gradient.square().sum(1) > RELATIVE_GAP * objective[live]
        else:
            going = gradient.norm(dim=1) > (eps * rarest / rows.count * first_norm)[live]
        if not going.all():
            advance(int((~going).sum()))
            live, gradient, margin, sign = (a[going] for a in (live, gradient, margin, sign))
        if not len(live):
            break
        direction = _newton_direction(rows, gradient, margin > 0, c, first_norm[live])
        change = rows.scores(direction).mul_(sign)
        step = _line_search(weights[live], direction, margin, change, c)
        weights[live] += step[:, None] * direction
        steps[live] += 1
        margin = margin - step[:, None] * change
        gradient = _gradient(rows, weights[live], margin, sign, c)
    converged = torch.ones_like(steps, dtype=torch.bool)
    converged[live] = False
    return weights, objective, steps, converged


def _gradient(rows: _Rows, weights: Tensor, margin: Tensor, sign: Tensor, c: float) -> Tensor:
    """w - 2C Σ y x max(0, margin): (K, D)."""
    return weights - 2 * c * rows.combine(margin.clamp(min=0).mul_(sign))


def _newton_direction(
    rows: _Rows, gradient: Tensor, active: Tensor, c: float, first_norm: Tensor
) -> Tensor:
    """Solve (I + 2C X_aᵀ X_a) d = -gradient for each class, X_a the rows within its margin.

    Where every row is within the margin (at w = 0) the classes share one matrix. Where few rows
    are, which is the rule for small sets and a separable class, factorising is faster than
    conjugate gradients and does not suffer from the matrix's condition.
    """
    direction = torch.empty_like(gradient)
    count = active.sum(1)
    whole = count == rows.count
    cost = count * count.clamp(max=rows.dimension)
    direct = (cost <= _CG_STEPS_EXPECTED * 4 * rows.count) & ~whole
    iterative = ~whole & ~direct
    if whole.any():
        shared = 2 * c * rows.gram()
        shared.diagonal().add_(1)
        direction[whole] = -torch.cholesky_solve(gradient[whole].T, _factor(shared)).T
    for k in direct.nonzero().flatten().tolist():
        direction[k] = _solve_directly(rows.take(active[k].nonzero().flatten()), gradient[k], c)
    if iterative.any():
        direction[iterative] = _solve_by_cg(
            rows, gradient[iterative], active[iterative], c, first_norm[iterative]
        )
    return direction


def _factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a matrix that is positive-definite but for rounding.

    Features of 10⁸ and more (a network after a few steps) swamp the identity in float64. A larger
    diagonal changes the direction's length and slant, not that it goes down, and the line search
    takes care of the rest.
    """
    more = torch.finfo(matrix.dtype).eps * float(matrix.diagonal().abs().mean())
    while True:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor
        matrix.diagonal().add_(more)
        more *= 10


def _solve_directly(x: Tensor, gradient: Tensor, c: float) -> Tensor:
    """-(I + 2C xᵀ x)⁻¹ gradient, by the smaller of the two matrices: (n, D), (D,) -> (D,)."""
    count, dimension = x.shape
    if count >= dimension:
        matrix = 2 * c * (x.T @ x)
        matrix.diagonal().add_(1)
        solved = torch.cholesky_solve(gradient[:, None], _factor(matrix))
        return -solved[:, 0]
    matrix = x @ x.T  # Woodbury's identity
    matrix.diagonal().add_(1 / (2 * c))
    solved = torch.cholesky_solve((x @ gradient)[:, None], _factor(matrix))
    return x.T @ solved[:, 0] - gradient


def _solve_by_cg(
    rows: _Rows, gradient: Tensor, active: Tensor, c: float, first_norm: Tensor
) -> Tensor:
    """The same by conjugate gradients, for all classes (K, D) at once.

    Loosely while far from the minimum, tighter near it, so that the outer steps converge faster
    than linearly.
    """
    norm = gradient.norm(dim=1)
    goal = norm * torch.clamp((norm / first_norm).sqrt(), max=0.1)
    direction = torch.zeros_like(gradient)
    live = torch.arange(len(gradient), device=rows.device)
    residual = -gradient
    search = residual.clone()
    square = residual.square().sum(1)
    for _ in range(_MAX_CG):
        going = square.sqrt() > goal[live]
        if not going.all():
            live, residual, search, square = (a[going] for a in (live, residual, search, square))
            active = active[going]
        if not len(live):
            break
        curved = search + 2 * c * rows.combine(rows.scores(search).mul_(active))
        length = square / (search * curved).sum(1)
        direction[live] += length[:, None] * search
        residual = residual - length[:, None] * curved
        previous, square = square, residual.square().sum(1)
        search = residual + (square / previous)[:, None] * search
    return direction


def _line_search(
    weights: Tensor, direction: Tensor, margin: Tensor, change: Tensor, c: float
) -> Tensor:
    """The step (K,) to each class's minimum along its direction.

    The objective's derivative along a line is piecewise linear and rising, so that Newton's method,
    kept between the last step too short and the last too long, finds its zero in a few rounds.
    """
    inner = (weights * direction).sum(1)
    square = direction.square().sum(1)
    step = torch.ones_like(inner)
    low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
    slope = inner - 2 * c * (change * margin.clamp(min=0)).sum(1)  # at step 0
    for _ in range(_MAX_LINE_SEARCH):
        hinge = (margin - step[:, None] * change).clamp_(min=0)
        first = inner + step * square - 2 * c * (change * hinge).sum(1)
        if (first.abs() <= _LINE_TOLERANCE * slope.abs()).all():
            break
        second = square + 2 * c * (change * (hinge > 0)).mul_(change).sum(1)
        low, high = torch.where(first < 0, step, low), torch.where(first > 0, step, high)
        step = step - first / second
        middle = torch.where(high.isinf(), 2 * low, (low + high) / 2)
        step = torch.where((step > low) & (step < high), step, middle)
    return step
