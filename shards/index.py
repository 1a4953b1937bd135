"""The index of a shard (``NAME-000.idx``): where every frame lies, and what sampling needs.

A reader fetches exactly the frames it wants with ``pread`` instead of streaming the tar. The index
is a cache: :func:`build_index` rebuilds it from the tar, also for other WebDataset tars. Nothing in
a tar is ever unpacked.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Annotated, Any, BinaryIO, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from shards.atomic import atomic_path
from shards.errors import InputError
from shards.format import Exclusion, ShardInfo, VideoRecord
from shards.untrusted import Count, decode_json, fault, open_regular, read_regular


class TarMember(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int  # bytes from the start of the tar to its data
    size: int  # bytes

    @property
    def key(self) -> str:
        """WebDataset's group: the name up to the first dot of its base name."""
        folder, _, base = self.name.rpartition("/")
        stem = base.partition(".")[0]
        return f"{folder}/{stem}" if folder else stem

    @property
    def extension(self) -> str:
        """Everything after the first dot of the base name, for example ``0003.jpg``."""
        return self.name.rpartition("/")[2].partition(".")[2]

    @property
    def is_jpeg(self) -> bool:
        """Whether the name has a JPEG suffix."""
        return self.extension.rpartition(".")[2].lower() in ("jpg", "jpeg")

    def read(self, tar: Any) -> bytes:
        """Return its data; shorter than ``size`` if the tar has been cut since."""
        tar.seek(self.offset)
        data: bytes = tar.read(self.size)
        return data


class _BoundedHeader(tarfile.TarInfo):
    """A header whose extensions (long names and the like) have a reasonable length.

    The standard library would read extensions of any length, and search them in quadratic time.
    """

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENSIONS and self.size > _MAX_EXTENSION_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return member


def bounded_tar(file: IO[bytes], stream: bool = False) -> tarfile.TarFile:
    """Open a tar whose headers have a bounded length.

    Args:
        file: open for reading.
        stream: whether it can only be read from beginning to end; it may be compressed.

    Raises:
        tarfile.TarError: it is not one.
    """
    return tarfile.open(fileobj=file, mode="r|*" if stream else "r:", tarinfo=_BoundedHeader)


def tar_members(path: Path) -> Iterator[TarMember]:
    """Yield the files in a tar, in order.

    Raises:
        InputError: not a tar, or an incomplete one.
    """
    try:
        with open_regular(path) as raw:
            yield from members_of(raw, path)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path) from error


