"""``seco retrieve duplicates``: the same video, or nearly the same, on both sides of a split.

A feature says what kind of thing a video shows, so videos of one class lie close together, and
under an untrained encoder all do. Candidates therefore come from features and small pictures, and
frames decide: they are shrunk to 16 x 16 gray values, which re-encoding and resizing hardly change.
Two numbers are taken where the videos overlap best:

* ``appearance``: the mean correlation of frame with frame. A camera that has not moved gives a
  high one for any two clips of it.
* ``motion``: the correlation of what remains when each video's mean frame is subtracted, which is
  high only where the same things move at the same time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seco.config import DuplicatesConfig
from seco.data.splits import choose_split
from seco.evaluation.nearest import ExactIndex, NearestIndex
from seco.evaluation.splits import video_groups
from seco.features.matrix import FeatureMatrix, unit_vectors
from seco.features.store import Features, read_features, require_same_encoder
from seco.pages import frames_of, render_page, small_picture, thumbnail
from shards.atomic import csv_text, require_writable, write_text
from shards.dataset import ShardSet
from shards.errors import InputError
from shards.opening import open_shards
from shards.progress import progress
from shards.sampling import evenly_spaced
from shards.settings import usable_cpus
from shards.storage import UnreadableFrame
from shards.terminal import printable
from shards.untrusted import real_path

SIDE_PX = 16
MOST_FRAMES = 64
_BOX_PX = (64, 64)  # decoded size before shrinking, since libjpeg's own scaling is coarse
_LEAST_OVERLAP = 0.5  # of the shorter video
_COARSE_SHIFTS = 48
_FINE_SHIFTS = 4  # on each side of the best coarse shift
_UNLIKE = 0.6  # appearance below which no shift is tried

# Measured on HMDB51 clips (docs/retrieve.md): none of 4,600 pairs of clips from different sources
# has a motion above 0.49; altered copies with every frame stored have at least 0.95.
_COPY_APPEARANCE, _COPY_MOTION = 0.95, 0.9
_NEAR_APPEARANCE, _NEAR_MOTION = 0.75, 0.55
_OF_OWN_SMOOTHNESS = 0.95
_STILL_RMS = 1.0  # motion in gray levels (of 255) below which only noise is left to compare
_STILL_APPEARANCE = 0.998

COPY, NEAR = "copy", "near"


@dataclass(frozen=True)
class Fingerprint:
    """A video's frames as small gray images."""

    times: NDArray[np.float64]  # (F,) seconds from the first
    frames: NDArray[np.float32]  # (F, 256), 0 to 255

    def mirrored(self) -> Fingerprint:
        """The mirror image."""
        return Fingerprint(self.times, mirrored(self.frames))

    @property
    def seconds(self) -> float:
        """Seconds from the first frame to the last."""
        return float(self.times[-1])


class Match(NamedTuple):
    """How well two videos agree where they overlap best."""

    kind: str | None  # "copy", "near", or None for different videos
    mirrored: bool
    appearance: float  # mean correlation of frames, at most 1
    motion: float  # correlation of what changes, at most 1
    shift_seconds: float  # what b shows at time t, a shows at t + shift

    @property
    def score(self) -> float:
        """Sort key: confidence of the match."""
        return self.appearance + self.motion


NO_MATCH = Match(None, False, 0.0, 0.0, 0.0)


def fingerprint(jpegs: Sequence[bytes], times: Sequence[float]) -> Fingerprint | None:
    """Compute the fingerprint of stored frames at times in seconds; None if no frame decodes."""
    found = [
        (t, gray) for jpeg, t in zip(jpegs, times, strict=True) if (gray := _gray(jpeg)) is not None
    ]
    if not found:
        return None
    seconds = np.array([t for t, _ in found], dtype=np.float64)
    return Fingerprint(seconds - seconds[0], np.stack([gray for _, gray in found]))


