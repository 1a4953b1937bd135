"""``seco report``: all results found, compared with the paper's tables, as one page.

Only results of the same dataset, split, classifier, backbone and extraction are compared with each
other. The report is built as data first, and then written as a page, as Markdown or as JSON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from markupsafe import Markup

from seco.config import TASKS, PretrainConfig, negative_count
from seco.pages import (
    INK,
    SERIES,
    data_uri,
    figure_svg,
    new_chart,
    render_markdown,
    render_page,
    style_axes,
)
from seco.report.results import (
    Comparison,
    Evaluation,
    Features,
    Found,
    Probe,
    Retrieval,
    Run,
    Unread,
    encoder_name,
    encoder_tasks,
    extraction_words,
    find_results,
    is_random,
    run_of,
    short_name,
    tasks_of,
    words,
)
from seco.report.tables import (
    DIFFERS,
    NOT_COMPARABLE,
    NOT_MEASURED,
    SAME,
    TABLE_1,
    TABLES,
    UNKNOWN,
    Compared,
    FilledRow,
    Measured,
    PaperTable,
    evaluation_metrics,
    evaluation_protocol,
    fill,
    in_state,
    known_dataset,
    pretraining_protocol,
    probe_metric,
    probe_protocol,
    set_size_note,
)
from seco.training.logging import Curve
from shards.atomic import json_text, write_text
from shards.settings import resumable_settings
from shards.terminal import printable

_MOST_OTHERS = 12
_FEW_POINTS = 12
# Shown as text, or of a task that the run does not have.
_NO_CHART = {"step", "epoch", "unreadable", "loss"} | {
    f"{w}_{t}" for w in ("loss", "acc") for t in TASKS
}
# The trainer logs feature std relative to that of uniformly distributed unit vectors.
_EVEN = (("spread evenly", 1.0),)


@dataclass(frozen=True)
class Chart:
    """A drawn chart and the note below it."""

    title: str
    svg: Markup
    note: str


@dataclass(frozen=True)
class _Plan:
    title: str
    curves: tuple[tuple[str, str], ...]  # (key of metrics.jsonl, name in the legend)
    levels: tuple[tuple[str, float], ...] = ()  # dotted lines: (what it is, height)
    limits: tuple[float | None, float | None] = (None, None)


def chance_levels(config: Mapping[str, Any]) -> dict[str, float]:
    """The chance level of each loss and accuracy.

    ln(1 + K) for inter (Eq. 2), ln 3 for the three-way intra loss (Eq. 3) or ln 2 for the pairwise
    one of the authors' code, ln 2 for order (Eq. 4). Levels unknown from the settings are omitted.
    """
    levels = {"loss_order": math.log(2), "acc_order": 1 / 2}
    negatives, batch = config.get("queue_size"), config.get("batch_size")
    if type(negatives) is int and type(batch) is int:
        negatives = negative_count(negatives, batch)
    if type(negatives) is int and negatives > 0:
        levels["loss_inter"] = math.log(1 + negatives)
        levels["acc_inter"] = 1 / (1 + negatives)
    ways = {"three-way": 3, "pairwise": 2}.get(str(config.get("intra")))
    if ways:
        levels["loss_intra"] = math.log(ways)
        levels["acc_intra"] = 1 / ways
    return levels


def draw_charts(run: Run, salt: str) -> list[Chart]:
    """Every chart that the run has metrics for, in the order of the page.

    The first columns that this toolkit's pre-training does not log get charts of their own.

    Args:
        salt: distinguishes this run's charts from others on the page.
    """
    curves = {**(run.speed.curves if run.speed is not None else {}), **run.log.curves}
    plans = _plans(run.config)
    known = {key for plan in plans for key, _ in plan.curves} | _NO_CHART
    others = [key for key in curves if key not in known][:_MOST_OTHERS]
    plans += [_Plan(key.replace("_", " "), ((key, key),)) for key in others]
    drawn = []
    for number, plan in enumerate(plans):
        found = [(name, curves[key]) for key, name in plan.curves if key in curves]
        if found:
            drawn.append(_draw(plan, found, f"{salt}/{number}"))
    return drawn


def _plans(config: Mapping[str, Any]) -> list[_Plan]:
    chance = chance_levels(config)
    tasks = tasks_of(config) or TASKS
    ln_intra = "ln 2" if config.get("intra") == "pairwise" else "ln 3"
    words = {"loss_inter": "ln(1+K)", "loss_intra": ln_intra, "loss_order": "ln 2"}
    plans = []
    if len(tasks) > 1:  # else it equals the task's loss
        whole = "Loss, all tasks" if tasks_of(config) else "Loss"
        plans.append(_Plan(whole, (("loss", "loss"),)))
    for task in tasks:
        key = f"loss_{task}"
        level = chance.get(key)
        known = () if level is None else ((f"chance, {words[key]} = {level:.2f}", level),)
        plans.append(_Plan(f"Loss, {task}", ((key, "loss"),), known))
    contrast = tuple((f"acc_{task}", task) for task in ("inter", "intra") if task in tasks)
    levels = tuple((f"chance, {name}", chance[key]) for key, name in contrast if key in chance)
    accuracy = _Plan("Contrast accuracy", contrast, levels, (0, 1))
    plans += [
        accuracy,
        _Plan("kNN on labelled shards", (("knn_top1", "top-1"),), limits=(0, 1)),
        _Plan("Learning rate", (("lr", "lr"),), limits=(0, None)),
        _Plan("Queue fill", (("queue_fill", "queue fill"),), limits=(0, 1.02)),
        _Plan("Feature std", (("feature_std", "feature std"),), _EVEN, (0, None)),
        _Plan("Images per second", (("images_per_s", "images/s"),), limits=(0, None)),
        _Plan("Fraction of time waiting for data", (("data_wait", "waiting"),), limits=(0, None)),
    ]
    if "order" in tasks:
        order = _Plan("Order accuracy", (("acc_order", "order"),), (("chance", 0.5),), (0, 1))
        plans.insert(plans.index(accuracy) + 1, order)
    return plans


def _draw(plan: _Plan, curves: Sequence[tuple[str, Curve]], salt: str) -> Chart:
    figure = new_chart()
    axes = figure.add_subplot()
    for colour, (name, curve) in zip(SERIES, curves, strict=False):
        there = ~np.isnan(curve.values)
        x, y = curve.steps[there], curve.values[there]
        # A point without neighbours draws no line.
        marker = "o" if len(x) < _FEW_POINTS else ""
        axes.plot(
            x,
            np.where(np.isfinite(y), y, np.nan),
            color=colour,
            linewidth=1.4,
            label=name,
            marker=marker,
            markersize=3,
        )
    colours = SERIES if len(plan.levels) > 1 else (INK,)
    for colour, (name, height) in zip(colours, plan.levels, strict=False):
        axes.axhline(height, color=colour, linewidth=1.2, linestyle=":", label=name)
    axes.set_ylim(bottom=plan.limits[0], top=plan.limits[1])
    axes.set_xlabel("step", color=INK, fontsize=9)
    if len(curves) + len(plan.levels) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    style_axes(axes)
    last = ", ".join(f"{name} {curve.last:.4g}" for name, curve in curves)
    lost = sum(curve.not_finite for _, curve in curves)
    note = f"last: {last}" + (f"; {lost} values are not finite" if lost else "")
    label = f"{plan.title} over steps, {note}"
    return Chart(plan.title, figure_svg(figure, label, salt), note)


FIGURE_WORDS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class": "mean class",
    "precision_20": "precision at 20 px",
    "precision_auc": "precision, mean of the curve",
    "success_auc": "success, mean of the curve",
}
_SPLITS = 3  # of UCF101 and of HMDB51


@dataclass(frozen=True)
class Result:
    """A result that has a place in the paper's tables: its number there and its protocol."""

    number: int
    folder: Path
    encoder: str
    what: str
    protocol: list[Compared]
    notes: tuple[str, ...]


