"""Near-duplicates as records: ``duplicates.csv``, and lines for a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seco.pages.text import printable
from seco.retrieve.fingerprints import Match
from shards.atomic import write_text
from shards.csv_rows import csv_text

COLUMNS = (
    *("key", "split", "near_key", "near_split", "kind", "mirrored", "similarity"),
    *("appearance", "motion", "shift_seconds"),
)
_UNVERIFIED = "unverified"
_LINES_SHOWN = 50


@dataclass(frozen=True)
class Pair:
    """Two videos of different splits that are, or look, the same."""

    key: str
    split: str
    near_key: str
    near_split: str
    similarity: float  # cosine of the features
    match: Match | None  # None: the frames were not looked at

    @property
    def kind(self) -> str:
        """``copy``, ``near``, or ``unverified``."""
        return _UNVERIFIED if self.match is None else str(self.match.kind)

    @property
    def mirrored(self) -> bool:
        """One of them is the mirror image of the other."""
        return self.match is not None and self.match.mirrored

    def row(self) -> list[str]:
        """Values of ``COLUMNS``."""
        told = [self.key, self.split, self.near_key, self.near_split, self.kind]
        told += ["yes" if self.mirrored else "", f"{self.similarity:.6f}"]
        if self.match is None:
            return [*told, "", "", ""]
        numbers = (self.match.appearance, self.match.motion, self.match.shift_seconds)
        return [*told, *(f"{number:.4f}" for number in numbers)]


@dataclass(frozen=True)
class Duplicates:
    """What was found, the surest first."""

    pairs: list[Pair]
    compared: int  # pairs of videos whose frames were compared
    unreadable: list[str]  # videos without a frame that decodes
    path: Path
    threshold: float | None  # of the cosine, where frames were not looked at

    def table(self) -> str:
        """Lines for a terminal."""
        if self.threshold is not None:
            head = (
                f"{len(self.pairs)} pairs across splits with a cosine of {self.threshold:g} or more"
            )
        else:
            head = (
                f"{len(self.pairs)} pairs across splits show the same video or nearly so "
                f"({self.compared} compared frame by frame)"
            )
        lines = [
            f"  {pair.kind}{', mirrored' if pair.mirrored else ''}  "
            f"{pair.split}: {pair.key}   {pair.near_split}: {pair.near_key}"
            for pair in self.pairs[:_LINES_SHOWN]
        ]
        if len(self.pairs) > _LINES_SHOWN:
            lines.append(f"  … all are in {self.path}")
        if self.unreadable:
            first = self.unreadable[0]
            lines.append(f"{len(self.unreadable)} videos have no readable frame, first {first}")
        return "\n".join([head, *map(printable, lines)])


def write_pairs(found: Duplicates) -> None:
    """Write ``duplicates.csv``, a row a pair.

    Raises:
        InputError: the file cannot be written.
    """
    text = csv_text([COLUMNS, *(pair.row() for pair in found.pairs)])
    write_text(found.path, text.encode("utf-8", "backslashreplace").decode("utf-8"))
