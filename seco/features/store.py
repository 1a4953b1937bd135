"""Feature folders: what ``extract-features`` writes and every evaluation reads.

``features.npy`` (V, D) float32, ``halves.npy`` (V, 2, D) float32 (the means over the first and the
second half of a video's frames), ``videos.csv`` (one row a video, in the same order) and
``meta.json`` (the encoder and how frames were taken), which is written last: a folder without it
is unfinished. With ``--per-frame`` also ``frames.npy`` (F, D) float32, the features of all frames,
video after video. What cannot be read is in ``errors.csv``.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from seco.data.splits import UNLABELLED
from seco.features.matrix import release
from shards.atomic import atomic_path, write_csv, write_json
from shards.errors import InputError
from shards.untrusted import Count, decode_json, open_regular, read_regular, real_path

FORMAT_VERSION = 1
FEATURES, HALVES, FRAMES = "features.npy", "halves.npy", "frames.npy"
PARTS = "parts"  # subfolder with the partial results of an extraction
VIDEOS, META, ERRORS = "videos.csv", "meta.json", "errors.csv"
# What other modules write next to the features they evaluated.
RESULTS = (
    "probe.json",
    "probe-confusion.png",
    "probe-per-class.csv",
    "retrieval.json",
    "duplicates.csv",
)
PROBES = "probe-"  # prefix of the folders of probes with other methods and splits
COLUMNS = ("key", "source", "label", "label_name", "frames", "shard")
SPLIT = "split."
GROUP = "group"  # optional column; the same for videos of one recording
_BLOCK_VALUES = 1 << 24
_MAX_TABLE_BYTES = 4 << 30


def require_finite(array: NDArray[np.float32], keys: Sequence[str], folder: Path) -> None:
    """Check that no video (row) contains NaN or infinity.

    Raises:
        InputError: one does; it is named.
    """
    rows = max(1, _BLOCK_VALUES // max(1, int(np.prod(array.shape[1:]))))
    for start in range(0, len(array), rows):
        block = array[start : start + rows]
        bad = np.flatnonzero(~np.isfinite(block).reshape(len(block), -1).all(axis=1))
        release(array)
        if len(bad):
            raise InputError(
                f"the features of {keys[start + int(bad[0])]} are not finite",
                folder,
                "the run of this checkpoint may have diverged",
            )


def discard(path: Path) -> None:
    """Remove a file if it exists.

    Raises:
        InputError: its folder is not writable.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot be written to ({error.strerror})", path.parent) from error


Floats = NDArray[np.float32]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class FeaturePart:
    """Some videos of a dataset; the callables are called when needed, more than once.

    Args:
        rows: returns one row per video: key, source, label (None for none), label_name, frames,
            shard, ``splits``, a dict such as ``{"1": "train"}``, and optionally ``group``.
        arrays: returns features (v, D), halves (v, 2, D), and the features of all frames (f, D) or
            None.
        failures: (key, shard, why) of each video without a row.
    """

    rows: Callable[[], Rows]
    arrays: Callable[[], tuple[Floats, Floats, Floats | None]]
    failures: Sequence[tuple[str, str, str]] = ()


def write_features(
    folder: Path,
    features: Floats,
    halves: Floats,
    rows: Rows,
    meta: Mapping[str, Any],
    frames: Floats | None = None,
) -> None:
    """Write a feature folder from memory: :func:`write_feature_parts` with one part."""
    write_feature_parts(
        folder, [FeaturePart(lambda: rows, lambda: (features, halves, frames))], meta
    )


