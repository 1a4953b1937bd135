"""A tree of pictures, each a video of one frame: to extract features from, probe and retrieve.

Labels are the first-level folders when every picture is in one, as in ImageNet's layout.
"""

from __future__ import annotations

from pipelines._adapter import (
    Adapter,
    Discovery,
    FrameFolder,
    Video,
    is_picture,
    labelled_by_folder,
    refuse_splits_of_folders,
    source_folder,
    walk,
)
from pipelines._config import PrepareConfig
from shards.errors import InputError


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset, named after the folder or ``--name``.

    Raises:
        InputError: no folder, no pictures, or a split is requested.
    """
    refuse_splits_of_folders(config)
    src = source_folder(config)
    videos = [
        Video(source=source, path=path.parent, frames=FrameFolder(only=path.name))
        for source, path in walk(src)
        if is_picture(path.name)
    ]
    if not videos:
        raise InputError("holds no pictures", src, f"expected *.jpg or *.png below {src.name}/")
    return labelled_by_folder(videos, config)


ADAPTER = Adapter(discover=discover, default_frames=None, default_short_edge=None)
