"""The order in which videos are stored, and long lists of them.

A list may have millions of rows. They lie in a file on the local disk, and memory holds five
numbers for each. What has to be known of all of them at once (that no row is repeated, that keys
differ, and the order in which videos are stored) is found by comparing 64 bits of a digest and,
where these are equal, the rows themselves.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipelines._adapter import Video, key_source
from shards.errors import InputError
from shards.format import KEY_DIGITS, distinct_key, plain_key

Span = tuple[float, float] | None


class ListedVideo(NamedTuple):
    """A row of a list that is a video file, or a part of one."""

    line: int  # of the list
    source: str
    path: bytes  # as the system has it, which may not be UTF-8
    address: str | None
    label_name: str | None
    splits: dict[str, str]
    group: str | None
    span: Span
    metadata: dict[str, str] | None


class Repeated(NamedTuple):
    """A row of a list that repeats the video of an earlier one, or the part of it."""

    line: int
    shown: str
    other_label: bool


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ListedVideo).decode


PIECE_SECONDS = 300.0  # of a recording, decoded in one pass


def rank_text(source: str, span: Span, key: str) -> str:
    """Return the text by whose SHA-1 videos are ordered: one for all clips of some minutes."""
    return key if span is None else f"{source}/{span[0] // PIECE_SECONDS:.0f}"


def digest_row(
    key: str,
    label: int | None,
    label_name: str | None,
    splits: dict[str, str],
    group: str | None,
    span: Span,
    metadata: dict[str, str] | None,
    rate: float | None = None,
) -> list[Any]:
    """Return what of a video is part of a plan's digest."""
    row: list[Any] = [key, label, label_name, sorted(splits.items())]
    later = (group, span, metadata, rate)
    return row if later == (None, None, None, None) else [*row, *later]


