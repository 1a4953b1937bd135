"""Finding what a report is made of: the results under some folders.

Files of any age and state lie in such folders. One that cannot be read is named on the page and
never stops the rest.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from seco.features.store import PROBES
from seco.pages.text import printable
from seco.report.records import (
    Comparison,
    Evaluation,
    Probe,
    Retrieval,
    mapping,
    parse_comparison,
    parse_evaluation,
    parse_probe,
    parse_retrieval,
    words,
)
from seco.runs.run_log import LoggedRun, read_log
from shards.errors import InputError
from shards.progress import progress

# The standard library reads TOML from Python 3.11 on; by name, for mypy to accept both.
_TOML = "tomllib" if sys.version_info >= (3, 11) else "tomli"

DEFAULT_FOLDERS = ("runs", "features")
_MAX_PICTURE_BYTES = 16 << 20
_MAX_RESULT_BYTES = 64 << 20
_PNG = b"\x89PNG\r\n\x1a\n"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: its settings and its logs."""

    folder: Path
    config: dict[str, Any]  # empty without a readable config.toml
    log: LoggedRun
    speed: LoggedRun | None  # clock readings, which stand apart from what is computed


@dataclass(frozen=True, kw_only=True)
class Features:
    """A feature folder and what was measured on it."""

    folder: Path
    dataset: str
    encoder: dict[str, Any]
    meta: dict[str, Any]  # of the extraction; empty without a readable meta.json
    probe: Probe | None
    retrieval: Retrieval | None
    confusion_png: bytes | None


@dataclass(frozen=True)
class Unread:
    """A file that is not on the page, and why."""

    path: Path
    reason: str


@dataclass
class Found:
    """Everything found, in the order of the walk."""

    runs: list[Run] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)
    evaluations: list[tuple[Path, Evaluation]] = field(default_factory=list)  # with their folders
    comparisons: list[tuple[Path, Comparison]] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.runs or self.features or self.evaluations or self.comparisons)


def find_results(folders: Sequence[str | Path] = ()) -> Found:
    """Read every result under the folders; by default under ``runs/`` and ``features/``.

    Raises:
        InputError: a named folder does not exist, or nothing readable was found.
    """
    roots = [Path(folder) for folder in folders]
    for folder in roots:
        if not folder.is_dir():
            raise InputError("is not a folder", folder, "name folders of runs or features")
    roots = roots or [Path(name) for name in DEFAULT_FOLDERS if Path(name).is_dir()]
    found = Found()
    walked = list(_walk(roots, found))
    with progress("Reading results", len(walked), "folders") as shown:
        for folder, names in walked:
            _Folder(folder, names, found).read()
            shown.advance()
    if not found:
        reason = f"; {found.unread[0].path}: {found.unread[0].reason}" if found.unread else ""
        raise InputError(
            f"no results found{reason}",
            ", ".join(str(root) for root in roots or DEFAULT_FOLDERS),
            "run `seco pretrain` or `seco probe` first, or name the folders that hold results",
        )
    return found


def _walk(roots: Iterable[Path], found: Found) -> Iterator[tuple[Path, set[str]]]:
    def refused(error: OSError) -> None:
        found.unread.append(Unread(Path(error.filename or ""), error.strerror or str(error)))

    seen: set[Path] = set()
    for root in roots:
        for folder, subfolders, names in os.walk(root, onerror=refused):
            subfolders.sort()
            resolved = Path(folder).resolve()
            if resolved not in seen:
                seen.add(resolved)
                yield Path(folder), set(names)


class _Folder:
    """Reads the results that lie directly in one folder."""

    def __init__(self, folder: Path, names: set[str], found: Found) -> None:
        self._folder = folder
        self._names = names
        self._found = found

    def read(self) -> None:
        self._read_run()
        self._read_features()
        for kind in ("finetune", "track"):
            evaluation = self._try(
                f"{kind}.json", lambda path: parse_evaluation(_read_object(path), path.stem)
            )
            if evaluation is not None:
                self._found.evaluations.append((self._folder, evaluation))
        comparison = self._try("compare.json", lambda path: parse_comparison(_read_object(path)))
        if comparison is not None:
            self._found.comparisons.append((self._folder, comparison))

    def _read_run(self) -> None:
        log = self._try("metrics.jsonl", read_log)
        if log is not None:
            speed = self._try("speed.jsonl", read_log)
            config = self._try("config.toml", _read_config) or {}
            self._found.runs.append(Run(folder=self._folder, config=config, log=log, speed=speed))

    def _read_features(self) -> None:
        probe = self._try("probe.json", lambda path: parse_probe(_read_object(path)))
        retrieval = self._try("retrieval.json", lambda path: parse_retrieval(_read_object(path)))
        if probe is None and retrieval is None:
            return
        meta = self._try("meta.json", _read_object) or {}
        if not meta and self._folder.name.startswith(PROBES):
            # Of another method or split: the features are those of the folder around it.
            with contextlib.suppress(OSError, ValueError, RecursionError):
                meta = _read_object(self._folder.parent / "meta.json")
        self._found.features.append(
            Features(
                folder=self._folder,
                dataset=words(meta.get("dataset")) or (probe.dataset if probe else ""),
                encoder=(probe.encoder if probe else {}) or mapping(meta.get("encoder")),
                meta=meta,
                probe=probe,
                retrieval=retrieval,
                confusion_png=self._try("probe-confusion.png", _read_png) if probe else None,
            )
        )

    def _try(self, name: str, read: Callable[[Path], T]) -> T | None:
        if name not in self._names:
            return None
        path = self._folder / name
        try:
            if not path.is_file():  # a pipe would be waited for, for ever
                raise ValueError("is not a file")
            return read(path)
        except OSError as error:
            self._found.unread.append(Unread(path, error.strerror or str(error)))
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self._found.unread.append(Unread(path, printable(reason)))
        return None


def _read_config(path: Path) -> dict[str, Any]:
    content = _bytes_of(path, _MAX_RESULT_BYTES).decode("utf-8")
    settings: dict[str, Any] = importlib.import_module(_TOML).loads(content)
    return settings


def _read_object(path: Path) -> dict[str, Any]:
    value = json.loads(_bytes_of(path, _MAX_RESULT_BYTES))
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value


def _read_png(path: Path) -> bytes:
    data = _bytes_of(path, _MAX_PICTURE_BYTES)
    if not data.startswith(_PNG):
        raise ValueError("is not a PNG picture")
    return data


def _bytes_of(path: Path, most: int) -> bytes:
    if path.stat().st_size > most:
        raise ValueError(f"is larger than {most >> 20} MiB")
    return path.read_bytes()
