"""``seco inspect``: what shards hold, as lines, a page and a contact sheet."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seco.pages import (
    INK,
    SERIES,
    data_uri,
    figure_svg,
    new_chart,
    render_page,
    small_picture,
    style_axes,
)
from shards.atomic import atomic_path, write_text
from shards.format import VideoRecord
from shards.opening import open_shards
from shards.progress import progress
from shards.storage import UnreadableFrame
from shards.terminal import printable

_Name = TypeVar("_Name", str, tuple[int, int])

_NO_LABEL = "(no label)"
_PROGRESS_FROM = 5_000  # videos; fewer are read in well under two seconds
_CLASSES_SHOWN = 8
_SIZES_SHOWN = 5


class Videos(Protocol):
    """The part of :class:`shards.dataset.ShardSet` that inspecting needs."""

    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def labels(self) -> NDArray[np.int32]: ...
    @property
    def label_names(self) -> list[str]: ...
    @property
    def splits(self) -> dict[str, list[str | None]]: ...
    @property
    def frame_counts(self) -> NDArray[np.int64]: ...
    @property
    def addresses(self) -> list[str]: ...
    @property
    def total_bytes(self) -> int: ...
    def __len__(self) -> int: ...
    def frame_count(self, video: int, /) -> int: ...
    def read_frame(self, video: int, frame: int, /) -> bytes: ...
    def record(self, video: int, /) -> VideoRecord: ...


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some values."""

    smallest: float
    median: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class SetSummary:
    """The counts of a dataset. Histograms are (name, videos) pairs, largest first."""

    datasets: list[str]
    videos: int
    frames: int
    shards: int
    bytes: int
    labels: list[tuple[str, int]]  # without unlabelled videos
    unlabelled: int
    splits: dict[str, list[tuple[str, int]]]  # by split name, histogram of its values
    frames_per_video: NDArray[np.int64]  # (V,)
    sizes: list[tuple[tuple[int, int], int]]  # ((width_px, height_px), videos)
    durations_seconds: NDArray[np.float64]  # of the sources that have one
    unreadable_records: int

    @property
    def frames_spread(self) -> Spread:
        """Stored frames per video."""
        return _spread(self.frames_per_video)

    @property
    def duration_spread(self) -> Spread | None:
        """Seconds of the source videos; None if not recorded."""
        return _spread(self.durations_seconds) if len(self.durations_seconds) else None


def summarise(shard_set: Videos) -> SetSummary:
    """Count everything; reads the record of each video, but no frames."""
    videos = len(shard_set)
    datasets: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    durations = []
    unreadable = 0
    for number in _counted(videos):
        try:
            record = shard_set.record(number)
        except UnreadableFrame:
            unreadable += 1
            record = None
        label = int(shard_set.labels[number])
        if label >= 0:
            labels[label_of(shard_set, number, record)] += 1
        if record is not None:
            if record.dataset:
                datasets[record.dataset] += 1
            if record.width and record.height:
                sizes[record.width, record.height] += 1
            if record.source_duration is not None:
                durations.append(record.source_duration)
    splits = {
        name: _largest_first(Counter(value for value in values if value is not None))
        for name, values in shard_set.splits.items()
    }
    return SetSummary(
        datasets=[name for name, _ in _largest_first(datasets)],
        videos=videos,
        frames=int(shard_set.frame_counts.sum()),
        shards=len(shard_set.addresses),
        bytes=shard_set.total_bytes,
        labels=_largest_first(labels),
        unlabelled=videos - labels.total(),
        splits=splits,
        frames_per_video=np.asarray(shard_set.frame_counts),
        sizes=_largest_first(sizes),
        durations_seconds=np.array(durations, dtype=np.float64),
        unreadable_records=unreadable,
    )


def label_of(shard_set: Videos, video: int, record: VideoRecord | None) -> str:
    """A video's class name, from the dataset, else from the record, else its number."""
    label = int(shard_set.labels[video])
    if label < 0:
        return _NO_LABEL
    if label < len(shard_set.label_names):
        return shard_set.label_names[label]
    return (record.label_name if record else None) or f"class {label}"


