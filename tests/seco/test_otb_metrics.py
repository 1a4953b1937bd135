"""OTB's figures beside the GOT-10k toolkit's own, on real ground truth."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seco.evaluation.otb import centre_errors, curves, mean_curves, overlaps
from tests.data import lacking, shared

SEQUENCES = ("Crossing", "Jumping", "MotorRolling", "Skiing")


def toolkit(results: Path, reports: Path, root: Path | None = None) -> Any:
    """The toolkit's evaluation of OTB-100 over the sequences there are."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from got10k.datasets import OTB
        from got10k.experiments import ExperimentOTB
    except ImportError:
        lacking("the got10k toolkit is not installed")
    experiment = ExperimentOTB.__new__(ExperimentOTB)
    with contextlib.redirect_stdout(io.StringIO()):
        experiment.dataset = OTB(str(root or shared("otb")), 2015, download=False)
    experiment.result_dir = str(results / "OTB2015")
    experiment.report_dir = str(reports / "OTB2015")
    experiment.nbins_iou, experiment.nbins_ce = 21, 51
    return experiment


def truth_of(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    text = (shared("otb") / name / "groundtruth_rect.txt").read_text().replace(",", " ")
    return np.loadtxt(io.StringIO(text))


def tracked(kind: str, truth: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    rng = np.random.default_rng(len(truth))
    boxes = truth.copy()
    if kind == "static":
        boxes[:] = truth[0]
    if kind == "random":
        boxes[1:, :2] += rng.normal(0, 15, (len(truth) - 1, 2))
        boxes[1:, 2:] *= rng.uniform(0.5, 1.6, (len(truth) - 1, 2))
    if kind == "lost":  # far away, and of no size
        boxes[1:] = [-500, 3000, 0, 0]
    return boxes


@pytest.mark.parametrize("kind", ["perfect", "static", "random", "lost"])
def test_figures_equal_the_toolkits(kind: str, tmp_path: Path) -> None:
    experiment = toolkit(tmp_path, tmp_path)
    found = []
    for name in SEQUENCES:
        truth = truth_of(name)
        boxes = tracked(kind, truth)
        ious, errors = experiment._calc_metrics(boxes, truth)
        np.testing.assert_allclose(overlaps(boxes, truth), ious, atol=1e-12)
        np.testing.assert_allclose(centre_errors(boxes, truth), errors, atol=1e-12)
        success, precision = experiment._calc_curves(ious, errors)
        found.append(curves(boxes, truth))
        np.testing.assert_allclose(found[-1].success, success, atol=1e-12)
        np.testing.assert_allclose(found[-1].precision, precision, atol=1e-12)
    mean = mean_curves(found)
    if kind == "perfect":
        assert mean.success_auc == pytest.approx(20 / 21)
        assert mean.precision_20 == mean.precision_auc == 1
    else:
        assert 0 < mean.success_auc < 0.9


def test_a_sequence_counts_once_however_long() -> None:
    truth = np.array([[10.0, 10, 20, 20]] * 100)
    away = truth + np.array([500, 0, 0, 0])
    one, other = curves(truth[:1], truth[:1]), curves(away, truth)
    assert mean_curves([one, other]).precision_20 == 0.5


def test_edges() -> None:
    boxes = np.array(
        [[1.0, 1, 10, 10], [6, 1, 10, 10], [11, 1, 10, 10], [3, 3, 0, 0], [1, 1, 1, 1]]
    )
    truth = np.array([[1.0, 1, 10, 10], [1, 1, 10, 10], [1, 1, 10, 10], [3, 3, 0, 0], [1, 1, 1, 1]])
    # Half beside each other: 50 of 150 px; side by side: none; two empty boxes: none.
    assert overlaps(boxes, truth).tolist() == pytest.approx([1, 1 / 3, 0, 0, 1])
    assert centre_errors(boxes, truth).tolist() == [0, 5, 10, 0, 0]
    # 1/3 is above 0.30 and not above 0.35; a distance of 5 px is within 5.
    second = curves(boxes[1:2], truth[1:2])
    assert second.success.tolist() == [1.0] * 7 + [0.0] * 14
    assert second.precision.tolist() == [0.0] * 5 + [1.0] * 46
    with pytest.raises(ValueError, match="0 boxes for 0 frames"):
        curves(boxes[:0], truth[:0])
    with pytest.raises(ValueError, match="1 boxes for 5 frames"):
        curves(boxes[:1], truth)
