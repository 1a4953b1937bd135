"""``seco retrieve duplicates``: the same video, or nearly, on both sides of a split.

Candidates come cheaply and too many, from features and from small pictures; frames decide
(:mod:`seco.retrieve.fingerprints`).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from seco.evaluation.splits import choose_split
from seco.features.matrix import FeatureMatrix, unit_vectors
from seco.features.store import read_features, require_same_encoder
from seco.retrieve.config import DuplicatesConfig
from seco.retrieve.duplicate_frames import FrameReader, Group
from seco.retrieve.duplicate_records import Duplicates, Pair, write_pairs
from seco.retrieve.duplicates_page import render_duplicates_page
from seco.retrieve.fingerprints import Match, compare
from seco.retrieve.nearest import ExactIndex, NearestIndex
from shards.atomic import require_writable, write_text
from shards.errors import InputError
from shards.progress import progress

RESULT = "duplicates.csv"
_AT_ONCE = 4096  # comparisons handed to the threads


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
