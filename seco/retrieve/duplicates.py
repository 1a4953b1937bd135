"""``seco retrieve duplicates``: the same video, or nearly, on both sides of a split.

Candidates come cheaply and too many, from features and from small pictures; frames decide
(:mod:`seco.retrieve.fingerprints`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seco.evaluation.splits import choose_split
from seco.features.matrix import FeatureMatrix, unit_vectors
from seco.features.store import Features, read_features, require_same_encoder
from seco.pages.html import render_page
from seco.pages.text import printable
from seco.pages.thumbnails import frames_of, thumbnail
from seco.retrieve.config import DuplicatesConfig
from seco.retrieve.fingerprints import (
    COPY,
    MOST_FRAMES,
    SIDE_PX,
    Fingerprint,
    Match,
    compare,
    fingerprint,
    mirrored,
    picture_vector,
)
from seco.retrieve.nearest import ExactIndex, NearestIndex
from shards.access import UnreadableFrame
from shards.atomic import require_writable, write_text
from shards.cpus import usable_cpus
from shards.csv_rows import csv_text
from shards.draws import evenly_spaced
from shards.errors import InputError
from shards.opening import open_shards
from shards.progress import progress
from shards.reader import ShardSet

COLUMNS = (
    *("key", "split", "near_key", "near_split", "kind", "mirrored", "similarity"),
    *("appearance", "motion", "shift_seconds"),
)
_UNVERIFIED = "unverified"
_LINES_SHOWN = 50


@dataclass(frozen=True)
class Pair:
    """Two videos of different splits that are, or look, the same."""

    key: str
    split: str
    near_key: str
    near_split: str
    similarity: float  # cosine of the features
    match: Match | None  # None: the frames were not looked at

    @property
    def kind(self) -> str:
        """``copy``, ``near``, or ``unverified``."""
        return _UNVERIFIED if self.match is None else str(self.match.kind)

    @property
    def mirrored(self) -> bool:
        """One of them is the mirror image of the other."""
        return self.match is not None and self.match.mirrored

    def row(self) -> list[str]:
        """Values of ``COLUMNS``."""
        told = [self.key, self.split, self.near_key, self.near_split, self.kind]
        told += ["yes" if self.mirrored else "", f"{self.similarity:.6f}"]
        if self.match is None:
            return [*told, "", "", ""]
        numbers = (self.match.appearance, self.match.motion, self.match.shift_seconds)
        return [*told, *(f"{number:.4f}" for number in numbers)]


@dataclass(frozen=True)
class Duplicates:
    """What was found, the surest first."""

    pairs: list[Pair]
    compared: int  # pairs of videos whose frames were compared
    unreadable: list[str]  # videos without a frame that decodes
    path: Path
    threshold: float | None  # of the cosine, where frames were not looked at

    def table(self) -> str:
        """Lines for a terminal."""
        if self.threshold is not None:
            head = (
                f"{len(self.pairs)} pairs across splits with a cosine of {self.threshold:g} or more"
            )
        else:
            head = (
                f"{len(self.pairs)} pairs across splits show the same video or nearly so "
                f"({self.compared} compared frame by frame)"
            )
        lines = [
            f"  {pair.kind}{', mirrored' if pair.mirrored else ''}  "
            f"{pair.split}: {pair.key}   {pair.near_split}: {pair.near_key}"
            for pair in self.pairs[:_LINES_SHOWN]
        ]
        if len(self.pairs) > _LINES_SHOWN:
            lines.append(f"  … all are in {self.path}")
        if self.unreadable:
            first = self.unreadable[0]
            lines.append(f"{len(self.unreadable)} videos have no readable frame, first {first}")
        return "\n".join([head, *map(printable, lines)])


def write_pairs(found: Duplicates) -> None:
    """Write ``duplicates.csv``, a row a pair.

    Raises:
        InputError: the file cannot be written.
    """
    text = csv_text([COLUMNS, *(pair.row() for pair in found.pairs)])
    write_text(found.path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


_FRAMES_TO_SEARCH = 3
_KEPT = 20_000  # fingerprints, of 64 kB at most
_AT_ONCE = 4096  # videos or comparisons handed to the threads


@dataclass(frozen=True)
class Group:
    """One side: the rows of a feature folder with one value of the split, or a whole folder."""

    name: str
    features: Features
    rows: NDArray[np.int64]

    def vectors(self) -> FeatureMatrix:
        """The features."""
        return unit_vectors(self.features.features, self.rows)

    def key(self, position: int) -> str:
        """The key of one."""
        return self.features.keys[int(self.rows[position])]


class FrameReader:
    """The stored frames of both sides, by group and key."""

    def __init__(self, config: DuplicatesConfig, groups: Sequence[Group]) -> None:
        self._shards: dict[str, ShardSet] = {}
        opened: dict[tuple[str, ...], ShardSet] = {}
        for group in groups:
            spec = config.shards or tuple(group.features.meta.get("shards", ()))
            if spec not in opened:
                opened[spec] = _open(spec)
            self._shards[group.name] = opened[spec]
        self._unreadable: dict[str, None] = {}
        #: (group, key) -> its fingerprint; None if no frame decodes.
        self.fingerprint = lru_cache(_KEPT)(self._fingerprint)
        self.pool = ThreadPoolExecutor(config.workers or usable_cpus())

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    @property
    def unreadable(self) -> list[str]:
        """Keys of videos of which no frame decodes."""
        return sorted(self._unreadable)

    def frames_of(self, group: str, key: str, count: int) -> list[bytes]:
        """Evenly spaced stored frames, in time order."""
        return frames_of(self._shards[group])(key, count)

    def picture_vectors(self, group: Group) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(N, 256) of three frames a video, and of their mirror images; 0 for unreadable ones."""
        made, flipped = [], []
        with progress(f"Looking at {group.name}", len(group.rows), "videos") as shown:
            places = range(len(group.rows))
            for begin in range(0, len(places), _AT_ONCE):
                keys = [group.key(place) for place in places[begin : begin + _AT_ONCE]]
                for few in self.pool.map(lambda key: self._few(group.name, key), keys):
                    made.append(picture_vector(few))
                    flipped.append(picture_vector(mirrored(few)))
                    shown.advance()
        return np.stack(made), np.stack(flipped)

    def _few(self, group: str, key: str) -> NDArray[np.float32]:
        found = self._read(group, key, _FRAMES_TO_SEARCH)
        if found is None:
            self._unreadable[key] = None
            return np.zeros((1, SIDE_PX**2), dtype=np.float32)
        return found.frames

    def _fingerprint(self, group: str, key: str) -> Fingerprint | None:
        return self._read(group, key, MOST_FRAMES)

    def _read(self, group: str, key: str, count: int) -> Fingerprint | None:
        shards = self._shards[group]
        video = shards.find(key)
        numbers = evenly_spaced(shards.frame_count(video), count)
        try:
            times = shards.record(video).frame_times
        except UnreadableFrame:
            times = []
        if len(times) != shards.frame_count(video):  # foreign tars tell none
            times = [float(number) for number in range(shards.frame_count(video))]
        read = shards.read_frames([(video, number) for number in numbers])
        return fingerprint(
            [b"" if isinstance(data, UnreadableFrame) else data for data in read],
            [times[number] for number in numbers],
        )