def lines(summary: SetSummary, width: int = 100) -> str:
    """The summary as a table of plain text, at most ``width`` columns wide."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style=None, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts(summary):
        # As Text, so that markup in foreign names stays literal.
        table.add_row(name, Text(printable(value)))
    drawn = io.StringIO()
    Console(file=drawn, width=width, color_system=None, force_terminal=False).print(table)
    kept = [line.rstrip() for line in drawn.getvalue().splitlines()]
    return "\n".join(line for line in kept if line)


def facts(summary: SetSummary) -> list[tuple[str, str]]:
    """The summary as (name, text) pairs."""
    pairs = [
        ("dataset", ", ".join(summary.datasets) or "unknown"),
        ("videos", f"{summary.videos:,}"),
        ("frames", f"{summary.frames:,}"),
        ("shards", f"{summary.shards:,}, {human_bytes(summary.bytes)}"),
        ("frames per video", _spread_words(summary.frames_spread, "")),
    ]
    if summary.sizes:
        pairs.append(("stored size", _sizes_words(summary)))
    if summary.duration_spread is not None:
        pairs.append(("source duration", _spread_words(summary.duration_spread, " s")))
    for name, values in summary.splits.items():
        pairs.append((f"split {name}", _histogram_words(values, len(values))))
    if summary.labels:
        pairs.append(("classes", _classes_words(summary)))
    if summary.unlabelled:
        pairs.append(("without label", f"{summary.unlabelled:,}"))
    if summary.unreadable_records:
        pairs.append(("unreadable records", f"{summary.unreadable_records:,}"))
    return pairs


def human_bytes(count: int) -> str:
    """Format bytes: 1536 as "1.5 KiB"."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _sizes_words(summary: SetSummary) -> str:
    named = [(f"{width}×{height}", videos) for (width, height), videos in summary.sizes]
    return _histogram_words(named, _SIZES_SHOWN)


def _classes_words(summary: SetSummary) -> str:
    counts = [videos for _, videos in summary.labels]
    each = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[-1]:,} – {counts[0]:,}"
    return f"{len(counts):,} of {each} videos: {_histogram_words(summary.labels, _CLASSES_SHOWN)}"


def _histogram_words(histogram: Sequence[tuple[str, int]], shown: int) -> str:
    words = ", ".join(f"{name} ({videos:,})" for name, videos in histogram[:shown])
    left = len(histogram) - shown
    return f"{words}, … {left:,} more" if left > 0 else words


def _spread_words(spread: Spread, unit: str) -> str:
    if spread.smallest == spread.largest:
        return f"{spread.smallest:g}{unit}"
    return f"{spread.smallest:.4g} – {spread.largest:.4g}{unit}, median {spread.median:.4g}{unit}"


def _spread(values: NDArray[np.int64] | NDArray[np.float64]) -> Spread:
    return Spread(float(values.min()), float(np.median(values)), float(values.max()))


def _largest_first(counter: Counter[_Name]) -> list[tuple[_Name, int]]:
    return sorted(counter.items(), key=lambda pair: (-pair[1], pair[0]))


def _counted(videos: int) -> Iterator[int]:
    if videos < _PROGRESS_FROM:
        yield from range(videos)
        return
    with progress("inspect", videos, "videos") as shown:
        for number in range(videos):
            yield number
            shown.advance()


TILE_PX = (144, 108)  # width, height
_GAP_PX = 4
_CAPTION_PX = 20
_PAPER = (250, 250, 250)
_INK = (40, 44, 48)
_EMPTY = (228, 231, 234)
_BROKEN = (190, 40, 40)


@dataclass(frozen=True)
class Strip:
    """One video, its frames side by side in time order."""

    key: str
    label: str
    frames: int  # stored frames, not drawn ones
    image: Image.Image
    broken: int  # tiles that could not be decoded


def contact_sheet(
    shard_set: Videos, videos: int = 24, frames_per_video: int = 6, seed: int = 0
) -> Image.Image:
    """A picture of ``videos`` random videos with their keys and labels.

    A frame that cannot be decoded is a crossed-out tile; ``image.info["broken"]`` counts them.

    Args:
        frames_per_video: evenly spaced from the first to the last.
        seed: selects the videos; the same seed gives the same picture.
    """
    return compose(draw_strips(shard_set, videos, frames_per_video, seed))


