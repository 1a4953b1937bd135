"""``seco prepare``: find the videos, plan the shards, build them, and report what became of all.

``--dry-run`` estimates the cost from the headers of a few videos. Nothing is decoded: the rates
were measured on one core of a server of 2023 (``benchmarks/results/prepare.md``), and real ones
differ by a factor of two either way, so the result says "about".
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from pipelines._adapter import (
    Adapter,
    Discovery,
    Video,
    VideoSet,
    adapter,
    coverage_csv,
    coverage_lines,
    is_picture,
    source_bytes,
)
from pipelines._build import LONG_SECONDS, ShardResult, Tally, finished_indexes
from pipelines._clips import with_clips
from pipelines._config import PrepareConfig, validate
from pipelines._decode import CONTAINERS, CUT_SHORT, DecodeError, protocols
from pipelines._engine import build_shards, stoppable
from pipelines._ffmpeg import (
    FfmpegStream,
    Interrupted,
    ffmpeg_binary,
    ffmpeg_version,
    local_url,
    sandbox,
)
from pipelines._plan import FrameChoice, SetPlan, ShardPlan, Todo, plan_set
from pipelines._remote import Spool, brought_here, outline, spooled
from shards.atomic import csv_text, default_folder, json_text
from shards.errors import InputError, Stopped, TooManyExcluded
from shards.format import Exclusion, Manifest, ShardInfo
from shards.index import read_index
from shards.progress import progress, size_text
from shards.settings import usable_cpus
from shards.storage import Storage, is_remote, open_storage
from shards.terminal import say
from shards.videos import MANY_SHARDS, VideoList, write_videos

_SAMPLE = 24
_START_SECONDS = 0.03  # ffmpeg's start and exit
_DECODE_SECONDS = 0.3e-3  # per frame, and
_DECODE_SECONDS_A_PIXEL = 2.5e-9  # of the source
_ENCODE_SECONDS_A_PIXEL = 2.5e-9  # of the stored frame
_BYTES_A_PIXEL = 0.2  # of a JPEG of quality 90
_COPY_SECONDS = 0.1e-3  # per frame that is copied
_PROBE_SECONDS = 10.0

_SIZE = re.compile(rb"Video: .*?\b(\d{2,5})x(\d{2,5})\b")
_RATE = re.compile(rb"Video: .*?([\d.]+) fps")
_DURATION = re.compile(rb"Duration: (\d+):(\d+):([\d.]+)")


@dataclass(frozen=True)
class _Header:
    width: int  # px
    height: int
    frames: float
    seconds: float


def forecast(plan: SetPlan, workers: int) -> Iterable[str]:
    """Yield lines for people: videos, shards, and about how many bytes and how much time."""
    planned = list(plan.shards)
    shard = plan.shards[planned[0]]
    videos = len(plan.ordered)
    names = f"{shard.tar} to {planned[-1]}.tar" if len(planned) > 1 else shard.tar
    labels = len(plan.videos.label_names)
    yield (
        f"{plan.name}: {videos} videos, {f'{labels} labels, ' if labels else ''}"
        f"{_frames_text(shard.choice)} -> {len(plan.shards)} shards, {names}"
    )
    costs = [cost for video in _sample(plan) if (cost := _cost(video, shard))]
    if not costs:
        yield f"{plan.name}: no header could be read, so size and time are unknown"
        return
    stored, size, seconds = (
        sum(column) / len(costs) * videos for column in zip(*costs, strict=True)
    )
    yield (
        f"{plan.name}: about {stored:.0f} frames, {size_text(size)} and "
        f"{_time_text(seconds / workers)} with {workers} workers (from {len(costs)} videos)"
    )


def _frames_text(choice: FrameChoice) -> str:
    if choice.fps is not None:
        return f"{choice.fps:g} frames per second"
    return f"{choice.count} frames per video" if choice.count else "all frames"


def _time_text(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, seconds):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _sample(plan: SetPlan) -> list[Video]:
    step = max(1, len(plan.ordered) // _SAMPLE)
    return list(plan.ordered[::step][:_SAMPLE])


def _probe(video: Video, binary: str) -> _Header | None:
    """Return what the header says; None if it says too little."""
    argv = [
        *(binary, "-nostdin", "-hide_banner", "-protocol_whitelist", protocols(video.inside)),
        *("-format_whitelist", ",".join(CONTAINERS)),
        *("-i", local_url(video.path, video.inside)),
    ]
    with FfmpegStream(argv, _PROBE_SECONDS, reads=video.path) as stream:
        stream.wait()  # fails: no output is given
        log = stream.read_log()
    size, rate, clock = (pattern.search(log) for pattern in (_SIZE, _RATE, _DURATION))
    if not (size and rate and clock):
        return None
    hours, minutes, rest = (float(part) for part in clock.groups())
    seconds = hours * 3600 + minutes * 60 + rest
    return _Header(int(size[1]), int(size[2]), seconds * float(rate[1]), seconds)


def _cost(video: Video, shard: ShardPlan) -> tuple[float, float, float] | None:
    """Return stored frames, their bytes, and seconds of one core; None if the header lacks them."""
    if video.frames is not None:
        frames = 1
        if video.frames.only is None:
            frames = sum(
                is_picture(path.name) for path in (video.path / video.frames.images).glob("*")
            )
            frames = min(frames, shard.choice.count or frames)
        return frames, max(0, source_bytes(video)), frames * _COPY_SECONDS
    try:
        with outline(video) as headers:
            header = _probe(headers, shard.binary)
    except DecodeError:
        return None
    if header is None or shard.short_edge is None:
        return None
    if video.span is not None and header.seconds:
        seconds = max(0.0, min(video.span[1], header.seconds) - video.span[0])
        part = seconds / header.seconds
        header = replace(header, frames=header.frames * part, seconds=seconds)
    pixels = header.width * header.height
    scale = min(1.0, shard.short_edge / max(1, min(header.width, header.height)))
    small = pixels * scale**2
    stored = header.frames
    if shard.choice.fps is not None:
        stored = min(stored, header.seconds * shard.choice.fps)
    elif shard.choice.count is not None:
        stored = min(stored, float(shard.choice.count))
    decoding = header.frames * (_DECODE_SECONDS + _DECODE_SECONDS_A_PIXEL * pixels)
    encoding = stored * _ENCODE_SECONDS_A_PIXEL * small
    return stored, stored * _BYTES_A_PIXEL * small, _START_SECONDS + decoding + encoding


def write_manifest(
    plan: SetPlan, infos: list[ShardInfo], excluded: int, ffmpeg_version: str, storage: Storage
) -> str:
    """Write ``NAME.json``, the last of a dataset's files; return its path or address."""
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
    """Write ``NAME.errors.csv``, the videos that are not in the dataset, if there are any.

    And ``NAME.coverage.csv``, if official lists say what should be there.
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
    """Yield lines for people: what the dataset contains and what was excluded."""
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
    """``NAME.log.jsonl``: one line per shard built, with when, where and how long."""

    def __init__(self, name: str, storage: Storage) -> None:
        self._file = f"{name}.log.jsonl"
        self._storage = storage
        self._lines: list[str] = []
        self._written = time.monotonic()

    def add(self, result: ShardResult) -> None:
        """Log a shard that has been built."""
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
        """Write pending lines."""
        if self._lines:
            self._storage.append(self._file, "".join(self._lines))
            self._lines.clear()
        self._written = time.monotonic()


_WAITS_SECONDS = (1.0, 5.0, 30.0)  # network disks show other machines' files with a delay

Engine = Callable[
    [
        Collection[ShardPlan],
        int,
        Callable[[ShardPlan, ShardResult], None],
        Callable[[Tally], None],
    ],
    None,
]


@dataclass(frozen=True, kw_only=True)
class PreparedSet:
    """One finished dataset."""

    manifest: str  # its path or address
    shards: list[ShardInfo]
    excluded: list[Exclusion]
    failed: int  # of the excluded, those that were found but could not be stored
    videos: int  # found
    unread: int = 0  # recordings that could not be divided into clips
    recordings: int = 0  # found; not counted if none is unread


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """The results of a run; empty after ``--dry-run``."""

    sets: list[PreparedSet]


def prepare(config: PrepareConfig) -> PrepareReport:
    """Make the shards of a dataset; finished ones of an earlier run with this plan are kept.

    Raises:
        InputError: invalid input, or no video at all could be read.
        TooManyExcluded: everything is written, but more than ``max_failures`` percent failed.
        Stopped: Ctrl-C or SIGTERM; the same command resumes.
    """
    validate(config)
    config = replace(config, out=config.out or default_folder())
    dataset = adapter(config.dataset)
    _require_whole(config, dataset)
    _require_clips_make_sense(config, dataset)
    _require_used(config, dataset)
    binary = ffmpeg_binary(config.ffmpeg)
    sandbox(binary)
    with brought_here(config, whole=not dataset.reads_addresses) as (local, addressed):
        found = addressed(dataset.discover(local))
        with spooled(config) as spool:
            sets = _prepare_found(found, config, dataset, binary, spool)
    for lost, total, what in (
        (sum(row.failed for row in sets), sum(row.videos for row in sets), "videos"),
        (sum(row.unread for row in sets), sum(row.recordings for row in sets), "recordings"),
    ):
        if lost * 100 > config.max_failures * total:
            raise TooManyExcluded(
                f"{lost} of {total} {what} ({lost * 100 / total:.1f} %) could not be stored, "
                f"more than --max-failures {config.max_failures:g}",
                config.out,
                "the shards are written; see *.errors.csv",
            )
    return PrepareReport(sets=sets)


def _prepare_found(
    found: Discovery, config: PrepareConfig, dataset: Adapter, binary: str, spool: Spool
) -> list[PreparedSet]:
    choice = _choice(config, dataset)
    version = ffmpeg_version(binary)
    if config.clip_seconds is not None:
        try:
            with stoppable() as stop:
                divided = [
                    with_clips(part, config, binary, workers(config), spool) for part in found.sets
                ]
                if stop:
                    raise Interrupted
        except KeyboardInterrupt:
            raise Stopped(
                "stopped: nothing has been decoded yet; run the same command again"
            ) from None
        found = replace(found, sets=divided)
        for videos in divided:
            if unread := _unread(videos):
                _say(
                    [
                        f"{videos.name}: left out are {len(unread)} recordings whose length could "
                        f"not be read, for example {unread[0].source}: {unread[0].kind}"
                    ]
                )
    for videos in found.sets:
        if not videos.videos:
            first = videos.excluded[0].source if videos.excluded else videos.name
            if unread := _unread(videos):
                raise InputError(
                    f"no recording can be divided into clips, for example {unread[0].source}: "
                    f"{unread[0].kind}, {unread[0].message}",
                    config.src,
                )
            raise InputError(
                f"no video matches the annotations, for example {first}", config.src, "check --src"
            )
    source = config.src if is_remote(config.src) else os.path.abspath(config.src)
    plans = [
        plan_set(
            videos,
            config,
            choice=choice,
            short_edge=config.short_edge or dataset.default_short_edge,
            root=found.root or source,
            binary=binary,
            ffmpeg_version=version,
            spool=spool,
        )
        for videos in found.sets
    ]
    _say(found.notes)
    if config.dry_run:
        for plan in plans:
            _say([*_found(plan), *forecast(plan, workers(config))])
        return []
    storage = open_storage(config.out)
    storage.require_writable()
    with ExitStack() as locks:
        for plan in plans:
            locks.enter_context(storage.writer_lock(plan.name))
        # Shards of another plan are refused before anything is decoded.
        finished = [_finished_shards(plan, storage) for plan in plans]
        return [
            _prepare_set(plan, done, config, storage, version)
            for plan, done in zip(plans, finished, strict=True)
        ]


def _unread(videos: VideoSet) -> list[Exclusion]:
    """The recordings that could not be divided into clips, for reasons that may pass."""
    return [row for row in videos.excluded if row.kind in CUT_SHORT]


def _require_whole(config: PrepareConfig, dataset: Adapter) -> None:
    """Raises InputError where options would thin out or shrink what has to stay as it is."""
    for name in ("frames", "fps", "short_edge"):
        if dataset.stored_whole is not None and getattr(config, name) is not None:
            raise InputError(dataset.stored_whole, f"--{name.replace('_', '-')}", "leave it out")


def _require_clips_make_sense(config: PrepareConfig, dataset: Adapter) -> None:
    """Raises InputError where clips are requested of videos that are short by definition."""
    if config.clip_seconds is not None and not dataset.recordings:
        raise InputError(
            f"the videos of {config.dataset} are not divided into clips",
            "--clip-seconds",
            "prepare them as dataset folder or list",
        )


def _require_used(config: PrepareConfig, dataset: Adapter) -> None:
    """Raises InputError for an option that does nothing for this dataset."""
    pictures = dataset.default_short_edge is None
    for option, idle in (
        ("--keyframes", config.keyframes and pictures),
        ("--frame-rate", config.frame_rate is not None and config.dataset != "frames"),
        ("--root", config.root is not None and config.dataset != "list"),
        ("--allow-outside", config.allow_outside and config.dataset != "list"),
    ):
        if idle:
            raise InputError(f"does nothing for dataset {config.dataset}", option, "leave it out")


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
        for name, index in finished_indexes(plan, storage)
    }


def _prepare_set(
    plan: SetPlan,
    results: dict[str, ShardResult],
    config: PrepareConfig,
    storage: Storage,
    version: str,
) -> PreparedSet:
    todo = _todo(plan, results, config.retry_failed)
    total = len(plan.ordered)
    # Of a shard that is retried, only its failures count as work.
    again = sum(len(results[name].exclusions) for name in todo.retried)
    new = (name for name in todo.names if name not in todo.retried)
    before = total - again - sum(map(plan.shards.videos_in, new))
    if results:
        retried = f", {again} failed videos are retried" if again else ""
        _say([f"{plan.name}: {len(results)} of {len(plan.shards)} shards already exist{retried}"])
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
            long = sum(results[name].long for name in todo.names)
            if long and config.clip_seconds is None and adapter(config.dataset).recordings:
                _say([_of_long_videos(plan.name, long)])
    except KeyboardInterrupt:
        finished = len(results)
        raise Stopped(
            f"stopped: {finished} of {len(plan.shards)} shards of {plan.name} are finished; "
            "run the same command again to resume",
        ) from None
    finally:
        log.close()
    return _finish_set(plan, [results[name] for name in plan.shards], storage, version)


def _of_long_videos(name: str, count: int) -> str:
    return (
        f"{name}: {count} videos are longer than {LONG_SECONDS:.0f} s. The frames of each are "
        "spread over all of it and count as one video: --clip-seconds 10 divides it into clips"
    )


def _todo(plan: SetPlan, results: dict[str, ShardResult], retry_failed: bool) -> Todo:
    retried = {name for name, result in results.items() if retry_failed and result.exclusions}
    names = [name for name in plan.shards if name not in results or name in retried]
    return Todo(plan.shards, names, retried)


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
    """Return how many videos are decoded at once on this machine."""
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
        # Empty shards would only be in the way of the next try.
        for name in plan.shards:
            storage.delete(f"{name}.idx")
            storage.delete(f"{name}.tar")
        first = failures[0]
        raise InputError(
            f"none of the {len(failures)} videos of {plan.name} could be read; the first, "
            f"{first.source}: {first.kind}, {first.message}",
            fix=f"see {plan.name}.errors.csv",
        )
    if len(infos) >= MANY_SHARDS and not is_remote(storage.url):
        folder = Path(storage.url)
        indexes = (read_index(folder / f"{name}.idx") for name in plan.shards)
        write_videos(folder / f"{plan.name}.videos", VideoList.of(indexes))
    manifest = write_manifest(plan, infos, len(excluded), version, storage)
    unread = len(_unread(plan.videos))
    read = len({video.source for video in plan.videos.videos}) if unread else 0
    return PreparedSet(
        manifest=manifest,
        shards=infos,
        excluded=excluded,
        failed=len(failures),
        videos=len(plan.ordered),
        unread=unread,
        recordings=unread + read,
    )


def _require_there(plan: SetPlan, results: list[ShardResult], storage: Storage) -> None:
    """Check that shards built on other machines are visible here before listing them."""
    for wait_seconds in (*_WAITS_SECONDS, None):
        sizes = storage.sizes()
        absent = [
            result
            for name, result in zip(plan.shards, results, strict=True)
            if sizes.get(f"{name}.tar") != result.info.bytes or f"{name}.idx" not in sizes
        ]
        if not absent:
            return
        if wait_seconds is not None:
            time.sleep(wait_seconds)
    raise InputError(
        f"{len(absent)} finished shards were not found, for example {absent[0].info.file}, which "
        f"was built on {absent[0].host or 'this machine'}",
        storage.url,
        "with --engine ray, give a folder that all nodes share, or an address such as s3://…",
    )


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)
