"""From the triplet stream to batches of cropped views, in loader processes.

The CPU part of the views (decode, random resized crop to uint8) happens here; the rest on the
training device (``augment.py``). Item number s of the data set is the whole batch of step s, so
batches are the same for any number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seco.augment import ViewConfig, ViewParameters, draw_views
from seco.crop_resize import crop_resize
from seco.crops import BrokenJpeg, FrameDecoder, draw_crop
from seco.stopping import leave_signals_to_parent
from shards.reader import UnreadableFrame
from shards.stream import TripletFrames, TripletStream
from shards.triplets import sample_generator

VIEWS = 4  # query, k1 (of the anchor), k2, k3
_VIEWS_OF_FRAME = ((0, 1), (2,), (3,))  # the anchor is decoded once for two views
_MAX_SUBSTITUTES = 20


@dataclass
class Batch:
    """One step's input."""

    crops: Tensor  # (4, N, 3, S, S) uint8, interleaved in memory as decoded
    views: ViewParameters  # of the 4·N images, view by view
    order: Tensor  # (N,) 0 anchor before, 1 after
    videos: Tensor  # (N,) numbers in the set
    unreadable: list[str]  # why each sample that had to be replaced could not be read

    def pin_memory(self) -> Batch:
        """Called by the DataLoader for faster copies to a GPU."""
        self.crops = self.crops.pin_memory()
        return self


class TripletBatches(Dataset[Batch]):
    """Item s is the batch of global step s, counted over epochs."""

    def __init__(self, stream: TripletStream, crop_size: int, views: ViewConfig) -> None:
        self._stream = stream
        self._size = crop_size
        self._views = views
        self._decoder = FrameDecoder()

    def __getitem__(self, step: int) -> Batch:
        epoch, step_of_epoch = divmod(step, self._stream.steps_per_epoch)
        videos = self._stream.batch_videos(epoch, step_of_epoch)
        crops = np.empty((VIEWS, len(videos), self._size, self._size, 3), dtype=np.uint8)
        orders = np.empty(len(videos), dtype=np.int64)
        used = np.empty(len(videos), dtype=np.int64)
        drawn: list[np.random.Generator] = []
        unreadable: list[str] = []
        for row, video in enumerate(videos):
            sample, rng = self._fill(crops[:, row], epoch, video, unreadable)
            orders[row], used[row] = sample.triplet.order, sample.video
            drawn.append(rng)
        return Batch(
            crops=torch.from_numpy(crops).permute(0, 1, 4, 2, 3),
            views=draw_views(drawn * VIEWS, self._views),
            order=torch.from_numpy(orders),
            videos=torch.from_numpy(used),
            unreadable=unreadable,
        )

    def _fill(
        self, out: np.ndarray, epoch: int, video: int, unreadable: list[str]
    ) -> tuple[TripletFrames, np.random.Generator]:
        """Crop the four views of a video into ``out`` (4, S, S, 3), or those of its substitute."""
        candidate = video
        for attempt in range(_MAX_SUBSTITUTES + 1):
            try:
                sample = self._stream.sample(epoch, candidate)
                rng = sample_generator(self._stream.seed, epoch, sample.key, "views")
                self._crop(out, sample, rng)
                return sample, rng
            except (UnreadableFrame, BrokenJpeg) as error:
                unreadable.append(f"{self._stream.shards.keys[candidate]}: {error}")
                candidate = self._stream.substitute(epoch, video, attempt)
        raise UnreadableFrame(
            f"{_MAX_SUBSTITUTES + 1} videos in a row cannot be read, the last: {unreadable[-1]}"
        )

    def _crop(self, out: np.ndarray, sample: TripletFrames, rng: np.random.Generator) -> None:
        for frame, data in enumerate(sample.jpegs):
            image = self._decoder.decode(data)
            height, width = image.shape[:2]
            for view in _VIEWS_OF_FRAME[frame]:
                box = draw_crop(rng, width, height, self._views.crop_scale, self._views.crop_ratio)
                crop_resize(image, box, self._size, out=out[view])


def batches(
    dataset: TripletBatches, first_step: int, last_step: int, workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """A loader of the batches of steps ``first_step`` … ``last_step`` - 1, in order."""
    return DataLoader(
        dataset,
        sampler=range(first_step, last_step),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_parent if workers else None,
    )
