"""The result of ``seco compare``: values, differences and verdicts as JSON, a table and a page."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from seco.evaluation.intervals import BETTER, FEWEST_GROUPS, HOLDS_ZERO, UNDECIDED, WORSE, Interval
from seco.features.store import encoder_name
from seco.pages import INK, SERIES, data_uri, figure_svg, new_chart, render_page, style_axes
from seco.text import percent
from shards.terminal import printable

_FORMAT_VERSION = 1
RANK = "effective_rank"


@dataclass(frozen=True)
class Measure:
    """One measure of all encoders.

    Args:
        key: for programs, such as ``svm@10``.
        title: for people, such as ``SVM, 10 % of labels``.
        values: by encoder; fractions, except for the effective rank.
        videos: number of videos averaged over, in ``groups`` groups.
        labelled: number of labelled training videos; None for a measure without labels.
        draws: by encoder, the value for each draw of labelled videos.
        chance: the chance level, if known.
    """

    key: str
    title: str
    values: dict[str, Interval]
    videos: int
    groups: int
    labelled: int | None = None
    draws: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    chance: float | None = None


@dataclass(frozen=True)
class Difference:
    """An encoder's value minus the baseline's; ``interval`` is None if not comparable."""

    key: str
    interval: Interval | None
    verdict: str
    reason: str


@dataclass(frozen=True)
class Pair:
    """An encoder compared with the baseline, measure by measure."""

    encoder: str
    baseline: str
    differences: list[Difference]


@dataclass(frozen=True)
class CompareResult:
    """Everything ``seco compare`` reports.

    Args:
        encoders: by name, provenance and the scaling and C chosen for the SVM.
        groups: what was resampled, in words.
        svm: by encoder and percentage of labels, the accuracy with each scaling.
    """

    dataset: str
    train_split: str
    test_split: str
    settings: dict[str, Any]
    encoders: dict[str, dict[str, Any]]
    groups: str
    measures: list[Measure]
    pairs: list[Pair]
    svm: dict[str, dict[str, dict[str, Interval]]]
    notes: list[str]

    def sentence(self, pair: Pair) -> str:
        """Summarise the verdicts of a pair."""
        keys = {
            verdict: [d.key for d in pair.differences if d.verdict == verdict]
            for verdict in (BETTER, WORSE, UNDECIDED)
        }
        said = (
            f"{pair.encoder} is better than {pair.baseline} at {len(keys[BETTER])} of "
            f"{len(pair.differences)} measures"
        )
        for verdict in (WORSE, UNDECIDED):
            if len(keys[verdict]) == len(pair.differences):
                said += f"; {verdict}: all"
            elif keys[verdict]:
                said += f"; {verdict}: {self._named(keys[verdict])}"
        return f"{said}."

    def _named(self, keys: Sequence[str]) -> str:
        """Measure titles, grouped by kind: ``kNN with 1 and 10 %``."""
        by_title: dict[str, list[str]] = {}
        for measure in self.measures:
            if measure.key in keys:
                _, _, percent_of_labels = measure.key.partition("@")
                title = measure.title.partition(",")[0]
                by_title.setdefault(title, []).append(percent_of_labels)
        return ", ".join(
            f"{title} with {' and '.join(shares)} %" if any(shares) else title
            for title, shares in by_title.items()
        )

    def sentences(self) -> list[str]:
        """One sentence per pair."""
        if not self.pairs:
            return ["Only one encoder was given; add another, such as random, to compare it with."]
        return [self.sentence(pair) for pair in self.pairs]

    def to_json(self) -> dict[str, Any]:
        """The content of ``compare.json``."""
        return {
            "format_version": _FORMAT_VERSION,
            "dataset": self.dataset,
            "train_split": self.train_split,
            "test_split": self.test_split,
            "groups": self.groups,
            "settings": self.settings,
            "encoders": self.encoders,
            "measures": [dataclasses.asdict(measure) for measure in self.measures],
            "svm_by_scaling": {
                name: {p: {s: vars(i) for s, i in found.items()} for p, found in by_percent.items()}
                for name, by_percent in self.svm.items()
            },
            "comparisons": [
                {**dataclasses.asdict(pair), "sentence": self.sentence(pair)} for pair in self.pairs
            ],
            "notes": self.notes,
        }

    def table(self) -> str:
        """Lines for a terminal: a table and a summary per pair."""
        blocks = []
        for pair in self.pairs:
            rows: list[Sequence[str]] = [("", pair.encoder, pair.baseline, "difference", "verdict")]
            for measure, difference in zip(self.measures, pair.differences, strict=True):
                both = measure.values[pair.encoder], measure.values[pair.baseline]
                values = (shown_value(measure, value) for value in both)
                shown = shown_difference(measure, difference)
                rows.append((measure.title, *values, shown, difference.verdict))
            blocks.append(_aligned(rows))
            reasons = {d.reason for d in pair.differences} - {"", HOLDS_ZERO}
            blocks += [f"{UNDECIDED}: {reason}" for reason in sorted(reasons)]
        if not self.pairs:
            (name,) = self.encoders
            alone = [(m.title, shown_value(m, m.values[name])) for m in self.measures]
            blocks.append(_aligned([("", name), *alone]))
        lines = [
            f"{printable(self.dataset)}: trained on {self.train_split}, tested on "
            f"{self.test_split}; 95 % intervals over {self.groups}",
            *(f"note: {printable(note)}" for note in self.notes),
            *blocks,
            *(printable(sentence) for sentence in self.sentences()),
        ]
        return "\n".join(lines)


def shown_value(measure: Measure, value: Interval) -> str:
    """Format as ``54.2 (44.1 to 64.0)``; in percent, except for the effective rank."""
    if value.low is None or value.high is None:
        return _number(measure, value.value)
    low, high = (_number(measure, end) for end in (value.low, value.high))
    return f"{_number(measure, value.value)} ({low} to {high})"


def shown_difference(measure: Measure, difference: Difference) -> str:
    """Format as ``+5.2 (-1.0 to +11.4)``; in points, except for the effective rank."""
    interval = difference.interval
    if interval is None:
        return "–"
    ends = [e for e in (interval.low, interval.high) if e is not None]
    value, *shown = (_signed(measure, number) for number in (interval.value, *ends))
    return f"{value} ({' to '.join(shown)})" if shown else value


def _signed(measure: Measure, number: float) -> str:
    text = _number(measure, number)
    return text if text.startswith("-") else f"+{text}"


def _number(measure: Measure, number: float) -> str:
    text = f"{number:.1f}" if measure.key == RANK else percent(number)
    return text.replace("-0.0", "0.0") if text == "-0.0" else text


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            f"{printable(cell):<{width}}" for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )


FEWEST_VIDEOS = 12  # fewer have no meaningful neighbourhoods
_MOST_VIDEOS = 2000  # more take minutes and show nothing new
_PERPLEXITY = 30.0  # van der Maaten and Hinton 2008 suggest 5 to 50
_COLOURS = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
_MARKERS = "os^Dvp<P>X"
_OTHER = "#b8bec4"
_INCHES = 3.2


def shown_rows(rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The rows, or a random subset small enough for a map."""
    if len(rows) <= _MOST_VIDEOS:
        return rows
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))[:_MOST_VIDEOS]
    return rows[np.sort(drawn)]


