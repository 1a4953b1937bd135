"""``seco verify``: is every byte of a dataset what it should be?

The tar is the truth: the index and the manifest are compared with what is really in it.
"""

from __future__ import annotations

import csv
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg

from shards.dataset import local_tars, set_name
from shards.errors import InputError
from shards.format import Manifest, ShardInfo, VideoRecord, read_manifest
from shards.index import (
    CONTENTS,
    MAX_FRAME_BYTES,
    ShardIndex,
    TarMember,
    build_index,
    read_index,
    tar_members,
    write_index,
)
from shards.progress import progress
from shards.settings import usable_cpus
from shards.untrusted import require_pixels
from shards.videos import MANY_SHARDS, VideoList, write_videos


def reindex(spec: str | Iterable[str], force: bool = False) -> str:
    """Write the index of every tar that has none or an outdated one; return a summary.

    A replaced index passes on what is not in the tar (what the shard was made from, and which
    videos could not be stored), if it belongs to this very tar.

    Args:
        force: reindex all tars.

    Raises:
        InputError: some tars could not be indexed; all others have been.
    """
    tars = local_tars(spec)
    made, kept = 0, 0
    failures: list[InputError] = []
    with progress("index", len(tars), "shards") as bar:
        for tar in tars:
            path = tar.with_suffix(".idx")
            old = _readable(path)
            try:
                if old is not None and not force and _describes(old, tar):
                    kept += 1
                else:
                    write_index(path, _made(tar, old))
                    made += 1
            except InputError as error:
                failures.append(error)
            bar.advance()
    if not failures:
        _list_videos(tars)
    summary = f"{made} indexes written, {kept} already existed"
    if failures:
        raise InputError(
            f"{len(failures)} of {len(tars)} shards could not be indexed: "
            + "; ".join(map(str, failures[:3]))
            + ("; …" if failures[3:] else ""),
            fix=summary,
        )
    return summary


def _list_videos(tars: Sequence[Path]) -> None:
    """Write the list of videos of each large dataset of which all shards are given.

    Raises:
        InputError: some videos occur twice.
    """
    datasets: dict[Path, list[Path]] = {}
    for tar in tars:
        datasets.setdefault(tar.with_name(f"{set_name(str(tar))}.videos"), []).append(tar)
    for path, given in datasets.items():
        shards = sorted(given, key=lambda tar: (len(tar.name), tar.name))
        whole = len(shards) == sum(1 for _ in path.parent.glob(f"{glob.escape(path.stem)}-*.tar"))
        if len(shards) >= MANY_SHARDS and whole and _is_older(path, shards):
            videos = VideoList.of(read_index(tar.with_suffix(".idx")) for tar in shards)
            videos.require_distinct(str(path.with_suffix("")))
            write_videos(path, videos)


def _is_older(path: Path, tars: Iterable[Path]) -> bool:
    """Whether a list is missing, or not younger than all indexes."""
    if not path.is_file():
        return True
    written = path.stat().st_mtime_ns
    return any(tar.with_suffix(".idx").stat().st_mtime_ns >= written for tar in tars)


def _readable(path: Path) -> ShardIndex | None:
    try:
        return read_index(path)
    except InputError:
        return None


def _describes(index: ShardIndex, tar: Path) -> bool:
    return (index.info.file, index.info.bytes) == (tar.name, tar.stat().st_size)


def _made(tar: Path, old: ShardIndex | None) -> ShardIndex:
    index = build_index(tar)
    if old is None or old.info.sha256 != index.info.sha256:
        return index
    return replace(index, plan_digest=old.plan_digest, exclusions=old.exclusions)


