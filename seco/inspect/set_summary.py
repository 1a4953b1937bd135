"""What a shard set holds, in figures: sizes, labels, splits, frames a video, durations."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seco.pages.text import printable
from shards.access import UnreadableFrame
from shards.format import VideoRecord
from shards.progress import progress

_Name = TypeVar("_Name", str, tuple[int, int])

_NO_LABEL = "(no label)"
_PROGRESS_FROM = 5_000  # videos; fewer are read in well under two seconds
_CLASSES_SHOWN = 8
_SIZES_SHOWN = 5


class Videos(Protocol):
    """The part of :class:`shards.reader.ShardSet` that inspecting needs."""

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
    """The figures of a set. Histograms are (name, videos) pairs, the largest first."""

    datasets: list[str]
    videos: int
    frames: int
    shards: int
    bytes: int
    labels: list[tuple[str, int]]  # videos without a label are not in it
    unlabelled: int
    splits: dict[str, list[tuple[str, int]]]  # by split name, its values
    frames_per_video: NDArray[np.int64]  # (V,)
    sizes: list[tuple[tuple[int, int], int]]  # ((width_px, height_px), videos)
    durations_seconds: NDArray[np.float64]  # of the sources that tell one
    unreadable_records: int

    @property
    def frames_spread(self) -> Spread:
        """Stored frames a video."""
        return _spread(self.frames_per_video)

    @property
    def duration_spread(self) -> Spread | None:
        """Seconds of the source videos; None where no record tells."""
        return _spread(self.durations_seconds) if len(self.durations_seconds) else None


def summarise(shard_set: Videos) -> SetSummary:
    """Count everything; reads each video's record, no picture."""
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
    """The name of a video's class: the set's, else the record's, else its number."""
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
        # As Text: names in a set are not ours, and markup in them must stay what it is.
        table.add_row(name, Text(printable(value)))
    drawn = io.StringIO()
    Console(file=drawn, width=width, color_system=None, force_terminal=False).print(table)
    kept = [line.rstrip() for line in drawn.getvalue().splitlines()]
    return "\n".join(line for line in kept if line)


def facts(summary: SetSummary) -> list[tuple[str, str]]:
    """The summary as (name, words) pairs."""
    pairs = [
        ("data set", ", ".join(summary.datasets) or "unknown"),
        ("videos", f"{summary.videos:,}"),
        ("frames", f"{summary.frames:,}"),
        ("shards", f"{summary.shards:,}, {human_bytes(summary.bytes)}"),
        ("frames a video", _spread_words(summary.frames_spread, "")),
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
    """1536 as "1.5 KiB"."""
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
