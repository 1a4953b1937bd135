"""Tables 1–3 of the paper, and which of our figures may stand beside which of theirs.

Figures are text, exactly as printed. A figure of ours takes a place in a table only where data
set and metric are the paper's; it takes the row of a method only where arch and tasks are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NOT_COMPARABLE = (
    "Figures measured on rendered, made-up or partial sets are not comparable with the paper's, "
    "nor are those of shorter training; only a full set under the paper's protocol is."
)
NOT_MEASURED = "not measured"

SECO_INTER = ("inter",)
SECO_INTER_INTRA = ("inter", "intra")
SECO = ("inter", "intra", "order")

# Videos and classes of the sets (§5.1); a figure over fewer videos is of a partial set.
TRAIN_VIDEOS = {"kinetics400": 240_000, "activitynet": 10_024, "ucf101": 9_500, "hmdb51": 3_500}
TEST_VIDEOS = {"kinetics400": 20_000, "activitynet": 4_926, "ucf101": 3_700, "hmdb51": 1_500}
CLASSES = {"kinetics400": 400, "activitynet": 200, "ucf101": 101, "hmdb51": 51}
OTB_SEQUENCES = 100
_LOST_OR_ROUNDED = 0.05


@dataclass(frozen=True)
class Column:
    """A column of figures; ``metric`` is what of ours corresponds to it."""

    heading: str
    metric: str


@dataclass(frozen=True)
class Row:
    """A method and its figures, one a column; "-" as the paper prints it, "" outside it."""

    method: str
    figures: tuple[str, ...]
    tasks: tuple[str, ...] | None = None  # of the SeCo run that corresponds
    extra: bool = False  # not in the paper's table


@dataclass(frozen=True)
class PaperTable:
    """One table; ``arch`` is the backbone that its SeCo rows have."""

    number: int
    caption: str
    arch: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A figure of ours that corresponds to a column of the paper."""

    metric: str
    encoder: str  # its name for people
    arch: str
    tasks: tuple[str, ...] | None
    percent: float
    note: str
    results: tuple[int, ...] = ()  # the numbers of what it is a figure of, on the page
    split: str = ""  # of fine-tuning
    alike: str = ""  # equal for runs that differ in nothing but the split
    size: str = ""  # what a set lacks


@dataclass
class FilledRow:
    """A row of the page: the paper's figures and ours, column by column."""

    method: str
    figures: tuple[str, ...]
    ours: list[list[Measured]] = field(default_factory=list)
    kind: str = "paper"  # "extra": quoted from elsewhere; "ours": a method of no row
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
    """The data set of the paper that a set's name stands for, or None.

    ``kinetics`` alone may be 400, 600 or 700: the number of classes decides. A set with another
    number of classes than the paper's is another task, whatever its name.
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
    """Whether so many are the whole set: some videos are always lost, and §5.1 rounds."""
    return abs(videos - whole) <= _LOST_OR_ROUNDED * whole


def set_size_note(dataset: str, n_test: int | None) -> str:
    """How much of the official test set a figure is over, in words."""
    tracking = dataset == "otb100"
    whole = OTB_SEQUENCES if tracking else TEST_VIDEOS[dataset]
    unit = "sequences" if tracking else "videos"
    if n_test is None:
        return f"number of {unit} unknown"
    if n_test >= whole or (is_whole(n_test, whole) and not tracking):
        return f"{n_test} {unit}"
    return f"partial set: {n_test} of {whole} {unit}"


def fill(table: PaperTable, measured: Sequence[Measured]) -> list[FilledRow]:
    """The table's rows with our figures in their places.

    A figure of an encoder that is no method of the table (random weights, other tasks) gets a row
    of its own at the end. ResNet-18 belongs to Table 2, every other backbone to Table 1.
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
    """The column that a probe's top-1 corresponds to: linear SVM on a validation set, else None."""
    known = known_dataset(dataset, classes)
    if known not in ("kinetics400", "activitynet") or method.lower() != "svm":
        return None
    tested_on = split.lower()
    validated = "val" in tested_on or tested_on == "official" or dataset.lower().endswith("val")
    return f"{known}-svm" if validated else None


def evaluation_metrics(
    kind: str, dataset: str, classes: int | None, figures: Mapping[str, float]
) -> dict[str, tuple[str, float]]:
    """For each figure of a fine-tuning or tracking run that corresponds: (column, fraction)."""
    known = known_dataset(dataset, classes)
    places = {}
    if kind == "finetune" and known in ("ucf101", "hmdb51"):
        places = {"top1": f"{known}-finetune"}
    elif kind == "track" and known == "otb100":
        # §5.2 calls both "AUC"; the usual precision is the one at 20 px. Both are shown.
        places = {
            "precision_20": "otb100-precision",
            "precision_auc": "otb100-precision",
            "success_auc": "otb100-success",
        }
    return {name: (place, figures[name]) for name, place in places.items() if name in figures}
