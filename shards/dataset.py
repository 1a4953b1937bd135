"""Shards as a dataset: the names a user gives, and random access to the frames of its videos.

Names are brace patterns, globs, manifests or lists, local or remote. Only the frames asked for are
read.
"""

from __future__ import annotations

import bisect
import glob
import itertools
import re
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import braceexpand
import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.format import Manifest, VideoRecord, parse_manifest, read_manifest
from shards.index import ShardIndex
from shards.storage import (
    Access,
    ByteRange,
    LocalAccess,
    UnreadableFrame,
    fetch_parts,
    in_words,
    is_remote,
    open_filesystem,
    readable,
    told_of,
    try_again,
)
from shards.videos import VideoList

_ANGLE = re.compile(r"<(\d+\.\.\d+(?:\.\.\d+)?)>")
_COMMA_BEFORE_URL = re.compile(r",(?=[A-Za-z][A-Za-z0-9+.-]*://)")
_ADVICE = 'give a pattern such as "shards/k400-{000..999}.tar", a glob, a folder or a manifest'
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
MAX_SHARDS = 1_000_000
_MOST_DIGITS = 12
PIPE = "pipe:"  # WebDataset's: what follows is a command whose output is a tar


def expand_spec(spec: str | Iterable[str]) -> list[str]:
    """Return the addresses of the tars a specification names, in its order, without repeats.

    Accepts ``k400-{000..999}.tar``, the same with ``<000..999>`` (which shells leave alone),
    globs, a manifest (``NAME.json``: all its shards), a folder (every tar in it), or several of
    these, as a list or separated by commas. Any of them may be an fsspec address (``s3://…``; a
    folder then ends with a slash). ``pipe:COMMAND`` stands for itself, with braces expanded.

    Local addresses are paths. Whether remote shards exist is not checked here.

    Raises:
        InputError: nothing matches, or a named local file does not exist.
    """
    parts = [spec] if isinstance(spec, str) else list(spec)
    addresses: dict[str, None] = {}
    for part in parts:
        if part.startswith(PIPE):
            found = _braces(part)
        elif is_remote(part):
            found = [address for url in _COMMA_BEFORE_URL.split(part) for address in _remote(url)]
        else:
            found = [str(path) for path in _local(part.removeprefix("file://"))]
        addresses.update(dict.fromkeys(found))
    if not addresses:
        raise InputError("names no shards", " ".join(parts) or "--shards", _ADVICE)
    return list(addresses)


def local_tars(spec: str | Iterable[str]) -> list[Path]:
    """Return the paths that :func:`expand_spec` names, for code that needs local files.

    Raises:
        InputError: as for :func:`expand_spec`, or a shard is remote.
    """
    addresses = expand_spec(spec)
    for address in addresses:
        if address.startswith(PIPE) or is_remote(address):
            raise InputError("is not on this machine", address, "copy it to a local folder")
    return [Path(address) for address in addresses]


def _braces(pattern: str) -> list[str]:
    braces = _ANGLE.sub(r"{\1}", pattern)
    if _most_expansions(braces) > MAX_SHARDS:
        raise InputError(f"names more than {MAX_SHARDS} shards", pattern, _ADVICE)
    try:
        found = (
            list(itertools.islice(braceexpand.braceexpand(braces), MAX_SHARDS)) if pattern else []
        )
    except ValueError as error:
        raise InputError("has unbalanced braces", pattern, _ADVICE) from error
    return found


def _most_expansions(pattern: str) -> int:
    """Return how many names a pattern stands for, or more where braces are nested."""
    total = 1
    for inside in re.findall(r"\{([^{}]*)", pattern):
        numbers = _RANGE.fullmatch(inside.partition("}")[0])
        if numbers is None:
            total *= inside.count(",") + 1
        elif max(map(len, filter(None, numbers.groups()))) > _MOST_DIGITS:
            return MAX_SHARDS + 1
        else:
            first, last, step = (int(text or 1) for text in numbers.groups())
            total *= abs(last - first) // max(1, abs(step)) + 1
        if total > MAX_SHARDS:
            break
    return total


def _local(part: str) -> list[Path]:
    whole = Path(part)
    if whole.is_dir():
        return _some(sorted(whole.glob("*.tar")), part)
    pieces = [piece for text in _braces(part) for piece in _commas(text)]
    if whole.suffix == ".json" and pieces == [part]:
        manifest = read_manifest(whole)
        return _existing([whole.parent / row.file for row in manifest.shards], part)
    if whole.is_file():
        return [whole]
    found: list[Path] = []
    missing: list[Path] = []
    for pattern in pieces:
        if pattern != part and (pattern.endswith(".json") or Path(pattern).is_dir()):
            found += _local(pattern)
        elif glob.has_magic(pattern) and not Path(pattern).exists():
            found += map(Path, sorted(glob.glob(pattern)))
        else:
            (found if Path(pattern).is_file() else missing).append(Path(pattern))
    if missing:
        several = len(missing) + len(found) > 1
        count = (
            f"{len(missing)} of {len(missing) + len(found)} shards do not exist" if several else ""
        )
        raise InputError(count or "no such shard", missing[0] if several else part, _ADVICE)
    return _some([path for path in found if path.suffix == ".tar"], part)


