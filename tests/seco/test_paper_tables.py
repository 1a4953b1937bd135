"""The paper's tables: every figure against its text, and which of ours may stand beside one."""

from __future__ import annotations

import re
from typing import Any

import pytest

from seco.report.tables import (
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLES,
    Measured,
    PaperTable,
    evaluation_metrics,
    fill,
    known_dataset,
    probe_metric,
    set_size_note,
)
from tests.data import paper_text

_FIGURES = re.compile(r"(?:(?<= )(?:\d\d\.\d\d|-) ?)+$")


def rows_of_text(number: int) -> dict[str, tuple[str, ...]]:
    """The rows of a table as the paper's text has them: a method and its figures at the end."""
    text = paper_text()
    lines = text[text.index(f"Table {number}: ") :].splitlines()
    rows: dict[str, tuple[str, ...]] = {}
    for line in lines:
        figures = _FIGURES.search(line.strip())
        if figures:
            method = line.strip()[: figures.start()].strip()
            rows[method] = tuple(figures[0].split())
        elif rows and line.strip():
            break  # the text goes on
    return rows


@pytest.mark.parametrize(("table", "count"), [(TABLE_1, 6), (TABLE_2, 9), (TABLE_3, 9)])
def test_every_figure_is_that_of_the_papers_text(table: PaperTable, count: int) -> None:
    printed = rows_of_text(table.number)
    assert len(printed) == count
    ours = {row.method: row.figures for row in table.rows if not row.extra}
    assert ours == printed
    assert _letters(f"Table {table.number}: {table.caption}") in _letters(paper_text())


def _letters(text: str) -> str:
    """Without what lines are broken by."""
    return re.sub(r"[\s-]", "", text)


def test_gains_named_in_the_text_are_those_between_the_figures() -> None:
    for table in TABLES:
        for row in table.rows:
            assert len(row.figures) == len(table.columns)

    # The text's own differences (§5.3, abstract) hold between the figures.
    def gains(table: PaperTable, method: str, over: str) -> list[float]:
        figures = {row.method: row.figures for row in table.rows}
        pairs = zip(figures[method], figures[over], strict=True)
        return [round(float(ours) - float(theirs), 2) for ours, theirs in pairs]

    imagenet = "Supervised ImageNet Pre-training"
    assert gains(TABLE_1, "SeCo-Inter+Intra+Order", imagenet)[:3] == [9.57, 1.36, 2.32]
    assert gains(TABLE_3, "SeCo", imagenet) == [2.96, 6.47]


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("kinetics", 400, "kinetics400"),
        ("kinetics", None, None),
        ("kinetics", 600, None),
        ("Kinetics-400", None, "kinetics400"),
        ("k400-val", 400, "kinetics400"),
        ("kinetics400", 8, None),
        ("kinetics600", 400, None),
        ("k400-rendered", None, None),
        ("my-ucf101", None, None),
        ("UCF101", 101, "ucf101"),
        ("ucf101", 4, None),
        ("activitynet", None, "activitynet"),
        ("", None, None),
    ],
)
def test_known_dataset(name: str, classes: int | None, expected: str | None) -> None:
    assert known_dataset(name, classes) == expected


def test_only_a_linear_svm_on_a_validation_set_corresponds() -> None:
    assert probe_metric("kinetics400", "official val", "svm", 400) == "kinetics400-svm"
    assert probe_metric("kinetics400", "official val", "knn", 400) is None
    assert probe_metric("kinetics400", "train", "svm", 400) is None
    assert probe_metric("ucf101", "val", "svm", 101) is None


def measured(**changes: Any) -> Measured:
    values: dict[str, Any] = {"metric": "kinetics400-svm", "encoder": "mine", "arch": "resnet50"}
    values |= {"tasks": ("inter", "intra", "order"), "percent": 50.0, "note": ""}
    return Measured(**(values | changes))


def test_our_figure_takes_the_row_of_its_method_only() -> None:
    def places(table: PaperTable, item: Measured) -> list[tuple[str, int]]:
        rows = fill(table, [item])
        return [(row.method, n) for row in rows for n, cell in enumerate(row.ours) if cell]

    assert places(TABLE_1, measured()) == [("SeCo-Inter+Intra+Order", 0)]
    assert places(TABLE_1, measured(tasks=("inter",))) == [("SeCo-Inter", 0)]
    assert places(TABLE_1, measured(tasks=None)) == [("mine", 0)]
    assert places(TABLE_1, measured(tasks=("order",))) == [("mine", 0)]
    assert places(TABLE_2, measured()) == []
    assert places(TABLE_1, measured(arch="resnet18")) == []
    assert places(TABLE_2, measured(arch="resnet18")) == [("SeCo (ResNet18)", 0)]
    assert places(TABLE_3, measured(metric="hmdb51-finetune")) == [("SeCo", 1)]
    assert places(TABLE_3, measured()) == []


def test_set_size_note() -> None:
    assert set_size_note("kinetics400", 19_404) == "19404 videos"
    assert set_size_note("otb100", 4) == "partial set: 4 of 100 sequences"
    assert "unknown" in set_size_note("ucf101", None)


def test_each_figure_of_a_tracker_or_a_fine_tuned_network_has_its_column() -> None:
    figures = {"precision_20": 0.7, "precision_auc": 0.6, "success_auc": 0.5}
    assert evaluation_metrics("track", "otb100", None, figures) == {
        "precision_20": ("otb100-precision", 0.7),
        "precision_auc": ("otb100-precision", 0.6),
        "success_auc": ("otb100-success", 0.5),
    }
    tuned = {"top1": 0.8, "top5": 0.9}
    assert evaluation_metrics("finetune", "ucf101", 101, tuned) == {
        "top1": ("ucf101-finetune", 0.8)
    }
    assert evaluation_metrics("finetune", "ucf101", 8, tuned) == {}
    assert evaluation_metrics("track", "got10k", None, figures) == {}