_MOST_NAMED = 10  # faults listed per shard
_SHARD = re.compile(r"(.+)-\d{3,}")
_TAR_SAFE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class ShardCheck:
    """The result of checking one tar."""

    file: Path
    faults: list[str]
    keys: list[str] = field(default_factory=list)
    labels: frozenset[int] = frozenset()
    frames: int = 0


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`; ``faults`` are lines for people, each with its file."""

    faults: list[str]
    shards: int
    videos: int
    frames: int
    notes: list[str]

    def table(self) -> str:
        """Return all faults and notes, and a summary."""
        count = f"{len(self.faults)} faults" if self.faults else "no faults"
        counts = f"{self.shards} shards, {self.videos} videos, {self.frames} frames: {count}"
        return "\n".join([*self.faults, *self.notes, counts])


@dataclass(frozen=True)
class _Task:
    tar: Path
    expected: ShardInfo | None  # of the manifest


def verify(spec: str | Iterable[str], workers: int | None = None) -> Verification:
    """Check manifests, indexes and tars, decoding every JPEG.

    Args:
        spec: as for :func:`shards.dataset.local_tars`; a manifest stands for its dataset.
        workers: shards read at once; does not affect the result.

    Raises:
        InputError: the specification names no shards, or a manifest cannot be read.
    """
    tasks, faults, manifests = _tasks([spec] if isinstance(spec, str) else list(spec))
    notes = [
        f"{task.tar}: no manifest lists it, so there is no sha256 to compare with"
        for task in tasks
        if task.expected is None
    ]
    checks = list(_checked(tasks, workers or usable_cpus()))
    for check in checks:
        faults += [f"{check.file}: {fault}" for fault in check.faults[:_MOST_NAMED]]
        if more := len(check.faults) - _MOST_NAMED:
            faults += [f"{check.file}: {more} more faults"] if more > 0 else []
    faults += _across(checks, manifests)
    return Verification(
        faults=faults,
        shards=len(checks),
        videos=sum(len(check.keys) for check in checks),
        frames=sum(check.frames for check in checks),
        notes=notes,
    )


def _tasks(specs: list[str]) -> tuple[list[_Task], list[str], dict[Path, Manifest]]:
    """Return the tars to check, and the faults found from manifests alone."""
    tars: dict[Path, None] = {}
    named: dict[Path, None] = {}
    for part in specs:
        if Path(part).suffix == ".json":
            named.setdefault(Path(part))
        else:
            tars.update(dict.fromkeys(local_tars(part)))
    for tar in tars:
        if (found := _SHARD.fullmatch(tar.stem)) and tar.with_name(f"{found[1]}.json").is_file():
            named.setdefault(tar.with_name(f"{found[1]}.json"))
    manifests = {path: read_manifest(path) for path in named}
    given_manifests = [Path(part) for part in specs if Path(part).suffix == ".json"]
    faults: list[str] = []
    expected: dict[Path, ShardInfo] = {}
    for path, manifest in manifests.items():
        listed = {path.with_name(row.file): row for row in manifest.shards}
        expected |= listed
        absent = [tar for tar in listed if not tar.is_file()]
        faults += [f"{tar}: is missing, listed in {path.name}" for tar in absent]
        if path in given_manifests:
            tars.update(dict.fromkeys(tar for tar in listed if tar not in absent))
        faults += [f"{tar}: is not listed in {path.name}" for tar in _strangers(path, listed)]
        faults += _error_rows(path, manifest)
    if not tars and not faults:
        raise InputError("names no shards", " ".join(specs))
    return [_Task(tar, expected.get(tar)) for tar in tars], faults, manifests


def _strangers(manifest: Path, listed: Iterable[Path]) -> list[Path]:
    known = set(listed)
    return [
        tar
        for tar in sorted(manifest.parent.glob(f"{manifest.stem}-*.tar"))
        if tar not in known and (found := _SHARD.fullmatch(tar.stem)) and found[1] == manifest.stem
    ]


def _error_rows(path: Path, manifest: Manifest) -> list[str]:
    """Check that the list of excluded videos has as many rows as the manifest says."""
    errors = path.with_name(f"{manifest.name}.errors.csv")
    rows = 0
    if errors.is_file():
        with open(errors, newline="", encoding="utf-8") as file:
            rows = max(0, sum(1 for _ in csv.reader(file)) - 1)
    if rows == manifest.excluded:
        return []
    return [f"{errors}: {rows} rows, but {path.name} says {manifest.excluded} videos are excluded"]


def _checked(tasks: Sequence[_Task], workers: int) -> Iterator[ShardCheck]:
    # Threads: hashing and decoding release the GIL.
    pool = ThreadPoolExecutor(workers)
    try:
        with progress("verify", len(tasks), "shards") as bar:
            for check in pool.map(_check, tasks):
                bar.advance()
                yield check
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _check(task: _Task) -> ShardCheck:
    try:
        truth = build_index(task.tar)
    except InputError as error:
        return ShardCheck(task.tar, [error.what])
    except OSError as error:
        return ShardCheck(task.tar, [f"cannot be read ({error.strerror})"])
    faults = [*_against_manifest(truth.info, task.expected), *_against_index(task.tar, truth)]
    ours = bool((truth.record_size > 0).any())
    with open(task.tar, "rb") as tar:
        group: list[TarMember] = []
        for member in tar_members(task.tar):
            if group and member.key != group[0].key:
                faults += _group_faults(group, tar, ours)
                group = []
            group.append(member)
        faults += _group_faults(group, tar, ours) if group else []
    labels = frozenset(int(label) for label in truth.label if label >= 0)
    return ShardCheck(task.tar, faults, truth.keys, labels, truth.info.frames)


def _against_manifest(info: ShardInfo, expected: ShardInfo | None) -> Iterator[str]:
    if expected is None:
        return
    if info.bytes != expected.bytes:
        yield f"has {info.bytes} bytes, the manifest says {expected.bytes}"
    elif info.sha256 != expected.sha256:
        yield "its sha256 differs from the manifest's: it has been altered"
    for name in ("videos", "frames"):
        held, said = getattr(info, name), getattr(expected, name)
        if held != said:
            yield f"holds {held} {name}, the manifest says {said}"


def _against_index(tar: Path, truth: ShardIndex) -> Iterator[str]:
    path = tar.with_suffix(".idx")
    if not path.is_file():
        yield "has no index; run `seco index`"
        return
    try:
        index = read_index(path)
    except InputError as error:
        yield f"its index {error.what}; run `seco index --force`"
        return
    for part in CONTENTS:
        held, said = getattr(truth, part), getattr(index, part)
        same = np.array_equal(held, said) if isinstance(held, np.ndarray) else held == said
        if not same:
            yield f"its index differs from the tar in {part}; run `seco index --force`"


def _group_faults(group: list[TarMember], tar: BinaryIO, ours: bool) -> Iterator[str]:
    """Yield the faults in one video's members."""
    frames = [member for member in group if member.is_jpeg]
    record: VideoRecord | None = None
    if ours:
        key = group[0].key
        expected = [f"{key}.json", *(f"{key}.{n:04d}.jpg" for n in range(len(group) - 1))]
        if [member.name for member in group] != expected or not _TAR_SAFE.fullmatch(key):
            yield f"{key}: its members are not KEY.json, KEY.0000.jpg, KEY.0001.jpg and so on"
        try:
            record = VideoRecord.from_json(group[0].read(tar))
        except InputError as error:
            yield f"{group[0].name}: {error.what}"
        else:
            if record.key != key:
                yield f"{group[0].name}: is the record of {record.key!r}"
            if len(record.frame_times) != len(frames):
                times = len(record.frame_times)
                yield f"{group[0].name}: {times} frame times for {len(frames)} frames"
    for member in frames:
        if fault := _frame_fault(member, tar, record):
            yield f"{member.name}: {fault}"


def _frame_fault(member: TarMember, tar: BinaryIO, record: VideoRecord | None) -> str | None:
    if member.size > MAX_FRAME_BYTES:
        return f"{member.size} bytes are too many for a frame"
    data = member.read(tar)
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        require_pixels(width, height)
        # An eighth of the size and no colour: all of the data is read, at a third of the cost.
        simplejpeg.decode_jpeg(data, colorspace="GRAY", min_height=1, min_width=1)
    except ValueError as error:
        return f"does not decode ({error})"
    if record is not None and (width, height) != (record.width, record.height):
        return f"is {width}x{height}, its record says {record.width}x{record.height}"
    return None


def _set_of(tar: Path) -> str:
    found = _SHARD.fullmatch(tar.stem)
    return os.path.abspath(tar.with_name(found[1] if found else tar.stem))


def _across(checks: Sequence[ShardCheck], manifests: dict[Path, Manifest]) -> list[str]:
    """Return the faults that only show across shards."""
    counts = Counter((_set_of(check.file), key) for check in checks for key in check.keys)
    faults = [
        f"{check.file}: the key {key} occurs {counts[_set_of(check.file), key]} times"
        for check in checks
        for key in dict.fromkeys(check.keys)
        if counts[_set_of(check.file), key] > 1
    ]
    for path, manifest in manifests.items():
        files = {os.path.abspath(path.with_name(row.file)) for row in manifest.shards}
        labels = [
            label
            for check in checks
            if os.path.abspath(check.file) in files
            for label in check.labels
        ]
        names = len(manifest.label_names)
        if names and labels and max(labels) >= names:  # or all classes have numbers only
            faults.append(f"{path}: names {names} labels, but label {max(labels)} occurs")
    return faults
