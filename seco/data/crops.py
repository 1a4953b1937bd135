"""Decode JPEG frames, draw random crops, and resize a box of a frame.

The resize is torch's antialiased bilinear kernel for interleaved uint8 images. It takes a third of
PIL's time and differs from it by rounding (``benchmarks/results/loader.md``); it writes straight
into the batch, which saves one allocation and one copy per view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from shards.sampling import below
from shards.untrusted import require_pixels

Pixels = NDArray[np.uint8]

CROP_SCALE = (0.2, 1.0)  # authors' code; MoCo v2
CROP_RATIO = (3 / 4, 4 / 3)  # torchvision's default
_CROP_ATTEMPTS = 10  # torchvision's, before it takes the centre
CROP_DRAWS = 2 * _CROP_ATTEMPTS + 2  # uniform numbers per crop


class BrokenJpeg(ValueError):
    """The bytes are not a JPEG, or one that is truncated or damaged."""


class CropParameters(NamedTuple):
    """A box within an image, in px."""

    left: int
    top: int
    width: int
    height: int


def draw_crops(
    uniform: NDArray[np.float64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
) -> NDArray[np.int64]:
    """Draw the boxes of n random resized crops: torchvision's ``RandomResizedCrop.get_params``.

    Args:
        uniform: (n, 22) numbers in [0, 1).
        widths: (n,) of the images, px.
        heights: (n,) of the images, px.
        scale: range of the box's share of the image's area, uniform.
        ratio: range of width / height, log-uniform.

    Returns:
        (n, 4) left, top, width, height, px.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    sizes = np.stack([widths, heights], axis=1)[:, None]  # (n, 1, 2)
    area_draw, ratio_draw = uniform[:, :_CROP_ATTEMPTS], uniform[:, _CROP_ATTEMPTS:-2]
    area = sizes.prod(axis=2) * (scale[0] + (scale[1] - scale[0]) * area_draw)
    aspect = np.exp(low + (high - low) * ratio_draw)
    tried = np.sqrt(np.stack([area * aspect, area / aspect], axis=2)).round().astype(np.int64)
    fits = ((tried > 0) & (tried <= sizes)).all(axis=2)  # (n, attempts)
    rows = np.arange(len(uniform))
    boxes = tried[rows, fits.argmax(axis=1)]  # the first that fits
    corners = below(uniform[:, -2:], sizes[:, 0] - boxes + 1)
    crops = np.concatenate([corners, boxes], axis=1)
    for row in np.flatnonzero(~fits.any(axis=1)):
        crops[row] = _widest_center(int(widths[row]), int(heights[row]), ratio)
    return crops


def _widest_center(width: int, height: int, ratio: tuple[float, float]) -> CropParameters:
    """Return the largest centred box with an allowed ratio."""
    box_width, box_height = width, height
    if width / height < ratio[0]:
        box_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width = round(height * ratio[1])
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return CropParameters(left, top, box_width, box_height)


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in px; reads the header only.

    Raises:
        BrokenJpeg: the data is not a JPEG, or has too many pixels.
    """
    try:
        return _checked_size(data)
    except ValueError as error:
        raise _broken(data, error) from error


def _checked_size(data: bytes) -> tuple[int, int]:
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    require_pixels(width, height)
    return width, height


def decode_jpeg(data: bytes) -> Pixels:
    """Decode to (H, W, 3) RGB, accurately (slow integer DCT, smooth chroma).

    Raises:
        BrokenJpeg: the data is not a JPEG or is damaged.
    """
    try:
        _checked_size(data)
        decoded: Pixels = simplejpeg.decode_jpeg(data)
    except ValueError as error:
        raise _broken(data, error) from error
    return decoded


class FrameDecoder:
    """Decodes whole frames, one after another, into the same memory.

    When decoding into new memory, a third of the time is spent allocating it.
    """

    def __init__(self) -> None:
        self._buffer = np.empty(0, dtype=np.uint8)

    def decode(self, data: bytes) -> Pixels:
        """Decode to (H, W, 3) RGB like :func:`decode_jpeg`; valid until the next call.

        Raises:
            BrokenJpeg: the data is not a JPEG or is damaged.
        """
        try:
            width, height = _checked_size(data)
            if height * width * 3 > len(self._buffer):
                self._buffer = np.empty(height * width * 3, dtype=np.uint8)
            decoded: Pixels = simplejpeg.decode_jpeg(data, buffer=self._buffer)
        except ValueError as error:
            raise _broken(data, error) from error
        return decoded


def _broken(data: bytes, error: ValueError) -> BrokenJpeg:
    return BrokenJpeg(f"broken JPEG of {len(data)} bytes ({error})")


def center_crop(image: Pixels, short_edge: int = 256, size: int = 224) -> Pixels:
    """Resize the short edge, then crop the (size, size, 3) centre.

    Equal to torchvision's ``Resize(short_edge)`` and ``CenterCrop(size)`` on PIL images.

    Raises:
        ValueError: ``size`` exceeds ``short_edge``.
    """
    if size > short_edge:
        raise ValueError(f"a crop of {size} px does not fit into a short edge of {short_edge} px")
    image = resize_short_edge(image, short_edge)
    height, width = image.shape[:2]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def resize_short_edge(image: Pixels, short_edge: int) -> Pixels:
    """Resize (H, W, 3) to a short edge of ``short_edge`` px, as torchvision does on PIL images."""
    height, width = image.shape[:2]
    if min(height, width) != short_edge:
        if width <= height:
            width, height = short_edge, short_edge * height // width
        else:
            width, height = short_edge * width // height, short_edge
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized)
    return image


def crop_corners(height: int, width: int, size: int, crops: int) -> list[tuple[int, int]]:
    """Return (top, left) of a frame's test crops: the centre; of three crops, also both ends.

    The ends are the top left and the bottom right corner (authors' code), that is the left and
    right, or top and bottom, end if the frame's short edge is ``size``.

    Raises:
        ValueError: ``size`` exceeds the frame, or there are neither 1 nor 3 crops.
    """
    if size > min(height, width) or crops not in (1, 3):
        raise ValueError(f"{crops} crops of {size} px do not fit into {width} x {height} px")
    centre = (round((height - size) / 2), round((width - size) / 2))
    return [centre, (0, 0), (height - size, width - size)][:crops]


_resize_into = torch.ops.aten._upsample_bilinear2d_aa.out  # F.interpolate has no out=


def crop_resize(image: Pixels, box: Sequence[int], size: int, out: Pixels | None = None) -> Pixels:
    """Crop ``box`` from an (H, W, 3) image and resize it to (size, size, 3).

    Bilinear with antialiasing. Within 1 (of 255) of torchvision's ``resized_crop`` on PIL images,
    and within 0.25 on average: both round intermediate results to 8 bits, at different places.

    Args:
        image: (H, W, 3) uint8.
        box: left, top, width, height, px, inside the image.
        size: S, side of the result in px.
        out: (S, S, 3) contiguous uint8 array to write to; None: allocate one.
    """
    left, top, width, height = box
    result: Pixels = np.empty((size, size, 3), dtype=np.uint8) if out is None else out
    with torch.inference_mode():
        # (1, 3, h, w) over interleaved memory is channels_last, which has torch's fast kernel.
        cut = torch.from_numpy(image[None, top : top + height, left : left + width])
        target = torch.from_numpy(result[None])
        _resize_into(
            cut.permute(0, 3, 1, 2),
            [size, size],
            False,  # align_corners
            None,
            None,
            out=target.permute(0, 3, 1, 2),
        )
    return result
