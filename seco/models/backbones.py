"""The backbones that ``--arch`` names: torchvision's ResNets, and ResNets for small images.

A ResNet makes an image 32 times smaller before its last stage: of a 32 px image one cell is left.
Those for small images have a 3×3 stem and no max-pooling. Their sizes are in ``docs/pretrain.md``.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from shards.errors import InputError

TORCHVISION, SMALL_IMAGES = "torchvision", "for small images"  # families


class SmallImageResNet(ResNet):  # type: ignore[misc]  # torchvision has no types
    """A ResNet of any width with a 3×3 stem and no max-pooling.

    Tensor names and initialisation are torchvision's; with ``width`` 64, so are all shapes except
    the stem's.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        blocks: number of blocks in each of the four stages.
        width: channels of the stem and of the first stage, a multiple of 16; each later stage has
            twice as many (four times that at the outputs of a ``Bottleneck``).
        stem_stride: 1 or 2; the total stride is 8 times this.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: Sequence[int],
        *,
        width: int,
        stem_stride: int,
    ) -> None:
        self._stem_width = width  # read by _make_layer, which torchvision's __init__ calls
        super().__init__(block, list(blocks))
        self.conv1 = nn.Conv2d(3, width, 3, stride=stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(8 * width * block.expansion, 1000)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        """Build one stage; torchvision calls this with 64, 128, 256 and 512 planes."""
        if planes == 64:
            self.inplanes = self._stem_width
        planes = planes * self._stem_width // 64
        stage: nn.Sequential = super()._make_layer(block, planes, blocks, stride, dilate)
        return stage


@dataclass(frozen=True)
class BackboneSpec:
    """How to build one backbone.

    Args:
        family: ``TORCHVISION`` or ``SMALL_IMAGES``.
        width: C, the width of the pooled feature.
        build: returns a randomly initialised network from (N, 3, H, W) to (N, C).
    """

    family: str
    width: int
    build: Callable[[], nn.Module]


def _spec(family: str, width: int, resnet: Callable[..., Any]) -> BackboneSpec:
    def build() -> nn.Module:
        network: nn.Module = resnet()
        network.fc = nn.Identity()
        return network

    return BackboneSpec(family, width, build)


def _torchvision(name: str, width: int) -> BackboneSpec:
    return _spec(
        TORCHVISION, width, functools.partial(torchvision.models.get_model, name, weights=None)
    )


def _small(
    block: type[BasicBlock | Bottleneck], blocks: Sequence[int], *, width: int, stem_stride: int
) -> BackboneSpec:
    resnet = functools.partial(
        SmallImageResNet, block, blocks, width=width, stem_stride=stem_stride
    )
    return _spec(SMALL_IMAGES, 8 * width * block.expansion, resnet)


# A file that does not name its architecture is recognised by the shapes of its tensors: no two of
# these may differ only in strides. Files are compared in this order, the likeliest first.
_SPECS: dict[str, BackboneSpec] = {
    "resnet50": _torchvision("resnet50", 2048),
    **{name: _torchvision(name, 512) for name in ("resnet18", "resnet34")},
    **{
        name: _torchvision(name, 2048)
        for name in (
            *("resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"),
            *("resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2"),
        )
    },
    # One block per stage.
    "resnet10_w16": _small(BasicBlock, (1, 1, 1, 1), width=16, stem_stride=2),
    "resnet10_w32": _small(BasicBlock, (1, 1, 1, 1), width=32, stem_stride=2),
    "resnet10_w64": _small(BasicBlock, (1, 1, 1, 1), width=64, stem_stride=2),
    # The CIFAR stem of SimCLR (appendix B.9), MoCo's CIFAR-10 demo and lightly.
    "resnet18_cifar": _small(BasicBlock, (2, 2, 2, 2), width=64, stem_stride=1),
    "resnet34_cifar": _small(BasicBlock, (3, 4, 6, 3), width=64, stem_stride=1),
    "resnet50_cifar": _small(Bottleneck, (3, 4, 6, 3), width=64, stem_stride=1),
}


def known_archs() -> tuple[str, ...]:
    """Names that ``--arch`` accepts."""
    return tuple(_SPECS)


def backbone_spec(arch: str) -> BackboneSpec:
    """Look up a backbone.

    Raises:
        InputError: no backbone has this name.
    """
    if arch not in _SPECS:
        choices = "; ".join(
            f"{family}: {', '.join(name for name, spec in _SPECS.items() if spec.family == family)}"
            for family in (TORCHVISION, SMALL_IMAGES)
        )
        raise InputError(f"unknown architecture {arch!r}", "--arch", f"give one of {choices}")
    return _SPECS[arch]


def build_backbone(arch: str) -> nn.Module:
    """Build a randomly initialised ResNet from (N, 3, H, W) to pooled features (N, C).

    Raises:
        InputError: no backbone has this name.
    """
    return backbone_spec(arch).build()


def feature_dim(arch: str) -> int:
    """C, the width of the pooled feature.

    Raises:
        InputError: no backbone has this name.
    """
    return backbone_spec(arch).width


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and values: equal if and only if the weights are equal."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
