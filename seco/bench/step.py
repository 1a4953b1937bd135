"""``seco bench step``: a training step compared with its bare cost and the plain way."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from seco.bench.step_ways import (
    WARM_UP,
    Build,
    StepWays,
    Work,
    measured,
    milliseconds_per_step,
    peak_memory,
)
from seco.config import PretrainConfig, peak_lr, resolve
from seco.loading.device_views import DeviceViews
from seco.loading.loader import Batch, TripletLoader
from seco.model.losses import inter_loss
from seco.pretrain.step import GlobalRows, TrainingStep
from seco.processes.device import loader_workers, resolve_device
from seco.runs.run_state import RunState
from seco.views.view_parameters import ViewConfig
from shards.errors import InputError
from shards.measuring import in_turns, machine
from shards.opening import open_stream
from shards.progress import progress
from shards.stream import Stream

_STEPS_FED = 15  # on a GPU, of the end to end
_BATCHES_AHEAD = 2  # of the loader: they are used up before the end to end is timed


@dataclass
class StepBench:
    """Median milliseconds of a step, by wall clock, and what follows from them."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    milliseconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    triplets_s: dict[str, float] = field(default_factory=dict)
    peak_gib: dict[str, float] = field(default_factory=dict)  # of GPU memory
    loss_memory: dict[str, float] = field(default_factory=dict)
    checkpoint: dict[str, float] = field(default_factory=dict)


def bench_step(
    config: PretrainConfig, repeats: int = 10, *, switches: bool = True, plain: bool = True
) -> StepBench:
    """Measure steps on synthetic views, and with the real loader where ``config`` names shards.

    On a GPU each way is measured by itself, and its memory freed before the next. On the CPU,
    which others may use, the ways take turns.

    Args:
        config: architecture, sizes, device, precision; shards for the end to end.
        repeats: measurements of each figure.
        switches: also measure channels_last and compile, on and off.
        plain: also measure the plain step.

    Raises:
        InputError: settings or shards cannot be used.
    """
    if repeats < 1:
        raise InputError("must be 1 or more", "--repeats")
    config = resolve(config)
    device = resolve_device(config.device)
    stream = open_for_steps(config) if config.shards else None  # refused before all that takes long
    ways = StepWays(config, device)
    config = ways.config
    found = StepBench(machine("torch", "torchvision"), _settings(config, device))
    if device.type == "cuda":
        found.machine["gpu"] = torch.cuda.get_device_name(device)
    compared: dict[str, Build] = {"ours": ways.ours, "ours, from crops": ways.from_crops}
    bare = ways.bare_costs()
    compared |= bare
    if switches:
        last, compiled = not config.channels_last, not config.compile
        for name, on, changed in (
            ("channels_last", last, dataclasses.replace(config, channels_last=last)),
            ("compile", compiled, dataclasses.replace(config, compile=compiled)),
        ):
            compared[f"ours, {'' if on else 'no '}{name}"] = functools.partial(ways.ours, changed)
    if plain:
        compared["plain step"] = ways.plain
    with progress("bench step", len(compared), "ways") as bar:
        found.milliseconds, found.peak_gib = measured(compared, repeats, device, bar.advance)
    ms = found.milliseconds
    found.ratios["ours, of the bare cost"] = ms["ours"] / min(ms[name] for name in bare)
    if plain:
        found.ratios["ours, times the plain step"] = ms["plain step"] / ms["ours"]
    found.loss_memory = _loss_memory(config)
    found.checkpoint = _checkpoint_cost(ways, ms["ours"])
    if stream is not None:
        fed, peak = end_to_end(ways, stream, repeats)
        found.milliseconds |= {f"end to end, {name}": value for name, value in fed.items()}
        found.ratios["end to end, of synthetic"] = fed["one batch of crops"] / fed["real loader"]
        if peak is not None:
            found.peak_gib["end to end"] = peak
    found.triplets_s = {name: 1e3 * config.batch_size / value for name, value in ms.items()}
    return found


def _settings(config: PretrainConfig, device: torch.device) -> dict[str, Any]:
    names = ("arch", "crop_size", "batch_size", "bn_group", "queue_size", "precision")
    found = {name: getattr(config, name) for name in (*names, "channels_last", "compile")}
    threads = {} if device.type == "cuda" else {"threads": torch.get_num_threads()}
    return found | {"device": device.type} | threads


