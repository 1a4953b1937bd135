"""Which labelled videos an evaluation trains on and which it tests on.

Which videos come from one recording: clips of one are near-copies and not independent.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from seco.features.store import UNLABELLED, Features, read_features, require_same_encoder
from shards.errors import InputError

GROUPS, RECORDINGS, SINGLE_VIDEOS = "groups", "recordings", "single videos"
_UCF101 = re.compile(r"(v_.+_g\d+)_c\d+", re.I)
_HMDB51 = re.compile(r"(.+)_[a-z]{1,2}_(?:cm|nm)_np\d+_[a-z]{2}_[a-z]{3}_\d+", re.I)


def video_groups(features: Features) -> tuple[list[str], str]:
    """The group of each video (V,), and in words what the groups are.

    In this order: the column ``group`` of ``videos.csv`` (a video without one is its own group),
    the recordings that the file names of UCF101 and HMDB51 tell, the videos themselves.
    """
    if features.groups is not None and any(features.groups):
        pairs = zip(features.groups, features.keys, strict=True)
        return [group or key for group, key in pairs], GROUPS
    found = recordings(features.sources, features.label_names)
    return (features.keys, SINGLE_VIDEOS) if found is None else (found, RECORDINGS)


def recordings(sources: Sequence[str], class_names: Sequence[str]) -> list[str] | None:
    """The recording of each video, or None where not all file names tell it.

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


HELD_OUT_SHARE = 0.2
_NAMED = 5
_TEST_VALUES = ("test", "val")  # the test sets of Kinetics and ActivityNet have no public labels


class Labelled(Protocol):
    """Videos with labels and splits: a feature folder's or those of shards."""

    @property
    def folder(self) -> object:
        """Where they are, for messages."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(V,) UNLABELLED for none."""

    @property
    def splits(self) -> Mapping[str, Sequence[str | None]]:
        """For each split name, (V,) values."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class TrainTest:
    """Rows of one feature folder, or of two; ``unlabelled`` rows of the splits are left out."""

    train: Features
    train_rows: NDArray[np.int64]
    train_split: str  # "1 train", or "all" where the folder has no splits
    test: Features
    test_rows: NDArray[np.int64]
    test_split: str
    unlabelled: int

    @property
    def train_labels(self) -> NDArray[np.int64]:
        """(N,) labels to train on."""
        return self.train.labels[self.train_rows]

    @property
    def test_labels(self) -> NDArray[np.int64]:
        """(M,) labels to test on."""
        return self.test.labels[self.test_rows]

    def class_name(self, label: int) -> str:
        """The label's name, or its number where it has none."""
        return self._names.get(label, str(label))

    @cached_property
    def _names(self) -> dict[int, str]:
        return self.train.class_names() | self.test.class_names()

    def notes(self) -> list[str]:
        """What a reader of the figures should know."""
        return split_notes(self.unlabelled, self.train_labels, self.test_labels, self.class_name)


def split_notes(
    unlabelled: int,
    train_labels: NDArray[np.int64],
    test_labels: NDArray[np.int64],
    class_name: Callable[[int], str],
) -> list[str]:
    """What a reader of an evaluation's figures should know of its videos."""
    notes = []
    if unlabelled:
        notes.append(f"{unlabelled} videos without a label are left out")
    unknown = set(test_labels.tolist()) - set(train_labels.tolist())
    if unknown:
        videos = int(np.isin(test_labels, list(unknown)).sum())
        names = sorted(class_name(label) for label in unknown)
        some = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        notes.append(
            f"{len(unknown)} classes have no training video ({some}); their {videos} test "
            "videos are counted as wrong"
        )
    return notes


def read_train_test(
    folder: str,
    test_folder: str | None = None,
    split: str | None = None,
    train_value: str = "train",
    test_value: str | None = None,
) -> TrainTest:
    """Open the feature folder(s) and choose the rows.

    Args:
        test_folder: where the test rows are, if not in ``folder``.
        split: the split's name; by default "1", else "official", else the only one.
        train_value: rows of the split to train on.
        test_value: rows to test on; by default "test", or "val" where test has no labelled row.

    Raises:
        InputError: a folder cannot be used, no row is left, two folders do not go together, or a
            video would be trained on and tested.
    """
    train = read_features(folder)
    test = train if test_folder is None else read_features(test_folder)
    return train_test(train, test, split, train_value, test_value)


