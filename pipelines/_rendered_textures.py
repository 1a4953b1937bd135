"""Colours, backgrounds and the patterned object ("sprite") of one rendered clip.

Everything that is drawn at random here except the pattern's family has the same distribution in
every class: colours, contrast, frequencies, phases, the fine second texture and the background. The
silhouette is a disc or a hexagon, but a star's is a star. A class can therefore not be told by
colour. What differs among the videos of a class is kept small, so that the class is most of what
tells videos apart: that alone is what pre-training looks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

SPRITE_PX = 144  # side of the square the object is drawn on before it is moved over the frames
PATTERN_CYCLES = (2.6, 3.4)  # periods of the pattern across the object
PATTERN_SHARPNESS = (2.5, 8.0)  # low: a soft sine; high: hard edges
PATTERN_BALANCE = 0.25  # how far the share of the two colours may lean to one of them
FOREGROUND_LUMA = (0.45, 0.55)  # mean of the object's two colours, of 1
FOREGROUND_CONTRAST = (0.50, 0.75)  # luma between them
BACKGROUND_LUMA = (0.40, 0.60)  # mean of the background's two
# Weak: the clips of a group share their background, whatever the class, so a strong one would be
# the easiest way to tell videos apart, and pre-training would learn nothing else.
BACKGROUND_CONTRAST = (0.0, 0.04)
SATURATION = (0.3, 1.0)  # of the most that a colour of the luma can have
SECOND_TEXTURE = (0.0, 0.15)  # strength of the fine grain on the object
BACKGROUND_SLOPE = (1.5, 2.5)  # exponent of the 1/f noise: small is fine-grained
BACKGROUND_STRETCH = (1.0, 4.0)  # how much longer than wide its grains are
BACKGROUND_SHARPNESS = (0.6, 3.0)  # small: clouds; large: camouflage with hard edges
SILHOUETTES = (6, 0)  # corners of a polygon; 0: a disc. All but a star's
STAR_POINTS = (5, 6)
STAR_INNER_RADIUS = (0.42, 0.55)

LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114])


def _f32(values: Any) -> FloatArray:
    return np.asarray(values, np.float32)


def random_colour_pair(
    rng: np.random.Generator, luma: tuple[float, float], contrast: tuple[float, float]
) -> tuple[FloatArray, FloatArray]:
    """Two RGB colours in [0, 1] of any hue; their mean luma and its difference are drawn.

    Returns:
        Two arrays ``(3,)``; which of them is the lighter is random.
    """
    difference = rng.uniform(*contrast)
    middle = np.clip(rng.uniform(*luma), 0.5 * difference, 1 - 0.5 * difference)
    sign = rng.choice((-0.5, 0.5))
    first, second = (
        _colour_of_luma(rng, middle + sign * difference),
        _colour_of_luma(rng, middle - sign * difference),
    )
    return first, second


def _colour_of_luma(rng: np.random.Generator, luma: float) -> FloatArray:
    tint = rng.uniform(-1.0, 1.0, 3)
    tint -= tint @ LUMA_WEIGHTS
    # The largest tint that keeps every channel in range, so that the luma stays what was asked.
    room = np.where(tint > 0, (1.0 - luma) / np.maximum(tint, 1e-6), luma / np.maximum(-tint, 1e-6))
    colour = luma + tint * min(float(room.min()), 1.0) * rng.uniform(*SATURATION)
    return _f32(np.clip(colour, 0.0, 1.0))


def cloud_noise(
    rng: np.random.Generator, height: int, width: int, slope: float, stretch: float
) -> FloatArray:
    """Gaussian 1/f noise ``(height, width)``, zero mean and unit variance, stretched one way."""
    angle = rng.uniform(0.0, np.pi)
    fy = np.fft.fftfreq(height)[:, None]
    fx = np.fft.rfftfreq(width)[None, :]
    along = fx * np.cos(angle) + fy * np.sin(angle)
    across = -fx * np.sin(angle) + fy * np.cos(angle)
    frequency = np.hypot(along * stretch, across)
    frequency[0, 0] = 1.0
    # Frequencies below 1/48 px would be a second lighting gradient rather than a texture.
    spectrum = np.maximum(frequency, 1 / 48) ** -slope
    spectrum[0, 0] = 0.0
    white = np.fft.rfft2(rng.standard_normal((height, width)))
    noise = np.fft.irfft2(white * spectrum, s=(height, width))
    return _f32(noise / noise.std())


def draw_background(rng: np.random.Generator, height: int, width: int) -> FloatArray:
    """How much of the second colour each pixel has: ``(height, width)`` in [0, 1]."""
    noise = cloud_noise(
        rng, height, width, rng.uniform(*BACKGROUND_SLOPE), rng.uniform(*BACKGROUND_STRETCH)
    )
    sharpness = np.exp(rng.uniform(*np.log(BACKGROUND_SHARPNESS)))
    return _two_tone(_f32(noise - rng.uniform(-0.4, 0.4)), sharpness)


def _two_tone(wave: FloatArray, sharpness: float) -> FloatArray:
    return _f32(0.5 + 0.5 * np.tanh(sharpness * wave))


def _stripes(x: FloatArray, y: FloatArray, k: float, rng: np.random.Generator) -> FloatArray:
    return _f32(np.sin(k * x + rng.uniform(0, 2 * np.pi)))


def _checker(x: FloatArray, y: FloatArray, k: float, rng: np.random.Generator) -> FloatArray:
    phase_x, phase_y = rng.uniform(0, 2 * np.pi, 2)
    # Less than k: a checker's diagonal neighbours make it look finer than stripes of the same k.
    return _f32(1.6 * np.sin(0.8 * k * x + phase_x) * np.sin(0.8 * k * y + phase_y))


def _rings(x: FloatArray, y: FloatArray, k: float, rng: np.random.Generator) -> FloatArray:
    return _f32(np.sin(k * np.hypot(x, y) + rng.uniform(0, 2 * np.pi)))


def _dots(x: FloatArray, y: FloatArray, k: float, rng: np.random.Generator) -> FloatArray:
    phase_x, phase_y = rng.uniform(0, 2 * np.pi, 2)
    return _f32(1.2 * (np.cos(k * x + phase_x) + np.cos(k * y + phase_y) - 0.35))


def _nested_stars(x: FloatArray, y: FloatArray, k: float, rng: np.random.Generator) -> FloatArray:
    # The caller gives the star's own radius in x (see draw_sprite): lines parallel to its outline.
    return _f32(np.sin(k * x + rng.uniform(0, 2 * np.pi)))


PATTERNS: dict[str, Callable[[FloatArray, FloatArray, float, np.random.Generator], FloatArray]] = {
    "checker": _checker,
    "dots": _dots,
    "rings": _rings,
    "star": _nested_stars,
    "stripes": _stripes,
}


def _polygon_radius(x: FloatArray, y: FloatArray, sides: int) -> FloatArray:
    """1 on the outline of a regular polygon inscribed in the unit circle, less inside."""
    sector = 2 * np.pi / sides
    angle = np.mod(np.arctan2(y, x), sector) - sector / 2
    return _f32(np.hypot(x, y) * np.cos(angle) / np.cos(sector / 2))


def _star_radius(x: FloatArray, y: FloatArray, points: int, inner: float) -> FloatArray:
    """1 on the outline of a star with tips on the unit circle, less inside."""
    sector = 2 * np.pi / points
    angle = np.abs(np.mod(np.arctan2(y, x), sector) - sector / 2)
    radius = np.hypot(x, y)
    # Half a tip is a triangle: the outline is the line from the tip to the inner corner.
    tip = (np.cos(sector / 2), np.sin(sector / 2))
    corner = (inner, 0.0)
    normal = (tip[1] - corner[1], corner[0] - tip[0])
    offset = normal[0] * tip[0] + normal[1] * tip[1]
    along = radius * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1])
    return _f32(along / offset)


def draw_sprite(
    rng: np.random.Generator, pattern: str, colours: tuple[FloatArray, FloatArray]
) -> FloatArray:
    """The object of a clip, on a square of side 2 around its centre.

    Args:
        rng: draws everything except the family.
        pattern: a key of :data:`PATTERNS`; ``"star"`` also fixes the silhouette, which is a disc
            or a polygon for the others.
        colours: the pattern's two, ``(3,)`` each.

    Returns:
        Premultiplied RGBA ``(SPRITE_PX, SPRITE_PX, 4)`` in [0, 1].
    """
    axis = np.linspace(-1, 1, SPRITE_PX, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    turn = rng.uniform(0, 2 * np.pi)
    c, s = np.cos(turn), np.sin(turn)
    turned_x, turned_y = _f32(c * x + s * y), _f32(c * y - s * x)
    points, inner = int(rng.choice(STAR_POINTS)), rng.uniform(*STAR_INNER_RADIUS)
    sides = int(rng.choice(SILHOUETTES))
    if pattern == "star":
        radius = _star_radius(x, y, points, inner)
        turned_x = radius
    elif sides:
        radius = _polygon_radius(x, y, sides)
    else:
        radius = _f32(np.hypot(x, y))
    wave = PATTERNS[pattern](turned_x, turned_y, np.pi * rng.uniform(*PATTERN_CYCLES), rng)
    wave = _f32(wave + rng.uniform(-PATTERN_BALANCE, PATTERN_BALANCE))
    share = _two_tone(wave, rng.uniform(*PATTERN_SHARPNESS))[..., None]
    first, second = colours
    colour = first + share * (second - first)
    grain = cloud_noise(rng, SPRITE_PX, SPRITE_PX, rng.uniform(0.5, 1.5), 1.0)[..., None]
    colour = np.clip(colour * (1 + 0.5 * rng.uniform(*SECOND_TEXTURE) * grain), 0, 1)
    # The outline is softened over about two pixels of the sprite.
    alpha = np.clip((1 - radius) * (SPRITE_PX / 4), 0, 1)[..., None]
    return _f32(np.concatenate([colour * alpha, alpha], axis=-1))
