"""The SVM against LIBLINEAR, against the conditions of its minimum, and kNN against a loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.svm import LinearSVC

from seco.evaluation import svm as svm_liblinear
from seco.evaluation import svm as svm_module
from seco.evaluation import svm as svm_newton
from seco.evaluation import svm as svm_rounds
from seco.evaluation.knn import knn_scores
from seco.evaluation.svm import fit_svm
from seco.features import matrix as feature_rows
from seco.features import products as svm_rows
from seco.features.matrix import FeatureMatrix, Scaling, fit_scaling
from tests.seco.made_features import clusters


def objective(
    weights: NDArray[Any], x: NDArray[Any], labels: NDArray[Any], c: float
) -> NDArray[np.float64]:
    """0.5 ||w_k||² + C Σ max(0, 1 - y w_k·x)², class by class and row by row."""
    out = []
    for k, w in zip(np.unique(labels), weights, strict=True):
        total = 0.5 * float(w @ w)
        for row, label in zip(x.astype(np.float64), labels, strict=True):
            total += c * max(0.0, 1 - (1 if label == k else -1) * float(w @ row)) ** 2
        out.append(total)
    return np.array(out)


def relu_features(videos: int, dimension: int, classes: int) -> tuple[Any, Any]:
    """Like pooled ReLU features: not negative, far from the origin, of very unequal directions."""
    x, labels = clusters(videos, dimension, classes, spread=3.0)
    rng = np.random.default_rng(5)
    mixing = rng.standard_normal((dimension, dimension)) / np.arange(1, dimension + 1) ** 0.5
    return np.maximum(x @ mixing.T + 1, 0).astype(np.float32), labels


DATA = {
    "unit": lambda: (lambda x, labels: (x / np.linalg.norm(x, axis=1, keepdims=True), labels))(
        *clusters(400, 24, 5, 4.0)
    ),
    "relu": lambda: relu_features(400, 24, 5),
    "separable": lambda: clusters(120, 200, 4, 0.5),
    "wide": lambda: relu_features(60, 150, 3),
    "two classes": lambda: clusters(200, 10, 2, 2.0),
    "overlapping": lambda: clusters(600, 30, 6, 20.0),
    "tiny": lambda: clusters(6, 3, 3, 1.0),
    "one sample a class": lambda: one_sample_a_class(),
    "constant features": lambda: constant_features(),
}


def one_sample_a_class() -> tuple[Any, Any]:
    """Ten classes, each with one row in each half."""
    x, labels = clusters(20, 12, 10, 0.2)
    return x, labels


def constant_features() -> tuple[Any, Any]:
    """Columns that are the same for all rows, among others that are not."""
    x, labels = clusters(200, 6, 4, 2.0)
    return np.concatenate([x, np.full((200, 3), 2.5), np.zeros((200, 2))], axis=1), labels


@pytest.mark.parametrize("c", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", DATA)
def test_agrees_with_liblinear(name: str, c: float) -> None:
    x, labels = DATA[name]()
    half = len(x) // 2
    train, test, y = x[:half], x[half:], labels[:half]
    ours = fit_svm(train, y, c=c)
    assert ours.converged.all()
    coefficients = liblinear_coefficients(train, y, c, tolerance=1e-8)
    reached, reference = objective(ours.weights, train, y, c), objective(coefficients, train, y, c)
    np.testing.assert_allclose(reached, reference, rtol=1e-3)
    np.testing.assert_allclose(reached, ours.objective, rtol=1e-9)
    assert (reached <= reference * (1 + 2e-8)).all()
    # The proof is one: what it says is left lies below what another solver reached.
    assert (ours.objective * (1 - ours.gap) <= reference * (1 + 1e-9)).all()
    predicted = np.unique(y)[np.argmax(test.astype(np.float64) @ coefficients.T, axis=1)]
    np.testing.assert_array_equal(ours.predict(test), predicted)


@pytest.mark.parametrize("c", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", DATA)
def test_a_tolerance_gives_liblinears_weights(name: str, c: float) -> None:
    x, labels = DATA[name]()
    ours = fit_svm(x, labels, c=c, tolerance=0.01)
    theirs = liblinear_coefficients(x, labels, c, tolerance=0.01)
    assert ours.converged.all()
    assert (relative_gradients(ours.weights, x, labels, c) <= 0.01).all()
    difference = np.linalg.norm(ours.weights - theirs, axis=1)
    assert (difference <= 1e-6 * np.linalg.norm(theirs, axis=1)).all()
    np.testing.assert_allclose(objective(ours.weights, x, labels, c), ours.objective, rtol=1e-9)


def test_a_tolerance_on_unequal_directions_stops_far_above_the_minimum() -> None:
    x, labels = relu_features(900, 256, 6)
    train, test, y = x[:600], x[600:], labels[:600]
    stopped, exact = fit_svm(train, y, tolerance=0.01), fit_svm(train, y)
    theirs = liblinear_coefficients(train, y, 1.0, tolerance=0.01)
    reached = objective(theirs, train, y, 1.0)
    np.testing.assert_allclose(stopped.objective, reached, rtol=1e-4)
    assert (stopped.objective > 1.1 * exact.objective).all()
    assert (stopped.objective * (1 - stopped.gap.clip(max=1)) <= exact.objective).all()
    predicted = np.argmax(test.astype(np.float64) @ theirs.T, axis=1)
    np.testing.assert_array_equal(stopped.predict(test), predicted)
    assert (exact.predict(test) != predicted).any()
    assert exact.solution == "exact, proven to be within 1e-08 of the minimum"
    assert stopped.solution == "stopped at tolerance 0.01 as LIBLINEAR"


@pytest.mark.parametrize("way", ["blocks of seven rows", "groups of two classes"])
def test_a_tolerance_does_not_depend_on_how_rows_and_classes_are_read(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = DATA["relu"]()
    plain = fit_svm(x, labels, tolerance=0.01)
    patched(monkeypatch, way)
    other = fit_svm(x, labels, tolerance=0.01)
    np.testing.assert_allclose(other.weights, plain.weights, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(other.rounds, plain.rounds)


def test_a_tolerance_that_is_not_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = DATA["relu"]()
    done: list[int] = []
    within_rounding = fit_svm(x, labels, tolerance=1e-30, advance=done.append)
    assert not within_rounding.converged.any()  # and it ends
    assert sum(done) == 5
    assert (
        within_rounding.solution == "stopped at tolerance 1e-30 as LIBLINEAR, except 5 of 5 classes"
    )
    monkeypatch.setattr(svm_liblinear, "MAX_STEPS", 1)
    assert not fit_svm(x, labels, tolerance=0.01).converged.any()


def liblinear_coefficients(
    x: NDArray[Any], labels: NDArray[Any], c: float, tolerance: float
) -> NDArray[np.float64]:
    """(K, D) of LIBLINEAR's ``-s 2``, as scikit-learn has it."""
    fitted = LinearSVC(
        loss="squared_hinge", dual=False, fit_intercept=False, C=c, tol=tolerance, max_iter=100_000
    ).fit(x.astype(np.float64), labels)
    weights: NDArray[np.float64] = fitted.coef_
    # Of two classes LIBLINEAR keeps the second alone.
    return np.concatenate([-weights, weights]) if len(weights) == 1 else weights


