"""The CPU part of the views: some rows of a batch, from JPEG bytes to crops.

Each distinct frame is decoded once, the anchor for two views. A sample that cannot be read or
decoded is replaced by another, counted and reported by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from seco.data.crops import (
    CROP_DRAWS,
    BrokenJpeg,
    FrameDecoder,
    crop_resize,
    decode_jpeg,
    draw_crops,
    jpeg_size,
)
from seco.data.transforms import VIEW_DRAWS, ViewConfig, apply_views, draw_views
from shards.opening import open_shards
from shards.sampling import sample_starts, uniforms
from shards.storage import UnreadableFrame
from shards.stream import (
    NothingToRead,
    Sample,
    Stream,
    TripletFrames,
    TripletStream,
    UnreadableTriplet,
    first_readable,
)

VIEWS = 4  # query and k1, both from the anchor frame, k2, k3
FRAME_OF_VIEW = (0, 0, 1, 2)
_VIEWS_OF_FRAME = ((0, 1), (2,), (3,))


@dataclass(frozen=True)
class Chunk:
    """Rows ``first`` … ``first + n - 1`` of the per-rank batch, except for the pixels."""

    first: int
    uniform: NDArray[np.float64]  # (4, n, 13) random numbers for the views' parameters
    order: NDArray[np.int64]  # (n,) 0 anchor before, 1 after
    videos: NDArray[np.int64]  # (n,)
    boxes: NDArray[np.int64]  # (4, n, 4) left, top, width, height in the frame, px
    unreadable: list[str] = field(default_factory=list)  # one reason per replaced sample
    jpegs: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)  # if decoded elsewhere
    fatal: str | None = None  # error that ends the run


class ChunkMaker:
    """Makes chunks of a stream's batches.

    Args:
        stream: the samples.
        crop_size: S, side of a view, px.
        views: how they are drawn.
        decode: False: leave the JPEG bytes to the device.
        finish: also do the device part of the views here.
    """

    def __init__(
        self, stream: Stream, crop_size: int, views: ViewConfig, *, decode: bool, finish: bool
    ) -> None:
        self._stream = stream
        self._size = crop_size
        self._views = views
        self._decode = decode
        self._finish = finish
        self._decoder = FrameDecoder()
        self._scratch: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

    def make(self, out: NDArray[np.generic] | None, epoch: int, step: int, rows: range) -> Chunk:
        """Read, crop and write these rows of a batch.

        Args:
            out: output array, (4, n, S, S, 3) uint8 for crops, or (4, n, 3, S, S) float32 for
                views that are finished here; None if decoding is left to the device.
            epoch: of the batch.
            step: within the epoch.
            rows: of the per-rank batch.
        """
        n = len(rows)
        crops = self._crops_of(out, n)
        chunk = Chunk(
            first=rows.start,
            uniform=np.empty((VIEWS, n, VIEW_DRAWS)),
            order=np.empty(n, dtype=np.int64),
            videos=np.empty(n, dtype=np.int64),
            boxes=np.empty((VIEWS, n, 4), dtype=np.int64),
            jpegs=[] if self._decode else [(b"", b"", b"")] * n,
        )
        try:
            self._fill_all(chunk, crops, epoch, step, rows)
        except NothingToRead as error:
            return replace(chunk, fatal=str(error))
        if self._finish and out is not None and crops is not None:
            images = torch.from_numpy(crops).flatten(0, 1).permute(0, 3, 1, 2)
            drawn = draw_views(chunk.uniform.reshape(-1, VIEW_DRAWS), self._views)
            views = apply_views(images, drawn, self._views)
            torch.from_numpy(out).copy_(views.view(VIEWS, n, *views.shape[1:]))
        return chunk

    def _fill_all(
        self, chunk: Chunk, crops: NDArray[np.uint8] | None, epoch: int, step: int, rows: range
    ) -> None:
        """Fill all rows; raises NothingToRead if too many videos in a row cannot be read."""
        reasons = self._fill(chunk, crops, epoch, 0, self._stream.read(epoch, step, rows))
        for at, reason in enumerate(reasons):

            def read(attempt: int, at: int = at, reason: str | None = reason) -> None:
                if attempt:
                    sample = self._stream.substitute(epoch, step, rows[at], attempt)
                    (reason,) = self._fill(chunk, crops, epoch, at, [sample])
                if reason is not None:
                    raise UnreadableFrame(reason)

            first_readable(read, lambda error: chunk.unreadable.append(str(error)))

    def _crops_of(self, out: NDArray[np.generic] | None, n: int) -> NDArray[np.uint8] | None:
        """Return the (4, n, S, S, 3) array for the crops; None if the device decodes."""
        if not self._decode:
            return None
        if not self._finish:
            assert out is not None and out.dtype == np.uint8
            return out.view(np.uint8)
        shape = (VIEWS, n, self._size, self._size, 3)
        if self._scratch.shape != shape:
            self._scratch = np.empty(shape, dtype=np.uint8)
        return self._scratch

    def _fill(
        self,
        chunk: Chunk,
        crops: NDArray[np.uint8] | None,
        epoch: int,
        at: int,
        samples: Sequence[Sample],
    ) -> list[str | None]:
        """Write samples to places ``at``, ``at`` + 1, …; return why each failed, or None."""
        sizes = np.ones((len(samples), 3, 2), dtype=np.int64)
        reasons: list[str | None] = [None] * len(samples)
        for i, sample in enumerate(samples):
            if isinstance(sample, UnreadableTriplet):
                reasons[i] = f"{sample.key}: {sample.reason}"
                continue
            try:
                sizes[i] = [jpeg_size(jpeg) for jpeg in sample.jpegs]
            except BrokenJpeg as error:
                reasons[i] = f"{sample.key}: {error}"
        starts = sample_starts(self._stream.seed, epoch, [s.key for s in samples], "views")
        drawn = uniforms(starts, VIEWS * (CROP_DRAWS + VIEW_DRAWS)).reshape(
            len(samples), VIEWS, CROP_DRAWS + VIEW_DRAWS
        )
        of_view = sizes[:, FRAME_OF_VIEW]  # (n, 4, 2)
        boxes = draw_crops(
            drawn[..., :CROP_DRAWS].reshape(-1, CROP_DRAWS),
            of_view[..., 0].reshape(-1),
            of_view[..., 1].reshape(-1),
            self._views.crop_scale,
            self._views.crop_ratio,
        ).reshape(len(samples), VIEWS, 4)
        to = slice(at, at + len(samples))
        chunk.uniform[:, to] = drawn[..., CROP_DRAWS:].transpose(1, 0, 2)
        chunk.boxes[:, to] = boxes.transpose(1, 0, 2)
        for i, sample in enumerate(samples):
            if reasons[i] is not None or not isinstance(sample, TripletFrames):
                continue
            chunk.order[at + i], chunk.videos[at + i] = sample.order, sample.video
            if crops is None:
                chunk.jpegs[at + i] = sample.jpegs
                continue
            try:
                self._crop(crops[:, at + i], sample.jpegs, boxes[i].tolist())
            except BrokenJpeg as error:
                reasons[i] = f"{sample.key}: {error}"
        return reasons

    def _crop(
        self, out: NDArray[np.uint8], jpegs: Sequence[bytes], boxes: Sequence[Sequence[int]]
    ) -> None:
        """Write the crops of one sample to (4, S, S, 3)."""
        for jpeg, views in zip(jpegs, _VIEWS_OF_FRAME, strict=True):
            image = self._decoder.decode(jpeg)
            for view in views:
                crop_resize(image, boxes[view], self._size, out=out[view])


class Triplet(NamedTuple):
    """One sample of :class:`TripletDataset`, which a ``DataLoader`` can batch."""

    views: tuple[Any, Any, Any, Any]  # query, k1 (both from the anchor frame), k2, k3
    order: int  # 0 if the anchor is before k2 and k3, 1 if it is after
    video: int  # number in the shards


class TripletDataset(Dataset[Triplet]):
    """Triplets for a plain ``torch.utils.data.DataLoader``: item i is from the i-th usable video.

    Slower than :func:`seco.triplet_loader`, but takes any transform::

        dataset = seco.TripletDataset("shards/k400.json", transform=transform)
        loader = DataLoader(dataset, batch_size=256, shuffle=True, drop_last=True, num_workers=8)

    Args:
        shards: pattern, glob, manifest or folder.
        transform: called with a (3, H, W) uint8 tensor for each view, so twice with the anchor
            frame; for example one of ``torchvision.transforms.v2``. None: views are the frames.
        sampling: ``uniform`` (paper) or ``halves`` (authors' code).
        seed: for drawing frames.
        split: use only the training videos of this official split.
        max_gap_seconds: longest time from the first frame of a triplet to the last.

    Raises:
        InputError: the shards cannot be used.
    """

    def __init__(
        self,
        shards: str | Iterable[str],
        transform: Callable[[Tensor], Any] | None = None,
        *,
        sampling: str = "uniform",
        seed: int = 0,
        split: str | None = None,
        max_gap_seconds: float | None = None,
    ) -> None:
        self._stream = TripletStream(
            *(open_shards(shards), 1, sampling, seed), split=split, max_gap_seconds=max_gap_seconds
        )
        self._transform = transform
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._stream.usable)

    def set_epoch(self, epoch: int) -> None:
        """Draw other frames in this epoch; call before the epoch's workers start."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> Triplet:
        """Return a triplet; a video that cannot be read is replaced by the next, with a warning.

        Raises:
            NothingToRead: 21 videos in a row cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)

        def read(attempt: int) -> Triplet:
            number = self._stream.usable.numbers(np.array([(index + attempt) % len(self)]))
            (sample,) = self._stream.samples(self._epoch, number)
            if isinstance(sample, UnreadableTriplet):
                raise UnreadableFrame(f"{sample.key}: {sample.reason}")
            try:
                frames = [decode_jpeg(jpeg) for jpeg in sample.jpegs]
            except BrokenJpeg as error:
                raise UnreadableFrame(f"{sample.key}: {error}") from error
            images = [torch.from_numpy(frames[n]).permute(2, 0, 1) for n in FRAME_OF_VIEW]
            views = images if self._transform is None else [self._transform(i) for i in images]
            return Triplet((views[0], views[1], views[2], views[3]), sample.order, sample.video)

        def note(error: UnreadableFrame) -> None:
            warnings.warn(f"unreadable, replaced by another: {error}", stacklevel=4)

        return first_readable(read, note)
