"""What all benchmarks share: CPU time, turns, and what was measured on.

CPU time is of this process and all it has waited for, to the microsecond. What is compared runs in
one process and in turns, because machines are shared.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """User and system time of this process and of all children it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def cpu_milliseconds(work: Callable[[], object]) -> float:
    """What ``work`` costs."""
    began = cpu_seconds()
    work()
    return (cpu_seconds() - began) * 1e3


def in_turns(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    measure: Callable[[Callable[[], object]], float] = cpu_milliseconds,
    after_each: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """The median of each way's measurements; every repeat begins with another way.

    Args:
        ways: what is compared.
        repeats: measurements of each.
        measure: of one call.
        after_each: called after each repeat.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(measure(ways[name]))
        after_each()
    return {name: statistics.median(values) for name, values in found.items()}


def machine(*packages: str) -> dict[str, Any]:
    """Processor, Python and the versions of the packages that are installed."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cpus = len(os.sched_getaffinity(0))
    return {"cpu": model, "cpus": cpus, **versions, "python": platform.python_version()}
