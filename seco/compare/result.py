"""What ``seco compare`` has found: values, differences, verdicts; as JSON and for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seco.compare.intervals import BETTER, HOLDS_ZERO, UNDECIDED, WORSE, Interval
from seco.pages.text import percent, printable

_FORMAT_VERSION = 1
RANK = "effective_rank"


@dataclass(frozen=True)
class Measure:
    """One measure of all encoders.

    Args:
        key: for programs: ``svm@10``.
        title: for people: ``SVM, 10 % of labels``.
        values: by encoder. Fractions, except those of the effective rank.
        videos: whose outcomes are averaged, in ``groups``.
        labelled: training videos whose labels were used; None for a measure without labels.
        draws: by encoder, the value of each draw of labelled videos.
        chance: the value of an encoder that knows nothing, where that is known.
    """

    key: str
    title: str
    values: dict[str, Interval]
    videos: int
    groups: int
    labelled: int | None = None
    draws: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    chance: float | None = None


@dataclass(frozen=True)
class Difference:
    """An encoder's value less the baseline's; ``interval`` is None where they do not compare."""

    key: str
    interval: Interval | None
    verdict: str
    reason: str


@dataclass(frozen=True)
class Pair:
    """An encoder compared with the baseline, measure by measure."""

    encoder: str
    baseline: str
    differences: list[Difference]


@dataclass(frozen=True)
class CompareResult:
    """Everything that is reported.

    Args:
        encoders: by name; where each comes from, and how its features were given to the SVM.
        groups: in words, what was resampled.
        svm: by encoder and percentage of labels, the accuracy with each scaling.
    """

    dataset: str
    train_split: str
    test_split: str
    settings: dict[str, Any]
    encoders: dict[str, dict[str, Any]]
    groups: str
    measures: list[Measure]
    pairs: list[Pair]
    svm: dict[str, dict[str, dict[str, Interval]]]
    notes: list[str]

    def sentence(self, pair: Pair) -> str:
        """What the verdicts of a pair come to."""
        keys = {
            verdict: [d.key for d in pair.differences if d.verdict == verdict]
            for verdict in (BETTER, WORSE, UNDECIDED)
        }
        said = (
            f"{pair.encoder} is better than {pair.baseline} at {len(keys[BETTER])} of "
            f"{len(pair.differences)} measures"
        )
        for verdict in (WORSE, UNDECIDED):
            if len(keys[verdict]) == len(pair.differences):
                said += f"; {verdict}: all"
            elif keys[verdict]:
                said += f"; {verdict}: {self._named(keys[verdict])}"
        return f"{said}."

    def _named(self, keys: Sequence[str]) -> str:
        """Measures in words, those of one kind together: ``kNN with 1 and 10 % of the labels``."""
        by_title: dict[str, list[str]] = {}
        for measure in self.measures:
            if measure.key in keys:
                _, _, percent_of_labels = measure.key.partition("@")
                title = measure.title.partition(",")[0]
                by_title.setdefault(title, []).append(percent_of_labels)
        return ", ".join(
            f"{title} with {' and '.join(shares)} %" if any(shares) else title
            for title, shares in by_title.items()
        )

    def sentences(self) -> list[str]:
        """One for each pair."""
        if not self.pairs:
            return ["There is one encoder; name another one, such as random, to compare it with."]
        return [self.sentence(pair) for pair in self.pairs]

    def to_json(self) -> dict[str, Any]:
        """``compare.json``."""
        return {
            "format_version": _FORMAT_VERSION,
            "dataset": self.dataset,
            "train_split": self.train_split,
            "test_split": self.test_split,
            "groups": self.groups,
            "settings": self.settings,
            "encoders": self.encoders,
            "measures": [dataclasses.asdict(measure) for measure in self.measures],
            "svm_by_scaling": {
                name: {p: {s: vars(i) for s, i in found.items()} for p, found in by_percent.items()}
                for name, by_percent in self.svm.items()
            },
            "comparisons": [
                {**dataclasses.asdict(pair), "sentence": self.sentence(pair)} for pair in self.pairs
            ],
            "notes": self.notes,
        }

    def table(self) -> str:
        """For a terminal: a table for each pair, and what it comes to."""
        blocks = []
        for pair in self.pairs:
            rows: list[Sequence[str]] = [("", pair.encoder, pair.baseline, "difference", "verdict")]
            for measure, difference in zip(self.measures, pair.differences, strict=True):
                both = measure.values[pair.encoder], measure.values[pair.baseline]
                values = (shown_value(measure, value) for value in both)
                shown = shown_difference(measure, difference)
                rows.append((measure.title, *values, shown, difference.verdict))
            blocks.append(_aligned(rows))
            reasons = {d.reason for d in pair.differences} - {"", HOLDS_ZERO}
            blocks += [f"{UNDECIDED}: {reason}" for reason in sorted(reasons)]
        if not self.pairs:
            (name,) = self.encoders
            alone = [(m.title, shown_value(m, m.values[name])) for m in self.measures]
            blocks.append(_aligned([("", name), *alone]))
        lines = [
            f"{printable(self.dataset)}: trained on {self.train_split}, tested on "
            f"{self.test_split}; 95 % intervals over {self.groups}",
            *(f"note: {printable(note)}" for note in self.notes),
            *blocks,
            *(printable(sentence) for sentence in self.sentences()),
        ]
        return "\n".join(lines)


def shown_value(measure: Measure, value: Interval) -> str:
    """``54.2 (44.1 to 64.0)``: percent, except the effective rank."""
    if value.low is None or value.high is None:
        return _number(measure, value.value)
    low, high = (_number(measure, end) for end in (value.low, value.high))
    return f"{_number(measure, value.value)} ({low} to {high})"


def shown_difference(measure: Measure, difference: Difference) -> str:
    """``+5.2 (-1.0 to +11.4)``: points, except of the effective rank."""
    interval = difference.interval
    if interval is None:
        return "–"
    ends = [e for e in (interval.low, interval.high) if e is not None]
    value, *shown = (_signed(measure, number) for number in (interval.value, *ends))
    return f"{value} ({' to '.join(shown)})" if shown else value


def _signed(measure: Measure, number: float) -> str:
    text = _number(measure, number)
    return text if text.startswith("-") else f"+{text}"


def _number(measure: Measure, number: float) -> str:
    text = f"{number:.1f}" if measure.key == RANK else percent(number)
    return text.replace("-0.0", "0.0") if text == "-0.0" else text


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            f"{printable(cell):<{width}}" for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )
