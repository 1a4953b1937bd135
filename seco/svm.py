"""Linear SVM of LIBLINEAR's ``-s 2`` form, solved for all classes at once with matrix products.

Paper §5.2 and the authors' protocol: L2-regularised squared hinge, one-vs-rest, no bias. For every
class k, with y = +1 for its rows and -1 for the others, the weights are the minimum of

    0.5 ||w_k||² + C Σ_i max(0, 1 - y_ik w_k·x_i)²

which is strictly convex, so that any solver that converges gives the same weights. This one takes
the rows within each class's margin for a working set and solves it exactly (``svm_working_set.py``);
a class with too many such rows goes on by truncated Newton (``svm_newton.py``). Both need the
margins of all rows for many classes at once, which are matrix products.

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

from seco.device import exact_products
from seco.feature_rows import FeatureRows
from seco.svm_newton import Newton
from seco.svm_rows import OneVsRest, Products
from seco.svm_working_set import WorkingSet

# What a class's objective may lie above its minimum, relatively, by the dual bound. LIBLINEAR's
# rule compares gradients instead, and in the primal stops many per cent above on features of
# unequal directions.
RELATIVE_GAP = 1e-8

_PROOF_FROM = 1e-4  # gaps above this are seen well enough with float32 margins
_MAX_ROUNDS = 40
_FIRST_ROWS = 512
_LEAST_GROWTH = 128
_MOST_ROWS = 2048  # of a working set: its Cholesky factor costs what a pass over many rows does
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
    converged: NDArray[np.bool_]  # (K,) false where the gap is above what was asked for
    passes: int  # over the features, by all groups of classes
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
    features: NDArray[Any] | FeatureRows,
    labels: NDArray[Any],
    *,
    c: float = 1.0,
    gap: float = RELATIVE_GAP,
    device: str | torch.device = "cpu",
    max_rounds: int = _MAX_ROUNDS,
    advance: Callable[[int], object] = lambda count: None,
) -> LinearSVM:
    """Fit all classes of ``labels`` (N,) to ``features`` (N, D).

    Args:
        features: an array, or rows of one that may be larger than memory.
        c: LIBLINEAR's C, the weight of the loss against the regulariser.
        gap: a class is finished when its objective is proven to be within this of its minimum,
            relatively.
        device: where the matrix products run.
        max_rounds: working sets of a class, and then Newton steps, at most.
        advance: told how many more classes are finished.

    Raises:
        ValueError: no rows, sizes that do not match, features that are not finite, or a C or gap
            that is not above 0.
    """
    shape = (len(features), features.dimension) if isinstance(features, FeatureRows) else None
    if (shape or features.shape)[:1] != labels.shape or not len(labels):  # type: ignore[union-attr]
        found = shape or features.shape  # type: ignore[union-attr]
        raise ValueError(f"features {found} and labels {labels.shape} do not match")
    if not isinstance(features, FeatureRows):
        features = FeatureRows(features)
    if not (c > 0 and gap > 0):
        raise ValueError(f"C and gap must be above 0, got {c} and {gap}")
    with exact_products():
        return _Fit(features, labels, c, gap, torch.device(device), max_rounds).all(advance)


class _Fit:
    """What all groups of classes share."""

    def __init__(
        self,
        features: FeatureRows,
        labels: NDArray[Any],
        c: float,
        gap: float,
        device: torch.device,
        max_rounds: int,
    ) -> None:
        self.classes, targets = np.unique(labels, return_inverse=True)
        self.products = Products(features, device)
        self.target = torch.from_numpy(targets.astype(np.int64)).to(device)
        self.c, self.gap, self.max_rounds = c, gap, max_rounds
        square = self.products.largest_square()
        if not square < float("inf"):
            raise ValueError("features are not finite, or too large for float32")
        # Rounding of the kernel matrix must be small beside the 1 / 2C on its diagonal.
        exact = 2 * c * square * torch.finfo(torch.float32).eps > 1e-3
        self.kernel_dtype = torch.float64 if exact else torch.float32
        self.newton = Newton(self.products, c, gap)
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.shuffled = shuffled.to(device)
        # Past the dimension the other form of Newton's matrix is the smaller one.
        self.most_rows = max(_LEAST_GROWTH, min(features.dimension, _MOST_ROWS))
        if device.type == "cuda":
            self.most_rows = min(self.most_rows, _FIRST_ROWS)  # many small factors do not fill it

    def all(self, advance: Callable[[int], object]) -> LinearSVM:
        by_memory = _GROUP_BYTES // (2 * 8 * self.products.count)
        size = max(1, min(by_memory, _GROUP if self.products.device.type == "cpu" else 10**6))
        count = len(self.classes)
        parts = [
            self.group(torch.arange(k, min(k + size, count)), advance)
            for k in range(0, count, size)
        ]
        weights, objective, gap, rounds = (torch.cat(p).cpu() for p in zip(*parts, strict=True))
        return LinearSVM(
            classes=self.classes.astype(np.int64),
            weights=weights.numpy(),
            objective=objective.numpy(),
            gap=gap.numpy(),
            rounds=rounds.numpy(),
            converged=(gap <= self.gap).numpy(),
            passes=self.products.passes,
            flops={str(d).removeprefix("torch."): n for d, n in self.products.flops.items()},
        )

    def group(
        self, classes: Tensor, advance: Callable[[int], object]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights (K, D), objective, gap and rounds (K,) of some of the classes."""
        device, products = self.products.device, self.products
        rest = OneVsRest(self.target, classes.to(device))
        count = len(classes)
        weights = torch.zeros(count, products.dimension, dtype=torch.float64, device=device)
        objective = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
        gap, bound = objective.clone(), torch.zeros_like(objective)
        rounds = torch.zeros(count, dtype=torch.int64, device=device)
        sets = [WorkingSet.empty(device, self.kernel_dtype) for _ in range(count)]
        live = list(range(count))
        left: list[int] = []  # to Newton
        margin: Tensor | None = None  # (live, N)
        for number in range(self.max_rounds):
            going, places = [], []
            proposed = []
            for place, k in enumerate(live):
                found = self._working_set(sets[k], rest, k, None if margin is None else margin[place])
                if found is None:
                    left.append(k)
                    sets[k] = WorkingSet.empty(device, self.kernel_dtype)
                    continue
                proposed.append(found[0])
                bound[k] = torch.maximum(bound[k], found[1])
                going.append(k)
                places.append(place)
            live = going
            if not live:
                break
            index = torch.tensor(live, device=device)
            rounds[index] += 1
            candidates = torch.stack(proposed)
            sure = bool(((gap[index] < _PROOF_FROM)).any()) or number >= 8
            dtype = torch.float64 if sure else torch.float32
            margin = rest.margins(products.scores(candidates.to(dtype)), live)
            value = 0.5 * candidates.square().sum(1) + self.c * squared_hinge(margin)
            better = value < objective[index]
            weights[index[better]] = candidates[better]
            objective[index] = torch.minimum(objective[index], value)
            gap[index] = 1 - bound[index] / objective[index]
            gap[index[objective[index] <= 0]] = 0
            # A float32 objective proves nothing, and must not stand for the lowest.
            if not sure:
                objective[index] = torch.inf
                done = torch.zeros_like(better)
            else:
                done = gap[index] <= self.gap
            if done.any():
                advance(int(done.sum()))
                margin = margin[~done]
                for k in index[done].tolist():
                    sets[k] = WorkingSet.empty(device, self.kernel_dtype)
                live = index[~done].tolist()
        left += live
        if left:
            index = torch.tensor(sorted(left), device=device)
            weights[index], objective[index], gap[index], steps = self.newton.minimise(
                weights[index], rest.part(index), self.max_rounds, advance
            )
            rounds[index] += steps
        return weights, objective, gap, rounds

    def _working_set(
        self, ws: WorkingSet, rest: OneVsRest, k: int, margin: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Renew class k's rows and solve: weights (D,) and bound; None when there are too many."""
        own = rest.own[k]
        if margin is None:
            kept = ws.index
            new = self._first_rows(own)
        else:
            inside = (ws.coefficients != 0) | (margin[ws.index] > 0)
            kept = inside.nonzero().flatten()
            outside = margin.clone()
            outside[ws.index] = 0
            violators = int((outside > 0).sum())
            growth = min(violators, max(len(kept), _LEAST_GROWTH))
            new = outside.topk(growth).indices.sort().values
            if len(kept) + growth > self.most_rows < self.products.count:
                return None
        rows = torch.cat([ws.index[kept], new]) if margin is not None else new
        x = self.products.take(rows)
        sign = torch.full((len(new),), -1.0, dtype=torch.float64, device=x.device)
        sign[torch.isin(new, own)] = 1
        old = len(kept)
        ws.replace(kept, new, sign, x)
        self.products.worked(len(rows), ws.kernel.dtype, len(rows) - old)
        current = torch.ones(len(rows), dtype=torch.float64, device=x.device)
        if margin is not None:
            current = margin[rows].double()
        ws.solve(current, self.c)
        weights = ws.coefficients @ x.double()
        return weights, ws.lower_bound(weights @ weights, self.c)

    def _first_rows(self, own: Tensor) -> Tensor:
        """All rows if they are few, else a class's own and some of the others."""
        count = self.products.count
        if count <= self.most_rows // 2:
            return torch.arange(count, device=own.device)
        some = own[: self.most_rows // 4]
        others = self.shuffled[: max(_FIRST_ROWS, 3 * len(some)) + len(own)]
        others = others[~torch.isin(others, own)][: max(_FIRST_ROWS - len(some), 3 * len(some))]
        return torch.cat([some, others]).sort().values


def squared_hinge(margin: Tensor) -> Tensor:
    """Σ max(0, margin)² of each class in float64, one class at a time: (K, N) -> (K,)."""
    return torch.stack([row.clamp(min=0).double().square_().sum() for row in margin])
