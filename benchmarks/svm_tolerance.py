"""How far from the minimum LIBLINEAR's tolerance of 0.01 stops, and ``seco probe --tolerance``.

    OMP_NUM_THREADS=1 python -m benchmarks.svm_tolerance

The features are those that ``seco bench probe`` makes, of 2,048 dimensions. Prints a row of a
Markdown table per size. LIBLINEAR is scikit-learn's; ``itself`` is LIBLINEAR on the same rows in
another order.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import LinearSVC

from benchmarks.probe_reference import made_rows
from seco.evaluation.svm import fit_svm

SIZES = ((2000, 20), (3000, 10), (3000, 60), (4000, 40))  # training rows, classes
DIMENSION, TOLERANCE = 2048, 0.01


def objectives(
    weights: NDArray[Any], x: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(K,) at weights (K, D), C = 1."""
    sign = np.where(labels[:, None] == np.arange(len(weights)), 1.0, -1.0)
    hinge = np.maximum(0, 1 - sign * (x @ weights.T))
    values: NDArray[np.float64] = 0.5 * (weights**2).sum(1) + (hinge**2).sum(0)
    return values


def liblinear(x: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(K, D) of ``-s 2`` at the tolerance."""
    svm = LinearSVC(loss="squared_hinge", dual=False, fit_intercept=False, tol=TOLERANCE)
    weights: NDArray[np.float64] = svm.fit(x, labels).coef_
    return weights


def row(rows: int, classes: int) -> str:
    """The table's row for one size."""
    with tempfile.TemporaryDirectory() as folder:
        made = made_rows(Path(folder), rows, classes, DIMENSION, c=1.0)
        data = np.load(made.train_file)
    train, test, labels = data[made.train_rows], data[made.test_rows], made.train_labels
    x = train.astype(np.float64)
    order = np.random.default_rng(0).permutation(rows)
    exact = fit_svm(train, labels)
    weights = {
        "exact": exact.weights,
        "ours": fit_svm(train, labels, tolerance=TOLERANCE).weights,
        "LIBLINEAR": liblinear(x, labels),
        "itself": liblinear(x[order], labels[order]),
    }
    found = {name: (test.astype(np.float64) @ w.T).argmax(1) for name, w in weights.items()}
    cells = [f"{rows:,}", str(classes)]
    for name in ("ours", "LIBLINEAR"):
        above = 100 * (objectives(weights[name], x, labels) / exact.objective - 1)
        cells.append(f"{above.max():.1f} ({np.median(above):.1f})")
    for other in ("ours", "itself", "exact"):
        cells.append(f"{100 * np.mean(found['LIBLINEAR'] != found[other]):.1f}")
    for name in ("exact", "ours", "LIBLINEAR"):
        cells.append(f"{100 * np.mean(found[name] == made.test_labels):.1f}")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    for size in SIZES:
        print(row(*size), flush=True)
