"""A list of videos: a CSV or Parquet file with a row for each, or for each part of one.

Columns, found by the header: ``path`` (required), ``label``, ``split``, ``group``, ``start`` and
``end`` in seconds. All others are kept in the records, as ``metadata``.
"""

from __future__ import annotations

import csv
import io
import math
import os
import posixpath
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TextIO
from urllib.parse import quote, unquote

from pipelines._adapter import (
    Adapter,
    Discovery,
    VideoSet,
    missing_rows,
    slug,
    split_named,
)
from pipelines._config import PrepareConfig
from pipelines._order import ListedVideo, Repeated, VideoTable
from pipelines._remote import fetch_file, is_web
from shards.errors import InputError
from shards.format import Exclusion
from shards.storage import is_remote
from shards.untrusted import open_regular

COLUMNS = ("path", "label", "split", "group", "start", "end")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # not a drive letter
_MOST_BYTES = 4 << 30
_MOST_ROWS = 100_000_000
_MOST_LINE = 1 << 20  # characters
_MOST_SECONDS = 1e9
_ROWS_AT_ONCE = 256


class Row(NamedTuple):
    """A row of the list; ``line`` is its number, for messages."""

    line: int
    path: str
    label: str | None
    split: str | None
    group: str | None
    span: tuple[float, float] | None
    metadata: dict[str, str] | None


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset, named after the list or ``--name``.

    Raises:
        InputError: the list cannot be read, or a row is invalid; names the line.
    """
    if is_remote(config.src):
        with tempfile.TemporaryDirectory(prefix="seco-") as scratch:
            address = config.src.partition("?")[0] if is_web(config.src) else config.src
            folder, _, name = address.rpartition("/")
            here = Path(scratch, name or "list")
            fetch_file(config.src, here)
            return _discover(config, here, config.root or folder)
    source = Path(config.src)
    if not source.is_file():
        what = "is not a file" if source.exists() else "there is no such file"
        raise InputError(what, source, "give a CSV or Parquet file with --src")
    return _discover(config, source, config.root or os.path.dirname(source))


def _discover(config: PrepareConfig, source: Path, root: str) -> Discovery:
    place = _RemotePlace(root) if is_remote(root) else _LocalPlace(root)
    wanted: set[str] | None = None
    if config.split is not None:
        wanted = {split_named(word.strip()) for word in config.split.split(",")}
    table = VideoTable()
    missing: set[str] = set()
    splits: set[str] = set()
    labels: set[str] = set()
    found = False
    for row in read_list(source, config.src):
        splits |= {row.split} if row.split else set()
        labels |= {row.label} if row.label else set()
        if wanted is not None and row.split not in wanted:
            continue
        shown, path, address = place.located(row, config.src, config.allow_outside)
        if address is None and not _is_file(path):  # what is remote is looked for when fetched
            missing.add(shown)
            continue
        found = True
        split = {"official": row.split} if row.split else {}
        group = row.group or (shown if row.span is not None else None)
        named = (row.line, shown, os.fsencode(path), address, row.label, split, group)
        table.add(ListedVideo(*named, row.span, row.metadata))
    if unknown := sorted((wanted or set()) - splits):
        raise InputError(
            f"has no rows of split {unknown[0]}; it has {', '.join(sorted(splits)) or 'none'}",
            config.src,
            "see --split",
        )
    if not found:
        what = f"none of its {len(missing)} videos was found" if missing else "lists no videos"
        raise InputError(what, config.src, f"paths are relative to {place.root}; see --root")
    names = sorted(labels)
    repeated: dict[str, list[Repeated]] = {}
    for row_again in table.finish(names):  # by line
        repeated.setdefault(row_again.shown, []).append(row_again)
    videos = VideoSet(
        name=config.name or slug(source.stem),
        videos=table,
        label_names=names,
        excluded=missing_rows(missing) + [_duplicate(rows) for rows in repeated.values()],
    )
    return Discovery(sets=[videos], notes=[f"labels: {len(names)}, from the list"], root=place.root)


def _duplicate(rows: Sequence[Repeated]) -> Exclusion:
    """One exclusion for a video, however often it is repeated."""
    message = f"line {rows[0].line} of the list repeats an earlier one"
    if len(rows) > 1:
        message += f" ({len(rows)} lines do)"
    if any(row.other_label for row in rows):
        message += ", with another label: the first line's is kept"
    return Exclusion(source=rows[0].shown, kind="duplicate", message=message)


_Located = tuple[str, str, str | None]  # as it is stored, as it is opened, and its address


class _LocalPlace:
    """The folder that a list's paths are relative to; addresses need ``--allow-outside``."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        if not os.path.isdir(self.root):
            raise InputError(
                "there is no such folder", self.root, "give the folder of the videos with --root"
            )
        self._real_root = os.path.realpath(self.root)
        self._real_folder = lru_cache(1 << 16)(os.path.realpath)  # of millions of files

    def located(self, row: Row, where: object, allow_outside: bool) -> _Located:
        """Return where a row's video is."""
        path = os.path.join(self.root, row.path)
        if _ADDRESS.match(row.path) and not _is_file(path):
            return _elsewhere(row, where, allow_outside)
        if not (allow_outside or _within(self._real(path), self._real_root)):
            raise _leads_out(row, where, self.root)
        plain = os.path.normpath(path)
        if _within(plain, self.root) and plain != self.root:
            plain = (
                os.path.relpath(plain, self.root)
                if self.root == "/"
                else plain[len(self.root) + 1 :]
            )
        return plain.replace(os.sep, "/"), path, None

    def _real(self, path: str) -> str:
        folder, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.islink(path):
            return os.path.realpath(path)
        return os.path.join(self._real_folder(folder), name)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


