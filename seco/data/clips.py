"""Training clips for fine-tuning: which frames, how they change, and batches of them.

A clip is one frame from each segment of a video. Which frames, and how they are augmented, depends
on (seed, epoch, video) alone; global batch b of an epoch is positions b·B … (b+1)·B-1 of its order.
So batches are the same for any number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from seco.data.crops import CROP_DRAWS, FrameDecoder, crop_resize, draw_crops, jpeg_size
from seco.data.loader import forked_loader
from seco.data.splits import choose_split, labelled_rows, no_rows
from seco.data.transforms import VIEW_DRAWS, ViewConfig, ViewParameters, draw_views
from shards.dataset import ShardSet
from shards.errors import InputError
from shards.opening import open_shards
from shards.sampling import EpochOrder, below, sample_starts, substitute_position, uniforms
from shards.storage import UnreadableFrame, readable
from shards.stream import NothingToRead, first_readable, rows_of_rank

Integers = NDArray[np.int64]


def segment_frames(uniform: NDArray[np.float64], counts: Integers) -> Integers:
    """Draw a random frame from each of T equal segments.

    A segment has ``count // T`` frames, so the last few frames of a video belong to none. A video
    with fewer than T frames gives T evenly spaced ones, some of them more than once.

    Args:
        uniform: (n, T) numbers in [0, 1).
        counts: (n,) stored frames per video.

    Returns:
        (n, T) frame numbers in time order.
    """
    segments = uniform.shape[1]
    length = counts // segments
    number = np.arange(segments)
    inside = below(uniform, length[:, None].clip(min=1)) + number * length[:, None]
    spread = _spread(counts, segments)
    return np.where(length[:, None] > 0, inside, spread)


def segment_middles(count: int, segments: int) -> list[int]:
    """Return the middle frame of each segment of :func:`segment_frames`."""
    length = count // segments
    if not length:
        spread: list[int] = _spread(np.array([count]), segments)[0].tolist()
        return spread
    return [number * length + length // 2 for number in range(segments)]


def _spread(counts: Integers, segments: int) -> Integers:
    """(n, T) frame numbers for videos with fewer than T frames."""
    spread: Integers = np.arange(segments) * (counts[:, None] - 1) // segments
    return spread


def clip_starts(count: int, clips: int, clip_frames: int) -> list[int]:
    """First frames of a test video's clips: clip i of n begins at floor((count - frames) · i / n).

    The last clip therefore ends before the video does, as in the authors' code. A video no longer
    than a clip gives the same clip, of all its frames, ``clips`` times (the authors' code refuses
    shorter ones, of 15 frames or fewer).
    """
    return [max(0, count - clip_frames) * number // clips for number in range(clips)]


_TEST = "test"


class LabelledVideos:
    """The videos of a dataset and one of its splits.

    Args:
        spec: of the shards.
        split: its name; None: the dataset's only, or first, one.

    Attributes:
        shards: the dataset.
        folder: its first shard, for messages.
        labels: (V,) -1 for none.
        train: (N,) numbers of the labelled training videos.
        test: (M,) numbers of the labelled test videos.
        empty: number of labelled training videos left out because they have no frames.
        unlabelled: number of videos of the split without a label.

    Raises:
        InputError: the shards cannot be used, or have no such split or no labels.
    """

    def __init__(self, spec: str | Iterable[str], split: str | None) -> None:
        self.shards = open_shards(spec)
        self.folder = self.shards.addresses[0]
        self.labels: NDArray[np.int64] = self.shards.labels.astype(np.int64)
        self.splits = self.shards.splits
        name = choose_split(self, split)
        if name is None:
            raise InputError("has no splits", self.folder, "prepare it with its official lists")
        self.split = name
        train, without = labelled_rows(self, name, "train")
        self.train = train[self.shards.frame_counts[train] > 0]
        self.empty = len(train) - len(self.train)
        self.test, also = labelled_rows(self, name, _TEST)
        self.unlabelled = without + also

    def __len__(self) -> int:
        return len(self.labels)

    def require(self, value: str) -> None:
        """Check that the split has ``train`` or ``test`` videos.

        Raises:
            InputError: it has none.
        """
        if not len(self.test if value == _TEST else self.train):
            raise no_rows(self, self.split, value)

    @cached_property
    def dataset(self) -> str:
        """The dataset's name according to its records."""
        for video in range(len(self)):
            try:
                return self.shards.record(video).dataset or self.shards.name
            except UnreadableFrame:
                continue  # all records have the same name
        return self.shards.name

    def class_name(self, label: int) -> str:
        """The label's name, or its number if it has none."""
        names = self.shards.label_names
        return names[label] if 0 <= label < len(names) else str(label)

    def digest(self) -> str:
        """Digest of the training videos, independent of how they are split into shards."""
        whole = hashlib.sha256(f"{self.split}\n".encode())
        for video in self.train.tolist():
            row = (self.shards.key(video), int(self.labels[video]), self.shards.frame_count(video))
            whole.update(repr(row).encode("utf-8", "surrogateescape"))
        return whole.hexdigest()


