"""Whether two videos show the same moving picture: small gray frames, aligned in time.

A feature says what kind of thing a video shows, so videos of one class lie close together, and
under an untrained encoder all do. Here the pixels decide. Frames are shrunk to 16 x 16 gray
values, which re-encoding and resizing hardly change. Two numbers are taken where the videos
overlap best:

* ``appearance``: the mean correlation of frame with frame. A camera that has not moved gives a
  high one for any two clips of it.
* ``motion``: the correlation of what is left when each video's mean frame is taken away, which is
  high only where the same things move at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seco.pages.thumbnails import small_picture

SIDE_PX = 16
MOST_FRAMES = 64
_BOX_PX = (64, 64)  # decoded to this before shrinking: libjpeg's own scaling is coarse
_LEAST_OVERLAP = 0.5  # of the shorter video
_COARSE_SHIFTS = 48
_FINE_SHIFTS = 4  # on each side of the best coarse one
_UNLIKE = 0.6  # appearance below which no shift is tried

# Measured on HMDB51 clips (docs/retrieve.md): of 4,600 pairs of clips from different sources none
# has a motion above 0.49; altered copies with every frame stored have 0.95 or more.
_COPY_APPEARANCE, _COPY_MOTION = 0.95, 0.9
_NEAR_APPEARANCE, _NEAR_MOTION = 0.75, 0.55
_OF_OWN_SMOOTHNESS = 0.95
_STILL_RMS = 1.0  # gray levels (of 255) of motion below which there is only noise to compare
_STILL_APPEARANCE = 0.998

COPY, NEAR = "copy", "near"


@dataclass(frozen=True)
class Fingerprint:
    """A video's frames, small and gray."""

    times: NDArray[np.float64]  # (F,) seconds from the first
    frames: NDArray[np.float32]  # (F, 256), 0 to 255

    def mirrored(self) -> Fingerprint:
        """Left and right exchanged."""
        return Fingerprint(self.times, mirrored(self.frames))

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return float(self.times[-1])


class Match(NamedTuple):
    """How two videos agree where they overlap best."""

    kind: str | None  # "copy", "near", or None: different videos
    mirrored: bool
    appearance: float  # mean correlation of frames, at most 1
    motion: float  # correlation of what changes, at most 1
    shift_seconds: float  # what b shows at a time t, a shows at t + shift

    @property
    def score(self) -> float:
        """To sort by: how sure it is."""
        return self.appearance + self.motion


NO_MATCH = Match(None, False, 0.0, 0.0, 0.0)


def fingerprint(jpegs: Sequence[bytes], times: Sequence[float]) -> Fingerprint | None:
    """Of a video's stored frames and their times in seconds; None if no frame decodes."""
    found = [
        (t, gray) for jpeg, t in zip(jpegs, times, strict=True) if (gray := _gray(jpeg)) is not None
    ]
    if not found:
        return None
    seconds = np.array([t for t, _ in found], dtype=np.float64)
    return Fingerprint(seconds - seconds[0], np.stack([gray for _, gray in found]))


