"""Finished shards of an earlier run: found, compared with the plan, and read back for a retry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines._adapter import Video, source_bytes
from pipelines._plan import SetPlan, ShardPlan
from shards.access import UnreadableFrame
from shards.errors import InputError
from shards.format import Exclusion, ShardInfo, VideoRecord
from shards.index import ShardIndex, read_index
from shards.reader import ShardSet
from shards.storage import Storage

_MOST_NAMED = 3


def finished_indexes(plan: SetPlan, storage: Storage) -> dict[str, ShardIndex]:
    """The indexes of those shards of the plan that an earlier run has finished, by shard name.

    Raises:
        InputError: the folder holds shards of this name from another plan, or from files that
            have changed since.
    """
    done: dict[str, ShardIndex] = {}
    planned = {shard.name: shard for shard in plan.shards}
    sizes = storage.sizes()
    pattern = re.compile(re.escape(plan.name) + r"-\d{3,}\.idx")
    for file in sorted(name for name in sizes if pattern.fullmatch(name)):
        name = file.removesuffix(".idx")
        try:
            with storage.reading(file) as path:
                index = read_index(path)
        except InputError:
            continue  # half a file of a crashed disk: the shard is built again, if it is planned
        shard = planned.get(name)
        if shard is None or index.plan_digest != shard.digest:
            raise InputError(
                f"holds shards of {plan.name} prepared from other videos, with other settings or "
                "by another ffmpeg",
                storage.url,
                "choose another --out or --name, or delete them",
            )
        if sizes.get(shard.tar) == index.info.bytes:
            _require_same_sources(shard, index, storage)
            done[name] = index
    return done


def _require_same_sources(shard: ShardPlan, index: ShardIndex, storage: Storage) -> None:
    """Other files of the same names are another input; files that have gone are not."""
    videos = {video.key: video for video in shard.videos}
    changed = [
        source
        for key, (source, size) in zip(index.keys, index.sources, strict=True)
        if key in videos and _size_now(videos[key], source) not in (size, -1)
    ]
    if changed:
        named = ", ".join(changed[:_MOST_NAMED]) + (", …" if changed[_MOST_NAMED:] else "")
        raise InputError(
            f"{shard.tar} was made from other files than those now in --src: {named}",
            storage.url,
            f"delete {shard.index} to have it made again, or choose another --out or --name",
        )


def _size_now(video: Video, source: str) -> int:
    return source_bytes(video) if video.source == source else -2


class FinishedShard:
    """The videos a finished shard holds, to be taken over as they are."""

    def __init__(self, tar: Path, index: ShardIndex) -> None:
        self.info: ShardInfo = index.info
        self.exclusions: Sequence[Exclusion] = index.exclusions
        self._set = ShardSet([str(tar)], [index], [])
        self._keys = frozenset(index.keys)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def read(self, key: str) -> tuple[VideoRecord, list[bytes]]:
        """Record and frames of one video.

        Raises:
            InputError: the tar is damaged.
        """
        video = self._set.find(key)
        try:
            frames = [
                self._set.read_frame(video, frame) for frame in range(self._set.frame_count(video))
            ]
            return self._set.record(video), frames
        except UnreadableFrame as error:
            raise InputError(str(error), fix="see `seco verify`") from error


@contextmanager
def finished_shard(storage: Storage, plan: ShardPlan) -> Iterator[FinishedShard]:
    """The shard as an earlier run left it."""
    with storage.reading(plan.tar) as tar, storage.reading(plan.index) as path:
        yield FinishedShard(tar, read_index(path))
