"""A ResNet whose features are 8 times, not 32 times, smaller than the image (paper §5.2).

In torchvision's ResNets the strides of res4 and res5 become 1 and their 3×3 kernels are spread
instead, by 2 and 4; in ResNets for small images, which reach stride 8 later, fewer stages change.
Weights stay as they are, and so do the values: at every fourth cell (or second, or each) the
dilated network has what the original has (the "algorithme à trous").
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from seco.track.config import FEATURE_LAYERS, STRIDE
from shards.errors import InputError

_STAGES = ("layer1", *FEATURE_LAYERS)


def dilate(network: nn.Module) -> dict[str, int]:
    """Set strides and dilations of a ResNet in place so that no stage exceeds stride 8.

    For torchvision's Bottleneck networks this is its
    ``replace_stride_with_dilation=[False, True, True]``, which torchvision refuses for ResNet-18
    and 34. As there, the kernel that had the stride keeps the dilation of the stage before: that
    is what leaves the values as they are.

    Returns:
        for each stage, ``layer1`` to ``layer4``, how many px of the image one cell stands for.
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
    """Features of a frozen, dilated ResNet at stride 8.

    Always in evaluation mode, without gradients. The whole network is kept, so that its weights
    can be compared with those it was made from.

    Args:
        network: a ResNet with pre-trained weights; changed in place.
        feature_layer: the last stage that is computed, ``layer2``, ``layer3`` or ``layer4``.

    Raises:
        InputError: the stage's features have a smaller stride.
    """

    def __init__(self, network: nn.Module, feature_layer: str) -> None:
        super().__init__()
        strides = dilate(network)
        if strides[feature_layer] != STRIDE:
            usable = [name for name in FEATURE_LAYERS if strides[name] == STRIDE]
            raise InputError(
                f"{feature_layer} of this backbone has stride {strides[feature_layer]}, the"
                f" tracker needs {STRIDE}",
                "--feature-layer",
                f"give {' or '.join(usable)}",
            )
        self.network = network
        self.network.requires_grad_(False)
        self._stages = _STAGES[: _STAGES.index(feature_layer) + 1]
        self.eval()

    def train(self, mode: bool = True) -> DilatedBackbone:
        """Frozen statistics whatever is asked for."""
        return super().train(False)

    @property
    def width(self) -> int:
        """C, the channels of the features."""
        stage = cast(nn.Sequential, getattr(self.network, self._stages[-1]))
        norms = [layer for layer in stage[-1].modules() if isinstance(layer, nn.BatchNorm2d)]
        return norms[-1].num_features

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) normalised → (N, C, ⌈H/8⌉, ⌈W/8⌉)."""
        net = self.network
        with torch.no_grad():
            x = net.maxpool(net.relu(net.bn1(net.conv1(images))))  # type: ignore[operator]
            for stage in self._stages:
                x = getattr(net, stage)(x)
        return cast(Tensor, x)
