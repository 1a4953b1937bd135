"""GOT-10k: ``{train,val,test}/list.txt`` and ``GOT-10k_Train_000001/`` with frames and boxes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipelines._adapter import (
    Adapter,
    Discovery,
    FrameFolder,
    Video,
    VideoSet,
    coverage_rows,
    keyed,
    missing_rows,
    official_splits,
    read_lines,
    relative_source,
    source_folder,
    subfolders,
)
from pipelines._config import PrepareConfig
from shards.errors import InputError
from shards.format import Exclusion

_SEQUENCE = re.compile(r"GOT-10k_(Train|Val|Test)_\d+", re.I)
_DEEPEST = 4  # src/full_data/train_data/GOT-10k_Train_split_01/GOT-10k_Train_000001


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset per split: ``got10k``, ``got10k-val``, ``got10k-test``.

    Raises:
        InputError: no sequences, or an unknown split.
    """
    src = source_folder(config)
    found: dict[str, dict[str, Video]] = {}
    listed: dict[str, list[str]] = {}
    doubles: dict[str, list[Exclusion]] = {}
    for folder in _split_folders(src, _DEEPEST):
        names = read_lines(folder / "list.txt") if (folder / "list.txt").is_file() else []
        for name in names:
            listed.setdefault(_split_of(name, folder), []).append(name)
        for path in _sequences(folder, names):
            split = _split_of(path.name, folder)
            source = relative_source(path, src)
            video = Video(
                source=source,
                path=path,
                splits={"official": split},
                frames=FrameFolder(ground_truth="groundtruth.txt", flags=True),
            )
            present = found.setdefault(split, {}).setdefault(path.name, video)
            if present is not video:
                message = f"the same sequence as {present.source}"
                row = Exclusion(source=source, kind="duplicate", message=message)
                doubles.setdefault(split, []).append(row)
    if not found:
        raise InputError(
            "holds no sequences of GOT-10k", src, "expected train/GOT-10k_Train_000001/ and so on"
        )
    base = config.name or "got10k"
    sets = []
    notes = []
    for split in official_splits(config, set(found) | set(listed)):
        here = found.get(split, {})
        names = list(dict.fromkeys(listed.get(split, sorted(here))))
        if not here:
            notes.append(f"{split}: none of the {len(names)} listed sequences found; left out")
            continue
        name = base if split == "train" else f"{base}-{split}"
        unlisted = len(set(here) - set(names))
        sets.append(
            VideoSet(
                name=name,
                videos=keyed(sorted(here.values(), key=lambda video: video.source)),
                label_names=[],
                excluded=missing_rows(set(names) - set(here)) + doubles.get(split, []),
                coverage=coverage_rows((split, "", entry in here) for entry in names),
                notes=[f"{name}: {unlisted} sequences are not in list.txt; stored anyway"]
                if unlisted
                else [],
            )
        )
    if not sets:
        raise InputError("holds no sequence of this split", src, "see --split")
    return Discovery(sets=sets, notes=notes)


def _split_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield folders with a ``list.txt`` or with sequences; sequences are not searched."""
    inner = subfolders(folder)
    if (folder / "list.txt").is_file() or any(_SEQUENCE.fullmatch(path.name) for path in inner):
        yield folder
        # Parts of the training set may be in folders of their own next to a list.
        inner = [path for path in inner if not _is_sequence(path)]
    if depth > 0:
        for path in inner:
            yield from _split_folders(path, depth - 1)


def _is_sequence(path: Path) -> bool:
    return bool(_SEQUENCE.fullmatch(path.name)) or (path / "groundtruth.txt").is_file()


def _sequences(folder: Path, names: list[str]) -> list[Path]:
    known = set(names)
    return [
        path for path in subfolders(folder) if path.name in known or _SEQUENCE.fullmatch(path.name)
    ]


def _split_of(name: str, folder: Path) -> str:
    """Return the split from a sequence's name, or else from the folder's."""
    if found := _SEQUENCE.fullmatch(name):
        return found[1].lower()
    return next((split for split in ("test", "val") if split in folder.name.lower()), "train")


# Tracking needs neighbouring frames, unchanged since annotation.
ADAPTER = Adapter(discover=discover, default_frames=None, default_short_edge=None)
