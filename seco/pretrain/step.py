"""One training step, on one rank or many: what is exchanged, encoded, differentiated and updated.

Gradient accumulation cuts a rank's rows into micro-batches for the memory's sake and changes
nothing else: all keys are encoded first, all queries see the queue as it was before the step, and
BatchNorm's groups are the same (``bn_group`` has to divide a micro-batch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seco.config import PretrainConfig
from seco.loading.device_views import DeviceViews
from seco.model.key_shuffle import KEYS, KeyShuffle
from seco.model.method import SeCo, StepResult
from seco.processes.device import to_device
from seco.processes.distributed import distributed, synchronised
from seco.processes.ranks import Ranks
from seco.views.view_parameters import VIEW_DRAWS, ViewConfig, draw_views


@dataclass(frozen=True)
class GlobalRows:
    """What all ranks know of a batch of N rows."""

    uniform: NDArray[np.float64]  # (4, N, 13) what the views are drawn from
    order: Tensor  # (N,)
    videos: Tensor  # (N,)


class TrainingStep:
    """Runs steps of a model.

    Args:
        model: on the device, in training mode.
        config: resolved settings.
        views: how views are drawn.
        device_views: makes them.
        ranks: the processes of the run.
        device: this rank's.
    """

    def __init__(
        self,
        model: SeCo,
        config: PretrainConfig,
        views: ViewConfig,
        device_views: DeviceViews,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.model = model
        self._config = config
        self._views = views
        self._ranks = ranks
        self._device = device
        self._device_views = device_views
        self._share = config.batch_size // ranks.size
        self._micro = self._share // config.accumulate
        self._autocast = config.precision == "bf16"
        self._layout = torch.channels_last if config.channels_last else torch.contiguous_format
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        if config.compile:
            model.query_encoder.compile()
            model.key_encoder.compile()
        self.optimizer = torch.optim.SGD(
            model.trained_parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._losses = distributed(model, ranks, device)

    def run(self, crops: Tensor, known: GlobalRows, step: int, lr: float) -> StepResult:
        """Train on this rank's part of a batch.

        Args:
            crops: (4, n, 3, S, S) of this rank's rows, on the device.
            known: of all ranks.
            step: counted over epochs; seeds the shuffle.
            lr: the learning rate.

        Returns:
            loss and figures of this rank's rows.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        order, videos = (to_device(t, self._device) for t in (known.order, known.videos))
        keys = self._keys(crops, known, step)
        own = slice(self._ranks.rank * self._share, (self._ranks.rank + 1) * self._share)
        mine = {name: vectors[:, own] for name, vectors in keys.items()}
        self.optimizer.zero_grad(set_to_none=True)
        results = []
        for begin in range(0, self._share, self._micro):
            rows = slice(begin, begin + self._micro)
            last = begin + self._micro == self._share
            with synchronised(self._losses, last):
                result = self._queries(crops[0, rows], mine, known, order[own], videos[own], rows)
                results.append(result)
        self.optimizer.step()
        self.model.append_keys(keys, videos)
        self.model.update_key_encoder()
        return _mean(results)

    def _keys(self, crops: Tensor, known: GlobalRows, step: int) -> dict[str, Tensor]:
        """For each head (3, N, D), the keys of the global batch."""
        config, ranks = self._config, self._ranks
        generator = torch.Generator().manual_seed(step_seed(config.seed, step))
        group = config.bn_group or self._share
        # A processor's caches like small batches, a GPU likes few kernels.
        forwards = KEYS if self._device.type == "cpu" else 1
        shuffle = KeyShuffle(config.batch_size, group, ranks.rank, ranks.size, generator, forwards)
        own = crops[1:].flatten(0, 1)
        if ranks.size == 1:
            stacked = own[_index(shuffle.wanted, self._device)]
        else:
            leaving = own[_index(shuffle.sent, self._device)]
            came = ranks.exchange(leaving, shuffle.sent_counts, shuffle.received_counts)
            stacked = came[_index(shuffle.arrived, self._device)]
        drawn = known.uniform[1:].reshape(-1, VIEW_DRAWS)[shuffle.wanted]
        with self._precision():
            encoded = self.model.encode_keys(self._finished(stacked, drawn), shuffle)
        return {name: shuffle.by_row(ranks.gather(vectors)) for name, vectors in encoded.items()}

    def _queries(
        self,
        crops: Tensor,
        keys: Mapping[str, Tensor],
        known: GlobalRows,
        order: Tensor,
        videos: Tensor,
        rows: slice,
    ) -> StepResult:
        """Forward and backward of some of this rank's rows."""
        stack = self.model.query_stack(len(crops))
        first = self._ranks.rank * self._share + rows.start
        drawn = known.uniform[0, first : first + len(crops)][stack.numpy()]
        images = self._finished(crops[to_device(stack, self._device)], drawn)
        some = {name: vectors[:, rows] for name, vectors in keys.items()}
        with self._precision():
            result: StepResult = self._losses(
                images, some, order[rows], videos[rows], first=rows.start == 0
            )
        with self._ranks.watched():
            (result.loss / self._config.accumulate).backward()
        return StepResult(result.loss.detach(), result.figures, result.moments)

    def _finished(self, crops: Tensor, drawn: NDArray[np.float64]) -> Tensor:
        """(n, 3, S, S) crops, or views that are finished already, in the model's layout."""
        views = self._device_views.finished(crops, draw_views(drawn, self._views))
        return views.contiguous(memory_format=self._layout)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast)


def _index(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(numbers), device)


def _mean(results: list[StepResult]) -> StepResult:
    """Of micro-batches of one size."""
    if len(results) == 1:
        return results[0]
    figures = {
        name: torch.stack([result.figures[name] for result in results]).mean()
        for name in results[0].figures
    }
    return StepResult(
        torch.stack([result.loss for result in results]).mean(),
        figures,
        torch.stack([result.moments for result in results]).mean(0),
    )


def step_seed(seed: int, step: int) -> int:
    """Of a step's permutations, the same on all ranks."""
    return (seed * 1_000_003 + step * 7_919 + 12_345) % (1 << 63)
