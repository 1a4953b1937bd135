"""Linear SVM of LIBLINEAR's ``-s 2`` form, solved for all classes at once with matrix products.

Paper §5.2 and the authors' protocol: L2-regularised squared hinge, one-vs-rest, no bias. For every
class k, with y = +1 for its rows and -1 for the others, the weights are the minimum of

    0.5 ||w_k||² + C Σ_i max(0, 1 - y_ik w_k·x_i)²

which is strictly convex, so that any solver that converges gives the same weights. This one takes
each class's rows within the margin for a working set and solves it exactly (``svm_rounds.py``); a
class with too many such rows goes on by truncated Newton (``svm_newton.py``). Both need the margins
of all rows for many classes at once, which are matrix products.

Features are float32 and so are the products that only lead somewhere; objectives, line searches and
the margins that prove a class finished are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seco.features.matrix import FeatureMatrix, FeaturesTooLarge
from seco.probe.svm_liblinear import fit_as_liblinear
from seco.probe.svm_newton import Newton
from seco.probe.svm_rounds import WorkingSets
from seco.probe.svm_rows import OneVsRest, Products
from seco.processes.device import exact_products

_Advance = Callable[[int], object]

# What a class's objective may lie above its minimum, relatively, by the dual bound. LIBLINEAR's
# rule compares gradients instead, and in the primal stops many per cent above on features of
# unequal directions (``svm_liblinear.py``).
RELATIVE_GAP = 1e-8

MAX_ROUNDS = 40
_GROUP = 64  # classes at a time: enough for fast matrix products
_GROUP_BYTES = 1 << 30  # of the (K, N) arrays of a group


@dataclass(frozen=True)
class LinearSVM:
    """A fitted one-vs-rest SVM."""

    classes: NDArray[np.int64]  # (K,) the labels in ascending order
    weights: NDArray[np.float64]  # (K, D)
    objective: NDArray[np.float64]  # (K,) reached
    gap: NDArray[np.float64]  # (K,) what it is above the minimum at most, relatively
    rounds: NDArray[np.int64]  # (K,) working sets and Newton steps
    converged: NDArray[np.bool_]  # (K,) false where what was asked for was not reached
    solution: str  # in words: exact, or where it stopped
    passes: int  # over the features, by all groups of classes
    pass_seconds: float  # what these took
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
        gap: a class is finished when its objective is proven to be within this of its minimum,
            relatively.
        tolerance: stop each class where LIBLINEAR's primal solver does at this tolerance, which is
            not the minimum; ``gap`` and ``max_rounds`` are not used then.
        device: where the matrix products run.
        max_rounds: working sets of a class, and then Newton steps, at most.
        advance: told how many more classes are finished.

    Raises:
        ValueError: no rows, sizes that do not match, features that are not finite, or a C, gap or
            tolerance that is not above 0.
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
    """Weights (K, D), objective, gap, rounds and whether it is proven (K,) of some classes."""
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
