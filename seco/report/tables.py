"""Tables 1–3 of the paper and its protocol, and which of our results compare with which of its.

Numbers are text, exactly as printed. A result takes a place in a table only where dataset and
metric are the paper's; it takes the row of a method only where architecture and tasks are. Every
setting is listed as equal to the paper (or its authors' code), different, or not recorded.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seco.config import (
    PRESETS,
    ExtractConfig,
    FinetuneConfig,
    PretrainConfig,
    TrackerConfig,
    TrackTrainConfig,
)
from seco.report.results import Evaluation, Probe, Run, tasks_of, words

NOT_COMPARABLE = (
    "Results on rendered, synthetic or partial datasets, or after shorter training, are not "
    "comparable with the paper's; only a full dataset under the paper's protocol is."
)
NOT_MEASURED = "not measured"

SECO_INTER = ("inter",)
SECO_INTER_INTRA = ("inter", "intra")
SECO = ("inter", "intra", "order")

# Videos and classes of the datasets (§5.1); a result over fewer videos is of a partial set.
TRAIN_VIDEOS = {"kinetics400": 240_000, "activitynet": 10_024, "ucf101": 9_500, "hmdb51": 3_500}
TEST_VIDEOS = {"kinetics400": 20_000, "activitynet": 4_926, "ucf101": 3_700, "hmdb51": 1_500}
CLASSES = {"kinetics400": 400, "activitynet": 200, "ucf101": 101, "hmdb51": 51}
OTB_SEQUENCES = 100
_LOST_OR_ROUNDED = 0.05


@dataclass(frozen=True)
class Column:
    """A column of a table; ``metric`` is the name of our corresponding metric."""

    heading: str
    metric: str


@dataclass(frozen=True)
class Row:
    """A method and its values, one per column; "-" as in the paper, "" if not in it."""

    method: str
    figures: tuple[str, ...]
    tasks: tuple[str, ...] | None = None  # of the corresponding SeCo run
    extra: bool = False  # not in the paper's table


@dataclass(frozen=True)
class PaperTable:
    """One table; ``arch`` is the backbone of its SeCo rows."""

    number: int
    caption: str
    arch: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A result of ours that corresponds to a column of the paper."""

    metric: str
    encoder: str  # display name
    arch: str
    tasks: tuple[str, ...] | None
    percent: float
    note: str
    results: tuple[int, ...] = ()  # numbers on the page of the underlying results
    split: str = ""  # of fine-tuning
    alike: str = ""  # equal for runs that differ in nothing but split and seed
    size: str = ""  # note on a partial dataset


@dataclass
class FilledRow:
    """A row of the page: the paper's values and ours, column by column."""

    method: str
    figures: tuple[str, ...]
    ours: list[list[Measured]] = field(default_factory=list)
    kind: str = "paper"  # "extra": quoted from elsewhere; "ours": not in the table
    is_seco: bool = False  # a method that this toolkit trains


TABLE_1 = PaperTable(
    1,
    "Performance comparison of the representations pre-trained by different mechanisms in three "
    "downstream tasks under “Pre-trained Representation + Linear Model” protocol.",
    "resnet50",
    (
        Column("Kinetics 400, linear SVM, top-1", "kinetics400-svm"),
        Column("ActivityNet, linear SVM, top-1", "activitynet-svm"),
        Column("OTB-100, 1x1 convolution, precision", "otb100-precision"),
        Column("OTB-100, 1x1 convolution, success", "otb100-success"),
    ),
    (
        Row("MoCo-ImageNet", ("51.30", "66.17", "59.91", "43.06")),
        Row("Supervised ImageNet Pre-training", ("52.34", "67.19", "69.54", "48.01")),
        Row("VINCE [8]", ("36.20", "-", "62.90", "46.50")),
        Row("SeCo-Inter", ("58.97", "66.69", "67.92", "48.03"), SECO_INTER),
        Row("SeCo-Inter+Intra", ("60.74", "68.31", "70.29", "50.48"), SECO_INTER_INTRA),
        Row("SeCo-Inter+Intra+Order", ("61.91", "68.55", "71.86", "51.78"), SECO),
        Row("VINCE, by its own README (ResNet-50)", ("", "", "40.2", "30.0"), extra=True),
        Row("VCLR, which builds on SeCo", ("64.1", "", "", ""), extra=True),
    ),
)

