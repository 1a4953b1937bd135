"""How many processors this process may use."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """Fewer than the machine has, under a scheduler or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
