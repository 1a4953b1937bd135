"""The sum over all negatives of Eq. 1 and 2, in blocks of the queue.

A query's logits against 131,072 negatives are needed for their sum alone: 512 queries would make a
matrix of 268 MB, which autograd keeps, copies and differentiates. Here each block's logits are
made, summed and dropped, and made again for the gradient: two more products of a matrix that is
small beside a ResNet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of a block. A processor wants it in its cache, a GPU wants few kernels.
_BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 23}


def negative_logsumexp(
    query: Tensor, negatives: Tensor, temperature: float, masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log Σ exp(q · k / τ) over the negatives, and the largest q · k / τ.

    Args:
        query: (N, D); the sum is differentiable by it.
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
            shift = largest.masked_fill(largest == float("-inf"), 0.0)  # all are masked
            sums = logits.sub_(shift[:, None]).exp_().sum(1)  # in place: the block is not needed on
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
        total = total.masked_fill(total == float("-inf"), 0.0)  # all are masked: no shares
        for logits, block in _blocks(query, negatives, ctx.temperature, masked):
            shares = logits.sub_(total[:, None]).exp_().mul_(scale)  # softmax over all negatives
            gradient.addmm_(shares, block)
        return gradient, None, None, None


def _blocks(query: Tensor, negatives: Tensor, temperature: float, masked: Tensor | None) -> Any:
    """(N, k) logits of each block of k negatives, and the block (k, D)."""
    size = max(1, _BLOCK_LOGITS[query.device.type] // max(1, len(query)))
    for begin in range(0, len(negatives), size):
        block = negatives[begin : begin + size]
        logits = (query / temperature) @ block.t()
        if masked is not None:
            logits.masked_fill_(masked[:, begin : begin + size], float("-inf"))
        yield logits, block