def _open(spec: tuple[str, ...]) -> ShardSet:
    try:
        return open_shards(spec)
    except InputError as error:
        raise InputError(
            error.what, error.where, "name the shards with --shards, or give --features-only"
        ) from error


MOST_SHOWN = 200  # pairs; some 60 kB each
_FRAMES = 4

# (group, key, how many) -> JPEG bytes in time order.
FramesOfGroup = Callable[[str, str, int], list[bytes]]


def render_duplicates_page(found: Duplicates, frames_of: FramesOfGroup) -> str:
    """The page as HTML; pictures are embedded, nothing is loaded from elsewhere.

    Args:
        frames_of: gives the pictures.
    """
    pairs = [
        {
            "kind": pair.kind,
            "mirrored": pair.mirrored,
            "similarity": f"{pair.similarity:.3f}",
            "appearance": f"{pair.match.appearance:.3f}" if pair.match else "–",
            "motion": f"{pair.match.motion:.3f}" if pair.match else "–",
            "shift": f"{pair.match.shift_seconds:+.2f}" if pair.match else "–",
            "videos": [
                {
                    "key": printable(key),
                    "split": printable(split),
                    "pictures": [
                        uri
                        for jpeg in frames_of(split, key, _FRAMES)
                        if (uri := thumbnail(jpeg)) is not None
                    ],
                }
                for key, split in ((pair.key, pair.split), (pair.near_key, pair.near_split))
            ],
        }
        for pair in found.pairs[:MOST_SHOWN]
    ]
    return render_page(
        "duplicates.html.j2",
        pairs=pairs,
        all=len(found.pairs),
        copies=sum(pair.kind == COPY for pair in found.pairs),
        compared=found.compared,
        unreadable=len(found.unreadable),
        path=printable(found.path),
    )


RESULT = "duplicates.csv"


