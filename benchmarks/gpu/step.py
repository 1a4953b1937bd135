"""Training steps of the paper's size: ResNet-50, 224 px, 512 videos, queue 131,072. CPU: tiny.

``eager``: as it was and per group, with the kernels that take longest. ``compile``: seconds, graph
breaks, and the same loss. ``compiled``: speed, cudnn.benchmark on and off, fed by the loader.
``bare`` and ``plain``: what a step is compared with, each in a process of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.data import large_set
from benchmarks.gpu.joined_step import joined_step
from benchmarks.gpu.table import Table, arguments
from benchmarks.step_fed import ONE_BATCH, REAL, feeding, open_for_steps
from benchmarks.step_ways import (
    Build,
    StepWays,
    Work,
    milliseconds_per_step,
    peak_memory,
    time_alone,
)
from seco.config import PretrainConfig, peak_lr, resolve_pretrain
from seco.training.step import TrainingStep

_TOP_KERNELS = 12
_WARM_UP = 3
_MOST_APART = 0.05  # losses of a bf16 step, eager and compiled, of about 10
_MS = "step_ms.json"  # what the parts before have measured
# Kinds of kernels, the first that fits.
_KINDS = {
    "changes of layout": r"nchwtonhwc|nhwctonchw|transpose",
    "copies and fills": r"memcpy|memset|copy|fill",
    "BatchNorm": r"batch_?norm|bn_",
    "convolutions and products": r"conv|gemm|cutlass|wgrad|dgrad|xmma|sm\d\d_|nvjet",
    "compiled pointwise": r"triton",
    "optimizer and averages": r"multi_tensor|foreach",
    "other pointwise": r"elementwise|vectorized|reduce|relu|add|mul",
}


def settings(device: torch.device, **changes: Any) -> PretrainConfig:
    """The paper's, or tiny ones."""
    sizes: dict[str, Any] = {"batch_size": 512, "bn_group": 128}
    if device.type == "cpu":
        sizes = {"arch": "resnet18", "crop_size": 32, "batch_size": 4, "bn_group": 2}
        sizes |= {"queue_size": 64}
    return resolve_pretrain(PretrainConfig(**{**sizes, **changes}, device=str(device)))


def figures(ways: StepWays, ms: list[float], peak: float | None) -> str:
    """A step's, for people: the median and, of several measurements, how far they go apart."""
    apart = f" ({min(ms):.4g} to {max(ms):.4g})" if len(ms) > 1 else ""
    rate = 1e3 * ways.config.batch_size / median(ms)
    found = f"{median(ms):.4g} ms{apart}, {rate:,.0f} triplets/s"
    return found if peak is None else f"{found}, peak {peak:.3g} GiB"


def repeats(device: torch.device) -> int:
    """Measurements of five steps each on a GPU, of one step on the CPU."""
    return 4 if device.type == "cuda" else 1


def keep(work: Path, **ms: float) -> dict[str, float]:
    """Note down what later parts compare with; returns all that is known."""
    file = work / _MS
    known: dict[str, float] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(known | ms), "utf-8")
    return known | ms


def eager(work: Path, device: torch.device, table: Table) -> None:
    """The step as it was, and per group."""
    ways = StepWays(settings(device, compile=False), device)
    forms: dict[str, tuple[Build, str, str]] = {
        "as it was, eager": (
            lambda: crops_of(ways, without_benchmark(joined_step(ways))),
            "850 to 1,100 triplets/s, 30 to 40 GiB",
            "two thirds of the convolutions run in NCHW and every BatchNorm copies; 512 images x "
            "50 MB of saved bf16 activations",
        ),
        "per group, eager, channels_last": (
            ways.from_crops,
            "1,500 to 2,000 triplets/s, 8 to 12 GiB",
            "490 GB of unfused traffic at 3.0 TB/s (163 ms) and 25 TFLOP of convolutions at half "
            "of the card's rate (60 ms); 128 images x 50 MB",
        ),
    }
    for name, (build, predicted, why) in forms.items():
        with peak_memory(device) as peak:
            step = build()
            ms = timed(step, device)
        table.row(name, figures(ways, ms, peak.get("gib")), predicted, why)
        kernels(step, device, table)
        del step


def without_benchmark(step: TrainingStep) -> TrainingStep:
    """cuDNN's own choice of algorithms, as it was; a step of today turns benchmark on."""
    torch.backends.cudnn.benchmark = False
    return step


def crops_of(ways: StepWays, step: TrainingStep) -> Work:
    """Steps on the crops."""
    count = itertools.count()
    return lambda: step.run(ways.crops, ways.known, next(count), peak_lr(ways.config))


def timed(work: Work, device: torch.device) -> list[float]:
    """Milliseconds per step once it is warm."""
    for _ in range(_WARM_UP if device.type == "cuda" else 1):
        work()
    return [milliseconds_per_step(work, device) for _ in range(repeats(device))]


def kernels(work: Work, device: torch.device, table: Table) -> None:
    """Note which kernels a step's time goes to."""
    on_gpu = device.type == "cuda"
    kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    try:
        with profile(activities=[kind]) as seen:
            work()
            if on_gpu:
                torch.cuda.synchronize(device)
    except RuntimeError as error:  # some virtual machines let nobody count
        table.note(f"no profile: {error}")
        return
    spent: dict[str, tuple[float, int]] = {}
    for event in seen.key_averages():
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if us > 0:
            spent[event.key] = (us / 1e3, event.count)
    total = sum(ms for ms, _ in spent.values())
    by_kind: dict[str, float] = defaultdict(float)
    for name, (ms, _) in spent.items():
        found = (kind for kind, words in _KINDS.items() if re.search(words, name.lower()))
        by_kind[next(found, "the rest")] += ms
    sorted_kinds = sorted(by_kind.items(), key=lambda item: -item[1])
    shares = "; ".join(f"{kind} {ms / total:.0%}" for kind, ms in sorted_kinds)
    table.note(f"kernels of a step, {total:.4g} ms in all: {shares}")
    for name, (ms, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:_TOP_KERNELS]:
        table.note(f"{ms:8.2f} ms {ms / total:5.1%} {count:5d} x {name[:100]}")