def write_contact_sheet(image: Image.Image, path: Path) -> None:
    """Write the sheet as PNG, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def draw_strips(
    shard_set: Videos, videos: int = 24, frames_per_video: int = 6, seed: int = 0
) -> list[Strip]:
    """The strips of a contact sheet, in dataset order."""
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = rng.choice(len(shard_set), size=min(videos, len(shard_set)), replace=False)
    return [_strip(shard_set, int(video), frames_per_video) for video in sorted(chosen)]


def compose(strips: list[Strip]) -> Image.Image:
    """Stack the strips, each below its caption."""
    row_px = _CAPTION_PX + TILE_PX[1] + _GAP_PX
    width = max((strip.image.width for strip in strips), default=TILE_PX[0]) + 2 * _GAP_PX
    broken = sum(strip.broken for strip in strips)
    height = row_px * len(strips) + (_CAPTION_PX if broken else 0) + _GAP_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for row, strip in enumerate(strips):
        top = row * row_px
        caption = printable(f"{strip.key}   {strip.label}   {strip.frames} frames")
        caption = _shortened(caption, width - 2 * _GAP_PX, lambda text: draw.textlength(text, font))
        draw.text((_GAP_PX, top + 3), caption, fill=_INK, font=font)
        sheet.paste(strip.image, (_GAP_PX, top + _CAPTION_PX))
    if broken:
        text = f"{broken} of these frames cannot be decoded"
        draw.text((_GAP_PX, height - _CAPTION_PX), text, fill=_BROKEN, font=font)
    sheet.info["broken"] = broken
    return sheet


def _strip(shard_set: Videos, video: int, frames_per_video: int) -> Strip:
    stored = shard_set.frame_count(video)
    shown = min(stored, frames_per_video)
    image = Image.new(
        "RGB", (frames_per_video * (TILE_PX[0] + _GAP_PX) - _GAP_PX, TILE_PX[1]), _EMPTY
    )
    broken = 0
    for column, frame in enumerate(np.linspace(0, stored - 1, shown).round().astype(int)):
        tile = _tile(shard_set, video, int(frame))
        broken += tile is None
        image.paste(tile or _crossed_tile(), (column * (TILE_PX[0] + _GAP_PX), 0))
    try:
        record = shard_set.record(video)
    except UnreadableFrame:
        record = None
    label = label_of(shard_set, video, record)
    return Strip(str(shard_set.keys[video]), label, stored, image, broken)


def _tile(shard_set: Videos, video: int, frame: int) -> Image.Image | None:
    """The frame in a tile, aspect ratio kept; None if it cannot be decoded."""
    try:
        picture = small_picture(shard_set.read_frame(video, frame), TILE_PX)
    except UnreadableFrame:
        return None
    if picture is None:
        return None
    tile = Image.new("RGB", TILE_PX, _EMPTY)
    tile.paste(picture, ((TILE_PX[0] - picture.width) // 2, (TILE_PX[1] - picture.height) // 2))
    return tile


def _crossed_tile() -> Image.Image:
    tile = Image.new("RGB", TILE_PX, _EMPTY)
    draw = ImageDraw.Draw(tile)
    right, bottom = TILE_PX[0] - 1, TILE_PX[1] - 1
    draw.rectangle((0, 0, right, bottom), outline=_BROKEN, width=2)
    draw.line((0, 0, right, bottom), fill=_BROKEN, width=2)
    draw.line((0, bottom, right, 0), fill=_BROKEN, width=2)
    return tile


def _shortened(text: str, width_px: float, measure: Callable[[str], float]) -> str:
    if measure(text) <= width_px:
        return text
    text = text[: int(width_px)]  # no glyph is narrower than 1 px
    while text and measure(text + "…") > width_px:
        text = text[:-1]
    return text + "…"


_JPEG_QUALITY = 82


def write_set_page(
    summary: SetSummary, strips: Sequence[Strip], path: Path, title: str = "shard set"
) -> None:
    """Write the page; the same dataset gives the same bytes.

    Raises:
        InputError: the file cannot be written.
    """
    write_text(path, render_set_page(summary, strips, title))


def render_set_page(summary: SetSummary, strips: Sequence[Strip], title: str = "shard set") -> str:
    """The page as self-contained HTML."""
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
        charts.append(("Videos per class, largest first", _class_sizes(counts)))
    if summary.frames_spread.smallest != summary.frames_spread.largest:
        values = summary.frames_per_video.tolist()
        charts.append(("Frames per video", _histogram(values, "stored frames", "frames")))
    spread = summary.duration_spread
    if spread is not None and spread.smallest != spread.largest:
        durations = summary.durations_seconds.tolist()
        charts.append(("Source duration", _histogram(durations, "seconds", "durations")))
    return charts


def _class_sizes(counts: Sequence[int]) -> Markup:
    figure = new_chart()
    axes = figure.add_subplot()
    # A filled step line, since hundreds of bars would be hundreds of elements.
    edges = [number + 0.5 for number in range(len(counts) + 1)]
    axes.stairs(counts, edges, fill=True, color=SERIES[0])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("class, by rank", color=INK, fontsize=9)
    style_axes(axes)
    return figure_svg(figure, "Videos per class, largest first", "classes")


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
    """The summary of a dataset as text; with ``html`` or ``png``, also write page or contact sheet.

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
