"""Kinetics' annotation files and file names."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipelines._adapter import SPLITS, read_text, split_named, walk
from pipelines._config import PrepareConfig
from shards.errors import InputError

_FILE = re.compile(r"(?:.*[_-])?(train|validate|validation|val|test)\.csv", re.I)
_CLIP = re.compile(r"(.+)_(\d{6})_(\d{6})")


class Clip(NamedTuple):
    """A row: seconds ``start`` to ``end`` of a YouTube video."""

    youtube_id: str
    start: int | None
    end: int | None
    label: str | None

    @property
    def file_stem(self) -> str:
        """The name its file has where it was fetched the usual way."""
        if self.start is None or self.end is None:
            return self.youtube_id
        return f"{self.youtube_id}_{self.start:06d}_{self.end:06d}"


@dataclass(frozen=True)
class Annotations:
    """The rows of each split found; ``notes`` are lines for people."""

    clips: dict[str, list[Clip]]
    notes: list[str]


def clip_of_file(stem: str) -> tuple[str, int | None, int | None]:
    """Id and seconds from ``<id>_%06d_%06d`` or ``<id>``; ids hold ``_`` and begin with ``-``."""
    if found := _CLIP.fullmatch(stem):
        return found[1], int(found[2]), int(found[3])
    return stem, None, None


def find_annotations(config: PrepareConfig, files: list[tuple[str, Path]]) -> Annotations:
    """The rows of ``--annotations``, or of the CSVs among ``files``, by split.

    Where there are several files for a split, the one nearest to the top is read.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    if config.annotations is not None:
        given = Path(config.annotations)
        if given.is_file():
            return Annotations(_by_split([given]), [])
        if not given.is_dir():
            raise InputError("there is no such file or folder", given, "see --annotations")
        files = list(walk(given))
    candidates = sorted(
        ((source, path) for source, path in files if _FILE.fullmatch(path.name)),
        key=lambda pair: (pair[0].count("/"), pair[0]),
    )
    chosen: dict[str, tuple[str, Path]] = {}
    notes = []
    for source, path in candidates:
        split = split_of_file(path)
        assert split is not None
        if split in chosen:
            notes.append(f"{source} is not read: {chosen[split][0]} comes first")
        else:
            chosen[split] = (source, path)
    if not chosen:
        raise InputError(
            "no train.csv, val.csv or test.csv was found",
            config.annotations or config.src,
            "give the file or its folder with --annotations, or prepare the videos without "
            "labels as dataset 'folder'",
        )
    return Annotations(_by_split([path for _, path in chosen.values()]), notes)


def split_of_file(path: Path) -> str | None:
    """The split a file's name tells, or None."""
    found = _FILE.fullmatch(path.name)
    return split_named(found[1]) if found else None


def _by_split(paths: list[Path]) -> dict[str, list[Clip]]:
    clips: dict[str, dict[Clip, None]] = {}
    for path in paths:
        for split, clip in _read(path):
            clips.setdefault(split, {})[clip] = None
    return {split: list(rows) for split, rows in clips.items()}


def _read(path: Path) -> list[tuple[str, Clip]]:
    """(split, clip) of every row; columns are found by the header, as files differ in them."""
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
    header = [name.strip() for name in rows.fieldnames or ()]
    if "youtube_id" not in header:
        raise InputError(
            "has no column youtube_id",
            path,
            "the first line should be label,youtube_id,time_start,time_end,split",
        )
    rows.fieldnames = header
    of_file = split_of_file(path)
    found = []
    for row in _readable(rows, path):
        youtube_id = (row["youtube_id"] or "").strip()
        split = of_file or split_named((row.get("split") or "").strip())
        if split not in SPLITS or not youtube_id:
            raise InputError(
                f"line {rows.line_num} has no {'id' if not youtube_id else 'known split'}",
                path,
                "name the file train.csv, val.csv or test.csv, or fill its columns",
            )
        start, end = (_seconds(row.get(name)) for name in ("time_start", "time_end"))
        label = (row.get("label") or "").strip() or None
        found.append((split, Clip(youtube_id, start, end, label)))
    return found


def _readable(rows: csv.DictReader[str], path: Path) -> Iterator[dict[str, str | None]]:
    try:
        yield from rows
    except csv.Error as error:  # a stray quote that swallows the rest of the file, say
        raise InputError(f"line {rows.line_num} is no CSV ({error})", path) from error


def _seconds(text: str | None) -> int | None:
    try:
        return int(float(text)) if text and text.strip() else None
    except (ValueError, OverflowError):
        return None