def peak_bytes(work: Work) -> int:
    """The most that ``work`` has allocated on the CPU at once, as torch's profiler saw it."""
    work()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes), default=0)


def _loss_memory(config: PretrainConfig) -> dict[str, float]:
    """Peak of the inter loss and its gradient, beside one N x K matrix of float32."""
    n, d, k = config.batch_size, config.embedding_dim, config.queue_size
    query = torch.nn.functional.normalize(torch.randn(n, d)).requires_grad_()
    keys, rows = torch.randn(3, n, d), torch.randn(k, d)

    def work() -> None:
        loss, _ = inter_loss(query, keys, rows, config.temperature)
        loss.backward()

    peak = peak_bytes(work)
    one = 4.0 * n * k
    return {"peak_mb": peak / 1e6, "n_times_k_mb": one / 1e6, "ratio": peak / one}


def _checkpoint_cost(ways: StepWays, step_ms: float) -> dict[str, float]:
    """What one save in the background adds to the steps around it."""
    step, device = ways.step(), ways.device
    with tempfile.TemporaryDirectory(prefix="seco-bench-") as folder:
        state = RunState(Path(folder), ways.config, step.model, step.optimizer, "", writes=True)
        count = itertools.count()

        def some(save: bool) -> float:
            began = time.perf_counter()
            for number in range(6):
                step.run(ways.views, ways.known, next(count), peak_lr(ways.config))
                if save and number == 0:
                    state.save()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return (time.perf_counter() - began) * 1e3

        some(False)
        pairs = [(some(True), some(False)) for _ in range(3)]
        state.finish()
        size = state.last.stat().st_size
    extra = float(np.median([with_save - without for with_save, without in pairs]))
    return {
        "megabytes": size / 1e6,
        "extra_ms_a_save": extra,
        "share_of_100_steps": extra / (100 * step_ms),
    }


def open_for_steps(config: PretrainConfig) -> Stream:
    """The triplets of ``config.shards``, at its batch size."""
    return open_stream(config.shards, config.batch_size, config.sampling or "uniform", 0)


def end_to_end(
    ways: StepWays, stream: Stream, repeats: int, step: TrainingStep | None = None
) -> tuple[dict[str, float], float | None]:
    """Milliseconds of steps fed by the real loader, and by one of its batches again and again.

    Args:
        ways: settings and device.
        stream: of the shards, at the settings' batch size.
        repeats: measurements of each figure.
        step: one that is compiled already.

    Returns:
        the medians, and on a GPU the peak of its memory in GiB.
    """
    config, device, views = ways.config, ways.device, ViewConfig()
    device_views = DeviceViews(device, config.crop_size, views)
    loader = TripletLoader(
        stream,
        config.crop_size,
        views,
        workers=loader_workers(config.workers, device),
        first_step=0,
        last_step=10**9,
        decode=config.decode,
        views_on=config.views_on,
        pin=device.type == "cuda",
    )
    count = itertools.count()
    with peak_memory(device) as peak, loader:
        step = step or ways.step()
        batches = iter(loader)

        def train(crops: torch.Tensor, batch: Batch) -> None:
            known = GlobalRows(batch.uniform, batch.order, batch.videos)
            step.run(crops, known, next(count), peak_lr(config))

        def loaded() -> None:
            batch = next(batches)
            train(device_views.crops(batch), batch)

        batch = next(batches)
        crops = device_views.crops(batch).clone()
        ways_fed: dict[str, Work] = {
            "real loader": loaded,
            "one batch of crops": lambda: train(crops, batch),
        }
        for work in ways_fed.values():
            for _ in range(WARM_UP):
                work()

        def timed(work: Work) -> float:
            # Batches made while the other way was measured would be had for nothing.
            for _ in range(_BATCHES_AHEAD if work is loaded else 0):
                loaded()
            return milliseconds_per_step(work, device, _STEPS_FED)

        medians = in_turns(ways_fed, repeats, timed)
        batches.close()
    return medians, peak.get("gib")
