"""Exemplar and search crops for SiamFC: squares around a target, and batches of pairs.

Boxes are (x, y, w, h) in px as the datasets have them: the first pixel is 1. Outside the image a
crop has the image's mean colour. A pair is a function of (seed, epoch, sequence): which frames, and
how far each is stretched and shifted. Batches are the same for any number of workers and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from seco.config import CONTEXT, EXEMPLAR_PX, SEARCH_PX, TRAIN_SEARCH_PX, TrackTrainConfig
from seco.data.crops import BrokenJpeg, FrameDecoder, Pixels
from seco.data.loader import forked_loader
from shards.errors import InputError
from shards.pairs import Box, NoPair, PairFrames, PairSample, PairStream
from shards.sampling import below, sample_starts, uniforms
from shards.storage import UnreadableFrame
from shards.stream import NothingToRead, first_readable


class Target(NamedTuple):
    """Centre and size of a box, px; the centre of the first pixel is 0."""

    x: float
    y: float
    width: float
    height: float

    @property
    def exemplar_side(self) -> float:
        """Side of the square with context, px: sqrt((w + c)(h + c)) with c = (w + h) / 2."""
        context = CONTEXT * (self.width + self.height)
        return math.sqrt((self.width + context) * (self.height + context))


def target_of(box: Sequence[float]) -> Target:
    """Convert a box (x, y, w, h), whose first pixel is 1, to a target."""
    x, y, width, height = (float(number) for number in box)
    return Target(x - 1 + (width - 1) / 2, y - 1 + (height - 1) / 2, width, height)


def box_of(target: Target) -> NDArray[np.float64]:
    """Convert a target to a box (4,) x, y, w, h, whose first pixel is 1."""
    x, y, width, height = target
    return np.array([x + 1 - (width - 1) / 2, y + 1 - (height - 1) / 2, width, height])


def mean_colour(frame: Pixels) -> NDArray[np.float32]:
    """Mean colour (3,) of an (H, W, 3) image."""
    height, width = frame.shape[:2]
    columns = frame.reshape(height, width * 3).sum(0, dtype=np.uint32)  # exact to 16 million rows
    totals = columns.reshape(width, 3).sum(0, dtype=np.float64)
    mean: NDArray[np.float32] = (totals / (height * width)).astype(np.float32)
    return mean


def square_crops(
    frame: Tensor, centre: tuple[float, float], sides: Sequence[float], size: int, fill: Tensor
) -> Tensor:
    """Crop and resize squares around one centre of a frame.

    Pixel u of a crop samples the frame at ``centre + ((u + 1/2) / size - 1/2) · side``, bilinearly.
    The frame is padded with ``fill`` without limit: a square may lie partly or entirely outside, or
    be smaller than a pixel. If even the smallest square is at least twice as large as its crop,
    pixels are first averaged over k × k against aliasing, k = ⌊side / size⌋, counted from the
    corner of the region that is read.

    Args:
        frame: (H, W, 3) uint8, on any device.
        centre: x and y, px; the centre of the first pixel is 0.
        sides: (n,) sides of the squares, px, above 0.
        size: S, side of the crops.
        fill: (3,) float32, on the frame's device.

    Returns:
        (n, 3, S, S) float32 in 0 … 255, on the frame's device.
    """
    height, width = frame.shape[:2]
    factor = max(1, int(min(sides) / size))
    reach = max(sides) / 2 + 3 * factor  # the last block may be incomplete; it is never sampled
    left, right = _span(centre[0], reach, width)
    top, bottom = _span(centre[1], reach, height)
    if left == right or top == bottom:
        return fill.view(1, 3, 1, 1).expand(len(sides), 3, size, size).clone()
    # Zero now means the fill, also where grid_sample pads.
    patch = frame[top:bottom, left:right].permute(2, 0, 1).float() - fill.view(3, 1, 1)
    if factor > 1:
        more = (-patch.shape[2] % factor, -patch.shape[1] % factor)
        patch = F.avg_pool2d(F.pad(patch, (0, more[0], 0, more[1])), factor)
    steps = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    scaled = torch.tensor(list(sides), dtype=torch.float64)[:, None] * steps  # (n, S)
    grid = torch.empty(len(sides), size, size, 2)
    grid[..., 0] = _places(centre[0] + scaled, left, factor, patch.shape[2])[:, None, :]
    grid[..., 1] = _places(centre[1] + scaled, top, factor, patch.shape[1])[:, :, None]
    crops = F.grid_sample(
        patch.expand(len(sides), *patch.shape),
        grid.to(frame.device, non_blocking=True),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return crops.add_(fill.view(1, 3, 1, 1))


def _span(centre: float, reach: float, size: int) -> tuple[int, int]:
    """Range of pixels of ``centre`` ± ``reach`` within the frame: first, and one past the last."""
    first = min(max(0, math.floor(centre - reach)), size)
    return first, max(first, min(size, math.ceil(centre + reach) + 1))


def _places(at: Tensor, first: int, factor: int, cells: int) -> Tensor:
    """Convert frame px to grid_sample coordinates on cells of ``factor`` px from ``first`` on."""
    return (2 * ((at - first - (factor - 1) / 2) / factor) + 1) / cells - 1


# Stretch of exemplar and search; shift across and down of the search crop, then of the exemplar.
_DRAWS = 6
# SiamFC trims the 255 px by 4 on each side and takes a random 239 of the rest; the exemplar is the
# centre of such a crop.
_MARGIN_PX = (SEARCH_PX - TRAIN_SEARCH_PX) // 4
_BATCHES_AHEAD = 2


@dataclass
class PairBatch:
    """One step's pairs on this rank."""

    exemplars: Tensor  # (N, 3, 127, 127) uint8
    searches: Tensor  # (N, 3, 239, 239) uint8
    keys: list[str]  # (N,)
    unreadable: list[str] = field(default_factory=list)  # one reason per damaged, replaced sample
    unusable: list[str] = field(default_factory=list)  # and per replaced sample without boxes
    fatal: str | None = None  # error that ends the run


