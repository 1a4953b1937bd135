"""Decoding, drawing random crops, centre crops. No torch here."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

CROP_SCALE = (0.2, 1.0)  # authors' code; MoCo v2
CROP_RATIO = (3 / 4, 4 / 3)  # torchvision's default
_CROP_ATTEMPTS = 10  # torchvision's, before it takes the centre
_REDUCTIONS = (8, 4, 2)  # libjpeg-turbo's others, 8/3 for example, are slower and no better


class BrokenJpeg(ValueError):
    """The bytes are no JPEG, or one that was cut short or damaged."""


class CropParameters(NamedTuple):
    """A box within an image, in px."""

    left: int
    top: int
    width: int
    height: int


def draw_crop(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
) -> CropParameters:
    """The box of a random resized crop: torchvision's ``RandomResizedCrop.get_params``.

    Args:
        rng: consumed by four numbers an attempt.
        width: of the image, px.
        height: of the image, px.
        scale: range of the box's area, of the image's, uniform.
        ratio: range of width / height, uniform in its logarithm.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return CropParameters(left, top, box_width, box_height)
    return _widest_center(width, height, ratio)


def _widest_center(width: int, height: int, ratio: tuple[float, float]) -> CropParameters:
    """The largest centred box whose ratio is allowed."""
    box_width, box_height = width, height
    if width / height < ratio[0]:
        box_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width = round(height * ratio[1])
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return CropParameters(left, top, box_width, box_height)


def decode_jpeg(data: bytes, min_short_edge: int | None = None) -> Pixels:
    """Decode to (H, W, 3) RGB, accurately (slow integer DCT, smooth chroma).

    Args:
        data: the JPEG file.
        min_short_edge: allow the decoder to drop resolution, which is quicker: the image comes out
            8, 4 or 2 times smaller if its short edge is then still this many px (see
            :func:`edge_for_crops`), and whole if not. Without it always whole.

    Raises:
        BrokenJpeg: the data is no JPEG or is damaged.
    """
    try:
        wanted = _reduced_size(data, min_short_edge) if min_short_edge else {}
        decoded: Pixels = simplejpeg.decode_jpeg(data, **wanted)
    except ValueError as error:
        raise _broken(data, error) from error
    return decoded


class FrameDecoder:
    """Decodes one frame after another, whole, into the same memory.

    A third of the time of a decode into new memory is the kernel's handing out of that memory.
    """

    def __init__(self) -> None:
        self._buffer = np.empty(0, dtype=np.uint8)

    def decode(self, data: bytes) -> Pixels:
        """(H, W, 3) RGB as :func:`decode_jpeg` gives it, valid until the next call.

        Raises:
            BrokenJpeg: the data is no JPEG or is damaged.
        """
        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            if height * width * 3 > len(self._buffer):
                self._buffer = np.empty(height * width * 3, dtype=np.uint8)
            decoded: Pixels = simplejpeg.decode_jpeg(data, buffer=self._buffer)
        except ValueError as error:
            raise _broken(data, error) from error
        return decoded


def _broken(data: bytes, error: ValueError) -> BrokenJpeg:
    return BrokenJpeg(f"broken JPEG of {len(data)} bytes ({error})")


def _reduced_size(data: bytes, min_short_edge: int) -> dict[str, int]:
    """simplejpeg's arguments for the strongest reduction that keeps the short edge."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    for factor in _REDUCTIONS:
        reduced_height, reduced_width = -(-height // factor), -(-width // factor)
        if min(reduced_height, reduced_width) >= min_short_edge:
            return {
                "min_height": reduced_height,
                "min_width": reduced_width,
                "min_factor": factor,
            }
    return {}


def edge_for_crops(
    size: int,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
) -> int:
    """The ``min_short_edge`` at which the smallest crop still has ``size`` px on each side.

    Then decoding at reduced resolution only does, earlier, a part of what the resize would do.
    """
    narrowest = min(ratio[0], 1 / ratio[1])
    return math.ceil(size / math.sqrt(scale[0] * narrowest))


def center_crop(image: Pixels, short_edge: int = 256, size: int = 224) -> Pixels:
    """Resize the short edge, then cut the (size, size, 3) centre out.

    Equal to torchvision's ``Resize(short_edge)`` and ``CenterCrop(size)`` on PIL images.

    Raises:
        ValueError: ``size`` exceeds ``short_edge``.
    """
    if size > short_edge:
        raise ValueError(f"a crop of {size} px does not fit into a short edge of {short_edge} px")
    height, width = image.shape[:2]
    if min(height, width) != short_edge:
        if width <= height:
            width, height = short_edge, short_edge * height // width
        else:
            width, height = short_edge * width // height, short_edge
        image = _resize(image, width, height)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def _resize(image: Pixels, width: int, height: int) -> Pixels:
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)
