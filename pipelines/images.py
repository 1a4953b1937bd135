"""A tree of pictures, each a video of one frame: to extract features from, probe and retrieve.

Labels are the first-level folders when every picture is in one, as in ImageNet's layout.
"""

from __future__ import annotations

from pipelines._adapter import (
    Adapter,
    Discovery,
    FrameFolder,
    Video,
    but_links,
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
    links: list[str] = []
    videos = [
        Video(source=source, path=path.parent, frames=FrameFolder(only=path.name))
        for source, path in walk(src, links)
        if is_picture(path.name)
    ]
    broken = [source for source in links if is_picture(source)]
    if not videos:
        expected = f"expected *.jpg or *.png below {src.name}/"
        raise InputError(f"holds no pictures{but_links(broken)}", src, expected)
    return labelled_by_folder(videos, config, broken)


ADAPTER = Adapter(discover=discover, default_frames=None, default_short_edge=None)
