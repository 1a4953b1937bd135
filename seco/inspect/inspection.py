"""``seco inspect``: what shards hold, as lines, as a page and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from PIL import Image

from seco.inspect.contact_sheet import Strip, compose, draw_strips, write_contact_sheet
from seco.inspect.set_summary import SetSummary, facts, lines, summarise
from seco.pages.html import INK, SERIES, data_uri, figure_svg, new_chart, render_page, style_axes
from seco.pages.text import printable
from shards.atomic import write_text
from shards.opening import open_shards

_JPEG_QUALITY = 82


def write_set_page(
    summary: SetSummary, strips: Sequence[Strip], path: Path, title: str = "shard set"
) -> None:
    """Write the page; the same set gives the same bytes.

    Raises:
        InputError: the file cannot be written.
    """
    write_text(path, render_set_page(summary, strips, title))


def render_set_page(summary: SetSummary, strips: Sequence[Strip], title: str = "shard set") -> str:
    """The page as HTML; pictures are embedded, nothing is loaded from elsewhere."""
    most = max((videos for _, videos in summary.labels), default=1)
    return render_page(
        "inspect.html.j2",
        title=printable(title),
        facts=[(name, printable(value)) for name, value in facts(summary)],
        charts=_charts(summary),
        labels=[
            (printable(name), videos, f"{100 * videos / most:.2f}")
            for name, videos in summary.labels
        ],
        strips=[
            (printable(strip.key), printable(strip.label), strip.frames, _jpeg(strip.image))
            for strip in strips
        ],
        broken=sum(strip.broken for strip in strips),
    )


def _charts(summary: SetSummary) -> list[tuple[str, Markup]]:
    charts = []
    if len(summary.labels) > 1:
        counts = [videos for _, videos in summary.labels]
        charts.append(("Videos a class, the largest first", _class_sizes(counts)))
    if summary.frames_spread.smallest != summary.frames_spread.largest:
        values = summary.frames_per_video.tolist()
        charts.append(("Frames a video", _histogram(values, "stored frames", "frames")))
    spread = summary.duration_spread
    if spread is not None and spread.smallest != spread.largest:
        durations = summary.durations_seconds.tolist()
        charts.append(("Source duration", _histogram(durations, "seconds", "durations")))
    return charts


def _class_sizes(counts: Sequence[int]) -> Markup:
    figure = new_chart()
    axes = figure.add_subplot()
    # As a filled step line: hundreds of bars would be hundreds of elements.
    edges = [number + 0.5 for number in range(len(counts) + 1)]
    axes.stairs(counts, edges, fill=True, color=SERIES[0])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("class, by rank", color=INK, fontsize=9)
    style_axes(axes)
    return figure_svg(figure, "Videos a class, the largest first", "classes")


def _histogram(values: Sequence[float], unit: str, salt: str) -> Markup:
    figure = new_chart()
    axes = figure.add_subplot()
    axes.hist(values, bins=30, histtype="stepfilled", color=SERIES[0])
    axes.set_xlabel(unit, color=INK, fontsize=9)
    axes.set_ylabel("videos", color=INK, fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    style_axes(axes)
    return figure_svg(figure, f"Histogram of {unit}", salt)


def _jpeg(image: Image.Image) -> str:
    encoded = io.BytesIO()
    image.save(encoded, format="JPEG", quality=_JPEG_QUALITY)
    return data_uri(encoded.getvalue(), "image/jpeg")


def inspect_set(spec: Sequence[str], html: str | None = None, png: str | None = None) -> str:
    """The set's figures as text; with ``html`` or ``png`` also its page or contact sheet.

    Raises:
        InputError: the shards cannot be read, or a file cannot be written.
    """
    shards = open_shards(spec)
    summary = summarise(shards)
    strips = draw_strips(shards) if html or png else []
    if html:
        write_set_page(summary, strips, Path(html), title=shards.name)
    if png:
        write_contact_sheet(compose(strips), Path(png))
    return lines(summary)
