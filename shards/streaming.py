"""Shards that can only be read from beginning to end: ``pipe:`` commands, tars without an index.

A WebDataset pipeline with a shuffle buffer. It gives fewer guarantees than an indexed dataset:
batches depend on the number of ranks and workers, an epoch is a number of steps rather than a visit
to every video, and a resumed run continues with other videos. Every rank still has the same number
of steps, because each repeats its shards without end.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from shards.dataset import PIPE, set_name
from shards.errors import InputError
from shards.index import TarMember, bounded_tar
from shards.sampling import DRAWS, MIN_FRAMES, Permutation, draw_triplets, sample_starts, uniforms
from shards.storage import in_words, is_remote, open_filesystem, try_again
from shards.stream import NothingToRead, Sample, TripletFrames, UnreadableTriplet, rows_of_rank
from shards.terminal import say
from shards.untrusted import open_regular

_BUFFERED = 1000  # samples of three frames, per worker
_MAX_VIDEO_BYTES = 512 << 20  # all its frames are read before three are drawn


class SequentialStream:
    """Batches of triplets from shards read in order; a :class:`shards.stream.Stream`.

    Args:
        addresses: of the tars.
        batch_size: B, the global batch.
        sampling: ``uniform`` or ``halves``.
        seed: for the shards' order, the buffer and the triplets.
        steps_per_epoch: batches per epoch.
        rank: of this process, among ``world_size`` ranks.

    Raises:
        InputError: no number of steps is given, or B is not divisible by the ranks.
    """

    window_shards = 0
    left_out = 0  # unknown in advance; short videos are counted when they are read

    def __init__(
        self,
        addresses: Sequence[str],
        batch_size: int,
        sampling: str,
        seed: int,
        steps_per_epoch: int | None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if steps_per_epoch is None:
            raise InputError(
                "has no index, so the length of an epoch is unknown",
                addresses[0],
                "give --steps-per-epoch, or create indexes with `seco index` on a copy",
            )
        self.addresses = list(addresses)
        piped = addresses[0].startswith(PIPE)
        self.name = "stream" if piped else set_name(addresses[0])
        self.batch_size = batch_size
        self.rows = rows_of_rank(batch_size, world_size)
        self.seed = seed
        self.steps_per_epoch = steps_per_epoch
        self._sampling = sampling
        self._reader, self._readers = rank, world_size
        self._samples: Iterator[Sample] | None = None
        self._ended: str | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_samples": None}

    def set_worker(self, worker: int, workers: int) -> None:
        self._reader, self._readers = self._reader * workers + worker, self._readers * workers
        self._samples = None

    def read(self, epoch: int, step: int, rows: Sequence[int]) -> list[Sample]:
        """Return the next samples of this process, whichever rows are requested.

        Raises:
            NothingToRead: a whole pass over the shards gave no usable video.
        """
        if self._ended is not None:
            raise NothingToRead(self._ended)
        if self._samples is None:
            self._samples = self._shuffled(f"{self.seed}/{epoch}/{step}/{self._reader}")
        try:
            return [next(self._samples) for _ in rows]
        except NothingToRead as error:
            self._ended = str(error)
            raise

    def substitute(self, epoch: int, step: int, row: int, attempt: int) -> Sample:
        """Return the next sample."""
        (sample,) = self.read(epoch, step, [row])
        return sample

    def prefetch(self, epoch: int, step: int) -> None:
        pass

    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.addresses).encode()).hexdigest()

    def close(self) -> None:
        self._samples = None

    def _shuffled(self, name: str) -> Iterator[Sample]:
        import webdataset

        buffered = webdataset.filters.shuffle(
            _BUFFERED, initial=_BUFFERED // 4, rng=random.Random(name)
        )
        samples: Iterator[Sample] = iter(buffered(self._passes(name)))
        return samples

    def _passes(self, name: str) -> Iterator[Sample]:
        """Yield the samples of this reader's shards, over and over, the shards in new orders.

        With fewer shards than readers, some readers share one, with different random numbers.
        """
        mine = self.addresses[self._reader % len(self.addresses) :: self._readers]
        number = 0
        while True:
            order = Permutation(len(mine), f"{name}/{number}").at(np.arange(len(mine)))
            usable, short, last = 0, 0, "the shards are empty"
            for shard in order:
                for sample in self._shard(mine[int(shard)], f"{name}/{number}"):
                    if sample is None:
                        short += 1
                        continue
                    usable += isinstance(sample, TripletFrames)
                    last = last if isinstance(sample, TripletFrames) else sample.reason
                    yield sample
            if short and not number:  # once, not in every pass
                say(f"seco: {short} videos of fewer than {MIN_FRAMES} frames were left out")
            if not usable:
                raise NothingToRead(f"no video can be read: {last}")
            number += 1

    def _shard(self, address: str, name: str) -> Iterator[Sample | None]:
        """Yield a shard's samples, None for short videos and, if it breaks off, the reason."""
        try:
            with bounded_tar(_open(address), stream=True) as tar:
                for key, members in itertools.groupby(_members(tar), key=lambda row: row[0].key):
                    try:
                        frames = _frames(tar, members)
                    except OverflowError as fault:
                        yield UnreadableTriplet(f"{address}: {key}", str(fault))
                        continue
                    if frames:
                        yield self._sample(key, frames, name)
        except Exception as fault:
            yield UnreadableTriplet(address, in_words(fault))

    def _sample(self, key: str, frames: list[bytes], name: str) -> Sample | None:
        """Draw the triplet as soon as a video is read: the buffer then holds only three frames."""
        if len(frames) < MIN_FRAMES:
            return None
        start = sample_starts(self.seed, 0, [f"{name}/{key}"], "triplet")
        drawn = draw_triplets(uniforms(start, DRAWS), np.array([len(frames)]), self._sampling)
        one, two, three = drawn.frames[0].tolist()
        video = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "little")
        jpegs = (frames[one], frames[two], frames[three])
        return TripletFrames(key, video, int(drawn.order[0]), jpegs)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[TarMember, tarfile.TarInfo]]:
    for info in tar:
        tar.members = []  # type: ignore[attr-defined]  # a long stream must not be held in memory
        if info.isreg():
            yield TarMember(info.name, info.offset_data, info.size), info


def _frames(
    tar: tarfile.TarFile, members: Iterable[tuple[TarMember, tarfile.TarInfo]]
) -> list[bytes]:
    """Read the frames of one video."""
    frames: list[bytes] = []
    left = _MAX_VIDEO_BYTES
    for member, info in members:
        if member.is_jpeg:
            left -= member.size
            if left < 0:
                raise OverflowError(f"its frames have more than {_MAX_VIDEO_BYTES >> 20} MiB")
            file = tar.extractfile(info)
            frames.append(file.read() if file else b"")
    return frames


def _open(address: str) -> Any:
    if address.startswith(PIPE):
        from webdataset.gopen import gopen

        return gopen(address)
    if not is_remote(address):
        return open_regular(address)
    system, path = open_filesystem(address)
    # Reading by blocks needs byte ranges, which not every web server supports.
    options = {"block_size": 0} if address.startswith(("http://", "https://")) else {}
    return try_again(lambda: system.open(path, "rb", **options))
