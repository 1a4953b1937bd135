"""Sets drawn so that it is known what a proxy task can learn from them, and what it cannot.

A video is a striped carpet with white dots on it. The carpet tells videos apart, the number of
dots tells frames apart, and how this number goes over time says whether the order can be told. All
of it outlasts the views: stripes keep their hue within the jitter's ± 0.1 turn or their direction
and width in gray, a mirror turns diagonals into diagonals, and dots stay countable in any crop.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shards.atomic import write_json
from shards.format import Manifest, VideoRecord
from shards.writer import ShardWriter

FRAMES = 12
SIDE_PX = 40
DOTS_A_SIDE = 5
SWING = 6  # frames of one way up and down; divides FRAMES

HUES = (0.0, 0.25, 0.5, 0.75)  # turns
STRIPE_WAVES = (0.25, 1.0)  # radians a px
STRIPE_ANGLES = (0.0, 0.25, 0.5)  # half turns; their mirror images are among them, or none's
CARPETS = len(HUES) * len(STRIPE_WAVES) * len(STRIPE_ANGLES)

Shares = NDArray[np.float64]
Course = Callable[[int], Shares]  # number of a round of carpets -> (FRAMES,) share of dots shown


def growing(round_: int) -> Shares:
    """From no dot to all: time has a direction."""
    return np.linspace(0, 1, FRAMES)


def sprinkled(round_: int) -> Shares:
    """A few dots come: frames differ, but less than carpets do."""
    return 0.2 * growing(round_)


def still(round_: int) -> Shares:
    """Nothing moves: all frames of a video are the same picture."""
    return np.full(FRAMES, round_ % SWING / (SWING - 1))


def swinging(round_: int) -> Shares:
    """Dots come and go in even turns, from another phase in each of ``SWING`` rounds.

    Over these rounds every frame number shows every share equally often, on every carpet, so no
    picture says when it was taken; and forwards looks like backwards. (The second alone would not
    do: one rise and fall in a video tells its middle from its ends, and k2 is the middle one of
    the three frames exactly when the anchor is before it.) What remains, that k2 is nearer to an
    anchor before it and k3 to one after it, is out of reach of a classifier that is linear in
    three vectors encoded apart.
    """
    phase = (np.arange(FRAMES) + round_) % SWING
    return np.abs(2 * phase / SWING - 1)


def make_learning_set(folder: Path, course: Course, rounds: int = 1) -> str:
    """Write a shard of ``rounds`` videos on each carpet; returns the manifest's path."""
    name = course.__name__
    with ShardWriter(folder / f"{name}-000.tar", "digest") as writer:
        for video in range(rounds * CARPETS):
            round_, carpet = divmod(video, CARPETS)
            record = VideoRecord(
                key=f"video_{video:04d}",
                dataset="drawn",
                source=f"video_{video:04d}.avi",
                label=None,
                label_name=None,
                splits={},
                width=SIDE_PX,
                height=SIDE_PX,
                frame_times=[frame / 25 for frame in range(FRAMES)],
                source_fps=25.0,
                source_frames=FRAMES,
                source_duration=FRAMES / 25,
            )
            writer.add(record, draw_video(carpet, course(round_)))
    assert writer.info is not None
    manifest = Manifest(
        name=name,
        dataset="drawn",
        settings={},
        ffmpeg_version="none",
        label_names=[],
        shards=[writer.info],
        excluded=0,
    )
    write_json(folder / f"{name}.json", manifest.to_dict())
    return str(folder / f"{name}.json")


def draw_video(carpet: int, shares: Shares) -> list[bytes]:
    """JPEGs of frames that show these shares of the dots, which come in the carpet's own order."""
    rng = np.random.default_rng(carpet)
    ground = _draw_carpet(carpet, rng.uniform(0, 2 * np.pi))
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX]
    cell = SIDE_PX / DOTS_A_SIDE
    rows, columns = np.divmod(rng.permutation(DOTS_A_SIDE**2)[:, None, None], DOTS_A_SIDE)
    dots = np.hypot(y - (rows + 0.5) * cell, x - (columns + 0.5) * cell) < 0.4 * cell
    frames = []
    for share in shares:
        shown = dots[: round(share * len(dots))].any(axis=0)  # (SIDE_PX, SIDE_PX)
        picture = np.where(shown[..., None], 240, ground).astype(np.uint8)
        frames.append(simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=90))
    return frames


def _draw_carpet(carpet: int, phase: float) -> NDArray[np.float64]:
    """(SIDE_PX, SIDE_PX, 3): stripes of one hue on black."""
    rest, hue = divmod(carpet, len(HUES))
    angle, wave = divmod(rest, len(STRIPE_WAVES))
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX]
    turned = np.pi * STRIPE_ANGLES[angle]
    along = np.cos(turned) * x + np.sin(turned) * y
    striped = np.sin(STRIPE_WAVES[wave] * along + phase) > 0
    colour = 127 + 120 * np.cos(2 * np.pi * (HUES[hue] + np.arange(3) / 3))
    return striped[..., None] * colour
