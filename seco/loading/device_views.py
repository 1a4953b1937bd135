"""From a loader's batch to crops, and from crops to views, on the training device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from seco.loading.device_copies import DeviceCopies
from seco.loading.loader import Batch
from seco.views.augment import apply_views
from seco.views.chunks import FRAME_OF_VIEW, VIEWS
from seco.views.view_parameters import ViewConfig, ViewParameters
from shards.errors import InputError


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
