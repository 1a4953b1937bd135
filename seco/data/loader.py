"""Batches of triplets, made ahead by the loader's workers, and their views on the training device.

A batch is made in chunks of rows, so all workers work on the batch that is needed next, and the
first batch after a start or a resume takes only as long as one chunk. Draws depend on the sample
alone: batches are the same for any number of workers.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from seco.data.transforms import VIEW_DRAWS, ViewConfig, ViewParameters, apply_views, draw_views
from seco.data.triplets import FRAME_OF_VIEW, VIEWS, Chunk, ChunkMaker
from seco.processes.stopping import kill_workers, leave_signals_to_parent
from shards.errors import InputError
from shards.signals import blocked, protected_children
from shards.stream import MAX_GAP, Stream
from shards.terminal import say

_Done = TypeVar("_Done")


@contextmanager
def forked_loader(
    dataset: Dataset[_Done], tasks: Callable[[], Iterator[Any]], workers: int, prefetch: int | None
) -> Iterator[Iterator[_Done]]:
    """Run tasks in forked workers; iterate over the results, in order, within the block.

    Workers are forked when the block begins. Anything that ends it early kills them, even if they
    are stuck in a read.

    Args:
        dataset: maps a task to its result.
        tasks: generates the tasks; torch requests each one as it hands it out.
        workers: number of workers; 0: tasks run in this process, on demand.
        prefetch: tasks in flight per worker; None without workers.
    """
    loader: DataLoader[_Done] = DataLoader(
        dataset,
        sampler=_Tasks(tasks),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=leave_signals_to_parent if workers else None,
    )
    # Between their fork and their first lines, workers would act on signals.
    with blocked(), protected_children():
        done = iter(loader)
    try:
        yield done
    except BaseException:
        kill_workers(done)
        raise
    finally:
        del done  # ends the workers now, not when the interpreter exits


class _Tasks:
    """The DataLoader's sampler: yields the tasks."""

    def __init__(self, tasks: Callable[[], Iterator[Any]]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[Any]:
        return self._tasks()


class BatchRing:
    """Memory for a few batches, which workers write and the trainer reads.

    Sending batches through torch's DataLoader costs a shared file, its page faults and a copy each
    time: 0.5 ms per triplet, where everything else takes 1.4 ms (``docs/loader.md``). An anonymous
    shared mapping is made once and takes no room in /dev/shm, and each forked worker writes its
    part of a batch where the trainer will read it.

    Args:
        slots: number of batches.
        shape: of a batch.
        dtype: NumPy's, of a batch.
    """

    def __init__(self, slots: int, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.slots = slots
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize * slots
        self._memory = mmap.mmap(-1, max(size, 1))  # shared with workers forked later
        flat = np.frombuffer(self._memory, dtype=dtype, count=slots * int(np.prod(shape)))
        self._batches: NDArray[np.generic] = flat.reshape(slots, *shape)
        self._pinned = False

    def __getitem__(self, slot: int) -> NDArray[np.generic]:
        batch: NDArray[np.generic] = self._batches[slot]
        return batch

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("this shared memory is inherited by fork and cannot be pickled")

    def pin(self) -> bool:
        """Pin the memory, so that copies to a GPU need no staging buffer and do not block.

        Returns:
            Whether the driver accepted; without it, copies work but block.
        """
        pointer, size = self._batches.ctypes.data, self._batches.nbytes
        failed = torch.cuda.cudart().cudaHostRegister(pointer, size, 0)
        self._pinned = int(failed) == 0
        if not self._pinned:
            # Clear the error, which the next kernel would report as its own.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device="cuda").add_(1)
            say("seco: the loader's memory cannot be pinned; copies will block")
        return self._pinned

    def close(self) -> None:
        """Unpin the memory; it is freed once its last user is gone."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._batches.ctypes.data)
            self._pinned = False


_CHUNK_ROWS = 32  # at 224 px 19 MB of crops and about 50 ms of work
_BATCHES_AHEAD = 2


@dataclass
class Batch:
    """One step's input on this rank: N samples.

    ``images`` is memory of the loader: valid until the next batch but one is requested.
    """

    images: Tensor | None  # (4, N, 3, S, S) uint8 crops, or finished float32 views
    uniform: NDArray[np.float64]  # (4, N, 13) random numbers for the views' parameters
    order: Tensor  # (N,) 0 anchor before, 1 after
    videos: Tensor  # (N,) video numbers
    unreadable: list[str]  # one reason per replaced sample
    jpegs: list[tuple[bytes, bytes, bytes]]  # (N,) anchor, second, third; if images is None
    boxes: Tensor  # (4, N, 4) left, top, width, height of the crops in their frames, px


class _Task(NamedTuple):
    step: int  # counted across epochs
    first: int  # first row
    last: int  # row after the last
    slot: int


class _Chunks(Dataset[Chunk]):
    """Item (step, rows, slot): writes these rows of the batch to the ring."""

    def __init__(self, stream: Stream, maker: ChunkMaker, ring: BatchRing | None) -> None:
        self._stream = stream
        self._maker = maker
        self._ring = ring
        self._entered = False

    def __getitem__(self, task: _Task) -> Chunk:
        worker = get_worker_info()
        if worker is not None and not self._entered:
            self._stream.set_worker(worker.id, worker.num_workers)
            self._entered = True
        epoch, step = divmod(task.step, self._stream.steps_per_epoch)
        rows = range(task.first, task.last)
        out = self._ring[task.slot][:, task.first : task.last] if self._ring is not None else None
        return self._maker.make(out, epoch, step, rows)


class TripletLoader:
    """Iterates over the batches of steps ``first_step`` … ``last_step`` - 1, in order.

    Args:
        stream: the samples of this rank.
        crop_size: S, side of a view, px.
        views: how they are drawn.
        workers: number of workers; 0: batches are made in this process, on demand.
        first_step: counted across epochs.
        last_step: step after the last.
        decode: ``cpu``, or ``nvjpeg``: batches hold JPEG bytes and boxes instead of crops.
        views_on: ``device``: the images are crops; ``workers``: they are finished views.
        pin: pin the batches' memory for a GPU.
    """

    def __init__(
        self,
        stream: Stream,
        crop_size: int,
        views: ViewConfig,
        *,
        workers: int,
        first_step: int,
        last_step: int,
        decode: str = "cpu",
        views_on: str = "device",
        pin: bool = False,
    ) -> None:
        self._stream = stream
        self._workers = workers
        self._steps = range(first_step, last_step)
        self._decode = decode == "cpu"
        self._finish = views_on == "workers"
        self._chunks = math.ceil(stream.rows / _CHUNK_ROWS)
        self._pin = pin
        ahead = math.ceil(_BATCHES_AHEAD * self._chunks / workers) if workers else 0
        self._prefetch = max(2, ahead) if workers else None
        in_flight = math.ceil((self._prefetch or 0) * workers / self._chunks)
        self._ring: BatchRing | None = None
        if self._decode:
            size = (crop_size, crop_size)
            pixels = (3, *size) if self._finish else (*size, 3)
            shape = (VIEWS, stream.rows, *pixels)
            # Two more: the batch being read, and one that may still be on its way to a device.
            self._ring = BatchRing(in_flight + 2, shape, np.float32 if self._finish else np.uint8)
        maker = ChunkMaker(stream, crop_size, views, decode=self._decode, finish=self._finish)
        self._dataset = _Chunks(stream, maker, self._ring)
        self._read = first_step - 1  # last step whose batch was handed out

    def __enter__(self) -> TripletLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        if self._ring is not None:
            self._ring.close()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yield the batches; raises InputError if samples can be neither read nor replaced."""
        with forked_loader(self._dataset, self.tasks, self._workers, self._prefetch) as chunks:
            # After the workers are forked, and before threads prefetch shards.
            if self._pin and self._ring is not None:
                self._ring.pin()
            for step in self._steps:
                self._stream.prefetch(*divmod(step, self._stream.steps_per_epoch))
                parts = [_sound(next(chunks)) for _ in range(self._chunks)]
                self._read = step
                yield self._batch(step, parts)

    def tasks(self) -> Iterator[_Task]:
        """Yield all chunks in order, each with the slot of its batch."""
        rows = self._stream.rows
        for step in self._steps:
            slot = step % self._ring.slots if self._ring is not None else 0
            if self._ring is not None and step - self._read >= self._ring.slots:
                raise RuntimeError("a batch would be overwritten while it is read")
            for first in range(0, rows, _CHUNK_ROWS):
                yield _Task(step, first, min(first + _CHUNK_ROWS, rows), slot)

    def _batch(self, step: int, parts: list[Chunk]) -> Batch:
        uniform = np.concatenate([part.uniform for part in parts], axis=1)
        images = None
        if self._ring is not None:
            images = torch.from_numpy(self._ring[step % self._ring.slots])
            images = images if self._finish else images.permute(0, 1, 4, 2, 3)
        return Batch(
            images=images,
            uniform=uniform,
            order=torch.from_numpy(np.concatenate([part.order for part in parts])),
            videos=torch.from_numpy(np.concatenate([part.videos for part in parts])),
            unreadable=[reason for part in parts for reason in part.unreadable],
            jpegs=[row for part in parts for row in part.jpegs],
            boxes=torch.from_numpy(np.concatenate([part.boxes for part in parts], axis=1)),
        )


def _sound(chunk: Chunk) -> Chunk:
    """Return the chunk; raises InputError if the run cannot continue."""
    if chunk.fatal:
        advice = "check the shards with `seco verify`"
        if MAX_GAP in chunk.fatal:  # which is no fault of theirs
            advice = f"raise {MAX_GAP} or leave it out"
        raise InputError(chunk.fatal, "--shards", advice)
    return chunk


_UNDER_WAY = 1  # the loader keeps one batch besides the one being read


class DeviceCopies:
    """Copies batches to a GPU on a separate stream.

    On the compute stream, a copy would wait for the previous step, and the next step for the copy:
    308 MB per step of 512 videos at 224 px. Two buffers on the device, one being read and one being
    filled, keep memory constant however far ahead the host is.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[Tensor] = []
        self._read = [torch.cuda.Event(), torch.cuda.Event()]  # all kernels have read the buffer
        self._copies: deque[torch.cuda.Event] = deque()
        self._slot = 0

    def copy(self, images: Tensor) -> Tensor:
        """Copy the batch to the device; the result is valid until the next call but one.

        Args:
            images: always of the same shape; in pinned memory (otherwise the host blocks), which
                may be overwritten after the next call.
        """
        compute = torch.cuda.current_stream(self._device)
        # By now, all kernels that read the last buffer have been queued.
        self._read[self._slot].record(compute)
        self._slot = 1 - self._slot
        if not self._buffers:
            self._buffers = [torch.empty_like(images, device=self._device) for _ in range(2)]
            # Queued kernels may still read memory that the host has freed.
            self._stream.wait_stream(compute)
        buffer = self._buffers[self._slot]
        self._stream.wait_event(self._read[self._slot])
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            buffer.copy_(images, non_blocking=True)
            done.record(self._stream)
        compute.wait_event(done)
        self._copies.append(done)
        if len(self._copies) > _UNDER_WAY:
            self._copies.popleft().synchronize()
        return buffer


class DeviceViews:
    """Copies, decodes and augments batches on a device.

    Args:
        device: where to make the views.
        crop_size: S, side of a view, px.
        config: mean and standard deviation.
    """

    def __init__(self, device: torch.device, crop_size: int, config: ViewConfig) -> None:
        self._device = device
        self._size = crop_size
        self._config = config
        self._copies = DeviceCopies(device) if device.type == "cuda" else None

    def crops(self, batch: Batch) -> Tensor:
        """Return query, k1 (both from the anchor), k2, k3, (4, N, 3, S, S): uint8 or float32 views.

        Frames that the device cannot decode are replaced by those of the next sample and named in
        the batch's ``unreadable``.
        """
        if batch.images is None:
            return self._decoded(batch)
        return batch.images if self._copies is None else self._copies.copy(batch.images)

    def finished(self, crops: Tensor, views: ViewParameters) -> Tensor:
        """Turn (n, 3, S, S) crops into float32 views; finished views are returned unchanged."""
        if crops.dtype != torch.uint8:
            return crops
        return apply_views(crops, views, self._config)

    def _decoded(self, batch: Batch) -> Tensor:
        """Decode and crop on the device: (4, N, 3, S, S) uint8."""
        # Loads torchvision, which nothing else here needs.
        from seco.data.gpu_transforms import as_tensors, crop_resize_batch, decode_frames

        n = len(batch.order)
        of_sample = np.arange(n)
        frames, reasons = decode_frames(
            as_tensors([jpeg for row in batch.jpegs for jpeg in row]), self._device
        )
        broken = {index // 3: reason for index, reason in reasons.items()}
        for row in sorted(broken):
            batch.unreadable.append(f"video {int(batch.videos[row])}: {broken[row]}")
            whole = [r for r in (*range(row + 1, n), *range(row)) if r not in broken]
            if not whole:
                raise InputError(f"no frame of a batch can be decoded: {broken[row]}", "--decode")
            of_sample[row] = whole[0]
            batch.order[row], batch.videos[row] = batch.order[whole[0]], batch.videos[whole[0]]
        frame_of_view = 3 * of_sample[None, :] + np.array(FRAME_OF_VIEW)[:, None]
        boxes = batch.boxes.numpy()[:, of_sample]
        crops = crop_resize_batch(
            frames, frame_of_view.reshape(-1), boxes.reshape(-1, 4), self._size
        )
        return crops.view(VIEWS, n, *crops.shape[1:])


@dataclass
class TripletBatch:
    """N triplets for your own training loop; augmented on the device they are on.

    Attributes:
        crops: (4, N, 3, S, S) uint8 of query, k1 (both from the anchor frame), k2 and k3.
        uniform: (4, N, 13) random numbers for the augmentations.
        order: (N,) 0 if the anchor is before k2 and k3, 1 if it is after.
        video: (N,) video numbers in the dataset.
        unreadable: one reason per sample that was replaced.
        config: how views are drawn.
    """

    crops: Tensor
    uniform: NDArray[np.float64]
    order: Tensor
    video: Tensor
    unreadable: list[str]
    config: ViewConfig

    def to(self, device: torch.device | str) -> TripletBatch:
        """Return the same batch on another device."""
        return replace(
            self,
            crops=self.crops.to(device),
            order=self.order.to(device),
            video=self.video.to(device),
        )

    @cached_property
    def views(self) -> Tensor:
        """(4, N, 3, S, S) float32: flipped, jittered, blurred, normalised."""
        drawn = draw_views(self.uniform.reshape(-1, VIEW_DRAWS), self.config)
        return apply_views(self.crops.flatten(0, 1), drawn, self.config).view(self.crops.shape)


class EpochLoader:
    """Yields :class:`TripletBatch` objects; each iteration is the next epoch.

    Args:
        stream: the samples.
        crop_size: S, side of a view, px.
        views: how they are drawn.
        workers: number of workers; 0: batches are made in this process, on demand.
    """

    def __init__(self, stream: Stream, crop_size: int, views: ViewConfig, workers: int) -> None:
        self.epoch = 0  # of the next iteration
        self._stream = stream
        self._crop_size = crop_size
        self._views = views
        self._workers = workers

    def __len__(self) -> int:
        return self._stream.steps_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the next iteration's epoch; each epoch has its own order and augmentations."""
        self.epoch = epoch

    def __iter__(self) -> Generator[TripletBatch, None, None]:
        """Yield one epoch; raises InputError if samples can be neither read nor replaced."""
        first = self.epoch * len(self)
        self.epoch += 1
        loader = TripletLoader(
            self._stream,
            self._crop_size,
            self._views,
            workers=self._workers,
            first_step=first,
            last_step=first + len(self),
        )
        with loader, contextlib.closing(iter(loader)) as batches:
            for batch in batches:
                for reason in batch.unreadable:
                    warnings.warn(f"unreadable, replaced by another: {reason}", stacklevel=2)
                assert batch.images is not None
                yield TripletBatch(
                    crops=batch.images.clone(),  # the loader reuses this memory
                    uniform=batch.uniform,
                    order=batch.order,
                    video=batch.videos,
                    unreadable=batch.unreadable,
                    config=self._views,
                )
