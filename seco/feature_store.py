"""Feature folders: what ``extract-features`` writes and every evaluation reads.

``features.npy`` (V, D) float32, ``halves.npy`` (V, 2, D) float32 (the means over the first and the
second half of a video's frames), ``videos.csv`` (one row a video, in the same order) and
``meta.json`` (the encoder and how frames were taken), which is written last: a folder without it
is unfinished.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seco.vectors import release
from shards.atomic import atomic_path, write_json, write_text
from shards.errors import InputError

FORMAT_VERSION = 1
# What other modules write beside the features they measured.
_RESULTS = ("probe.json", "probe-confusion.png", "retrieval.json", "duplicates.csv")
FEATURES, HALVES, VIDEOS, META = "features.npy", "halves.npy", "videos.csv", "meta.json"
UNLABELLED = -1

_COLUMNS = ("key", "source", "label", "label_name", "frames", "shard")
_SPLIT = "split."
_EXTRACT_AGAIN = "run `seco extract-features` again"
_BLOCK_VALUES = 1 << 24


@dataclass(frozen=True)
class Features:
    """A feature folder; arrays are memory-mapped and read-only."""

    folder: Path
    features: NDArray[np.float32]  # (V, D)
    halves: NDArray[np.float32]  # (V, 2, D)
    keys: list[str]
    sources: list[str]
    labels: NDArray[np.int64]  # (V,) UNLABELLED for none
    label_names: list[str]  # of each video; "" for none
    frames: NDArray[np.int64]  # (V,) frames the means are over
    shards: list[str]
    splits: dict[str, list[str]]  # for each split name, (V,) values; "" for none
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def encoder(self) -> dict[str, Any]:
        """arch, dimension, checkpoint, sha256 and seed of the encoder."""
        encoder: dict[str, Any] = self.meta["encoder"]
        return encoder

    @property
    def dataset(self) -> str:
        """The set's name, or the folder's where ``meta.json`` has none."""
        return str(self.meta.get("dataset") or self.folder.resolve().name)

    def find(self, key: str) -> int:
        """The row of a video.

        Raises:
            InputError: there is none.
        """
        try:
            return self.keys.index(key)
        except ValueError:
            raise InputError(
                f"holds no video {key!r}", self.folder, f"see the key column of {VIDEOS}"
            ) from None

    def class_names(self) -> dict[int, str]:
        """The name of every label that has one."""
        pairs = zip(self.labels.tolist(), self.label_names, strict=True)
        return {label: name for label, name in pairs if label != UNLABELLED and name}


def write_features(
    folder: Path,
    features: NDArray[np.float32],
    halves: NDArray[np.float32],
    rows: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
) -> None:
    """Write a feature folder; one that is there is replaced.

    Args:
        features: (V, D).
        halves: (V, 2, D).
        rows: a video each: key, source, label (None for none), label_name, frames, shard, and
            ``splits``, a dict such as ``{"1": "train"}``.
        meta: encoder (arch, checkpoint, sha256, seed), shards, frames, short_edge, crop_size,
            toolkit; the format version and the encoder's dimension are added.

    Raises:
        ValueError: sizes do not match.
        InputError: a feature is not finite, or the folder cannot be written.
    """
    videos, dimension = features.shape
    if not videos or halves.shape != (videos, 2, dimension) or len(rows) != videos:
        raise ValueError(f"{features.shape}, {halves.shape} and {len(rows)} rows do not match")
    keys = [str(row["key"]) for row in rows]
    for array in (features, halves):
        _check_finite(array, keys, folder)
    # Without meta.json the folder is unfinished, so no mixture of old and new is ever read.
    discard(folder / META)
    for name in _RESULTS:  # of the features that were here: they would be taken for these'
        discard(folder / name)
    for name, array in ((FEATURES, features), (HALVES, halves)):
        with atomic_path(folder / name) as temporary, open(temporary, "wb") as file:
            np.save(file, np.ascontiguousarray(array, dtype=np.float32), allow_pickle=False)
    write_text(folder / VIDEOS, _table(rows))
    encoder = {**meta["encoder"], "dimension": dimension}
    write_json(folder / META, {"format_version": FORMAT_VERSION, **meta, "encoder": encoder})


def read_features(folder: str | Path) -> Features:
    """Open a feature folder.

    Raises:
        InputError: missing, not a feature folder, unfinished, or its files do not fit together.
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
            f"{meta['encoder'].get('dimension')} values a video",
            folder,
            _EXTRACT_AGAIN,
        )
    for array in (features, halves):
        _check_finite(array, keys, folder)
    return Features(
        folder=folder,
        features=features,
        halves=halves,
        keys=keys,
        sources=columns["source"],
        labels=_integers(folder / VIDEOS, "label", columns["label"], empty=UNLABELLED),
        label_names=columns["label_name"],
        frames=_integers(folder / VIDEOS, "frames", columns["frames"]),
        shards=columns["shard"],
        splits={n.removeprefix(_SPLIT): c for n, c in columns.items() if n.startswith(_SPLIT)},
        meta=meta,
    )