class _Unusable(UnreadableFrame):
    """Nothing is damaged, but no two frames have boxes to train on."""


class PairMaker(Dataset[PairBatch]):
    """Item s: the batch of step s, counted across epochs.

    Args:
        stream: the samples of this rank; its epochs are passes over the sequences.
        max_stretch: largest random change of scale.
    """

    def __init__(self, stream: PairStream, max_stretch: float) -> None:
        self._stream = stream
        self._max_stretch = max_stretch
        self._decoder = FrameDecoder()

    def __getitem__(self, step: int) -> PairBatch:
        epoch, step = divmod(step, self._stream.steps_per_epoch)
        rows = range(self._stream.rows)
        batch = PairBatch(
            exemplars=torch.empty(len(rows), 3, EXEMPLAR_PX, EXEMPLAR_PX, dtype=torch.uint8),
            searches=torch.empty(len(rows), 3, TRAIN_SEARCH_PX, TRAIN_SEARCH_PX, dtype=torch.uint8),
            keys=[],
        )
        samples = self._stream.read(epoch, step, rows)

        def note(error: UnreadableFrame) -> None:
            (batch.unusable if isinstance(error, _Unusable) else batch.unreadable).append(
                str(error)
            )

        for row in rows:

            def fill(attempt: int, row: int = row) -> None:
                sample = samples[row]
                if attempt:
                    sample = self._stream.substitute(epoch, step, row, attempt)
                problem = self._fill(batch, epoch, row, sample)
                if problem is not None:
                    kind = UnreadableFrame if problem.unreadable else _Unusable
                    raise kind(f"{problem.key}: {problem.reason}")

            try:
                first_readable(fill, note, "sequences in a row cannot be used")
            except NothingToRead as error:
                batch.fatal = str(error)
                break
        return batch

    def _fill(self, batch: PairBatch, epoch: int, row: int, sample: PairSample) -> NoPair | None:
        """Write a sample's crops; returns the problem if there is one."""
        if isinstance(sample, NoPair):
            return sample
        starts = sample_starts(self._stream.seed, epoch, [sample.key], "pair-crops")
        drawn = uniforms(starts, _DRAWS)[0]
        try:
            exemplar, search = self._crops(sample, drawn)
        except BrokenJpeg as error:
            return NoPair(sample.key, str(error), unreadable=True)
        batch.exemplars[row], batch.searches[row] = exemplar, search
        batch.keys.append(sample.key)
        return None

    def _crops(self, sample: PairFrames, drawn: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        scales = 1 + self._max_stretch * (2 * drawn[:2] - 1)
        shifts = below(drawn[2:], 2 * _MARGIN_PX + 1).reshape(2, 2) - _MARGIN_PX
        crops = []
        for jpeg, box, scale, size, moved in zip(
            sample.jpegs,
            sample.boxes,
            scales.tolist(),
            (EXEMPLAR_PX, TRAIN_SEARCH_PX),
            shifts[::-1].tolist(),
            strict=True,
        ):
            frame = self._decoder.decode(jpeg)
            crops.append(training_crop(frame, box, size, scale, moved))
        return crops[0], crops[1]


def training_crop(
    frame: Pixels, box: Box, size: int, scale: float, moved: Sequence[int] = (0, 0)
) -> Tensor:
    """Crop the square around a target for training.

    Equivalent to stretching the exemplar's square of 127 px by ``scale`` about its centre and
    cropping ``size`` px, ``moved`` px to the right and down, but in one interpolation.

    Returns:
        (3, size, size) uint8.
    """
    target = target_of(box)
    px = target.exemplar_side / EXEMPLAR_PX / scale  # frame px per crop px
    centre = (target.x + moved[0] * px, target.y + moved[1] * px)
    fill = torch.from_numpy(mean_colour(frame))
    crops = square_crops(torch.from_numpy(frame), centre, [size * px], size, fill)
    return crops[0].round_().clamp_(0, 255).to(torch.uint8)


class PairLoader:
    """Iterates over the batches of steps ``first_step`` … ``last_step`` - 1, in order.

    Args:
        stream: the samples of this rank.
        config: of the run.
        first_step: counted across epochs.
        last_step: step after the last.
    """

    def __init__(
        self,
        stream: PairStream,
        config: TrackTrainConfig,
        *,
        workers: int,
        first_step: int,
        last_step: int,
    ) -> None:
        self._stream = stream
        self._steps = range(first_step, last_step)
        self._maker = PairMaker(stream, config.max_stretch)
        self._workers = workers

    def __iter__(self) -> Generator[PairBatch, None, None]:
        """Yield the batches; raises InputError if samples can be neither made nor replaced."""
        ahead = _BATCHES_AHEAD if self._workers else None
        tasks = iter(self._steps)
        with forked_loader(self._maker, lambda: tasks, self._workers, ahead) as batches:
            for step in self._steps:
                self._stream.prefetch(*divmod(step, self._stream.steps_per_epoch))
                batch = next(batches)
                if batch.fatal:
                    raise InputError(
                        batch.fatal,
                        "--shards",
                        "give tracking shards, and check them with `seco verify`",
                    )
                yield batch
