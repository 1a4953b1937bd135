"""One model on many processes: gradients are averaged, BatchNorm's buffers are left alone."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from seco.processes.ranks import Ranks

# Its name before torch 2.14.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"


def distributed(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The model itself on one process; on many, its gradients are the means over all ranks'."""
    if ranks.size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # BatchNorm's running statistics are those of rank 0.
        **{_SYNC_BUFFERS: False},  # type: ignore[arg-type]
    )


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a backward pass: only the ``last`` micro-batch of a step exchanges gradients."""
    if isinstance(model, DistributedDataParallel) and not last:
        unsynchronised: AbstractContextManager[None] = model.no_sync()
        return unsynchronised
    return nullcontext()
