"""Batches on their way to a GPU, copied beside the kernels of the step before."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

_UNDER_WAY = 1  # the loader keeps one batch more than the one being read


class DeviceCopies:
    """Copies each batch to a GPU on a stream of its own.

    On the stream of the step a copy would wait for the step before it, and the next step for the
    copy: 308 MB per step of 512 videos at 224 px. There are two buffers on the device, one that is
    read and one that is filled, so memory does not grow with how far the host is ahead.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[Tensor] = []
        self._read = [torch.cuda.Event(), torch.cuda.Event()]  # all kernels that read the buffer
        self._copies: deque[torch.cuda.Event] = deque()
        self._slot = 0

    def copy(self, images: Tensor) -> Tensor:
        """The batch on the device, valid until the next call but one.

        Args:
            images: always of one shape; in pinned memory (else the host waits), which may be
                written anew after the next call.
        """
        compute = torch.cuda.current_stream(self._device)
        # What reads the buffer that was handed out last has been queued by now.
        self._read[self._slot].record(compute)
        self._slot = 1 - self._slot
        if not self._buffers:
            self._buffers = [torch.empty_like(images, device=self._device) for _ in range(2)]
            # Memory that the host has freed may still be read by queued kernels.
            self._stream.wait_stream(compute)
        buffer = self._buffers[self._slot]
        self._stream.wait_event(self._read[self._slot])
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            buffer.copy_(images, non_blocking=True)
            done.record(self._stream)
        compute.wait_event(done)
        self._copies.append(done)
        if len(self._copies) > _UNDER_WAY:
            self._copies.popleft().synchronize()
        return buffer
