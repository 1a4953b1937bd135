"""Pairs of a tracking sequence: an exemplar and, a little later, the frame it is searched in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.dataset import ShardSet
from shards.errors import InputError
from shards.format import VideoRecord
from shards.sampling import sample_starts, uniforms
from shards.storage import UnreadableFrame
from shards.stream import IndexedStream

MIN_FRAMES = 2
DRAWS = 1  # uniform numbers per pair

# SiamFC's conditions on the boxes of training frames.
_MIN_AREA_PX = 20
_SIDE_PX = (20, 500)
_SIDE_OF_IMAGE = (0.01, 0.5)
_ASPECT = (0.25, 4.0)
_LEAST_COVER, _COVER_OF_BEST = 1, 0.3  # of GOT-10k's 0 (hidden) to 8 (fully visible)

Box = tuple[float, float, float, float]  # x, y (the first pixel is 1), w, h; px


@dataclass(frozen=True)
class PairFrames:
    """One sample: the sequence, two JPEG files and the target's box in each."""

    key: str
    video: int  # its number in the dataset
    jpegs: tuple[bytes, bytes]  # exemplar, search
    boxes: tuple[Box, Box]


@dataclass(frozen=True)
class NoPair:
    """Stands for a sample that cannot be made.

    Attributes:
        unreadable: the sample is damaged, rather than of no use for training.
    """

    key: str
    reason: str
    unreadable: bool


PairSample = PairFrames | NoPair


def usable_frames(record: VideoRecord) -> NDArray[np.int64]:
    """Return the numbers of the frames whose boxes can be trained on, increasing.

    SiamFC's conditions: area of 20 px or more, sides of 20 to 500 px and of 1 to 50 % of the
    image's, width / height of 0.25 to 4, cover above 1 and above 30 % of the sequence's best.
    Frames marked as absent are left out.

    Raises:
        ValueError: the boxes are invalid, or the flags do not match them.
    """
    boxes = boxes_of(record)
    frames = len(boxes)
    sides = boxes[:, 2:]
    shares = sides / np.array([max(record.width, 1), max(record.height, 1)])
    aspect = sides[:, 0] / np.maximum(1, sides[:, 1])
    usable = sides.prod(axis=1) >= _MIN_AREA_PX
    for values, (least, most) in ((sides, _SIDE_PX), (shares, _SIDE_OF_IMAGE)):
        usable &= ((values >= least) & (values <= most)).all(axis=1)
    usable &= (aspect >= _ASPECT[0]) & (aspect <= _ASPECT[1])
    if record.cover is not None:
        cover = _flags(record.cover, "cover", frames)
        usable &= cover > max(_LEAST_COVER, _COVER_OF_BEST * cover.max(initial=0))
    if record.absence is not None:
        usable &= _flags(record.absence, "absence", frames) == 0
    return np.flatnonzero(usable)


def boxes_of(record: VideoRecord) -> NDArray[np.float64]:
    """Return (F, 4) boxes x, y, w, h in px, the first pixel being 1; (0, 4) if there are none.

    Raises:
        ValueError: the boxes are invalid.
    """
    try:
        boxes = np.array(record.boxes or [], dtype=np.float64).reshape(len(record.boxes or []), 4)
    except (ValueError, TypeError) as error:
        raise ValueError("boxes that are not x, y, w, h") from error
    if not np.isfinite(boxes).all():
        raise ValueError("boxes that are not finite")
    return boxes


def require_boxes(shards: ShardSet) -> None:
    """Check that the first record has boxes.

    Raises:
        InputError: this is not a tracking dataset.
    """
    try:
        has_boxes = bool(shards.record(0).boxes)
    except UnreadableFrame:
        return  # reported when the frames are read
    if not has_boxes:
        raise InputError(
            "has no boxes", shards.addresses[0], "prepare a tracking dataset such as got10k"
        )


