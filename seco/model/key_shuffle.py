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

from seco.model.batchnorm import group_order
from seco.processes.device import to_device

KEYS = 3
Ints = NDArray[np.int64]


class KeyShuffle:
    """The plan of one step, the same on all ranks.

    Args:
        batch: N, the global batch.
        group: images normalised together; divides a rank's share n = N / size.
        rank: this process's number of ``size`` processes.
        generator: seeded alike on all ranks.
        forwards: 1 or 3, of the key encoder: all images at once, or a key at a time. The groups are
            the same.

    Attributes:
        forwards: as given.
        groups: of each forward.
        wanted: (3n,) of the 3N key images (k1 of all rows, then k2, then k3) those that this rank
            encodes, in the order in which they are stacked.
        sent: (3n,) of this rank's own 3n key images the order in which they leave, rank after rank.
        sent_counts: how many go to each rank.
        received_counts: how many come from each.
        arrived: (3n,) where in what came each stacked image is.
    """

    def __init__(
        self,
        batch: int,
        group: int,
        rank: int,
        size: int,
        generator: torch.Generator,
        forwards: int = 1,
    ) -> None:
        share = batch // size
        self._batch = batch
        self._share = share
        permutations = torch.stack(
            [torch.randperm(batch, generator=generator) for _ in range(KEYS)]
        )
        self._permutations = permutations
        self.forwards = forwards
        self.groups = KEYS * (share // group) // forwards
        rows = self._permutations.numpy().reshape(KEYS, size, share)
        numbers = rows + batch * np.arange(KEYS)[:, None, None]
        # Image i of a stack is in group i mod G (seco.model.batchnorm).
        places = torch.arange(KEYS * share).chunk(forwards)
        self._stack: Ints = torch.cat([group_order(part, self.groups) for part in places]).numpy()
        self.wanted: Ints = numbers[:, rank].reshape(-1)[self._stack]
        owners = rows // share  # (3, R, n)
        own = owners == rank
        self.sent_counts: list[int] = own.sum(axis=(0, 2)).tolist()
        local = rows - rank * share + share * np.arange(KEYS)[:, None, None]
        self.sent: Ints = np.concatenate([local[:, to][own[:, to]] for to in range(size)])
        coming = owners[:, rank].reshape(-1)
        self.received_counts: list[int] = np.bincount(coming, minlength=size).tolist()
        came = np.empty(KEYS * share, dtype=np.int64)
        came[np.argsort(coming, kind="stable")] = np.arange(KEYS * share)
        self.arrived: Ints = came[self._stack]

    def unstacked(self, vectors: Tensor) -> Tensor:
        """(3n, D) in the stack's order to (3n, D) by key and place."""
        placed = torch.empty_like(vectors)
        placed[to_device(torch.from_numpy(self._stack), vectors.device)] = vectors
        return placed

    def by_row(self, vectors: Tensor) -> Tensor:
        """(R · 3n, D) by rank, key and place to (3, N, D) by key and row of the global batch."""
        size = self._batch // self._share
        by_place = vectors.view(size, KEYS, self._share, -1).transpose(0, 1)
        by_place = by_place.reshape(KEYS, self._batch, -1)
        rows = to_device(self._permutations, vectors.device)[:, :, None].expand_as(by_place)
        return torch.empty_like(by_place).scatter_(1, rows, by_place)