def mirrored(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mirror (F, 256) frames left to right."""
    flipped = frames.reshape(-1, SIDE_PX, SIDE_PX)[:, :, ::-1]
    return flipped.reshape(len(frames), -1)


def picture_vector(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """(256,) search vector: the mean of (F, 256) frames, each scaled to mean 0 and length 1."""
    mean: NDArray[np.float32] = _normed(frames).mean(axis=0)
    return mean


def compare(a: Fingerprint, b: Fingerprint) -> Match:
    """Decide whether two videos are the same, perhaps mirrored, trimmed, resized or re-encoded.

    ``copy``: the same frames at the same times. ``near``: the same as far as frames stored this far
    apart can show, or clips of one scene with the same motion.
    """
    matches = [_best_shift(a, b), _best_shift(a, b.mirrored())._replace(mirrored=True)]
    best = max(matches, key=lambda match: match.score)
    return best._replace(kind=_judge(best, a, b))


def _judge(match: Match, a: Fingerprint, b: Fingerprint) -> str | None:
    if min(_motion_rms(a), _motion_rms(b)) < _STILL_RMS or min(len(a.frames), len(b.frames)) < 3:
        return NEAR if match.appearance >= _STILL_APPEARANCE else None
    if match.appearance >= _COPY_APPEARANCE and match.motion >= _COPY_MOTION:
        return COPY
    # Frames of a trimmed copy fall between those of the original, so they can agree only as well
    # as the original's frames agree with their neighbours.
    expected = _OF_OWN_SMOOTHNESS * min(_smoothness(a), _smoothness(b))
    wanted = min(_COPY_MOTION, max(_NEAR_MOTION, expected))
    alike = match.appearance >= _NEAR_APPEARANCE and match.motion >= wanted
    return NEAR if alike else None


def _best_shift(a: Fingerprint, b: Fingerprint) -> Match:
    """The match at the shift with the highest appearance + motion, searched coarse to fine."""
    pairs = _normed(a.frames) @ _normed(b.frames).T  # (Fa, Fb)
    of_shorter = pairs.max(axis=0 if b.seconds <= a.seconds else 1)
    if np.median(of_shorter) < _UNLIKE:
        return NO_MATCH
    shorter = min(a.seconds, b.seconds)
    low, high = _LEAST_OVERLAP * shorter - b.seconds, a.seconds - _LEAST_OVERLAP * shorter
    step = max(_spacing(a), _spacing(b), (high - low) / _COARSE_SHIFTS)
    if step <= 0:  # single frames
        return _agreement(a, b, 0.0)
    before, after = int(-low / step), int(high / step)
    best = max(
        (_agreement(a, b, number * step) for number in range(-before, after + 1)),
        key=lambda match: match.score,
    )
    for finer in (step / _FINE_SHIFTS, step / _FINE_SHIFTS**2):
        around = [best.shift_seconds + n * finer for n in range(-_FINE_SHIFTS, _FINE_SHIFTS + 1)]
        tried = [_agreement(a, b, shift) for shift in around if low <= shift <= high]
        best = max([best, *tried], key=lambda match: match.score)
    return best


def _agreement(a: Fingerprint, b: Fingerprint, shift: float) -> Match:
    """The match at one shift, over the frames of b that fall within a."""
    slack = 1e-6  # times are floats
    inside = (b.times + shift >= -slack) & (b.times + shift <= a.seconds + slack)
    if inside.sum() < min(3, len(a.frames), len(b.frames)):
        return NO_MATCH
    of_b = b.frames[inside]
    of_a = _at(a, b.times[inside] + shift)
    appearance = float((_normed(of_a) * _normed(of_b)).sum(axis=1).mean())
    return Match(None, False, appearance, _correlation(of_a, of_b), shift)


def _at(video: Fingerprint, times: NDArray[np.float64]) -> NDArray[np.float32]:
    """(T, 256) frames at any times, interpolated between neighbours."""
    if len(video.frames) == 1:
        return np.repeat(video.frames, len(times), axis=0)
    left = np.clip(np.searchsorted(video.times, times) - 1, 0, len(video.times) - 2)
    gap = np.maximum(video.times[left + 1] - video.times[left], 1e-9)
    share = np.clip((times - video.times[left]) / gap, 0, 1).astype(np.float32)[:, None]
    blended: NDArray[np.float32] = video.frames[left] * (1 - share) + video.frames[left + 1] * share
    return blended


def _smoothness(video: Fingerprint) -> float:
    """Motion correlation of frames with the means of their two neighbours."""
    if len(video.frames) < 5:
        return 0.0
    between = (video.frames[:-2] + video.frames[2:]) * np.float32(0.5)
    return _correlation(video.frames[1:-1], between)


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Correlation of two (F, 256) arrays after subtracting their means over time."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = float(np.sqrt((a * a).sum(dtype=np.float64) * (b * b).sum(dtype=np.float64)))
    return float((a * b).sum(dtype=np.float64)) / size if size > 0 else 0.0


def _motion_rms(video: Fingerprint) -> float:
    """RMS deviation from the mean frame, in gray levels."""
    moved = video.frames - video.frames.mean(axis=0)
    return float(np.sqrt((moved * moved).mean()))


def _spacing(video: Fingerprint) -> float:
    return float(np.diff(video.times).mean()) if len(video.times) > 1 else 0.0


def _normed(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale rows to mean 0 and length 1; uniform rows become 0."""
    centred = frames - frames.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(
        centred, length, out=np.zeros_like(centred), where=length > 1e-3
    )
    return unit


def _gray(jpeg: bytes) -> NDArray[np.float32] | None:
    picture = small_picture(jpeg, _BOX_PX)
    if picture is None:
        return None
    small = picture.convert("L").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1)


