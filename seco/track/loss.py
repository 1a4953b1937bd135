"""Where a response should be high, and the balanced logistic loss of SiamFC."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seco.track.config import STRIDE


def response_labels(size: int, radius_px: float) -> Tensor:
    """(size, size) float32: 1 within ``radius_px`` of the centre in city-block distance, else 0.

    Cells are 8 px apart and the target is in the middle, between cells where ``size`` is even.
    """
    away = (torch.arange(size) - (size - 1) / 2).abs()
    return ((away[:, None] + away[None, :]) * STRIDE <= radius_px).float()


def balanced_loss(responses: Tensor, labels: Tensor) -> Tensor:
    """The logistic loss, positives and negatives weighing one half each, mean over the pairs.

    Args:
        responses: (N, S, S) logits.
        labels: (S, S) of :func:`response_labels`; there must be both kinds.
    """
    positives = labels.sum()
    weights = torch.where(labels > 0, 0.5 / positives, 0.5 / (labels.numel() - positives))
    losses = F.binary_cross_entropy_with_logits(
        responses, labels.expand_as(responses), reduction="none"
    )
    return (losses * weights).sum() / len(responses)
