"""Random access to the videos of a set: only the frames asked for are read."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.format import VideoRecord, read_manifest
from shards.index import ShardIndex, build_index, read_index
from shards.spec import expand_spec


class UnreadableFrame(Exception):
    """A frame's bytes could not be read: the shard was cut short or deleted since it was opened."""


class ShardSet:
    """The videos of several shards, numbered 0 … V-1 in the order of the shards.

    Frames are fetched with ``pread``, so one set may be shared by threads, and pickled to worker
    processes (each opens its own file handles).
    """

    def __init__(self, tars: list[Path], indexes: list[ShardIndex], label_names: list[str]) -> None:
        self._tars = tars
        self._indexes = indexes
        self.label_names = label_names
        counts = [index.info.videos for index in indexes]
        self._ends = list(itertools.accumulate(counts))
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_descriptors"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._descriptors = {}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    @cached_property
    def keys(self) -> list[str]:
        """(V,) the videos' keys."""
        return [key for index in self._indexes for key in index.keys]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.keys)}

    def find(self, key: str) -> int:
        """The number of the video with this key.

        Raises:
            InputError: there is none.
        """
        try:
            return self._numbers[key]
        except KeyError:
            raise InputError("no video has this key", key, "see the key column") from None

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """(V,) class indices, -1 for none."""
        return np.concatenate([index.label for index in self._indexes]).astype(np.int32)

    @cached_property
    def frame_counts(self) -> NDArray[np.int64]:
        """(V,) stored frames a video."""
        counts = [np.diff(index.first_frame.astype(np.int64)) for index in self._indexes]
        return np.concatenate(counts)

    @cached_property
    def splits(self) -> dict[str, list[str | None]]:
        """For each split name, (V,) its values ("train", "test", …), None where there is none."""
        rows = [row for index in self._indexes for row in index.splits]
        names = sorted({name for row in rows for name in row})
        return {name: [row.get(name) for row in rows] for name in names}

    @property
    def shard_files(self) -> list[str]:
        """The tars' paths, in order."""
        return [str(path) for path in self._tars]

    @property
    def total_bytes(self) -> int:
        """The size of all tars together."""
        return sum(index.info.bytes for index in self._indexes)

    @property
    def name(self) -> str:
        """The first set's name: that of its tars without their numbers."""
        stem = self._tars[0].stem
        return stem.rpartition("-")[0] or stem

    def shard_of(self, video: int) -> str:
        """The path of the tar that holds the video."""
        return str(self._tars[self._locate(video)[0]])

    def frame_count(self, video: int) -> int:
        """How many frames are stored of this video."""
        shard, row = self._locate(video)
        first = self._indexes[shard].first_frame
        return int(first[row + 1]) - int(first[row])

    def read_frame(self, video: int, frame: int) -> bytes:
        """The JPEG bytes of one stored frame, counted from 0 in time order.

        Raises:
            UnreadableFrame: the shard no longer holds them.
            IndexError: the video has no such frame.
        """
        shard, row = self._locate(video)
        index = self._indexes[shard]
        position = int(index.first_frame[row]) + frame
        if not frame >= 0 or position >= int(index.first_frame[row + 1]):
            raise IndexError(f"video {video} has no frame {frame}")
        return self._pread(
            shard, int(index.frame_offset[position]), int(index.frame_size[position])
        )

    def record(self, video: int) -> VideoRecord:
        """``KEY.json`` of the video; in a foreign tar, a record with the key alone.

        Raises:
            UnreadableFrame: the shard no longer holds it, or it is damaged.
        """
        shard, row = self._locate(video)
        index = self._indexes[shard]
        size = int(index.record_size[row])
        if size == 0:
            return VideoRecord(key=index.keys[row], dataset="", source=index.keys[row])
        data = self._pread(shard, int(index.record_offset[row]), size)
        try:
            return VideoRecord.from_json(data)
        except (ValueError, TypeError) as error:
            raise UnreadableFrame(
                f"{self._tars[shard]}: {index.keys[row]}.json: {error}"
            ) from error

    def _locate(self, video: int) -> tuple[int, int]:
        if not 0 <= video < len(self):
            raise IndexError(f"no video {video} in a set of {len(self)}")
        shard = bisect.bisect_right(self._ends, video)
        return shard, video - (self._ends[shard - 1] if shard else 0)

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        try:
            descriptor = self._descriptors.get(shard)
            if descriptor is None:
                descriptor = os.open(self._tars[shard], os.O_RDONLY | os.O_CLOEXEC)
                self._descriptors[shard] = descriptor
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise UnreadableFrame(f"{self._tars[shard]}: {error.strerror}") from error
        if len(data) != size:
            raise UnreadableFrame(f"{self._tars[shard]}: ends before byte {offset + size}")
        return data


def open_shards(spec: str | Iterable[str]) -> ShardSet:
    """Open the shards a specification names (:func:`shards.spec.expand_spec`).

    A shard without an index, or with an outdated one, is indexed in memory.

    Raises:
        InputError: no shards match, a tar is truncated, or the set holds no videos.
    """
    tars = expand_spec(spec)
    shard_set = ShardSet(tars, [_index_of(tar) for tar in tars], _label_names(tars))
    if not len(shard_set):
        raise InputError("hold no videos", tars[0] if len(tars) == 1 else spec)
    repeated = len(shard_set) - len(set(shard_set.keys))
    if repeated:
        raise InputError(f"{repeated} videos occur twice", spec, "name each set once")
    return shard_set


def _index_of(tar: Path) -> ShardIndex:
    path = tar.with_suffix(".idx")
    if not path.is_file():
        return build_index(tar)
    index = read_index(path)
    size = tar.stat().st_size
    if size < index.info.bytes:
        raise InputError(
            f"is truncated: {size} of {index.info.bytes} bytes", tar, "prepare or copy it again"
        )
    return index if size == index.info.bytes else build_index(tar)


def _label_names(tars: list[Path]) -> list[str]:
    """The label names of the sets' manifests; empty when there is none or they disagree."""
    found: list[list[str]] = []
    for folder, stem in dict.fromkeys((tar.parent, tar.stem.rpartition("-")[0]) for tar in tars):
        manifest = folder / f"{stem}.json"
        if stem and manifest.is_file():
            found.append(read_manifest(manifest).label_names)
    return found[0] if found and all(names == found[0] for names in found) else []
