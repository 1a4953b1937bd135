"""SiamFC's crops: squares around a target with context, the image's mean colour outside it.

Boxes are (x, y, w, h) in px as the data sets have them: the first pixel is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from seco.track.config import CONTEXT
from seco.views.crops import Pixels


class Target(NamedTuple):
    """Centre and size of a box, px; the centre of the first pixel is 0."""

    x: float
    y: float
    width: float
    height: float

    @property
    def exemplar_side(self) -> float:
        """px of the square with context, sqrt((w + c)(h + c)) with c = (w + h) / 2."""
        context = CONTEXT * (self.width + self.height)
        return math.sqrt((self.width + context) * (self.height + context))


def target_of(box: Sequence[float]) -> Target:
    """From (x, y, w, h), the first pixel being 1."""
    x, y, width, height = (float(number) for number in box)
    return Target(x - 1 + (width - 1) / 2, y - 1 + (height - 1) / 2, width, height)


def box_of(target: Target) -> NDArray[np.float64]:
    """(4,) x, y, w, h, the first pixel being 1."""
    x, y, width, height = target
    return np.array([x + 1 - (width - 1) / 2, y + 1 - (height - 1) / 2, width, height])


def mean_colour(frame: Pixels) -> NDArray[np.float32]:
    """(3,) of an (H, W, 3) image."""
    height, width = frame.shape[:2]
    columns = frame.reshape(height, width * 3).sum(0, dtype=np.uint32)  # exact to 16 million rows
    totals = columns.reshape(width, 3).sum(0, dtype=np.float64)
    mean: NDArray[np.float32] = (totals / (height * width)).astype(np.float32)
    return mean


def square_crops(
    frame: Tensor, centre: tuple[float, float], sides: Sequence[float], size: int, fill: Tensor
) -> Tensor:
    """Squares of a frame around one centre, resized.

    Pixel u of a crop shows the frame at ``centre + ((u + 1/2) / size - 1/2) · side``, bilinearly,
    after the frame was continued with ``fill`` on all sides without end: a square may lie partly or
    wholly outside, and be smaller than a pixel. Where even the smallest square is twice as large as
    its crop, or more, means of k × k pixels stand for pixels against aliasing, k = ⌊side / size⌋,
    counted from the corner of what is read.

    Args:
        frame: (H, W, 3) uint8, on any device.
        centre: x and y, px; the centre of the first pixel is 0.
        sides: (n,) of the squares, px, above 0.
        size: S, side of the crops.
        fill: (3,) float32, on the frame's device.

    Returns:
        (n, 3, S, S) float32 in 0 … 255, on the frame's device.
    """
    height, width = frame.shape[:2]
    factor = max(1, int(min(sides) / size))
    reach = max(sides) / 2 + 3 * factor  # the last block of pixels may be cut, and is not looked at
    left, right = _span(centre[0], reach, width)
    top, bottom = _span(centre[1], reach, height)
    if left == right or top == bottom:
        return fill.view(1, 3, 1, 1).expand(len(sides), 3, size, size).clone()
    # What is zero then is the fill, also what grid_sample reads outside.
    patch = frame[top:bottom, left:right].permute(2, 0, 1).float() - fill.view(3, 1, 1)
    if factor > 1:
        more = (-patch.shape[2] % factor, -patch.shape[1] % factor)
        patch = F.avg_pool2d(F.pad(patch, (0, more[0], 0, more[1])), factor)
    steps = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    scaled = torch.tensor(list(sides), dtype=torch.float64)[:, None] * steps  # (n, S)
    grid = torch.empty(len(sides), size, size, 2)
    grid[..., 0] = _places(centre[0] + scaled, left, factor, patch.shape[2])[:, None, :]
    grid[..., 1] = _places(centre[1] + scaled, top, factor, patch.shape[1])[:, :, None]
    crops = F.grid_sample(
        patch.expand(len(sides), *patch.shape),
        grid.to(frame.device, non_blocking=True),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return crops.add_(fill.view(1, 3, 1, 1))


def _span(centre: float, reach: float, size: int) -> tuple[int, int]:
    """First pixel, and the one after the last, of ``centre`` ± ``reach`` within the frame."""
    first = min(max(0, math.floor(centre - reach)), size)
    return first, max(first, min(size, math.ceil(centre + reach) + 1))


def _places(at: Tensor, first: int, factor: int, cells: int) -> Tensor:
    """px of the frame as grid_sample's coordinates on cells of ``factor`` px from ``first`` on."""
    return (2 * ((at - first - (factor - 1) / 2) / factor) + 1) / cells - 1
