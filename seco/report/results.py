"""Find and read the results of evaluations and runs, whatever the files hold.

Files of any age and state lie in result folders. One that cannot be read is named on the page and
never stops the rest. Missing keys are accepted, since older versions wrote fewer; values that
cannot be what they claim are refused.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from seco.config import TASKS
from seco.evaluation.comparison import Measure, shown_value
from seco.evaluation.intervals import Interval
from seco.features.store import META as _META
from seco.features.store import PROBES
from seco.training.logging import LoggedRun, read_log
from shards.errors import InputError
from shards.progress import progress
from shards.terminal import printable
from shards.untrusted import read_regular, real_path

FIGURES = {
    "finetune": ("top1", "top5", "mean_class"),
    "track": ("precision_20", "precision_auc", "success_auc"),
}
_COUNTS = ("clips", "crops", "frames", "sequences", "of_sequences", "n_test")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The content of ``probe.json``; accuracies are fractions."""

    method: str
    c: float | None
    tolerance: float | None  # where the SVM stopped; None if solved exactly
    normalise: str
    top1: float | None
    top5: float | None
    mean_class: float | None
    per_class: list[tuple[str, float, int | None]]  # (name, accuracy, videos)
    n_train: int | None
    n_test: int | None
    split: str
    dataset: str
    encoder: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """The content of ``retrieval.json``: R@k as fractions, by k."""

    label: dict[int, float]
    same_video: dict[int, float]
    queries: int | None
    gallery: int | None
    split: str
    encoder: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """``finetune.json`` or ``track.json``: metrics (fractions) of one encoder on one dataset."""

    kind: str  # "finetune" or "track"
    dataset: str
    encoder: dict[str, Any]
    split: str
    figures: dict[str, float]  # those of FIGURES that are present
    n_train: int | None  # videos, of fine-tuning
    n_test: int | None  # videos, or sequences
    classes: int | None
    per_class: list[tuple[str, float, int | None]]  # of fine-tuning: (name, accuracy, videos)
    frames_per_second: float | None  # of a tracker
    settings: dict[str, Any]  # of training and test
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The content of ``compare.json``: encoders measured on the same videos."""

    dataset: str
    train_split: str
    test_split: str
    groups: str  # what was resampled for the intervals
    encoders: list[str]
    sha256: dict[str, str]  # of the encoders' weights, where recorded
    rows: list[tuple[str, dict[str, str]]]  # (measure, value and interval by encoder)
    sentences: list[str]


def parse_probe(raw: Mapping[str, Any]) -> Probe:
    """Read ``probe.json``.

    Raises:
        ValueError: an accuracy is not a fraction, or there is none.
    """
    classes = _per_class(raw)
    probe = Probe(
        method=words(raw.get("method")),
        c=_number(raw.get("C")),
        tolerance=_number(raw.get("tolerance")),
        normalise=words(raw.get("normalise")),
        top1=fraction(raw, "top1"),
        top5=fraction(raw, "top5"),
        mean_class=fraction(raw, "mean_class"),
        per_class=classes,
        n_train=count(raw.get("n_train")),
        n_test=count(raw.get("n_test")),
        split=words(raw.get("split")),
        dataset=words(raw.get("dataset")),
        encoder=mapping(raw.get("encoder")),
        notes=_notes(raw),
    )
    if probe.top1 is None and probe.top5 is None and probe.mean_class is None and not classes:
        raise ValueError("has no accuracy")
    return probe


def parse_retrieval(raw: Mapping[str, Any]) -> Retrieval:
    """Read ``retrieval.json``.

    Raises:
        ValueError: a recall is not a fraction, or there is none.
    """

    def recalls(name: str) -> dict[int, float]:
        given = mapping(raw.get(name))
        found = {int(k): fraction(given, k) for k in given if k.isascii() and k.isdigit()}
        return {k: value for k, value in sorted(found.items()) if value is not None}

    retrieval = Retrieval(
        label=recalls("label"),
        same_video=recalls("same_video"),
        queries=count(raw.get("queries")),
        gallery=count(raw.get("gallery")),
        split=words(raw.get("split")),
        encoder=mapping(raw.get("encoder")),
        notes=_notes(raw),
    )
    if not retrieval.label and not retrieval.same_video:
        raise ValueError("has no recall")
    return retrieval


def parse_evaluation(raw: Mapping[str, Any], kind: str) -> Evaluation:
    """Read ``finetune.json`` or ``track.json``.

    Raises:
        ValueError: a metric is not a fraction, or there is none.
    """
    names = FIGURES[kind]
    figures = _present(raw, names)
    if not figures:
        raise ValueError(f"has none of {', '.join(names)}")
    counts = {name: raw[name] for name in _COUNTS if raw.get(name) is not None}
    protocol = mapping(raw.get("protocol"))
    return Evaluation(
        kind=kind,
        dataset=words(raw.get("dataset")),
        encoder=mapping(raw.get("encoder")),
        split=words(raw.get("split")),
        figures=figures,
        n_train=count(raw.get("n_train")),
        n_test=count(raw.get("n_test", raw.get("sequences"))),
        classes=count(raw.get("classes")),
        per_class=_per_class(raw),
        frames_per_second=_number(raw.get("fps")),
        settings={
            **counts,
            **protocol,
            **mapping(protocol.get("training")),
            **mapping(raw.get("settings")),
        },
        notes=_notes(raw),
    )


def parse_comparison(raw: Mapping[str, Any]) -> Comparison:
    """Read ``compare.json``.

    Raises:
        ValueError: there are no measures, or a value is not a number.
    """
    rows = [
        (
            words(row.get("title")),
            {name: _interval(row, one) for name, one in mapping(row.get("values")).items()},
        )
        for row in _rows(raw, "measures")
    ]
    if not rows:
        raise ValueError("has no measures")
    return Comparison(
        dataset=words(raw.get("dataset")),
        train_split=words(raw.get("train_split")),
        test_split=words(raw.get("test_split")),
        groups=words(raw.get("groups")),
        encoders=list(dict.fromkeys(name for _, values in rows for name in values)),
        sha256={
            name: words(mapping(encoder).get("sha256"))
            for name, encoder in mapping(raw.get("encoders")).items()
        },
        rows=rows,
        sentences=[words(row.get("sentence")) for row in _rows(raw, "comparisons")],
    )


def fraction(values: Mapping[str, Any], name: str) -> float | None:
    """``values[name]``, a number between 0 and 1; None if missing.

    Raises:
        ValueError: it is anything else.
    """
    value = values.get(name)
    if value is None:
        return None
    number = _number(value)
    if number is None or not 0 <= number <= 1:
        raise ValueError(f"{name} is {printable(value)[:40]}, not a fraction between 0 and 1")
    return number


def count(value: Any) -> int | None:
    """``value`` if it is an integer, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def mapping(value: Any) -> dict[str, Any]:
    """``value`` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def words(value: Any) -> str:
    """Any JSON value as text for people; empty for null."""
    if isinstance(value, dict):
        return ", ".join(f"{printable(name)} {words(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(words(item) for item in value)
    return "" if value is None else printable(value)


def extraction_words(meta: Mapping[str, Any]) -> list[str]:
    """How features were extracted, in words, from their ``meta.json``."""
    said = (("frames", "frames per video"), ("crop_size", "px"))
    return [f"{words(meta[name])} {what}" for name, what in said if meta.get(name) is not None]


def _present(raw: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    found = {name: fraction(raw, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _per_class(raw: Mapping[str, Any]) -> list[tuple[str, float, int | None]]:
    classes = []
    for row in _rows(raw, "per_class"):
        accuracy = fraction(row, "accuracy")
        if accuracy is not None:
            name = words(row.get("label_name", row.get("label")))
            classes.append((name, accuracy, count(row.get("count"))))
    return classes


def _notes(raw: Mapping[str, Any]) -> tuple[str, ...]:
    value = raw.get("notes")
    notes = value if isinstance(value, list) else [value]
    return tuple(words(note) for note in notes if words(note))


def _rows(raw: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value = raw.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{name} is not a list of objects")
    return value


def _interval(measure: Mapping[str, Any], given: Any) -> str:
    """Format a value with its interval, as ``seco compare`` does.

    Raises:
        ValueError: the value is missing or not a number.
    """
    value, low, high = (_number(mapping(given).get(name)) for name in ("value", "low", "high"))
    if value is None:
        raise ValueError("a value is not a number")
    key = words(measure.get("key"))
    shown = Measure(key=key, title="", values={}, videos=0, groups=0)
    return shown_value(shown, Interval(value, low, high))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


# The standard library has TOML from Python 3.11 on; imported by name to satisfy mypy.
_TOML = "tomllib" if sys.version_info >= (3, 11) else "tomli"

DEFAULT_FOLDERS = ("runs", "features")
RESULT_FILES = ("probe.json", "retrieval.json", "finetune.json", "track.json", "compare.json")
_MAX_PICTURE_BYTES = 16 << 20
_MAX_RESULT_BYTES = 64 << 20
_PNG = b"\x89PNG\r\n\x1a\n"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: its settings and its logs."""

    folder: Path
    config: dict[str, Any]  # empty if there is no readable config.toml
    log: LoggedRun
    speed: LoggedRun | None  # clock readings, which are logged separately


