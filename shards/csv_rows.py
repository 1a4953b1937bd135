"""CSV as all files of this toolkit have it: UTF-8, lines that end in a line feed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TextIO


class _LineFeeds:
    """Ends rows with a line feed alone."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def write_csv(file: TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Write rows to a file opened with ``newline=""``; None becomes an empty field."""
    # The csv module quotes a carriage return in a field only where it is part of a line's end;
    # unquoted it would split the row in two for whoever reads it.
    csv.writer(_LineFeeds(file), lineterminator="\r\n").writerows(rows)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """The same as one text."""
    text = io.StringIO(newline="")
    write_csv(text, rows)
    return text.getvalue()
