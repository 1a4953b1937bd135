"""Draw a small labelled dataset of real encoded videos, for where no dataset is at hand.

A class is a pair (pattern of the object, motion of the object); see :data:`CLASSES`. Each clip
shows one patterned object that moves over a drifting, textured background. Motion is visible in
single frames because each frame is exposed over most of its interval (:data:`SHUTTER`), and over
time because positions, angles or sizes differ from frame to frame. ``DropStar`` and ``GrowRings``
(and, less so, ``BounceRings``, which crosses the frame) also show the direction of time.

Nuisances have one distribution for all classes: the four colours, the light, exposure, flicker,
noise, background pattern and drift, object size and place, silhouette (a disc or a hexagon, except
that a star's is a star), frame size, frame rate and codec. The light is a stage light: during a
clip it turns through the hues and swings in contrast and saturation. Colour therefore tells neither
class nor video, and what the frames of one video share, which is what SeCo looks for (paper §4.2),
is pattern, shape and motion. Backgrounds are faint, since the clips of a group share theirs
whatever their class: a strong one would be the easiest sign of a video. What differs among the
videos of a class is kept small for the same reason. The motion itself is not a nuisance: a
star that falls leaves the frame for a while and a growing disc ends large, so brightness statistics
are close to equal among classes, not exactly so.

The layout is UCF101's, so the dataset is read like any copy of UCF101::

    OUT/UCF-101/<Class>/v_<Class>_gNN_cNN.(avi|mp4|webm|mkv|mov)
    OUT/ucfTrainTestlist/classInd.txt, trainlist01.txt, testlist01.txt

As in UCF101, the clips of a group share their surroundings: group NN of every class has the same
background pattern, and the first third of the groups is the test list. This is not a benchmark: its
numbers compare features with one another on this dataset only.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines._ffmpeg import FfmpegError, ffmpeg_binary, kill_running, local_url, run_ffmpeg
from shards.atomic import atomic_path, write_text
from shards.errors import InputError
from shards.progress import progress
from shards.signals import STOPPING, protected_children, unblock

FloatArray = NDArray[np.float32]

SPRITE_PX = 144  # side of the square the object is drawn on before it is moved over the frames
PATTERN_CYCLES = (2.6, 3.4)  # periods of the pattern across the object
PATTERN_SHARPNESS = (2.5, 8.0)  # low: a soft sine; high: hard edges
PATTERN_BALANCE = 0.25  # how far the shares of the two colours may differ from half
FOREGROUND_LUMA = (0.45, 0.55)  # mean of the object's two colours, 0 to 1
FOREGROUND_CONTRAST = (0.50, 0.75)  # luma difference between them
BACKGROUND_LUMA = (0.40, 0.60)  # mean of the background's two colours
# Weak: the clips of a group share their background, whatever the class, so a strong one would be
# the easiest way to tell videos apart, and pre-training would learn nothing else.
BACKGROUND_CONTRAST = (0.0, 0.04)
SATURATION = (0.3, 1.0)  # relative to the most that a colour of that luma can have
SECOND_TEXTURE = (0.0, 0.15)  # strength of the fine grain on the object
BACKGROUND_SLOPE = (1.5, 2.5)  # exponent of the 1/f noise: small is fine-grained
BACKGROUND_STRETCH = (1.0, 4.0)  # length / width of its grains
BACKGROUND_SHARPNESS = (0.6, 3.0)  # small: clouds; large: camouflage with hard edges
SILHOUETTES = (6, 0)  # corners of a polygon; 0: a disc. Stars have their own
STAR_POINTS = (5, 6)
STAR_INNER_RADIUS = (0.42, 0.55)

LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114])


def _f32(values: Any) -> FloatArray:
    return np.asarray(values, np.float32)


def random_colour_pair(
    rng: np.random.Generator, luma: tuple[float, float], contrast: tuple[float, float]
) -> tuple[FloatArray, FloatArray]:
    """Draw two RGB colours in [0, 1] of any hue, with random mean luma and luma difference.

    Returns:
        Two arrays ``(3,)``; which of them is lighter is random.
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
    # The largest tint that keeps every channel in range, so that the luma stays as requested.
    room = np.where(tint > 0, (1.0 - luma) / np.maximum(tint, 1e-6), luma / np.maximum(-tint, 1e-6))
    colour = luma + tint * min(float(room.min()), 1.0) * rng.uniform(*SATURATION)
    return _f32(np.clip(colour, 0.0, 1.0))