def relative_gradients(
    weights: NDArray[Any], x: NDArray[Any], labels: NDArray[Any], c: float
) -> NDArray[np.float64]:
    """What LIBLINEAR's rule compares with its tolerance, of each class (K,)."""
    x, out = x.astype(np.float64), []
    for k, w in zip(np.unique(labels), weights, strict=True):
        y = np.where(labels == k, 1.0, -1.0)
        gradient = w - 2 * c * (np.maximum(0, 1 - y * (x @ w)) * y) @ x
        at_zero = np.linalg.norm(2 * c * y @ x)
        fewer = min((y > 0).sum(), (y < 0).sum())
        out.append(np.linalg.norm(gradient) / (fewer / len(y) * at_zero))
    return np.array(out)


# Each leaves one way to solve, or one way to read.
WAYS: dict[str, dict[Any, dict[str, Any]]] = {
    "newton, factorised": {svm_rounds: {"_MOST_ROWS": 0, "_LEAST_GROWTH": 1}},
    "newton, conjugate gradients": {
        svm_rounds: {"_MOST_ROWS": 0, "_LEAST_GROWTH": 1},
        svm_newton: {"_SMALL_DIMENSION": 0, "_FEW": 0.0},
    },
    "newton, conjugate gradients in float64": {
        svm_rounds: {"_MOST_ROWS": 0, "_LEAST_GROWTH": 1},
        svm_newton: {"_SMALL_DIMENSION": 0, "_FEW": 0.0, "_EXACT_AFTER": 0},
    },
    "newton, a class's rows gathered": {
        svm_rounds: {"_MOST_ROWS": 0, "_LEAST_GROWTH": 1},
        svm_newton: {"_SMALL_DIMENSION": 0, "_FEW": 1.1},
    },
    "small working sets": {svm_rounds: {"_FIRST_ROWS": 8, "_LEAST_GROWTH": 4}},
    "blocks of seven rows": {
        svm_rows: {"_RESIDENT_BYTES": 0},
        feature_rows: {"BLOCK_BYTES": 4 * 24 * 7},
    },
    "groups of two classes": {svm_module: {"_GROUP": 2}},
}


