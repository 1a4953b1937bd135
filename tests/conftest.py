"""Which tests run, and in what order.

Tests marked ``gpu`` are skipped where no CUDA device can be used, or fail where one must be.
"""

from __future__ import annotations

import os

import pytest

from shards.settings import usable_cpus

# Workers of pytest-xdist share the cores. Several threads in each of them wait for one another: on
# two busy cores the tests take twice as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")


# They take minutes each: begun last, one of them would keep one worker busy and the others waiting.
LONGEST = (
    "test_ranks.py",
    "test_extract.py",
    "test_finetune.py",
    "test_learning.py",
    "test_track_train.py",
    "test_sequential.py",
    "test_trainer.py",
    "test_demo.py",
    "test_faults.py",
    "test_rendered.py",
)


def pytest_xdist_auto_num_workers() -> int:
    """One more worker than cores: tests that wait for something leave theirs idle."""
    return min(8, usable_cpus() + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; under ``SECO_REQUIRE_GPU=1`` a missing device fails."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or os.environ.get("SECO_REQUIRE_GPU") == "1":
        return
    import torch  # takes seconds: only where it is needed

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
