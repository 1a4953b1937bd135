"""Reading a run's log: what counts, what is joined, and how little memory it takes."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from seco.training.logging import MAX_COLUMNS, MAX_POINTS, read_log


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_later_of_repeated_steps_counts_and_a_cut_last_line_is_forgiven(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n{"step": 2, "loss": 3.5, "extra": 1}\n'
        '{"step": 3, "loss": NaN}\nnot json\n[1]\n{"step": 4, "lo'
    )
    log = read_log(path)
    loss = log.curves["loss"]
    assert loss.steps.tolist() == [1, 2, 3]
    assert loss.values.tolist() == [5, 3.5, math.inf]
    assert (loss.last, loss.not_finite) == (math.inf, 1)
    assert np.isnan(log.curves["extra"].values).tolist() == [True, False, True]
    assert (log.skipped_lines, log.lines, log.lines_a_point, log.last_step) == (2, 3, 1, 3)


def test_all_lines_from_a_repeated_step_on_are_replaced(tmp_path: Path) -> None:
    """Step 4 of the first try is not one of the second, which has come to step 3."""
    rows = [{"step": s, "loss": 1.0} for s in (1, 2, 3, 4)] + [{"step": 4, "knn": 9.0}]
    rows += [{"step": s, "loss": 2.0} for s in (2, 3)]
    log = read_log(write_lines(tmp_path / "m.jsonl", *rows))
    assert log.curves["loss"].steps.tolist() == [1, 2, 3]
    assert log.curves["loss"].values.tolist() == [1, 2, 2]
    assert "knn" not in log.curves


@pytest.mark.parametrize("lines", [MAX_POINTS, MAX_POINTS + 1, 10_000])
def test_points_of_a_long_log_are_means_of_consecutive_lines(tmp_path: Path, lines: int) -> None:
    rows = [{"step": 10 * n, "loss": n % 7, "bad": 1.0, "knn": n} for n in range(lines)]
    for n, row in enumerate(rows):
        if n % 100:
            del row["knn"]
    rows[lines // 2]["bad"] = math.nan
    log = read_log(write_lines(tmp_path / "m.jsonl", *rows))
    width = log.lines_a_point
    points = len(log.curves["loss"].steps)
    assert MAX_POINTS // 2 <= points <= MAX_POINTS
    assert (points - 1) * width < lines <= points * width
    assert width == (1 if lines == MAX_POINTS else 2 if lines < 2 * MAX_POINTS else 16)
    for name in ("loss", "knn"):
        curve = log.curves[name]
        for number in range(points):
            here = rows[number * width : (number + 1) * width]
            values = [row[name] for row in here if name in row]
            assert curve.steps[number] == np.mean([row["step"] for row in here])
            if values:
                assert curve.values[number] == pytest.approx(np.mean(values))
            else:
                assert math.isnan(curve.values[number])
    gaps = np.flatnonzero(np.isinf(log.curves["bad"].values))
    assert gaps.tolist() == [lines // 2 // width]
    assert log.curves["loss"].last == (lines - 1) % 7
    assert log.curves["bad"].not_finite == 1
    assert log.lines == lines


def test_step_repeated_in_a_joined_log_leaves_steps_in_order(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": 1.0} for n in range(5_000)]
    rows += [{"step": n, "loss": 2.0} for n in range(3_001, 4_000)]
    log = read_log(write_lines(tmp_path / "m.jsonl", *rows))
    steps, values = log.curves["loss"].steps, log.curves["loss"].values
    assert (np.diff(steps) > 0).all()
    assert (values[steps < 3_000 - log.lines_a_point] == 1).all()
    assert (values[steps > 3_001] == 2).all()
    assert (log.last_step, log.curves["loss"].last) == (3_999, 2)


def test_hostile_lines_are_counted_and_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with path.open("w") as file:
        file.write(json.dumps({"step": 1, **{f"c{n}": n for n in range(500)}}) + "\n")
        file.write('{"step": 2, "a": "' + "x" * 300_000 + '"}\n')
        file.write("[" * 100_000 + "\n")
        file.write('{"step": 1e999, "loss": 1}\n{"step": true}\n{"step": 1' + "0" * 400 + "}\n")
        file.write('{"step": 3, "c0": 1' + "0" * 400 + "}\n")
    log = read_log(path)
    assert len(log.curves) == MAX_COLUMNS
    assert log.skipped_lines == 5
    assert log.curves["c0"].last == math.inf
    with pytest.raises(ValueError, match="no usable line"):
        read_log(write_lines(tmp_path / "none.jsonl", {}, [1], "x"))


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    row = json.dumps({f"column{n}": n / 3 for n in range(12)})[1:]
    peaks = []
    for lines in (2 * MAX_POINTS, 20 * MAX_POINTS):
        path = tmp_path / f"{lines}.jsonl"
        path.write_text("".join(f'{{"step": {step}, {row}\n' for step in range(lines)))
        tracemalloc.start()
        read_log(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
