"""Batches of exemplar and search crops, made ahead by loader processes.

A pair is a function of (seed, epoch, sequence): which frames, and how much each is stretched and
shifted. Batches are the same for any number of loader processes and of ranks.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from seco.loading.forked_loader import forked_loader
from seco.track.config import EXEMPLAR_PX, SEARCH_PX, TRAIN_SEARCH_PX, TrackTrainConfig
from seco.track.crops import mean_colour, square_crops, target_of
from seco.views.crops import BrokenJpeg, FrameDecoder, Pixels
from shards.draws import below, sample_starts, uniforms
from shards.errors import InputError
from shards.pairs import Box, NoPair, PairFrames, PairSample, PairStream

# Stretch of exemplar and search; shift across and down of the search crop, then of the exemplar.
_DRAWS = 6
# SiamFC cuts the 255 px by 4 on each side and takes a random 239 of what is left; the exemplar is
# the centre of such a crop.
_MARGIN_PX = (SEARCH_PX - TRAIN_SEARCH_PX) // 4
_BATCHES_AHEAD = 2
_MOST_SUBSTITUTES = 20


@dataclass
class PairBatch:
    """One step's pairs on this rank."""

    exemplars: Tensor  # (N, 3, 127, 127) uint8
    searches: Tensor  # (N, 3, 239, 239) uint8
    keys: list[str]  # (N,)
    unreadable: list[str] = field(default_factory=list)  # why a damaged sample was replaced
    unusable: list[str] = field(default_factory=list)  # and one without boxes to train on
    fatal: str | None = None  # the run cannot go on


class PairMaker(Dataset[PairBatch]):
    """Item s: the batch of step s, counted over epochs.

    Args:
        stream: gives the samples of this rank; its epochs are passes over the sequences.
        max_stretch: of the random change of scale.
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
        for row, sample in zip(rows, self._stream.read(epoch, step, rows), strict=True):
            attempt = 0
            while (problem := self._fill(batch, epoch, row, sample)) is not None:
                (batch.unreadable if problem.unreadable else batch.unusable).append(
                    f"{problem.key}: {problem.reason}"
                )
                attempt += 1
                if attempt > _MOST_SUBSTITUTES:
                    batch.fatal = (
                        f"{attempt} sequences in a row cannot be used, the last: "
                        f"{problem.key}: {problem.reason}"
                    )
                    return batch
                sample = self._stream.substitute(epoch, step, row, attempt)
        return batch

    def _fill(self, batch: PairBatch, epoch: int, row: int, sample: PairSample) -> NoPair | None:
        """Write a sample's crops; returns why that is not possible."""
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
    """The square around a target that is trained on.

    As if the exemplar's square of 127 px were stretched by ``scale`` about its centre, and a crop
    of ``size`` px were taken ``moved`` px to the right and down; in one interpolation.

    Returns:
        (3, size, size) uint8.
    """
    target = target_of(box)
    px = target.exemplar_side / EXEMPLAR_PX / scale  # of the frame, for one of the crop
    centre = (target.x + moved[0] * px, target.y + moved[1] * px)
    fill = torch.from_numpy(mean_colour(frame))
    crops = square_crops(torch.from_numpy(frame), centre, [size * px], size, fill)
    return crops[0].round_().clamp_(0, 255).to(torch.uint8)


class PairLoader:
    """Iterates over the batches of steps ``first_step`` … ``last_step`` - 1, in order.

    Args:
        stream: gives the samples of this rank.
        config: of the run.
        first_step: counted over epochs.
        last_step: the one after the last.
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
        """Raises InputError when samples cannot be made nor replaced."""
        ahead = _BATCHES_AHEAD if self._workers else None
        tasks = iter(self._steps)
        with forked_loader(self._maker, lambda: tasks, self._workers, ahead) as batches:
            for step in self._steps:
                self._stream.announce(*divmod(step, self._stream.steps_per_epoch))
                batch = next(batches)
                if batch.fatal:
                    raise InputError(
                        batch.fatal, "--shards", "are they tracking shards? See `seco verify`"
                    )
                yield batch
