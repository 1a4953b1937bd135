"""The index of a shard (``NAME-000.idx``): where every frame lies, and what sampling needs.

A reader fetches exactly the frames it wants with ``pread`` instead of streaming a whole tar. The
index is a cache: :func:`build_index` makes it again from the tar, foreign WebDataset tars included.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.atomic import atomic_path
from shards.errors import InputError
from shards.format import Exclusion, ShardInfo, VideoRecord
from shards.tar_members import tar_members

_MAGIC = b"SECOIDX1"
_ARRAYS = {
    "first_frame": "<u4",  # (V + 1,) frames of video v are first_frame[v] : first_frame[v + 1]
    "frame_offset": "<u8",  # (F,) bytes from the start of the tar to the JPEG
    "frame_size": "<u4",  # (F,) bytes
    "record_offset": "<u8",  # (V,) where KEY.json lies; 0 when the tar has none
    "record_size": "<u4",  # (V,)
    "label": "<i4",  # (V,) -1 for none
}
_NO_LABEL = -1
MAX_RECORD_BYTES = 64 << 20
_MAX_LABEL_BYTES = 9  # as text: a label is an i32


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What one shard holds; V videos, F frames."""

    info: ShardInfo
    plan_digest: str
    exclusions: list[Exclusion]
    keys: list[str]
    splits: list[dict[str, str]]
    sources: list[tuple[str, int]]  # (V,) path relative to the raw folder, and its bytes or -1
    first_frame: NDArray[np.uint32]  # (V + 1,)
    frame_offset: NDArray[np.uint64]  # (F,) bytes
    frame_size: NDArray[np.uint32]  # (F,) bytes
    record_offset: NDArray[np.uint64]  # (V,) bytes
    record_size: NDArray[np.uint32]  # (V,) bytes
    label: NDArray[np.int32]  # (V,) -1 for none