def first_step_seconds(work: Work, device: torch.device) -> float:
    """With all that is done once."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def compile_rows(seconds: float, table: Table) -> None:
    """How long compiling took, and into how many graphs."""
    from torch._dynamo.utils import counters

    table.row(
        "first step, with compiling",
        f"{seconds:.3g} s",
        "40 to 60 s",
        "three graphs of ResNet-50: keys' forward, queries' forward and backward, 15 s each",
    )
    found = f"{counters['stats']['unique_graphs']}, {counters['graph_break'].total()}"
    table.row("graphs, graph breaks", found, "4, 0", "the trial, keys, queries and views")


def compile_once(work: Path, device: torch.device, table: Table) -> None:
    """One group, eager and compiled: do they agree?"""
    group = settings(device).bn_group
    ways = StepWays(settings(device, batch_size=group, bn_group=group), device)
    losses = {}
    for compiled in (False, True):
        step = ways.step(dataclasses.replace(ways.config, compile=compiled))
        began = time.perf_counter()
        result = step.run(ways.crops, ways.known, 0, peak_lr(ways.config))
        losses[compiled] = float(result.loss)  # waits
        if compiled:
            compile_rows(time.perf_counter() - began, table)
    table.check("loss, compiled apart from eager", abs(losses[True] - losses[False]), _MOST_APART)


def compiled(work: Path, device: torch.device, table: Table) -> None:
    """The step as users run it, by itself and fed."""
    workers = 14 if device.type == "cuda" else None
    config = settings(device, compile=True, shards=(large_set(work, device),), workers=workers)
    ways = StepWays(config, device)
    with feeding(ways, open_for_steps(config)) as fed:
        with peak_memory(device) as peak:
            step = ways.step()
            train = crops_of(ways, step)
            compile_rows(first_step_seconds(train, device), table)
            ms = timed(train, device)
        table.row(
            "ours, from crops",
            figures(ways, ms, peak.get("gib")),
            "2,200 to 2,550 triplets/s, 8 to 12 GiB",
            "the traffic that fusing leaves (130 MB per image forward, 260 backward) at 3.0 TB/s, "
            "and the convolutions; floor 3,500 by MLPerf's ResNet-50 rates",
        )
        keep(work, ours=median(ms))
        medians = fed.measure(step, 2 if device.type == "cuda" else 1)
        table.row(
            f"fed by the loader, {workers or 'the default'} workers",
            figures(ways, [medians[REAL]], None),
            "2,100 to 2,550 triplets/s",
            "14 workers make 7,800 triplets/s (1.37 CPU ms each at 340x256, 1.3 times that for "
            "larger frames), and copies run beside the step",
        )
        ratio = medians[ONE_BATCH] / medians[REAL]
        table.row("end to end, of synthetic", f"{ratio:.3f}", "0.97 (wanted 0.95)")
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    table.row(
        f"by itself, cudnn.benchmark off (it was {'on' if before else 'off'})",
        figures(ways, timed(train, device), None),
        "0 to 10 % slower",
        "the heuristics of cuDNN 9 choose well for ResNets",
    )
    torch.backends.cudnn.benchmark = before


def bare(work: Path, device: torch.device, table: Table) -> None:
    """Torchvision's ResNet alone, in each layout."""
    ways = StepWays(settings(device, compile=True), device)
    predictions = {
        "bare cost, contiguous": "380 to 450 ms",
        "bare cost, channels_last": "240 to 300 ms",
        "bare cost, channels_last, compiled": "180 to 210 ms",
    }
    costs = {}
    for name, build in ways.bare_costs().items():
        costs[name], peak = time_alone(build, repeats(device), device)
        why = "the same traffic and operations as the step, 512 images at a time"
        table.row(name, figures(ways, [costs[name]], peak), predictions[name], why)
    fastest = min(costs.values())
    ours = keep(work, bare=fastest).get("ours")
    if ours:
        table.row("ours, of the fastest bare cost", f"{ours / fastest:.3f}", "1.05 to 1.15")


def plain(work: Path, device: torch.device, table: Table) -> None:
    """The step plainly written."""
    ways = StepWays(settings(device), device)
    ms, peak = time_alone(ways.plain, 2 if device.type == "cuda" else 1, device)
    table.row(
        "plain step",
        figures(ways, [ms], peak),
        "550 to 700 triplets/s, 55 to 65 GiB",
        "TF32 convolutions in NCHW at 1,200 images/s trained and 3,600 encoded; 512 images x "
        "100 MB of saved float32 activations, and five matrices of 1,536 x 131,073",
    )
    ours = keep(work, plain=ms).get("ours")
    if ours:
        table.row("ours, times the plain step", f"{ms / ours:.2f}", "3.3 to 4.3 (wanted 3)")


def main() -> int:
    """Measure what is asked for."""
    given = arguments(__doc__, "what")
    parts = {"eager": eager, "compile": compile_once, "compiled": compiled, "bare": bare}
    table = Table(given.device)
    for name in given.what.split(","):
        (parts | {"plain": plain})[name](given.work, given.device, table)
    return table.exit_code()


if __name__ == "__main__":
    sys.exit(main())