def duplicates(config: DuplicatesConfig) -> Duplicates:
    """Near-duplicates between different values of the split, or between two folders.

    Writes ``duplicates.csv`` and, with ``config.html``, a page of pictures.

    Raises:
        InputError: the feature folders cannot be used, there are no two splits, or the shards
            cannot be opened.
    """
    if config.candidates < 1 or (config.workers is not None and config.workers < 1):
        raise InputError("must be 1 or more", "--candidates, --workers")
    if not -1 <= config.threshold <= 1:
        raise InputError("must be a cosine, from -1 to 1", "--threshold")
    out = Path(config.out or config.features)
    for folder in (out, *([Path(config.html).parent] if config.html is not None else [])):
        require_writable(folder)  # before anything that takes long
    groups = _groups(config)
    if config.features_only and config.html is not None:
        raise InputError("needs frames", "--html", "leave --features-only out")
    path = out / RESULT
    sides = list(itertools.combinations(groups, 2))
    if config.features_only:
        pairs = [pair for a, b in sides for pair in _by_features_alone(config, a, b)]
        pairs.sort(key=lambda pair: (-pair.similarity, pair.key, pair.near_key))
        found = Duplicates(pairs, 0, [], path, config.threshold)
        write_pairs(found)
        return found
    with FrameReader(config, groups) as videos:
        pairs, compared = [], 0
        for a, b in sides:
            some, tried = _by_frames(config, a, b, videos)
            pairs += some
            compared += tried
        pairs.sort(key=lambda pair: (pair.kind, *_surest_first(pair)))
        found = Duplicates(pairs, compared, videos.unreadable, path, None)
        write_pairs(found)
        if config.html is not None:
            write_text(Path(config.html), render_duplicates_page(found, videos.frames_of))
    return found


def _by_frames(
    config: DuplicatesConfig, a: Group, b: Group, videos: FrameReader
) -> tuple[list[Pair], int]:
    """The pairs whose frames agree, and how many pairs were compared."""
    wanted = _candidates(config, a, b, videos)

    def matched(pair: tuple[int, int]) -> Match | None:
        of_a = videos.fingerprint(a.name, a.key(pair[1]))
        of_b = videos.fingerprint(b.name, b.key(pair[0]))
        return None if of_a is None or of_b is None else compare(of_a, of_b)

    found = []
    with progress(f"Comparing {b.name} with {a.name}", len(wanted), "pairs") as shown:
        for begin in range(0, len(wanted), _AT_ONCE):
            some = wanted[begin : begin + _AT_ONCE]
            for pair, match in zip(some, videos.pool.map(matched, some), strict=True):
                if match is not None and match.kind is not None:
                    found.append(_pair(a, b, pair, match))
                shown.advance()
    return found, len(wanted)


def _candidates(
    config: DuplicatesConfig, a: Group, b: Group, videos: FrameReader
) -> list[tuple[int, int]]:
    """Positions (in b, in a) worth a look at their frames, in the order of b."""
    of_a, _ = videos.picture_vectors(a)
    of_b, of_b_mirrored = videos.picture_vectors(b)
    # An encoder that was not trained for it need not put a video beside its mirror image, nor an
    # untrained one beside its copy.
    by_picture = ExactIndex(unit_vectors(of_a), config.device)
    searches: list[tuple[NearestIndex, FeatureMatrix, str]] = [
        (ExactIndex(a.vectors(), config.device), b.vectors(), "Nearest features"),
        (by_picture, unit_vectors(of_b), ""),
        (by_picture, unit_vectors(of_b_mirrored), ""),
    ]
    wanted: set[tuple[int, int]] = set()
    for index, queries, title in searches:
        _, found = index.search(queries, config.candidates, title)
        for position, near in enumerate(found.tolist()):
            wanted.update((position, other) for other in near if other >= 0)
    return sorted(wanted)


def _by_features_alone(config: DuplicatesConfig, a: Group, b: Group) -> list[Pair]:
    index = ExactIndex(a.vectors(), config.device)
    cosines, found = index.search(b.vectors(), config.candidates, "duplicates")
    return [
        Pair(b.key(i), b.name, a.key(found[i, j]), a.name, float(cosines[i, j]), None)
        for i, j in np.argwhere(cosines >= config.threshold).tolist()
    ]


def _pair(a: Group, b: Group, pair: tuple[int, int], match: Match) -> Pair:
    of_b, of_a = (
        group.vectors().take(np.array([position]))[0]
        for group, position in ((b, pair[0]), (a, pair[1]))
    )
    return Pair(b.key(pair[0]), b.name, a.key(pair[1]), a.name, float(of_b @ of_a), match)


def _surest_first(pair: Pair) -> tuple[float, str, str]:
    score = pair.match.score if pair.match is not None else 0.0
    return -score, pair.key, pair.near_key


def _groups(config: DuplicatesConfig) -> list[Group]:
    features = read_features(config.features)
    if config.test_features is not None:
        other = read_features(config.test_features)
        require_same_encoder(features, other)
        names = [f.folder.resolve().name for f in (features, other)]
        if names[0] == names[1]:
            names = [str(f.folder) for f in (features, other)]
        return [
            Group(name, f, np.arange(len(f)))
            for name, f in zip(names, (features, other), strict=True)
        ]
    split = choose_split(features, config.split)
    values = np.array(features.splits[split] if split is not None else [""] * len(features))
    named = sorted(set(values.tolist()) - {"", "unused"}, key=lambda v: (v != "train", v))
    if len(named) < 2:
        raise InputError("has no two splits to compare", features.folder, "give --test-features")
    return [Group(value, features, np.flatnonzero(values == value)) for value in named]
