"""What ``seco bench probe`` measures on and compares with: made features, and LIBLINEAR."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from benchmarks.measuring import cpu_seconds
from seco.features.matrix import FeatureMatrix
from shards.errors import InputError
from shards.settings import usable_cpus

_TEST_SHARE = 0.25
_TOLERANCE = 1e-4  # scikit-learn's default
_TRIED = 4  # classes on which primal and dual are compared
_MOST_ITERATIONS = 10_000
_RANK = 256  # of the made features' common directions
_SPREAD = 0.25  # of class centres beside that of a class's videos: 60 to 80 % are classified
_NOISE = 0.03
_BLOCK = 4096


@dataclass(frozen=True)
class ProbeRows:
    """Where training and test rows are; plain paths and numbers, to hand to processes."""

    train_file: str
    train_rows: NDArray[np.int64]
    train_labels: NDArray[np.int64]
    test_file: str
    test_rows: NDArray[np.int64]
    test_labels: NDArray[np.int64]
    c: float

    def train(self) -> FeatureMatrix:
        return FeatureMatrix(np.load(self.train_file, mmap_mode="r"), self.train_rows)

    def test(self) -> FeatureMatrix:
        return FeatureMatrix(np.load(self.test_file, mmap_mode="r"), self.test_rows)


def made_rows(folder: Path, rows: int, classes: int, dimension: int, c: float) -> ProbeRows:
    """Features like pooled ReLU outputs: not negative, correlated, far from the origin.

    Common directions of falling variance, class centres among them close enough to overlap, little
    noise of each feature's own, through a smooth ReLU.
    """
    rng = np.random.default_rng(0)
    test = max(classes, round(rows * _TEST_SHARE))
    labels = rng.permutation(np.arange(rows + test) % classes)
    rank = min(_RANK, dimension)
    size = np.arange(1, rank + 1, dtype=np.float32) ** -0.5
    size /= np.linalg.norm(size)
    mixing = rng.standard_normal((rank, dimension), dtype=np.float32)
    bias = 0.5 * rng.standard_normal(dimension, dtype=np.float32) - 0.5
    centres = _SPREAD * rng.standard_normal((classes, rank), dtype=np.float32)
    file = folder / "features.npy"
    array = open_memmap(file, mode="w+", dtype=np.float32, shape=(rows + test, dimension))
    for start in range(0, rows + test, _BLOCK):
        chosen = labels[start : start + _BLOCK]
        inner = centres[chosen] + rng.standard_normal((len(chosen), rank), dtype=np.float32)
        mixed = (size * inner) @ mixing + bias
        mixed += _NOISE * rng.standard_normal(mixed.shape, dtype=np.float32)
        array[start : start + _BLOCK] = np.logaddexp(0, 4 * mixed) / 8
    array.flush()
    del array
    every = np.arange(rows + test)
    return ProbeRows(
        str(file), every[:rows], labels[:rows], str(file), every[rows:], labels[rows:], c
    )


def _liblinear(x: NDArray[np.float64], labels: NDArray[Any], c: float, dual: bool) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(
        loss="squared_hinge", dual=dual, fit_intercept=False, C=c,
        tol=_TOLERANCE, max_iter=_MOST_ITERATIONS,
    ).fit(x, labels)  # fmt: skip


def _one_class(
    x: NDArray[np.float64], labels: NDArray[np.int64], label: int, c: float, dual: bool
) -> tuple[NDArray[np.float64], float]:
    """Weights (D,) of a class and the CPU seconds they took; ``x`` is shared by the processes."""
    began = time.process_time()
    weights = _liblinear(x, np.where(labels == label, 1, -1), c, dual).coef_[0]
    return weights, time.process_time() - began


def liblinear_by_class(data: ProbeRows, dual: bool) -> dict[str, Any]:
    from joblib import Parallel, delayed

    x = _in_memory(data)
    with Parallel(n_jobs=usable_cpus()) as parallel:
        parallel(delayed(abs)(1) for _ in range(usable_cpus()))  # processes are started once
        began = time.perf_counter()
        fitted = parallel(
            delayed(_one_class)(x, data.train_labels, int(label), data.c, dual)
            for label in np.unique(data.train_labels)
        )
        seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "cpu_seconds": sum(cost for _, cost in fitted),
        "weights": np.stack([weights for weights, _ in fitted]),
    }


def liblinear_in_one_call(data: ProbeRows, dual: bool) -> dict[str, Any]:
    x = _in_memory(data)
    began, used = time.perf_counter(), cpu_seconds()
    _liblinear(x, data.train_labels, data.c, dual)
    return {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - used}


def primal_and_dual(data: ProbeRows) -> dict[str, float]:
    x = _in_memory(data)
    every = np.unique(data.train_labels)
    some = every[np.linspace(0, len(every) - 1, min(_TRIED, len(every))).astype(int)]
    return {
        f"{name}_seconds_a_class": float(
            np.mean([_one_class(x, data.train_labels, int(k), data.c, dual)[1] for k in some])
        )
        for name, dual in (("primal", False), ("dual", True))
    }


def _in_memory(data: ProbeRows) -> NDArray[np.float64]:
    train = data.train()
    return train.block(0, len(train)).astype(np.float64)  # what LinearSVC would make of it


def require_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise InputError(
            "scikit-learn is not installed", "seco bench probe", "pip install scikit-learn, or "
            "give --only-ours"
        ) from error  # fmt: skip
