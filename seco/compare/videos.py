"""Which videos are compared, and in which groups they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seco.compare.config import CompareConfig
from seco.compare.encoders import Compared
from seco.evaluation.groups import video_groups
from seco.evaluation.splits import TrainTest, held_out, train_test
from seco.features.store import UNLABELLED, Features

TEST_SHARE = 0.3  # of each class, where a dataset has labels and no splits
_NAMED = 3

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ComparedVideos:
    """Rows of the first encoder's folders; those of the others follow from their orders.

    Args:
        labelled: training and test rows; None where only measures without labels are possible.
        train_groups: (N,) of the training rows.
        test_groups: (M,) of the test rows.
        all_rows: the rows of the test folder that are measured without labels, test videos or not.
        all_groups: (A,) of them.
        kind: what the groups are, in words.
    """

    labelled: TrainTest | None
    train_groups: list[str]
    test_groups: list[str]
    all_rows: Rows
    all_groups: list[str]
    kind: str

    def of(self, encoder: Compared) -> TrainTest:
        """The labelled rows in an encoder's own folders."""
        assert self.labelled is not None
        return dataclasses.replace(
            self.labelled,
            train=encoder.train,
            train_rows=encoder.train_order[self.labelled.train_rows],
            test=encoder.test,
            test_rows=encoder.test_order[self.labelled.test_rows],
        )


def choose_videos(
    encoders: Sequence[Compared], config: CompareConfig, notes: list[str]
) -> ComparedVideos:
    """The videos whose features are finite for all encoders, by the split.

    Args:
        notes: what a reader should know is added.

    Raises:
        InputError: the split has no training or test rows.
    """
    first = encoders[0]
    apart = first.train is not first.test
    train = _finite([(e.train, e.train_order) for e in encoders])
    test = _finite([(e.test, e.test_order) for e in encoders]) if apart else train
    if left_out := int((~train).sum()) + (int((~test).sum()) if apart else 0):
        notes.append(
            f"{left_out} videos with features that are not finite are left out for all encoders"
        )
    labelled = _labelled(first, config, train, test, notes)
    train_groups, _ = video_groups(first.train)
    test_groups, kind = video_groups(first.test)
    all_rows = np.flatnonzero(test)
    found = ComparedVideos(
        labelled=labelled,
        train_groups=[train_groups[row] for row in labelled.train_rows] if labelled else [],
        test_groups=[test_groups[row] for row in labelled.test_rows] if labelled else [],
        all_rows=all_rows,
        all_groups=[test_groups[row] for row in all_rows],
        kind=kind,
    )
    if both := sorted(set(found.train_groups) & set(found.test_groups)):
        named = ", ".join(both[:_NAMED]) + (", …" if len(both) > _NAMED else "")
        notes.append(
            f"{len(both)} groups have training and test videos ({named}): all accuracies are too "
            "high"
        )
    return found


def _labelled(
    first: Compared,
    config: CompareConfig,
    train_usable: NDArray[np.bool_],
    test_usable: NDArray[np.bool_],
    notes: list[str],
) -> TrainTest | None:
    train, test = first.train, first.test
    only = "only what needs no labels is measured"
    if (train.labels == UNLABELLED).all() or (test.labels == UNLABELLED).all():
        notes.append(f"the videos have no labels: {only}")
        return None
    drawn = train is test and not train.splits
    if drawn:
        rows = _drawn_split(train)
        notes.append(
            f"the videos have no splits: {TEST_SHARE:.0%} of each class are tested, drawn as "
            f"{video_groups(train)[1]}"
        )
    else:
        rows = train_test(train, test, config.split, config.train_split, config.test_split)
    rows = dataclasses.replace(
        rows,
        train_rows=rows.train_rows[train_usable[rows.train_rows]],
        test_rows=rows.test_rows[test_usable[rows.test_rows]],
    )
    if not len(rows.test_rows) or len(np.unique(rows.train_labels)) < 2:
        notes.append(f"training videos of two classes and test videos are needed: {only}")
        return None
    notes += rows.notes()
    return rows


def _finite(folders: Sequence[tuple[Features, Rows]]) -> NDArray[np.bool_]:
    """(V,) whether a video's vectors are finite in all folders; in the first one's order."""
    usable = np.ones(len(folders[0][0]), dtype=bool)
    for features, order in folders:
        for array in (features.features, features.halves):
            finite = np.isfinite(array.reshape(len(array), -1))
            usable &= np.all(finite[order], axis=1)
    return usable


def _drawn_split(features: Features) -> TrainTest:
    """A test part of every class, groups whole, for a dataset that has no splits."""
    labelled = np.flatnonzero(features.labels != UNLABELLED)
    groups, _ = video_groups(features)
    outside = held_out(features.labels[labelled], [groups[row] for row in labelled], TEST_SHARE)
    return TrainTest(
        train=features,
        train_rows=labelled[~outside],
        train_split="the rest",
        test=features,
        test_rows=labelled[outside],
        test_split="a drawn part",
        unlabelled=len(features) - len(labelled),
    )