def train_test(
    train: Features,
    test: Features,
    split: str | None = None,
    train_value: str = "train",
    test_value: str | None = None,
) -> TrainTest:
    """The same for open folders; ``test`` may be ``train`` itself.

    Raises:
        InputError: as :func:`read_train_test`.
    """
    if test is not train:
        require_same_encoder(train, test)
        if train.features.shape[1] != test.features.shape[1]:
            raise InputError(
                f"has {test.features.shape[1]} values a video, and {train.folder} has "
                f"{train.features.shape[1]}",
                test.folder,
                "extract both with the same checkpoint",
            )
        _require_same_labels(train, test)
    train_name = choose_split(train, split)
    test_name = train_name
    if test is not train:
        test_name = choose_split(test, split if test.splits else None)
    elif train_name is None:
        raise InputError(
            "has no splits", train.folder, "give the test videos' folder with --test-features"
        )
    train_rows, train_unlabelled = labelled_rows(train, train_name, train_value)
    values = (test_value,) if test_value is not None else _TEST_VALUES
    found = [labelled_rows(test, test_name, value) for value in values]
    chosen = next((n for n, (rows, _) in enumerate(found) if len(rows)), 0)
    test_rows, test_unlabelled = found[chosen]
    for features, name, wanted, rows in (
        (train, train_name, train_value, train_rows),
        (test, test_name, " or ".join(values), test_rows),
    ):
        if not len(rows):
            raise no_rows(features, name, wanted)
    _require_apart(train, train_rows, test, test_rows)
    return TrainTest(
        train=train,
        train_rows=train_rows,
        train_split="all" if train_name is None else f"{train_name} {train_value}",
        test=test,
        test_rows=test_rows,
        test_split="all" if test_name is None else f"{test_name} {values[chosen]}",
        unlabelled=train_unlabelled + test_unlabelled,
    )


def choose_split(features: Labelled, wanted: str | None) -> str | None:
    """The split's name; None where the folder has no splits.

    Raises:
        InputError: it has no such split, or several and none is the obvious one.
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
    """The one that is taken where none is named: "1", else "official", else the only one."""
    names = list(features.splits)
    for name in ("1", "official"):
        if name in names:
            return name
    return names[0] if len(names) == 1 else None


def labelled_rows(
    features: Labelled, split: str | None, value: str
) -> tuple[NDArray[np.int64], int]:
    """The labelled rows of a split's value, and how many others have no label."""
    inside = np.ones(len(features), dtype=bool)
    if split is not None:
        inside = np.array([given == value for given in features.splits[split]], dtype=bool)
    labelled = features.labels != UNLABELLED
    return np.flatnonzero(inside & labelled), int((inside & ~labelled).sum())


def no_rows(features: Labelled, split: str | None, value: str) -> InputError:
    """What is said where a split has no labelled row of a value."""
    return InputError(
        f"has no labelled {value} rows", features.folder, _what_there_is(features, split)
    )


def _what_there_is(features: Labelled, chosen: str | None) -> str:
    """The splits, their values and labelled rows, for a message."""
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


def _require_apart(
    train: Features, train_rows: NDArray[np.int64], test: Features, test_rows: NDArray[np.int64]
) -> None:
    """Refuse to test on what was trained on.

    Sets of their own may have equal keys by chance: a video is the same when its features are, too.
    """
    tested = {test.keys[row]: row for row in test_rows.tolist()}
    both = [
        train.keys[row]
        for row in train_rows.tolist()
        if (other := tested.get(train.keys[row])) is not None
        and (
            (train is test and row == other)
            or np.array_equal(train.features[row], test.features[other])
        )
    ]
    if both:
        some = ", ".join(both[:_NAMED]) + (", ..." if len(both) > _NAMED else "")
        raise InputError(
            f"{len(both)} videos would be trained on and tested ({some})",
            train.folder if train is test else test.folder,
            "choose other rows with --train-split, --test-split or --test-features",
        )


def _require_same_labels(train: Features, test: Features) -> None:
    names = train.class_names()
    for label, name in test.class_names().items():
        if names.get(label, name) != name:
            raise InputError(
                f"label {label} is {name!r} here and {names[label]!r} in {train.folder}",
                test.folder,
                "prepare both sets with the same annotations",
            )


def held_out(
    labels: NDArray[np.int64], groups: Sequence[str], share: float = HELD_OUT_SHARE
) -> NDArray[np.bool_]:
    """(N,) whether a training row is held out, to choose a setting such as C on it.

    About ``share`` of every class is, groups whole.

    Clips cut from one recording are near-copies: a part that held some clips of a recording whose
    others are trained on would favour whatever memorises.

    Groups are taken in an order of their names' digests, so that the same videos give the same part
    wherever their rows are. A group that would take more than its share of any of its classes is
    left in training; so is a class of one video.
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
