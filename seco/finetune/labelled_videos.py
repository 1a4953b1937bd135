"""The labelled videos of shards that fine-tuning trains on and is tested on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from seco.evaluation.splits import choose_split, labelled_rows, no_rows
from shards.access import UnreadableFrame
from shards.errors import InputError
from shards.opening import open_shards

_TEST = "test"


class LabelledVideos:
    """The videos of a set and one of its splits.

    Args:
        spec: of the shards.
        split: its name; None: the set's only, or first, one.

    Attributes:
        shards: the set.
        folder: its first shard, for messages.
        labels: (V,) -1 for none.
        train: (N,) numbers of the labelled training videos.
        test: (M,) numbers of the labelled test videos.
        empty: labelled training videos that are left out because they have no frame.
        unlabelled: videos of the split that have no label.

    Raises:
        InputError: the shards cannot be used, or have no such split or no labels.
    """

    def __init__(self, spec: str | Iterable[str], split: str | None) -> None:
        self.shards = open_shards(spec)
        self.folder = self.shards.addresses[0]
        self.labels: NDArray[np.int64] = self.shards.labels.astype(np.int64)
        self.splits = self.shards.splits
        name = choose_split(self, split)
        if name is None:
            raise InputError("has no splits", self.folder, "prepare it with its official lists")
        self.split = name
        train, without = labelled_rows(self, name, "train")
        self.train = train[self.shards.frame_counts[train] > 0]
        self.empty = len(train) - len(self.train)
        self.test, also = labelled_rows(self, name, _TEST)
        self.unlabelled = without + also

    def __len__(self) -> int:
        return len(self.labels)

    def require(self, value: str) -> None:
        """Refuse a split without ``train`` or ``test`` videos.

        Raises:
            InputError: there are none.
        """
        if not len(self.test if value == _TEST else self.train):
            raise no_rows(self, self.split, value)

    @cached_property
    def dataset(self) -> str:
        """The set's name as its records have it."""
        for video in range(len(self)):
            try:
                return self.shards.record(video).dataset or self.shards.name
            except UnreadableFrame:
                continue  # the next one says the same
        return self.shards.name

    def class_name(self, label: int) -> str:
        """The label's name, or its number where it has none."""
        names = self.shards.label_names
        return names[label] if 0 <= label < len(names) else str(label)

    def digest(self) -> str:
        """Of the training videos: equal for the same ones, however they are cut into shards."""
        whole = hashlib.sha256(f"{self.split}\n".encode())
        for video in self.train.tolist():
            row = (self.shards.key(video), int(self.labels[video]), self.shards.frame_count(video))
            whole.update(repr(row).encode("utf-8", "surrogateescape"))
        return whole.hexdigest()