COLUMNS = (
    *("key", "split", "near_key", "near_split", "kind", "mirrored", "similarity"),
    *("appearance", "motion", "shift_seconds", "same_group"),
)
_UNVERIFIED = "unverified"
_LINES_SHOWN = 50


@dataclass(frozen=True)
class Pair:
    """Two videos of different splits that are or look the same."""

    key: str
    split: str
    near_key: str
    near_split: str
    similarity: float  # cosine of the features
    match: Match | None  # None if the frames were not compared
    same_group: bool = False  # such as two clips of one recording

    @property
    def kind(self) -> str:
        """The kind of match: ``copy``, ``near`` or ``unverified``."""
        return _UNVERIFIED if self.match is None else str(self.match.kind)

    @property
    def mirrored(self) -> bool:
        """Whether one is the mirror image of the other."""
        return self.match is not None and self.match.mirrored

    def row(self) -> list[str]:
        """The values of ``COLUMNS``."""
        told = [self.key, self.split, self.near_key, self.near_split, self.kind]
        told += ["yes" if self.mirrored else "", f"{self.similarity:.6f}"]
        numbers = [""] * 3
        if self.match is not None:
            measured = (self.match.appearance, self.match.motion, self.match.shift_seconds)
            numbers = [f"{number:.4f}" for number in measured]
        return [*told, *numbers, "yes" if self.same_group else ""]


@dataclass(frozen=True)
class Duplicates:
    """The pairs found, most certain first."""

    pairs: list[Pair]
    compared: int  # pairs of videos whose frames were compared
    unreadable: list[str]  # videos of which no frame decodes
    path: Path
    threshold: float | None  # of the cosine, if frames were not compared

    def table(self) -> str:
        """Lines for a terminal."""
        if self.threshold is not None:
            head = f"{len(self.pairs)} pairs across splits with a cosine ≥ {self.threshold:g}"
        else:
            head = (
                f"{len(self.pairs)} pairs across splits show the same or nearly the same video "
                f"({self.compared} compared frame by frame)"
            )
        together = sum(pair.same_group for pair in self.pairs)
        if together:
            head += (
                f"; {together} of them are of one group, such as clips of one recording: "
                "a split by groups, such as held-out, keeps these together"
            )
        lines = [
            f"  {pair.kind}{', mirrored' if pair.mirrored else ''}"
            f"{', same group' if pair.same_group else ''}  "
            f"{pair.split}: {pair.key}   {pair.near_split}: {pair.near_key}"
            for pair in self.pairs[:_LINES_SHOWN]
        ]
        if len(self.pairs) > _LINES_SHOWN:
            lines.append(f"  … the full list is in {self.path}")
        if self.unreadable:
            first = self.unreadable[0]
            lines.append(f"{len(self.unreadable)} videos have no readable frame, such as {first}")
        return "\n".join([head, *map(printable, lines)])


