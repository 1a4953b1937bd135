"""BatchNorm over groups of a batch: a many-GPU run's statistics on one device.

MoCo's shuffled BatchNorm (paper §5.2) normalises the query and its keys with the statistics of
different images, so that they cannot be matched by these. On one device the batch is split into
groups that are normalised apart, and the keys are shuffled over the groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` whose training statistics are of groups of images, image i in group i mod G.

    Parameters, buffers and evaluation are those of ``BatchNorm2d``. The running statistics follow
    the first group of each pass, as those of rank 0 do in the authors' code; ``passes`` forwards
    that were joined into one batch update them one after the other. With 0 passes they stay as they
    are: a later part of a batch that was cut.
    """

    groups: int = 1
    passes: int = 1

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → the same; N divides by ``groups``."""
        if not self.training or (self.groups == 1 and self.passes):
            return super().forward(input)
        n, c, h, w = input.shape
        groups = self.groups
        # Images with the same remainder of i / G share a column of channels: no copy is made.
        columns = input.reshape(n // groups, groups * c, h, w)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        mean = self.running_mean.repeat(groups)
        variance = self.running_var.repeat(groups)
        output = F.batch_norm(
            columns,
            mean,
            variance,
            self.weight.repeat(groups),
            self.bias.repeat(groups),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        if not self.passes:
            return output.view(n, c, h, w)
        first_of_pass = slice(None, None, groups // self.passes)
        with torch.no_grad():
            for buffer, updated in ((self.running_mean, mean), (self.running_var, variance)):
                before = buffer.clone()
                for group in updated.view(groups, c)[first_of_pass]:
                    # ``updated`` started from ``before``; the difference is this group's share.
                    buffer.mul_(1 - self.momentum).add_(group - (1 - self.momentum) * before)
            self.num_batches_tracked += self.passes
        return output.view(n, c, h, w)


def set_groups(module: nn.Module, groups: int, passes: int = 1) -> None:
    """Set how many groups the next forwards of all grouped layers are normalised in."""
    for layer in module.modules():
        if isinstance(layer, GroupedBatchNorm2d):
            layer.groups = groups
            layer.passes = passes


def group_order(permutation: Tensor, groups: int) -> Tensor:
    """The order in which images must be stacked so that layer groups are runs of ``permutation``.

    Args:
        permutation: (N,) image numbers; run g of N / groups of them is group g.

    Returns:
        (N,) image numbers, group g at positions g, g + groups, g + 2·groups, …
    """
    return permutation.view(groups, -1).t().reshape(-1)
