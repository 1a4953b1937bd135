"""WebDataset tars of video files, such as those of video2dataset: KEY.mp4, KEY.json, KEY.txt.

Nothing is unpacked: ffmpeg reads each video where it lies in its tar. Plain values of the JSON and
the text are kept in the records, as ``metadata``; a whole number in KEY.cls is the label.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from pipelines._adapter import (
    Adapter,
    Discovery,
    Video,
    VideoSet,
    is_video,
    keyed,
    refuse_splits_of_folders,
    relative_source,
    shown_name,
    slug,
)
from pipelines._config import PrepareConfig
from shards.dataset import local_tars, set_name
from shards.errors import InputError
from shards.format import Exclusion
from shards.index import label_of, tar_members
from shards.untrusted import open_regular

_TEXTS = ("json", "txt")


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset in tars: a folder of them, a pattern or a single one.

    Raises:
        InputError: there are none, or they hold no videos.
    """
    refuse_splits_of_folders(config)
    tars = local_tars(config.src)
    videos: list[Video] = []
    excluded: list[Exclusion] = []
    root = Path(os.path.commonpath([tar.absolute().parent for tar in tars]))
    for tar in tars:
        try:
            videos += list(_videos(tar, root))
        except InputError as error:
            excluded.append(Exclusion(source=tar.name, kind="unreadable", message=error.what))
    if not videos:
        what = f"; {excluded[0].source} {excluded[0].message}" if excluded else ""
        raise InputError(
            f"its {len(tars)} tars hold no videos{what}",
            config.src,
            "expected members such as KEY.mp4 or KEY.webm",
        )
    labels = sorted({video.label for video in videos if video.label is not None})
    found = VideoSet(
        name=config.name or slug(set_name(tars[0].name)),
        videos=keyed(videos),
        label_names=[],
        excluded=excluded,
        notes=[f"labels: {len(labels)}, from KEY.cls"] if labels else [],
    )
    return Discovery(sets=[found], root=root)


def _videos(tar: Path, root: Path) -> Iterator[Video]:
    shown = relative_source(tar.absolute(), root)
    with open_regular(tar) as raw:
        for _, group in groupby(tar_members(tar), key=lambda member: member.key):
            members = list(group)
            texts = {m.extension: (m.offset, m.size) for m in members if m.extension in _TEXTS}
            classes = [m for m in members if m.extension == "cls"]
            label = label_of(classes[0], raw) if classes else None
            for member in members:
                hidden = member.name.rpartition("/")[2].startswith(".")
                if is_video(member.name) and not hidden:
                    yield Video(
                        source=f"{shown}/{shown_name(member.name)}",
                        path=tar.absolute(),
                        label=label,
                        inside=(member.offset, member.size),
                        texts=texts,
                    )


# As for a plain folder.
ADAPTER = Adapter(discover=discover, default_frames=30, recordings=True)