def measure(found: Found) -> tuple[list[Result], list[Measured]]:
    """The results found that have a place in the paper's tables."""
    results: list[Result] = []
    measured: list[Measured] = []
    for features in found.features:
        _add_probe(found, features, results, measured)
    for folder, item in found.evaluations:
        _add_evaluation(found, folder, item, results, measured)
    measured += _means_over_splits(measured)
    return results, measured


def _add_probe(
    found: Found, item: Features, results: list[Result], measured: list[Measured]
) -> None:
    probe = item.probe
    if probe is None or probe.top1 is None:
        return
    classes = len(probe.per_class) or None
    metric = probe_metric(item.dataset, probe.split, probe.method, classes)
    known = known_dataset(item.dataset, classes)
    if not metric or not known:
        return
    run = run_of(item.encoder, found.runs)
    arch = words(item.encoder.get("arch"))
    number = len(results) + 1
    size = set_size_note(known, probe.n_test)
    figure = Measured(
        metric=metric,
        encoder=encoder_name(item.encoder),
        arch=arch,
        tasks=encoder_tasks(item.encoder, found.runs),
        percent=100 * probe.top1,
        note=size,
        results=(number,),
    )
    protocol = [
        *pretraining_protocol(item.encoder, run, _arch_of_table(metric, arch)),
        *probe_protocol(probe, item.meta, known),
    ]
    what = f"linear SVM on {item.dataset}"
    results.append(Result(number, item.folder, figure.encoder, what, protocol, probe.notes))
    measured.append(figure)


