"""The memory of keys that serve as negatives (paper §4.2; MoCo's queue), and the sum over them.

A query's logits against 131,072 negatives are needed for their sum alone: 512 queries would make a
matrix of 268 MB, which autograd keeps, copies and differentiates. Here each block's logits are
made, summed and dropped, and made again for the gradient: two more products of a matrix that is
small compared with a ResNet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Per block: on a CPU it should fit into the cache, a GPU should need few kernels.
_BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 23}


def negative_logsumexp(
    query: Tensor, negatives: Tensor, temperature: float, masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute log Σ exp(q · k / τ) over the negatives, and the largest q · k / τ.

    Args:
        query: (N, D); the sum is differentiable with respect to it.
        negatives: (K, D), constants.
        temperature: τ.
        masked: (N, K) bool, negatives to leave out; None for none.

    Returns:
        (N,) and (N,); the second has no gradient.
    """
    result: tuple[Tensor, Tensor] = _NegativeLogSumExp.apply(query, negatives, temperature, masked)
    return result


class _NegativeLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, negatives: Tensor, temperature: float, masked: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total = query.new_full((len(query),), float("-inf"))
        hardest = total.clone()
        for logits, _ in _blocks(query, negatives, temperature, masked):
            largest = logits.amax(1)
            hardest = torch.maximum(hardest, largest)
            shift = largest.masked_fill(largest == float("-inf"), 0.0)  # where all are masked
            sums = logits.sub_(shift[:, None]).exp_().sum(1)  # in place: not needed any more
            total = torch.logaddexp(total, shift + sums.log())
        ctx.save_for_backward(query, negatives, masked, total)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(hardest)
        return total, hardest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        query, negatives, masked, total = ctx.saved_tensors
        gradient = torch.zeros_like(query)
        scale = (grad / ctx.temperature)[:, None]
        total = total.masked_fill(total == float("-inf"), 0.0)  # all masked: no gradient
        for logits, block in _blocks(query, negatives, ctx.temperature, masked):
            shares = logits.sub_(total[:, None]).exp_().mul_(scale)  # softmax over all negatives
            gradient.addmm_(shares, block)
        return gradient, None, None, None


def _blocks(query: Tensor, negatives: Tensor, temperature: float, masked: Tensor | None) -> Any:
    """Yield the (N, k) logits of each block of k negatives, and the block (k, D)."""
    size = max(1, _BLOCK_LOGITS[query.device.type] // max(1, len(query)))
    for begin in range(0, len(negatives), size):
        block = negatives[begin : begin + size]
        logits = (query / temperature) @ block.t()
        if masked is not None:
            logits.masked_fill_(masked[:, begin : begin + size], float("-inf"))
        yield logits, block


class NegativeQueue(nn.Module):
    """A ring of K past keys; the oldest are replaced first. All state is in (saved) buffers.

    Args:
        size: K.
        dim: D.
        init: ``unit`` (random unit vectors) or ``uniform`` (authors' code: ±1/sqrt(D/3), not
            normalised).
        generator: for the initial rows, so that all ranks start with the same ones.
    """

    rows: Tensor
    videos: Tensor
    next_slot: Tensor
    seen: Tensor

    def __init__(self, size: int, dim: int, init: str, generator: torch.Generator) -> None:
        super().__init__()
        if init == "uniform":
            bound = 1 / math.sqrt(dim / 3)
            rows = torch.rand(size, dim, generator=generator) * 2 * bound - bound
        else:
            rows = F.normalize(torch.randn(size, dim, generator=generator))
        self.register_buffer("rows", rows)  # (K, D)
        self.register_buffer("videos", torch.full((size,), -1))  # (K,) -1: no video
        self.register_buffer("next_slot", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # keys ever appended

    @property
    def size(self) -> int:
        """K."""
        return self.rows.shape[0]

    @property
    def fill(self) -> float:
        """Share of rows that hold real keys, 0 … 1."""
        return min(1.0, int(self.seen) / self.size)

    @torch.no_grad()
    def append(self, keys: Tensor, videos: Tensor) -> None:
        """Append M keys (M, D) of videos (M,) in order, wrapping around; any M."""
        appended = len(keys)
        first = max(0, appended - self.size)  # of more than K, only the last K remain
        slots = torch.arange(first, appended, device=self.rows.device)
        slots = (slots + self.next_slot) % self.size
        self.rows[slots] = keys[first:].to(self.rows.dtype)
        self.videos[slots] = videos[first:]
        self.next_slot.copy_((self.next_slot + appended) % self.size)
        self.seen += appended
