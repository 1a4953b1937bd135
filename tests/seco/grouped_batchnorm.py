"""The encoder as it was before it took one BatchNorm group at a time: all groups in one forward.

Kept as a reference for ``seco.model``: results must be equal in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` whose training statistics are of groups of images, image i in group i mod G.

    The running statistics follow the first group of each of ``passes`` joined passes.
    """

    groups: int = 1
    passes: int = 1

    def forward(self, input: Tensor) -> Tensor:
        n, c, h, w = input.shape
        groups = self.groups
        mean, variance = self.running_mean.repeat(groups), self.running_var.repeat(groups)
        output = F.batch_norm(
            input.reshape(n // groups, groups * c, h, w),
            mean,
            variance,
            self.weight.repeat(groups),
            self.bias.repeat(groups),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        with torch.no_grad():
            for buffer, updated in ((self.running_mean, mean), (self.running_var, variance)):
                before = buffer.clone()
                for group in updated.view(groups, c)[:: groups // self.passes]:
                    buffer.mul_(1 - self.momentum).add_(group - (1 - self.momentum) * before)
            self.num_batches_tracked += self.passes
        return output.view(n, c, h, w)


def with_grouped_layers(network: nn.Module) -> nn.Module:
    """The network with each ``BatchNorm2d`` replaced, in place; parameters and buffers kept."""
    for layer in network.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = GroupedBatchNorm2d
    return network


def joined_forward(
    encoder: nn.Module, images: Tensor, group: int, passes: int
) -> dict[str, Tensor]:
    """(N, …) images in runs of ``group`` that are normalised together, in one forward."""
    groups = len(images) // group
    for layer in encoder.modules():
        if isinstance(layer, GroupedBatchNorm2d):
            layer.groups, layer.passes = groups, passes
    order = torch.arange(len(images)).view(groups, -1).t().reshape(-1)
    encoded: dict[str, Tensor] = encoder(images[order])
    return {name: vectors[torch.argsort(order)] for name, vectors in encoded.items()}
