"""The encoder: a backbone, and MLP heads on the pooled feature."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seco.model.backbones import build_backbone, feature_dim


class Encoder(nn.Module):
    """Backbone and heads; the output is an L2-normalised embedding for each task.

    Args:
        arch: name of the backbone.
        heads: names of the heads, ``("shared",)`` or the tasks (paper §5.2: C → C → D with a ReLU).
        embedding_dim: D.
    """

    def __init__(self, arch: str, heads: Iterable[str], embedding_dim: int) -> None:
        super().__init__()
        width = feature_dim(arch)
        self.backbone = build_backbone(arch)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, embedding_dim)
                )
                for name in heads
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) → for each head, unit vectors (N, D), in float32 even under autocast."""
        feature = self.backbone(images)
        vectors = {name: head(feature) for name, head in self.heads.items()}
        return {
            name: F.normalize(vector.to(torch.promote_types(vector.dtype, torch.float32)))
            for name, vector in vectors.items()
        }
