"""What of a dataset's official lists is there, by split and class."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from shards.csv_rows import csv_text

_MOST_NAMED = 5


@dataclass(frozen=True)
class CoverageRow:
    """One class of one split."""

    split: str
    label: str  # empty where videos have none
    listed: int
    present: int

    @property
    def missing(self) -> int:
        """Listed and not found."""
        return self.listed - self.present


def coverage_rows(listed: Iterable[tuple[str, str, bool]]) -> list[CoverageRow]:
    """Count (split, label, present) of every listed video."""
    counts: defaultdict[tuple[str, str], Counter[bool]] = defaultdict(Counter)
    for split, label, present in listed:
        counts[split, label][present] += 1
    return [
        CoverageRow(split, label, count[True] + count[False], count[True])
        for (split, label), count in sorted(counts.items())
    ]


def coverage_lines(name: str, rows: Iterable[CoverageRow]) -> list[str]:
    """For people: a line a split, and one more where something is missing."""
    splits: defaultdict[str, list[CoverageRow]] = defaultdict(list)
    for row in rows:
        splits[row.split].append(row)
    lines = []
    for split, classes in splits.items():
        listed, present = (sum(getattr(row, part) for row in classes) for part in _PARTS)
        lines.append(f"{name}: {present} of {listed} listed {split} videos found")
        lacking = [row for row in classes if row.missing]
        if not lacking or not any(row.label for row in classes):
            continue
        if all(row.listed == 1 for row in classes):  # sequences, each its own
            names = [row.label for row in lacking]
            more = f" and {len(names) - _MOST_NAMED} more" if names[_MOST_NAMED:] else ""
            lines.append(f"{name}: missing are {', '.join(names[:_MOST_NAMED])}{more}")
            continue
        absent = sum(row.present == 0 for row in lacking)
        worst = sorted(lacking, key=lambda row: (-row.missing, row.label))[:_MOST_NAMED]
        named = ", ".join(f"{row.label or '(no label)'} {row.missing}" for row in worst)
        lines.append(
            f"{name}: of {len(classes)} classes {len(classes) - len(lacking)} are complete, "
            f"{absent} absent; most are missing of {named}"
        )
    return lines


_PARTS = ("listed", "present")


def coverage_csv(rows: Iterable[CoverageRow]) -> str:
    """``NAME.coverage.csv``: every class of every split."""
    figures = ((row.split, row.label, row.listed, row.present, row.missing) for row in rows)
    return csv_text([("split", "label", "listed", "present", "missing"), *figures])
