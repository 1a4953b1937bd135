"""The frames of both sides of a split, as near-duplicates are looked for in them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from seco.features.matrix import FeatureMatrix, unit_vectors
from seco.features.store import Features
from seco.pages.thumbnails import frames_of
from seco.retrieve.config import DuplicatesConfig
from seco.retrieve.fingerprints import (
    MOST_FRAMES,
    SIDE_PX,
    Fingerprint,
    fingerprint,
    mirrored,
    picture_vector,
)
from seco.views.video_frames import evenly_spaced
from shards.access import UnreadableFrame
from shards.cpus import usable_cpus
from shards.errors import InputError
from shards.opening import open_shards
from shards.progress import progress
from shards.reader import ShardSet

_FRAMES_TO_SEARCH = 3
_KEPT = 20_000  # fingerprints, of 64 kB at most
_AT_ONCE = 4096  # videos handed to the threads


@dataclass(frozen=True)
class Group:
    """One side: the rows of a feature folder with one value of the split, or a whole folder."""

    name: str
    features: Features
    rows: NDArray[np.int64]

    def vectors(self) -> FeatureMatrix:
        """The features."""
        return unit_vectors(self.features.features, self.rows)

    def key(self, position: int) -> str:
        """The key of one."""
        return self.features.keys[int(self.rows[position])]


class FrameReader:
    """The stored frames of both sides, by group and key."""

    def __init__(self, config: DuplicatesConfig, groups: Sequence[Group]) -> None:
        self._shards: dict[str, ShardSet] = {}
        opened: dict[tuple[str, ...], ShardSet] = {}
        for group in groups:
            spec = config.shards or tuple(group.features.meta.get("shards", ()))
            if spec not in opened:
                opened[spec] = _open(spec)
            self._shards[group.name] = opened[spec]
        self._unreadable: dict[str, None] = {}
        #: (group, key) -> its fingerprint; None if no frame decodes.
        self.fingerprint = lru_cache(_KEPT)(self._fingerprint)
        self.pool = ThreadPoolExecutor(config.workers or usable_cpus())

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    @property
    def unreadable(self) -> list[str]:
        """Keys of videos of which no frame decodes."""
        return sorted(self._unreadable)

    def frames_of(self, group: str, key: str, count: int) -> list[bytes]:
        """Evenly spaced stored frames, in time order."""
        return frames_of(self._shards[group])(key, count)

    def picture_vectors(self, group: Group) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(N, 256) of three frames a video, and of their mirror images; 0 for unreadable ones."""
        made, flipped = [], []
        with progress(f"Looking at {group.name}", len(group.rows), "videos") as shown:
            places = range(len(group.rows))
            for begin in range(0, len(places), _AT_ONCE):
                keys = [group.key(place) for place in places[begin : begin + _AT_ONCE]]
                for few in self.pool.map(lambda key: self._few(group.name, key), keys):
                    made.append(picture_vector(few))
                    flipped.append(picture_vector(mirrored(few)))
                    shown.advance()
        return np.stack(made), np.stack(flipped)

    def _few(self, group: str, key: str) -> NDArray[np.float32]:
        found = self._read(group, key, _FRAMES_TO_SEARCH)
        if found is None:
            self._unreadable[key] = None
            return np.zeros((1, SIDE_PX**2), dtype=np.float32)
        return found.frames

    def _fingerprint(self, group: str, key: str) -> Fingerprint | None:
        return self._read(group, key, MOST_FRAMES)

    def _read(self, group: str, key: str, count: int) -> Fingerprint | None:
        shards = self._shards[group]
        video = shards.find(key)
        numbers = evenly_spaced(shards.frame_count(video), count)
        try:
            times = shards.record(video).frame_times
        except UnreadableFrame:
            times = []
        if len(times) != shards.frame_count(video):  # foreign tars tell none
            times = [float(number) for number in range(shards.frame_count(video))]
        read = shards.read_frames([(video, number) for number in numbers])
        return fingerprint(
            [b"" if isinstance(data, UnreadableFrame) else data for data in read],
            [times[number] for number in numbers],
        )


def _open(spec: tuple[str, ...]) -> ShardSet:
    try:
        return open_shards(spec)
    except InputError as error:
        raise InputError(
            error.what, error.where, "name the shards with --shards, or give --features-only"
        ) from error