class VideoTable(Sequence[Video]):
    """The videos of a list: added one by one, then :meth:`finish` is called, then they are read."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="seco-", buffering=1 << 20)  # noqa: SIM115
        self._end = 0
        self._places = array("Q")  # where each row is in the file
        self._same = array("Q")  # of source and span: equal where a row is repeated
        self._plain = array("Q")  # of the key that its name alone gives
        self._rank = array("Q")  # by which it is ordered
        self._start = array("d")  # seconds, which order the parts of a recording
        self._label_names: dict[str, int] = {}
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        self._levels: NDArray[np.uint8] = np.empty(0, np.uint8)

    def add(self, row: ListedVideo) -> None:
        """Add a row."""
        text = _encode(row)
        self._file.write(text)
        self._places.append(self._end)
        self._end += len(text)
        self._same.append(_hash(f"{row.source}\n{row.span}"))
        key = plain_key(key_source(row.source, row.span))
        self._plain.append(_hash(key.lower()))
        self._rank.append(_rank(rank_text(row.source, row.span, key)))
        self._start.append(row.span[0] if row.span is not None else 0.0)

    def finish(self, label_names: Sequence[str]) -> list[Repeated]:
        """Leave out repeated rows, find the keys and the order.

        Returns:
            The repeated rows that were left out, by line.

        Raises:
            InputError: two videos cannot be told apart.
        """
        self._file.flush()
        self._label_names = {name: number for number, name in enumerate(label_names)}
        self._levels = np.zeros(len(self._places), np.uint8)
        dropped = np.zeros(len(self._places), bool)
        repeated = []
        for group in _equal(self._same):
            labels: dict[tuple[str, Span], str | None] = {}
            for number in group:
                row = self._row(number)
                same = (row.source, row.span)
                if same in labels:
                    dropped[number] = True
                    other = row.label_name != labels[same]
                    repeated.append(Repeated(row.line, self._video(number).shown, other))
                else:
                    labels[same] = row.label_name
        kept = np.flatnonzero(~dropped)
        self._same = array("Q")
        self._extend_keys(self._plain, kept, 1)
        self._plain = array("Q")
        self._require_distinct(kept)
        ranks = np.frombuffer(self._rank, np.uint64)[kept]
        starts = np.frombuffer(self._start)[kept]
        self._order = kept[np.lexsort((starts, ranks))]
        self._rank, self._start = array("Q"), array("d")
        return sorted(repeated)

    def _extend_keys(self, hashes: array[int], rows: NDArray[np.int64], level: int) -> None:
        """Give those of the rows whose keys are equal longer ones, and look at these again."""
        longer, keys = array("q"), array("Q")
        for group in _equal(hashes, rows):
            count = Counter(self._key(number, self._row(number)).lower() for number in group)
            for number in group:
                row = self._row(number)
                if count[self._key(number, row).lower()] == 1:
                    continue
                if level == len(KEY_DIGITS):
                    raise InputError(f"{row.source} is there twice", fix="rename one of them")
                self._levels[number] = level
                key = self._key(number, row)
                longer.append(number)
                keys.append(_hash(key.lower()))
                self._rank[number] = _rank(rank_text(row.source, row.span, key))
        if longer:
            self._extend_keys(keys, np.array(longer), level + 1)

    def _require_distinct(self, rows: NDArray[np.int64]) -> None:
        for group in _equal(self._rank, rows):
            found = [video for video in map(self._video, group) if video.span is None]
            if len({video.key for video in found}) < len(found):
                two = " and ".join(video.shown for video in found[:2])
                raise InputError(f"{two} cannot be told apart", fix="rename one of them")

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, number: int) -> Video: ...
    @overload
    def __getitem__(self, number: slice) -> list[Video]: ...
    def __getitem__(self, number: int | slice) -> Any:
        """Return videos by their place in the order."""
        if isinstance(number, slice):
            return [self._video(row) for row in self._order[number]]
        return self._video(self._order[number])

    def __iter__(self) -> Iterator[Video]:
        return (self._video(number) for number in self._order)

    def digest_rows(self) -> Iterator[list[Any]]:
        """Yield :func:`digest_row` of every video, in order."""
        for number in self._order:
            row = self._row(number)
            named = (self._key(number, row), self._label(row), row.label_name, row.splits)
            yield digest_row(*named, row.group, row.span, row.metadata)

    def _row(self, number: int) -> ListedVideo:
        place = self._places[number]
        following = self._places[number + 1] if number + 1 < len(self._places) else self._end
        return _decode(os.pread(self._file.fileno(), following - place, place))

    def _key(self, number: int, row: ListedVideo) -> str:
        return distinct_key(key_source(row.source, row.span), KEY_DIGITS[self._levels[number]])

    def _label(self, row: ListedVideo) -> int | None:
        return None if row.label_name is None else self._label_names[row.label_name]

    def _video(self, number: int) -> Video:
        row = self._row(number)
        return Video(
            source=row.source,
            path=Path(os.fsdecode(row.path)),
            key=self._key(number, row),
            address=row.address,
            label=self._label(row),
            label_name=row.label_name,
            splits=row.splits,
            group=row.group,
            span=row.span,
            metadata=row.metadata,
        )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _rank(text: str) -> int:
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big")


def _equal(
    hashes: array[int], rows: NDArray[np.int64] | None = None
) -> Iterator[NDArray[np.int64]]:
    """Yield, of each value that is there more than once, its rows in ascending order.

    Args:
        hashes: one for each row, or for each of ``rows`` if they are as many.
        rows: look at these only.
    """
    values = np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)
    if rows is None:
        rows = np.arange(len(values))
    elif len(rows) != len(values):
        values = values[rows]
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    repeats = np.flatnonzero(ordered[1:] == ordered[:-1])
    if not len(repeats):
        return
    for run in np.split(repeats, np.flatnonzero(np.diff(repeats) > 1) + 1):
        yield rows[order[run[0] : run[-1] + 2]]