def require_same_encoder(a: Features, b: Features) -> None:
    """Features of two encoders lie in different spaces and must not be compared.

    Raises:
        InputError: the folders are of different encoders.
    """
    if a.encoder["sha256"] != b.encoder["sha256"]:
        raise InputError(
            f"is of another encoder ({encoder_name(b.encoder)}) than {a.folder} "
            f"({encoder_name(a.encoder)})",
            b.folder,
            "extract both with the same checkpoint",
        )


def discard(path: Path) -> None:
    """Remove a file if it is there.

    Raises:
        InputError: its folder cannot be written to.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot be written to ({error.strerror})", path.parent) from error


def encoder_name(encoder: Mapping[str, Any]) -> str:
    """A short name for messages: arch, checkpoint and the digest's first digits."""
    return f"{encoder.get('arch')} {encoder.get('checkpoint')} {str(encoder.get('sha256'))[:8]}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({name for row in rows for name in row["splits"]})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_COLUMNS, *(_SPLIT + name for name in names)])
    for row in rows:
        # The csv module writes None as an empty field.
        writer.writerow([row[c] for c in _COLUMNS] + [row["splits"].get(n) for n in names])
    # A lone surrogate of an odd file name must not cost hours of extraction.
    return out.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")


def _read_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError("no such feature folder", folder, "run `seco extract-features` first")
    path = folder / META
    if not path.is_file():
        begun = any(
            (folder / (name + end)).exists()
            for name in (FEATURES, HALVES, VIDEOS)
            for end in ("", ".part")
        )
        if begun:
            raise InputError("is unfinished: it has no meta.json", folder, _EXTRACT_AGAIN)
        raise InputError("is not a feature folder", folder, "give --out of `seco extract-features`")
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError("cannot be read", path, _EXTRACT_AGAIN) from error
    if not isinstance(meta, dict) or not isinstance(meta.get("encoder"), dict):
        raise InputError("does not describe features", path, _EXTRACT_AGAIN)
    if meta.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"has format version {meta.get('format_version')}; this toolkit reads {FORMAT_VERSION}",
            path,
            _EXTRACT_AGAIN,
        )
    if not isinstance(meta["encoder"].get("sha256"), str):
        raise InputError("does not name its encoder's sha256", path, _EXTRACT_AGAIN)
    return meta


def _read_table(path: Path) -> dict[str, list[str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"cannot be read ({error})", path, _EXTRACT_AGAIN) from error
    missing = [name for name in _COLUMNS if name not in header]
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
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError("is missing or damaged", path, _EXTRACT_AGAIN) from error
    if array.dtype != np.float32 or array.ndim != dimensions:
        raise InputError(
            f"holds {array.dtype} {array.shape}, not {dimensions}-dimensional float32",
            path,
            _EXTRACT_AGAIN,
        )
    return np.asarray(array)


def _check_finite(array: NDArray[np.float32], keys: Sequence[str], folder: Path) -> None:
    rows = max(1, _BLOCK_VALUES // max(1, int(np.prod(array.shape[1:]))))
    for start in range(0, len(array), rows):
        block = array[start : start + rows]
        bad = np.flatnonzero(~np.isfinite(block).reshape(len(block), -1).all(axis=1))
        release(array)
        if len(bad):
            raise InputError(
                f"the features of {keys[start + int(bad[0])]} are not finite",
                folder,
                "the checkpoint may be of a run that diverged",
            )


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
                f"row {row + 1}: {value!r} is no {column}", path, "give a number of 0 or more"
            )
    return out