@dataclass(frozen=True, kw_only=True)
class Features:
    """A feature folder and its measurements."""

    folder: Path
    dataset: str
    encoder: dict[str, Any]
    meta: dict[str, Any]  # of the extraction; empty if there is no readable meta.json
    probe: Probe | None
    retrieval: Retrieval | None
    confusion_png: bytes | None


@dataclass(frozen=True)
class Unread:
    """A file missing from the page, and the reason."""

    path: Path
    reason: str


@dataclass
class Found:
    """Everything found, in the order of the directory walk."""

    runs: list[Run] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)
    evaluations: list[tuple[Path, Evaluation]] = field(default_factory=list)  # with their folders
    comparisons: list[tuple[Path, Comparison]] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.runs or self.features or self.evaluations or self.comparisons)


def find_results(folders: Sequence[str | Path] = ()) -> Found:
    """Read every result under the folders, by default ``runs/`` and ``features/``.

    Raises:
        InputError: a given folder does not exist, or nothing readable was found.
    """
    roots = [Path(folder) for folder in folders]
    for folder in roots:
        if not folder.is_dir():
            raise InputError("is not a folder", folder, "give folders of runs or features")
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
            "run `seco pretrain` or `seco probe` first, or give the folders that hold results",
        )
    return found


def read_results(folders: Sequence[Path] = (), files: Sequence[Path] = ()) -> Found:
    """Read the results under the folders and in the files, and nothing outside of these folders.

    Links below a folder are not followed: whoever made it may have let one lead to another file of
    the reader's.

    Args:
        folders: of runs or features, with everything below them; there may be nothing.
        files: each named as in ``RESULT_FILES``. Of the features that it is of, the description
            beside it is read as well.
    """
    found = Found()
    for folder, names in _walk(folders, found):
        own = {name for name in names if not (folder / name).is_symlink()}
        above = folder not in folders and not (folder.parent / _META).is_symlink()
        _Folder(folder, own, found, above).read()
    for file in files:
        own = {file.name} if (file.parent / _META).is_symlink() else {file.name, _META}
        _Folder(file.parent, own & set(os.listdir(file.parent)), found).read()
    return found