def write_pairs(found: Duplicates) -> None:
    """Write ``duplicates.csv``, one row per pair.

    Raises:
        InputError: the file cannot be written.
    """
    text = csv_text([COLUMNS, *(pair.row() for pair in found.pairs)])
    write_text(found.path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


_FRAMES_TO_SEARCH = 3
_KEPT = 20_000  # fingerprints of at most 64 kB
_AT_ONCE = 4096  # videos or comparisons handed to the threads


@dataclass(frozen=True)
class Group:
    """One side: a feature folder, or its rows with one value of the split."""

    name: str
    features: Features
    rows: NDArray[np.int64]

    def vectors(self) -> FeatureMatrix:
        """The features as unit vectors."""
        return unit_vectors(self.features.features, self.rows)

    def key(self, position: int) -> str:
        """The key of the video at a position."""
        return self.features.keys[int(self.rows[position])]

    def group(self, position: int) -> str:
        """The group of the video at a position, its key if it has none."""
        return self._groups[int(self.rows[position])]

    @cached_property
    def _groups(self) -> list[str]:
        return video_groups(self.features)[0]


class FrameReader:
    """Reads stored frames of both sides, by group and key."""

    def __init__(self, config: DuplicatesConfig, groups: Sequence[Group]) -> None:
        self._shards: dict[str, ShardSet] = {}
        opened: dict[tuple[str, ...], ShardSet] = {}
        for group in groups:
            spec = config.shards or tuple(group.features.meta.get("shards", ()))
            if spec not in opened:
                opened[spec] = _open(spec)
            self._shards[group.name] = opened[spec]
        self._unreadable: dict[str, None] = {}
        #: (group, key) to fingerprint; None if no frame decodes.
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
        """Read evenly spaced stored frames, in time order."""
        return frames_of(self._shards[group])(key, count)

    def picture_vectors(self, group: Group) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(N, 256) search vectors of videos and of their mirror images; 0 if unreadable."""
        made, flipped = [], []
        with progress(f"Reading {group.name}", len(group.rows), "videos") as shown:
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
        if len(times) != shards.frame_count(video):  # other tools' tars have none
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
            error.what, error.where, "give the shards with --shards, or use --features-only"
        ) from error


MOST_SHOWN = 200  # pairs; about 60 kB each
_FRAMES = 4

# (group, key, count) to JPEG bytes in time order.
FramesOfGroup = Callable[[str, str, int], list[bytes]]


def render_duplicates_page(found: Duplicates, frames_of: FramesOfGroup) -> str:
    """The page as self-contained HTML.

    Args:
        frames_of: returns the frames to show.
    """
    pairs = [
        {
            "kind": pair.kind,
            "mirrored": pair.mirrored,
            "same_group": pair.same_group,
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
    """Find near-duplicates between values of the split, or between two folders.

    Writes ``duplicates.csv`` and, with ``config.html``, a page of pictures.

    Raises:
        InputError: the feature folders cannot be used, there are not two splits to compare, or the
            shards cannot be opened.
    """
    if config.candidates < 1 or (config.workers is not None and config.workers < 1):
        raise InputError("must be 1 or more", "--candidates, --workers")
    if not -1 <= config.threshold <= 1:
        raise InputError("must be a cosine, from -1 to 1", "--threshold")
    out = Path(config.out or config.features)
    for folder in (out, *([Path(config.html).parent] if config.html is not None else [])):
        require_writable(folder)  # before anything slow
    groups = _groups(config)
    if config.features_only and config.html is not None:
        raise InputError("needs frames", "--html", "remove --features-only")
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
    """The pairs whose frames agree, and the number of pairs compared."""
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
    """Positions (in b, in a) of pairs whose frames to compare, in the order of b."""
    of_a, _ = videos.picture_vectors(a)
    of_b, of_b_mirrored = videos.picture_vectors(b)
    # An encoder may not place a video near its mirror image, nor an untrained one near its copy,
    # so candidates are searched by picture, too.
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
        Pair(
            *(b.key(i), b.name, a.key(found[i, j]), a.name, float(cosines[i, j]), None),
            same_group=b.group(i) == a.group(found[i, j]),
        )
        for i, j in np.argwhere(cosines >= config.threshold).tolist()
    ]


def _pair(a: Group, b: Group, pair: tuple[int, int], match: Match) -> Pair:
    of_b, of_a = (
        group.vectors().take(np.array([position]))[0]
        for group, position in ((b, pair[0]), (a, pair[1]))
    )
    return Pair(
        *(b.key(pair[0]), b.name, a.key(pair[1]), a.name, float(of_b @ of_a), match),
        same_group=b.group(pair[0]) == a.group(pair[1]),
    )


def _surest_first(pair: Pair) -> tuple[float, str, str]:
    score = pair.match.score if pair.match is not None else 0.0
    return -score, pair.key, pair.near_key


def _groups(config: DuplicatesConfig) -> list[Group]:
    features = read_features(config.features)
    if config.test_features is not None:
        other = read_features(config.test_features)
        require_same_encoder(features, other)
        names = [real_path(f.folder).name for f in (features, other)]
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
        raise InputError("has fewer than two splits", features.folder, "give --test-features")
    return [Group(value, features, np.flatnonzero(values == value)) for value in named]
