"""What ``seco bench step`` compares, and how each way is timed and its GPU memory measured."""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import in_turns
from benchmarks.step_reference import PlainStep, bare_cost
from seco.config import PretrainConfig, peak_lr
from seco.data.loader import DeviceViews
from seco.data.transforms import VIEW_DRAWS, ViewConfig
from seco.models.seco import SeCo
from seco.processes.device import wall_milliseconds
from seco.processes.ranks import Ranks
from seco.training.step import GlobalRows, TrainingStep, for_device

WARM_UP = 2
_STEPS_AT_A_TIME = 5  # on a GPU: as in a run, the host prepares a step while the last one computes

Work = Callable[[], object]
Build = Callable[[], Work]


class StepWays:
    """What is compared; each is built when it is asked for, and frees its memory when dropped.

    Args:
        config: resolved settings.
        device: of all of it.

    Attributes:
        config: with what is left to the device decided.
        known: of the N rows.
    """

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config = for_device(config, device)
        self.device = device
        n = config.batch_size
        uniform = np.random.default_rng(0).random((4, n, VIEW_DRAWS))
        self.known = GlobalRows(uniform, torch.arange(n) % 2, torch.arange(n))

    @functools.cached_property
    def views(self) -> Tensor:
        """(4, N, 3, S, S) float32, random."""
        n, size = self.config.batch_size, self.config.crop_size
        return torch.randn(4, n, 3, size, size, device=self.device)

    @functools.cached_property
    def crops(self) -> Tensor:
        """(4, N, 3, S, S) uint8, random, interleaved as the loader's are."""
        n, size = self.config.batch_size, self.config.crop_size
        crops = torch.randint(256, (4, n, size, size, 3), dtype=torch.uint8, device=self.device)
        return crops.permute(0, 1, 4, 2, 3)

    def step(
        self,
        config: PretrainConfig | None = None,
        make: Callable[[PretrainConfig], SeCo] = SeCo,
    ) -> TrainingStep:
        """A training step of a new model; ``config`` in place of the usual settings."""
        config = for_device(config or self.config, self.device)
        torch.manual_seed(0)
        model = make(config).to(self.device).train()
        views = DeviceViews(self.device, config.crop_size, ViewConfig())
        return TrainingStep(model, config, ViewConfig(), views, Ranks(), self.device)

    def ours(self, config: PretrainConfig | None = None) -> Work:
        """Steps on finished views: what the bare cost is to be compared with."""
        step, count = self.step(config), itertools.count()
        return lambda: step.run(self.views, self.known, next(count), peak_lr(self.config))

    def from_crops(self, config: PretrainConfig | None = None) -> Work:
        """Steps on uint8 crops on the device, from which the views are made as in a run."""
        step, count = self.step(config), itertools.count()
        return lambda: step.run(self.crops, self.known, next(count), peak_lr(self.config))

    def bare_costs(self) -> dict[str, Build]:
        """Bare costs in every layout, and compiled where training steps are."""

        def build(layout: torch.memory_format, compiled: bool) -> Build:
            bf16 = self.config.precision == "bf16"
            return lambda: bare_cost(
                self.config, self.views, self.device, bf16=bf16, layout=layout, compiled=compiled
            )

        found = {
            "bare cost, contiguous": build(torch.contiguous_format, False),
            "bare cost, channels_last": build(torch.channels_last, False),
        }
        if self.config.compile:
            found["bare cost, channels_last, compiled"] = build(torch.channels_last, True)
        return found

    def plain(self) -> Work:
        """Plainly written steps on finished views."""
        step, order = PlainStep(self.config, self.device), self.known.order.to(self.device)
        return lambda: step(self.views, order)


def measured(
    ways: Mapping[str, Build], repeats: int, device: torch.device, after_each: Work = lambda: None
) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of each way, and on a GPU the peak of its memory in GiB."""
    if device.type == "cuda":
        alone = {}
        for name, build in ways.items():
            alone[name] = time_alone(build, repeats, device)
            after_each()
        peaks = {name: peak for name, (_, peak) in alone.items() if peak is not None}
        return {name: ms for name, (ms, _) in alone.items()}, peaks
    built = {name: build() for name, build in ways.items()}
    for work in built.values():
        for _ in range(WARM_UP):
            work()
        after_each()
    return in_turns(built, repeats, lambda work: wall_milliseconds(work, device)), {}


def time_alone(build: Build, repeats: int, device: torch.device) -> tuple[float, float | None]:
    """Build, warm up, time and drop one way: (median milliseconds, peak GiB of GPU memory)."""
    with peak_memory(device) as peak:
        work = build()
        for _ in range(WARM_UP):
            work()
        ms = statistics.median(milliseconds_per_step(work, device) for _ in range(repeats))
        del work
    return ms, peak.get("gib")


def milliseconds_per_step(
    work: Work, device: torch.device, at_a_time: int = _STEPS_AT_A_TIME
) -> float:
    """Wall clock of a step; on a GPU of ``at_a_time`` steps in a row, as the host runs ahead."""
    if device.type != "cuda":
        return wall_milliseconds(work, device)
    torch.cuda.synchronize(device)

    def some() -> None:
        for _ in range(at_a_time):
            work()

    return wall_milliseconds(some, device) / at_a_time


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """The peak of GPU memory within the block, as ``gib``; what is unused is freed before it."""
    found: dict[str, float] = {}
    gc.collect()  # models are in circles of references
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["gib"] = torch.cuda.max_memory_allocated(device) / 2**30
