"""What is written beside a set's shards: manifest, lists of what is not in it, and the log."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timezone

from pipelines._build import ShardResult
from pipelines._coverage import coverage_csv
from pipelines._plan import SetPlan
from shards.atomic import json_text
from shards.csv_rows import csv_text
from shards.format import Exclusion, Manifest, ShardInfo
from shards.progress import size_text
from shards.storage import Storage


def write_manifest(
    plan: SetPlan, infos: list[ShardInfo], excluded: int, ffmpeg_version: str, storage: Storage
) -> str:
    """Write ``NAME.json``, the last of a set's files; returns where it is."""
    manifest = Manifest(
        name=plan.name,
        dataset=plan.dataset,
        settings=plan.settings,
        ffmpeg_version=ffmpeg_version,
        label_names=plan.videos.label_names,
        shards=infos,
        excluded=excluded,
    )
    storage.write_text(f"{plan.name}.json", json_text(manifest.to_dict()))
    return f"{storage.url.rstrip('/')}/{plan.name}.json"


def write_lists(plan: SetPlan, excluded: list[Exclusion], storage: Storage) -> None:
    """``NAME.errors.csv``: the videos that are not in the set, where there are any.

    And ``NAME.coverage.csv``, where official lists tell what should be there.
    """
    if plan.videos.coverage:
        storage.write_text(f"{plan.name}.coverage.csv", coverage_csv(plan.videos.coverage))
    name = f"{plan.name}.errors.csv"
    if not excluded:
        storage.delete(name)
        return
    rows = [(row.source, row.kind, row.message) for row in excluded]
    storage.write_text(name, csv_text([("source", "kind", "message"), *rows]))


def summary(plan: SetPlan, infos: list[ShardInfo], excluded: list[Exclusion]) -> Iterable[str]:
    """Lines for people: what the set holds and what it does not."""
    videos, frames, size = (
        sum(getattr(info, name) for info in infos) for name in ("videos", "frames", "bytes")
    )
    yield (
        f"{plan.name}: {videos} videos, {frames} frames, {size_text(size)} in {len(infos)} shards"
    )
    if excluded:
        counts = ", ".join(f"{kind} {number}" for kind, number in _kinds(excluded).items())
        yield f"{plan.name}: {len(excluded)} excluded ({counts}), see {plan.name}.errors.csv"


def _kinds(excluded: Iterable[Exclusion]) -> dict[str, int]:
    return dict(sorted(Counter(row.kind for row in excluded).items()))


class ShardLog:
    """``NAME.log.jsonl``: a line for every shard built, with when, where and how long."""

    def __init__(self, name: str, storage: Storage) -> None:
        self._file = f"{name}.log.jsonl"
        self._storage = storage
        self._lines: list[str] = []
        self._written = time.monotonic()

    def add(self, result: ShardResult) -> None:
        """A shard has been built."""
        info = result.info
        row = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "shard": info.file,
            "videos": info.videos,
            "frames": info.frames,
            "bytes": info.bytes,
            "failed": _kinds(result.exclusions),
            "seconds": result.seconds,
            "host": result.host,
        }
        self._lines.append(json.dumps(row) + "\n")
        if time.monotonic() - self._written >= self._storage.append_every_seconds:
            self.close()

    def close(self) -> None:
        """Write what has not been written yet."""
        if self._lines:
            self._storage.append(self._file, "".join(self._lines))
            self._lines.clear()
        self._written = time.monotonic()
