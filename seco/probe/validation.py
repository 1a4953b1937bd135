"""The part of the training videos on which a setting such as C is chosen; never the test videos.

Clips cut from one recording are near-copies. A part that held some clips of a recording whose
others are trained on would favour whatever memorises, so recordings (``evaluation/groups.py``) are
kept whole.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHARE = 0.2


def held_out(
    labels: NDArray[np.int64], groups: Sequence[str], share: float = SHARE
) -> NDArray[np.bool_]:
    """(N,) whether a row is held out: about ``share`` of every class, groups whole.

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
