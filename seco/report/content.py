"""What a report says, before it is a page, Markdown or JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seco.report.ablation import Ablation, ablations
from seco.report.measured import FIGURE_WORDS, Result, measure
from seco.report.origin import encoder_name
from seco.report.paper_protocol import DIFFERS, SAME, UNKNOWN, Compared, in_state
from seco.report.paper_tables import TABLES, FilledRow, PaperTable, fill
from seco.report.records import Comparison, Evaluation, Probe, Retrieval, extraction_words, words
from seco.report.sources import Features, Found, Run, Unread


@dataclass(frozen=True)
class FeatureRow:
    """A feature folder with what was measured on it."""

    folder: Path
    encoder: str
    dataset: str
    extraction: str  # in words
    probe: Probe | None
    retrieval: Retrieval | None
    confusion_png: bytes | None


@dataclass(frozen=True)
class EvaluationRow:
    """A fine-tuned network or a tracker: its figures (fractions) and other facts."""

    folder: Path
    encoder: str
    item: Evaluation
    figures: list[tuple[str, float]]
    facts: list[str]


@dataclass(frozen=True)
class TableSection:
    """A table of the paper with our figures, and what each of them was measured with."""

    table: PaperTable
    rows: list[FilledRow]
    results: list[tuple[Result, list[Compared], list[Compared], list[Compared]]]
    # each with the settings that differ, that nobody recorded, and that are the same


@dataclass(frozen=True)
class RunSection:
    """A run: where it stands, in pairs of words, and what its log says last."""

    run: Run
    summary: list[tuple[str, str]]
    last: list[tuple[str, float]]
    settings: list[tuple[str, str]]
    joined: str  # how the curves were thinned; "" if they were not
    skipped_lines: int


@dataclass(frozen=True)
class ReportContent:
    """All of it, in the order of the page."""

    features: list[FeatureRow]
    evaluations: list[EvaluationRow]
    comparisons: list[tuple[Path, Comparison]]
    tables: list[TableSection]
    ablations: list[Ablation]
    runs: list[RunSection]
    unread: list[Unread]


def report_content(found: Found) -> ReportContent:
    """What is to be said of the results found."""
    results, measured = measure(found)
    tables = []
    for table in TABLES:
        rows = fill(table, measured)
        numbers = {
            number
            for row in rows
            for cell in row.ours
            for figure in cell
            for number in figure.results
        }
        shown = [_split_by_state(result) for result in results if result.number in numbers]
        tables.append(TableSection(table, rows, shown))
    return ReportContent(
        features=[_feature_row(item) for item in found.features],
        evaluations=[_evaluation_row(folder, item) for folder, item in found.evaluations],
        comparisons=found.comparisons,
        tables=tables,
        ablations=ablations(found),
        runs=[_run_section(run) for run in found.runs],
        unread=found.unread,
    )


def _split_by_state(
    result: Result,
) -> tuple[Result, list[Compared], list[Compared], list[Compared]]:
    differing, unknown, same = (in_state(result.protocol, s) for s in (DIFFERS, UNKNOWN, SAME))
    return result, differing, unknown, same


def _feature_row(item: Features) -> FeatureRow:
    meta = item.meta
    parts = extraction_words(meta)
    if meta.get("unreadable"):
        parts.append(f"{words(meta['unreadable'])} videos unreadable, left out")
    return FeatureRow(
        folder=item.folder,
        encoder=encoder_name(item.encoder),
        dataset=item.dataset,
        extraction=", ".join(parts),
        probe=item.probe,
        retrieval=item.retrieval,
        confusion_png=item.confusion_png,
    )


def _evaluation_row(folder: Path, item: Evaluation) -> EvaluationRow:
    settings = item.settings
    if item.kind == "finetune":
        size = [("n_test", "test videos"), ("clips", "clips a video"), ("crops", "crops a clip")]
    else:
        whole = f"of {words(settings['of_sequences'])} " if "of_sequences" in settings else ""
        size = [("sequences", f"{whole}sequences"), ("frames", "frames")]
    facts = [f"{_number_words(settings[n])} {what}" for n, what in size if n in settings]
    speed = item.frames_per_second
    if speed is not None and math.isfinite(speed) and speed > 0:
        facts.append(f"{speed:.1f} frames/s")
    return EvaluationRow(
        folder=folder,
        encoder=encoder_name(item.encoder),
        item=item,
        figures=[(FIGURE_WORDS[name], value) for name, value in item.figures.items()],
        facts=facts,
    )


def _run_section(run: Run) -> RunSection:
    log, skipped = run.log, run.log.skipped_lines
    if run.speed is not None:
        skipped += run.speed.skipped_lines
    joined = ""
    if log.lines_a_point > 1:
        joined = (
            f"{log.lines:,} lines were logged: each point is the mean of up to "
            f"{log.lines_a_point} consecutive ones."
        )
    return RunSection(
        run=run,
        summary=_summary(run),
        last=[(name, curve.last) for name, curve in log.curves.items() if name != "epoch"],
        settings=[(name, words(value)) for name, value in run.config.items()],
        joined=joined,
        skipped_lines=skipped,
    )


def _summary(run: Run) -> list[tuple[str, str]]:
    """Where the run stands, in a few pairs of words."""
    log, config = run.log, run.config
    pairs = [("last step", f"{log.last_step:,g}")]
    epoch = log.curves.get("epoch")
    if epoch is not None and math.isfinite(epoch.last):
        planned = words(config.get("epochs"))
        pairs.append(("in epoch", f"{epoch.last + 1:g}" + (f" of {planned}" if planned else "")))
    for name in ("dataset", "arch", "tasks", "split", "batch_size", "queue_size", "seed"):
        if config.get(name) is not None:
            pairs.append((name.replace("_", " "), _number_words(config[name])))
    for column, what in (("images_per_s", "images/s, median"), ("unreadable", "unreadable")):
        logged = run.speed if column == "images_per_s" else log
        curve = None if logged is None else logged.curves.get(column)
        if curve is not None and np.isfinite(curve.values).any():
            value = curve.last
            if column == "images_per_s":
                value = float(np.median(curve.values[np.isfinite(curve.values)]))
            pairs.append((what, f"{value:,.0f}"))
    return pairs


def _number_words(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return words(value)