def cloud_noise(
    rng: np.random.Generator, height: int, width: int, slope: float, stretch: float
) -> FloatArray:
    """Return Gaussian 1/f noise ``(height, width)``, mean 0 and variance 1, stretched one way."""
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
    """Return the share of the second colour at each pixel: ``(height, width)`` in [0, 1]."""
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
    # x is the star's own radius (see draw_sprite): lines parallel to its outline.
    return _f32(np.sin(k * x + rng.uniform(0, 2 * np.pi)))


PATTERNS: dict[str, Callable[[FloatArray, FloatArray, float, np.random.Generator], FloatArray]] = {
    "checker": _checker,
    "dots": _dots,
    "rings": _rings,
    "star": _nested_stars,
    "stripes": _stripes,
}


def _polygon_radius(x: FloatArray, y: FloatArray, sides: int) -> FloatArray:
    """Return 1 on the outline of a regular polygon inscribed in the unit circle, less inside."""
    sector = 2 * np.pi / sides
    angle = np.mod(np.arctan2(y, x), sector) - sector / 2
    return _f32(np.hypot(x, y) * np.cos(angle) / np.cos(sector / 2))


def _star_radius(x: FloatArray, y: FloatArray, points: int, inner: float) -> FloatArray:
    """Return 1 on the outline of a star with tips on the unit circle, less inside."""
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
    """Draw the object of a clip, on a square of side 2 around its centre.

    Args:
        rng: draws everything except the family.
        pattern: a key of :data:`PATTERNS`; ``"star"`` also fixes the silhouette, which is a disc
            or a polygon for the others.
        colours: the pattern's two colours, ``(3,)`` each.

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


# Class name: (pattern, motion). Names that share a pattern differ only in motion
# (SpinStar/DropStar, SpinChecker/SwingChecker, GrowRings/BounceRings); names that share a motion
# only in pattern (SpinStar/SpinChecker, SwingChecker/SwingStripes). ShakeDots shares neither.
CLASSES: dict[str, tuple[str, str]] = {
    "BounceRings": ("rings", "bounce"),
    "DropStar": ("star", "drop"),
    "GrowRings": ("rings", "grow"),
    "ShakeDots": ("dots", "shake"),
    "SpinChecker": ("checker", "spin"),
    "SpinStar": ("star", "spin"),
    "SwingChecker": ("checker", "swing"),
    "SwingStripes": ("stripes", "swing"),
}

FRAMES_PER_CLIP = (24, 32)  # both included
OBJECT_SIZE = (0.95, 1.30)  # diameter, of the frame's short side
STAR_SIZE = 1.2  # of the other objects' diameter: a star covers less of its circle
SHUTTER = 0.8  # share of the frame interval during which light is gathered
BLUR_SAMPLES = 6  # drawings averaged per exposure
SCENE_PX = 216  # side of the drawn background; a frame and its drift must fit into it
CAMERA_DRIFT_PX = (2.0, 14.0)  # path of the background per clip
EXPOSURE = (0.55, 1.20)
# The light changes colour during a clip, so that a video is not known by its colours.
LIGHT_CONTRAST = (0.50, 1.20)  # least and most, about mid grey
LIGHT_TINT = (0.2, 1.4)  # least and most saturation, relative to the scene's
LIGHT_TURNS = (0.8, 1.6)  # turns through all hues per clip
LIGHT_BEATS = (1.0, 3.0)  # swings of contrast, and of tint, per clip
LIGHT_GRADIENT = (0.0, 0.2)  # how much darker one side of the frame is
FLICKER = (0.0, 0.06)
NOISE = (0.0, 0.02)  # standard deviation of sensor noise, 0 to 1

SPIN_TURNS = (1.3, 2.2)  # per clip
DROP_FALLS = (1.6, 2.6)
SWING_PERIODS = (1.5, 2.5)
SWING_ANGLE = (0.45, 0.65)  # radians to either side, at first
SWING_DAMPING = 0.4  # share of it lost by the end
GROW_RATIO = (3.0, 5.0)  # last diameter over first
GROW_USUAL_AT = 0.70  # when it has the usual size; chosen so that it covers as much as the others
BOUNCES = (2.5, 4.0)
SHAKE_AMPLITUDE = (0.09, 0.17)  # of the frame's short side


class Pose(NamedTuple):
    """Pose of the object: centre, half size and angle.

    ``x`` and ``y`` are in half frame sizes (−1 and 1 are the edges), ``angle`` in radians;
    ``size`` multiplies the object's usual size and ``squash`` its height only.
    """

    x: float
    y: float
    angle: float = 0.0
    size: float = 1.0
    squash: float = 1.0


Motion = Callable[[float], Pose]


def _spin(rng: np.random.Generator) -> Motion:
    x, y = rng.uniform(-0.25, 0.25, 2)
    speed = 2 * np.pi * rng.uniform(*SPIN_TURNS) * rng.choice((-1, 1))
    return lambda t: Pose(x, y, speed * t)


def _drop(rng: np.random.Generator) -> Motion:
    x, tilt = rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)
    falls, start = rng.uniform(*DROP_FALLS), rng.uniform(0.0, 0.4)

    def pose(t: float) -> Pose:
        fallen = (start + falls * t) % 1.0
        return Pose(x, -1.4 + 3.0 * (0.5 * fallen + 0.5 * fallen**2), tilt)

    return pose


def _swing(rng: np.random.Generator) -> Motion:
    pivot, arm = rng.uniform(-0.1, 0.1), rng.uniform(1.0, 1.2)
    reach, phase = rng.uniform(*SWING_ANGLE), rng.uniform(0, 2 * np.pi)
    periods = rng.uniform(*SWING_PERIODS)

    def pose(t: float) -> Pose:
        angle = reach * (1 - SWING_DAMPING * t) * np.sin(2 * np.pi * periods * t + phase)
        return Pose(pivot + arm * np.sin(angle), -1.0 + arm * np.cos(angle), -angle)

    return pose


def _grow(rng: np.random.Generator) -> Motion:
    x, y = rng.uniform(-0.25, 0.25, 2)
    ratio = np.log(rng.uniform(*GROW_RATIO))
    return lambda t: Pose(x, y, 0.0, float(np.exp(ratio * (t - GROW_USUAL_AT))))


def _bounce(rng: np.random.Generator) -> Motion:
    side, phase = rng.choice((-1, 1)), rng.uniform(0, 1)
    bounces, floor = rng.uniform(*BOUNCES), rng.uniform(0.3, 0.6)

    def pose(t: float) -> Pose:
        height = abs(np.sin(np.pi * (bounces * t + phase)))
        return Pose(side * (1.1 * t - 0.55), floor - 1.1 * height, 0.0, 1.0, 0.6 + 0.6 * height)

    return pose


def _shake(rng: np.random.Generator) -> Motion:
    x, y = rng.uniform(-0.25, 0.25, 2)
    reach = 2 * rng.uniform(*SHAKE_AMPLITUDE)
    beats = rng.uniform(5.0, 11.0, 3)
    phases = rng.uniform(0, 2 * np.pi, 3)

    def pose(t: float) -> Pose:
        dx, dy, turn = np.sin(2 * np.pi * beats * t + phases)
        return Pose(x + reach * dx, y + reach * dy, 0.25 * turn)

    return pose


MOTIONS: dict[str, Callable[[np.random.Generator], Motion]] = {
    "bounce": _bounce,
    "drop": _drop,
    "grow": _grow,
    "shake": _shake,
    "spin": _spin,
    "swing": _swing,
}


def render_clip(
    class_name: str,
    *,
    width: int,
    height: int,
    scene: np.random.Generator,
    palette: np.random.Generator,
    take: np.random.Generator,
) -> NDArray[np.uint8]:
    """Render the frames of one clip.

    Args:
        class_name: a key of :data:`CLASSES`.
        width: of a frame, in pixels.
        height: of a frame, in pixels.
        scene: draws the background's pattern, which the clips of a group share in every class.
        palette: draws the four colours, before the camera changes them.
        take: draws the rest: object, motion, camera, light and noise.

    Returns:
        RGB frames ``(T, height, width, 3)``, T in :data:`FRAMES_PER_CLIP`.
    """
    pattern, motion_name = CLASSES[class_name]
    count = int(take.integers(FRAMES_PER_CLIP[0], FRAMES_PER_CLIP[1] + 1))
    colours = random_colour_pair(palette, FOREGROUND_LUMA, FOREGROUND_CONTRAST)
    sprite = draw_sprite(take, pattern, colours)
    half_size_px = 0.5 * take.uniform(*OBJECT_SIZE) * min(width, height)
    half_size_px *= STAR_SIZE if pattern == "star" else 1.0
    motion = MOTIONS[motion_name](take)
    ground = random_colour_pair(palette, BACKGROUND_LUMA, BACKGROUND_CONTRAST)
    backgrounds = _drifting_background(scene, take, ground, count, height, width)
    light = _lighting(take, height, width)
    grades = _stage_light(take, count)
    flicker = 1 + take.uniform(*FLICKER) * take.standard_normal(count)
    noise_level = np.float32(take.uniform(*NOISE))
    frames = np.empty((count, height, width, 3), np.uint8)
    for index in range(count):
        times = (index + SHUTTER * (np.arange(BLUR_SAMPLES) / BLUR_SAMPLES)) / count
        poses = [motion(float(time)) for time in times]
        cover = _expose(sprite, poses, half_size_px, height, width)
        image = backgrounds[index] * (1 - cover[..., 3:]) + cover[..., :3]
        grade, offset = grades[index]
        image = image @ grade + offset
        image *= light * np.float32(flicker[index])
        image += noise_level * take.standard_normal((height, width, 1), np.float32)
        frames[index] = np.clip(image * 255 + 0.5, 0, 255)
    return frames


def _expose(
    sprite: FloatArray, poses: list[Pose], half_size_px: float, height: int, width: int
) -> FloatArray:
    """Draw the object once per pose and average: premultiplied RGBA ``(height, width, 4)``."""
    total = np.zeros((height, width, 4), np.float32)
    texels = sprite.reshape(-1, 4)
    for pose in poses:
        half = half_size_px * pose.size
        tall = half * max(pose.squash, 1.0)
        x0, y0 = (pose.x + 1) * width / 2, (pose.y + 1) * height / 2
        left, right = max(int(x0 - half), 0), min(int(x0 + half) + 2, width)
        top, bottom = max(int(y0 - tall), 0), min(int(y0 + tall) + 2, height)
        if left >= right or top >= bottom:
            continue
        dx = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x0))[None, :]
        dy = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y0))[:, None]
        c, s = np.float32(np.cos(pose.angle) / half), np.float32(np.sin(pose.angle) / half)
        u = c * dx + s * dy
        v = (c * dy - s * dx) * np.float32(1 / pose.squash)
        column = ((u + 1) * (SPRITE_PX / 2)).astype(np.int32)
        row = ((v + 1) * (SPRITE_PX / 2)).astype(np.int32)
        # Texel 0 is outside every silhouette, so points off the sprite read as empty.
        inside = (np.abs(u) < 0.999) & (np.abs(v) < 0.999)
        total[top:bottom, left:right] += texels[np.where(inside, row * SPRITE_PX + column, 0)]
    total /= len(poses)
    return total


def _drifting_background(
    scene: np.random.Generator,
    take: np.random.Generator,
    colours: tuple[FloatArray, FloatArray],
    count: int,
    height: int,
    width: int,
) -> FloatArray:
    """Return frames ``(count, height, width, 3)`` of the scene under a steadily moving camera."""
    # Drawn at one size for all frame sizes, so that a group's clips show the same place.
    share = draw_background(scene, SCENE_PX, SCENE_PX)
    first, second = colours
    way, direction = take.uniform(*CAMERA_DRIFT_PX), take.uniform(0, 2 * np.pi)
    frames = np.empty((count, height, width, 3), np.float32)
    for index in range(count):
        time = index / count - 0.5
        x = (SCENE_PX - width) / 2 + way * time * np.cos(direction)
        y = (SCENE_PX - height) / 2 + way * time * np.sin(direction)
        column, row = int(x), int(y)
        fx, fy = np.float32(x - column), np.float32(y - row)
        patch = share[row : row + height + 1, column : column + width + 1]
        patch = patch[:, :-1] + fx * (patch[:, 1:] - patch[:, :-1])
        patch = patch[:-1] + fy * (patch[1:] - patch[:-1])
        frames[index] = first + patch[..., None] * (second - first)
    return frames


def _stage_light(take: np.random.Generator, count: int) -> list[tuple[FloatArray, FloatArray]]:
    """Return a matrix ``(3, 3)`` and offset ``(3,)`` per frame, for ``rgb @ matrix + offset``."""
    time = np.arange(count) / count
    turn = 2 * np.pi * (take.uniform() + take.choice((-1, 1)) * take.uniform(*LIGHT_TURNS) * time)
    tint, contrast = (
        low + (high - low) * (0.5 + 0.5 * np.sin(2 * np.pi * (take.uniform() + beats * time)))
        for (low, high), beats in zip(
            (LIGHT_TINT, LIGHT_CONTRAST), take.uniform(*LIGHT_BEATS, 2), strict=True
        )
    )
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    grades = []
    for angle, strength, gain in zip(turn, tint, contrast, strict=True):
        c, s = strength * np.cos(angle), strength * np.sin(angle)
        turned = np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
        matrix = gain * np.linalg.inv(to_yiq) @ turned @ to_yiq
        offset = np.full(3, 0.5 - 0.5 * gain, np.float32)
        grades.append((np.asarray(matrix.T, np.float32), offset))
    return grades


def _lighting(take: np.random.Generator, height: int, width: int) -> FloatArray:
    """Return exposure times a gradient of light across the frame: ``(height, width, 1)``."""
    angle, depth = take.uniform(0, 2 * np.pi), take.uniform(*LIGHT_GRADIENT)
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None, :]
    slope = (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2)
    light = take.uniform(*EXPOSURE) * (1 + 0.5 * depth * (slope - 1))
    return np.asarray(light[..., None], np.float32)


CLIPS_PER_GROUP = 3
TEST_SHARE = 1 / 3  # of the groups, the first ones, as in UCF101
# Palettes, used by the groups in turn in every class. Few, so that in pre-training, too, colour
# does not tell the videos apart and the encoder has to look at the content.
PALETTES = 3
FRAMES_PER_SECOND = (25, 30, 24, 15)

# Width and height; most clips have the first.
FRAME_SIZES = ((160, 120), (160, 120), (160, 120), (176, 144), (192, 108), (120, 160), (128, 128))

# Suffix, ffmpeg's name of the container, encoder options. On one thread, all write the same bytes
# for the same pixels (in real-time mode VP8's bytes would depend on the machine's load).
ENCODINGS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (".avi", "avi", ("-c:v", "mpeg4", "-q:v", "3")),
    (".mp4", "mp4", ("-c:v", "libx264", "-preset", "veryfast", "-crf", "20")),
    (".webm", "webm", ("-c:v", "libvpx", "-deadline", "good", "-cpu-used", "5", "-b:v", "1M")),
    (".mkv", "matroska", ("-c:v", "mjpeg", "-q:v", "3")),
    (".mov", "mov", ("-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-g", "8")),
    (
        ".webm",
        "webm",
        ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "1M"),
    ),
)


@dataclass(frozen=True)
class _Clip:
    """One video of the plan: everything except its pixels."""

    class_name: str
    class_index: int
    group: int
    take: int
    width: int
    height: int
    rate: int
    suffix: str
    container: str
    encoder: tuple[str, ...]

    @property
    def listed(self) -> str:
        """Its name in the list files: the path below ``UCF-101/``."""
        stem = f"v_{self.class_name}_g{self.group:02d}_c{self.take:02d}"
        return f"{self.class_name}/{stem}{self.suffix}"


def render_demo_set(
    out: Path, *, clips_per_class: int = 36, seed: int = 0, workers: int | None = None
) -> None:
    """Render and encode the demo dataset below ``out``; the list files are written last.

    The same arguments give byte-identical files with the same ffmpeg and numpy.

    Args:
        out: gets ``UCF-101/`` and ``ucfTrainTestlist/``; clips of an earlier call are replaced.
        clips_per_class: videos per class (there are eight), in groups of three.
        seed: another number gives other videos.
        workers: processes; default: one per usable CPU.

    Raises:
        InputError: fewer than two groups per class (then one list would be empty), ``out`` contains
            other videos or is not writable, or the ffmpeg in use lacks an encoder.
    """
    if seed < 0:
        raise InputError(f"{seed} is negative", "--seed")
    if clips_per_class <= CLIPS_PER_GROUP:
        raise InputError(
            f"{clips_per_class} clips per class leave no group for the test list",
            "clips_per_class",
            f"give at least {CLIPS_PER_GROUP + 1}",
        )
    videos = out / "UCF-101"
    clips = list(_plan(clips_per_class))
    _refuse_other_files(videos, clips)
    workers = workers or _usable_cpus()
    with progress("rendering the demo dataset", len(clips), "videos") as shown:
        if workers == 1:
            for clip in clips:
                _write_clip(clip, videos, seed)
                shown.advance()
        else:
            # Not fork: the caller may have started threads (torch does).
            with (
                protected_children(held_back=True),
                ProcessPoolExecutor(
                    workers, mp_context=get_context("spawn"), initializer=_start_worker
                ) as pool,
            ):
                jobs = [pool.submit(_write_clip, clip, videos, seed) for clip in clips]
                try:
                    for job in as_completed(jobs):
                        job.result()
                        shown.advance()
                except BaseException:
                    drawing = list(pool._processes.values())
                    pool.shutdown(wait=False, cancel_futures=True)
                    # Not at the end of their clips, and of those that already wait for them.
                    for process in drawing:
                        process.terminate()
                    raise
                finally:
                    pool.shutdown()
                    for left in videos.glob("*/*.part"):
                        left.unlink(missing_ok=True)
    _write_lists(out / "ucfTrainTestlist", clips)


def _plan(clips_per_class: int) -> Iterator[_Clip]:
    for class_index, class_name in enumerate(CLASSES):
        for number in range(clips_per_class):
            # By number only: sizes, rates and codecs are the same in every class.
            suffix, container, encoder = ENCODINGS[number % len(ENCODINGS)]
            width, height = FRAME_SIZES[number % len(FRAME_SIZES)]
            yield _Clip(
                class_name=class_name,
                class_index=class_index,
                group=number // CLIPS_PER_GROUP + 1,
                take=number % CLIPS_PER_GROUP + 1,
                width=width,
                height=height,
                rate=FRAMES_PER_SECOND[number % len(FRAMES_PER_SECOND)],
                suffix=suffix,
                container=container,
                encoder=encoder,
            )


def _refuse_other_files(videos: Path, clips: list[_Clip]) -> None:
    expected = {videos / clip.listed for clip in clips}
    for found in sorted(videos.glob("*/*")):
        if found not in expected and found.suffix != ".part":
            raise InputError(
                "the folder contains videos that are not part of this demo dataset",
                found,
                "choose another folder, or remove this one",
            )


def _start_worker() -> None:
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_now)  # the pool's own word
    unblock()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_now(number: int, frame: FrameType | None) -> None:
    kill_running()
    os._exit(1)


def _end_with_parent() -> None:
    """Exit if the parent is killed; otherwise the queue would keep workers waiting."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        kill_running()
        os._exit(1)


