"""Any tree of videos: labels are its first-level folders when every video is in one."""

from __future__ import annotations

from pipelines._adapter import (
    Adapter,
    Discovery,
    Video,
    find_videos,
    labelled_by_folder,
    refuse_splits_of_folders,
    source_folder,
)
from pipelines._config import PrepareConfig


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset, named after the folder or ``--name``.

    Raises:
        InputError: no folder, no videos, or a split is requested.
    """
    refuse_splits_of_folders(config)
    broken: list[str] = []
    found = find_videos(source_folder(config), broken)
    videos = [Video(source=source, path=path) for source, path in found]
    return labelled_by_folder(videos, config, broken)


# As for Kinetics: a plain folder is mostly used for pre-training.
ADAPTER = Adapter(discover=discover, default_frames=30, recordings=True)
