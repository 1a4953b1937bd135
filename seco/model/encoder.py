"""The encoder: a torchvision ResNet without its classifier, and MLP heads on the pooled feature."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from shards.errors import InputError

_RESNET = re.compile(r"(wide_)?resne[x]?t\d+\w*")


def build_backbone(arch: str) -> nn.Module:
    """A torchvision ResNet from (N, 3, H, W) to its pooled feature (N, C), without weights.

    Raises:
        InputError: torchvision has no ResNet of this name.
    """
    _require_resnet(arch)
    network: nn.Module = torchvision.models.get_model(arch, weights=None)
    network.fc = nn.Identity()
    return network


def feature_dim(arch: str) -> int:
    """C, the width of the pooled feature.

    Raises:
        InputError: torchvision has no ResNet of this name.
    """
    _require_resnet(arch)
    with torch.device("meta"):
        classifier = torchvision.models.get_model(arch, weights=None).fc
    assert isinstance(classifier, nn.Linear)
    return classifier.in_features


def _require_resnet(arch: str) -> None:
    names = [n for n in torchvision.models.list_models(torchvision.models) if _RESNET.fullmatch(n)]
    if arch not in names:
        raise InputError(f"unknown architecture {arch!r}", "--arch", f"one of {', '.join(names)}")


class Encoder(nn.Module):
    """Backbone and heads; the output is an L2-normalised embedding for each task.

    Args:
        arch: torchvision's name of the ResNet.
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
