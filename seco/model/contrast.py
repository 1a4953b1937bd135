"""The memory of keys that serve as negatives (paper §4.2; MoCo's queue)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NegativeQueue(nn.Module):
    """K rows of past keys, the oldest replaced first. All of its state is in buffers, hence saved.

    Args:
        size: K.
        dim: D.
        init: ``unit`` (random unit vectors) or ``uniform`` (authors' code: ±1/sqrt(D/3), not
            normalised).
        generator: source of the first rows, so that all ranks start alike.
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
        self.register_buffer("videos", torch.full((size,), -1))  # (K,) -1: nobody's
        self.register_buffer("next_slot", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # keys ever appended

    @property
    def size(self) -> int:
        """K."""
        return self.rows.shape[0]

    @property
    def fill(self) -> float:
        """The share of rows that are real keys, 0 … 1."""
        return min(1.0, int(self.seen) / self.size)

    @torch.no_grad()
    def append(self, keys: Tensor, videos: Tensor) -> None:
        """Append M keys (M, D) of videos (M,) in their order, wrapping at the end; any M."""
        appended = len(keys)
        first = max(0, appended - self.size)  # more than K: only the last K would remain
        slots = torch.arange(first, appended, device=self.rows.device)
        slots = (slots + self.next_slot) % self.size
        self.rows[slots] = keys[first:].to(self.rows.dtype)
        self.videos[slots] = videos[first:]
        self.next_slot.copy_((self.next_slot + appended) % self.size)
        self.seen += appended

    def same_video(self, videos: Tensor) -> Tensor:
        """(N, K) bool: row k holds a key of the query's own video."""
        return videos[:, None] == self.videos[None, :]
