"""``seco bench probe``: the SVM of all classes beside LIBLINEAR and beside its matrix products.

Ours is solved in a process of its own, so that its peak memory is that of the command. LIBLINEAR
(scikit-learn's LinearSVC) is run as its users spread it, a class at a time over all cores, and
once for all classes in one call, which converts the features once instead of once a class.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measuring import cpu_seconds, in_turns, machine
from benchmarks.probe_reference import (
    ProbeRows,
    liblinear_by_class,
    liblinear_in_one_call,
    made_rows,
    primal_and_dual,
    require_scikit_learn,
)
from seco.evaluation.splits import read_train_test
from seco.evaluation.svm import MAX_ROUNDS, LinearSVM, fit_svm
from seco.features.matrix import FeatureMatrix
from seco.processes.device import resolve_device
from shards.errors import InputError
from shards.progress import progress


@dataclass
class ProbeBench:
    """All figures of a run; medians, seconds."""

    machine: dict[str, Any]
    repeats: int
    size: dict[str, float]
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    ratios: dict[str, float]
    solver: dict[str, float]  # ours: passes, flops, peak memory
    liblinear: dict[str, float]  # primal and dual, CPU seconds a class
    agreement: dict[str, float]


def bench_probe(
    features: str | None = None,
    *,
    rows: int = 9537,
    classes: int = 101,
    dimension: int = 2048,
    repeats: int = 3,
    c: float = 1.0,
    device: str = "auto",
    rivals: bool = True,
    most_rounds: int = MAX_ROUNDS,
) -> ProbeBench:
    """Measure on a feature folder, or on made features of the given size.

    Args:
        rivals: also run LIBLINEAR, which takes scikit-learn.
        most_rounds: stop ours unfinished after so many working sets and so many Newton steps.

    Raises:
        InputError: numbers that cannot be, or no scikit-learn.
    """
    if min(rows, classes, dimension, repeats, most_rounds) < 1 or not c > 0:
        raise InputError(
            "must be above 0", "--rows, --classes, --dimension, --repeats, --most-rounds, -C"
        )
    if classes < 2 or rows < 2 * classes:
        raise InputError("two classes and two rows a class are the least", "--rows, --classes")
    if rivals:
        require_scikit_learn()
    with tempfile.TemporaryDirectory(prefix="seco-bench-") as folder:
        if features is None:
            data = made_rows(Path(folder), rows, classes, dimension, c)
        else:
            chosen = read_train_test(features)
            files = [str(part.folder / "features.npy") for part in (chosen.train, chosen.test)]
            data = ProbeRows(
                files[0], chosen.train_rows, chosen.train_labels,
                files[1], chosen.test_rows, chosen.test_labels, c,
            )  # fmt: skip
        return _measure(data, repeats, device, rivals, most_rounds)


def _measure(
    data: ProbeRows, repeats: int, device: str, rivals: bool, most_rounds: int
) -> ProbeBench:
    train = data.train()
    found: dict[str, Any] = {}
    cpu: dict[str, list[float]] = {}

    def ours() -> None:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as one:
            found["ours"] = one.submit(_solve, data, device, most_rounds).result()

    ways: dict[str, Callable[[], object]] = {"ours": ours}
    tried: dict[str, float] = {}
    kind = ""
    if rivals:
        tried = primal_and_dual(data)
        kind = min(("primal", "dual"), key=lambda name: tried[f"{name}_seconds_a_class"])
        spread, whole = (f"LIBLINEAR ({kind}), {how}" for how in ("a class each", "in one call"))

        def by_class() -> None:
            found[spread] = liblinear_by_class(data, kind == "dual")

        def in_one_call() -> None:
            found[whole] = liblinear_in_one_call(data, kind == "dual")

        ways |= {spread: by_class, whole: in_one_call}

    def seconds(way: Callable[[], object]) -> float:
        """Of the solving, without the start of processes: each way measures itself."""
        way()
        name = next(n for n, w in ways.items() if w is way)
        cpu.setdefault(name, []).append(found[name]["cpu_seconds"])
        return float(found[name]["seconds"])

    with progress("bench probe", repeats, "repeats") as bar:
        medians = in_turns(ways, repeats, seconds, after_each=bar.advance)
    costs = {name: float(np.median(values)) for name, values in cpu.items()}
    svm: LinearSVM = found["ours"]["svm"]
    limit = _limit(train, svm, device)
    ratios = {"of the limit, CPU seconds": limit / costs["ours"]}
    agreement = {
        "classes_not_converged": float((~svm.converged).sum()),
        "gap": float(svm.gap.max()),
    }
    test = np.concatenate([svm.predict(block) for _, block in data.test().blocks()])
    agreement["test_top1"] = float((test == data.test_labels).mean())
    if rivals:
        for name in (spread, whole):
            ratios[f"times {name}"] = medians[name] / medians["ours"]
            ratios[f"times {name}, CPU seconds"] = costs[name] / costs["ours"]
        agreement |= _agreement(data, svm, test, found[spread]["weights"])
    solver = {
        "passes": svm.passes,
        "seconds_a_pass": svm.pass_seconds / svm.passes,
        "rounds_of_a_class": float(svm.rounds.mean()),
        "gflop_float32": svm.flops["float32"] / 1e9,
        "gflop_float64": svm.flops["float64"] / 1e9,
        "peak_megabytes": found["ours"]["peak_megabytes"],
        "peak_megabytes_before": found["ours"]["peak_megabytes_before"],
        "features_megabytes": train.bytes / 2**20,
    }
    return ProbeBench(
        machine=machine("torch", "numpy", "scikit-learn"),
        repeats=repeats,
        size={
            "rows": len(train), "test_rows": len(data.test_rows), "dimension": train.dimension,
            "classes": len(svm.classes),
        },
        seconds=medians,
        cpu_seconds={**costs, "limit: the products with the features": limit},
        ratios=ratios,
        solver=solver,
        liblinear=tried,
        agreement=agreement,
    )  # fmt: skip


def _solve(data: ProbeRows, device: str, most_rounds: int) -> dict[str, Any]:
    """Ours, in a process of its own."""
    chosen = resolve_device(device, spare_cores=0)
    train = data.train()
    torch.ones(64, 64) @ torch.ones(64, 64)  # threads are started once
    before, began, used = _peak_megabytes(), time.perf_counter(), cpu_seconds()
    svm = fit_svm(train, data.train_labels, c=data.c, device=chosen, max_rounds=most_rounds)
    return {
        "svm": svm,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": cpu_seconds() - used,
        "peak_megabytes": _peak_megabytes(),
        "peak_megabytes_before": before,
    }


def _peak_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def _limit(train: FeatureMatrix, svm: LinearSVM, device: str) -> float:
    """CPU seconds (on a GPU: seconds) that plain products of as many operations take."""
    place = resolve_device(device, spare_cores=0)
    rows = min(len(train), train.rows_a_block)
    seconds = 0.0
    for name, flops in svm.flops.items():
        dtype = getattr(torch, name)
        x = torch.from_numpy(train.block(0, rows)).to(place, dtype)
        w = torch.ones(min(64, len(svm.classes)), train.dimension, dtype=dtype, device=place)
        once = 2.0 * len(w) * x.numel()

        def products(w: torch.Tensor = w, x: torch.Tensor = x) -> float:
            if w.is_cuda:
                torch.cuda.synchronize()
            clock = time.perf_counter if w.is_cuda else cpu_seconds
            began = clock()
            result = w @ x.T
            if result.is_cuda:
                torch.cuda.synchronize()
            return clock() - began

        # The fastest of several: what the machine can do.
        seconds += flops / once * min(products() for _ in range(20))
    return seconds


def _agreement(
    data: ProbeRows, svm: LinearSVM, predicted: NDArray[np.int64], theirs: NDArray[np.float64]
) -> dict[str, float]:
    """Largest relative difference of a class's objective, and test predictions that are equal."""
    values = []
    for weights in (svm.weights, theirs):
        loss = np.zeros(len(weights))
        for place, block in data.train().blocks():
            sign = np.where(data.train_labels[place][:, None] == svm.classes, 1.0, -1.0)
            margin = 1 - sign * (block.astype(np.float64) @ weights.T)
            loss += (margin.clip(min=0) ** 2).sum(axis=0)
        values.append(0.5 * (weights**2).sum(axis=1) + data.c * loss)
    ours, reference = values
    best = np.concatenate(
        [(b.astype(np.float64) @ theirs.T).argmax(axis=1) for _, b in data.test().blocks()]
    )
    return {
        "objective_difference": float(np.abs(ours / reference - 1).max()),
        "objective_above_theirs": float((ours / reference - 1).max()),
        "equal_predictions": float((svm.classes[best] == predicted).mean()),
    }
