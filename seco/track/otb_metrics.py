"""OTB's one-pass evaluation: overlap, centre error, success and precision (Wu et al., PAMI 2015).

The conventions are those of the GOT-10k toolkit, which the numbers equal. Boxes are (x, y, w, h) in
px and cover x … x + w; the overlap of two empty boxes is 0. Success counts overlaps *above* a
threshold, so that even a perfect tracker has none at 1 and scores 20/21; precision counts centre
errors *up to* one. Curves are averaged over sequences, however long these are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SUCCESS_THRESHOLDS: Floats = np.linspace(0, 1, 21)  # of the overlap
PRECISION_THRESHOLDS: Floats = np.arange(51.0)  # px
_PRECISION_AT_PX = 20
_EPS = np.finfo(float).eps  # the toolkit's, in the union


@dataclass(frozen=True)
class Curves:
    """Success and precision of a sequence, or means over sequences; shares of frames."""

    success: Floats  # (21,) at SUCCESS_THRESHOLDS
    precision: Floats  # (51,) at PRECISION_THRESHOLDS

    @property
    def success_auc(self) -> float:
        """The mean of the success curve."""
        return float(self.success.mean())

    @property
    def precision_auc(self) -> float:
        """The mean of the precision curve: the paper's "AUC of precision"."""
        return float(self.precision.mean())

    @property
    def precision_20(self) -> float:
        """Share of frames whose centre is within 20 px, OTB's usual figure."""
        return float(self.precision[_PRECISION_AT_PX])


def overlaps(boxes: Floats, truth: Floats) -> Floats:
    """(F, 4) and (F, 4) to (F,) intersections over unions, 0 … 1."""
    start = np.maximum(boxes[:, :2], truth[:, :2])
    end = np.minimum(boxes[:, :2] + boxes[:, 2:], truth[:, :2] + truth[:, 2:])
    common = np.maximum(end - start, 0).prod(axis=1)
    union = boxes[:, 2:].prod(axis=1) + truth[:, 2:].prod(axis=1) - common
    shares: Floats = np.clip(common / (union + _EPS), 0.0, 1.0)
    return shares


def centre_errors(boxes: Floats, truth: Floats) -> Floats:
    """(F, 4) and (F, 4) to (F,) distances of the centres, px."""
    apart = boxes[:, :2] + (boxes[:, 2:] - 1) / 2 - truth[:, :2] - (truth[:, 2:] - 1) / 2
    errors: Floats = np.sqrt((apart**2).sum(axis=1))
    return errors


def curves(boxes: Floats, truth: Floats) -> Curves:
    """The curves of one sequence.

    Args:
        boxes: (F, 4) of the tracker, F ≥ 1. The first is the given one and counts.
        truth: (F, 4).

    Raises:
        ValueError: there are no frames, or different numbers of boxes.
    """
    if boxes.shape != truth.shape or not len(boxes):
        raise ValueError(f"{len(boxes)} boxes for {len(truth)} frames")
    overlap, error = overlaps(boxes, truth), centre_errors(boxes, truth)
    return Curves(
        success=(overlap[:, None] > SUCCESS_THRESHOLDS).mean(axis=0),
        precision=(error[:, None] <= PRECISION_THRESHOLDS).mean(axis=0),
    )


def mean_curves(found: list[Curves]) -> Curves:
    """Means over sequences, each counting once."""
    return Curves(
        success=np.mean([one.success for one in found], axis=0),
        precision=np.mean([one.precision for one in found], axis=0),
    )
