"""Success and precision plots of one-pass evaluation, as OTB's papers show them."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from seco.pages.html import INK
from seco.track.otb_metrics import PRECISION_THRESHOLDS, SUCCESS_THRESHOLDS, Curves
from shards.atomic import atomic_path

SUCCESS_PLOT, PRECISION_PLOT = "success.png", "precision.png"
_INCHES = (5.2, 3.9)
_DPI = 150
_FEW = 8  # sequences that are drawn one by one
_STYLES = ("-", "--", "-.", ":")


def write_plots(out: Path, tracker: str, mean: Curves, sequences: dict[str, Curves]) -> None:
    """Write ``success.png`` and ``precision.png``; a few sequences are drawn one by one, too."""
    plots = (
        (SUCCESS_PLOT, SUCCESS_THRESHOLDS, "success", "overlap threshold", mean.success_auc, "AUC"),
        (
            PRECISION_PLOT,
            PRECISION_THRESHOLDS,
            "precision",
            "distance of the centres, px",
            mean.precision_20,
            "at 20 px",
        ),
    )
    for name, thresholds, kind, axis, score, what in plots:
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.add_subplot()
        if len(sequences) <= _FEW:
            for number, (sequence, one) in enumerate(sequences.items()):
                # Line styles, too: not everybody tells eight colours apart.
                style = _STYLES[number % len(_STYLES)]
                axes.plot(thresholds, getattr(one, kind), style, linewidth=1, label=sequence)
        axes.plot(
            thresholds,
            getattr(mean, kind),
            color=INK,
            linewidth=2.5,
            label=f"{tracker}, {what} {score:.3f}",
        )
        if kind == "precision":
            axes.axvline(20, color="#707070", linewidth=0.8, linestyle=":")
        axes.set(
            xlabel=axis,
            ylabel=f"{kind}, share of frames",
            xlim=(thresholds[0], thresholds[-1]),
            ylim=(0, 1.02),
            title=f"{kind.capitalize()}, one pass, mean of {len(sequences)} sequences",
        )
        axes.grid(visible=True, color="#e4e4e4", linewidth=0.6)
        axes.legend(
            loc="lower right" if kind == "precision" else "upper right",
            framealpha=0.9,
            fontsize="small",
        )
        with atomic_path(out / name) as temporary:
            figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
