"""The part of the training videos on which a setting such as C is chosen; never the test videos.

Clips cut from one recording are near-copies. A part that held some clips of a recording whose
others are trained on would favour whatever memorises, so recordings are kept whole where file names
tell them: UCF101 (``v_<Class>_g<group>_c<clip>``) and HMDB51 (``<film>_<class>_<tags>_<clip>``).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

SHARE = 0.2
_UCF101 = re.compile(r"(v_.+_g\d+)_c\d+", re.I)
_HMDB51 = re.compile(r"(.+)_[a-z]{1,2}_(?:cm|nm)_np\d+_[a-z]{2}_[a-z]{3}_\d+", re.I)


def recordings(sources: Sequence[str], class_names: Sequence[str]) -> list[str] | None:
    """The recording of each video, or None where not all file names tell it.

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
