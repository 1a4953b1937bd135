"""``seco prepare``: find the videos, plan the shards, build them, and say what became of all."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines._adapter import Adapter, adapter
from pipelines._build import ShardResult
from pipelines._config import PrepareConfig, validate
from pipelines._engine import build_shards
from pipelines._ffmpeg import ffmpeg_binary, ffmpeg_version
from pipelines._frames import FrameChoice
from pipelines._plan import SetPlan, ShardPlan, plan_set
from shards.atomic import require_writable, write_json, write_text
from shards.errors import InputError, Stopped, TooManyExcluded
from shards.format import Exclusion, Manifest, ShardInfo
from shards.index import read_index
from shards.progress import progress


@dataclass(frozen=True, kw_only=True)
class PreparedSet:
    """One finished set."""

    manifest: Path
    shards: list[ShardInfo]
    excluded: list[Exclusion]
    failed: int  # of the excluded, those that were found but could not be stored
    videos: int  # found


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What a run made; empty after ``--dry-run``."""

    sets: list[PreparedSet]


def prepare(config: PrepareConfig) -> PrepareReport:
    """Make the shards of a dataset; finished ones of an earlier run with this plan are kept.

    Raises:
        InputError: something the user gave cannot be used, or no video at all could be read.
        TooManyExcluded: all is written, but more than ``max_failures`` percent failed.
        Stopped: Ctrl-C or SIGTERM; the same command goes on.
    """
    validate(config)
    dataset = adapter(config.dataset)
    binary = ffmpeg_binary(config.ffmpeg)
    found = dataset.discover(config)
    choice = _choice(config, dataset)
    for videos in found.sets:
        if not videos.videos:
            first = videos.excluded[0].source if videos.excluded else videos.name
            raise InputError(
                f"no video fits the annotations, for example {first}", config.src, "see the layout"
            )
    plans = [
        plan_set(
            videos,
            config,
            choice=choice,
            binary=binary,
            ffmpeg_version=ffmpeg_version(binary),
        )
        for videos in found.sets
    ]
    _say(found.notes)
    if config.dry_run:
        for plan in plans:
            _say([*plan.videos.coverage, _forecast(plan)])
        return PrepareReport(sets=[])
    require_writable(Path(config.out))
    finished = [_finished_shards(plan) for plan in plans]  # refuses before anything is decoded
    sets = [
        _prepare_set(plan, done, config, ffmpeg_version(binary))
        for plan, done in zip(plans, finished, strict=True)
    ]
    failed, videos = (sum(getattr(row, name) for row in sets) for name in ("failed", "videos"))
    if failed * 100 > config.max_failures * videos:
        raise TooManyExcluded(
            f"{failed} of {videos} videos ({failed * 100 / videos:.1f} %) could not be stored, "
            f"more than --max-failures {config.max_failures:g}",
            config.out,
            "the sets are written; see *.errors.csv",
        )
    return PrepareReport(sets=sets)


def _choice(config: PrepareConfig, dataset: Adapter) -> FrameChoice:
    if config.frames is not None:
        return FrameChoice(count=config.frames)
    if config.fps is not None:
        return FrameChoice(fps=config.fps)
    return FrameChoice() if config.all_frames else FrameChoice(count=dataset.default_frames)


def _forecast(plan: SetPlan) -> str:
    choice = plan.shards[0].choice
    frames = f"{choice.count} frames a video" if choice.count else "all frames"
    if choice.fps is not None:
        frames = f"{choice.fps:g} frames a second"
    first, last = plan.shards[0].path.name, plan.shards[-1].path.name
    return (
        f"{plan.name}: {len(plan.videos.videos)} videos, {len(plan.videos.label_names)} labels, "
        f"{frames}, short edge {plan.shards[0].short_edge} px -> {first} to {last}"
    )