TABLE_2 = PaperTable(
    2,
    "Performance comparisons of unsupervised representation learning on Kinetics400.",
    "resnet18",
    (Column("Top-1 (%)", "kinetics400-svm"),),
    (
        Row("OPN† [19]", ("20.86",)),
        Row("RotNet† [7]", ("23.33",)),
        Row("3DRotNet† [16]", ("19.33",)),
        Row("VIE-Single [42]", ("44.41",)),
        Row("VIE-TRN [42]", ("44.91",)),
        Row("VIE-3DResNet [42]", ("43.40",)),
        Row("VIE-SlowFast [42]", ("47.37",)),
        Row("VIE-Full [42]", ("48.53",)),
        Row("SeCo (ResNet18)", ("50.81",), SECO),
    ),
)

TABLE_3 = PaperTable(
    3,
    "Performance comparisons of pre-training + fine-tuning protocol on UCF101 and HMDB51.",
    "resnet50",
    (
        Column("UCF101, top-1 (%)", "ucf101-finetune"),
        Column("HMDB51, top-1 (%)", "hmdb51-finetune"),
    ),
    (
        Row("Shuffle&Learn [24]", ("50.20", "18.10")),
        Row("OPN [19]", ("59.60", "23.80")),
        Row("ClipOrder [40]", ("72.40", "30.90")),
        Row("3DRotNet [16]", ("66.00", "37.10")),
        Row("DPC [10]", ("75.70", "35.70")),
        Row("CBT [33]", ("79.50", "44.60")),
        Row("VIE-Full [42]", ("80.40", "52.50")),
        Row("Supervised ImageNet Pre-training", ("85.30", "49.08")),
        Row("SeCo", ("88.26", "55.55"), SECO),
    ),
)

TABLES = (TABLE_1, TABLE_2, TABLE_3)

_NAMES = {
    "kinetics400": r"(kinetics|k)[-_ ]?400",
    "activitynet": r"activity[-_ ]?net|anet",
    "ucf101": r"ucf[-_ ]?101",
    "hmdb51": r"hmdb[-_ ]?51",
    "otb100": r"otb[-_ ]?(100|2015)",
}
_VERSION_OR_SPLIT = r"([-_ ]?(v?1[.-]?3|train|val|validation|test))*"


def known_dataset(name: str, classes: int | None = None) -> str | None:
    """The paper's dataset that a name stands for, or None.

    ``kinetics`` alone may be 400, 600 or 700, so the number of classes decides. A dataset with
    another number of classes than the paper's is another task, whatever its name.
    """
    lowered = name.strip().lower()
    unversioned = re.fullmatch("kinetics" + _VERSION_OR_SPLIT, lowered)
    if unversioned and classes == CLASSES["kinetics400"]:
        return "kinetics400"
    for dataset, pattern in _NAMES.items():
        if re.fullmatch(f"({pattern}){_VERSION_OR_SPLIT}", lowered):
            right = classes is None or CLASSES.get(dataset, classes) == classes
            return dataset if right else None
    return None


def is_whole(videos: int, whole: int) -> bool:
    """Whether this is the whole dataset, up to lost videos and the rounding in §5.1."""
    return abs(videos - whole) <= _LOST_OR_ROUNDED * whole


def set_size_note(dataset: str, n_test: int | None) -> str:
    """How much of the official test set a result covers, in words."""
    tracking = dataset == "otb100"
    whole = OTB_SEQUENCES if tracking else TEST_VIDEOS[dataset]
    unit = "sequences" if tracking else "videos"
    if n_test is None:
        return f"number of {unit} unknown"
    if n_test >= whole or (is_whole(n_test, whole) and not tracking):
        return f"{n_test} {unit}"
    return f"partial set: {n_test} of {whole} {unit}"


