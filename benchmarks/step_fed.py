"""Training steps fed by the real loader, compared with steps on one of its batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.measuring import in_turns
from benchmarks.step_ways import WARM_UP, StepWays, Work, milliseconds_per_step
from seco.config import PretrainConfig, peak_lr
from seco.data.loader import Batch, DeviceViews, TripletLoader
from seco.data.transforms import ViewConfig
from seco.processes.device import loader_workers
from seco.training.step import GlobalRows, TrainingStep
from shards.opening import open_stream
from shards.stream import Stream

REAL, ONE_BATCH = "real loader", "one batch of crops"
_STEPS_FED = 15  # of a measurement on a GPU
_BATCHES_AHEAD = 3  # of the loader: they are used up before it is timed


def open_for_steps(config: PretrainConfig) -> Stream:
    """The triplets of ``config.shards``, at its batch size."""
    return open_stream(config.shards, config.batch_size, config.sampling or "uniform", 0)


class FedSteps:
    """A running loader; see :func:`feeding`."""

    def __init__(self, ways: StepWays, batches: Iterator[Batch]) -> None:
        self._ways = ways
        self._batches = batches
        self._views = DeviceViews(ways.device, ways.config.crop_size, ViewConfig())
        self._batch = next(batches)
        self._crops = self._views.crops(self._batch).clone()

    def measure(self, step: TrainingStep, repeats: int) -> dict[str, float]:
        """Median milliseconds of a step fed by the loader, and by its first batch every time."""
        device, rate, count = self._ways.device, peak_lr(self._ways.config), itertools.count()

        def train(crops: torch.Tensor, batch: Batch) -> None:
            known = GlobalRows(batch.uniform, batch.order, batch.videos)
            step.run(crops, known, next(count), rate)

        def loaded() -> None:
            batch = next(self._batches)
            train(self._views.crops(batch), batch)

        def timed(work: Work) -> float:
            # Batches made while the other way was measured would be had for nothing.
            for _ in range(_BATCHES_AHEAD if work is loaded else 0):
                loaded()
            return milliseconds_per_step(work, device, _STEPS_FED)

        fed: dict[str, Work] = {REAL: loaded, ONE_BATCH: lambda: train(self._crops, self._batch)}
        for work in fed.values():
            for _ in range(WARM_UP):
                work()
        return in_turns(fed, repeats, timed)


@contextmanager
def feeding(ways: StepWays, stream: Stream) -> Iterator[FedSteps]:
    """Run the loader of ``stream`` within the block.

    Its workers are forked when the block begins, as in a run before anything is compiled.
    """
    config, device = ways.config, ways.device
    loader = TripletLoader(
        stream,
        config.crop_size,
        ViewConfig(),
        workers=loader_workers(config.workers, device),
        first_step=0,
        last_step=10**9,
        decode=config.decode,
        views_on=config.views_on,
        pin=device.type == "cuda",
    )
    with loader:
        batches = iter(loader)
        try:
            yield FedSteps(ways, batches)
        finally:
            batches.close()
