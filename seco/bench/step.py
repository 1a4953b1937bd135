"""``seco bench step``: a training step beside its bare cost and the plain way to write it."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from seco.bench.step_reference import PlainStep, bare_cost
from seco.config import PretrainConfig, peak_lr, resolve
from seco.loading.device_views import DeviceViews
from seco.loading.loader import TripletLoader
from seco.model.losses import inter_loss
from seco.model.method import SeCo
from seco.pretrain.step import GlobalRows, TrainingStep, for_device
from seco.processes.device import loader_workers, resolve_device, wall_milliseconds
from seco.processes.ranks import Ranks
from seco.runs.run_state import RunState
from seco.views.view_parameters import VIEW_DRAWS, ViewConfig
from shards.errors import InputError
from shards.measuring import in_turns, machine
from shards.opening import open_stream
from shards.progress import progress

_WARM_UP = 2


@dataclass
class StepBench:
    """Median milliseconds of a step, by wall clock, and what follows from them."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    milliseconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    triplets_s: dict[str, float] = field(default_factory=dict)
    loss_memory: dict[str, float] = field(default_factory=dict)
    checkpoint: dict[str, float] = field(default_factory=dict)


def bench_step(
    config: PretrainConfig, repeats: int = 10, *, switches: bool = True, plain: bool = True
) -> StepBench:
    """Measure steps on synthetic views, and with the real loader where ``config`` names shards.

    Args:
        config: architecture, sizes, device, precision; shards for the end to end.
        repeats: measurements of each figure.
        switches: also measure channels_last and compile, on and off.
        plain: also measure the plain step.
    """
    if repeats < 1:
        raise InputError("must be 1 or more", "--repeats")
    config = resolve(config)
    device = resolve_device(config.device)
    config = for_device(config, device)
    bf16 = config.precision == "bf16"
    found = StepBench(machine("torch", "torchvision"), _settings(config, device))
    if device.type == "cuda":
        found.machine["gpu"] = torch.cuda.get_device_name(device)
    views, known = _synthetic(config, device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    ways: dict[str, Callable[[], object]] = {
        "ours": _ours(config, device, views, known),
        "bare cost": bare_cost(config, views, device, bf16=bf16, layout=layout),
    }
    if plain:
        step, order = PlainStep(config, device), known.order.to(device)
        ways["plain step"] = lambda: step(views, order)
    if switches:
        other = not config.channels_last
        changed = {
            f"ours, {'' if other else 'no '}channels_last": dataclasses.replace(
                config, channels_last=other
            ),
            "ours, compile": dataclasses.replace(config, compile=True),
        }
        for label, changed_config in changed.items():
            ways[label] = _ours(changed_config, device, views, known)
    for work in ways.values():
        for _ in range(_WARM_UP):
            work()
    with progress("bench step", repeats, "repeats") as bar:
        found.milliseconds = in_turns(
            ways, repeats, lambda work: wall_milliseconds(work, device), bar.advance
        )
    ms = found.milliseconds
    found.ratios["ours, of the bare cost"] = ms["ours"] / ms["bare cost"]
    if plain:
        found.ratios["ours, times the plain step"] = ms["plain step"] / ms["ours"]
    found.triplets_s = {name: 1e3 * config.batch_size / value for name, value in ms.items()}
    found.loss_memory = _loss_memory(config)
    found.checkpoint = _checkpoint_cost(config, device, views, known, ms["ours"])
    if config.shards:
        _end_to_end(found, config, device, repeats)
    return found


def _settings(config: PretrainConfig, device: torch.device) -> dict[str, Any]:
    names = ("arch", "crop_size", "batch_size", "bn_group", "queue_size", "precision")
    more = {"channels_last": config.channels_last, "device": device.type}
    threads = {} if device.type == "cuda" else {"threads": torch.get_num_threads()}
    return {name: getattr(config, name) for name in names} | more | threads


def _synthetic(config: PretrainConfig, device: torch.device) -> tuple[Tensor, GlobalRows]:
    n, size = config.batch_size, config.crop_size
    views = torch.randn(4, n, 3, size, size, device=device)
    uniform = np.random.default_rng(0).random((4, n, VIEW_DRAWS))
    order = torch.arange(n) % 2
    return views, GlobalRows(uniform, order, torch.arange(n))


def _made(config: PretrainConfig, device: torch.device) -> TrainingStep:
    torch.manual_seed(0)
    model = SeCo(config).to(device).train()
    views = DeviceViews(device, config.crop_size, ViewConfig())
    return TrainingStep(model, config, ViewConfig(), views, Ranks(), device)


def _ours(
    config: PretrainConfig, device: torch.device, views: Tensor, known: GlobalRows
) -> Callable[[], object]:
    step, count = _made(config, device), itertools.count()
    return lambda: step.run(views, known, next(count), peak_lr(config))


def peak_bytes(work: Callable[[], object]) -> int:
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


def _checkpoint_cost(
    config: PretrainConfig, device: torch.device, views: Tensor, known: GlobalRows, step_ms: float
) -> dict[str, float]:
    """What one save in the background adds to the steps around it."""
    step = _made(config, device)
    with tempfile.TemporaryDirectory(prefix="seco-bench-") as folder:
        state = RunState(Path(folder), config, step.model, step.optimizer, "", writes=True)
        count = itertools.count()

        def some(save: bool) -> float:
            began = time.perf_counter()
            for number in range(6):
                step.run(views, known, next(count), peak_lr(config))
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


def _end_to_end(
    found: StepBench, config: PretrainConfig, device: torch.device, repeats: int
) -> None:
    """Steps fed by the real loader, and by one batch of its crops again and again."""
    step, views = _made(config, device), ViewConfig()
    stream = open_stream(config.shards, config.batch_size, config.sampling or "uniform", 0)
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
    with loader:
        batches = iter(loader)

        def loaded() -> None:
            batch = next(batches)
            known = GlobalRows(batch.uniform, batch.order, batch.videos)
            step.run(device_views.crops(batch), known, next(count), peak_lr(config))

        batch = next(batches)
        crops = device_views.crops(batch).clone()
        known = GlobalRows(batch.uniform, batch.order, batch.videos)
        ways: dict[str, Callable[[], object]] = {
            "real loader": loaded,
            "one batch of crops": lambda: step.run(crops, known, next(count), peak_lr(config)),
        }
        for work in ways.values():
            for _ in range(_WARM_UP):
                work()
        medians = in_turns(ways, repeats, lambda work: wall_milliseconds(work, device))
        batches.close()
    found.milliseconds |= {f"end to end, {name}": value for name, value in medians.items()}
    found.ratios["end to end, of synthetic"] = (
        medians["one batch of crops"] / medians["real loader"]
    )