def fill(table: PaperTable, measured: Sequence[Measured]) -> list[FilledRow]:
    """The table's rows with our results filled in.

    An encoder that is not a method of the table (random weights, other tasks) gets its own row at
    the end. ResNet-18 belongs to Table 2, every other backbone to Table 1.
    """
    metrics = [column.metric for column in table.columns]
    ours = [m for m in measured if m.metric in metrics and _belongs(table, m)]
    rows = [
        FilledRow(
            row.method,
            row.figures,
            kind="extra" if row.extra else "paper",
            is_seco=row.tasks is not None,
        )
        for row in table.rows
    ]
    for filled, row in zip(rows, table.rows, strict=True):
        mine = [m for m in ours if _is_method(table, row, m)]
        filled.ours = [[m for m in mine if m.metric == metric] for metric in metrics]
    unplaced = [m for m in ours if not any(_is_method(table, row, m) for row in table.rows)]
    for encoder in dict.fromkeys(m.encoder for m in unplaced):
        mine = [m for m in unplaced if m.encoder == encoder]
        cells = [[m for m in mine if m.metric == metric] for metric in metrics]
        rows.append(FilledRow(encoder, ("",) * len(metrics), cells, kind="ours"))
    return rows


def _belongs(table: PaperTable, measured: Measured) -> bool:
    if measured.metric != "kinetics400-svm":
        return True
    return (measured.arch == TABLE_2.arch) == (table.number == TABLE_2.number)


def _is_method(table: PaperTable, row: Row, measured: Measured) -> bool:
    return row.tasks is not None and measured.tasks == row.tasks and measured.arch == table.arch


def probe_metric(dataset: str, split: str, method: str, classes: int | None) -> str | None:
    """The column for a probe's top-1; None unless it is a linear SVM on a validation set."""
    known = known_dataset(dataset, classes)
    if known not in ("kinetics400", "activitynet") or method.lower() != "svm":
        return None
    tested_on = split.lower()
    validated = "val" in tested_on or tested_on == "official" or dataset.lower().endswith("val")
    return f"{known}-svm" if validated else None


def evaluation_metrics(
    kind: str, dataset: str, classes: int | None, figures: Mapping[str, float]
) -> dict[str, tuple[str, float]]:
    """(column, fraction) for each metric of fine-tuning or tracking that is in a table."""
    known = known_dataset(dataset, classes)
    places = {}
    if kind == "finetune" and known in ("ucf101", "hmdb51"):
        places = {"top1": f"{known}-finetune"}
    elif kind == "track" and known == "otb100":
        # §5.2 calls both "AUC"; the usual precision is at 20 px. Both are shown.
        places = {
            "precision_20": "otb100-precision",
            "precision_auc": "otb100-precision",
            "success_auc": "otb100-success",
        }
    return {name: (place, figures[name]) for name, place in places.items() if name in figures}


SAME, DIFFERS, UNKNOWN = "same", "differs", "unknown"
NOT_RECORDED = "not recorded"

_PAPER, _AUTHORS = "paper §5.2", "authors' code"
_LONGEST_NAME = 500
_SHARDS = re.compile(r"(-\d{3,}|[-_]?[{<*?\[].*)?\.(tar|json)$")
_EPOCH_CHECKPOINT = re.compile(r"epoch-(\d+)\.pt")


@dataclass(frozen=True)
class Compared:
    """A setting: the paper's value, ours as recorded, and whether they agree."""

    stage: str
    what: str
    paper: str
    source: str  # where the paper's value is from
    here: str
    state: str  # SAME, DIFFERS or UNKNOWN

    @property
    def whose(self) -> str:
        """The source of the reference value, such as ``paper``."""
        return re.split(r" §| Eq|[:;]", self.source)[0] or "paper"


