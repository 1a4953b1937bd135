"""Rounds of working sets for a group of classes (``svm.py``).

Each round solves every class on its few rows, exactly and in their span: the minimum depends only
on the rows within the margin, a few per cent as a rule, and with w = X_Wᵀ b for the n rows W every
quantity is one of the kernel matrix X_W X_Wᵀ (n, n), where Newton's steps cost n³/3 instead of
passes over the features. It then finds the margins of all rows for all classes in one pass, lets
rows outside the margin go and takes those in that lie within it, the deepest first and at most as
many as there are. The solution on some of the rows also bounds the objective over all of them from
below, so that a finished class is proven to be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seco.probe.svm_newton import factor, line_search
from seco.probe.svm_rows import OneVsRest, Products

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


_PROOF_FROM = 1e-4  # gaps above this are seen well enough with float32 margins
_UNPROVEN_ROUNDS = 8  # after which margins are float64 in any case
_FIRST_ROWS = 512
_LEAST_GROWTH = 128
_MOST_ROWS = 2048  # its Cholesky factor costs what a pass over many rows does


class WorkingSets:
    """Classes (K) being solved; results are valid where ``gap`` is finite."""

    def __init__(self, products: Products, rest: OneVsRest, c: float) -> None:
        device, count = products.device, len(rest.own)
        self._products, self._rest, self._c = products, rest, c
        self.weights = torch.zeros(count, products.dimension, dtype=torch.float64, device=device)
        self.objective = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
        self.gap = self.objective.clone()  # relative
        self.rounds = torch.zeros(count, dtype=torch.int64, device=device)
        self._bound = torch.zeros_like(self.objective)
        # Rounding of the kernel matrix must be small beside the 1 / 2C on its diagonal.
        rounding = 2 * c * products.largest_square * torch.finfo(torch.float32).eps
        dtype = torch.float64 if rounding > 1e-3 else torch.float32
        self._sets = [WorkingSet.empty(device, dtype) for _ in range(count)]
        # Past the dimension the other form of Newton's matrix is the smaller one.
        self._most = max(_LEAST_GROWTH, min(products.dimension, _MOST_ROWS))
        if device.type == "cuda":
            self._most = min(self._most, _FIRST_ROWS)  # many small factors do not fill it

    def run(self, gap: float, most_rounds: int, advance: Callable[[int], object]) -> list[int]:
        """Solve; returns the classes that are not proven to be within ``gap``."""
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
        """Margins (k, N) of classes' weights (k, D); keeps the weights that are the best so far."""
        scores = self._products.scores(weights if proven else weights.float())
        margin = self._rest.part(index).margins(scores)
        # A class at a time: the (k, N) products would be as large again.
        loss = torch.stack([row.clamp(min=0).double().square_().sum() for row in margin])
        value = 0.5 * weights.square().sum(1) + self._c * loss
        better = value < self.objective[index]
        self.weights[index[better]] = weights[better]
        objective = torch.minimum(self.objective[index], value)
        self.gap[index] = 1 - self._bound[index] / objective.clamp(min=1e-300)
        # What float32 makes of an objective must not stand for the lowest one.
        self.objective[index] = objective if proven else torch.inf
        return margin

    def _solve(self, k: int, margin: Tensor | None) -> Tensor | None:
        """Renew class k's rows by the margins (N,) of all and solve: weights (D,).

        None when it would take too many rows.
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
        """All rows if they are few, else of a class's own and evenly spaced others."""
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