def write_feature_parts(
    folder: Path,
    parts: Sequence[FeaturePart],
    meta: Mapping[str, Any],
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Write a feature folder, replacing any that exists.

    Args:
        folder: created if needed.
        parts: in the order of the rows.
        meta: encoder (arch, checkpoint, sha256, seed), shards, frames, short_edge, crop_size,
            toolkit; the format version and the encoder's dimension are added.
        before_each: called before each part; an exception ends the writing.

    Raises:
        ValueError: sizes do not match, or there is no video.
        InputError: a feature is not finite, or the folder cannot be written.
    """
    splits: set[str] = set()
    grouped = False
    with contextlib.ExitStack() as files:
        open_arrays: dict[str, _GrowingArray] = {}
        for part in parts:
            before_each()
            rows = part.rows()
            splits.update(name for row in rows for name in row["splits"])
            grouped = grouped or any(row.get(GROUP) is not None for row in rows)
            for name, array in _checked(part, rows, folder).items() if rows else ():
                if name not in open_arrays:
                    temporary = files.enter_context(atomic_path(folder / name))
                    file = files.enter_context(open(temporary, "wb"))
                    open_arrays[name] = _GrowingArray(file, array.shape[1:])
                open_arrays[name].append(array)
        if not open_arrays:
            raise ValueError("there is no video to write")
        for growing in open_arrays.values():
            growing.finish()
        dimension = open_arrays[FEATURES].shape[1]
        # Without meta.json the folder is unfinished, so a mixture of old and new is never read.
        discard(folder / META)
        # Results of the old features would be taken for those of the new ones.
        for name in (*RESULTS, FRAMES, ERRORS):
            discard(folder / name)
        for other in folder.glob(f"{PROBES}*/"):
            for name in RESULTS:
                discard(other / name)
            with contextlib.suppress(OSError):  # not empty: it holds files of the user's
                other.rmdir()
    _write_csv(folder / VIDEOS, _table(parts, sorted(splits), [GROUP] if grouped else []))
    failures = [row for part in parts for row in part.failures]
    if failures:
        _write_csv(folder / ERRORS, [("key", "shard", "message"), *failures])
    encoder = {**meta["encoder"], "dimension": dimension}
    write_json(folder / META, {"format_version": FORMAT_VERSION, **meta, "encoder": encoder})


class _GrowingArray:
    """Writes a float32 ``.npy`` file whose length is known only at the end.

    NumPy pads the header for any length, so the bytes equal those of ``np.save``.
    """

    def __init__(self, file: BinaryIO, shape: tuple[int, ...]) -> None:
        self._file = file
        self._shape = shape
        self.length = 0
        self._write_header()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length, *self._shape)

    def append(self, rows: Floats) -> None:
        """Append rows; raises ValueError if their shape does not match."""
        if rows.shape[1:] != self._shape:
            raise ValueError(f"{rows.shape} cannot be appended to {self.shape}")
        self._file.write(np.ascontiguousarray(rows, dtype="<f4").data)
        self.length += len(rows)

    def finish(self) -> None:
        """Write the final header, once all rows have been appended."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self._file, header)


def _checked(part: FeaturePart, rows: Rows, folder: Path) -> dict[str, Floats]:
    """Check a part's arrays; return them by file name."""
    features, halves, frames = part.arrays()
    videos, dimension = features.shape
    if halves.shape != (videos, 2, dimension) or len(rows) != videos:
        raise ValueError(f"{features.shape}, {halves.shape} and {len(rows)} rows do not match")
    keys = [str(row["key"]) for row in rows]
    arrays = {FEATURES: features, HALVES: halves}
    require_finite(features, keys, folder)
    require_finite(halves, keys, folder)
    if frames is not None:
        counts = [int(row["frames"]) for row in rows]
        if frames.shape != (sum(counts), dimension):
            raise ValueError(f"{frames.shape} are not {sum(counts)} frames of {dimension} values")
        keys = [key for key, count in zip(keys, counts, strict=True) for _ in range(count)]
        require_finite(frames, keys, folder)
        arrays[FRAMES] = frames
    return arrays


def _table(
    parts: Sequence[FeaturePart], splits: Sequence[str], more: Sequence[str]
) -> Iterator[Sequence[object]]:
    yield [*COLUMNS, *(SPLIT + name for name in splits), *more]
    for part in parts:
        for row in part.rows():
            # The csv module writes None as an empty field.
            values = [row[c] for c in COLUMNS] + [row["splits"].get(name) for name in splits]
            yield values + [row.get(name) for name in more]


def _write_csv(path: Path, rows: Iterator[Sequence[object]] | Sequence[Sequence[object]]) -> None:
    # backslashreplace: a lone surrogate in a file name must not waste hours of extraction.
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        write_csv(file, rows)


_EXTRACT_AGAIN = "run `seco extract-features` again"


@dataclass(frozen=True)
class Features:
    """A feature folder; arrays are memory-mapped and read-only."""

    folder: Path
    features: NDArray[np.float32]  # (V, D)
    halves: NDArray[np.float32]  # (V, 2, D)
    keys: list[str]
    sources: list[str]
    labels: NDArray[np.int64]  # (V,) UNLABELLED for none
    label_names: list[str]  # (V,) "" for none
    frames: NDArray[np.int64]  # (V,) number of averaged frames
    shards: list[str]
    splits: dict[str, list[str]]  # (V,) values by split name; "" for none
    meta: dict[str, Any]
    all_frames: NDArray[np.float32] | None = None  # (F, D) with --per-frame
    groups: list[str] | None = None  # (V,) optional column "group"; "" for none

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def encoder(self) -> dict[str, Any]:
        """The encoder's arch, dimension, checkpoint, sha256 and seed."""
        encoder: dict[str, Any] = self.meta["encoder"]
        return encoder

    @property
    def dataset(self) -> str:
        """The dataset's name, or the folder's if ``meta.json`` has none."""
        return str(self.meta.get("dataset") or real_path(self.folder).name)

    @cached_property
    def frame_offsets(self) -> NDArray[np.int64]:
        """(V + 1,) offsets: video v has rows offset[v] … offset[v + 1] - 1 of ``all_frames``."""
        return np.concatenate([[0], np.cumsum(self.frames)]).astype(np.int64)

    def frames_of(self, row: int) -> NDArray[np.float32]:
        """Return the features of a video's frames, (f, D), in time order.

        Raises:
            InputError: they were not kept.
        """
        if self.all_frames is None:
            raise InputError(
                "holds no features of single frames", self.folder, "extract with --per-frame"
            )
        return self.all_frames[self.frame_offsets[row] : self.frame_offsets[row + 1]]

    def find(self, key: str) -> int:
        """Return the row of a video.

        Raises:
            InputError: there is no such video.
        """
        try:
            return self.keys.index(key)
        except ValueError:
            raise InputError(
                f"holds no video {key!r}", self.folder, f"see the key column of {VIDEOS}"
            ) from None

    def class_names(self) -> dict[int, str]:
        """Return the names of labels that have one."""
        pairs = zip(self.labels.tolist(), self.label_names, strict=True)
        return {label: name for label, name in pairs if label != UNLABELLED and name}


def read_features(folder: str | Path, *, finite: bool = True) -> Features:
    """Open a feature folder.

    Args:
        folder: written by ``extract-features``.
        finite: refuse features with NaN or infinity.

    Raises:
        InputError: missing, not a feature folder, unfinished, or its files do not match.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    columns = _read_table(folder / VIDEOS)
    keys = columns["key"]
    features = _read_array(folder / FEATURES, 2)
    halves = _read_array(folder / HALVES, 3)
    if not len(keys) == len(features) == len(halves):
        raise InputError(
            f"{VIDEOS} has {len(keys)} rows, {FEATURES} {len(features)}, {HALVES} {len(halves)}",
            folder,
            _EXTRACT_AGAIN,
        )
    dimension = features.shape[1]
    if halves.shape[1:] != (2, dimension) or meta["encoder"].get("dimension") != dimension:
        raise InputError(
            f"{FEATURES} is {features.shape}, {HALVES} {halves.shape}, and {META} says "
            f"{meta['encoder'].get('dimension')} values per video",
            folder,
            _EXTRACT_AGAIN,
        )
    for array in (features, halves) if finite else ():
        require_finite(array, keys, folder)
    found = Features(
        folder=folder,
        features=features,
        halves=halves,
        keys=keys,
        sources=columns["source"],
        labels=_integers(folder / VIDEOS, "label", columns["label"], empty=UNLABELLED),
        label_names=columns["label_name"],
        frames=_integers(folder / VIDEOS, "frames", columns["frames"]),
        shards=columns["shard"],
        splits={n.removeprefix(SPLIT): c for n, c in columns.items() if n.startswith(SPLIT)},
        meta=meta,
        all_frames=_read_array(folder / FRAMES, 2) if (folder / FRAMES).exists() else None,
        groups=columns.get(GROUP),
    )
    expected = (int(found.frame_offsets[-1]), dimension)
    if found.all_frames is not None and found.all_frames.shape != expected:
        raise InputError(
            f"{FRAMES} is {found.all_frames.shape}, {VIDEOS} says {expected}",
            folder,
            _EXTRACT_AGAIN,
        )
    return found


def require_same_encoder(a: Features, b: Features) -> None:
    """Check that two folders are of one encoder: other features are in different spaces.

    Raises:
        InputError: the encoders differ.
    """
    if a.encoder["sha256"] != b.encoder["sha256"]:
        raise InputError(
            f"has another encoder ({encoder_name(b.encoder)}) than {a.folder} "
            f"({encoder_name(a.encoder)})",
            b.folder,
            "extract both with the same checkpoint",
        )


def encoder_name(encoder: Mapping[str, Any]) -> str:
    """Short name for messages: arch, checkpoint and the first digits of the digest."""
    return f"{encoder.get('arch')} {encoder.get('checkpoint')} {str(encoder.get('sha256'))[:8]}"


def _read_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError("no such feature folder", folder, "run `seco extract-features` first")
    path = folder / META
    if not path.is_file():
        begun = any(
            (folder / (name + end)).exists()
            for name in (FEATURES, HALVES, VIDEOS, PARTS)
            for end in ("", ".part")
        )
        if begun:
            raise InputError("is unfinished: it has no meta.json", folder, _EXTRACT_AGAIN)
        raise InputError("is not a feature folder", folder, "give --out of `seco extract-features`")
    return read_meta(path)


def read_meta(path: Path) -> dict[str, Any]:
    """Read a feature folder's ``meta.json``.

    Raises:
        InputError: it cannot be read, is of another version, or a field has another type.
    """
    content = read_regular(path, fix=_EXTRACT_AGAIN)
    what = "does not describe features"
    version = decode_json(_Version, content, path, what, _EXTRACT_AGAIN).format_version
    if version != FORMAT_VERSION:
        raise InputError(
            f"has format version {version}; this toolkit reads {FORMAT_VERSION}",
            path,
            _EXTRACT_AGAIN,
        )
    meta = decode_json(dict[str, Any], content, path, what, _EXTRACT_AGAIN)
    decode_json(_Meta, content, path, what, _EXTRACT_AGAIN)
    return meta


class _Version(msgspec.Struct):
    format_version: int


class _Encoder(msgspec.Struct):
    sha256: str
    dimension: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    arch: str | None = None
    checkpoint: str | None = None
    seed: int | None = None
    tasks: str | None = None


class _Meta(msgspec.Struct):
    """``meta.json``; what older versions did not write may be missing."""

    encoder: _Encoder
    dataset: str | None = None
    shards: list[str] | str | None = None
    frames: Count | None = None
    short_edge: Count | None = None
    crop_size: Count | None = None
    batch_size: Count | None = None
    precision: str | None = None
    layout: str | None = None
    unreadable: Count | None = None
    toolkit: str | None = None
    digest: str | None = None


def _read_table(path: Path) -> dict[str, list[str]]:
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
            if os.fstat(file.fileno()).st_size > _MAX_TABLE_BYTES:
                raise InputError(f"is larger than {_MAX_TABLE_BYTES >> 30} GiB", path)
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except InputError as error:
        raise InputError(error.what, path, _EXTRACT_AGAIN) from error
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"cannot be read ({error})", path, _EXTRACT_AGAIN) from error
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise InputError(f"has no column {missing[0]}", path, _EXTRACT_AGAIN)
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise InputError(
                f"row {number} has {len(row)} of {len(header)} fields", path, _EXTRACT_AGAIN
            )
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    if len(set(columns["key"])) != len(rows):
        raise InputError("names a video twice", path, _EXTRACT_AGAIN)
    return columns


def _read_array(path: Path, dimensions: int) -> NDArray[np.float32]:
    try:
        with open_regular(path) as file:
            shape, fortran_order, dtype = _npy_header(file)
            if dtype != np.float32 or len(shape) != dimensions or fortran_order or 0 in shape:
                raise InputError(
                    f"holds {dtype} {shape}, not {dimensions}-dimensional float32",
                    path,
                    _EXTRACT_AGAIN,
                )
            array = np.memmap(file, dtype, "r", file.tell(), shape)
    except InputError as error:
        raise InputError(error.what, path, _EXTRACT_AGAIN) from error
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise InputError("is missing or damaged", path, _EXTRACT_AGAIN) from error
    return np.asarray(array)


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of a ``.npy`` file up to its data; raises ValueError if it is not one."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)
    except Exception as error:  # a header is parsed as Python's tokens, which can raise anything
        raise ValueError("not a header") from error


def _integers(
    path: Path, column: str, values: Sequence[str], empty: int | None = None
) -> NDArray[np.int64]:
    out = np.empty(len(values), dtype=np.int64)
    for row, value in enumerate(values):
        if value == "" and empty is not None:
            out[row] = empty
        elif value.isascii() and value.isdigit() and len(value) < 19:
            out[row] = int(value)
        else:
            raise InputError(
                f"row {row + 1}: {column} is {value!r}", path, "give an integer of 0 or more"
            )
    return out
