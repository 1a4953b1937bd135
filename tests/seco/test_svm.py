"""The SVM against LIBLINEAR, against the conditions of its minimum, and kNN against a loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.svm import LinearSVC

from seco import svm as svm_module
from seco.knn import knn_scores
from seco.svm import LIBLINEAR_EPS, fit_svm
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
}


@pytest.mark.parametrize("c", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", DATA)
def test_agrees_with_liblinear(name: str, c: float) -> None:
    x, labels = DATA[name]()
    half = len(x) // 2
    train, test, y = x[:half], x[half:], labels[:half]
    ours = fit_svm(train, y, c=c)
    assert ours.converged.all()
    theirs = LinearSVC(
        loss="squared_hinge", dual=False, fit_intercept=False, C=c, tol=1e-8, max_iter=100_000
    ).fit(train.astype(np.float64), y)
    coefficients = theirs.coef_
    if len(coefficients) == 1:  # of two classes LIBLINEAR keeps the second alone
        coefficients = np.concatenate([-coefficients, coefficients])
    reached, reference = objective(ours.weights, train, y, c), objective(coefficients, train, y, c)
    np.testing.assert_allclose(reached, reference, rtol=1e-3)
    np.testing.assert_allclose(reached, ours.objective, rtol=1e-9)
    assert (reached <= reference * (1 + 1e-9)).all()
    np.testing.assert_array_equal(ours.predict(test), theirs.predict(test.astype(np.float64)))


def test_liblinears_own_stopping_rule_is_kept() -> None:
    x, labels = DATA["unit"]()
    loose, tight = fit_svm(x, labels, eps=LIBLINEAR_EPS), fit_svm(x, labels)
    assert loose.newton_steps.sum() < tight.newton_steps.sum()
    np.testing.assert_allclose(loose.objective, tight.objective, rtol=1e-3)
    gradients = []
    for k, w in enumerate(loose.weights):
        sign = np.where(labels == k, 1.0, -1.0)
        hinge = np.maximum(0, 1 - sign * (x.astype(np.float64) @ w))
        start = np.linalg.norm(2 * (sign @ x))
        gradients.append(np.linalg.norm(w - 2 * (sign * hinge) @ x) / start)
    assert max(gradients) <= LIBLINEAR_EPS * min(np.bincount(labels)) / len(labels)


@pytest.mark.parametrize("name", ["relu", "separable"])
def test_every_way_to_solve_a_step_gives_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = DATA[name]()
    plain = fit_svm(x, labels)
    variants: dict[str, dict[str, int]] = {
        "conjugate gradients only": {"_CG_STEPS_EXPECTED": 0},
        "factorising only": {"_CG_STEPS_EXPECTED": 10**6},
        "blocks of rows": {"_RESIDENT_BYTES": 0, "_BLOCK_BYTES": 8 * x.shape[1] * 7},
        "groups of two classes": {"_GROUP_BYTES": 5 * 8 * len(x) * 2},
    }
    for settings in variants.values():
        with monkeypatch.context() as patch:
            for setting, value in settings.items():
                patch.setattr(svm_module, setting, value)
            other = fit_svm(x, labels)
        assert other.converged.all()
        np.testing.assert_allclose(other.objective, plain.objective, rtol=1e-8)
        np.testing.assert_allclose(other.weights, plain.weights, rtol=0, atol=1e-5)


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
    nothing = fit_svm(np.zeros((4, 3), np.float32), np.array([0, 1, 0, 1]))
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same() -> None:
    for make in DATA.values():
        x, labels = make()
        cpu, gpu = fit_svm(x, labels), fit_svm(x, labels, device="cuda")
        np.testing.assert_allclose(gpu.objective, cpu.objective, rtol=1e-8)


def test_knn_against_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = clusters(60, 5, 3, 2.0)
    train, test, y = x[:40], x[40:], labels[:40] * 10
    monkeypatch.setattr("seco.knn._BLOCK_BYTES", 4 * 40 * 3)  # three test rows a block
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
            expected[int(y[i])] += math.exp((cosine[i] - 1) / 0.1)
        np.testing.assert_allclose(given, list(expected.values()), rtol=1e-4)
    _, all_vote = knn_scores(train, y, test, neighbours=1000)
    assert (all_vote > 0).all()
