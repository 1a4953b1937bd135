"""The curves of a training run as inline SVG charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from seco.pages import INK, SERIES, figure_svg, new_chart

MAX_POINTS = 1000
# The trainer logs the spread in units of what unit vectors that point everywhere alike have.
_EVEN = (("evenly spread", 1.0),)

Curve = NDArray[np.float64]


@dataclass(frozen=True)
class Chart:
    """A drawn chart and what is said below it."""

    title: str
    svg: Markup
    note: str


@dataclass(frozen=True)
class _Plan:
    title: str
    curves: tuple[tuple[str, str], ...]  # (key of metrics.jsonl, name in the legend)
    levels: tuple[tuple[str, float], ...] = ()  # (what it is, height): a dotted line each
    limits: tuple[float | None, float | None] = (None, None)


def chance_levels(config: Mapping[str, Any]) -> dict[str, float]:
    """The value of each loss and accuracy for an encoder that knows nothing.

    ln(1 + K) for inter (Eq. 2), ln 3 for the three-way intra loss (Eq. 3) or ln 2 for the pairwise
    one of the authors' code, ln 2 for order (Eq. 4). What the settings do not tell is left out.
    """
    levels = {"loss_order": math.log(2), "acc_order": 1 / 2}
    queue = config.get("queue_size")
    if isinstance(queue, int) and not isinstance(queue, bool) and queue > 0:
        levels["loss_inter"] = math.log(1 + queue)
        levels["acc_inter"] = 1 / (1 + queue)
    ways = {"three-way": 3, "pairwise": 2}.get(str(config.get("intra")))
    if ways:
        levels["loss_intra"] = math.log(ways)
        levels["acc_intra"] = 1 / ways
    return levels


def tasks_of(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The proxy tasks of a run in the order of Eq. 5; None when its settings do not say."""
    named = config.get("tasks")
    if isinstance(named, str):
        named = named.split(",")
    if not isinstance(named, (list, tuple)):
        return None
    wanted = {str(task).strip() for task in named}
    return tuple(task for task in ("inter", "intra", "order") if task in wanted) or None


def downsample(steps: Curve, values: Curve, max_points: int = MAX_POINTS) -> tuple[Curve, Curve]:
    """Means over equal bins of consecutive points, at most ``max_points`` of them.

    A bin with a value that is not finite becomes nan, a gap in the chart: a mean over the rest
    would hide it.

    Args:
        steps: (S,) in increasing order.
        values: (S,)
    """
    finite = np.where(np.isfinite(values), values, np.nan)
    if len(steps) <= max_points:
        return steps, finite
    starts = np.linspace(0, len(steps), max_points, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(finite, starts) / sizes


def draw_charts(metrics: Mapping[str, Curve], config: Mapping[str, Any], salt: str) -> list[Chart]:
    """Every chart that the run has figures for, in the order of the page.

    Args:
        metrics: the columns of ``metrics.jsonl``, (S,) each, nan where a line lacks the key and
            infinity where its value is not finite.
        config: the run's settings; the chance levels follow from them.
        salt: sets this run's charts apart from the others on the page.
    """
    steps = metrics["step"]
    drawn = []
    for number, plan in enumerate(_plans(config)):
        curves = [
            (name, metrics[key])
            for key, name in plan.curves
            if key in metrics and not np.isnan(metrics[key]).all()
        ]
        if curves:
            drawn.append(_draw(plan, steps, curves, f"{salt}/{number}"))
    return drawn


def _plans(config: Mapping[str, Any]) -> list[_Plan]:
    chance = chance_levels(config)
    tasks = tasks_of(config) or ("inter", "intra", "order")
    ln_intra = "ln 2" if config.get("intra") == "pairwise" else "ln 3"
    words = {"loss_inter": "ln(1+K)", "loss_intra": ln_intra, "loss_order": "ln 2"}
    plans = [_Plan("Loss, all parts", (("loss", "loss"),))]
    for task in tasks:
        key = f"loss_{task}"
        level = chance.get(key)
        levels = () if level is None else ((f"chance, {words[key]} = {level:.2f}", level),)
        plans.append(_Plan(f"Loss, {task}", ((key, "loss"),), levels))
    contrast = tuple((f"acc_{task}", task) for task in ("inter", "intra") if task in tasks)
    plans += [
        _Plan(
            "Contrast accuracy",
            contrast,
            tuple((f"chance, {name}", chance[key]) for key, name in contrast if key in chance),
            (0, 1),
        ),
        _Plan("Learning rate", (("lr", "lr"),), limits=(0, None)),
        _Plan("Queue fill", (("queue_fill", "queue fill"),), limits=(0, 1.02)),
        _Plan("Feature spread", (("feature_std", "feature std"),), _EVEN, (0, None)),
        _Plan("Images per second", (("images_per_s", "images/s"),), limits=(0, None)),
        _Plan("Share of time waiting for data", (("data_wait", "waiting"),), limits=(0, None)),
    ]
    if "order" in tasks:
        order = _Plan("Order accuracy", (("acc_order", "order"),), (("chance", 0.5),), (0, 1))
        plans.insert(2 + len(tasks), order)
    return plans


def _draw(plan: _Plan, steps: Curve, curves: Sequence[tuple[str, Curve]], salt: str) -> Chart:
    figure = new_chart()
    axes = figure.add_subplot()
    lost = 0
    for colour, (name, values) in zip(SERIES, curves, strict=False):
        there = ~np.isnan(values)
        x, y = downsample(steps[there], values[there])
        lost += int(np.isinf(values).sum())
        # A single point draws no line.
        axes.plot(x, y, color=colour, linewidth=1.4, label=name, marker="o" if len(x) < 3 else "")
    colours = SERIES if len(plan.levels) > 1 else (INK,)
    for colour, (name, height) in zip(colours, plan.levels, strict=False):
        axes.axhline(height, color=colour, linewidth=1.2, linestyle=":", label=name)
    axes.set_ylim(bottom=plan.limits[0], top=plan.limits[1])
    axes.set_xlabel("step", color=INK, fontsize=9)
    if len(curves) + len(plan.levels) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    style_axes(axes)
    last = ", ".join(f"{name} {_last(values):.4g}" for name, values in curves)
    note = f"last: {last}" + (f"; {lost} values are not finite" if lost else "")
    label = f"{plan.title} over steps, {note}"
    return Chart(plan.title, figure_svg(figure, label, salt), note)


def _last(values: Curve) -> float:
    return float(values[~np.isnan(values)][-1])


def style_axes(axes: Axes) -> None:
    """Thin axes in the page's text colour, for light and dark alike."""
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_alpha(0.4)