class _RemotePlace:
    """The address that a list's paths are relative to; they may be addresses below it."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")

    def located(self, row: Row, where: object, allow_outside: bool) -> _Located:
        """Return where a row's video is."""
        inside = row.path
        if _ADDRESS.match(inside):
            if not inside.startswith(f"{self.root}/"):
                return _elsewhere(row, where, allow_outside)
            inside = inside.removeprefix(f"{self.root}/")
        plain = posixpath.normpath(inside)
        # Of "::", fsspec makes a chain of addresses.
        if plain.startswith(("/", "../")) or plain in (".", "..") or "::" in plain:
            raise _leads_out(row, where, self.root)
        below = quote(plain) if is_web(self.root) and inside == row.path else plain
        if is_web(self.root) and ".." in unquote(below).split("/"):
            raise _leads_out(row, where, self.root)
        return plain, plain, f"{self.root}/{below}"


def _elsewhere(row: Row, where: object, allow_outside: bool) -> _Located:
    if not is_remote(row.path) or "::" in row.path:
        raise InputError(f"line {row.line}: {row.path[:80]} is an address, not a path", where)
    if not allow_outside:
        raise InputError(
            f"line {row.line}: {row.path[:80]} is an address",
            where,
            "give what it begins with as --root, or --allow-outside if the list is yours",
        )
    return row.path, row.path, row.path


def _leads_out(row: Row, where: object, root: str) -> InputError:
    return InputError(
        f"line {row.line}: {row.path[:80]} leads out of {root}",
        where,
        "give its folder with --root, or --allow-outside if the list is yours",
    )


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # a name that is too long, a folder that may not be entered
        return False