def _add_evaluation(
    found: Found, folder: Path, item: Evaluation, results: list[Result], measured: list[Measured]
) -> None:
    known = known_dataset(item.dataset, item.classes)
    places = evaluation_metrics(item.kind, item.dataset, item.classes, item.figures)
    if not places or not known:
        return
    number = len(results) + 1
    size = set_size_note(known, item.n_test)
    for name, (metric, value) in places.items():
        what = FIGURE_WORDS[name] if item.kind == "track" else _split_words(item)
        measured.append(
            Measured(
                metric=metric,
                encoder=encoder_name(item.encoder),
                arch=words(item.encoder.get("arch")),
                tasks=encoder_tasks(item.encoder, found.runs),
                percent=100 * value,
                note=", ".join(note for note in (what, size) if note),
                results=(number,),
                split=item.split if item.kind == "finetune" else "",
                alike=_alike(item),
                size=size,
            )
        )
    run = run_of(item.encoder, found.runs)
    # A tracker is evaluated into a subfolder of its run.
    by_folder = {other.folder: other.config for other in found.runs}
    here = by_folder.get(folder) or by_folder.get(folder.parent) or {}
    protocol = [
        *pretraining_protocol(item.encoder, run, "resnet50"),
        *evaluation_protocol(item, known, here),
    ]
    does = "fine-tuned on" if item.kind == "finetune" else "SiamFC on"
    what = f"{does} {item.dataset}" + (f", {_split_words(item)}" if item.split else "")
    results.append(Result(number, folder, encoder_name(item.encoder), what, protocol, item.notes))


def _alike(item: Evaluation) -> str:
    """A key, equal for results that differ in nothing but split and seed."""
    of_split = ("split", "seed", "out", "training", "n_test", "frames")
    settings = {n: words(v) for n, v in item.settings.items() if n not in of_split}
    return repr((words(item.encoder.get("sha256")), sorted(settings.items())))


def _partly(figures: Sequence[Measured]) -> list[str]:
    """What a mean over splits lacks: splits, or videos of them."""
    splits = {figure.split for figure in figures}
    missing = [f"{len(splits)} of {_SPLITS} splits"] if len(splits) < _SPLITS else []
    return missing + list(dict.fromkeys(figure.size for figure in figures if figure.size))


def _split_words(item: Evaluation) -> str:
    return f"split {item.split}" if item.split else ""


