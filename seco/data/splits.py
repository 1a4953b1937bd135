"""Labels and splits of videos, in shards or in features: which rows an evaluation may use."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError

UNLABELLED = -1  # label of a video without one
_UCF101 = re.compile(r"(v_.+_g\d+)_c\d+", re.I)
_HMDB51 = re.compile(r"(.+)_[a-z]{1,2}_(?:cm|nm)_np\d+_[a-z]{2}_[a-z]{3}_\d+", re.I)
HELD_OUT_SHARE = 0.2
NAMED = 5


def recordings(sources: Sequence[str], class_names: Sequence[str]) -> list[str] | None:
    """Return the recording of each video, or None unless all file names identify one.

    UCF101's names are ``v_<Class>_g<group>_c<clip>``, HMDB51's ``<film>_<class>_<tags>_<clip>``.

    Args:
        sources: paths of the videos.
        class_names: the class of each.
    """
    found = []
    for source, name in zip(sources, class_names, strict=True):
        stem = PurePosixPath(source).stem
        if match := _UCF101.fullmatch(stem):
            found.append(match[1].lower())
        elif match := _HMDB51.fullmatch(stem):
            found.append(match[1].lower().removesuffix(f"_{name.lower()}"))
        else:
            return None
    return found


class Labelled(Protocol):
    """Videos with labels and splits, of a feature folder or of shards."""

    @property
    def folder(self) -> object:
        """Their location, for messages."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(V,) labels; UNLABELLED for none."""

    @property
    def splits(self) -> Mapping[str, Sequence[str | None]]:
        """(V,) values by split name."""

    def __len__(self) -> int: ...


def split_notes(
    unlabelled: int,
    train_labels: NDArray[np.int64],
    test_labels: NDArray[np.int64],
    class_name: Callable[[int], str],
) -> list[str]:
    """Notes on the videos for readers of an evaluation's metrics."""
    notes = []
    if unlabelled:
        notes.append(f"{unlabelled} videos without a label are left out")
    unknown = set(test_labels.tolist()) - set(train_labels.tolist())
    if unknown:
        videos = int(np.isin(test_labels, list(unknown)).sum())
        names = sorted(class_name(label) for label in unknown)
        some = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
        notes.append(
            f"{len(unknown)} classes have no training video ({some}); their {videos} test "
            "videos are counted as wrong"
        )
    return notes


def choose_split(features: Labelled, wanted: str | None) -> str | None:
    """Return the split's name; None if there are no splits.

    Raises:
        InputError: there is no such split, or there are several and no default.
    """
    names = list(features.splits)
    there = f"it has: {', '.join(names)}" if names else "it has no splits"
    if wanted is not None:
        if wanted not in names:
            raise InputError(f"has no split {wanted!r}", features.folder, there)
        return wanted
    usual = usual_split(features)
    if usual is None and names:
        raise InputError("has several splits", features.folder, f"choose with --split; {there}")
    return usual


def usual_split(features: Labelled) -> str | None:
    """Return the default split: "1", else "official", else the only one."""
    names = list(features.splits)
    for name in ("1", "official"):
        if name in names:
            return name
    return names[0] if len(names) == 1 else None


def labelled_rows(
    features: Labelled, split: str | None, value: str
) -> tuple[NDArray[np.int64], int]:
    """Return the labelled rows of a split's value, and the number of its unlabelled rows."""
    inside = np.ones(len(features), dtype=bool)
    if split is not None:
        inside = np.array([given == value for given in features.splits[split]], dtype=bool)
    labelled = features.labels != UNLABELLED
    return np.flatnonzero(inside & labelled), int((inside & ~labelled).sum())


def no_rows(features: Labelled, split: str | None, value: str) -> InputError:
    """The error for a split that has no labelled row of a value."""
    return InputError(
        f"has no labelled {value} rows", features.folder, _what_there_is(features, split)
    )


def _what_there_is(features: Labelled, chosen: str | None) -> str:
    """The splits, their values and numbers of labelled rows, for a message."""
    labelled = features.labels != UNLABELLED
    if chosen is None:
        return f"it has {int(labelled.sum())} labelled of {len(features)} videos and no splits"
    parts = []
    for name, values in features.splits.items():
        counts = [
            f"{value} {sum(v == value and bool(t) for v, t in zip(values, labelled, strict=True))}"
            for value in sorted({v for v in values if v})
        ]
        parts.append(f"split {name}: {', '.join(counts) or 'nothing'}")
    return "labelled rows there are, " + "; ".join(parts)


def held_out(
    labels: NDArray[np.int64], groups: Sequence[str], share: float = HELD_OUT_SHARE
) -> NDArray[np.bool_]:
    """Choose training rows to hold out, for tuning a setting such as C: (N,) bool.

    Holds out about ``share`` of every class, in whole groups: clips cut from one recording are
    near-duplicates, and holding out some of them while training on others would favour
    memorisation.

    Groups are considered in the order of their names' digests, so that the same videos give the
    same rows in any order. A group that would exceed the share of any of its classes stays in
    training; so does a class of one video.
    """
    sizes = Counter(labels.tolist())
    room = {label: min(int(np.ceil(share * n)), n - 1) for label, n in sizes.items()}
    members: defaultdict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    out = np.zeros(len(labels), dtype=bool)
    for group in sorted(members, key=lambda g: hashlib.sha256(g.encode()).digest()):
        rows = members[group]
        wanted = Counter(labels[rows].tolist())
        if all(n <= room[label] for label, n in wanted.items()):
            out[rows] = True
            for label, n in wanted.items():
                room[label] -= n
    return out
