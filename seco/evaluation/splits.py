"""What an evaluation trains on and tests on: rows of one feature folder, or of two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from seco.data.splits import (
    NAMED,
    UNLABELLED,
    choose_split,
    held_out,
    labelled_rows,
    no_rows,
    recordings,
    split_notes,
)
from seco.features.store import Features, read_features, require_same_encoder
from shards.errors import InputError

GROUPS, RECORDINGS, SINGLE_VIDEOS = "groups", "recordings", "single videos"
HELD_OUT = "held-out"  # a split made here, for videos without one
TEST_SHARE = 0.3  # of each class
_TEST_VALUES = ("test", "val")  # the test videos of Kinetics and ActivityNet have no public labels


def video_groups(features: Features) -> tuple[list[str], str]:
    """The group of each video (V,), and what the groups are in words.

    Taken, in this order, from the column ``group`` of ``videos.csv`` (a video with an empty field
    is its own group), the recordings in the file names of UCF101 and HMDB51, the videos themselves.
    """
    if features.groups is not None and any(features.groups):
        pairs = zip(features.groups, features.keys, strict=True)
        return [group or key for group, key in pairs], GROUPS
    found = recordings(features.sources, features.label_names)
    return (features.keys, SINGLE_VIDEOS) if found is None else (found, RECORDINGS)


@dataclass(frozen=True)
class TrainTest:
    """Training and test rows of one or two feature folders, without ``unlabelled`` rows."""

    train: Features
    train_rows: NDArray[np.int64]
    train_split: str  # such as "1 train"; "all" if the folder has no splits
    test: Features
    test_rows: NDArray[np.int64]
    test_split: str
    unlabelled: int

    @property
    def train_labels(self) -> NDArray[np.int64]:
        """(N,) labels of the training rows."""
        return self.train.labels[self.train_rows]

    @property
    def test_labels(self) -> NDArray[np.int64]:
        """(M,) labels of the test rows."""
        return self.test.labels[self.test_rows]

    def class_name(self, label: int) -> str:
        """The label's name, or its number if it has none."""
        return self._names.get(label, str(label))

    @cached_property
    def _names(self) -> dict[int, str]:
        return self.train.class_names() | self.test.class_names()

    def notes(self) -> list[str]:
        """Notes for readers of the metrics."""
        found = split_notes(self.unlabelled, self.train_labels, self.test_labels, self.class_name)
        train, test = (
            {groups[row] for row in rows.tolist()}
            for groups, rows in (
                (video_groups(self.train)[0], self.train_rows),
                (video_groups(self.test)[0], self.test_rows),
            )
        )
        if both := sorted(train & test):
            named = ", ".join(both[:NAMED]) + (", ..." if len(both) > NAMED else "")
            by_name = self.train is not self.test  # both were prepared on their own
            found.append(
                f"{len(both)} groups have training and test videos ({named}): all accuracies are "
                f"too high{', unless these are others of the same name' if by_name else ''}"
            )
        return found


def read_train_test(
    folder: str,
    test_folder: str | None = None,
    split: str | None = None,
    train_value: str = "train",
    test_value: str | None = None,
) -> TrainTest:
    """Open the feature folder(s) and choose the rows.

    Args:
        test_folder: folder of the test rows; by default ``folder``.
        split: the split's name; by default "1", else "official", else the only one. "held-out"
            tests on 30 % of the labelled videos, in whole recordings.
        train_value: the split's value of training rows.
        test_value: that of test rows; by default "test", or "val" if no test row has a label.

    Raises:
        InputError: a folder cannot be used, no row is left, two folders do not match, or a video
            would be in both training and test rows.
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
    """Choose the rows of open folders; ``test`` may be ``train`` itself.

    Raises:
        InputError: as in :func:`read_train_test`.
    """
    if test is not train:
        require_same_encoder(train, test)
        if train.features.shape[1] != test.features.shape[1]:
            raise InputError(
                f"has {test.features.shape[1]} values per video, {train.folder} has "
                f"{train.features.shape[1]}",
                test.folder,
                "extract both with the same checkpoint",
            )
        _require_same_labels(train, test)
    elif split == HELD_OUT and HELD_OUT not in train.splits:
        if not (train.labels >= 0).any():
            raise InputError("the videos have no labels", train.folder, "prepare them with labels")
        drawn = held_out_split(train)
        if not len(drawn.test_rows):
            raise InputError(
                "no labelled video can be held out",
                train.folder,
                "each class needs two videos from two recordings",
            )
        return drawn
    train_name = choose_split(train, split)
    test_name = train_name
    if test is not train:
        test_name = choose_split(test, split if test.splits else None)
    elif train_name is None:
        raise InputError(
            "has no splits",
            train.folder,
            "give a folder of test videos with --test-features, or use --split held-out to test "
            "on 30 % of these",
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


def held_out_split(features: Features) -> TrainTest:
    """A deterministic split that tests on about 30 % of every class, in whole recordings."""
    labelled = np.flatnonzero(features.labels != UNLABELLED)
    groups, _ = video_groups(features)
    outside = held_out(features.labels[labelled], [groups[row] for row in labelled], TEST_SHARE)
    return TrainTest(
        train=features,
        train_rows=labelled[~outside],
        train_split=f"{HELD_OUT} train",
        test=features,
        test_rows=labelled[outside],
        test_split=f"{HELD_OUT} test",
        unlabelled=len(features) - len(labelled),
    )


def _require_apart(
    train: Features, train_rows: NDArray[np.int64], test: Features, test_rows: NDArray[np.int64]
) -> None:
    """Refuse overlapping training and test rows.

    Separate datasets may share keys by chance, so features must be equal, too.
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
        some = ", ".join(both[:NAMED]) + (", ..." if len(both) > NAMED else "")
        raise InputError(
            f"{len(both)} videos are in both train and test ({some})",
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
                "prepare both datasets with the same annotations",
            )
