"""Writing feature folders, part after part: a set need not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from seco.features.format import (
    COLUMNS,
    ERRORS,
    FEATURES,
    FORMAT_VERSION,
    FRAMES,
    HALVES,
    META,
    PROBES,
    RESULTS,
    SPLIT,
    VIDEOS,
    discard,
    require_finite,
)
from shards.atomic import atomic_path, write_json
from shards.csv_rows import write_csv

Floats = NDArray[np.float32]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class FeaturePart:
    """Some videos of a set; what is called is read when it is needed, more than once.

    Args:
        rows: a video each: key, source, label (None for none), label_name, frames, shard, and
            ``splits``, a dict such as ``{"1": "train"}``.
        arrays: their features (v, D), halves (v, 2, D), and the features of all their frames (f, D)
            or None.
        failures: (key, shard, why) of each video that has no row.
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
    """Write a feature folder; one that is there is replaced.

    Args:
        folder: made if need be.
        parts: in the order of the rows.
        meta: encoder (arch, checkpoint, sha256, seed), shards, frames, short_edge, crop_size,
            toolkit; the format version and the encoder's dimension are added.
        before_each: part, is called; what it raises ends the writing.

    Raises:
        ValueError: sizes do not match, or there is no video.
        InputError: a feature is not finite, or the folder cannot be written.
    """
    splits: set[str] = set()
    with contextlib.ExitStack() as files:
        open_arrays: dict[str, _GrowingArray] = {}
        for part in parts:
            before_each()
            rows = part.rows()
            splits.update(name for row in rows for name in row["splits"])
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
        # Without meta.json the folder is unfinished, so no mixture of old and new is ever read.
        discard(folder / META)
        # Of the features that were here: they would be taken for these'.
        for name in (*RESULTS, FRAMES, ERRORS):
            discard(folder / name)
        for other in folder.glob(f"{PROBES}*/"):
            for name in RESULTS:
                discard(other / name)
            with contextlib.suppress(OSError):  # a user's own files keep it
                other.rmdir()
    _write_csv(folder / VIDEOS, _table(parts, sorted(splits)))
    failures = [row for part in parts for row in part.failures]
    if failures:
        _write_csv(folder / ERRORS, [("key", "shard", "message"), *failures])
    encoder = {**meta["encoder"], "dimension": dimension}
    write_json(folder / META, {"format_version": FORMAT_VERSION, **meta, "encoder": encoder})


class _GrowingArray:
    """An ``.npy`` file of float32 whose first dimension is known at its end.

    The header that numpy writes keeps room for any length, so the bytes are those of ``np.save``.
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
        """Raises ValueError for rows of another shape."""
        if rows.shape[1:] != self._shape:
            raise ValueError(f"{rows.shape} does not go on with {self.shape}")
        self._file.write(np.ascontiguousarray(rows, dtype="<f4").data)
        self.length += len(rows)

    def finish(self) -> None:
        """All rows are there."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self._file, header)


def _checked(part: FeaturePart, rows: Rows, folder: Path) -> dict[str, Floats]:
    """A part's arrays by the files' names."""
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


def _table(parts: Sequence[FeaturePart], splits: Sequence[str]) -> Iterator[Sequence[object]]:
    yield [*COLUMNS, *(SPLIT + name for name in splits)]
    for part in parts:
        for row in part.rows():
            # The csv module writes None as an empty field.
            yield [row[c] for c in COLUMNS] + [row["splits"].get(name) for name in splits]


def _write_csv(path: Path, rows: Iterator[Sequence[object]] | Sequence[Sequence[object]]) -> None:
    # A lone surrogate of an odd file name must not cost hours of extraction.
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        write_csv(file, rows)
