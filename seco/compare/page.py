"""The page of ``seco compare``: verdicts, intervals, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from seco.compare.intervals import FEWEST_GROUPS, Interval
from seco.compare.result import RANK, CompareResult, Pair, shown_difference, shown_value
from seco.features.store import encoder_name
from seco.pages.html import INK, SERIES, data_uri, figure_svg, new_chart, render_page, style_axes
from seco.pages.text import percent

_ROW_INCHES = 0.3
_WIDTH_INCHES = 7.0
_MARKERS = "os^Dv"


def render_compare_page(result: CompareResult, maps: bytes | None) -> str:
    """The page as HTML; nothing is loaded from elsewhere, and equal results give equal bytes.

    Args:
        maps: of :func:`seco.compare.maps.draw`.
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
            marker=_MARKERS[number % len(_MARKERS)],
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
