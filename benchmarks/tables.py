"""The figures of the benches for people: Markdown, to keep."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.extract import ExtractBench
from benchmarks.loader import LoaderBench
from benchmarks.probe import ProbeBench
from benchmarks.step import StepBench
from benchmarks.track import TrackBench
from benchmarks.views import ViewsBench

_MOST_DIGITS = 4


def as_json(
    bench: LoaderBench | ViewsBench | StepBench | ExtractBench | ProbeBench | TrackBench,
) -> str:
    """One object."""
    return json.dumps(dataclasses.asdict(bench), indent=1)


def loader_table(bench: LoaderBench) -> str:
    """Costs and ratios."""
    return "\n".join(_loader_lines(bench))


def _loader_lines(bench: LoaderBench) -> Iterator[str]:
    yield _machine(bench.machine)
    yield f"Medians of {bench.repeats} repeats taken in turns, CPU ms of all processes a triplet"
    yield ""
    yield from _table("way", "ms", bench.costs)
    yield ""
    yield from _table("ours", "ratio", bench.ratios)
    yield ""
    yield f"Limit: decode by {bench.kernels['decode']}; resize by {bench.kernels['resize']}"
    yield from _pairs("Frames", bench.frames)
    yield from _pairs("Loader processes", bench.scaling)
    yield from _pairs("Opening shards", bench.start)
    yield from _pairs("Order", bench.order)


def views_table(bench: ViewsBench) -> str:
    """Kernels and device part."""
    return "\n".join(_views_lines(bench))


def _views_lines(bench: ViewsBench) -> Iterator[str]:
    yield _machine(bench.machine)
    yield f"Medians of {bench.repeats} repeats taken in turns"
    for title, values in (
        ("decode a frame", bench.decode),
        ("crop and resize a view", bench.resize),
        ("a view of a decoded frame", bench.plain),
    ):
        yield ""
        yield from _table(title, "CPU us", values)
    yield ""
    yield from _pairs("Device part", bench.device)


def step_table(bench: StepBench) -> str:
    """Times and ratios."""
    return "\n".join(_step_lines(bench))


def _step_lines(bench: StepBench) -> Iterator[str]:
    yield _machine(bench.machine)
    yield _machine(bench.settings)
    yield ""
    yield from _table("step", "ms", bench.milliseconds)
    yield ""
    yield from _table("", "ratio", bench.ratios)
    yield ""
    yield from _pairs("Triplets per second", bench.triplets_s)
    yield from _pairs("Peak GiB of GPU memory", bench.peak_gib)
    yield from _pairs("Inter loss and gradient", bench.loss_memory)
    yield from _pairs("Checkpoint", bench.checkpoint)


def extract_table(bench: ExtractBench) -> str:
    """Rates and ratios."""
    return "\n".join(_extract_lines(bench))


def _extract_lines(bench: ExtractBench) -> Iterator[str]:
    yield _machine(bench.machine)
    yield _machine(bench.settings)
    yield f"Medians of {bench.repeats} repeats taken in turns"
    yield ""
    yield from _table("features", "videos/s", bench.videos_s)
    yield ""
    yield from _table("ours", "ratio", bench.ratios)
    yield ""
    yield from _table("a frame", "CPU ms", bench.cpu_ms)
    yield ""
    yield from _table("read, decode and crop a frame", "CPU ms", bench.decode_cpu_ms)


def probe_table(bench: ProbeBench) -> str:
    """Times, ratios, memory and agreement."""
    return "\n".join(_probe_lines(bench))


def _probe_lines(bench: ProbeBench) -> Iterator[str]:
    yield _machine(bench.machine)
    yield f"Medians of {bench.repeats} repeats taken in turns; {_machine(bench.size)}"
    yield ""
    yield from _table("wall clock", "s", bench.seconds)
    yield ""
    yield from _table("CPU time of all processes", "s", bench.cpu_seconds)
    yield ""
    yield from _table("ours", "ratio", bench.ratios)
    yield ""
    yield from _pairs("Ours", bench.solver)
    yield from _pairs("LIBLINEAR", bench.liblinear)
    yield from _pairs("Agreement", bench.agreement)


def track_table(bench: TrackBench) -> str:
    """Times and ratios of tracking a frame and of a training step."""
    return "\n".join(_track_lines(bench))


def _track_lines(bench: TrackBench) -> Iterator[str]:
    yield _machine(bench.machine)
    yield _machine(bench.settings)
    for title, times, ratios in (
        ("a frame tracked", bench.tracking, bench.tracking_ratios),
        ("a training step", bench.training, bench.training_ratios),
    ):
        yield ""
        yield from _table(title, "ms", times)
        yield ""
        yield from _table("", "ratio", ratios)
    yield ""
    yield from _pairs("Frames a second", bench.fps)
    yield from _pairs("Pairs a second", bench.pairs_s)


def _table(name: str, unit: str, values: Mapping[str, float]) -> Iterator[str]:
    yield f"| {name} | {unit} |"
    yield "|---|---|"
    for key, value in values.items():
        yield f"| {key} | {value:.{_MOST_DIGITS - 1}g} |"


def _pairs(title: str, values: Mapping[str, float]) -> Iterator[str]:
    if values:
        shown = "; ".join(
            f"{name.replace('_', ' ')} {_number(value)}" for name, value in values.items()
        )
        yield f"{title}: {shown}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.{_MOST_DIGITS}g}"


def _machine(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())