def _write_clip(clip: _Clip, videos: Path, seed: int) -> None:
    frames = render_clip(
        clip.class_name,
        width=clip.width,
        height=clip.height,
        scene=np.random.default_rng((seed, 0, clip.group)),
        palette=np.random.default_rng((seed, 2, clip.group % PALETTES)),
        take=np.random.default_rng((seed, 1, clip.class_index, clip.group, clip.take)),
    )
    # Motion JPEG is full range by convention; the others are read as limited range.
    pixels = "yuvj420p" if "mjpeg" in clip.encoder else "yuv420p"
    with atomic_path(videos / clip.listed) as temporary:
        arguments = [
            *("-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"),
            *("-s", f"{clip.width}x{clip.height}", "-r", str(clip.rate), "-i", "pipe:0"),
            *("-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact"),
            *("-map_metadata", "-1", "-pix_fmt", pixels, *clip.encoder),
            *("-f", clip.container, "-y", local_url(temporary)),
        ]
        try:
            run_ffmpeg(arguments, stdin=frames.tobytes())
        except FfmpegError as error:
            raise InputError(
                f"this ffmpeg could not write {clip.suffix} with {clip.encoder[1]} ({error})",
                ffmpeg_binary(),
                "unset SECO_FFMPEG to use imageio-ffmpeg's, which can",
            ) from error


def _write_lists(folder: Path, clips: list[_Clip]) -> None:
    groups = max(clip.group for clip in clips)
    last_test_group = max(1, round(groups * TEST_SHARE))
    names = [f"{index} {name}" for index, name in enumerate(CLASSES, start=1)]
    test = [clip.listed for clip in clips if clip.group <= last_test_group]
    train = [
        f"{clip.listed} {clip.class_index + 1}" for clip in clips if clip.group > last_test_group
    ]
    for name, lines in (("classInd", names), ("trainlist01", train), ("testlist01", test)):
        write_text(folder / f"{name}.txt", "\n".join(lines) + "\n")


def _usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
