"""Which videos come from one recording: clips of one are near-copies and not independent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from seco.features.store import Features

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
