"""CSV that comes back as it went."""

from __future__ import annotations

import csv
import io

from shards.atomic import csv_text


def test_any_text_comes_back() -> None:
    rows = [["a", 'b "c"', "d,e"], ["f\rg", "h\ni", "j\r\nk"], ["\r", "\r\n", ""]]
    text = csv_text(rows)
    assert list(csv.reader(io.StringIO(text, newline=""), strict=True)) == rows


def test_lines_end_in_a_line_feed_and_none_is_empty() -> None:
    assert csv_text([("a", 1, None), ("b", 2.5, "")]) == "a,1,\nb,2.5,\n"