def mirrored(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """(F, 256) frames, left and right exchanged."""
    flipped = frames.reshape(-1, SIDE_PX, SIDE_PX)[:, :, ::-1]
    return flipped.reshape(len(frames), -1)


def picture_vector(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """(256,) the mean of (F, 256) frames, each of them with mean 0 and length 1: to search by."""
    mean: NDArray[np.float32] = _normed(frames).mean(axis=0)
    return mean


def compare(a: Fingerprint, b: Fingerprint) -> Match:
    """Are these the same video, perhaps mirrored, trimmed, resized, encoded again?

    ``copy``: the same frames at the same times. ``near``: as alike as frames stored this far apart
    can tell, or clips of one scene with the same motion.
    """
    matches = [_best_shift(a, b), _best_shift(a, b.mirrored())._replace(mirrored=True)]
    best = max(matches, key=lambda match: match.score)
    return best._replace(kind=_judge(best, a, b))


def _judge(match: Match, a: Fingerprint, b: Fingerprint) -> str | None:
    if min(_motion_rms(a), _motion_rms(b)) < _STILL_RMS or min(len(a.frames), len(b.frames)) < 3:
        return NEAR if match.appearance >= _STILL_APPEARANCE else None
    if match.appearance >= _COPY_APPEARANCE and match.motion >= _COPY_MOTION:
        return COPY
    # Frames of a trimmed copy fall between those of the original. How well these can be told
    # from their neighbours is how well the copy's can.
    expected = _OF_OWN_SMOOTHNESS * min(_smoothness(a), _smoothness(b))
    wanted = min(_COPY_MOTION, max(_NEAR_MOTION, expected))
    alike = match.appearance >= _NEAR_APPEARANCE and match.motion >= wanted
    return NEAR if alike else None


def _best_shift(a: Fingerprint, b: Fingerprint) -> Match:
    """The shift with the highest appearance + motion; coarse steps, then fine ones around it."""
    pairs = _normed(a.frames) @ _normed(b.frames).T  # (Fa, Fb)
    of_shorter = pairs.max(axis=0 if b.seconds <= a.seconds else 1)
    if np.median(of_shorter) < _UNLIKE:
        return NO_MATCH
    shorter = min(a.seconds, b.seconds)
    low, high = _LEAST_OVERLAP * shorter - b.seconds, a.seconds - _LEAST_OVERLAP * shorter
    step = max(_spacing(a), _spacing(b), (high - low) / _COARSE_SHIFTS)
    if step <= 0:  # single frames
        return _agreement(a, b, 0.0)
    before, after = int(-low / step), int(high / step)
    best = max(
        (_agreement(a, b, number * step) for number in range(-before, after + 1)),
        key=lambda match: match.score,
    )
    for finer in (step / _FINE_SHIFTS, step / _FINE_SHIFTS**2):
        around = [best.shift_seconds + n * finer for n in range(-_FINE_SHIFTS, _FINE_SHIFTS + 1)]
        tried = [_agreement(a, b, shift) for shift in around if low <= shift <= high]
        best = max([best, *tried], key=lambda match: match.score)
    return best


def _agreement(a: Fingerprint, b: Fingerprint, shift: float) -> Match:
    """Appearance and motion at the frames of b that fall within a."""
    slack = 1e-6  # times are floats
    inside = (b.times + shift >= -slack) & (b.times + shift <= a.seconds + slack)
    if inside.sum() < min(3, len(a.frames), len(b.frames)):
        return NO_MATCH
    of_b = b.frames[inside]
    of_a = _at(a, b.times[inside] + shift)
    appearance = float((_normed(of_a) * _normed(of_b)).sum(axis=1).mean())
    return Match(None, False, appearance, _correlation(of_a, of_b), shift)


def _at(video: Fingerprint, times: NDArray[np.float64]) -> NDArray[np.float32]:
    """(T, 256) the frames at any times, blended from the two on either side."""
    if len(video.frames) == 1:
        return np.repeat(video.frames, len(times), axis=0)
    left = np.clip(np.searchsorted(video.times, times) - 1, 0, len(video.times) - 2)
    gap = np.maximum(video.times[left + 1] - video.times[left], 1e-9)
    share = np.clip((times - video.times[left]) / gap, 0, 1).astype(np.float32)[:, None]
    blended: NDArray[np.float32] = video.frames[left] * (1 - share) + video.frames[left + 1] * share
    return blended


def _smoothness(video: Fingerprint) -> float:
    """The motion that frames and the means of their two neighbours have in common."""
    if len(video.frames) < 5:
        return 0.0
    between = (video.frames[:-2] + video.frames[2:]) * np.float32(0.5)
    return _correlation(video.frames[1:-1], between)


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Of two (F, 256), their means over time taken away."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = float(np.sqrt((a * a).sum(dtype=np.float64) * (b * b).sum(dtype=np.float64)))
    return float((a * b).sum(dtype=np.float64)) / size if size > 0 else 0.0


def _motion_rms(video: Fingerprint) -> float:
    """Gray levels by which the values differ from their mean over time."""
    moved = video.frames - video.frames.mean(axis=0)
    return float(np.sqrt((moved * moved).mean()))


def _spacing(video: Fingerprint) -> float:
    return float(np.diff(video.times).mean()) if len(video.times) > 1 else 0.0


def _normed(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows with mean 0 and length 1; one gray all over stays 0."""
    centred = frames - frames.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(
        centred, length, out=np.zeros_like(centred), where=length > 1e-3
    )
    return unit


def _gray(jpeg: bytes) -> NDArray[np.float32] | None:
    picture = small_picture(jpeg, _BOX_PX)
    if picture is None:
        return None
    small = picture.convert("L").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1)
