"""When an MP4 or MOV file says its frames are shown, read from its sample tables.

Only a forecast: decoding tells what is really there. It lets ffmpeg scale and hand over the few
frames that will be stored, where without it every frame would have to be scaled and kept until
the last is known.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_MAX_MOOV_BYTES = 64 << 20
_MAX_FRAMES = 4_000_000
_MAX_BOXES = 10_000
# H.264 profiles of 8 bits and 4:2:0, the only pictures whose colour the scaler leaves alone.
_PROFILES = (66, 77, 88, 100)


def forecast_times(path: Path) -> NDArray[np.float64] | None:
    """(F,) seconds at which the frames of the first video track are shown, sorted.

    None for everything but H.264 of 8 bits in 4:2:0 with whole sample tables.
    """
    try:
        # Not to wait for ever where a pipe stands for a file.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            moov = _moov(file)
        return _track_times(moov) if moov is not None else None
    except (OSError, struct.error, ValueError, IndexError, KeyError, OverflowError):
        return None


def _moov(file: BinaryIO) -> bytes | None:
    """The box that describes the file; whatever is before it is skipped, not read."""
    position = 0
    for _ in range(_MAX_BOXES):
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return None
        size, kind = struct.unpack_from(">I4s", header)
        start = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", header, 8)
            start = 16
        if size < start:
            return None
        if kind == b"moov":
            if size > _MAX_MOOV_BYTES:
                return None
            file.seek(position + start)
            return file.read(size - start)
        position += size
    return None


def _mp4_boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if size < 8 or position + size > len(data):
            return
        yield kind, data[position + 8 : position + size]
        position += size


def _inside(data: bytes, *path: bytes) -> bytes:
    """The contents of the first box at a path; raises KeyError when there is none."""
    for kind in path:
        data = dict(reversed(list(_mp4_boxes(data))))[kind]
    return data


def _track_times(moov: bytes) -> NDArray[np.float64] | None:
    for kind, track in _mp4_boxes(moov):
        if kind == b"trak" and _inside(track, b"mdia", b"hdlr")[8:12] == b"vide":
            table = _inside(track, b"mdia", b"minf", b"stbl")
            if not _is_plain_h264(_inside(table, b"stsd")):
                return None
            shown = _composition_ticks(table)
            header = _inside(track, b"mdia", b"mdhd")
            (scale,) = struct.unpack_from(">I", header, 20 if header[0] == 1 else 12)
            if shown is None or not scale:
                return None
            times: NDArray[np.float64] = np.sort(_edited(shown, track, moov, scale)) / scale
            return times
    return None


def _is_plain_h264(stsd: bytes) -> bool:
    if struct.unpack_from(">I", stsd, 4)[0] != 1 or stsd[12:16] not in (b"avc1", b"avc3"):
        return False
    entry = stsd[8 : 8 + struct.unpack_from(">I", stsd, 8)[0]]
    configuration = dict(_mp4_boxes(entry[8 + 78 :])).get(b"avcC", b"")
    return len(configuration) > 1 and configuration[1] in _PROFILES


def _composition_ticks(table: bytes) -> NDArray[np.int64] | None:
    """When each sample is shown, in the order of the file; ISO 14496-12, 8.6.1."""
    counts, steps = _runs(_inside(table, b"stts"))
    if not 0 < counts.sum() <= _MAX_FRAMES:
        return None
    decoded = np.cumsum(np.repeat(steps, counts)) - np.repeat(steps, counts)
    boxes = dict(_mp4_boxes(table))
    if b"ctts" not in boxes:
        return decoded
    counts, offsets = _runs(boxes[b"ctts"])
    if counts.sum() != len(decoded):
        return None
    return decoded + np.repeat(offsets, counts)


def _runs(box: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(counts, values) of a run-length table; values are taken as signed."""
    (length,) = struct.unpack_from(">I", box, 4)
    pairs = np.frombuffer(box, ">u4", 2 * length, 8).reshape(-1, 2)
    return pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.int32).astype(np.int64)


def _edited(shown: NDArray[np.int64], track: bytes, moov: bytes, scale: int) -> NDArray[np.int64]:
    """What is left of the samples by an edit list of one part."""
    try:
        edits = _inside(track, b"edts", b"elst")
    except KeyError:
        return shown
    (length,) = struct.unpack_from(">I", edits, 4)
    if length != 1:
        return shown
    duration, start = struct.unpack_from(">qq" if edits[0] == 1 else ">ii", edits, 8)
    movie = _inside(moov, b"mvhd")
    (movie_scale,) = struct.unpack_from(">I", movie, 20 if movie[0] == 1 else 12)
    end = start + duration * scale / max(1, movie_scale)
    kept = shown[(shown >= start) & (shown < end)] if duration else shown[shown >= start]
    return kept if len(kept) else shown
