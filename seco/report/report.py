"""``seco report``: every result found, beside the paper's tables, as one self-contained page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seco.pages.html import data_uri, render_markdown, render_page
from seco.pages.text import printable
from seco.report.charts import chance_levels, draw_charts
from seco.report.content import ReportContent, RunSection, TableSection, report_content
from seco.report.origin import short_name
from seco.report.paper_tables import NOT_COMPARABLE, NOT_MEASURED
from seco.report.sources import Found, find_results
from shards.atomic import json_text, write_text

_FORMAT_VERSION = 1


def write_report(
    folders: Sequence[str | Path],
    out: Path,
    markdown: Path | None = None,
    json: Path | None = None,
) -> Found:
    """Write the page of everything found under ``folders`` (``runs/`` and ``features/`` if empty).

    The same results give the same bytes.

    Args:
        markdown: where the same goes as Markdown, without curves and pictures.
        json: where the same goes as one JSON object, without curves and pictures.

    Returns:
        what was found, with the files that could not be read.

    Raises:
        InputError: nothing was found, or a file cannot be written.
    """
    found = find_results(folders)
    content = report_content(found)
    write_text(out, render_report(content))
    if markdown is not None:
        write_text(markdown, render_markdown("report.md.j2", **_values(content)))
    if json is not None:
        write_text(json, json_text(report_json(content)))
    return found


def render_report(content: ReportContent) -> str:
    """The page as HTML."""
    return render_page(
        "report.html.j2",
        charts=[draw_charts(s.run, f"run {number}") for number, s in enumerate(content.runs)],
        pictures=[
            data_uri(row.confusion_png, "image/png") if row.confusion_png else None
            for row in content.features
        ],
        **_values(content),
    )


def report_json(content: ReportContent) -> dict[str, Any]:
    """The report as plain values; figures are fractions where they are not called percent.

    Those of comparisons are text with their intervals; ``compare.json`` has the numbers.
    """
    valid: dict[str, Any] = _valid(
        {
            "format_version": _FORMAT_VERSION,
            "note": NOT_COMPARABLE,
            "tables": [_table_json(section) for section in content.tables],
            "ablations": [dataclasses.asdict(ablation) for ablation in content.ablations],
            "features": [
                {
                    "folder": str(row.folder),
                    "encoder": row.encoder,
                    "dataset": row.dataset,
                    "extraction": row.extraction,
                    "probe": dataclasses.asdict(row.probe) if row.probe else None,
                    "retrieval": dataclasses.asdict(row.retrieval) if row.retrieval else None,
                }
                for row in content.features
            ],
            "evaluations": [
                {"folder": str(row.folder), **dataclasses.asdict(row.item)}
                for row in content.evaluations
            ],
            "comparisons": [
                {"folder": str(folder), **dataclasses.asdict(comparison)}
                for folder, comparison in content.comparisons
            ],
            "runs": [_run_json(section) for section in content.runs],
            "unread": [{"path": str(item.path), "reason": item.reason} for item in content.unread],
        }
    )
    return valid


def _values(content: ReportContent) -> dict[str, Any]:
    return {
        "report": content,
        "short": short_name,
        "not_comparable": NOT_COMPARABLE,
        "not_measured": NOT_MEASURED,
    }


def _table_json(section: TableSection) -> dict[str, Any]:
    table = section.table
    return {
        "number": table.number,
        "caption": table.caption,
        "columns": [dataclasses.asdict(column) for column in table.columns],
        "rows": [
            {
                "method": row.method,
                "kind": row.kind,
                "paper": list(row.figures),
                "here": [[dataclasses.asdict(figure) for figure in cell] for cell in row.ours],
            }
            for row in section.rows
        ],
        "results": [
            {**dataclasses.asdict(result), "folder": str(result.folder)}
            for result, *_ in section.results
        ],
    }


def _run_json(section: RunSection) -> dict[str, Any]:
    log = section.run.log
    return {
        "folder": str(section.run.folder),
        "last_step": log.last_step,
        "lines": log.lines,
        "skipped_lines": section.skipped_lines,
        "last": {name: value if math.isfinite(value) else None for name, value in section.last},
        "chance": chance_levels(section.run.config),
        "settings": dict(section.settings),
    }


def _valid(value: Any) -> Any:
    """``value`` with nothing in it that JSON or UTF-8 does not have."""
    if isinstance(value, dict):
        return {printable(name): _valid(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_valid(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return printable(value) if isinstance(value, str) else value
