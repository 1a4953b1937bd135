"""Videos that are folders of frames: every folder with pictures is one, and they may be nested.

Frames are ordered as people would (``frame_9.png`` before ``frame_10.png``). The bytes of JPEGs are
kept unless ``--short-edge`` shrinks them; other formats are encoded as JPEG.
"""

from __future__ import annotations

import posixpath
from pathlib import Path

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
    folders: dict[str, Path] = {}
    links: list[str] = []
    for source, path in walk(src, links):
        if is_picture(path.name):
            folders.setdefault(posixpath.dirname(source), path.parent)
    broken = [source for source in links if is_picture(source)]
    if not folders:
        expected = f"expected folders of *.jpg or *.png below {src.name}/"
        raise InputError(f"holds no pictures{but_links(broken)}", src, expected)
    layout = FrameFolder(rate=config.frame_rate)
    videos = [
        Video(source=source or src.name, path=path, frames=layout)
        for source, path in folders.items()
    ]
    return labelled_by_folder(videos, config, broken)


ADAPTER = Adapter(discover=discover, default_frames=30, default_short_edge=None)
