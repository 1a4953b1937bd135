"""The page of ``seco compare``: verdicts, intervals, and what they mean."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from seco.compare.intervals import FEWEST_GROUPS, Interval
from seco.compare.result import RANK, CompareResult, Pair, shown_difference, shown_value
from seco.features.store import encoder_name
from seco.pages.html import INK, SERIES, data_uri, figure_svg, new_chart, render_page, style_axes
from seco.pages.text import percent, printable

FEWEST_VIDEOS = 12  # no neighbourhoods to speak of among fewer
_MOST_VIDEOS = 2000  # a map of more takes minutes and shows no more
_PERPLEXITY = 30.0  # van der Maaten and Hinton 2008: 5 to 50
_COLOURS = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
_MARKERS = "os^Dvp<P>X"
_OTHER = "#b8bec4"
_INCHES = 3.2


def shown_rows(rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The rows themselves, or a drawn part of them that a map can show."""
    if len(rows) <= _MOST_VIDEOS:
        return rows
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))[:_MOST_VIDEOS]
    return rows[np.sort(drawn)]


def place(features: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Places in the plane for features (M, D): (M, 2), by t-SNE of their directions.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    directions = features / np.maximum(lengths, np.finfo(np.float64).tiny)
    perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
    # Of features that do not vary there are no principal components to start from.
    varied = features.shape[1] > 1 and directions.std(axis=0).max() > 1e-6
    init = "pca" if varied else "random"
    tsne = TSNE(perplexity=perplexity, init=init, random_state=seed, n_jobs=1)
    with threadpool_limits(1):  # so few videos are slower on several, on a busy machine by far
        places: NDArray[np.float32] = tsne.fit_transform(directions.astype(np.float32))
    return places


def draw(maps: Mapping[str, NDArray[np.float32]], classes: Sequence[str]) -> bytes:
    """The maps side by side as a PNG.

    Args:
        maps: by encoder, (M, 2) places of the same videos.
        classes: (M,) their class names, "" for none; those of most videos get a colour.
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
    """Without matplotlib's markup."""
    return printable(name)[:24].replace("$", r"\$")


_ROW_INCHES = 0.3
_WIDTH_INCHES = 7.0
_SERIES_MARKERS = "os^Dv"


def render_compare_page(result: CompareResult, maps: bytes | None) -> str:
    """The page as HTML; nothing is loaded from elsewhere, and equal results give equal bytes.

    Args:
        maps: of :func:`seco.compare.page.draw`.
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
    """A row for each name, a dot with whiskers for each series; values as percent."""
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
    """Encoder, percentage, and for each scaling its C, its accuracy, and whether it decides."""
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