def members_of(raw: Any, where: object) -> Iterator[TarMember]:
    """Yield the files in an open tar, in order; as :func:`tar_members`.

    Args:
        raw: has ``seek``, ``tell`` and ``read``.
        where: names it in errors.

    Raises:
        InputError: not a tar, or an incomplete one.
    """
    members_end = 0
    try:
        size = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        with bounded_tar(raw) as tar:
            for member in tar:
                blocks = -(-member.size // tarfile.BLOCKSIZE) if member.isreg() else 0
                members_end = member.offset_data + blocks * tarfile.BLOCKSIZE
                tar.members = []  # type: ignore[attr-defined]  # a tar of a million files must not be held in memory
                if not member.isreg():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("a member ends beyond the file")
                yield TarMember(member.name, member.offset_data, member.size)
            # tarfile accepts a truncated tar, or one with a damaged header, as complete.
            _require_closing_blocks(raw, members_end, size)
    except (tarfile.TarError, EOFError) as error:
        raise InputError(
            f"is truncated or not a tar ({error})", where, "prepare or copy it again"
        ) from error


def _require_closing_blocks(raw: Any, members_end: int, size: int) -> None:
    """Check that only zeros, two blocks or more, follow the last member."""
    if size - members_end < 2 * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the closing blocks are missing")
    raw.seek(members_end)
    while piece := raw.read(1 << 20):
        if piece.strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at or after byte {members_end}")


_MAGIC = b"SECOIDX2"
_ARRAYS = {
    "first_frame": "<u4",  # (V + 1,) frames of video v are first_frame[v] : first_frame[v + 1]
    "frame_offset": "<u8",  # (F,) bytes from the start of the tar to the JPEG
    "frame_size": "<u4",  # (F,) bytes
    "frame_crc": "<u4",  # (F,) CRC-32 of the JPEG
    "record_offset": "<u8",  # (V,) where KEY.json lies; 0 when the tar has none
    "record_size": "<u4",  # (V,)
    "label": "<i4",  # (V,) -1 for none
    "key_end": "<u4",  # (V,) bytes of key_text up to the end of each key
}
_TEXTS = ("key_text", "details")
CONTENTS = (
    "info",
    "keys",
    "splits",
    "sources",
    "groups",
    *list(_ARRAYS)[:-1],
)  # also known from the tar
NO_LABEL = -1
_MAX_EXTENSION_BYTES = 1 << 16
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
MAX_RECORD_BYTES = 64 << 20
MAX_FRAME_BYTES = 256 << 20  # of a JPEG
MAX_INDEX_BYTES = 1 << 30
_MOST_NAMED = 5
_PIECE = 1 << 20  # bytes read at a time
_MAX_LABEL_BYTES = 9  # as text: a label is an i32


class _TextBytes(msgspec.Struct):
    key_text: Count
    details: Count


class _Header(msgspec.Struct):
    """The part of an index that is JSON, except its details."""

    info: ShardInfo
    plan_digest: str
    exclusions: list[Exclusion]
    text_bytes: _TextBytes


class _Details(msgspec.Struct):
    """Per video: its splits, its source with its size in bytes or -1, and its group if any has."""

    splits: list[dict[str, str]]
    sources: list[tuple[str, Annotated[int, msgspec.Meta(ge=-1, lt=2**53)]]]
    groups: list[str | None] | None = None


class FrameAt(NamedTuple):
    """The position of a frame in its tar."""

    offset: int  # bytes
    size: int  # bytes
    crc: int  # CRC-32 of its bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """The contents of one shard; V videos, F frames.

    Training needs only numbers, so texts stay bytes until they are requested: a thousand indexes
    open in a second and take as much memory as their files take disk space.
    """

    info: ShardInfo
    plan_digest: str
    exclusions: list[Exclusion]
    first_frame: NDArray[np.uint32]  # (V + 1,)
    frame_offset: NDArray[np.uint64]  # (F,) bytes
    frame_size: NDArray[np.uint32]  # (F,) bytes
    frame_crc: NDArray[np.uint32]  # (F,)
    record_offset: NDArray[np.uint64]  # (V,) bytes
    record_size: NDArray[np.uint32]  # (V,) bytes
    label: NDArray[np.int32]  # (V,) -1 for none
    key_end: NDArray[np.uint32]  # (V,) bytes
    key_text: NDArray[np.uint8]  # UTF-8, the keys one after another
    details: NDArray[np.uint8]  # JSON of splits and sources

    def key(self, row: int) -> str:
        """Return the key of one video."""
        return key_at(self.key_text, self.key_end, row)

    @property
    def keys(self) -> list[str]:
        """(V,) keys, built on each access: a million strings need not stay in memory."""
        return keys_of(self.key_text, self.key_end)

    @property
    def frame_counts(self) -> NDArray[np.int64]:
        """(V,) stored frames per video."""
        first = self.first_frame.astype(np.int64)
        return first[1:] - first[:-1]

    @cached_property
    def _details(self) -> _Details:
        where, what = self.info.file, "its index is incomplete"
        advice = "rebuild it with `seco index --force`"
        details = decode_json(_Details, self.details.tobytes(), where, what, advice)
        groups = details.splits if details.groups is None else details.groups
        if not len(details.splits) == len(details.sources) == len(groups) == self.info.videos:
            raise InputError(what, where, advice)
        return details

    @property
    def splits(self) -> list[dict[str, str]]:
        """(V,) values of the splits, by split name."""
        return self._details.splits

    @property
    def sources(self) -> list[tuple[str, int]]:
        """(V,) path relative to the raw folder, and size in bytes or -1."""
        return self._details.sources

    @property
    def groups(self) -> list[str | None]:
        """(V,) names of the videos that belong together; None for a video on its own."""
        return self._details.groups or [None] * self.info.videos

    def frame_at(self, row: int, frame: int) -> FrameAt:
        """Return the position of a video's frame; frames count from 0 in time order.

        Raises:
            IndexError: the video has no such frame.
        """
        position = int(self.first_frame[row]) + frame
        if not frame >= 0 or position >= int(self.first_frame[row + 1]):
            raise IndexError(f"video {self.key(row)} has no frame {frame}")
        return FrameAt(
            int(self.frame_offset[position]),
            int(self.frame_size[position]),
            int(self.frame_crc[position]),
        )


def key_at(text: NDArray[np.uint8], ends: NDArray[np.unsignedinteger], row: int) -> str:
    """Return the key of one row of keys stored one after another."""
    start = int(ends[row - 1]) if row else 0
    return text[start : int(ends[row])].tobytes().decode("utf-8", "surrogateescape")


def keys_of(text: NDArray[np.uint8], ends: NDArray[np.unsignedinteger]) -> list[str]:
    """Return all keys stored one after another."""
    whole, places = text.tobytes(), ends.tolist()
    return [
        whole[start:end].decode("utf-8", "surrogateescape")
        for start, end in zip([0, *places], places, strict=False)
    ]


class IndexBuilder:
    """Builds an index from the members of a tar, video by video, in order."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._splits: list[dict[str, str]] = []
        self._sources: list[tuple[str, int]] = []
        self._groups: list[str | None] = []
        self._labels: list[int] = []
        self._records: list[tuple[int, int]] = []
        self._first_frame: list[int] = [0]
        self._frames: list[FrameAt] = []

    def add(
        self,
        key: str,
        record: VideoRecord | None,
        record_at: tuple[int, int],
        frames_at: Sequence[FrameAt],
        label: int | None = None,
    ) -> None:
        """Add a video: its record (None in foreign tars) and the positions of its members.

        Args:
            key: groups the members.
            record: its ``KEY.json``.
            record_at: (offset, size) of the record in bytes, (0, 0) for none.
            frames_at: positions of its frames.
            label: used for a video without a record.
        """
        self._keys.append(key)
        self._splits.append(dict(record.splits) if record else {})
        size = record.source_bytes if record else None
        self._sources.append((record.source if record else "", -1 if size is None else size))
        self._groups.append(record.group if record else None)
        label = record.label if record else label
        self._labels.append(NO_LABEL if label is None else label)
        self._records.append(record_at)
        self._frames.extend(frames_at)
        self._first_frame.append(len(self._frames))

    @property
    def videos(self) -> int:
        """Videos added so far."""
        return len(self._keys)

    def finish(
        self, *, file: str, size: int, sha256: str, plan_digest: str, exclusions: list[Exclusion]
    ) -> ShardIndex:
        """Return the index of everything added."""
        info = ShardInfo(
            file=file,
            bytes=size,
            sha256=sha256,
            videos=len(self._keys),
            frames=len(self._frames),
        )
        records = np.array(self._records, dtype=np.uint64).reshape(-1, 2)
        frames = np.array(self._frames, dtype=np.uint64).reshape(-1, 3)
        keys = [key.encode("utf-8", "surrogateescape") for key in self._keys]
        details: dict[str, Any] = {"splits": self._splits, "sources": self._sources}
        if any(group is not None for group in self._groups):
            details["groups"] = self._groups
        return ShardIndex(
            info=info,
            plan_digest=plan_digest,
            exclusions=list(exclusions),
            first_frame=np.array(self._first_frame, dtype=np.uint32),
            frame_offset=np.ascontiguousarray(frames[:, 0]),
            frame_size=frames[:, 1].astype(np.uint32),
            frame_crc=frames[:, 2].astype(np.uint32),
            record_offset=np.ascontiguousarray(records[:, 0]),
            record_size=records[:, 1].astype(np.uint32),
            label=np.array(self._labels, dtype=np.int32),
            key_end=np.cumsum([len(key) for key in keys], dtype=np.uint32),
            key_text=np.frombuffer(b"".join(keys), dtype=np.uint8),
            details=np.frombuffer(json.dumps(details).encode(), dtype=np.uint8),
        )


def write_index(path: Path, index: ShardIndex) -> None:
    """Write ``index`` atomically; the same index gives the same bytes."""
    header = {
        "info": asdict(index.info),
        "plan_digest": index.plan_digest,
        "exclusions": [asdict(row) for row in index.exclusions],
        "text_bytes": {name: len(getattr(index, name)) for name in _TEXTS},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the arrays, for use in place
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        out.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for name, dtype in {**_ARRAYS, **dict.fromkeys(_TEXTS, "u1")}.items():
            data = np.ascontiguousarray(getattr(index, name), dtype=dtype).tobytes()
            out.write(data + b"\0" * (-len(data) % 8))


def read_index(path: Path) -> ShardIndex:
    """Read ``NAME-000.idx``.

    Raises:
        InputError: as for :func:`parse_index`, or the file cannot be read.
    """
    # Not mapped: a mapping keeps its file open, and the limit is usually 1,024 per process.
    return parse_index(read_regular(path, MAX_INDEX_BYTES), path)


def parse_index(content: bytes, where: object) -> ShardIndex:
    """Parse an index file's content; the arrays are views of ``content``.

    Raises:
        InputError: ``where`` is not an index, or its length is not what its header says.
    """
    try:
        if content[:7] == _MAGIC[:7] and content[:8] != _MAGIC:
            raise InputError(
                "is an index of another version", where, "rebuild it with `seco index --force`"
            )
        if content[:8] != _MAGIC:
            raise ValueError("wrong magic")
        position = 16 + int.from_bytes(content[8:16], "little")
        header = _HEADER.decode(content[16:position])
        info = header.info
        frames = ("frame_offset", "frame_size", "frame_crc")
        lengths = {"first_frame": info.videos + 1, **dict.fromkeys(frames, info.frames)}
        lengths |= {name: getattr(header.text_bytes, name) for name in _TEXTS}
        arrays: dict[str, NDArray[Any]] = {}
        for name, dtype in {**_ARRAYS, **dict.fromkeys(_TEXTS, "u1")}.items():
            length = lengths.get(name, info.videos)
            arrays[name] = np.frombuffer(content, dtype, length, position)
            position += arrays[name].nbytes + (-arrays[name].nbytes % 8)
        if position != len(content):
            raise ValueError("wrong length")
        _require_inside(arrays, info)
        return ShardIndex(
            info=info,
            plan_digest=header.plan_digest,
            exclusions=header.exclusions,
            **arrays,
        )
    except InputError:
        raise
    except (ValueError, OverflowError, msgspec.MsgspecError, RecursionError) as error:
        raise InputError(
            f"is not a complete index ({fault(error)})",
            where,
            "delete it: it is rebuilt from the tar",
        ) from error


_HEADER = msgspec.json.Decoder(_Header)


def _require_inside(arrays: dict[str, NDArray[Any]], info: ShardInfo) -> None:
    """Check the arrays: a bad index must not send a reader outside the tar or into huge buffers."""
    first = arrays["first_frame"].astype(np.int64)
    if first[0] != 0 or first[-1] != info.frames or (np.diff(first) < 0).any():
        raise ValueError("frame ranges")
    for kind in ("frame", "record"):
        ends = arrays[f"{kind}_offset"].astype(np.float64) + arrays[f"{kind}_size"]
        if len(ends) and ends.max() > info.bytes:
            raise ValueError("offsets beyond the end")
        most = MAX_FRAME_BYTES if kind == "frame" else MAX_RECORD_BYTES
        if len(ends) and int(arrays[f"{kind}_size"].max()) > most:
            raise ValueError(f"a {kind} of more than {most >> 20} MiB")
    key_end = arrays["key_end"].astype(np.int64)
    if (np.diff(key_end, prepend=0) < 0).any() or key_end[-1:].sum() != len(arrays["key_text"]):
        raise ValueError("keys")
    if len(arrays["label"]) and int(arrays["label"].min()) < NO_LABEL:
        raise ValueError("labels")


def build_index(tar_path: Path) -> ShardIndex:
    """Build the index from the tar itself: one of ours, or a foreign WebDataset tar of JPEGs.

    Members are grouped by the part of their base name before its first dot, as in WebDataset. In
    each group, ``*.json`` is the record if it is one of ours, ``*.jpg``/``*.jpeg`` are the frames
    in tar order, and a whole number in ``*.cls`` is the label.

    Raises:
        InputError: not a tar, or a truncated one.
    """
    builder = IndexBuilder()
    others: set[str] = set()
    with open_regular(tar_path) as raw:
        for key, members in itertools.groupby(tar_members(tar_path), key=lambda row: row.key):
            record: VideoRecord | None = None
            record_at = (0, 0)
            label: int | None = None
            frames: list[FrameAt] = []
            for member in members:
                if member.extension == "json" and member.size <= MAX_RECORD_BYTES:
                    record = _record_or_none(member.read(raw))
                    record_at = (member.offset, member.size) if record else (0, 0)
                elif member.extension == "cls":
                    label = label_of(member, raw)
                elif member.is_jpeg and member.size > MAX_FRAME_BYTES:
                    raise InputError(f"{member.name} is too large for a frame", tar_path)
                elif member.is_jpeg:
                    frames.append(_frame_at(member, raw))
                elif len(others) < _MOST_NAMED:
                    others.add(member.extension.rpartition(".")[2])
            if frames:
                builder.add(key, record, record_at, frames, label)
    if others and not builder.videos:
        raise InputError(
            f"holds no JPEG frames, but {', '.join(sorted(others))}",
            tar_path,
            "to store the frames of its videos, run `seco prepare wds`",
        )
    return builder.finish(
        file=tar_path.name,
        size=tar_path.stat().st_size,
        sha256=sha256_of(tar_path),
        plan_digest="",
        exclusions=[],
    )


def _frame_at(member: TarMember, raw: BinaryIO) -> FrameAt:
    crc, left = 0, member.size
    raw.seek(member.offset)
    while left and (piece := raw.read(min(left, _PIECE))):
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    return FrameAt(member.offset, member.size, crc)


def label_of(member: TarMember, tar: Any) -> int | None:
    """Return the whole number in ``KEY.cls``, or None."""
    text = member.read(tar).strip() if member.size <= _MAX_LABEL_BYTES else b""
    return int(text) if text.isdigit() else None


def _record_or_none(data: bytes) -> VideoRecord | None:
    try:
        return VideoRecord.from_json(data)
    except InputError:
        return None


def sha256_of(path: Path) -> str:
    """Return the file's SHA-256 as hexadecimal digits, reading it in pieces."""
    digest = hashlib.sha256()
    with open_regular(path) as data:
        while piece := data.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
