"""SiamFC on a frozen backbone: a learnable 1×1 convolution, cross-correlation (paper §5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seco.checkpoints.checkpoint import load_checkpoint
from seco.model.backbones import build_backbone
from seco.track.config import TrackTrainConfig
from seco.track.dilate import DilatedBackbone
from shards.errors import InputError

TRACKER = "tracker"  # where a checkpoint of `seco track train` says what it is
# Of the deviations' root mean square: a channel that hardly moved while it was measured would
# else be magnified without limit where it does move, and the loss diverge.
_LEAST_SHARE = 0.05
_LEAST_STD = 1e-6  # of features that are all the same


def cross_correlation(exemplar: Tensor, search: Tensor) -> Tensor:
    """How well an exemplar fits at each place of a search region.

    Response (i, j) is the sum over cells (y, x) and channels of
    ``exemplar[y, x] · search[y + i, x + j]``: a convolution with as many groups as pairs. It is
    computed from the products of all cells with all, which is four times the arithmetic in one
    matrix product and several times quicker.

    Args:
        exemplar: (N, C, h, w), or (1, C, h, w) for all.
        search: (N, C, H, W).

    Returns:
        (N, H - h + 1, W - w + 1), in float32 even under autocast.
    """
    n, _, height, width = search.shape
    h, w = exemplar.shape[2:]
    products = exemplar.flatten(2).transpose(1, 2) @ search.flatten(2)  # (N, h·w, H·W)
    row, cell, size = w * height * width, height * width, h * w * height * width
    # Element (n, y, x, i, j) is the product of cell (y, x) with cell (y + i, x + j).
    shifted = products.contiguous().as_strided(
        (n, h, w, height - h + 1, width - w + 1), (size, row + width, cell + 1, width, 1)
    )
    return shifted.sum((1, 2), dtype=torch.promote_types(products.dtype, torch.float32))


class SiameseHead(nn.Module):
    """From features to responses; all that is learnt of a tracker.

    Args:
        width: C, channels of the features.
        channels: D, outputs of the 1×1 convolution.
        response_scale: factor of the correlation; a bias is learnt.
        separate: a convolution for each of exemplar and search, instead of one for both.
        standardise: subtract ``mean`` from the features and divide by ``std``, channel by channel.
            Both are measured once (:meth:`measure`), then constants: with them it is still one 1×1
            convolution.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        width: int,
        channels: int,
        response_scale: float,
        *,
        separate: bool = False,
        standardise: bool = True,
    ) -> None:
        super().__init__()
        self.exemplar_convolution = nn.Conv2d(width, channels, 1)
        self.search_convolution = nn.Conv2d(width, channels, 1) if separate else None
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self._scale = response_scale
        self._standardise = standardise

    def measure(self, mean: Tensor, std: Tensor) -> None:
        """Take the (C,) mean and standard deviation of the features.

        Deviations below a twentieth of their root mean square are raised to that.
        """
        if self._standardise:
            least = (_LEAST_SHARE * std.square().mean().sqrt()).clamp(min=_LEAST_STD)
            self.mean.copy_(mean)
            self.std.copy_(std.maximum(least))

    def exemplar(self, features: Tensor) -> Tensor:
        """(N, C, h, w) → (N, D, h, w)."""
        return self._projected(features, self.exemplar_convolution)

    def search(self, features: Tensor) -> Tensor:
        """(N, C, H, W) → (N, D, H, W)."""
        return self._projected(features, self.search_convolution or self.exemplar_convolution)

    def correlation(self, exemplar: Tensor, search: Tensor) -> Tensor:
        """Projected (N or 1, D, h, w) and (N, D, H, W) → (N, H - h + 1, W - w + 1), scaled."""
        return cross_correlation(exemplar, search) * self._scale

    def forward(self, exemplar: Tensor, search: Tensor) -> Tensor:
        """Features of N pairs to their logits."""
        return self.correlation(self.exemplar(exemplar), self.search(search)) + self.bias

    def _projected(self, features: Tensor, convolution: nn.Conv2d) -> Tensor:
        # (features - mean) / std is done by the convolution's weights: no pass over the features.
        weight = convolution.weight[:, :, 0, 0] / self.std
        assert convolution.bias is not None
        bias = convolution.bias - weight @ self.mean
        # A matrix product: with gradients, torch's own 1×1 convolution is slow on a processor.
        projected: Tensor = weight @ features.flatten(2) + bias[:, None]
        return projected.view(*projected.shape[:2], *features.shape[2:])


class SiamFC(nn.Module):
    """Frozen backbone and head."""

    def __init__(self, network: nn.Module, config: TrackTrainConfig) -> None:
        super().__init__()
        self.backbone = DilatedBackbone(network, config.feature_layer)
        self.head = SiameseHead(
            self.backbone.width,
            config.channels,
            config.response_scale,
            separate=config.convolutions == "separate",
            standardise=not config.raw_features,
        )

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of the head."""
        return list(self.head.parameters())


def load_tracker(path: Path) -> tuple[SiamFC, dict[str, Any]]:
    """A tracker that ``seco track train`` made, and its checkpoint's content but the weights.

    Raises:
        InputError: it is something else, or does not fit.
    """
    content = load_checkpoint(path)
    if TRACKER not in content:
        raise InputError("holds no tracker", path, "give a last.pt of `seco track train`")
    config = content["config"]
    try:
        names = ("feature_layer", "channels", "response_scale", "convolutions", "raw_features")
        settings = TrackTrainConfig(**{name: config[name] for name in names})
        model = SiamFC(build_backbone(config["arch"]), settings)
        model.load_state_dict(content["model"], strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError("is a damaged tracker", path) from error
    about: Mapping[str, Any] = {name: value for name, value in content.items() if name != "model"}
    return model.eval(), dict(about)
