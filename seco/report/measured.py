"""Our figures that correspond to one of the paper's, and how each was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from seco.report.origin import encoder_name, encoder_tasks, run_of
from seco.report.paper_protocol import (
    Compared,
    evaluation_protocol,
    pretraining_protocol,
    probe_protocol,
)
from seco.report.paper_tables import (
    TABLES,
    Measured,
    evaluation_metrics,
    known_dataset,
    probe_metric,
    set_size_note,
)
from seco.report.records import Evaluation, words
from seco.report.sources import Features, Found

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
    """A result with a figure in a table of the paper: its number there and its protocol."""

    number: int
    folder: Path
    encoder: str
    what: str
    protocol: list[Compared]
    notes: tuple[str, ...]


def measure(found: Found) -> tuple[list[Result], list[Measured]]:
    """Everything found that has a place in the paper's tables."""
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
    # A tracker is evaluated into a folder of its run's.
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
    """Equal for figures of one encoder by one training and test, whatever the split and seed."""
    of_split = ("split", "seed", "out", "training", "n_test", "frames")
    settings = {n: words(v) for n, v in item.settings.items() if n not in of_split}
    return repr((words(item.encoder.get("sha256")), sorted(settings.items())))


def _partly(figures: Sequence[Measured]) -> list[str]:
    """What a mean over splits lacks: splits, and videos of these."""
    splits = {figure.split for figure in figures}
    missing = [f"{len(splits)} of {_SPLITS} splits"] if len(splits) < _SPLITS else []
    return missing + list(dict.fromkeys(figure.size for figure in figures if figure.size))


def _split_words(item: Evaluation) -> str:
    return f"split {item.split}" if item.split else ""


def _arch_of_table(metric: str, arch: str) -> str:
    """ResNet-18 is Table 2's backbone, where the metric is one of that table."""
    archs = [t.arch for t in TABLES if metric in [column.metric for column in t.columns]]
    return arch if arch in archs else archs[0]


def _means_over_splits(measured: Sequence[Measured]) -> list[Measured]:
    """The mean of an encoder fine-tuned on several splits of a set, beside the single figures.

    Only of runs that differ in nothing but the split.
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