def _arch_of_table(metric: str, arch: str) -> str:
    """The backbone of the table for this metric; ResNet-18 is Table 2's."""
    archs = [t.arch for t in TABLES if metric in [column.metric for column in t.columns]]
    return arch if arch in archs else archs[0]


def _means_over_splits(measured: Sequence[Measured]) -> list[Measured]:
    """Means of encoders fine-tuned on several splits of a dataset.

    Only over runs that differ in nothing but split and seed.
    """
    runs: dict[tuple[str, str, str], list[Measured]] = {}
    for figure in measured:
        if figure.split:
            runs.setdefault((figure.metric, figure.encoder, figure.alike), []).append(figure)
    means = []
    for figures in runs.values():
        splits = sorted({figure.split for figure in figures})
        if len(splits) > 1:
            of_split = [
                mean(figure.percent for figure in figures if figure.split == split)
                for split in splits
            ]
            means.append(
                dataclasses.replace(
                    figures[0],
                    percent=mean(of_split),
                    note=", ".join([f"mean of splits {', '.join(splits)}", *_partly(figures)]),
                    results=tuple(number for figure in figures for number in figure.results),
                )
            )
    return means


RANDOM = "random initialisation"
# Settings in which the runs of an ablation may differ.
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
    paper: str  # the paper's value; "" if it has none


@dataclass(frozen=True)
class Ablation:
    """Choices of tasks compared by one metric."""

    dataset: str
    figure: str
    arch: str
    conditions: str  # what all results have in common
    rows: list[AblationRow]
    varying: list[str]  # other settings of pre-training in which the runs differ


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
    metric: str  # the column in Table 1, or ""


def ablations(found: Found) -> list[Ablation]:
    """One ablation per metric that was measured for at least two choices of tasks."""
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
        dataset=kind.dataset or "unknown dataset",
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


@dataclass(frozen=True)
class FeatureRow:
    """A feature folder with its measurements."""

    folder: Path
    encoder: str
    dataset: str
    extraction: str  # in words
    probe: Probe | None
    retrieval: Retrieval | None
    confusion_png: bytes | None


@dataclass(frozen=True)
class EvaluationRow:
    """A fine-tuned classifier or a tracker: its metrics (fractions) and other facts."""

    folder: Path
    encoder: str
    item: Evaluation
    figures: list[tuple[str, float]]
    facts: list[str]


@dataclass(frozen=True)
class TableSection:
    """A table of the paper with our results, and the protocol of each result."""

    table: PaperTable
    rows: list[FilledRow]
    results: list[tuple[Result, list[Compared], list[Compared], list[Compared]]]
    # each with the settings that differ, are not recorded, and are the same


@dataclass(frozen=True)
class RunSection:
    """A run: its progress as (name, text) pairs, and the last logged values."""

    run: Run
    summary: list[tuple[str, str]]
    last: list[tuple[str, float]]
    settings: list[tuple[str, str]]
    joined: str  # how the curves were thinned; "" if not at all
    skipped_lines: int


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page, in order."""

    features: list[FeatureRow]
    evaluations: list[EvaluationRow]
    comparisons: list[tuple[Path, Comparison]]
    tables: list[TableSection]
    ablations: list[Ablation]
    runs: list[RunSection]
    unread: list[Unread]


def report_content(found: Found) -> ReportContent:
    """Build the content of the report from the results found."""
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
        size = [
            ("n_test", "test videos"),
            ("clips", "clips per video"),
            ("crops", "crops per clip"),
        ]
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
    """The run's progress and main settings, as (name, text) pairs."""
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
        markdown: also write the report as Markdown here, without curves and pictures.
        json: also write the report as one JSON object here, without curves and pictures.

    Returns:
        What was found, including the files that could not be read.

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
    """The report as plain values; metrics are fractions unless named percent.

    Those of comparisons are text with intervals; ``compare.json`` has the numbers.
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
    """``value`` without anything that JSON or UTF-8 cannot represent."""
    if isinstance(value, dict):
        return {printable(name): _valid(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_valid(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return printable(value) if isinstance(value, str) else value
