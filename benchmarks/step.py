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

from benchmarks.measuring import machine
from benchmarks.step_fed import ONE_BATCH, REAL, feeding, open_for_steps
from benchmarks.step_ways import Build, StepWays, Work, measured, peak_memory
from seco.config import PretrainConfig, peak_lr, resolve_pretrain
from seco.models.losses import inter_loss
from seco.processes.device import resolve_device
from seco.training.state import RunState
from shards.errors import InputError
from shards.progress import progress


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
    if config.queue_size == 0:
        raise InputError("must be 1 or more: the plain step has a queue", "--queue-size")
    config = resolve_pretrain(config)
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
        with peak_memory(device) as peak, feeding(ways, stream) as fed:
            medians = fed.measure(ways.step(), repeats)
        found.milliseconds |= {f"end to end, {name}": value for name, value in medians.items()}
        found.ratios["end to end, of synthetic"] = medians[ONE_BATCH] / medians[REAL]
        if "gib" in peak:
            found.peak_gib["end to end"] = peak["gib"]
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