def _walk(roots: Iterable[Path], found: Found) -> Iterator[tuple[Path, set[str]]]:
    def refused(error: OSError) -> None:
        found.unread.append(Unread(Path(error.filename or ""), error.strerror or str(error)))

    seen: set[Path] = set()
    for root in roots:
        for folder, subfolders, names in os.walk(root, onerror=refused):
            subfolders.sort()
            resolved = real_path(folder)
            if resolved not in seen:
                seen.add(resolved)
                yield Path(folder), set(names)


class _Folder:
    """Reads the results directly in one folder.

    Args:
        above: whether features that the folder's parent describes may be read there.
    """

    def __init__(self, folder: Path, names: set[str], found: Found, above: bool = True) -> None:
        self._folder = folder
        self._names = names
        self._found = found
        self._above = above

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
        meta = self._try(_META, _read_object) or {}
        if not meta and self._above and self._folder.name.startswith(PROBES):
            # Results of another method or split: the features are in the parent folder.
            with contextlib.suppress(OSError, ValueError, RecursionError):
                meta = _read_object(self._folder.parent / _META)
        self._found.features.append(
            Features(
                folder=self._folder,
                dataset=words(meta.get("dataset")) or (probe.dataset if probe else ""),
                encoder=(probe.encoder if probe else {})
                or (retrieval.encoder if retrieval else {})
                or mapping(meta.get("encoder")),
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
    try:
        return read_regular(path, most)
    except InputError as error:
        raise ValueError(error.what) from error


def encoder_name(encoder: Mapping[str, Any]) -> str:
    """An encoder in words: its backbone and the source of its weights."""
    weights = words(encoder.get("checkpoint") or encoder.get("source"))
    if weights == "random":
        weights = "random initialisation"
    return ", ".join(part for part in (words(encoder.get("arch")), weights) if part) or "unknown"


def short_name(name: str) -> str:
    """An encoder's name with its path cut to the run's folder and the file."""
    arch, comma, path = name.rpartition(", ")
    parts = path.split("/")
    if len(parts) <= 2:
        return name
    return f"{arch}{comma}\N{HORIZONTAL ELLIPSIS}/{'/'.join(parts[-2:])}"


def is_random(encoder: Mapping[str, Any]) -> bool:
    """Whether its weights were never trained."""
    return encoder.get("checkpoint") == "random"


def encoder_tasks(encoder: Mapping[str, Any], runs: Sequence[Run]) -> tuple[str, ...] | None:
    """The proxy tasks of an encoder, as recorded with it, or by the run of its checkpoint.

    Only runs in the report count: a path in a result is not followed.
    """
    stated = tasks_of(encoder)
    if stated:
        return stated
    run = run_of(encoder, runs)
    return None if run is None else tasks_of(run.config)


def tasks_of(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The proxy tasks of a run in the order of Eq. 5; None if its settings do not name them."""
    named = config.get("tasks")
    if isinstance(named, str):
        named = named.split(",")
    if not isinstance(named, (list, tuple)):
        return None
    wanted = {str(task).strip() for task in named}
    return tuple(task for task in TASKS if task in wanted) or None


def run_of(encoder: Mapping[str, Any], runs: Sequence[Run]) -> Run | None:
    """The run in the report that trained the encoder, by the folder of its checkpoint."""
    checkpoint = encoder.get("checkpoint")
    if not isinstance(checkpoint, str) or not checkpoint or "url" in encoder:
        return None  # weights given by name are of no run
    folder = Path(checkpoint).parent
    for run in runs:
        if run.folder.absolute() == folder.absolute():
            return run
    # The path may be relative to the folder where the command ran.
    named = folder.parts
    if folder.is_absolute() or not named or ".." in named:
        return None
    alike = [run for run in runs if run.folder.absolute().parts[-len(named) :] == named]
    return alike[0] if len(alike) == 1 else None