def _commas(text: str) -> list[str]:
    return [piece for piece in text.split(",") if piece] if not Path(text).exists() else [text]


def _some(paths: list[Any], part: str) -> list[Any]:
    if not paths:
        raise InputError("matches no shards", part, _ADVICE)
    return paths


def _existing(paths: list[Path], part: str) -> list[Path]:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of its {len(paths)} shards are missing, first {missing[0].name}",
            part,
            "copy them next to the manifest or prepare them again",
        )
    return _some(paths, part)


def _remote(url: str) -> list[str]:
    if url.endswith(".json"):
        folder = url.rpartition("/")[0]
        try:
            manifest = read_remote_manifest(url)
        except FileNotFoundError as error:
            raise InputError("not found", url, "check the address") from error
        return _some([f"{folder}/{row.file}" for row in manifest.shards], url)
    if url.endswith("/"):
        url += "*.tar"
    found: list[str] = []
    for pattern in _braces(url):
        found += _remote_glob(pattern) if _has_magic(pattern) else [pattern]
    return _some(found, url)


def _has_magic(url: str) -> bool:
    """Whether the address is a glob; in a web address, ``?`` begins the query."""
    web = url.startswith(("http://", "https://"))
    return any(sign in url for sign in "*[") if web else glob.has_magic(url)


def beside(tar: str, ending: str) -> str:
    """Return the address of the file next to a tar that has another suffix."""
    path, mark, query = tar.partition("?") if is_remote(tar) else (tar, "", "")
    return path.removesuffix(".tar") + ending + mark + query


def _remote_glob(pattern: str) -> list[str]:
    system, path = open_filesystem(pattern)
    try:
        names = try_again(lambda: system.glob(path))
    except Exception as error:
        raise InputError(
            f"cannot be listed ({in_words(error)})", pattern, "check address and credentials"
        ) from error
    return sorted(system.unstrip_protocol(name) for name in names if name.endswith(".tar"))


def read_remote_manifest(url: str) -> Manifest:
    """Read ``NAME.json`` through fsspec.

    Raises:
        FileNotFoundError: it does not exist.
        InputError: it cannot be read, or is not a manifest of this version.
    """
    (content,) = fetch_parts([(url, None, None)])
    if isinstance(content, FileNotFoundError):
        raise content
    return parse_manifest(told_of(content, url), url)


