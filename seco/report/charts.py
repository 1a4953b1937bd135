"""The curves of a training run as inline SVG charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from seco.config import TASKS, negative_count
from seco.pages.html import INK, SERIES, figure_svg, new_chart, style_axes
from seco.report.origin import tasks_of
from seco.report.sources import Run
from seco.runs.run_log import Curve

_MOST_OTHERS = 12
_FEW_POINTS = 12
# Said in words, or of a task that the run does not have.
_NO_CHART = {"step", "epoch", "unreadable", "loss"} | {
    f"{w}_{t}" for w in ("loss", "acc") for t in TASKS
}
# The trainer logs the spread in units of what unit vectors that point everywhere alike have.
_EVEN = (("evenly spread", 1.0),)


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
    """Every chart that the run has figures for, in the order of the page.

    Columns that this toolkit's pre-training does not log get a chart of their own, the first ones.

    Args:
        salt: sets this run's charts apart from the others on the page.
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
    if len(tasks) > 1:  # else it is that of the one task
        whole = "Loss, all parts" if tasks_of(config) else "Loss"
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
        _Plan("Feature spread", (("feature_std", "feature std"),), _EVEN, (0, None)),
        _Plan("Images per second", (("images_per_s", "images/s"),), limits=(0, None)),
        _Plan("Share of time waiting for data", (("data_wait", "waiting"),), limits=(0, None)),
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
        # A point that has no neighbour draws no line.
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