def patched(patch: pytest.MonkeyPatch, way: str) -> None:
    for module, values in WAYS[way].items():
        for name, value in values.items():
            patch.setattr(module, name, value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["relu", "separable", "overlapping"])
def test_every_way_to_solve_gives_the_same(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = DATA[name]()
    plain = fit_svm(x, labels, gap=1e-10)
    with monkeypatch.context() as patch:
        patched(patch, way)
        other = fit_svm(x, labels, gap=1e-10)
    assert plain.converged.all() and other.converged.all()
    np.testing.assert_allclose(other.objective, plain.objective, rtol=1e-8)
    np.testing.assert_allclose(other.weights, plain.weights, rtol=0, atol=2e-5)


def test_conjugate_gradients_and_working_sets_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the ways above are different ones."""
    used: list[str] = []
    for cls, name in ((svm_newton.Newton, "minimise"), (svm_rounds.WorkingSet, "solve")):
        real = getattr(cls, name)

        def noted(*args: Any, real: Any = real, name: str = name) -> Any:
            used.append(name)
            return real(*args)

        monkeypatch.setattr(cls, name, noted)
    x, labels = DATA["overlapping"]()
    fit_svm(x, labels)
    assert set(used) == {"minimise", "solve"}
    used.clear()
    fit_svm(*DATA["separable"]())
    assert set(used) == {"solve"}


def test_what_is_not_finished_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = DATA["separable"]()
    whole = fit_svm(x, labels)
    patched(monkeypatch, "small working sets")
    cut = fit_svm(x, labels, max_rounds=1)
    assert not cut.converged.all()
    np.testing.assert_array_equal(cut.converged, cut.gap <= 1e-8)
    assert (cut.objective > whole.objective)[~cut.converged].all()
    assert (cut.objective * (1 - cut.gap) <= whole.objective * (1 + 1e-12)).all()


def test_no_memory_for_all_rows_at_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of features is read in blocks, whatever is done with it."""
    x, labels = relu_features(3000, 40, 4)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(svm_rows, "_RESIDENT_BYTES", 0)
    monkeypatch.setattr(feature_rows, "BLOCK_BYTES", 4 * 40 * 100)
    most = 0
    apply = Scaling.apply

    def noted(self: Scaling, rows: Any) -> Any:
        nonlocal most
        most = max(most, len(rows))
        return apply(self, rows)

    monkeypatch.setattr(Scaling, "apply", noted)
    rows = FeatureMatrix(np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(0, 3000, 2))
    fit_svm(rows.scaled(fit_scaling(rows, "standard")), labels[::2])
    assert 100 <= most < 1000  # blocks, and rows of a working set


def test_labels_are_any_numbers_and_read_only_arrays_do() -> None:
    x, labels = clusters(90, 8, 3, 0.5)
    x.flags.writeable = False
    names = np.array([700, 3, 41])
    done: list[int] = []
    svm = fit_svm(x, names[labels], advance=done.append)
    assert svm.classes.tolist() == [3, 41, 700]
    assert sum(done) == 3
    assert (svm.predict(x) == names[labels]).all()


def test_one_class_and_features_of_zeros() -> None:
    x = np.ones((4, 3), np.float32)
    assert fit_svm(x, np.full(4, 9)).predict(x).tolist() == [9] * 4
    assert fit_svm(x, np.full(4, 9), tolerance=0.01).predict(x).tolist() == [9] * 4
    for tolerance in (None, 0.01):
        labels = np.array([0, 1, 0, 1])
        nothing = fit_svm(np.zeros((4, 3), np.float32), labels, tolerance=tolerance)
        assert nothing.converged.all()
        assert not nothing.weights.any()


def test_features_that_swamp_the_regulariser_still_separate() -> None:
    """As a network gives after a few steps: 10⁸ and more, all nearly one direction."""
    x, labels = clusters(12, 40, 3, 2.0)
    direction = np.abs(np.random.default_rng(0).standard_normal(40)).astype(np.float32)
    swamped = (1e8 * direction + 1e3 * x).astype(np.float32)
    fitted = fit_svm(swamped, labels)
    assert np.isfinite(fitted.weights).all()
    assert (fitted.objective >= 0).all()


def test_what_cannot_be_fitted() -> None:
    x = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match="do not match"):
        fit_svm(x, np.zeros(3))
    with pytest.raises(ValueError, match="do not match"):
        fit_svm(x[:0], np.zeros(0))
    with pytest.raises(ValueError, match="above 0"):
        fit_svm(x, np.zeros(4), c=0.0)
    with pytest.raises(ValueError, match="tolerance 0"):
        fit_svm(x, np.zeros(4), tolerance=0.0)
    with pytest.raises(ValueError, match="do not match"):
        fit_svm(FeatureMatrix(x, np.arange(2)), np.zeros(4))
    with pytest.raises(ValueError, match="not \\(N, D\\)"):
        fit_svm(x[0], np.zeros(3))
    for bad in (np.nan, np.inf):
        for row in (0, 3):
            spoilt = x.copy()
            spoilt[row, 1] = bad
            with pytest.raises(ValueError, match="not finite"):
                fit_svm(spoilt, np.array([0, 1, 0, 1]))


