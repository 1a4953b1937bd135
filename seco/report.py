"""``seco report``: every result found, beside the paper's tables, as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seco.pages import data_uri, render_page
from seco.paper_tables import (
    NOT_COMPARABLE,
    NOT_MEASURED,
    TABLES,
    Measured,
    evaluation_metrics,
    fill,
    known_dataset,
    probe_metric,
    set_size_note,
)
from seco.report_charts import Chart, draw_charts, tasks_of
from seco.report_records import Evaluation, words
from seco.report_sources import Features, Found, Run, find_results
from shards.atomic import write_text

_EVALUATION_WORDS = {
    "top1": "top-1",
    "top5": "top-5",
    "precision": "precision at 20 px",
    "precision_auc": "precision, mean of the curve",
    "success": "success, mean of the curve",
}


@dataclass(frozen=True)
class _RunSection:
    folder: Path
    summary: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    charts: list[Chart]
    skipped_lines: int


@dataclass(frozen=True)
class _FeatureSection:
    """A row of the headline table, and the details below it."""

    encoder: str
    tasks: tuple[str, ...] | None
    source: Features
    confusion: str | None  # data URI


def write_report(folders: Sequence[str | Path], out: Path) -> Found:
    """Write the page of everything found under ``folders`` (``runs/`` and ``features/`` if empty).

    The same results give the same bytes.

    Returns:
        what was found, with the files that could not be read.

    Raises:
        InputError: nothing was found, or ``out`` cannot be written.
    """
    found = find_results(folders)
    write_text(out, render_report(found))
    return found


def render_report(found: Found) -> str:
    """The page as HTML."""
    features = [_feature_section(item, found.runs) for item in found.features]
    measured = _measured_probes(features) + _measured_evaluations(found)
    return render_page(
        "report.html.j2",
        features=features,
        demos=found.demos,
        evaluations=[
            (folder, encoder_name(item.encoder), _evaluation_cells(item), item)
            for folder, item in found.evaluations
        ],
        runs=[_run_section(run, number) for number, run in enumerate(found.runs)],
        tables=[(table, fill(table, measured)) for table in TABLES],
        unread=found.unread,
        not_comparable=NOT_COMPARABLE,
        not_measured=NOT_MEASURED,
    )


def encoder_name(encoder: Mapping[str, Any]) -> str:
    """An encoder in words: its backbone and where its weights are from."""
    weights = words(encoder.get("checkpoint") or encoder.get("source"))
    if weights == "random":
        weights = "random initialisation"
    return ", ".join(part for part in (words(encoder.get("arch")), weights) if part) or "unknown"


def encoder_tasks(encoder: Mapping[str, Any], runs: Sequence[Run]) -> tuple[str, ...] | None:
    """The proxy tasks it was trained with: as it says itself, or as the run of its checkpoint does.

    Only a run that is part of the report counts: a path in a result is not followed.
    """
    stated = tasks_of(encoder)
    checkpoint = encoder.get("checkpoint")
    if stated or not isinstance(checkpoint, str) or not checkpoint:
        return stated
    folder = Path(checkpoint).absolute().parent
    for run in runs:
        if run.folder.absolute() == folder:
            return tasks_of(run.config)
    return None


def _feature_section(item: Features, runs: Sequence[Run]) -> _FeatureSection:
    return _FeatureSection(
        encoder=encoder_name(item.encoder),
        tasks=encoder_tasks(item.encoder, runs),
        source=item,
        confusion=data_uri(item.confusion_png, "image/png") if item.confusion_png else None,
    )


def _measured_probes(features: Sequence[_FeatureSection]) -> list[Measured]:
    found = []
    for section in features:
        probe, dataset = section.source.probe, section.source.dataset
        if probe is None or probe.top1 is None:
            continue
        classes = len(probe.per_class) or None
        metric = probe_metric(dataset, probe.split, probe.method, classes)
        known = known_dataset(dataset, classes)
        if metric and known:
            size = set_size_note(known, probe.n_test)
            found.append(
                Measured(
                    metric=metric,
                    encoder=section.encoder,
                    arch=words(section.source.encoder.get("arch")),
                    tasks=section.tasks,
                    percent=100 * probe.top1,
                    note=f"{section.source.folder}, {size}",
                )
            )
    return found


def _measured_evaluations(found: Found) -> list[Measured]:
    measured = []
    for folder, item in found.evaluations:
        known = known_dataset(item.dataset, item.classes)
        places = evaluation_metrics(item.kind, item.dataset, item.classes, item.figures)
        for name, (metric, value) in places.items():
            split = f"split {item.split}" if item.split else ""
            what = _EVALUATION_WORDS[name] if item.kind == "track" else split
            notes = [str(folder), what, set_size_note(known, item.n_test) if known else ""]
            measured.append(
                Measured(
                    metric=metric,
                    encoder=encoder_name(item.encoder),
                    arch=words(item.encoder.get("arch")),
                    tasks=encoder_tasks(item.encoder, found.runs),
                    percent=100 * value,
                    note=", ".join(note for note in notes if note),
                )
            )
    return measured


def _evaluation_cells(item: Evaluation) -> list[tuple[str, float]]:
    return [(_EVALUATION_WORDS[name], value) for name, value in item.figures.items()]


def _run_section(run: Run, number: int) -> _RunSection:
    return _RunSection(
        folder=run.folder,
        summary=_summary(run),
        settings=[(name, words(value)) for name, value in run.config.items()],
        charts=draw_charts(run.metrics, run.config, f"run {number}"),
        skipped_lines=run.skipped_lines,
    )


def _summary(run: Run) -> list[tuple[str, str]]:
    """Where the run stands, in a few pairs of words."""
    steps = run.metrics["step"]
    pairs = [("last step", f"{steps[-1]:g}")]
    epochs = run.metrics.get("epoch")
    if epochs is not None and np.isfinite(epochs[-1]):
        planned = run.config.get("epochs")
        pairs.append(("epoch", f"{epochs[-1]:g}" + (f" of {words(planned)}" if planned else "")))
    for name in ("arch", "tasks", "batch_size", "queue_size"):
        if name in run.config:
            pairs.append((name.replace("_", " "), words(run.config[name])))
    speed = run.metrics.get("images_per_s")
    if speed is not None and np.isfinite(speed).any():
        pairs.append(("images/s, median", f"{np.median(speed[np.isfinite(speed)]):.0f}"))
    return pairs
