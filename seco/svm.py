"""Linear SVM of LIBLINEAR's ``-s 2`` form, solved for all classes at once with matrix products.

Paper §5.2 and the authors' protocol: L2-regularised squared hinge, one-vs-rest, no bias. For every
class k, with y = +1 for its rows and -1 for the others, the weights are the minimum of

    0.5 ||w_k||² + C Σ_i max(0, 1 - y_ik w_k·x_i)²

which is strictly convex, so that any solver that converges gives the same weights. This one is
Newton's method with conjugate gradients: every product is a matrix product over all unfinished
classes, where LIBLINEAR walks the rows once for every class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LIBLINEAR_EPS = 0.01
# LIBLINEAR's 0.01 stops early, at a point that depends on the order of summation; test rows near a
# border then change sides from machine to machine. Newton's last steps gain several digits each,
# so going on until the weights no longer depend on it costs little.
TIGHT_EPS = 1e-6

_MAX_NEWTON = 200
_MAX_CG = 500
_SUFFICIENT_DECREASE = 1e-4
_MAX_HALVINGS = 30
_RESIDENT_BYTES = 8 << 30  # features become float64 once if they fit in this, else block by block
_BLOCK_BYTES = 256 << 20
_GROUP_BYTES = 2 << 30  # scores of a group of classes: three (K, N) float64 arrays


@dataclass(frozen=True)
class LinearSVM:
    """A fitted one-vs-rest SVM.

    ``classes`` (K,) are the labels in ascending order, ``weights`` is (K, D), ``objective`` (K,)
    the minimum reached, ``newton_steps`` (K,) how many steps it took, and ``converged`` (K,) false
    where the stopping rule was not met.
    """

    classes: NDArray[np.int64]
    weights: NDArray[np.float64]
    objective: NDArray[np.float64]
    newton_steps: NDArray[np.int64]
    converged: NDArray[np.bool_]

    def scores(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Decision values (M, K) of features (M, D)."""
        out = np.empty((len(features), len(self.classes)))
        rows = max(1, _BLOCK_BYTES // (8 * max(1, features.shape[1])))
        for start in range(0, len(features), rows):
            block = features[start : start + rows].astype(np.float64)
            out[start : start + rows] = block @ self.weights.T
        return out

    def predict(self, features: NDArray[Any]) -> NDArray[np.int64]:
        """The class (M,) of the highest decision value."""
        return self.classes[self.scores(features).argmax(axis=1)]


def fit_svm(
    features: NDArray[Any],
    labels: NDArray[Any],
    *,
    c: float = 1.0,
    eps: float = TIGHT_EPS,
    device: str | torch.device = "cpu",
) -> LinearSVM:
    """Fit all classes of ``labels`` (N,) to ``features`` (N, D).

    Args:
        c: LIBLINEAR's C, the weight of the loss against the regulariser.
        eps: stop a class when ||gradient|| <= eps · min(positives, negatives) / N · ||gradient at
            0||; 0.01 is LIBLINEAR's rule.
        device: where the matrix products run. All arithmetic is float64.

    Raises:
        ValueError: no rows, sizes that do not match, or a C or eps that is not above 0.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(f"features {features.shape} and labels {labels.shape} do not match")
    if not (c > 0 and eps > 0):
        raise ValueError(f"C and eps must be above 0, got {c} and {eps}")
    classes, targets = np.unique(labels, return_inverse=True)
    rows = _Rows(features, torch.device(device))
    target = torch.from_numpy(targets.astype(np.int64)).to(rows.device)
    group = max(1, _GROUP_BYTES // (3 * 8 * rows.count))
    parts = [
        _fit_group(rows, target, torch.arange(k, min(k + group, len(classes))), c, eps)
        for k in range(0, len(classes), group)
    ]
    weights, objective, steps, converged = (torch.cat(column) for column in zip(*parts, strict=True))
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
        whole = torch.from_numpy(np.array(features, copy=not features.flags.writeable))
        self._x = whole.to(device)
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


def _fit_group(
    rows: _Rows, target: Tensor, classes: Tensor, c: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights (K, D), objective, steps and convergence (K,) of some of the classes."""
    sign = (target == classes.to(rows.device)[:, None]).to(torch.int8) * 2 - 1  # (K, N)
    weights = torch.zeros(len(classes), rows.dimension, dtype=torch.float64, device=rows.device)
    steps = torch.zeros(len(classes), dtype=torch.int64, device=rows.device)
    converged = torch.zeros(len(classes), dtype=torch.bool, device=rows.device)
    positives = (sign > 0).sum(1)
    rarest = torch.minimum(positives, rows.count - positives).clamp(min=1)
    margin = torch.ones(sign.shape, dtype=torch.float64, device=rows.device)  # 1 - y w·x
    gradient = _gradient(rows, weights, margin, sign, c)
    objective = _objective(weights, margin, c)
    goal = eps * rarest / rows.count * gradient.norm(dim=1)

    first_norm = gradient.norm(dim=1)
    e, q = torch.linalg.eigh(rows.combine(rows._x.double().T.contiguous()))
    basis = (q, e.clamp(min=0))
    live = torch.arange(len(classes), device=rows.device)  # classes still being solved
    for _ in range(_MAX_NEWTON):
        done = gradient.norm(dim=1) <= goal[live]
        converged[live[done]] = True
        if done.any():
            live, gradient, margin, sign = (a[~done] for a in (live, gradient, margin, sign))
        if not len(live):
            break
        direction = _newton_direction(rows, gradient, margin > 0, c, first_norm[live], basis)
        change = rows.scores(direction).mul_(sign)
        moved, step, value = _line_search(
            weights[live], direction, margin, change, gradient, objective[live], c
        )
        weights[live] = moved
        objective[live] = value
        steps[live] += 1
        margin = margin - step[:, None] * change
        gradient = _gradient(rows, weights[live], margin, sign, c)
    return weights, objective, steps, converged


def _objective(weights: Tensor, margin: Tensor, c: float) -> Tensor:
    """0.5 ||w||² + C Σ max(0, margin)²: (K, D), (K, N) -> (K,)."""
    return 0.5 * weights.square().sum(1) + c * margin.clamp(min=0).square_().sum(1)


def _gradient(rows: _Rows, weights: Tensor, margin: Tensor, sign: Tensor, c: float) -> Tensor:
    """w - 2C Σ y x max(0, margin): (K, D)."""
    return weights - 2 * c * rows.combine(margin.clamp(min=0).mul_(sign))


def _newton_direction(rows, gradient, active, c, first_norm, basis):
    norm = gradient.norm(dim=1)
    goal = norm * torch.clamp((norm / first_norm).sqrt(), max=0.1)
    direction = torch.zeros_like(gradient)
    live = torch.arange(len(gradient), device=rows.device)
    q, e = basis
    share = active.sum(1) / rows.count
    scale = 1 / (1 + 2 * c * share[:, None] * e)
    def prec(r, scale):
        return ((r @ q) * scale) @ q.T
    residual = -gradient
    pr = prec(residual, scale)
    search = pr.clone()
    square = (residual * pr).sum(1)
    for _ in range(_MAX_CG):
        going = residual.norm(dim=1) > goal[live]
        if not going.all():
            live, residual, search, square = (a[going] for a in (live, residual, search, square))
            active = active[going]
            scale = scale[going]
        if not len(live):
            break
        curved = search + 2 * c * rows.combine(rows.scores(search).mul_(active))
        length = square / (search * curved).sum(1)
        direction[live] += length[:, None] * search
        residual = residual - length[:, None] * curved
        pr = prec(residual, scale)
        previous, square = square, (residual * pr).sum(1)
        search = pr + (square / previous)[:, None] * search
    return direction


def _line_search(
    weights: Tensor,
    direction: Tensor,
    margin: Tensor,
    change: Tensor,
    gradient: Tensor,
    objective: Tensor,
    c: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve the step of each class until the objective falls enough.

    Returns the new weights (K, D), the steps (K,) and the new objectives (K,).
    """
    slope = (gradient * direction).sum(1)
    # Near the minimum the fall is below float64's resolution of the objective itself.
    slack = 1e-13 * objective.abs()
    step = torch.ones_like(objective)
    for _ in range(_MAX_HALVINGS):
        moved = weights + step[:, None] * direction
        value = _objective(moved, margin - step[:, None] * change, c)
        enough = value <= objective + _SUFFICIENT_DECREASE * step * slope + slack
        if enough.all():
            break
        step = torch.where(enough, step, step / 2)
    return moved, step, value