def _finished_shards(plan: SetPlan) -> dict[Path, ShardResult]:
    """Shards of an earlier run of the same plan.

    Raises:
        InputError: the folder holds shards of this name from another plan.
    """
    done = {}
    planned = {shard.path.with_suffix(".idx"): shard for shard in plan.shards}
    folder = plan.shards[0].path.parent
    pattern = re.compile(re.escape(plan.name) + r"-\d{3,}\.idx")
    for path in sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)):
        shard = planned.get(path)
        try:
            index = read_index(path)
        except InputError:
            if shard is None:
                continue
            index = None  # half a file of a crashed disk: the shard is built again
        if index is None:
            continue
        if shard is None or index.plan_digest != shard.digest:
            raise InputError(
                f"holds shards of {plan.name} prepared from other videos, with other settings or "
                "by another ffmpeg",
                folder,
                "choose another --out or --name, or delete them",
            )
        tar = shard.path
        if tar.is_file() and tar.stat().st_size == index.info.bytes:
            done[tar] = ShardResult(info=index.info, exclusions=index.exclusions)
    return done


def _prepare_set(
    plan: SetPlan, results: dict[Path, ShardResult], config: PrepareConfig, version: str
) -> PreparedSet:
    todo = [shard for shard in plan.shards if shard.path not in results]
    total = len(plan.videos.videos)
    before = total - sum(len(shard.videos) for shard in todo)
    if results:
        _say([f"{plan.name}: {len(results)} of {len(plan.shards)} shards are there already"])

    def on_shard(shard: ShardPlan, result: ShardResult) -> None:
        results[shard.path] = result

    try:
        if todo:
            with progress(f"prepare {plan.name}", total, "videos", start=before) as bar:
                build_shards(todo, _workers(config), on_shard, bar.advance)
    except KeyboardInterrupt:
        raise Stopped(
            f"stopped: {len(results)} of {len(plan.shards)} shards of {plan.name} are finished; "
            "run the same command again to go on",
        ) from None
    return _finish_set(plan, [results[shard.path] for shard in plan.shards], version)


def _workers(config: PrepareConfig) -> int:
    if config.workers is not None:
        return config.workers
    # The CPUs this process may use: fewer than the machine's under a scheduler or in a container.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finish_set(plan: SetPlan, results: list[ShardResult], version: str) -> PreparedSet:
    failures = [row for result in results for row in result.exclusions]
    excluded = failures + plan.videos.excluded
    infos = [result.info for result in results]
    manifest = plan.shards[0].path.with_name(f"{plan.name}.json")
    _write_errors(manifest.with_name(f"{plan.name}.errors.csv"), excluded)
    _say([*plan.videos.coverage, *_summary(plan, infos, excluded)])
    if not any(info.videos for info in infos):
        # They hold nothing, and would only stand in the way of the next try.
        for shard in plan.shards:
            shard.path.unlink(missing_ok=True)
            shard.path.with_suffix(".idx").unlink(missing_ok=True)
        first = failures[0]
        raise InputError(
            f"none of the {len(failures)} videos of {plan.name} could be read; the first, "
            f"{first.source}: {first.kind}, {first.message}",
            fix=f"see {plan.name}.errors.csv",
        )
    write_json(
        manifest,
        Manifest(
            name=plan.name,
            dataset=plan.dataset,
            settings=plan.settings,
            ffmpeg_version=version,
            label_names=plan.videos.label_names,
            shards=infos,
            excluded=len(excluded),
        ).to_dict(),
    )
    return PreparedSet(
        manifest=manifest,
        shards=infos,
        excluded=excluded,
        failed=len(failures),
        videos=len(plan.videos.videos),
    )


def _write_errors(path: Path, excluded: list[Exclusion]) -> None:
    if not excluded:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("source", "kind", "message"))
    rows.writerows((row.source, row.kind, row.message) for row in excluded)
    write_text(path, text.getvalue())


def _summary(plan: SetPlan, infos: list[ShardInfo], excluded: list[Exclusion]) -> Iterable[str]:
    videos, frames, size = (
        sum(getattr(info, name) for info in infos) for name in ("videos", "frames", "bytes")
    )
    yield (
        f"{plan.name}: {videos} videos, {frames} frames, {size / 1e9:.2f} GB in {len(infos)} shards"
    )
    if excluded:
        kinds = Counter(row.kind for row in excluded)
        counts = ", ".join(f"{kind} {number}" for kind, number in sorted(kinds.items()))
        yield f"{plan.name}: {len(excluded)} excluded ({counts}), see {plan.name}.errors.csv"


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)
