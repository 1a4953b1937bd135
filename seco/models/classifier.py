"""The fine-tuned network: a backbone over the frames of a clip, and a linear classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seco.models.backbones import build_backbone, feature_dim, tensors_sha256
from seco.models.batchnorm import running_statistics


@dataclass(frozen=True)
class Classes:
    """The K classes of a classifier."""

    labels: list[int]  # (K,) in increasing order
    names: list[str]  # (K,)


class VideoClassifier(nn.Module):
    """A clip classifier: a clip's scores are the mean of its frames' scores (authors' code).

    The classifier is linear, so it is applied to the mean of the frames' features. Dropout on this
    mean is the same for all frames of the clip.

    Args:
        arch: name of the backbone.
        classes: K.
        frozen: BatchNorm layers with fixed statistics, weight and bias: ``all-but-first`` (authors'
            code), ``all`` or ``none``. The others normalise over groups of clips.
        dropout: probability of dropping a feature.
    """

    def __init__(
        self, arch: str, classes: int, frozen: str = "all-but-first", dropout: float = 0.9
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(arch)
        self.classifier = nn.Linear(feature_dim(arch), classes)
        self.dropout = dropout
        layers = [m for m in self.backbone.modules() if isinstance(m, _BatchNorm)]
        self.frozen = {"all": layers, "all-but-first": layers[1:], "none": []}[frozen]
        for layer in self.frozen:
            layer.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> VideoClassifier:
        """Set training mode; frozen layers still use their running statistics."""
        super().train(mode)
        for layer in self.frozen:
            layer.eval()
        return self

    def forward(self, images: Tensor, uniform: Tensor, group: int, first: bool = True) -> Tensor:
        """Compute the scores of training clips.

        Args:
            images: (n, T, 3, S, S) views.
            uniform: (n, C) random numbers in [0, 1) for the dropout.
            group: clips normalised together; divides n. Clips g·group … are group g.
            first: whether this is a step's first micro-batch, whose first group updates the running
                statistics.

        Returns:
            (n, K) float32.
        """
        n, frames = images.shape[:2]
        features = []
        for number, clips in enumerate(images.split(group)):
            with running_statistics(self.backbone, follow=first and number == 0):
                features.append(self.backbone(clips.flatten(0, 1)))
        mean = torch.cat(features).float().view(n, frames, -1).mean(1)
        kept = (uniform >= self.dropout).to(mean.dtype) / (1 - self.dropout)
        return self.scores(mean * kept)

    def scores(self, features: Tensor) -> Tensor:
        """Map (…, C) mean features to (…, K) scores, in float32 even under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            scores: Tensor = self.classifier(features.float())
        return scores

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters outside the frozen layers."""
        return [p for p in self.parameters() if p.requires_grad]

    def frozen_sha256(self) -> str:
        """Digest of the frozen layers, which must never change."""
        state = {
            f"{number}.{name}": tensor
            for number, layer in enumerate(self.frozen)
            for name, tensor in layer.state_dict().items()
        }
        return tensors_sha256(state)
