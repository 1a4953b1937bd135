"""Any tree of videos: labels are its first-level folders when every video is in one."""

from __future__ import annotations

import re

from pipelines._adapter import (
    Adapter,
    Discovery,
    Video,
    VideoSet,
    find_videos,
    keyed,
    source_folder,
)
from pipelines._config import PrepareConfig
from shards.errors import InputError
from shards.untrusted import real_path


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset, named after the folder or ``--name``.

    Raises:
        InputError: no folder, no videos, or a split is requested.
    """
    if config.split is not None:
        raise InputError(
            "a plain folder has no splits", "--split", "prepare each split's folder separately"
        )
    src = source_folder(config)
    found = find_videos(src)
    labelled = all("/" in source for source, _ in found)
    names = sorted({source.split("/", 1)[0] for source, _ in found}) if labelled else []
    index = {name: number for number, name in enumerate(names)}
    videos = []
    for source, path in found:
        label_name = source.split("/", 1)[0] if labelled else None
        label = index[label_name] if label_name is not None else None
        videos.append(Video(source=source, path=path, label=label, label_name=label_name))
    note = (
        f"labels: the {len(names)} first-level folders"
        if labelled
        else "no labels: not every video is in a first-level folder"
    )
    name = config.name or slug(real_path(src).name)
    return Discovery(
        sets=[VideoSet(name=name, videos=keyed(videos), label_names=names)], notes=[note]
    )


def slug(text: str) -> str:
    """Return ``text`` as a dataset name: lower case, words joined by ``-``."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-") or "videos"


# As for Kinetics: a plain folder is mostly used for pre-training.
ADAPTER = Adapter(discover=discover, default_frames=30)
