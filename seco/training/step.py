"""One training step, on one rank or many: exchange, encode, differentiate, update.

A rank works on one BatchNorm group at a time: first the groups of its key images, without
gradients, then those of its queries, forward and backward, whose gradients are summed. So memory
holds the activations of one group at most, every forward has the same shape, and all queries see
the queue as it was before the step; without a queue, they see the keys of the step itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seco.config import PretrainConfig
from seco.data.loader import DeviceViews
from seco.data.transforms import VIEW_DRAWS, ViewConfig, draw_views
from seco.models.seco import KeyShuffle, Negatives, SeCo, SeCoOutput, mean_output
from seco.processes.device import compile_faults, compiler_works, to_device, uses_bf16
from seco.processes.ranks import Ranks, distributed, synchronised
from seco.training.optimizers import optimizer_for

_BACKEND = "inductor"


@dataclass(frozen=True)
class GlobalRows:
    """What all ranks know about a batch of N rows."""

    uniform: NDArray[np.float64]  # (4, N, 13) random numbers for the views
    order: Tensor  # (N,)
    videos: Tensor  # (N,)


def for_device(config: PretrainConfig, device: torch.device) -> PretrainConfig:
    """Resolve the settings that depend on the device: precision, memory format, compiling."""
    on_gpu = device.type == "cuda"
    return dataclasses.replace(
        config,
        precision="bf16" if uses_bf16(config.precision, device) else "fp32",
        channels_last=on_gpu if config.channels_last is None else config.channels_last,
        compile=on_gpu if config.compile is None else config.compile,
    )


class TrainingStep:
    """Runs training steps of a model.

    Args:
        model: on the device, in training mode.
        config: settings resolved for the device (:func:`for_device`).
        views: how to draw views.
        device_views: makes the views.
        ranks: the process group.
        device: this rank's device.
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
        self._group = config.bn_group or self._share
        self._autocast = config.precision == "bf16"
        self._layout = torch.channels_last if config.channels_last else torch.contiguous_format
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        self._compiled = bool(config.compile) and compiler_works(device)
        if self._compiled:
            for encoder in (model.query_encoder, model.key_encoder):
                encoder.compile(backend=_BACKEND, dynamic=False)  # their forward is shared code
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # a group's shape never changes
        self.optimizer = optimizer_for(model.trained_parameters(), config)
        self._losses = distributed(_Losses(model), ranks, device)

    def run(self, crops: Tensor, known: GlobalRows, step: int, lr: float) -> SeCoOutput:
        """Train on this rank's part of a batch.

        Args:
            crops: (4, n, 3, S, S) of this rank's rows, on the device.
            known: the global batch.
            step: step over all epochs; seeds the shuffle.
            lr: the learning rate.

        Returns:
            Loss and metrics of this rank's rows.

        Raises:
            InputError: torch.compile fails on the encoders.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        order, videos = (to_device(t, self._device) for t in (known.order, known.videos))
        with compile_faults() if self._compiled else nullcontext():
            keys = self._keys(crops, known, step)
            negatives = self.model.negatives(keys, videos)
            self.optimizer.zero_grad(set_to_none=True)
            results = self._queries(crops[0], keys, known, order, videos, negatives)
        self.optimizer.step()
        out = mean_output(results)
        out.keys, out.videos = keys, videos
        self.model.update(out)
        return out

    def _keys(self, crops: Tensor, known: GlobalRows, step: int) -> dict[str, Tensor]:
        """The keys of the global batch, (3, N, D) per head."""
        config, ranks = self._config, self._ranks
        shuffled = self.model.shuffles_keys
        generator = torch.Generator().manual_seed(step_seed(config.seed, step))
        shuffle = KeyShuffle(
            config.batch_size, ranks.rank, ranks.size, generator if shuffled else None
        )
        own = crops[1:].flatten(0, 1)
        if ranks.size == 1 or not shuffled:
            places = shuffle.sent  # all to this rank
        else:
            leaving = own[_index(shuffle.sent, self._device)]
            own = ranks.exchange(leaving, shuffle.sent_counts, shuffle.received_counts)
            places = shuffle.arrived
        drawn = known.uniform[1:].reshape(-1, VIEW_DRAWS)[shuffle.wanted]

        def groups() -> Iterator[Tensor]:
            for begin in range(0, len(places), self._group):
                rows = slice(begin, begin + self._group)
                yield self._finished(own[_index(places[rows], self._device)], drawn[rows])

        with self._precision():
            encoded = self.model.encode_keys(groups(), self._share // self._group)
        return {name: shuffle.by_row(ranks.gather(vectors)) for name, vectors in encoded.items()}

    def _queries(
        self,
        crops: Tensor,
        keys: dict[str, Tensor],
        known: GlobalRows,
        order: Tensor,
        videos: Tensor,
        negatives: Negatives,
    ) -> list[SeCoOutput]:
        """Forward and backward of this rank's queries, group by group; gradients accumulate."""
        results = []
        for begin in range(0, self._share, self._group):
            end = begin + self._group
            first = self._ranks.rank * self._share
            rows = slice(first + begin, first + end)  # in the global batch
            images = self._finished(crops[begin:end], known.uniform[0, rows])
            some = {name: vectors[:, rows] for name, vectors in keys.items()}
            with synchronised(self._losses, last=end == self._share):
                with self._precision():
                    result: SeCoOutput = self._losses(
                        images, some, order[rows], videos[rows], negatives, first=begin == 0
                    )
                with self._ranks.watched():
                    (result.loss * (self._group / self._share)).backward()
            results.append(SeCoOutput(result.loss.detach(), result.metrics, result.moments))
        return results

    def _finished(self, crops: Tensor, drawn: NDArray[np.float64]) -> Tensor:
        """Turn (g, 3, S, S) crops or finished views into the encoder's input."""
        views = self._device_views.finished(crops, draw_views(drawn, self._views))
        if self._autocast:
            views = views.bfloat16()  # the first convolution would cast them anyway
        return views.contiguous(memory_format=self._layout)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast)


def _index(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(numbers), device)


class _Losses(nn.Module):
    """:meth:`SeCo.losses` as a forward, which DistributedDataParallel needs."""

    def __init__(self, model: SeCo) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> SeCoOutput:
        return self.model.losses(*args, **kwargs)


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's permutations, the same on all ranks."""
    return (seed * 1_000_003 + step * 7_919 + 12_345) % (1 << 63)
