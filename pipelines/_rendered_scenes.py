"""The action classes of the demo set and the frames of one clip.

A class is a pair (pattern of the object, motion of the object); see :data:`CLASSES`. These are
drawn scenes, not people: each shows one patterned object that moves over a drifting, textured
background. Motion is visible in single frames because each frame is exposed over most of its
interval (:data:`SHUTTER`), and over time because positions, angles or sizes differ from frame to
frame. ``DropStar`` and ``GrowRings`` (and, less so, ``BounceRings``, which crosses the frame) also
show time's direction.

Nuisances have one distribution for all classes: the four colours, the light, exposure, flicker,
noise, background pattern and drift, object size and place, and the frame size, frame rate and codec
(``_rendered.py``). The light is a stage light: while a clip plays it turns through the hues and
swings in contrast and saturation. Colour therefore tells neither the class nor the video, and what
the frames of one video share, which is what SeCo looks for (paper §4.2), is pattern, shape and
motion. Backgrounds are faint, since the clips of a group share theirs whatever their class: a
strong one would be the easiest sign of a video, and pre-training would learn nothing else.

The motion itself is not a nuisance: a star that falls leaves the frame for a while, a growing disc
ends large, so brightness statistics are close to equal among classes, not exactly so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines._rendered_textures import (
    BACKGROUND_CONTRAST,
    BACKGROUND_LUMA,
    FOREGROUND_CONTRAST,
    FOREGROUND_LUMA,
    SPRITE_PX,
    FloatArray,
    draw_background,
    draw_sprite,
    random_colour_pair,
)

# Class name: (pattern, motion). Two names that share a pattern differ in motion alone
# (SpinStar/DropStar, SpinChecker/SwingChecker, GrowRings/BounceRings), and two that share a motion
# in pattern alone (SpinStar/SpinChecker, SwingChecker/SwingStripes). ShakeDots shares neither.
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
BLUR_SAMPLES = 6  # drawings that are averaged to one exposure
SCENE_PX = 216  # side of the drawn background; a frame and its drift must fit into it
CAMERA_DRIFT_PX = (2.0, 14.0)  # way of the background over the clip
EXPOSURE = (0.55, 1.20)
# The light on every scene changes its colour while it plays: a video is not known by its colours.
LIGHT_CONTRAST = (0.50, 1.20)  # least and most, about mid grey
LIGHT_TINT = (0.2, 1.4)  # least and most saturation, of what the scene has
LIGHT_TURNS = (0.8, 1.6)  # turns of all hues over the clip
LIGHT_BEATS = (1.0, 3.0)  # swings of contrast, and of tint, over the clip
LIGHT_GRADIENT = (0.0, 0.2)  # how much darker one side of the frame is
FLICKER = (0.0, 0.06)
NOISE = (0.0, 0.02)  # standard deviation of sensor noise, of 1

SPIN_TURNS = (1.3, 2.2)  # over the clip
DROP_FALLS = (1.6, 2.6)
SWING_PERIODS = (1.5, 2.5)
SWING_ANGLE = (0.45, 0.65)  # radians to either side, at first
SWING_DAMPING = 0.4  # share of it that is lost by the end
GROW_RATIO = (3.0, 5.0)  # last diameter over first
GROW_USUAL_AT = 0.70  # when it has the usual size; chosen so that it covers as much as others
BOUNCES = (2.5, 4.0)
SHAKE_AMPLITUDE = (0.09, 0.17)  # of the frame's short side


class Pose(NamedTuple):
    """Where the object is: centre, half size and angle.

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
    """The frames of one clip.

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
    """The object drawn once a pose, averaged: premultiplied RGBA ``(height, width, 4)``."""
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
        # Texel 0 is outside every silhouette, so what lies off the sprite reads as empty.
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
    """Frames ``(count, height, width, 3)`` of the scene under a camera that moves steadily."""
    # Drawn at one size whatever the frame's, so that a group's clips show the same place.
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
    """For each frame a matrix ``(3, 3)`` and offset ``(3,)``: ``rgb @ matrix + offset`` is seen."""
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
    """Exposure times a slope of light across the frame: ``(height, width, 1)``."""
    angle, depth = take.uniform(0, 2 * np.pi), take.uniform(*LIGHT_GRADIENT)
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None, :]
    slope = (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2)
    light = take.uniform(*EXPOSURE) * (1 + 0.5 * depth * (slope - 1))
    return np.asarray(light[..., None], np.float32)
