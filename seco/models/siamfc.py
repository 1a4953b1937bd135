"""SiamFC on a frozen backbone: a learnable 1×1 convolution, cross-correlation (paper §5.2)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from seco.config import FEATURE_LAYERS, STRIDE, TrackTrainConfig
from shards.errors import InputError

_STAGES = ("layer1", *FEATURE_LAYERS)


def dilate(network: nn.Module) -> dict[str, int]:
    """Change a ResNet's strides and dilations in place so that no stage exceeds stride 8.

    For torchvision's Bottleneck networks this equals
    ``replace_stride_with_dilation=[False, True, True]``, which torchvision refuses for ResNet-18
    and 34. As there, the kernel that had the stride keeps the dilation of the previous stage, so
    that values do not change.

    Returns:
        The stride in px of each stage, ``layer1`` to ``layer4``.
    """
    total = _stride(cast(nn.Conv2d, network.conv1))
    if isinstance(network.maxpool, nn.MaxPool2d):
        total *= cast(int, network.maxpool.stride)
    dilation = 1
    strides = {}
    for name in _STAGES:
        layers = getattr(network, name).modules()
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        step = max(_stride(convolution) for convolution in convolutions)
        before = dilation
        if total * step > STRIDE:
            dilation *= step
        else:
            total *= step
        if dilation > 1:
            for convolution in convolutions:
                _spread(convolution, before, dilation)
        strides[name] = total
    return strides


def _spread(convolution: nn.Conv2d, before: int, dilation: int) -> None:
    strided = _stride(convolution) > 1
    convolution.stride = (1, 1)
    if convolution.kernel_size != (1, 1):
        spread = before if strided else dilation
        convolution.dilation = convolution.padding = (spread, spread)


def _stride(convolution: nn.Conv2d) -> int:
    return convolution.stride[0]


class DilatedBackbone(nn.Module):
    """Features of a frozen, dilated ResNet at stride 8 instead of 32 (paper §5.2).

    In torchvision's ResNets, the strides of res4 and res5 become 1 and their 3×3 kernels are
    dilated by 2 and 4 instead; in ResNets for small images, which reach stride 8 later, fewer
    stages change. Weights do not change, nor do values: at every fourth cell (or every second, or
    every cell), the dilated network equals the original (the "algorithme à trous").

    Always in evaluation mode, without gradients. The whole network is kept, so that its weights
    can be compared with those it was loaded from.

    Args:
        network: a ResNet with pre-trained weights; changed in place.
        feature_layer: the last stage to compute, ``layer2``, ``layer3`` or ``layer4``.

    Raises:
        InputError: it is not a ResNet, or the features of this stage have a smaller stride.
    """

    def __init__(self, network: nn.Module, feature_layer: str) -> None:
        super().__init__()
        if not isinstance(network, ResNet):
            raise InputError(
                "is not a ResNet, whose stages can be dilated to the stride a tracker needs",
                "--checkpoint",
                "give the weights of a ResNet",
            )
        strides = dilate(network)
        if strides[feature_layer] != STRIDE:
            usable = [name for name in FEATURE_LAYERS if strides[name] == STRIDE]
            raise InputError(
                f"{feature_layer} of this backbone has stride {strides[feature_layer]}; the"
                f" tracker needs {STRIDE}",
                "--feature-layer",
                f"give {' or '.join(usable)}",
            )
        self.network = network
        self.network.requires_grad_(False)
        self._stages = _STAGES[: _STAGES.index(feature_layer) + 1]
        self.eval()

    def train(self, mode: bool = True) -> DilatedBackbone:
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    @property
    def width(self) -> int:
        """C, the number of feature channels."""
        stage = cast(nn.Sequential, getattr(self.network, self._stages[-1]))
        norms = [layer for layer in stage[-1].modules() if isinstance(layer, nn.BatchNorm2d)]
        return norms[-1].num_features

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised (N, 3, H, W) to features (N, C, ⌈H/8⌉, ⌈W/8⌉)."""
        net = self.network
        with torch.no_grad():
            x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
            for stage in self._stages:
                x = getattr(net, stage)(x)
        return cast(Tensor, x)


TRACKER = "tracker"  # key of a `seco track train` checkpoint that describes the tracker
# Of the root mean square of the standard deviations. Otherwise a channel that was nearly constant
# while measured would be amplified without limit elsewhere, and the loss would diverge.
_LEAST_SHARE = 0.05
_LEAST_STD = 1e-6  # for features that are all the same


def cross_correlation(exemplar: Tensor, search: Tensor) -> Tensor:
    """Correlate an exemplar with every position of a search region.

    Response (i, j) is the sum over cells (y, x) and channels of
    ``exemplar[y, x] · search[y + i, x + j]``: a convolution with as many groups as pairs. It is
    computed from the products of all pairs of cells: four times the arithmetic, but in one matrix
    product, which is several times faster.

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
    """Map features to responses; the only learnt part of a tracker.

    Args:
        width: C, channels of the features.
        channels: D, output channels of the 1×1 convolution.
        response_scale: constant factor of the correlation; a bias is learnt.
        separate: use one convolution for exemplars and another for search regions.
        standardise: subtract ``mean`` from the features and divide by ``std``, per channel. Both
            are measured once (:meth:`measure`) and then constant, so that this is still a single
            1×1 convolution.
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
        """Set the (C,) mean and standard deviation of the features.

        Deviations below a twentieth of their root mean square are raised to it.
        """
        if self._standardise:
            least = (_LEAST_SHARE * std.square().mean().sqrt()).clamp(min=_LEAST_STD)
            self.mean.copy_(mean)
            self.std.copy_(std.maximum(least))

    def exemplar(self, features: Tensor) -> Tensor:
        """Project exemplar features (N, C, h, w) to (N, D, h, w)."""
        return self._projected(features, self.exemplar_convolution)

    def search(self, features: Tensor) -> Tensor:
        """Project search features (N, C, H, W) to (N, D, H, W)."""
        return self._projected(features, self.search_convolution or self.exemplar_convolution)

    def correlation(self, exemplar: Tensor, search: Tensor) -> Tensor:
        """Correlate projected (N or 1, D, h, w) and (N, D, H, W); (N, H - h + 1, W - w + 1)."""
        return cross_correlation(exemplar, search) * self._scale

    def forward(self, exemplar: Tensor, search: Tensor) -> Tensor:
        """Map the features of N pairs to logits."""
        return self.correlation(self.exemplar(exemplar), self.search(search)) + self.bias

    def _projected(self, features: Tensor, convolution: nn.Conv2d) -> Tensor:
        # (features - mean) / std is folded into the convolution: no pass over the features.
        weight = convolution.weight[:, :, 0, 0] / self.std
        assert convolution.bias is not None
        bias = convolution.bias - weight @ self.mean
        # A matrix product: with gradients, torch's own 1×1 convolution is slow on a CPU.
        projected: Tensor = weight @ features.flatten(2) + bias[:, None]
        return projected.view(*projected.shape[:2], *features.shape[2:])


class SiamFC(nn.Module):
    """A frozen, dilated backbone and a trainable head."""

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
        """Parameters of the head."""
        return list(self.head.parameters())