def read_list(path: Path, where: object = None) -> Iterator[Row]:
    """Yield the rows of a list.

    Args:
        path: of the file.
        where: names it in errors, if it came from elsewhere.

    Raises:
        InputError: it is no CSV or Parquet, or a row is invalid; names the line.
    """
    where = where or path
    read = _parquet if path.suffix.lower() == ".parquet" else _csv
    for line, cells in read(path, where):
        name = cells.get("path", "")
        if not name or "\0" in name:
            raise InputError(f"line {line} has no path", where)
        others = {k: v for k, v in cells.items() if k not in COLUMNS and v}
        yield Row(
            line=line,
            path=name,
            label=cells.get("label") or None,
            split=split_named(cells["split"]) if cells.get("split") else None,
            group=cells.get("group") or None,
            span=_span(cells, line, where),
            metadata=others or None,
        )


def _span(cells: dict[str, str], line: int, where: object) -> tuple[float, float] | None:
    given = [cells.get(name, "") for name in ("start", "end")]
    if not any(given):
        return None
    try:
        start, end = (
            float(text) if text else other
            for text, other in zip(given, (0.0, math.inf), strict=True)
        )
    except ValueError:
        start = end = math.nan
    start, end = round(start, 6), round(end, 6)
    if not 0 <= start < end or start > _MOST_SECONDS or _MOST_SECONDS < end < math.inf:  # or nan
        raise InputError(
            f"line {line}: start {given[0][:20]!r} and end {given[1][:20]!r} are not seconds "
            "in this order",
            where,
        )
    return start, end


def _csv(path: Path, where: object) -> Iterator[tuple[int, dict[str, str]]]:
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MOST_BYTES:
            raise InputError(f"is larger than {_MOST_BYTES >> 30} GiB", where)
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        rows = csv.reader(_lines(text, where), skipinitialspace=True, strict=True)
        begin = 1
        try:
            header = _header(next(rows, []))
            if "path" not in header:
                others = any(mark in name for name in header for mark in ";\t")
                fix = (
                    "separate columns by commas"
                    if others
                    else "the first line must name the columns"
                )
                raise InputError("has no column path", where, fix)
            if len(set(header)) < len(header):
                raise InputError("has two columns of the same name", where)
            begin = rows.line_num + 1
            for cells in rows:
                if any(cells):
                    if len(cells) > len(header):
                        raise InputError(
                            f"line {begin} has {len(cells)} cells, not {len(header)}",
                            where,
                            "put cells with commas in double quotes",
                        )
                    stripped = (cell.strip() for cell in cells)
                    yield begin, dict(zip(header, stripped, strict=False))
                begin = rows.line_num + 1
        except csv.Error as error:
            raise InputError(
                f"line {begin} is not CSV ({error})",
                where,
                "a quoted cell ends with its quote; write each quote within it twice",
            ) from error
        except UnicodeDecodeError as error:
            raise InputError("is not a text file", where, "save it as UTF-8") from error


def _header(names: Iterable[str]) -> list[str]:
    """The names of the columns; those that are known in small letters, as they are looked up."""
    plain = [name.strip() for name in names]
    return [name.lower() if name.lower() in COLUMNS else name for name in plain]


def _lines(text: TextIO, where: object) -> Iterator[str]:
    while line := text.readline(_MOST_LINE):
        if len(line) == _MOST_LINE:
            raise InputError(f"has a line of more than {_MOST_LINE} characters", where)
        yield line


def _parquet(path: Path, where: object) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            "Parquet needs pyarrow", where, 'pip install "seco-video[parquet]"'
        ) from error
    try:
        with open_regular(path) as raw, parquet.ParquetFile(raw) as file:
            names = _header(file.schema_arrow.names)
            if "path" not in names:
                raise InputError("has no column path", where)
            if len(set(names)) < len(names):
                raise InputError("has two columns of the same name", where)
            if file.metadata.num_rows > _MOST_ROWS:
                raise InputError(f"has more than {_MOST_ROWS} rows", where)
            line = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    line += 1
                    cells = zip(names, row.values(), strict=True)
                    yield line, {k: str(v).strip() for k, v in cells if v is not None}
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"cannot be read as Parquet ({error})", where) from error


# As for a plain folder.
ADAPTER = Adapter(discover=discover, default_frames=30, recordings=True, reads_addresses=True)