def test_products_keep_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 or bfloat16 products, allowed by whoever calls, would cost the last digits."""
    seen: list[str] = []
    gram = svm_rows.Products.scores

    def noted(self: Any, weights: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return gram(self, weights)

    monkeypatch.setattr(svm_rows.Products, "scores", noted)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        fit_svm(*DATA["two classes"]())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    for make in DATA.values():
        x, labels = make()
        cpu, gpu = fit_svm(x, labels), fit_svm(x, labels, device="cuda")
        np.testing.assert_allclose(gpu.objective, cpu.objective, rtol=3e-8)  # each within 1e-8


def test_knn_against_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = clusters(60, 5, 3, 2.0)
    train, test, y = x[:40], x[40:], labels[:40] * 10
    monkeypatch.setattr("seco.evaluation.knn._BLOCK_BYTES", 4 * 18 * 3)  # three test rows a block
    monkeypatch.setattr("seco.features.matrix.BLOCK_BYTES", 4 * 5 * 11)  # eleven training rows
    classes, votes = knn_scores(train, y, test, neighbours=7, temperature=0.1)
    assert classes.tolist() == [0, 10, 20]
    for row, given in zip(test, votes, strict=True):
        cosine = [
            float(row @ other) / float(np.linalg.norm(row) * np.linalg.norm(other))
            for other in train
        ]
        nearest = sorted(range(40), key=lambda i: -cosine[i])[:7]
        expected = dict.fromkeys((0, 10, 20), 0.0)
        for i in nearest:
            expected[int(y[i])] += math.exp((cosine[i] - cosine[nearest[0]]) / 0.1)
        np.testing.assert_allclose(given, list(expected.values()), rtol=1e-4)
    _, all_vote = knn_scores(train, y, test, neighbours=1000)
    assert (all_vote > 0).all()
    _, cold = knn_scores(train, y, test, neighbours=7, temperature=1e-9)
    _, nearest_alone = knn_scores(train, y, test, neighbours=1)
    assert cold.argmax(1).tolist() == nearest_alone.argmax(1).tolist()
