"""LIBLINEAR's way to an SVM and its stopping rule, for all classes at once (``--tolerance``).

Trust-region Newton from weights of zero (Lin, Weng and Keerthi, "Trust region Newton method for
large-scale logistic regression", JMLR 2008). A class stops at

    ||gradient|| <= tolerance · min(positives, negatives) / N · ||gradient at zero||

With features of unequal directions that is many per cent above the minimum, and where in that
neighbourhood depends on the steps taken. So the steps are LIBLINEAR's, in float64; another solver
with the same rule stops elsewhere and predicts other classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seco.probe.svm_rows import OneVsRest, Products

MAX_STEPS = 1000  # LIBLINEAR's
_CG_TOLERANCE = 0.1  # of the gradient's norm
# Ratios of actual to predicted decrease: a step is taken above the first.
_TAKEN, _POOR, _GOOD = 1e-4, 0.25, 0.75
# What the radius is multiplied by: at least, after a poor step at most, after a good one at most.
_LEAST, _POOR_MOST, _GOOD_MOST = 0.25, 0.5, 4.0


def fit_as_liblinear(
    products: Products,
    rest: OneVsRest,
    c: float,
    tolerance: float,
    advance: Callable[[int], object],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights (K, D), objective, relative gap, steps, and whether the rule is met (K,)."""
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
        # At the end of float64 neither the objective nor its model goes down any more.
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
    """(K,) at weights (K, D) with margins (K, N) 1 - y w·x."""
    return 0.5 * weights.square().sum(1) + c * margin.clamp(min=0).square_().sum(1)


def _gradient(
    products: Products, rest: OneVsRest, weights: Tensor, margin: Tensor, c: float
) -> Tensor:
    """(K, D) of the objective."""
    return weights - 2 * c * products.combine(rest.signed_(margin.clamp(min=0)))


def _radius(
    radius: Tensor, length: Tensor, slope: Tensor, actual: Tensor, predicted: Tensor
) -> Tensor:
    """The next radius (K,) of the region, from how well its model predicted a step."""
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
    """Newton's step (K, D) as far as the region goes, and what it leaves of the gradient (K, D)."""
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
    """The a > 0 (K,) with ||step + a · along|| = radius; steps lie inside and lengthen."""
    inner, square = (step * along).sum(1), along.square().sum(1)
    room = (radius.square() - step.square().sum(1)).clamp(min=0)
    return room / (inner + (inner.square() + square * room).sqrt())
