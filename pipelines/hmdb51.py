"""HMDB51: ``<class>/<file>.avi`` with ``testTrainMulti_7030_splits`` next to the classes."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines._adapter import (
    Adapter,
    Discovery,
    Video,
    VideoSet,
    coverage_rows,
    find_annotation_folder,
    find_videos,
    keyed,
    missing_rows,
    read_lines,
    refuse_split,
    source_folder,
)
from pipelines._config import PrepareConfig
from shards.errors import InputError
from shards.format import Exclusion
from shards.untrusted import real_path

_LIST = re.compile(r"(.+)_test_split([1-9])\.txt")
_PARTS = {"0": "unused", "1": "train", "2": "test"}


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset; ``splits`` is like ``{"1": "train", "2": "unused", "3": "test"}``.

    Labels are numbered by the sorted class names of the split files, which name the folders.

    Raises:
        InputError: no videos, no split files, or some that cannot be read.
    """
    refuse_split(config)
    src = source_folder(config)
    lists = find_annotation_folder(
        config, _holds_lists, "testTrainMulti_7030_splits/<class>_test_split1.txt"
    )
    listed = _read_splits(lists)
    label_names = sorted({label_name for label_name, _ in listed})
    index = {name: number for number, name in enumerate(label_names)}
    videos: dict[tuple[str, str], Video] = {}
    excluded: list[Exclusion] = []
    for source, path in find_videos(src):
        folders = [real_path(src).name, *source.split("/")[:-1]]
        label_name = next((name for name in reversed(folders) if name in index), None)
        member = (label_name or "", path.name)
        if label_name is None or member not in listed:
            message = "is not in a class folder" if label_name is None else "is not in a split file"
            excluded.append(Exclusion(source=source, kind="not-in-annotations", message=message))
        elif member in videos:
            message = f"the same video as {videos[member].source}"
            excluded.append(Exclusion(source=source, kind="duplicate", message=message))
        else:
            videos[member] = Video(
                source=source,
                path=path,
                label=index[label_name],
                label_name=label_name,
                splits=listed[member],
            )
    absent = [f"{folder}/{file}" for folder, file in listed if (folder, file) not in videos]
    name = config.name or "hmdb51"
    return Discovery(
        sets=[
            VideoSet(
                name=name,
                videos=keyed(list(videos.values())),
                label_names=label_names,
                excluded=missing_rows(absent) + excluded,
                coverage=coverage_rows(
                    (f"split {number} {part}", member[0], member in videos)
                    for member, splits in listed.items()
                    for number, part in splits.items()
                ),
            )
        ]
    )


def _holds_lists(folder: Path) -> bool:
    return any(_LIST.fullmatch(path.name) for path in folder.glob("*_test_split*.txt"))


def _read_splits(lists: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Return (class, file name) → its part in each split."""
    listed: dict[tuple[str, str], dict[str, str]] = {}
    for path in sorted(lists.iterdir()):
        if found := _LIST.fullmatch(path.name):
            for line in read_lines(path):
                # File names may contain spaces; the code is the last word.
                file, _, code = line.rpartition(" ")
                if code not in _PARTS or not file.strip():
                    raise InputError(f"cannot read the line {line!r}", path, "expected 'x.avi 1'")
                listed.setdefault((found[1], file.strip()), {})[found[2]] = _PARTS[code]
    return listed


# Testing a fine-tuned backbone takes clips of 16 consecutive frames (authors' code): keep all.
ADAPTER = Adapter(discover=discover, default_frames=None)