class IndexBuilder:
    """Collects the members of a tar, video by video, in their order."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._splits: list[dict[str, str]] = []
        self._sources: list[tuple[str, int]] = []
        self._labels: list[int] = []
        self._records: list[tuple[int, int]] = []
        self._first_frame: list[int] = [0]
        self._frames: list[tuple[int, int]] = []

    def add(
        self,
        key: str,
        record: VideoRecord | None,
        record_at: tuple[int, int],
        frames_at: Sequence[tuple[int, int]],
        label: int | None = None,
    ) -> None:
        """One video: its record (None in foreign tars) and the (offset, size) of its members.

        Args:
            label: of a video without a record.
        """
        self._keys.append(key)
        self._splits.append(dict(record.splits) if record else {})
        size = record.source_bytes if record else None
        self._sources.append((record.source if record else "", -1 if size is None else size))
        label = record.label if record else label
        self._labels.append(_NO_LABEL if label is None else label)
        self._records.append(record_at)
        self._frames.extend(frames_at)
        self._first_frame.append(len(self._frames))

    def finish(
        self, *, file: str, size: int, sha256: str, plan_digest: str, exclusions: list[Exclusion]
    ) -> ShardIndex:
        """The index of all that was added."""
        info = ShardInfo(
            file=file,
            bytes=size,
            sha256=sha256,
            videos=len(self._keys),
            frames=len(self._frames),
        )
        records = np.array(self._records, dtype=np.uint64).reshape(-1, 2)
        frames = np.array(self._frames, dtype=np.uint64).reshape(-1, 2)
        return ShardIndex(
            info=info,
            plan_digest=plan_digest,
            exclusions=list(exclusions),
            keys=self._keys,
            splits=self._splits,
            sources=self._sources,
            first_frame=np.array(self._first_frame, dtype=np.uint32),
            frame_offset=np.ascontiguousarray(frames[:, 0]),
            frame_size=frames[:, 1].astype(np.uint32),
            record_offset=np.ascontiguousarray(records[:, 0]),
            record_size=records[:, 1].astype(np.uint32),
            label=np.array(self._labels, dtype=np.int32),
        )


def write_index(path: Path, index: ShardIndex) -> None:
    """Write ``index`` atomically; the same index gives the same bytes."""
    header = {
        "info": asdict(index.info),
        "plan_digest": index.plan_digest,
        "exclusions": [asdict(row) for row in index.exclusions],
        "keys": index.keys,
        "splits": index.splits,
        "sources": index.sources,
    }
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # arrays start on 8 bytes, so that they can be mapped
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        out.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for name, dtype in _ARRAYS.items():
            data = np.ascontiguousarray(getattr(index, name), dtype=dtype).tobytes()
            out.write(data + b"\0" * (-len(data) % 8))


def read_index(path: Path) -> ShardIndex:
    """Read ``NAME-000.idx``; the arrays are views of one memory map.

    Raises:
        InputError: the file is not an index, or is shorter than its header says.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path) from error
    except ValueError as error:  # an empty file cannot be mapped
        raise _broken(path) from error
    try:
        if data[:8].tobytes() != _MAGIC:
            raise ValueError("wrong magic")
        position = 16 + int.from_bytes(data[8:16].tobytes(), "little")
        header = json.loads(data[16:position].tobytes())
        info = ShardInfo(**header["info"])
        lengths = {"first_frame": info.videos + 1, "frame_offset": info.frames}
        lengths |= {"frame_size": info.frames}
        arrays = {}
        for name, dtype in _ARRAYS.items():
            size = lengths.get(name, info.videos) * np.dtype(dtype).itemsize
            arrays[name] = data[position : position + size].view(dtype)
            position += size + (-size % 8)
        columns = (header["keys"], header["splits"], header["sources"])
        if position != len(data) or any(len(column) != info.videos for column in columns):
            raise ValueError("wrong length")
        _require_inside(arrays, info)
        return ShardIndex(
            info=info,
            plan_digest=header["plan_digest"],
            exclusions=[Exclusion(**row) for row in header["exclusions"]],
            keys=header["keys"],
            splits=header["splits"],
            sources=[(str(source), int(size)) for source, size in header["sources"]],
            **arrays,
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _broken(path) from error


def _require_inside(arrays: dict[str, NDArray[Any]], info: ShardInfo) -> None:
    """An index from elsewhere must not send a reader outside the tar or into huge buffers."""
    first = arrays["first_frame"].astype(np.int64)
    if first[0] != 0 or first[-1] != info.frames or (np.diff(first) < 0).any():
        raise ValueError("frame ranges")
    for kind in ("frame", "record"):
        ends = arrays[f"{kind}_offset"].astype(np.float64) + arrays[f"{kind}_size"]
        if len(ends) and ends.max() > info.bytes:
            raise ValueError("offsets beyond the end")


def _broken(path: Path) -> InputError:
    return InputError("is not a whole index", path, "delete it: it is rebuilt from the tar")


def build_index(tar_path: Path) -> ShardIndex:
    """Make the index from the tar itself, ours or a foreign WebDataset tar of JPEG members.

    Members are grouped by the part of their base name before its first dot, as WebDataset does;
    of each group, ``*.json`` is the record when it is one of ours, ``*.jpg``/``*.jpeg`` are the
    frames in the order of the tar, and a whole number in ``*.cls`` is the label.

    Raises:
        InputError: not a tar, or one that ends in the middle of a member.
    """
    builder = IndexBuilder()
    with open(tar_path, "rb") as raw:
        for key, members in itertools.groupby(tar_members(tar_path), key=lambda row: row.key):
            record: VideoRecord | None = None
            record_at = (0, 0)
            label: int | None = None
            frames: list[tuple[int, int]] = []
            for member in members:
                if member.extension == "json" and member.size <= MAX_RECORD_BYTES:
                    record = _record_or_none(member.read(raw))
                    record_at = (member.offset, member.size) if record else (0, 0)
                elif member.extension == "cls" and member.size <= _MAX_LABEL_BYTES:
                    label = _label_or_none(member.read(raw))
                elif member.is_jpeg:
                    frames.append((member.offset, member.size))
            if frames:
                builder.add(key, record, record_at, frames, label)
    return builder.finish(
        file=tar_path.name,
        size=tar_path.stat().st_size,
        sha256=sha256_of(tar_path),
        plan_digest="",
        exclusions=[],
    )


def _label_or_none(data: bytes) -> int | None:
    text = data.strip()
    return int(text) if text.isdigit() else None


def _record_or_none(data: bytes) -> VideoRecord | None:
    try:
        return VideoRecord.from_json(data)
    except (ValueError, TypeError, RecursionError):
        return None


def sha256_of(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as data:
        while piece := data.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
