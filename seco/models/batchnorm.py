"""BatchNorm by groups of a batch: a many-GPU run's statistics on one device.

MoCo's shuffled BatchNorm (paper §5.2) normalises the query and its keys with the statistics of
different images, so that they cannot be matched by these. On one device a batch is encoded group by
group, each normalised by its own statistics, and the keys are shuffled over the groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def running_statistics(module: nn.Module, *, follow: bool) -> Iterator[None]:
    """Control whether forwards within the block update BatchNorm's running statistics.

    Only the first group of each pass updates them, as only rank 0's do in the authors' code. They
    are restored afterwards rather than frozen, so that a compiled encoder is one graph for all
    groups.

    Args:
        module: in training mode.
        follow: False: restore the statistics after the block.
    """
    if follow:
        yield
        return
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    # .data hides the change from autograd, which would reject it; in training mode, the backward
    # pass does not read the running statistics.
    buffers = [b.data for layer in layers for b in layer.buffers()]
    kept = [[b for b in buffers if b.is_floating_point() == real] for real in (True, False)]
    before = [[b.clone() for b in some] for some in kept]
    try:
        yield
    finally:
        for some, values in zip(kept, before, strict=True):
            if some:  # of one dtype: one kernel on a GPU
                torch._foreach_copy_(some, values)
