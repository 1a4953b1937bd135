"""What sampling needs of every video of a dataset; and ``NAME.videos``, where it is kept.

A dataset of tens of thousands of shards has gigabytes of indexes, nearly all of them positions of
frames. Sampling needs only keys, labels and numbers of frames: for such a dataset they are also in
one file, and an index is read when a frame of its shard is. The file is a cache, made from the
indexes by ``seco prepare`` and ``seco index``.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from shards.atomic import atomic_path
from shards.errors import InputError
from shards.format import ShardInfo
from shards.index import MAX_INDEX_BYTES, NO_LABEL, ShardIndex, key_at, keys_of, read_index
from shards.untrusted import Count, fault, read_regular

MANY_SHARDS = 2_000  # all indexes of fewer are read in two seconds
_MAGIC = b"SECOSET1"
_ARRAYS = {
    "frame_counts": "<u4",  # (V,)
    "labels": "<i4",  # (V,) -1 for none
    "key_end": "<u8",  # (V,) bytes of key_text up to the end of each key
    "key_text": "u1",
}
_MOST_INDEXES = 64  # in memory, about 120 kB each
_READERS = 16  # indexes read at a time
_OVERHEAD = 64  # bytes, at most, of lengths and padding
_ADVICE = "run `seco index` on the whole dataset"


class _Header(msgspec.Struct):
    infos: list[ShardInfo]
    text_bytes: Count


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoList:
    """The V videos of S shards, in the order of the shards."""

    infos: list[ShardInfo]  # (S,)
    frame_counts: NDArray[np.uint32]  # (V,) stored frames
    labels: NDArray[np.int32]  # (V,) -1 for none
    key_end: NDArray[np.uint64]  # (V,) bytes
    key_text: NDArray[np.uint8]  # UTF-8, the keys one after another

    @staticmethod
    def of(indexes: Iterable[ShardIndex]) -> VideoList:
        """Gather it from indexes, of which only one need be in memory at a time."""
        infos: list[ShardInfo] = []
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in _ARRAYS}
        text_bytes = 0
        for index in indexes:
            infos.append(index.info)
            parts["frame_counts"].append(index.frame_counts.astype(np.uint32))
            parts["labels"].append(index.label.copy())
            parts["key_end"].append(index.key_end.astype(np.uint64) + np.uint64(text_bytes))
            parts["key_text"].append(index.key_text.copy())
            text_bytes += len(index.key_text)
        arrays = {
            name: np.concatenate([np.empty(0, _ARRAYS[name]), *found])
            for name, found in parts.items()
        }
        return VideoList(infos=infos, **arrays)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(S,) videos of each shard."""
        return np.array([info.videos for info in self.infos], dtype=np.int64)

    @property
    def keys(self) -> list[str]:
        """(V,) keys, built on each access."""
        return keys_of(self.key_text, self.key_end)

    def key(self, video: int) -> str:
        """Return the key of one video."""
        return key_at(self.key_text, self.key_end, video)

    def require_distinct(self, name: str) -> None:
        """Check that each key occurs only once, because keys identify videos.

        Args:
            name: of the dataset, for errors.

        Raises:
            InputError: some videos occur twice.
        """
        keys, seen = self.keys, set[str]()
        repeated = len(keys) - len(set(keys))
        for video, key in enumerate(keys if repeated else ()):
            if key in seen:
                shard = int(np.searchsorted(np.cumsum(self.counts), video, side="right"))
                raise InputError(
                    f"{repeated} videos occur twice, for example {key}, again in "
                    f"{self.infos[shard].file}",
                    name,
                    "list each dataset once",
                )
            seen.add(key)


