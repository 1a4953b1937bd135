"""Exact colour: planes of any matrix and range become JPEG's, full-range BT.601.

ffmpeg's own conversion would cost a pass over every frame, those thrown away too, and rounds the
chroma down (mean error -0.5 levels, a visible tint in flat areas). This one runs on the frames
kept and rounds to nearest. It is in whole numbers where it can be: numpy does 8- and 16-bit
arithmetic 32 and 16 values at a time, and a table look-up (bytes.translate) one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray


def encode_jpeg(planes: Planes, quality: int) -> bytes:
    """Encode full-range BT.601 planes as a 4:2:0 JFIF file.

    Args:
        planes: Y ``(H, W)``, U and V ``(H/2, W/2)``, uint8.
        quality: 1 to 100, libjpeg's scale.
    """
    y, u, v = (np.ascontiguousarray(plane) for plane in planes)
    return bytes(simplejpeg.encode_jpeg_yuv_planes(y, u, v, quality=quality))


Planes = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]

# (Kr, Kb) of ITU-T H.273 by ffmpeg's names. All others are BT.601: streams without a matrix (as
# every decoder assumes), and RGB, which the scaler has converted.
_MATRICES = {
    "bt709": (0.2126, 0.0722),
    "fcc": (0.30, 0.11),
    "smpte240m": (0.212, 0.087),
    "bt2020nc": (0.2627, 0.0593),
    "bt2020c": (0.2627, 0.0593),
}
_BT601 = (0.299, 0.114)


def jpeg_planes(
    planes: bytes | NDArray[np.uint8], width: int, height: int, matrix: str, full_range: bool
) -> Planes:
    """Convert planes to full-range BT.601: Y ``(H, W)``, U and V ``(H/2, W/2)``, uint8.

    Args:
        planes: the three planes one after another, as ffmpeg's ``yuv420p``.
        matrix: ffmpeg's name of their matrix, for example ``bt709``.
        full_range: whether black is 0 rather than 16.
    """
    samples = np.frombuffer(planes, np.uint8)
    y, chroma = samples[: width * height], samples[width * height :]
    source = _MATRICES.get(matrix, _BT601)
    if source != _BT601:
        u, v = chroma.reshape(2, height // 2, width // 2)
        return _to_bt601(y.reshape(height, width), u, v, source, full_range)
    if not full_range:
        y, chroma = full_range_luma(y), full_range_chroma(chroma)
    u, v = chroma.reshape(2, height // 2, width // 2)
    return y.reshape(height, width), u, v


def full_range_luma(y: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Map 16 … 235 to 0 … 255, rounded to nearest."""
    return _widened(y, 16, 235, 73, 2, 6)


def full_range_chroma(chroma: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Map 16 … 240 to 0 … 255 around 128, rounded to nearest."""
    return _widened(chroma, 16, 240, 32, 6, 7)


def _widened(
    samples: NDArray[np.uint8], low: int, high: int, every: int, offset: int, divisor: int
) -> NDArray[np.uint8]:
    """Return z + floor((z - floor(z / every) + offset) / divisor) with z = sample - low.

    With luma's numbers this equals round(z 255/219) for every sample, and likewise for chroma's.
    """
    z = np.clip(samples, low, high)
    z -= low
    more = z // every
    np.subtract(z, more, out=more)
    more += offset
    more //= divisor
    more += z
    return more


def _to_bt601(
    y: NDArray[np.uint8],
    u: NDArray[np.uint8],
    v: NDArray[np.uint8],
    source: tuple[float, float],
    full_range: bool,
) -> Planes:
    """Convert planes of another matrix; chroma in floats, luma in 64ths of a level."""
    (y_u, y_v), (u_u, u_v), (v_u, v_v) = _chroma_shares(*source)
    gain, black = (1.0, 0.0) if full_range else (255 / 224, 16 * 255 / 219)
    blue = u.astype(np.float32)
    blue -= 128
    red = v.astype(np.float32)
    red -= 128

    def mixed(of_blue: float, of_red: float, constant: float) -> NDArray[np.float32]:
        mixture: NDArray[np.float32] = blue * np.float32(of_blue)
        mixture += red * np.float32(of_red)
        mixture += np.float32(constant)
        return mixture

    # Each chroma sample covers 2x2 pixels. The constant contains the black level, and half a level
    # because the shift by 6 rounds down; half a 64th of that is left to rint, except in limited
    # range, where luma's own rounding loses about as much.
    constant = 31.5 if full_range else 32 - 64 * black
    shift = np.rint(mixed(64 * gain * y_u, 64 * gain * y_v, constant)).astype(np.int16)
    height, width = y.shape
    spread = np.empty((height // 2, 1, width // 2, 2), np.int16)
    spread[..., 0] = spread[..., 1] = shift[:, None]
    luma = _luma_in_64ths(y, full_range)
    rows = luma.reshape(height // 2, 2, width)
    rows += spread.reshape(height // 2, 1, width)
    luma >>= 6
    np.clip(luma, 0, 255, out=luma)
    return (
        luma.astype(np.uint8),
        _rounded_down(mixed(gain * u_u, gain * u_v, 128.5)),
        _rounded_down(mixed(gain * v_u, gain * v_v, 128.5)),
    )


def _luma_in_64ths(y: NDArray[np.uint8], full_range: bool) -> NDArray[np.int16]:
    if full_range:
        return np.left_shift(y, 6, dtype=np.int16)
    luma = np.multiply(y, 74, dtype=np.int16)  # 64 x 255/219 = 74 + 1/2 + 1/49 (to 0.0001)
    luma += y >> 1
    luma += y // 49
    return luma


def _rounded_down(plane: NDArray[np.float32]) -> NDArray[np.uint8]:
    np.clip(plane, 0, 255, out=plane)
    return plane.astype(np.uint8)


@lru_cache
def _chroma_shares(kr: float, kb: float) -> tuple[tuple[float, float], ...]:
    """Return BT.601's Y, U, V in terms of U and V of the matrix (Kr, Kb); Y adds to its own Y.

    With everything in full range and zero-centred chroma: R - Y = 2(1 - Kr)V, B - Y = 2(1 - Kb)U.
    """
    kr601, kb601 = _BT601
    kg601 = 1 - kr601 - kb601
    r_y = np.array([0.0, 2 * (1 - kr)])  # of (U, V)
    b_y = np.array([2 * (1 - kb), 0.0])
    g_y = -(kr * r_y + kb * b_y) / (1 - kr - kb)
    y = kr601 * r_y + kg601 * g_y + kb601 * b_y
    u = (b_y - y) / (2 * (1 - kb601))
    v = (r_y - y) / (2 * (1 - kr601))
    return tuple((float(row[0]), float(row[1])) for row in (y, u, v))
