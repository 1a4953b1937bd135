"""What evaluation commands leave behind, as typed records.

Parsers forgive absent keys, since files of older versions lie about, and refuse figures that
cannot be what they claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seco.compare.intervals import Interval
from seco.compare.result import Measure, shown_value
from seco.pages.text import printable

FIGURES = {
    "finetune": ("top1", "top5", "mean_class"),
    "track": ("precision_20", "precision_auc", "success_auc"),
}
_COUNTS = ("clips", "crops", "frames", "sequences", "of_sequences", "n_test")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """``probe.json``; accuracies are fractions."""

    method: str
    c: float | None
    tolerance: float | None  # at which the SVM was stopped; None: solved exactly
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
    """``retrieval.json``: R@k as fractions, by k."""

    label: dict[int, float]
    same_video: dict[int, float]
    queries: int | None
    gallery: int | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """``finetune.json`` or ``track.json``: figures (fractions) of one encoder on one data set."""

    kind: str  # "finetune" or "track"
    dataset: str
    encoder: dict[str, Any]
    split: str
    figures: dict[str, float]  # those of FIGURES that are there
    n_train: int | None  # videos of a fine-tuning
    n_test: int | None  # videos, or sequences
    classes: int | None
    per_class: list[tuple[str, float, int | None]]  # of fine-tuning: (name, accuracy, videos)
    frames_per_second: float | None  # of a tracker
    settings: dict[str, Any]  # of training and test
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``compare.json``: encoders measured side by side."""

    dataset: str
    groups: str  # what the intervals are over
    encoders: list[str]
    rows: list[tuple[str, dict[str, str]]]  # (measure, value and interval by encoder)
    sentences: list[str]


def parse_probe(raw: Mapping[str, Any]) -> Probe:
    """Read ``probe.json``.

    Raises:
        ValueError: an accuracy is not a fraction, or there is none at all.
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
        raise ValueError("holds no accuracy")
    return probe


def parse_retrieval(raw: Mapping[str, Any]) -> Retrieval:
    """Read ``retrieval.json``.

    Raises:
        ValueError: a recall is not a fraction, or there is none at all.
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
    )
    if not retrieval.label and not retrieval.same_video:
        raise ValueError("holds no recall")
    return retrieval


def parse_evaluation(raw: Mapping[str, Any], kind: str) -> Evaluation:
    """Read ``finetune.json`` or ``track.json``.

    Raises:
        ValueError: a figure is not a fraction, or there is none at all.
    """
    names = FIGURES[kind]
    figures = _present(raw, names)
    if not figures:
        raise ValueError(f"holds none of {', '.join(names)}")
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
        ValueError: it has no measures, or a value is not a number.
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
        groups=words(raw.get("groups")),
        encoders=list(dict.fromkeys(name for _, values in rows for name in values)),
        rows=rows,
        sentences=[words(row.get("sentence")) for row in _rows(raw, "comparisons")],
    )


def fraction(values: Mapping[str, Any], name: str) -> float | None:
    """``values[name]`` between 0 and 1; None when absent.

    Raises:
        ValueError: it is something else.
    """
    value = values.get(name)
    if value is None:
        return None
    number = _number(value)
    if number is None or not 0 <= number <= 1:
        raise ValueError(f"{name} is {printable(value)[:40]}, not a fraction between 0 and 1")
    return number


def count(value: Any) -> int | None:
    """A whole number, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object, or an empty one."""
    return value if isinstance(value, dict) else {}


def words(value: Any) -> str:
    """Any JSON value as text for people; empty for null."""
    if isinstance(value, dict):
        return ", ".join(f"{printable(name)} {words(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(words(item) for item in value)
    return "" if value is None else printable(value)


def extraction_words(meta: Mapping[str, Any]) -> list[str]:
    """How features were extracted, by their ``meta.json``."""
    said = (("frames", "frames a video"), ("crop_size", "px"))
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
    """A value with its interval, as ``seco compare`` shows it.

    Raises:
        ValueError: there is no value.
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
