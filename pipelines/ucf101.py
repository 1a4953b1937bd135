"""UCF101: ``UCF-101/<Class>/v_<Class>_gNN_cNN.avi`` with ``ucfTrainTestlist`` next to it."""

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

_LIST = re.compile(r"(train|test)list0*([1-9])\.txt", re.I)


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset; ``splits`` is like ``{"1": "train", "2": "test", "3": "train"}``.

    The class is the folder (HandstandPushups contains files named HandStandPushups), and its label
    is its number in ``classInd.txt`` minus one.

    Raises:
        InputError: no videos, no lists, or lists that cannot be read.
    """
    refuse_split(config)
    src = source_folder(config)
    lists = find_annotation_folder(config, _holds_lists, "ucfTrainTestlist/classInd.txt")
    label_names = _read_classes(lists / "classInd.txt")
    listed = _read_splits(lists)
    # Lists and folders may differ in the case of HandStandPushups.
    index = {name.lower(): number for number, name in enumerate(label_names) if name}
    videos: dict[str, Video] = {}
    excluded: list[Exclusion] = []
    for source, path in find_videos(src):
        folder = _class_folder(source, src, index)
        if folder is None:
            excluded.append(
                Exclusion(
                    source=source,
                    kind="not-in-annotations",
                    message="is not in a class folder of classInd.txt",
                )
            )
            continue
        member = f"{folder}/{path.name.lower()}"
        if member in videos:
            message = f"the same video as {videos[member].source}"
            excluded.append(Exclusion(source=source, kind="duplicate", message=message))
            continue
        label = index[folder]
        videos[member] = Video(
            source=source,
            path=path,
            label=label,
            label_name=label_names[label],
            splits=listed[member][1] if member in listed else {},
        )
    absent = [shown for member, (shown, _) in listed.items() if member not in videos]
    name = config.name or "ucf101"
    notes = []
    if unlisted := sum(not video.splits for video in videos.values()):
        notes.append(f"{name}: {unlisted} videos are not in any list; stored without a split")
    return Discovery(
        sets=[
            VideoSet(
                name=name,
                videos=keyed(list(videos.values())),
                label_names=label_names,
                excluded=missing_rows(absent) + excluded,
                coverage=coverage_rows(
                    (f"split {number} {part}", shown.split("/")[0], member in videos)
                    for member, (shown, splits) in listed.items()
                    for number, part in splits.items()
                ),
                notes=notes,
            )
        ]
    )


def _holds_lists(folder: Path) -> bool:
    return (folder / "classInd.txt").is_file()


def _class_folder(source: str, src: Path, index: dict[str, int]) -> str | None:
    """Return the nearest folder named after a class; ``--src`` itself may be one."""
    folders = [real_path(src).name, *source.split("/")[:-1]]
    return next((name.lower() for name in reversed(folders) if name.lower() in index), None)


def _read_classes(path: Path) -> list[str]:
    """Return the names in index order; numbers missing from the file are empty names."""
    classes: dict[int, str] = {}
    for line in read_lines(path):
        number, *name = line.split()
        if not number.isdigit() or int(number) < 1 or len(name) != 1:
            raise InputError(f"cannot read the line {line!r}", path, "expected '1 ApplyEyeMakeup'")
        classes[int(number)] = name[0]
    if not classes:
        raise InputError("lists no classes", path)
    return [classes.get(number, "") for number in range(1, max(classes) + 1)]


def _read_splits(lists: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Return ``class/file`` in lower case → (as written, its part in each split)."""
    listed: dict[str, tuple[str, dict[str, str]]] = {}
    for path in sorted(lists.iterdir()):
        if found := _LIST.fullmatch(path.name):
            for line in read_lines(path):
                # Train lists have the class number after the path; paths have no spaces.
                member = line.split()[0]
                _, splits = listed.setdefault(member.lower(), (member, {}))
                splits[found[2]] = found[1].lower()
    if not listed:
        raise InputError("holds no trainlist01.txt or testlist01.txt", lists)
    return listed


# Testing a fine-tuned backbone takes clips of 16 consecutive frames (authors' code): keep all.
ADAPTER = Adapter(discover=discover, default_frames=None)