def place(features: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """(M, 2) positions in the plane of (M, D) features, by t-SNE of their directions.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    directions = features / np.maximum(lengths, np.finfo(np.float64).tiny)
    perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
    # Constant features have no principal components to start from.
    varied = features.shape[1] > 1 and directions.std(axis=0).max() > 1e-6
    init = "pca" if varied else "random"
    tsne = TSNE(perplexity=perplexity, init=init, random_state=seed, n_jobs=1)
    with threadpool_limits(1):  # more threads are slower on so few videos, by far on a busy machine
        places: NDArray[np.float32] = tsne.fit_transform(directions.astype(np.float32))
    return places


def draw(maps: Mapping[str, NDArray[np.float32]], classes: Sequence[str]) -> bytes:
    """Draw the maps side by side as a PNG.

    Args:
        maps: by encoder, (M, 2) positions of the same videos.
        classes: (M,) their class names, "" for none; the largest classes get a colour.
    """
    named = Counter(name for name in classes if name)
    coloured = sorted(name for name, _ in named.most_common(len(_COLOURS)))
    figure = Figure(figsize=(_INCHES * len(maps), _INCHES + 0.7), layout="constrained", dpi=150)
    axes_of = figure.subplots(1, len(maps), squeeze=False)[0]
    of_class = np.array(classes)
    handles = []
    for axes, (encoder, places) in zip(axes_of, maps.items(), strict=True):
        others = ~np.isin(of_class, coloured)
        style = {"s": 13, "linewidths": 0}
        if others.any():
            axes.scatter(*places[others].T, color=_OTHER, marker=".", **style)
        handles = [
            axes.scatter(*places[of_class == name].T, color=colour, marker=marker, **style)
            for name, colour, marker in zip(coloured, _COLOURS, _MARKERS, strict=False)
        ]
        axes.set_title(_text(encoder), fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#d9dee3")
    figure.legend(
        handles, [_text(name) for name in coloured], loc="outside lower center",
        ncols=min(4, max(1, len(coloured))), frameon=False, fontsize=8, handletextpad=0.1,
    )  # fmt: skip
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    return drawn.getvalue()


def _text(name: str) -> str:
    """Escape matplotlib's markup."""
    return printable(name)[:24].replace("$", r"\$")


_ROW_INCHES = 0.3
_WIDTH_INCHES = 7.0
_SERIES_MARKERS = "os^Dv"


def render_compare_page(result: CompareResult, maps: bytes | None) -> str:
    """The page as self-contained HTML; equal results give equal bytes.

    Args:
        maps: the PNG of :func:`seco.evaluation.comparison.draw`.
    """
    return render_page(
        "compare.html.j2",
        result=result,
        pairs=[_pair(result, pair) for pair in result.pairs],
        values_chart=_values_chart(result),
        maps=None if maps is None else data_uri(maps, "image/png"),
        encoders=[(name, encoder_name(facts), facts) for name, facts in result.encoders.items()],
        fewest=FEWEST_GROUPS,
        value=shown_value,
        svm=_svm_rows(result),
    )


def _pair(result: CompareResult, pair: Pair) -> dict[str, Any]:
    rows = [
        (measure, found, shown_difference(measure, found))
        for measure, found in zip(result.measures, pair.differences, strict=True)
    ]
    names = [m.title for m, found, _ in rows if found.interval and m.key != RANK]
    intervals = [f.interval for m, f, _ in rows if f.interval and m.key != RANK]
    label = f"Differences of {pair.encoder} from {pair.baseline} with 95 % intervals, in points"
    chart = _interval_chart(
        names, {"": intervals}, f"{pair.encoder} minus {pair.baseline}, points", label, zero=True
    )
    return {"pair": pair, "rows": rows, "sentence": result.sentence(pair), "chart": chart}


def _values_chart(result: CompareResult) -> Markup:
    shown = [measure for measure in result.measures if measure.key != RANK]
    by_encoder = {name: [m.values[name] for m in shown] for name in result.encoders}
    label = "Values of all encoders with 95 % intervals, in percent"
    return _interval_chart([m.title for m in shown], by_encoder, "percent", label)


def _interval_chart(
    names: Sequence[str],
    series: dict[str, list[Interval]],
    unit: str,
    label: str,
    zero: bool = False,
) -> Markup:
    """Chart with a row per name and a dot with whiskers per series; values in percent."""
    figure = new_chart(0.9 + _ROW_INCHES * len(names) * (1 if zero else 1.4), _WIDTH_INCHES)
    axes = figure.add_subplot()
    height = 0.6 / len(series)
    for number, (name, intervals) in enumerate(series.items()):
        colour = SERIES[number % len(SERIES)]
        offset = height * (number - (len(series) - 1) / 2)
        places = [row + offset for row in range(len(intervals))]
        for place, one in zip(places, intervals, strict=True):
            if one.low is not None and one.high is not None:
                axes.plot(
                    [100 * one.low, 100 * one.high], [place, place], color=colour, linewidth=1.6
                )
        axes.plot(
            [100 * one.value for one in intervals],
            places,
            color=colour,
            linestyle="",
            marker=_SERIES_MARKERS[number % len(_SERIES_MARKERS)],
            markersize=5,
            label=name.replace("$", r"\$"),
        )
    if zero:
        axes.axvline(0, color=INK, linewidth=1, linestyle=":")
    else:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(unit.replace("$", r"\$"), color=INK, fontsize=9)
    style_axes(axes)
    return figure_svg(figure, label, label)


def _svm_rows(result: CompareResult) -> list[tuple[str, str, list[tuple[str, float, str, bool]]]]:
    """Encoder, percentage, and per scaling its C, its accuracy, and whether it was chosen."""
    rows = []
    for name, by_percent in result.svm.items():
        choice = result.encoders[name]["svm"]
        for share, found in by_percent.items():
            cells = [
                (how, choice["c"][how], percent(interval.value), how == choice["scaling"])
                for how, interval in found.items()
            ]
            rows.append((name, share, cells))
    return rows
