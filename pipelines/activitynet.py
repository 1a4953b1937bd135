"""ActivityNet 1.3: one JSON of annotations, files named by their YouTube ids."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import msgspec

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
    official_splits,
    read_text,
    source_folder,
)
from pipelines._config import PrepareConfig
from shards.errors import InputError
from shards.format import Exclusion
from shards.untrusted import decode_json, read_regular

_SUBSETS = {"training": "train", "validation": "val", "testing": "test"}
_FILE = re.compile(r"(activity_?net.*|anet.*)\.json", re.I)
_VERSION = re.compile(r"1[-_.]?3")
_MOST_FILES = 8


@dataclass(frozen=True)
class _Entry:
    split: str
    label: str | None


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset per split: ``activitynet``, ``activitynet-val``, ``activitynet-test``.

    A video's label is the one with the most annotated seconds; labels are numbered by the sorted
    names that occur. Test videos have none.

    Raises:
        InputError: no videos, no annotations, or an unknown split.
    """
    src = source_folder(config)
    annotations = _annotation_file(config)
    entries = _read(annotations)
    wanted = official_splits(config, {entry.split for entry in entries.values()})
    label_names = sorted({entry.label for entry in entries.values() if entry.label is not None})
    index = {name: number for number, name in enumerate(label_names)}
    found: dict[str, Video] = {}
    excluded: list[Exclusion] = []
    doubles: defaultdict[str, list[Exclusion]] = defaultdict(list)
    for source, path in find_videos(src):
        youtube_id = _id_of(PurePosixPath(source).stem, entries)
        if youtube_id is None:
            message = "its id is not in the annotations"
            excluded.append(Exclusion(source=source, kind="not-in-annotations", message=message))
        elif youtube_id in found:
            message = f"the same video as {found[youtube_id].source}"
            row = Exclusion(source=source, kind="duplicate", message=message)
            doubles[entries[youtube_id].split].append(row)
        else:
            found[youtube_id] = Video(source=source, path=path)
    base = config.name or "activitynet"
    sets: list[VideoSet] = []
    notes = [f"annotations: {annotations.name}, {len(entries)} videos, {len(label_names)} labels"]
    for split in wanted:
        listed = {key: entry for key, entry in entries.items() if entry.split == split}
        videos = [
            replace(
                found[key],
                label=None if entry.label is None else index[entry.label],
                label_name=entry.label,
                splits={"official": split},
            )
            for key, entry in listed.items()
            if key in found
        ]
        if not videos:
            notes.append(f"{split}: none of the {len(listed)} listed videos found; left out")
            continue
        absent = (f"v_{key}" for key in listed if key not in found)
        sets.append(
            VideoSet(
                name=base if split == "train" else f"{base}-{split}",
                videos=keyed(sorted(videos, key=lambda video: video.source)),
                label_names=label_names,
                excluded=missing_rows(absent) + doubles[split],
                coverage=coverage_rows(
                    (split, entry.label or "", key in found) for key, entry in listed.items()
                ),
            )
        )
    if not sets:
        raise InputError(
            "none of the videos is in the annotations", src, "files are named v_<youtube id>.mp4"
        )
    sets[0] = replace(sets[0], excluded=sets[0].excluded + excluded)
    return Discovery(sets=sets, notes=notes)


def _id_of(stem: str, entries: dict[str, _Entry]) -> str | None:
    """Return the id in ``v_<id>`` or ``<id>``; an id may itself begin with ``v_``."""
    return next((name for name in (stem, stem.removeprefix("v_")) if name in entries), None)


def _annotation_file(config: PrepareConfig) -> Path:
    """Return ``--annotations``, or the nearest folder's file, found by its content or its name."""
    if config.annotations is not None and Path(config.annotations).is_file():
        return Path(config.annotations)
    folder = find_annotation_folder(
        config, lambda folder: bool(_candidates(folder)), "activity_net.v1-3.min.json"
    )
    # Version 1.2 has half of the classes, and files of captions have similar names.
    return min(
        _candidates(folder),
        key=lambda path: (not _holds_database(path), not _VERSION.search(path.name), path.name),
    )


def _candidates(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.[jJ][sS][oO][nN]"))
    if named := [path for path in files if _FILE.fullmatch(path.name)]:
        return named
    # A folder of many JSON files is something else.
    few = files if len(files) <= _MOST_FILES else []
    return [path for path in few if _holds_database(path)]


def _holds_database(path: Path) -> bool:
    try:
        data = read_regular(path)
    except InputError:
        return False
    return b'"database"' in data and b'"subset"' in data


def _read(path: Path) -> dict[str, _Entry]:
    what = "is not ActivityNet's annotation file"
    advice = 'expected {"database": {<id>: {"subset": …, "annotations": […]}}}'
    database = decode_json(_File, read_text(path).encode(), path, what, advice).database
    return {key: _entry(key, row, path) for key, row in database.items()}


class _Annotation(msgspec.Struct):
    label: str
    segment: tuple[float, float]  # seconds


class _Video(msgspec.Struct):
    subset: str
    annotations: list[_Annotation] | None = None


class _File(msgspec.Struct):
    database: dict[str, _Video]


def _entry(key: str, row: _Video, path: Path) -> _Entry:
    split = _SUBSETS.get(row.subset)
    if split is None:
        known = ", ".join(_SUBSETS)
        raise InputError(f"{key}: unknown subset {row.subset!r}", path, f"one of {known}")
    return _Entry(split, _label(row.annotations or ()))


def _label(annotations: Iterable[_Annotation]) -> str | None:
    """Return the label with the most annotated seconds; ties go to the first by name."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in annotations:
        start, end = row.segment
        seconds[row.label] += end - start
    return min(seconds, key=lambda label: (-seconds[label], label)) if seconds else None


# As for the paper's features: 50 frames per untrimmed video.
ADAPTER = Adapter(discover=discover, default_frames=50)
