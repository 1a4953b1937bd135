"""From a loader's batch to crops, and from crops to views, on the training device."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

from seco.loading.loader import Batch
from seco.views.augment import apply_views
from seco.views.chunks import FRAME_OF_VIEW, VIEWS
from seco.views.view_parameters import ViewConfig, ViewParameters
from shards.errors import InputError

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


class DeviceViews:
    """Copies, decodes and augments batches on a device.

    Args:
        device: where the views are wanted.
        crop_size: S, side of a view, px.
        config: mean and standard deviation.
    """

    def __init__(self, device: torch.device, crop_size: int, config: ViewConfig) -> None:
        self._device = device
        self._size = crop_size
        self._config = config
        self._copies = DeviceCopies(device) if device.type == "cuda" else None

    def crops(self, batch: Batch) -> Tensor:
        """(4, N, 3, S, S) of query, k1 (both of the anchor), k2, k3: uint8, or float32 views.

        Frames that the device cannot decode are replaced by those of the next sample; the batch's
        ``unreadable`` names them.
        """
        if batch.images is None:
            return self._decoded(batch)
        return batch.images if self._copies is None else self._copies.copy(batch.images)

    def finished(self, crops: Tensor, views: ViewParameters) -> Tensor:
        """(n, 3, S, S) crops to float32 views; those that are finished stay as they are."""
        if crops.dtype != torch.uint8:
            return crops
        return apply_views(crops, views, self._config)

    def _decoded(self, batch: Batch) -> Tensor:
        """(4, N, 3, S, S) uint8."""
        # Loads torchvision, which nobody else needs here.
        from seco.views.device_decode import as_tensors, crop_resize_batch, decode_frames

        n = len(batch.order)
        of_sample = np.arange(n)
        frames, reasons = decode_frames(
            as_tensors([jpeg for row in batch.jpegs for jpeg in row]), self._device
        )
        broken = {index // 3: reason for index, reason in reasons.items()}
        for row in sorted(broken):
            batch.unreadable.append(f"video {int(batch.videos[row])}: {broken[row]}")
            whole = [r for r in (*range(row + 1, n), *range(row)) if r not in broken]
            if not whole:
                raise InputError(
                    f"not one frame of a batch can be decoded: {broken[row]}", "--decode"
                )
            of_sample[row] = whole[0]
            batch.order[row], batch.videos[row] = batch.order[whole[0]], batch.videos[whole[0]]
        frame_of_view = 3 * of_sample[None, :] + np.array(FRAME_OF_VIEW)[:, None]
        boxes = batch.boxes.numpy()[:, of_sample]
        crops = crop_resize_batch(
            frames, frame_of_view.reshape(-1), boxes.reshape(-1, 4), self._size
        )
        return crops.view(VIEWS, n, *crops.shape[1:])
