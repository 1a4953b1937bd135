"""JPEG from planes, with libjpeg-turbo: no detour over RGB, no second chroma subsampling."""

from __future__ import annotations

import numpy as np
import simplejpeg

from pipelines._colour import Planes


def encode_jpeg(planes: Planes, quality: int) -> bytes:
    """A 4:2:0 JFIF file of full-range BT.601 planes.

    Args:
        planes: Y ``(H, W)``, U and V ``(H/2, W/2)``, uint8.
        quality: 1 to 100, libjpeg's scale.
    """
    y, u, v = (np.ascontiguousarray(plane) for plane in planes)
    return bytes(simplejpeg.encode_jpeg_yuv_planes(y, u, v, quality=quality))