def _flags(values: Any, name: str, frames: int) -> NDArray[np.float64]:
    try:
        flags = np.array(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is not one number per frame") from error
    if flags.shape != (frames,):
        raise ValueError(f"{name} of {flags.size} frames for {frames} boxes")
    return flags


def draw_pair(uniform: float, frames: NDArray[np.int64], max_gap: int) -> tuple[int, int] | None:
    """Draw two of ``frames``, in order, with every allowed pair equally likely.

    Args:
        uniform: a number in [0, 1).
        frames: (n,) increasing.
        max_gap: largest difference between the two.

    Returns:
        None if no two are that close.
    """
    first = np.arange(len(frames))
    # How many frames may follow each one.
    following = np.searchsorted(frames, frames + max_gap, side="right") - first - 1
    ends = np.cumsum(following)
    if not len(ends) or not ends[-1]:
        return None
    chosen = min(int(uniform * ends[-1]), int(ends[-1]) - 1)
    one = int(np.searchsorted(ends, chosen, side="right"))
    other = one + 1 + chosen - int(ends[one] - following[one])
    return int(frames[one]), int(frames[other])


class PairStream(IndexedStream):
    """Batches of pairs from an indexed tracking dataset, by epoch and step.

    Args:
        shards: the dataset; sequences with fewer than 2 stored frames are left out and counted.
        batch_size: B, the global batch.
        seed: the run's seed.
        max_gap: largest distance of exemplar and search, in frames.
        place: ``rank``, ``world_size`` and ``window_shards`` of
            :class:`~shards.stream.IndexedStream`.

    Raises:
        InputError: fewer usable sequences than one batch needs, or B is not divisible by the ranks.
    """

    def __init__(
        self, shards: ShardSet, batch_size: int, seed: int, max_gap: int, **place: Any
    ) -> None:
        super().__init__(shards, batch_size, seed, min_frames=MIN_FRAMES, **place)
        self._max_gap = max_gap

    def read(self, epoch: int, step: int, rows: Sequence[int]) -> list[PairSample]:
        """Return the samples at these rows (0 … ``rows`` - 1) of the per-rank batch."""
        return self._read(epoch, self.positions(step, rows))

    def substitute(self, epoch: int, step: int, row: int, attempt: int) -> PairSample:
        """Return the sample that replaces one that cannot be made."""
        (sample,) = self._read(epoch, [self.substitute_position(step, row, attempt)])
        return sample

    def _read(self, epoch: int, positions: Sequence[int]) -> list[PairSample]:
        """Read samples; each is a function of (seed, epoch, sequence) alone."""
        videos = self.videos(epoch, positions).tolist()
        keys = [self.shards.key(video) for video in videos]
        drawn = uniforms(sample_starts(self.seed, epoch, keys, "pair"), DRAWS)[:, 0]
        records = self.shards.records(videos)
        chosen = [
            self._choose(*row) for row in zip(videos, keys, records, drawn.tolist(), strict=True)
        ]
        pairs = [pair for pair in chosen if not isinstance(pair, NoPair)]
        read = iter(
            self.shards.read_frames([(video, n) for video, frames, _ in pairs for n in frames])
        )
        samples: list[PairSample] = []
        for key, pair in zip(keys, chosen, strict=True):
            if isinstance(pair, NoPair):
                samples.append(pair)
                continue
            exemplar, search = next(read), next(read)
            if isinstance(exemplar, bytes) and isinstance(search, bytes):
                samples.append(PairFrames(key, pair[0], (exemplar, search), pair[2]))
            else:
                reason = exemplar if isinstance(exemplar, UnreadableFrame) else search
                samples.append(NoPair(key, str(reason), unreadable=True))
        return samples

    def _choose(
        self, video: int, key: str, record: VideoRecord | UnreadableFrame, uniform: float
    ) -> NoPair | tuple[int, tuple[int, int], tuple[Box, Box]]:
        """Return (video, its two frames, their boxes), or why there is no pair."""
        if isinstance(record, UnreadableFrame):
            return NoPair(key, str(record), unreadable=True)
        try:
            if len(record.boxes or []) > self.shards.frame_count(video):
                raise ValueError("more boxes than frames")
            pair = draw_pair(uniform, usable_frames(record), self._max_gap)
        except ValueError as error:
            return NoPair(key, str(error), unreadable=True)
        if pair is None or record.boxes is None:
            few = f"no two frames within {self._max_gap} have boxes that can be trained on"
            return NoPair(key, few, unreadable=False)
        one, other = ((*map(float, record.boxes[number]),) for number in pair)
        return video, pair, (one, other)  # type: ignore[return-value]
