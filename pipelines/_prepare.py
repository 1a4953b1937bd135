"""``seco prepare``: find the videos, plan the shards, build them, and say what became of all."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from pipelines._adapter import Adapter, adapter
from pipelines._build import ShardResult, Tally
from pipelines._config import PrepareConfig, validate
from pipelines._coverage import coverage_lines
from pipelines._engine import build_shards
from pipelines._estimate import forecast
from pipelines._ffmpeg import ffmpeg_binary, ffmpeg_version
from pipelines._finished import finished_indexes
from pipelines._frames import FrameChoice
from pipelines._outputs import ShardLog, summary, write_lists, write_manifest
from pipelines._plan import SetPlan, ShardPlan, plan_set
from shards.atomic import default_folder
from shards.cpus import usable_cpus
from shards.errors import InputError, Stopped, TooManyExcluded
from shards.format import Exclusion, ShardInfo
from shards.progress import progress, size_text
from shards.storage import Storage, open_storage

_WAITS_SECONDS = (1.0, 5.0, 30.0)  # network disks show other machines' files with a delay

Engine = Callable[
    [
        list[ShardPlan],
        int,
        Callable[[ShardPlan, ShardResult], None],
        Callable[[Tally], None],
    ],
    None,
]


@dataclass(frozen=True, kw_only=True)
class PreparedSet:
    """One finished set."""

    manifest: str  # its path or address
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
    config = replace(config, out=config.out or default_folder())
    dataset = adapter(config.dataset)
    _require_whole(config, dataset)
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
            short_edge=config.short_edge or dataset.default_short_edge,
            binary=binary,
            ffmpeg_version=ffmpeg_version(binary),
        )
        for videos in found.sets
    ]
    _say(found.notes)
    if config.dry_run:
        for plan in plans:
            _say([*_found(plan), *forecast(plan, workers(config))])
        return PrepareReport(sets=[])
    storage = open_storage(config.out)
    storage.require_writable()
    with ExitStack() as locks:
        for plan in plans:
            locks.enter_context(storage.writer_lock(plan.name))
        # Refuses before anything is decoded.
        finished = [_finished_shards(plan, storage) for plan in plans]
        sets = [
            _prepare_set(plan, done, config, storage, ffmpeg_version(binary))
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


def _require_whole(config: PrepareConfig, dataset: Adapter) -> None:
    """Raises InputError where options would thin or shrink what has to stay as it is."""
    for name in ("frames", "fps", "short_edge"):
        if dataset.stored_whole is not None and getattr(config, name) is not None:
            raise InputError(dataset.stored_whole, f"--{name.replace('_', '-')}", "leave it out")


def _choice(config: PrepareConfig, dataset: Adapter) -> FrameChoice:
    if config.frames is not None:
        return FrameChoice(count=config.frames)
    if config.fps is not None:
        return FrameChoice(fps=config.fps)
    return FrameChoice() if config.all_frames else FrameChoice(count=dataset.default_frames)


def _found(plan: SetPlan) -> list[str]:
    return [*coverage_lines(plan.name, plan.videos.coverage), *plan.videos.notes]


def _finished_shards(plan: SetPlan, storage: Storage) -> dict[str, ShardResult]:
    return {
        name: ShardResult(info=index.info, exclusions=index.exclusions)
        for name, index in finished_indexes(plan, storage).items()
    }


def _prepare_set(
    plan: SetPlan,
    results: dict[str, ShardResult],
    config: PrepareConfig,
    storage: Storage,
    version: str,
) -> PreparedSet:
    todo = _todo(plan, results, config.retry_failed)
    total = len(plan.videos.videos)
    # Of a shard that is tried again only its failures are counted as work.
    again = sum(len(results[shard.name].exclusions) for shard in todo if shard.retry)
    before = total - again - sum(len(shard.videos) for shard in todo if not shard.retry)
    if results:
        retried = f", {again} failures of them are tried again" if again else ""
        _say(
            [f"{plan.name}: {len(results)} of {len(plan.shards)} shards are there already{retried}"]
        )
    done = Tally()
    log = ShardLog(plan.name, storage)

    def on_shard(shard: ShardPlan, result: ShardResult) -> None:
        results[shard.name] = result
        log.add(result)

    try:
        if todo:
            with progress(f"prepare {plan.name}", total, "videos", start=before) as bar:

                def on_progress(tally: Tally) -> None:
                    nonlocal done
                    done = done + tally
                    bar.advance(tally.videos, _status(done, bar.seconds))

                _engine(config)(todo, workers(config), on_shard, on_progress)
                seconds = bar.seconds
            _say([_rates(plan.name, done, seconds)])
    except KeyboardInterrupt:
        finished = len(results)
        raise Stopped(
            f"stopped: {finished} of {len(plan.shards)} shards of {plan.name} are finished; "
            "run the same command again to go on",
        ) from None
    finally:
        log.close()
    return _finish_set(plan, [results[shard.name] for shard in plan.shards], storage, version)


def _todo(plan: SetPlan, results: dict[str, ShardResult], retry_failed: bool) -> list[ShardPlan]:
    todo = []
    for shard in plan.shards:
        if shard.name not in results:
            todo.append(shard)
        elif retry_failed and results[shard.name].exclusions:
            todo.append(replace(shard, retry=True))
    return todo


def _engine(config: PrepareConfig) -> Engine:
    if config.engine == "local":
        return build_shards
    from pipelines._engine import ray_engine

    return ray_engine(config.ray_address, limited=config.workers is not None)


def _status(done: Tally, seconds: float) -> str:
    rate = done.frames / seconds if seconds > 0 else 0.0
    return f"{rate:.0f} frames/s, {size_text(done.bytes)}, {done.failures} failed"


def _rates(name: str, done: Tally, seconds: float) -> str:
    seconds = max(seconds, 1e-9)
    return (
        f"{name}: {done.videos} videos and {done.frames} frames in {seconds:.0f} s, "
        f"{done.videos / seconds:.1f} videos/s, {done.frames / seconds:.0f} frames/s"
    )


def workers(config: PrepareConfig) -> int:
    """Videos decoded at once on this machine."""
    return config.workers if config.workers is not None else usable_cpus()


def _finish_set(
    plan: SetPlan, results: list[ShardResult], storage: Storage, version: str
) -> PreparedSet:
    failures = [row for result in results for row in result.exclusions]
    excluded = failures + plan.videos.excluded
    infos = [result.info for result in results]
    _require_there(plan, results, storage)
    write_lists(plan, excluded, storage)
    _say([*_found(plan), *summary(plan, infos, excluded)])
    if not any(info.videos for info in infos):
        # They hold nothing, and would only stand in the way of the next try.
        for shard in plan.shards:
            storage.delete(shard.index)
            storage.delete(shard.tar)
        first = failures[0]
        raise InputError(
            f"none of the {len(failures)} videos of {plan.name} could be read; the first, "
            f"{first.source}: {first.kind}, {first.message}",
            fix=f"see {plan.name}.errors.csv",
        )
    manifest = write_manifest(plan, infos, len(excluded), version, storage)
    return PreparedSet(
        manifest=manifest,
        shards=infos,
        excluded=excluded,
        failed=len(failures),
        videos=len(plan.videos.videos),
    )


def _require_there(plan: SetPlan, results: list[ShardResult], storage: Storage) -> None:
    """What other machines have built must be seen from here before it is listed as finished."""
    for wait_seconds in (*_WAITS_SECONDS, None):
        sizes = storage.sizes()
        absent = [
            result
            for shard, result in zip(plan.shards, results, strict=True)
            if sizes.get(shard.tar) != result.info.bytes or shard.index not in sizes
        ]
        if not absent:
            return
        if wait_seconds is not None:
            time.sleep(wait_seconds)
    raise InputError(
        f"{len(absent)} finished shards are not there, for example {absent[0].info.file}, which "
        f"was built on {absent[0].host or 'this machine'}",
        storage.url,
        "with --engine ray, give a folder that all nodes share, or an address such as s3://…",
    )


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)