@dataclass(frozen=True)
class Reference:
    """A setting's value in the paper; ``names`` are the keys it is recorded under."""

    what: str
    names: tuple[str, ...]
    value: str | float
    source: str = _PAPER
    unrecorded: str | None = None  # what a run did that does not record the setting


def _references(
    config: type, *, apart: Sequence[str] = (), **other: tuple[str | float, str]
) -> tuple[Reference, ...]:
    """References for all settings with a stated source, with their defaults.

    Args:
        config: a settings dataclass.
        apart: settings that are compared in another way, or not at all.
        other: (value, source) where the paper's value is not the default.
    """
    found = []
    for one in dataclasses.fields(config):
        default: Any = one.default
        value, source = other.get(one.name, (default, one.metadata.get("source")))
        if source and one.name not in apart:
            names = (one.name, *_FORMER_NAMES.get(one.name, ()))
            value = str(value) if isinstance(value, bool) else value
            what, unrecorded = one.name.replace("_", " "), _UNRECORDED.get(one.name)
            found.append(Reference(what, names, value, source, unrecorded))
    return tuple(found)


_FORMER_NAMES = {"test_size": ("size",)}
_UNRECORDED = {
    "negatives": "all",
    "max_gap_seconds": "any",
    "optimizer": "auto",
    "decay_weights_only": "False",
}
_OF_PAPER = PRESETS["paper"]
PRETRAINING = _references(
    PretrainConfig,
    apart=("tasks", "arch", "epochs"),
    lr=(0.2, _PAPER),
    weight_decay=(1e-4, _AUTHORS),
    final_lr=(_OF_PAPER["final_lr"], "paper §5.2, “annealed down to zero”"),
    warmup_epochs=(_OF_PAPER["warmup_epochs"], "paper §5.2, which names none"),
    heads=(_OF_PAPER["heads"], _PAPER),
    intra=(_OF_PAPER["intra"], "paper Eq. 3"),
    sampling=(_OF_PAPER["sampling"], "paper §4.1"),
    bn_group=(128, "authors' code: 4 ranks of 128"),
    queue_init=(_OF_PAPER["queue_init"], "MoCo; the paper is silent"),
    mask_same_video=(False, "paper Eq. 2, which masks none"),
    negatives=("all", "paper Eq. 2, which masks none"),
    max_gap_seconds=("any", "paper §4.1"),
)
FEATURES = _references(ExtractConfig, apart=("frames",))
PROBE = (
    Reference("C", ("C",), 1, _AUTHORS),
    Reference("tolerance", ("tolerance",), 0.01, "authors' code: LIBLINEAR's default"),
    Reference("normalise", ("normalise",), "none", _AUTHORS),
)
FINETUNING = _references(
    FinetuneConfig,
    lr_decay_epochs=("50,100", _AUTHORS),
    freeze_bn=("all-but-first", _AUTHORS),
    bn_group=(16, _AUTHORS),
    test_size=(256, _AUTHORS),
)
TRACKING = (
    *_references(
        TrackTrainConfig,
        apart=("channels", "convolutions"),
        feature_layer=("layer4", "paper §5.2: on top of res5"),
        raw_features=(True, "paper §5.2 names nothing else"),
    ),
    *_references(TrackerConfig, apart=("upsampling",)),
)


