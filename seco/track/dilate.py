"""A ResNet whose features are 8 times, not 32 times, smaller than the image (paper §5.2).

The strides of res4 and res5 become 1 and their 3×3 kernels are spread instead, by 2 and 4. Weights
stay as they are, and so do the values: at every fourth cell the dilated network has what the
original has (the "algorithme à trous").
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from seco.track.config import FEATURE_LAYERS


def dilate(network: nn.Module) -> nn.Module:
    """Set strides and dilations of a torchvision ResNet in place; returns it.

    For Bottleneck networks this is torchvision's
    ``replace_stride_with_dilation=[False, True, True]``, which torchvision refuses for ResNet-18
    and 34. As there, the kernel that had the stride keeps the dilation of the stage before: that
    is what leaves the values as they are.
    """
    dilation = 1
    for name in ("layer3", "layer4"):
        before, dilation = dilation, 2 * dilation
        stage = cast(nn.Sequential, getattr(network, name))
        for block in stage:
            for layer in block.modules():
                if not isinstance(layer, nn.Conv2d):
                    continue
                strided = layer.stride != (1, 1)
                layer.stride = (1, 1)
                if layer.kernel_size != (1, 1):
                    spread = before if strided else dilation
                    layer.dilation = layer.padding = (spread, spread)
    return network


class DilatedBackbone(nn.Module):
    """Features of a frozen, dilated ResNet at stride 8.

    Always in evaluation mode, without gradients. The whole network is kept, so that its weights
    can be compared with those it was made from.

    Args:
        network: a torchvision ResNet with pre-trained weights; changed in place.
        feature_layer: the last stage that is computed, ``layer2``, ``layer3`` or ``layer4``.
    """

    def __init__(self, network: nn.Module, feature_layer: str) -> None:
        super().__init__()
        self.network = dilate(network)
        self.network.requires_grad_(False)
        last = FEATURE_LAYERS.index(feature_layer) + 1
        self._stages = ("layer1", *FEATURE_LAYERS[:last])
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
