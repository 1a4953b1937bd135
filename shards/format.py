"""What a shard holds (format version 1): records of videos, keys, and the manifest.

``docs/shards.md`` is the specification; this file is its code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from shards.errors import InputError
from shards.untrusted import Count, FileName, Label, decode_json, read_regular

FORMAT_VERSION = 1
Pixels = Annotated[int, Meta(ge=0, le=65_535)]  # a JPEG has no more
Box = Annotated[list[float], Meta(min_length=4, max_length=4)]
Flag = Annotated[int, Meta(ge=0, le=255)]

_OPTIONAL = ("boxes", "absence", "cover", "group", "start", "duration", "metadata")
_NOT_KEY = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class VideoRecord:
    """``KEY.json``: everything known about one stored video except its pictures.

    ``frame_times`` are the presentation times in seconds of the stored frames; ``boxes`` are
    ``[x, y, w, h]`` in px of the stored frames, one per frame (tracking datasets only). They are
    unchanged from the dataset: the first pixel is 1, not 0. GOT-10k's test sequences have only the
    first box.

    A clip is a part of a longer recording: ``group`` names the recording, ``start`` and
    ``duration`` tell which seconds of it, and ``frame_times`` count from ``start``.
    """

    key: str
    dataset: str
    source: str  # path relative to the raw folder
    label: Label | None = None
    label_name: str | None = None
    splits: dict[str, str] = field(default_factory=dict)  # {"1": "train"} or {"official": "val"}
    width: Pixels = 0
    height: Pixels = 0
    frame_times: list[float] = field(default_factory=list)
    source_fps: float | None = None
    source_frames: Count | None = None  # frames that decoded
    source_duration: float | None = None  # seconds, according to the container
    source_bytes: Count | None = None  # size of the file it was made from
    boxes: list[Box] | None = None
    absence: list[Flag] | None = None
    cover: list[Flag] | None = None
    group: str | None = None  # videos that belong together: clips of a recording, one camera
    start: float | None = None  # seconds from the beginning of ``source``
    duration: float | None = None  # seconds
    metadata: dict[str, str] | None = None  # other columns of the list it comes from

    def to_json(self) -> bytes:
        """Return a line of JSON, fields in the order above, without the later ones of None."""
        fields: dict[str, Any] = {"format_version": FORMAT_VERSION}
        fields |= dataclasses.asdict(self)
        for name in _OPTIONAL:
            if fields[name] is None:
                del fields[name]
        return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8")

    @staticmethod
    def from_json(data: bytes, where: object = None) -> VideoRecord:
        """Parse ``KEY.json``, ignoring unknown fields so that later minor versions still load.

        Args:
            data: the file's content.
            where: names it in errors.

        Raises:
            InputError: not JSON, or not a record of this format version.
        """
        what = f"is not a video record of format version {FORMAT_VERSION}"
        if decode_json(_Version, data, where, what).format_version != FORMAT_VERSION:
            raise InputError(what, where)
        return decode_json(VideoRecord, data, where, what)


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """A video that is not in the dataset: its path, the kind of failure, and the tool's message."""

    source: str
    kind: str  # missing, unreadable, no-video-stream, zero-frames, too-short, timeout, …
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)  # there may be tens of thousands
class ShardInfo:
    """One row of the manifest."""

    file: FileName
    bytes: Count
    sha256: str
    videos: Count
    frames: Count


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``NAME.json``: describes the dataset and lists its shards."""

    name: str
    dataset: str
    settings: dict[str, Any]
    ffmpeg_version: str
    label_names: list[str]  # in index order; empty if there are none, or numbers only
    shards: list[ShardInfo]
    excluded: Count
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in a fixed order, for :func:`shards.atomic.write_json`."""
        fields = dataclasses.asdict(self)
        return {"format_version": fields.pop("format_version"), **fields}


def read_manifest(path: Path) -> Manifest:
    """Read ``NAME.json``.

    Raises:
        InputError: as for :func:`parse_manifest`, or the file cannot be read.
    """
    advice = "check the path; `seco prepare` creates it"
    return parse_manifest(read_regular(path, fix=advice), path)


class _Version(Struct):
    format_version: Any = None


def parse_manifest(content: bytes, where: object) -> Manifest:
    """Parse a manifest file's content.

    Raises:
        InputError: ``where`` is not a manifest of this version.
    """
    what, advice = "is not a shard manifest", "give a dataset's NAME.json"
    version = decode_json(_Version, content, where, what, advice).format_version
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise InputError(
            f"has format version {version}; this toolkit reads {FORMAT_VERSION}", where
        )
    return decode_json(Manifest, content, where, what, advice)


KEY_DIGITS = (0, 8, 16)  # of the digest in a key, where shorter ones collide


def make_keys(sources: Iterable[str]) -> list[str]:
    """Return a tar-safe key for each source: only letters, digits, ``_`` and ``-``.

    WebDataset cuts a member's name at its first dot and groups by what precedes it, so a key
    contains neither dots nor slashes. Where plain keys collide (ignoring case, because tars get
    unpacked on case-insensitive disks), each of them gets eight hex digits of its path's SHA-1, so
    that a key does not depend on the order of the list; sixteen where these collide again.
    """
    sources = list(sources)
    keys = [plain_key(source) for source in sources]
    for digits in KEY_DIGITS[1:]:
        seen = Counter(key.lower() for key in keys)
        keys = [
            key if seen[key.lower()] == 1 else distinct_key(source, digits)
            for key, source in zip(keys, sources, strict=True)
        ]
    return keys


def plain_key(source: str) -> str:
    """Return the key of a source whose name is its own."""
    return _NOT_KEY.sub("_", _stem(source)) or "video"


def distinct_key(source: str, digits: int) -> str:
    """Return a key with so many digits of the source's SHA-1."""
    key = plain_key(source)
    return f"{key}-{hashlib.sha1(source.encode()).hexdigest()[:digits]}" if digits else key


def _stem(source: str) -> str:
    name = source.replace("\\", "/").rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[0] if "." in name[1:] else name