def pretraining_protocol(
    encoder: Mapping[str, Any], run: Run | None, arch: str
) -> Iterator[Compared]:
    """Compare an encoder's pre-training with the paper's, if its run is in the report.

    Args:
        encoder: the encoder as recorded in a result.
        run: the run that trained it.
        arch: backbone of the table's SeCo rows.
    """
    stage = "pre-training"
    yield _compared(stage, Reference("backbone", ("arch",), arch), encoder)
    checkpoint = words(encoder.get("checkpoint"))
    if checkpoint == "random":
        yield Compared(stage, "training", "400 epochs", _PAPER, "none: random weights", DIFFERS)
        return
    if run is None:
        here = f"the run of {checkpoint or 'its checkpoint'} is not in the report"
        yield Compared(stage, "training", "400 epochs, batch 512", _PAPER, here, UNKNOWN)
        return
    if tasks_of(run.config) is None:
        here = f"{run.folder}, which is not a pre-training run"
        yield Compared(stage, "training", "400 epochs, batch 512", _PAPER, here, DIFFERS)
        return
    yield from _pretraining_data(stage, run)
    yield _epochs(stage, run, checkpoint)
    init = run.config.get("init")
    here = f"{words(init)}, by its name" if init else "random weights"
    state = UNKNOWN if init else DIFFERS
    yield Compared(stage, "start from", "MoCo on ImageNet", _PAPER, here, state)
    for reference in PRETRAINING:
        yield _compared(stage, reference, run.config)


def probe_protocol(probe: Probe, meta: Mapping[str, Any], dataset: str) -> Iterator[Compared]:
    """Compare features and classifier of a probe with the paper's."""
    stage = "features"
    frames = 50 if dataset == "activitynet" else 30
    yield _compared(stage, Reference("frames per video", ("frames",), frames), meta)
    for reference in FEATURES:
        yield _compared(stage, reference, meta)
    unreadable = meta.get("unreadable")
    if unreadable:
        yield Compared(
            stage, "videos left out", "–", "", f"{words(unreadable)} unreadable", DIFFERS
        )
    stage = "linear SVM"
    yield _videos(stage, "training videos", TRAIN_VIDEOS[dataset], probe.n_train)
    yield _videos(stage, "test videos", TEST_VIDEOS[dataset], probe.n_test)
    tolerance = "exact" if probe.tolerance is None else probe.tolerance
    recorded = {"C": probe.c, "tolerance": tolerance, "normalise": probe.normalise or None}
    for reference in PROBE:
        yield _compared(stage, reference, recorded)


def evaluation_protocol(
    item: Evaluation, dataset: str, settings: Mapping[str, Any]
) -> Iterator[Compared]:
    """Compare training and test of a fine-tuned classifier or a tracker with the paper's.

    Args:
        settings: settings of the run in the same folder; those of the result take precedence.
    """
    recorded = {**settings, **item.settings}
    references: tuple[Reference, ...]
    if item.kind == "finetune":
        stage = "fine-tuning"
        yield _videos(stage, "training videos", TRAIN_VIDEOS[dataset], item.n_train)
        yield _videos(stage, "test videos", TEST_VIDEOS[dataset], item.n_test)
        split = item.split or NOT_RECORDED
        yield Compared(stage, "split", "not stated", "paper §5.1, §5.4", split, UNKNOWN)
        references = FINETUNING
    else:
        stage = "tracking"
        sequences = "of 100" if item.n_test is not None else ""
        here = f"{words(item.n_test)} {sequences}".strip() or NOT_RECORDED
        whole = UNKNOWN if item.n_test is None else SAME if item.n_test == 100 else DIFFERS
        yield Compared(stage, "sequences", "100", "paper §5.1", here, whole)
        yield _tracking_data(stage, item.settings.get("train_shards"))
        if "epochs_planned" not in item.settings:
            recorded.pop("epochs", None)  # older files record planned epochs only
        references = TRACKING
    for reference in references:
        yield _compared(stage, reference, recorded)


def in_state(protocol: Sequence[Compared], state: str) -> list[Compared]:
    """The settings in the given state."""
    return [setting for setting in protocol if setting.state == state]