def write_videos(path: Path, videos: VideoList) -> None:
    """Write ``NAME.videos`` atomically; the same videos give the same bytes.

    One that would be too large to be read is left out, and an old one is removed.
    """
    header = {
        "infos": [asdict(info) for info in videos.infos],
        "text_bytes": len(videos.key_text),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the arrays, for use in place
    size = len(text) + sum(getattr(videos, name).nbytes for name in _ARRAYS) + _OVERHEAD
    if size > MAX_INDEX_BYTES:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        out.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for name, dtype in _ARRAYS.items():
            data = np.ascontiguousarray(getattr(videos, name), dtype=dtype)
            out.write(data.data)
            out.write(b"\0" * (-data.nbytes % 8))


def read_videos(path: Path) -> VideoList:
    """Read ``NAME.videos``.

    Raises:
        InputError: it cannot be read, or is not complete.
    """
    content = read_regular(path, MAX_INDEX_BYTES)
    try:
        if content[:8] != _MAGIC:
            raise ValueError("wrong magic")
        position = 16 + int.from_bytes(content[8:16], "little")
        header = _HEADER.decode(content[16:position])
        arrays: dict[str, NDArray[Any]] = {}
        for name, dtype in _ARRAYS.items():
            length = sum(info.videos for info in header.infos)
            length = header.text_bytes if name == "key_text" else length
            arrays[name] = np.frombuffer(content, dtype, length, position)
            position += arrays[name].nbytes + (-arrays[name].nbytes % 8)
        if position != len(content):
            raise ValueError("wrong length")
        videos = VideoList(infos=header.infos, **arrays)
        _require_whole(videos)
        return videos
    except (ValueError, OverflowError, msgspec.MsgspecError, RecursionError) as error:
        raise InputError(f"is not a complete list of videos ({fault(error)})", path, _ADVICE) from (
            error
        )


_HEADER = msgspec.json.Decoder(_Header)


def _require_whole(videos: VideoList) -> None:
    ends = videos.key_end
    if (ends[1:] < ends[:-1]).any() or int(ends[-1:].sum()) != len(videos.key_text):
        raise ValueError("keys")
    if int(videos.labels.min(initial=0)) < NO_LABEL:
        raise ValueError("labels")
    frames = per_shard(videos.frame_counts, videos.counts)
    if frames.tolist() != [info.frames for info in videos.infos]:
        raise ValueError("numbers of frames")


def per_shard(values: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the (S,) sums of each shard's values, given (V,) values and (S,) videos a shard."""
    # Not by reduceat: it would copy all values as int64.
    ends = np.cumsum(counts).tolist()
    return np.array(
        [int(values[end - n : end].sum()) for end, n in zip(ends, counts.tolist(), strict=True)],
        dtype=np.int64,
    )


class IndexesOnDisk(Sequence[ShardIndex]):
    """The indexes of the shards of a :class:`VideoList`, read when they are asked for.

    Args:
        tars: (S,) paths of the shards.
        videos: their videos.
    """

    def __init__(self, tars: Sequence[str], videos: VideoList) -> None:
        self._tars = tars
        self._videos = videos
        self._held: OrderedDict[int, ShardIndex] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_held": OrderedDict()}

    def __len__(self) -> int:
        return len(self._tars)

    @overload
    def __getitem__(self, shard: int) -> ShardIndex: ...
    @overload
    def __getitem__(self, shard: slice) -> Sequence[ShardIndex]: ...
    def __getitem__(self, shard: int | slice) -> ShardIndex | Sequence[ShardIndex]:
        """Return an index.

        Raises:
            InputError: it cannot be read, or describes other videos than the list.
        """
        if isinstance(shard, slice):
            return [self[number] for number in range(*shard.indices(len(self)))]
        index = self._held.get(shard)
        if index is None:
            index = self._load(shard)
            self._held[shard] = index
            if len(self._held) > _MOST_INDEXES:
                self._held.popitem(last=False)
        return index

    def __iter__(self) -> Iterator[ShardIndex]:
        """Yield all, read many at a time; none is kept."""
        with ThreadPoolExecutor(_READERS) as readers:
            for first in range(0, len(self), _MOST_INDEXES):
                last = min(first + _MOST_INDEXES, len(self))
                yield from readers.map(self._load, range(first, last))

    def _load(self, shard: int) -> ShardIndex:
        tar = Path(self._tars[shard])
        try:
            index = read_index(tar.with_suffix(".idx"))
        except InputError as error:
            raise InputError(error.what, error.where, _ADVICE) from error
        self._require_same(shard, index)
        return index

    def _require_same(self, shard: int, index: ShardIndex) -> None:
        videos, end = self._videos, int(self._ends[shard])
        rows = slice(end - int(videos.counts[shard]), end)
        start = int(videos.key_end[rows.start - 1]) if rows.start else 0
        key_end = videos.key_end[rows]
        if (
            index.info != videos.infos[shard]
            or (index.frame_counts != videos.frame_counts[rows]).any()
            or (index.label != videos.labels[rows]).any()
            or (index.key_end + np.uint64(start) != key_end).any()
            or (index.key_text != videos.key_text[start : start + len(index.key_text)]).any()
        ):
            what = "has other videos than the list of its dataset (.videos)"
            raise InputError(what, self._tars[shard], _ADVICE)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self._videos.counts)


def videos_beside(tars: Sequence[str]) -> VideoList | None:
    """Return the list of exactly these local shards, if their dataset has one.

    Raises:
        InputError: it is damaged.
    """
    stems = {tar.removesuffix(".tar").rpartition("-")[0] for tar in tars}
    path = Path(f"{next(iter(stems))}.videos")
    if len(tars) < MANY_SHARDS or len(stems) > 1 or not path.is_file():
        return None
    videos = read_videos(path)
    names = [info.file for info in videos.infos]
    return videos if names == [os.path.basename(tar) for tar in tars] else None