class ShardSet:
    """The videos of several shards, numbered 0 … V-1 in the order of the shards.

    Can be pickled to other processes and used after a fork.

    Args:
        addresses: (S,) addresses of the tars.
        indexes: (S,) their indexes.
        label_names: in index order, or empty.
        access: reads the tars' bytes.
        videos: what the indexes say of the videos, if that is known without reading them all.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        indexes: Sequence[ShardIndex],
        label_names: list[str],
        access: Access | None = None,
        videos: VideoList | None = None,
    ) -> None:
        self.addresses = list(addresses)
        self.indexes = indexes
        self.label_names = label_names
        self.access: Access = access or LocalAccess()
        self.videos = videos or VideoList.of(indexes)
        self.counts = self.videos.counts
        self._ends: list[int] = np.cumsum(self.counts).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @cached_property
    def keys(self) -> list[str]:
        """(V,) keys of the videos; :meth:`key` returns one without building all."""
        return self.videos.keys

    def key(self, video: int) -> str:
        """Return the key of one video."""
        self._require_there(video)
        return self.videos.key(video)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.keys)}

    def find(self, key: str) -> int:
        """Return the number of the video with this key.

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
        return self.videos.labels.astype(np.int32)

    @cached_property
    def frame_counts(self) -> NDArray[np.int64]:
        """(V,) stored frames per video."""
        return self.videos.frame_counts.astype(np.int64)

    @cached_property
    def splits(self) -> dict[str, list[str | None]]:
        """(V,) values by split name ("train", "test", …), None where a video has none."""
        rows = self._details[0]
        names = sorted({name for row in rows for name in row})
        return {name: [row.get(name) for row in rows] for name in names}

    @cached_property
    def _details(self) -> tuple[list[dict[str, str]], list[str | None]]:
        """(V,) splits and (V,) groups, in one pass over the indexes."""
        splits: list[dict[str, str]] = []
        groups: list[str | None] = []
        for index in self.indexes:
            splits += index.splits
            groups += index.groups
        return splits, groups

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """(V,) numbers of groups, such as the clips of one recording; a video alone is one."""
        numbers: dict[str, int] = {}
        names = (
            name if name is not None else f"\0{video}"
            for video, name in enumerate(self._details[1])
        )
        return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)

    @property
    def total_bytes(self) -> int:
        """Total size of the tars in bytes."""
        return sum(info.bytes for info in self.videos.infos)

    @property
    def name(self) -> str:
        """Name of the first dataset: its tars' name without the number."""
        return set_name(self.addresses[0])

    def shard_of(self, video: int) -> str:
        """Return the address of the tar that contains the video."""
        return self.addresses[self._locate(video)[0]]

    def frame_count(self, video: int) -> int:
        """Return the number of stored frames of this video."""
        self._require_there(video)
        return int(self.videos.frame_counts[video])

    def read_frames(self, wanted: Sequence[tuple[int, int]]) -> list[bytes | UnreadableFrame]:
        """Return the JPEG bytes of each (video, frame) pair, or why they cannot be read.

        Raises:
            IndexError: a video has no such frame.
        """
        places = [self._frame_at(video, frame) for video, frame in wanted]
        read = iter(
            self.access.read([at[0] for at in places if not isinstance(at, UnreadableFrame)])
        )
        found: list[bytes | UnreadableFrame] = []
        for at in places:
            if isinstance(at, UnreadableFrame):
                found.append(at)
                continue
            (where, crc), data = at, next(read)
            # libjpeg decodes most single flipped bits without an error.
            if isinstance(data, bytes) and zlib.crc32(data) != crc:
                data = UnreadableFrame(f"{where.address}: the bytes at {where.offset} have changed")
            found.append(data)
        return found

    def _frame_at(self, video: int, frame: int) -> tuple[ByteRange, int] | UnreadableFrame:
        """Return the range of a frame and its CRC-32, or why its shard's index is of no use."""
        shard, row = self._locate(video)
        try:
            at = self.indexes[shard].frame_at(row, frame)
        except InputError as error:
            return UnreadableFrame(str(error))
        return ByteRange(self.addresses[shard], at.offset, at.size), at.crc

    def read_frame(self, video: int, frame: int) -> bytes:
        """Return the JPEG bytes of one stored frame; frames count from 0 in time order.

        Raises:
            UnreadableFrame: the shard no longer holds them.
            IndexError: the video has no such frame.
        """
        (data,) = self.read_frames([(video, frame)])
        return readable(data)

    def record(self, video: int) -> VideoRecord:
        """Return the video's ``KEY.json``; in a foreign tar, a record with only the key.

        Raises:
            UnreadableFrame: the shard no longer holds it, or it is damaged.
        """
        (found,) = self.records([video])
        if isinstance(found, UnreadableFrame):
            raise found
        return found

    def records(self, videos: Sequence[int]) -> list[VideoRecord | UnreadableFrame]:
        """Return the ``KEY.json`` of each video, or why it cannot be read; all are read at once."""
        places = [self._record_at(video) for video in videos]
        read = iter(
            self.access.read([at for at in places if isinstance(at, ByteRange) and at.size])
        )
        return [
            at
            if isinstance(at, UnreadableFrame)
            else _record(self.key(video), at, next(read) if at.size else b"")
            for video, at in zip(videos, places, strict=True)
        ]

    def _record_at(self, video: int) -> ByteRange | UnreadableFrame:
        """Return the range of a video's record, which is empty in a foreign tar."""
        shard, row = self._locate(video)
        try:
            index = self.indexes[shard]
        except InputError as error:
            return UnreadableFrame(str(error))
        offset, size = int(index.record_offset[row]), int(index.record_size[row])
        return ByteRange(self.addresses[shard], offset, size)

    def rows_of(self, shard: int) -> slice:
        """Return which of the V videos a shard holds."""
        end = self._ends[shard]
        return slice(end - int(self.counts[shard]), end)

    def _require_there(self, video: int) -> None:
        if not 0 <= video < len(self):
            raise IndexError(f"no video {video} in a dataset of {len(self)}")

    def _locate(self, video: int) -> tuple[int, int]:
        self._require_there(video)
        shard = bisect.bisect_right(self._ends, video)
        return shard, video - (self._ends[shard - 1] if shard else 0)


def _record(
    key: str, at: ByteRange, data: bytes | UnreadableFrame
) -> VideoRecord | UnreadableFrame:
    if not at.size:
        return VideoRecord(key=key, dataset="", source=key)
    if isinstance(data, UnreadableFrame):
        return data
    try:
        return VideoRecord.from_json(data, f"{at.address}: {key}.json")
    except InputError as error:
        return UnreadableFrame(str(error))


def set_name(address: str) -> str:
    """Return the name of the dataset a tar belongs to: its own without the number."""
    stem = PurePosixPath(address).stem
    return stem.rpartition("-")[0] or stem
