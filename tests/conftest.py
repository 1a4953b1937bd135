"""Tests marked ``gpu`` are skipped where no CUDA device can be used, or fail where one must be."""

from __future__ import annotations

import os

import pytest

# Workers of pytest-xdist share the cores. Several threads in each of them wait for one another: on
# two busy cores the tests take twice as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip them; under ``SECO_REQUIRE_GPU=1`` they run, and fail without a device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or os.environ.get("SECO_REQUIRE_GPU") == "1":
        return
    import torch  # takes seconds: only where it is needed

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
