"""Which rank encodes which key image, and in which order: MoCo's shuffled BatchNorm.

The query and its keys must not be normalised with the statistics of the same images (paper §5.2:
shuffling BN). Each of the three keys has a permutation of the global batch; a run of consecutive
places of it is one BatchNorm group. Rank r encodes the places r·n … (r+1)·n - 1 of each, so that no
rank receives more images than it normalises, and the groups are the same on any number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seco.processes.device import to_device

KEYS = 3
Ints = NDArray[np.int64]


class KeyShuffle:
    """The plan of one step, the same on all ranks.

    Args:
        batch: N, the global batch.
        rank: this process's number of ``size`` processes.
        size: their number; divides N.
        generator: seeded alike on all ranks.

    Attributes:
        wanted: (3n,) of the 3N key images (k1 of all rows, then k2, then k3) those that this rank
            encodes, by key and place; n = N / size.
        sent: (3n,) of this rank's own 3n key images the order in which they leave, rank after rank.
        sent_counts: how many go to each rank.
        received_counts: how many come from each.
        arrived: (3n,) where in what came each wanted image is.
    """

    def __init__(self, batch: int, rank: int, size: int, generator: torch.Generator) -> None:
        share = batch // size
        self._batch = batch
        self._share = share
        self._permutations = torch.stack(
            [torch.randperm(batch, generator=generator) for _ in range(KEYS)]
        )
        rows = self._permutations.numpy().reshape(KEYS, size, share)
        numbers = rows + batch * np.arange(KEYS)[:, None, None]
        self.wanted: Ints = numbers[:, rank].reshape(-1)
        owners = rows // share  # (3, R, n)
        own = owners == rank
        self.sent_counts: list[int] = own.sum(axis=(0, 2)).tolist()
        local = rows - rank * share + share * np.arange(KEYS)[:, None, None]
        self.sent: Ints = np.concatenate([local[:, to][own[:, to]] for to in range(size)])
        coming = owners[:, rank].reshape(-1)
        self.received_counts: list[int] = np.bincount(coming, minlength=size).tolist()
        self.arrived: Ints = np.empty(KEYS * share, dtype=np.int64)
        self.arrived[np.argsort(coming, kind="stable")] = np.arange(KEYS * share)

    def by_row(self, vectors: Tensor) -> Tensor:
        """(R · 3n, D) by rank, key and place to (3, N, D) by key and row of the global batch."""
        size = self._batch // self._share
        by_place = vectors.view(size, KEYS, self._share, -1).transpose(0, 1)
        by_place = by_place.reshape(KEYS, self._batch, -1)
        rows = to_device(self._permutations, vectors.device)[:, :, None].expand_as(by_place)
        return torch.empty_like(by_place).scatter_(1, rows, by_place)