def clip_views(
    clips: Sequence[Sequence[bytes]],
    starts: NDArray[np.uint64],
    size: int,
    config: ViewConfig,
    decoder: FrameDecoder | None = None,
) -> tuple[Tensor, ViewParameters]:
    """Crop n clips of T frames, and draw all other parameters; one draw serves a whole clip.

    Args:
        clips: (n,) JPEG files of T frames each; the frames of a clip have one size.
        starts: (n,) where each clip's random numbers begin (:func:`shards.sampling.sample_starts`).
        size: S, side of a view, px.
        config: how views are drawn.
        decoder: reused by callers with many clips.

    Returns:
        (n, T, 3, S, S) uint8, and the parameters of the n·T images for
        :func:`seco.data.transforms.apply_views`.

    Raises:
        BrokenJpeg: a frame cannot be decoded.
        ValueError: clips differ in length, or the frames of a clip in size.
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


_CHUNK_CLIPS = 8  # 8 MB of crops for 7 frames of 224 px


@dataclass
class ClipBatch:
    """n clips of T frames."""

    images: Tensor  # (n, T, 3, S, S) uint8 crops
    views: ViewParameters  # of the n·T images
    videos: NDArray[np.int64]  # (n,) video numbers
    unreadable: list[str] = field(default_factory=list)  # one reason per replaced video

    @staticmethod
    def joined(parts: Sequence[ClipBatch]) -> ClipBatch:
        """Concatenate one or more parts."""
        return ClipBatch(
            images=torch.cat([part.images for part in parts]),
            views=ViewParameters.joined([part.views for part in parts]),
            videos=np.concatenate([part.videos for part in parts]),
            unreadable=[reason for part in parts for reason in part.unreadable],
        )


class ClipStream:
    """The training clips of a rank, by epoch, step and row.

    Args:
        shards: the dataset.
        train: numbers of its training videos.
        batch_size: B, the global batch.
        segments: T.
        size: S, side of a view, px.
        views: how they are drawn.
        seed: of the run.
        rank: this process's rank; each of ``world_size`` ranks takes B / world_size.

    Raises:
        InputError: too few videos for one batch, or B is not divisible by ``world_size``.
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
        # Whole global batches; the rest, different videos in each epoch, is left out.
        self.steps_per_epoch = len(self._videos) // batch_size
        if not self.steps_per_epoch:
            raise InputError(
                f"{len(self._videos)} training videos do not fill a batch of {batch_size}",
                "--batch-size",
                "lower it or add videos",
            )
        self._decoder = FrameDecoder()

    def read(self, step: int, rows: range) -> ClipBatch:
        """Read the clips at these rows of the per-rank batch.

        Args:
            step: counted across epochs.
            rows: within 0 … ``self.rows`` - 1.

        Raises:
            InputError: too many videos in a row cannot be read.
        """
        epoch, step = divmod(step, self.steps_per_epoch)
        begin = step * self._batch_size
        parts: list[ClipBatch] = []
        unreadable: list[str] = []
        for row in rows:

            def read_clip(attempt: int, row: int = row) -> ClipBatch:
                position = begin + self._first_row + row
                if attempt:
                    place = (attempt - 1) * self._batch_size + self._first_row + row
                    position = substitute_position(
                        place, begin, self._batch_size, len(self._videos)
                    )
                try:
                    return self._clip(epoch, position)
                except (UnreadableFrame, ValueError) as error:  # broken, or frames of two sizes
                    raise UnreadableFrame(f"{self._key(epoch, position)}: {error}") from error

            try:
                parts.append(first_readable(read_clip, lambda e: unreadable.append(str(e))))
            except NothingToRead as error:
                raise InputError(
                    str(error), "--shards", "check the shards with `seco verify`"
                ) from error
        batch = ClipBatch.joined(parts)
        batch.unreadable = unreadable
        return batch

    def _clip(self, epoch: int, position: int) -> ClipBatch:
        """Make one clip, a function of (seed, epoch, video)."""
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
    """Item (step, rows): these clips, or the error that ends the run."""

    def __init__(self, stream: ClipStream) -> None:
        self._stream = stream

    def __getitem__(self, task: tuple[int, range]) -> ClipBatch | InputError:
        try:
            return self._stream.read(*task)
        except InputError as error:
            return error  # if raised, torch would wrap it in its own text


def clip_batches(
    stream: ClipStream, first_step: int, last_step: int, workers: int
) -> Generator[ClipBatch, None, None]:
    """Yield the per-rank batches of steps ``first_step`` … ``last_step`` - 1, in order.

    Args:
        workers: number of workers; 0: batches are made in this process, on demand.

    Raises:
        InputError: videos can be neither read nor replaced.
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
