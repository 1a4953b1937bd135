"""Batches of training clips, made ahead by loader processes.

A clip is a frame of each segment of a video. Which frames, and how they are changed, depends on
(seed, epoch, video) alone; global batch b of an epoch is positions b·B … of the epoch's order. So
batches are the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from seco.finetune.segments import segment_frames
from seco.loading.forked_loader import forked_loader
from seco.views.crop_resize import crop_resize
from seco.views.crops import CROP_DRAWS, FrameDecoder, draw_crops, jpeg_size
from seco.views.view_parameters import VIEW_DRAWS, ViewConfig, ViewParameters, draw_views
from shards.access import UnreadableFrame, readable
from shards.draws import sample_starts, uniforms
from shards.errors import InputError
from shards.order import EpochOrder, substitute_position
from shards.reader import ShardSet
from shards.stream import rows_of_rank


def clip_views(
    clips: Sequence[Sequence[bytes]],
    starts: NDArray[np.uint64],
    size: int,
    config: ViewConfig,
    decoder: FrameDecoder | None = None,
) -> tuple[Tensor, ViewParameters]:
    """Crop n clips of T frames, each clip by one box, and draw each clip's other changes once.

    Args:
        clips: (n,) the JPEG files of T frames each; a clip's frames are of one size.
        starts: (n,) where each clip's random numbers begin (:func:`shards.draws.sample_starts`).
        size: S, side of a view, px.
        config: how views are drawn.
        decoder: used again by a caller with many clips.

    Returns:
        (n, T, 3, S, S) uint8, and the parameters of the n·T images for
        :func:`seco.views.augment.apply_views`.

    Raises:
        BrokenJpeg: a frame does not decode.
        ValueError: the clips differ in length, or the frames of one in size.
    """
    decoder = decoder or FrameDecoder()
    if len({len(frames) for frames in clips}) > 1:
        raise ValueError(f"clips of {sorted({len(frames) for frames in clips})} frames")
    drawn = uniforms(starts, CROP_DRAWS + VIEW_DRAWS)
    sizes = np.array([jpeg_size(frames[0]) for frames in clips])
    boxes = draw_crops(
        drawn[:, :CROP_DRAWS], sizes[:, 0], sizes[:, 1], config.crop_scale, config.crop_ratio
    )
    crops = np.empty((len(clips), len(clips[0]), size, size, 3), dtype=np.uint8)
    for number, frames in enumerate(clips):
        for place, jpeg in enumerate(frames):
            image = decoder.decode(jpeg)
            if image.shape[1::-1] != tuple(sizes[number]):
                raise ValueError(f"frames of {image.shape[1::-1]} and {tuple(sizes[number])} px")
            crop_resize(image, boxes[number].tolist(), size, out=crops[number, place])
    once = draw_views(drawn[:, CROP_DRAWS:], config)
    repeated = once.select(np.repeat(np.arange(len(clips)), crops.shape[1]))
    return torch.from_numpy(crops).permute(0, 1, 4, 2, 3), repeated


_CHUNK_CLIPS = 8  # at 7 frames of 224 px 8 MB of crops
_MAX_SUBSTITUTES = 20


@dataclass
class ClipBatch:
    """n clips of T frames."""

    images: Tensor  # (n, T, 3, S, S) uint8 crops
    views: ViewParameters  # of the n·T images
    videos: NDArray[np.int64]  # (n,) numbers in the set
    unreadable: list[str] = field(default_factory=list)  # why each replaced video could not be read

    @staticmethod
    def joined(parts: Sequence[ClipBatch]) -> ClipBatch:
        """One batch of one or more parts."""
        return ClipBatch(
            images=torch.cat([part.images for part in parts]),
            views=ViewParameters.joined([part.views for part in parts]),
            videos=np.concatenate([part.videos for part in parts]),
            unreadable=[reason for part in parts for reason in part.unreadable],
        )


class ClipStream:
    """The training clips of a rank, by epoch, step and row.

    Args:
        shards: the set.
        train: numbers of its training videos.
        batch_size: B, the global batch.
        segments: T.
        size: S, side of a view, px.
        views: how they are drawn.
        seed: the run's.
        rank: this process's number of ``world_size`` processes; each takes B / world_size.

    Raises:
        InputError: fewer videos than one batch needs, or B does not divide.
    """

    def __init__(
        self,
        shards: ShardSet,
        train: NDArray[np.int64],
        batch_size: int,
        segments: int,
        size: int,
        views: ViewConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._shards = shards
        self._videos = train
        self._batch_size = batch_size
        self._segments = segments
        self._size = size
        self._views = views
        self._seed = seed
        self.rows = rows_of_rank(batch_size, world_size)
        self._first_row = rank * self.rows
        # Whole global batches; the rest of an epoch is left out and differs every epoch.
        self.steps_per_epoch = len(self._videos) // batch_size
        if not self.steps_per_epoch:
            raise InputError(
                f"{len(self._videos)} training videos do not fill a batch of {batch_size}",
                "--batch-size",
                "lower it or add videos",
            )
        self._decoder = FrameDecoder()

    def read(self, step: int, rows: range) -> ClipBatch:
        """The clips at these rows of this rank's part of a batch.

        Args:
            step: counted over epochs.
            rows: 0 … ``rows`` - 1.

        Raises:
            InputError: one video after another cannot be read.
        """
        epoch, step = divmod(step, self.steps_per_epoch)
        begin = step * self._batch_size
        parts, unreadable = [], []
        for row in rows:
            reason = None
            for attempt in range(_MAX_SUBSTITUTES + 1):
                position = begin + self._first_row + row
                if attempt:
                    place = (attempt - 1) * self._batch_size + self._first_row + row
                    position = substitute_position(
                        place, begin, self._batch_size, len(self._videos)
                    )
                try:
                    parts.append(self._clip(epoch, position))
                    break
                except (UnreadableFrame, ValueError) as error:  # broken, or of two sizes
                    reason = f"{self._key(epoch, position)}: {error}"
                    unreadable.append(reason)
            else:
                raise InputError(
                    f"{len(unreadable)} videos in a row cannot be read, the last: {reason}",
                    "--shards",
                    "are they whole? See `seco verify`",
                )
        batch = ClipBatch.joined(parts)
        batch.unreadable = unreadable
        return batch

    def _clip(self, epoch: int, position: int) -> ClipBatch:
        """One clip, a function of (seed, epoch, video)."""
        video = self._video(epoch, position)
        keys = [self._shards.key(video)]
        drawn = uniforms(sample_starts(self._seed, epoch, keys, "segments"), self._segments)
        (frames,) = segment_frames(drawn, np.array([self._shards.frame_count(video)])).tolist()
        found = self._shards.read_frames([(video, frame) for frame in frames])
        images, views = clip_views(
            [[readable(jpeg) for jpeg in found]],
            sample_starts(self._seed, epoch, keys, "clip views"),
            self._size,
            self._views,
            self._decoder,
        )
        return ClipBatch(images, views, np.array([video]))

    def _video(self, epoch: int, position: int) -> int:
        order = EpochOrder(np.array([len(self._videos)]), self._seed, epoch)
        return int(self._videos[order.at([position])[0]])

    def _key(self, epoch: int, position: int) -> str:
        return self._shards.key(self._video(epoch, position))


class _Chunks(Dataset[ClipBatch | InputError]):
    """Item (step, rows): these clips, or why the run cannot go on."""

    def __init__(self, stream: ClipStream) -> None:
        self._stream = stream

    def __getitem__(self, task: tuple[int, range]) -> ClipBatch | InputError:
        try:
            return self._stream.read(*task)
        except InputError as error:
            return error  # torch would wrap it in a text of its own


def clip_batches(
    stream: ClipStream, first_step: int, last_step: int, workers: int
) -> Generator[ClipBatch, None, None]:
    """This rank's part of the batches of steps ``first_step`` … ``last_step`` - 1, in order.

    Args:
        workers: loader processes; 0: the batches are made when they are asked for.

    Raises:
        InputError: videos cannot be read nor replaced.
    """
    rows = range(stream.rows)
    chunks = [rows[begin : begin + _CHUNK_CLIPS] for begin in rows[::_CHUNK_CLIPS]]
    tasks = ((step, chunk) for step in range(first_step, last_step) for chunk in chunks)
    with forked_loader(_Chunks(stream), lambda: tasks, workers, None) as read:
        for _ in range(first_step, last_step):
            yield ClipBatch.joined([_sound(next(read)) for _ in chunks])


def _sound(chunk: ClipBatch | InputError) -> ClipBatch:
    if isinstance(chunk, InputError):
        raise chunk
    return chunk
