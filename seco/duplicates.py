"""``seco retrieve duplicates``: videos of different splits that are nearly the same."""

from __future__ import annotations

import csv
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seco.eval_config import RetrieveConfig
from seco.eval_splits import choose_split
from seco.feature_store import Features, read_features, require_same_encoder
from seco.nearest import build_index, search
from seco.pages import printable
from shards.atomic import write_text
from shards.errors import InputError

RESULT = "duplicates.csv"
_DUPLICATES_OF_ONE = 10


@dataclass(frozen=True)
class Duplicates:
    """Pairs of videos of different splits that are nearly the same: (key, split, key, split, s)."""

    pairs: list[tuple[str, str, str, str, float]]
    threshold: float

    def table(self) -> str:
        """The pairs as lines for a terminal."""
        head = f"{len(self.pairs)} pairs across splits with a cosine of {self.threshold:g} or more"
        lines = [
            f"  {s:.4f}  {a_split}: {a}   {b_split}: {b}"
            for a, a_split, b, b_split, s in self.pairs
        ]
        return "\n".join([head, *map(printable, lines)])


def duplicates(config: RetrieveConfig) -> Duplicates:
    """Near-duplicates between different values of the split, or between two folders.

    At most 10 for each video of the later value. Writes ``duplicates.csv``.

    Raises:
        InputError: the feature folders cannot be used, or there are no two splits.
    """
    features = read_features(config.features)
    groups: list[tuple[str, Features, NDArray[np.int64]]] = []
    if config.test_features is not None:
        other = read_features(config.test_features)
        require_same_encoder(features, other)
        groups = [(f.folder.name, f, np.arange(len(f))) for f in (features, other)]
    else:
        split = choose_split(features, config.split)
        values = np.array(features.splits[split] if split is not None else [""] * len(features))
        named = sorted(set(values.tolist()) - {"", "unused"})
        groups = [(value, features, np.flatnonzero(values == value)) for value in named]
    if len(groups) < 2:
        raise InputError("has no two splits to compare", features.folder, "give --test-features")
    pairs = []
    for (a_name, a, a_rows), (b_name, b, b_rows) in itertools.combinations(groups, 2):
        index = build_index(a.features[a_rows], config.ivfpq_above)
        similarity, found = search(
            index, b.features[b_rows], _DUPLICATES_OF_ONE, config.device, "duplicates"
        )
        for i, j in np.argwhere((similarity >= config.threshold) & (found >= 0)).tolist():
            near = a.keys[a_rows[found[i, j]]]
            pairs.append((b.keys[b_rows[i]], b_name, near, a_name, float(similarity[i, j])))
    pairs.sort(key=lambda pair: (-pair[4], pair))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("key", "split", "near_key", "near_split", "similarity"))
    writer.writerows((*pair[:4], f"{pair[4]:.6f}") for pair in pairs)
    write_text(Path(config.out or config.features) / RESULT, text.getvalue())
    return Duplicates(pairs, config.threshold)
