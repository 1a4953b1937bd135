"""Proxy tasks side by side, as in the last rows of Table 1, on whatever sets were evaluated.

Only like is compared with like: figures of one set, split, classifier, backbone and extraction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from seco.config import TASKS, PretrainConfig
from seco.report.measured import FIGURE_WORDS
from seco.report.origin import encoder_tasks, is_random, run_of
from seco.report.paper_tables import TABLE_1, known_dataset, probe_metric
from seco.report.records import extraction_words, words
from seco.report.sources import Found, Run
from shards.settings import resumable_settings

RANDOM = "random initialisation"
# Runs of an ablation may differ in these without being another experiment.
_EXPECTED = (resumable_settings(PretrainConfig) - {"shards", "init", "preset"}) | {"tasks", "seed"}

_EVALUATION = ("epochs", "clips", "crops", "segments", "feature_layer", "raw_features", "scales")


@dataclass(frozen=True)
class AblationRow:
    """The results of one choice of tasks."""

    tasks: str
    results: int
    percent: float  # their mean
    lowest: float
    highest: float
    gain: float | None  # over the row above
    paper: str  # the paper's figure; "" where it has none


@dataclass(frozen=True)
class Ablation:
    """Choices of tasks compared by one figure."""

    dataset: str
    figure: str
    arch: str
    conditions: str  # what all results have in common
    rows: list[AblationRow]
    varying: list[str]  # settings of pre-training in which the runs differ besides


@dataclass(frozen=True)
class _Trial:
    tasks: tuple[str, ...] | None  # None: random weights
    percent: float
    run: Run | None


@dataclass(frozen=True)
class _Kind:
    dataset: str
    figure: str
    arch: str
    conditions: str
    metric: str  # of Table 1's column, or ""


def ablations(found: Found) -> list[Ablation]:
    """One for each figure that was measured for two choices of tasks or more."""
    kinds: dict[_Kind, list[_Trial]] = {}
    for kind, encoder, fraction in _figures(found):
        tasks = encoder_tasks(encoder, found.runs)
        if tasks or is_random(encoder):
            trial = _Trial(tasks, 100 * fraction, run_of(encoder, found.runs))
            kinds.setdefault(kind, []).append(trial)
    return [
        _ablation(kind, trials)
        for kind, trials in kinds.items()
        if len({trial.tasks for trial in trials} - {None}) > 1
    ]


def _figures(found: Found) -> Iterator[tuple[_Kind, Mapping[str, Any], float]]:
    for item in found.features:
        arch = words(item.encoder.get("arch"))
        extracted = extraction_words(item.meta)
        probe, retrieval = item.probe, item.retrieval
        if probe is not None and probe.top1 is not None:
            rows = f"{words(probe.n_train)} → {words(probe.n_test)} videos"
            setting = [] if probe.c is None else [f"C = {probe.c:g}"]
            if probe.tolerance is not None:
                setting.append(f"stopped at tolerance {probe.tolerance:g}")
            if probe.normalise not in ("", "none"):
                setting.append(f"features scaled: {probe.normalise}")
            conditions = [f"split {probe.split}", rows, *setting, *extracted]
            classes = len(probe.per_class) or None
            metric = probe_metric(item.dataset, probe.split, probe.method, classes) or ""
            figure = f"{probe.method or 'probe'}, top-1"
            kind = _Kind(item.dataset, figure, arch, ", ".join(conditions), metric)
            yield kind, item.encoder, probe.top1
        if retrieval is not None and 1 in retrieval.label:
            rows = f"{words(retrieval.queries)} in {words(retrieval.gallery)} videos"
            conditions = [rows, *extracted]
            kind = _Kind(item.dataset, "retrieval, R@1", arch, ", ".join(conditions), "")
            yield kind, item.encoder, retrieval.label[1]
    for _, evaluation in found.evaluations:
        arch = words(evaluation.encoder.get("arch"))
        tuned = evaluation.kind == "finetune"
        name = "top1" if tuned else "success_auc"
        if name in evaluation.figures:
            does = "fine-tuning" if tuned else "tracking"
            unit = "videos" if tuned else "sequences"
            split = [f"split {evaluation.split}"] if evaluation.split else []
            conditions = [*split, f"{words(evaluation.n_test)} {unit}"]
            conditions += [
                f"{setting.replace('_', ' ')} {words(evaluation.settings[setting])}"
                for setting in _EVALUATION
                if setting in evaluation.settings
            ]
            otb = not tuned and known_dataset(evaluation.dataset) == "otb100"
            kind = _Kind(
                evaluation.dataset,
                f"{does}, {FIGURE_WORDS[name]}",
                arch,
                ", ".join(conditions),
                "otb100-success" if otb else "",
            )
            yield kind, evaluation.encoder, evaluation.figures[name]


def _ablation(kind: _Kind, trials: Sequence[_Trial]) -> Ablation:
    rows: list[AblationRow] = []
    for tasks in sorted({trial.tasks for trial in trials}, key=_order):
        percents = [trial.percent for trial in trials if trial.tasks == tasks]
        rows.append(
            AblationRow(
                tasks=" + ".join(tasks) if tasks else RANDOM,
                results=len(percents),
                percent=mean(percents),
                lowest=min(percents),
                highest=max(percents),
                gain=mean(percents) - rows[-1].percent if rows else None,
                paper=_paper_figure(kind, tasks),
            )
        )
    runs = [trial.run for trial in trials if trial.run is not None]
    return Ablation(
        dataset=kind.dataset or "unknown set",
        figure=kind.figure,
        arch=kind.arch or "unknown backbone",
        conditions=kind.conditions,
        rows=rows,
        varying=_varying(runs),
    )


def _order(tasks: tuple[str, ...] | None) -> tuple[int, list[int]]:
    chosen = tasks or ()
    return len(chosen), [TASKS.index(task) for task in chosen]


def _paper_figure(kind: _Kind, tasks: tuple[str, ...] | None) -> str:
    metrics = [column.metric for column in TABLE_1.columns]
    if kind.metric not in metrics or kind.arch != TABLE_1.arch or tasks is None:
        return ""
    column = metrics.index(kind.metric)
    return next((row.figures[column] for row in TABLE_1.rows if row.tasks == tasks), "")


def _varying(runs: Sequence[Run]) -> list[str]:
    names = sorted({name for run in runs for name in run.config} - _EXPECTED)
    found = []
    for name in names:
        values = list(dict.fromkeys(words(run.config.get(name)) for run in runs))
        if len(values) > 1:
            found.append(f"{name} ({' / '.join(value or 'not set' for value in values)})")
    return found
