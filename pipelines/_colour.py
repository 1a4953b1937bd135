"""Exact colour: planes of any matrix and range become JPEG's, full-range BT.601.

ffmpeg's own conversion would cost a pass over every frame, those thrown away too, and rounds the
chroma down (mean error -0.5 levels, a visible tint in flat areas). This one runs on the frames
kept and rounds to nearest.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Planes = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]

# (Kr, Kb) of ITU-T H.273, under ffmpeg's names. What is not here is BT.601: streams without a
# matrix are (as every decoder assumes), and RGB has been made so by the scaler.
_MATRICES = {
    "bt709": (0.2126, 0.0722),
    "fcc": (0.30, 0.11),
    "smpte240m": (0.212, 0.087),
    "bt2020nc": (0.2627, 0.0593),
    "bt2020c": (0.2627, 0.0593),
}
_BT601 = (0.299, 0.114)


def jpeg_planes(planes: bytes, width: int, height: int, matrix: str, full_range: bool) -> Planes:
    """Y ``(H, W)``, U and V ``(H/2, W/2)``, uint8, full-range BT.601.

    Args:
        planes: the three planes behind each other, as ffmpeg's ``yuv420p``.
        matrix: ffmpeg's name of the matrix they are in, for example ``bt709``.
        full_range: whether black is 0 rather than 16.
    """
    pixels = width * height
    source = _MATRICES.get(matrix, _BT601)
    y, chroma = planes[:pixels], planes[pixels:]
    if source == _BT601:
        if not full_range:
            y, chroma = y.translate(_expand(16, 219, 0)), chroma.translate(_expand(128, 224, 128))
        return _shaped(y, chroma, width, height)
    luma_gain, chroma_gain = (1.0, 1.0) if full_range else (255 / 219, 255 / 224)
    base = 0.0 if full_range else 16.0 * luma_gain
    y_plane, *chroma_planes = _shaped(y, chroma, width, height)
    blue, red = (
        np.multiply(plane, np.float32(chroma_gain), dtype=np.float32)
        - np.float32(128 * chroma_gain)
        for plane in chroma_planes
    )
    (y_u, y_v), (u_u, u_v), (v_u, v_v) = _to_bt601(*source)
    luma = np.multiply(y_plane, np.float32(luma_gain), dtype=np.float32)
    # Each chroma sample covers 2x2 pixels.
    shift = blue * y_u + red * y_v - np.float32(base)
    luma.reshape(height // 2, 2, width // 2, 2)[...] += shift[:, None, :, None]
    return (
        _rounded(luma),
        _rounded(blue * u_u + red * u_v + np.float32(128)),
        _rounded(blue * v_u + red * v_v + np.float32(128)),
    )


def _shaped(y: bytes, chroma: bytes, width: int, height: int) -> Planes:
    u, v = np.frombuffer(chroma, np.uint8).reshape(2, height // 2, width // 2)
    return np.frombuffer(y, np.uint8).reshape(height, width), u, v


def _rounded(plane: NDArray[np.float32]) -> NDArray[np.uint8]:
    np.rint(plane, out=plane)
    np.clip(plane, 0, 255, out=plane)
    return plane.astype(np.uint8)


@lru_cache
def _expand(zero: int, span: int, becomes: int) -> bytes:
    """A table from limited to full range: ``zero`` becomes ``becomes``, ``span`` steps 255."""
    values = (np.arange(256) - zero) * 255 / span + becomes
    return np.clip(np.rint(values), 0, 255).astype(np.uint8).tobytes()


@lru_cache
def _to_bt601(kr: float, kb: float) -> tuple[tuple[np.float32, np.float32], ...]:
    """How BT.601's Y, U, V follow from U and V of the matrix (Kr, Kb); Y adds to its own Y.

    With all in full range and zero-centred chroma: R - Y = 2(1 - Kr)V, B - Y = 2(1 - Kb)U.
    """
    kr601, kb601 = _BT601
    kg601 = 1 - kr601 - kb601
    r_y = np.array([0.0, 2 * (1 - kr)])  # of (U, V)
    b_y = np.array([2 * (1 - kb), 0.0])
    g_y = -(kr * r_y + kb * b_y) / (1 - kr - kb)
    y = kr601 * r_y + kg601 * g_y + kb601 * b_y
    u = (b_y - y) / (2 * (1 - kb601))
    v = (r_y - y) / (2 * (1 - kr601))
    return tuple((np.float32(row[0]), np.float32(row[1])) for row in (y, u, v))