def _pretraining_data(stage: str, run: Run) -> Iterator[Compared]:
    shards = run.config.get("shards")
    names = _set_names(shards)
    trained = bool(names) and all(
        known_dataset(name) == "kinetics400" and "val" not in name for name in names
    )
    state = SAME if trained else DIFFERS if names else UNKNOWN
    here = ", ".join(names) or NOT_RECORDED
    if run.config.get("split") is not None:
        here += f", training videos of split {words(run.config['split'])}"
    yield Compared(stage, "data", "training set of Kinetics-400", _PAPER, here, state)
    videos = _videos_an_epoch(run)
    if videos is not None:
        whole = TRAIN_VIDEOS["kinetics400"]
        state = SAME if is_whole(videos, whole) else DIFFERS
        here = f"about {videos:,}, by its steps"
        yield Compared(stage, "videos", f"{whole:,}", "paper §5.1", here, state)


def _tracking_data(stage: str, shards: Any) -> Compared:
    names = _set_names(shards)
    whole = all(name.lower() in ("got10k", "got10k-train") for name in names)
    state = UNKNOWN if not names else SAME if whole else DIFFERS
    here = ", ".join(names) or NOT_RECORDED
    return Compared(stage, "training set", "GOT-10k", _PAPER, here, state)


def _set_names(shards: Any) -> list[str]:
    """Dataset names in a recorded ``shards``, of any type."""
    specs = [shards] if isinstance(shards, str) else shards if isinstance(shards, list) else []
    return [_set_name(words(spec)) for spec in specs]


def _set_name(spec: str) -> str:
    """``k400`` from ``shards/k400.json`` or ``shards/k400-{000..999}.tar``."""
    return _SHARDS.sub("", Path(spec[-_LONGEST_NAME:]).name) or spec


def _videos_an_epoch(run: Run) -> int | None:
    """Videos per epoch by steps and batch size, once a run is in its last epoch; else None."""
    epoch, batch = run.log.curves.get("epoch"), run.config.get("batch_size")
    if epoch is None or not isinstance(batch, int) or not math.isfinite(epoch.last):
        return None
    epochs = int(epoch.last) + 1
    if epochs != run.config.get("epochs"):
        return None
    return round(run.log.last_step / epochs) * batch


def _epochs(stage: str, run: Run, checkpoint: str) -> Compared:
    planned = run.config.get("epochs")
    kept = _EPOCH_CHECKPOINT.fullmatch(Path(checkpoint).name)
    logged = run.log.curves.get("epoch")
    reached = logged.last + 1 if logged is not None and math.isfinite(logged.last) else None
    if kept:
        done: float | None = int(kept[1])
        here = f"{done:g} of {words(planned) or 'unknown'} planned"
    elif reached is not None and planned is not None and reached != planned:
        done, here = reached, f"its log ends in epoch {reached:g} of {words(planned)}"
    else:
        done = planned if isinstance(planned, int) else None
        here = words(planned) or NOT_RECORDED
    state = UNKNOWN if done is None else SAME if done == 400 else DIFFERS
    return Compared(stage, "epochs", "400", _PAPER, here, state)


def _videos(stage: str, what: str, whole: int, here: int | None) -> Compared:
    if here is None:
        return Compared(stage, what, f"{whole:,}", "paper §5.1", NOT_RECORDED, UNKNOWN)
    state = SAME if is_whole(here, whole) else DIFFERS
    return Compared(stage, what, f"{whole:,}", "paper §5.1", f"{here:,}", state)


def _compared(stage: str, reference: Reference, recorded: Mapping[str, Any]) -> Compared:
    found = [recorded[name] for name in reference.names if recorded.get(name) is not None]
    here = found[0] if found else reference.unrecorded
    paper = words(reference.value)
    if here is None or words(here) == "":
        return Compared(stage, reference.what, paper, reference.source, NOT_RECORDED, UNKNOWN)
    state = SAME if _equal(here, reference.value) else DIFFERS
    return Compared(stage, reference.what, paper, reference.source, words(here), state)


def _equal(here: Any, paper: str | float) -> bool:
    if isinstance(paper, str):
        return words(here) == paper
    number = isinstance(here, (int, float)) and not isinstance(here, bool)
    return number and math.isclose(here, paper, rel_tol=1e-6, abs_tol=1e-12)
