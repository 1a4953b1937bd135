"""Building one shard: a function of its plan and nothing else."""

from __future__ import annotations

import itertools
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from pipelines._adapter import Video
from pipelines._colour import encode_jpeg, jpeg_planes
from pipelines._decode import DecodeError, Frame, WrongForecast, decoding
from pipelines._ffmpeg import kill_running
from pipelines._finished import FinishedShard, finished_shard
from pipelines._frames import FrameChoice, nearest_distinct
from pipelines._mp4 import forecast_times
from pipelines._plan import ShardPlan, described
from pipelines._sequences import store_sequence
from shards.errors import InputError
from shards.format import Exclusion, ShardInfo, VideoRecord
from shards.storage import open_storage
from shards.writer import ShardWriter

_JPEG_MOST_PX = 65_500
_MOST_ATTEMPTS = 3  # of a video whose ffmpeg was killed from outside


@dataclass(frozen=True)
class Tally:
    """What has become of some videos."""

    videos: int = 0
    frames: int = 0  # stored
    bytes: int = 0  # of stored frames
    failures: int = 0  # videos that could not be stored

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            videos=self.videos + other.videos,
            frames=self.frames + other.frames,
            bytes=self.bytes + other.bytes,
            failures=self.failures + other.failures,
        )


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What a finished shard holds, and what it could not."""

    info: ShardInfo
    exclusions: list[Exclusion]
    seconds: float = 0.0  # it took
    host: str = ""


@dataclass(frozen=True)
class StoredVideo:
    """A video as it goes into the tar."""

    record: VideoRecord
    frames: list[bytes]  # JPEG


Outcome = StoredVideo | Exclusion


def build_shard(
    plan: ShardPlan, threads: int = 1, on_progress: Callable[[Tally], None] | None = None
) -> ShardResult:
    """Decode the plan's videos and write their tar and index.

    With ``plan.retry`` the videos that the finished shard holds are taken from it, and when none
    of the others can be stored this time either, it stays as it is. The bytes are those of a
    shard that is built anew.

    Args:
        threads: videos decoded at once; never changes a byte.
        on_progress: told of every video when it is done, stored or not.

    Raises:
        InputError: the disk is full, or cannot be written to; the raw folder is not there.
    """
    began = time.monotonic()
    if not Path(plan.src).is_dir():
        # A disk that is not mounted must not pass for thousands of missing videos.
        raise InputError(f"is not there on {platform.node()}", plan.src, "mount it, and go on")
    tell = on_progress or (lambda tally: None)
    storage = open_storage(plan.folder)
    with ExitStack() as stack:
        kept: FinishedShard | None = None
        if plan.retry:
            kept = stack.enter_context(finished_shard(storage, plan))
        todo = [video for video in plan.videos if kept is None or video.key not in kept]
        outcomes = stack.enter_context(closing(_in_order(todo, plan, threads)))
        told: Iterable[Outcome] = _told(outcomes, tell)
        if kept is not None:
            failed, told = _up_to_first_stored(told)
            if not told and failed == kept.exclusions:
                return _result(kept.info, failed, began)
            told = _merged(plan, kept, itertools.chain(failed, told))
        folder = stack.enter_context(storage.writing())
        info, exclusions = _write(plan, folder, told)
    return _result(info, exclusions, began)


def _write(
    plan: ShardPlan, folder: Path, outcomes: Iterable[Outcome]
) -> tuple[ShardInfo, list[Exclusion]]:
    exclusions = []
    with ShardWriter(folder / plan.tar, plan.digest) as writer:
        for outcome in outcomes:
            if isinstance(outcome, Exclusion):
                writer.exclude(outcome)
                exclusions.append(outcome)
            else:
                writer.add(outcome.record, outcome.frames)
    assert writer.info is not None
    return writer.info, exclusions


def _result(info: ShardInfo, exclusions: list[Exclusion], began: float) -> ShardResult:
    seconds = round(time.monotonic() - began, 3)
    return ShardResult(info=info, exclusions=exclusions, seconds=seconds, host=platform.node())


def _up_to_first_stored(
    outcomes: Iterable[Outcome],
) -> tuple[list[Exclusion], Iterable[Outcome]]:
    """The exclusions before the first video that could be stored, and the rest; () when none."""
    failed: list[Exclusion] = []
    remaining = iter(outcomes)
    for outcome in remaining:
        if isinstance(outcome, StoredVideo):
            return failed, itertools.chain([outcome], remaining)
        failed.append(outcome)
    return failed, ()


def _merged(
    plan: ShardPlan, kept: FinishedShard, tried: Iterator[Outcome]
) -> Generator[Outcome, None, None]:
    """The outcomes in the plan's order, of old and new."""
    for video in plan.videos:
        yield StoredVideo(*kept.read(video.key)) if video.key in kept else next(tried)


def _told(
    outcomes: Iterable[Outcome], tell: Callable[[Tally], None]
) -> Generator[Outcome, None, None]:
    for outcome in outcomes:
        yield outcome
        if isinstance(outcome, Exclusion):
            tell(Tally(videos=1, failures=1))
        else:
            size = sum(map(len, outcome.frames))
            tell(Tally(videos=1, frames=len(outcome.frames), bytes=size))


def store_video(video: Video, plan: ShardPlan) -> StoredVideo:
    """Decode one video and encode the frames the plan keeps.

    Raises:
        DecodeError: it cannot be stored.
    """
    if video.frames is not None:
        return StoredVideo(*store_sequence(video, plan))
    count = plan.choice.count
    times = forecast_times(video.path) if count is not None else None
    if count is not None and times is not None:
        try:
            only = nearest_distinct(times.tolist(), count)
            stored, all_times = _decoded(video, plan, only)
            if nearest_distinct(all_times, count) == only:
                return stored
        except WrongForecast:
            pass
        except DecodeError as error:
            # With every frame decoded, the same failure has the same name in all containers.
            if error.kind in ("timeout", "crashed", "damaged"):
                raise
    return _decoded(video, plan, None)[0]


def _decoded(
    video: Video, plan: ShardPlan, only: Sequence[int] | None
) -> tuple[StoredVideo, list[float]]:
    """The video, and the times of all its frames.

    Args:
        only: the frames to store; None leaves it to the plan's choice.
    """
    assert plan.short_edge is not None, "only sequences are stored as they are"
    chooser = plan.choice.chooser() if only is None else FrameChoice().chooser()
    times: list[float] = []
    frames: list[bytes] = []
    with decoding(
        video.path,
        short_edge=plan.short_edge,
        timeout_seconds=plan.timeout_seconds,
        binary=plan.binary,
        only=only,
    ) as decoded:

        def encode(chosen: Sequence[Frame]) -> None:
            for time, planes in chosen:
                if max(decoded.width, decoded.height) > _JPEG_MOST_PX:
                    raise DecodeError("unreadable", "the picture is too large for JPEG")
                width, height = decoded.width, decoded.height
                exact = jpeg_planes(planes, width, height, decoded.matrix, decoded.full_range)
                times.append(time)
                frames.append(encode_jpeg(exact, plan.quality))

        for frame in decoded:
            encode(chooser.offer(frame))
        encode(chooser.finish())
    if decoded.damage is not None and not plan.keep_damaged:
        raise DecodeError("damaged", decoded.damage)
    if only is not None and len(frames) != len(only):
        raise WrongForecast
    if len(frames) < plan.min_frames:
        raise DecodeError("too-short", f"{len(frames)} frames, fewer than {plan.min_frames}")
    record = VideoRecord(
        **described(video, plan.dataset),
        width=decoded.width,
        height=decoded.height,
        frame_times=times,
        source_fps=decoded.source_fps,
        source_frames=len(decoded.times),
        source_duration=decoded.source_duration,
    )
    return StoredVideo(record, frames), decoded.times


def _outcome(video: Video, plan: ShardPlan, stopping: threading.Event) -> Outcome:
    for attempt in itertools.count(1):
        try:
            return store_video(video, plan)
        except DecodeError as error:
            # Whoever killed ffmpeg (for want of memory, mostly) need not have meant this video.
            if error.kind != "crashed" or attempt == _MOST_ATTEMPTS or stopping.is_set():
                return Exclusion(source=video.source, kind=error.kind, message=error.message)
    raise AssertionError("unreachable")


def _in_order(
    videos: Sequence[Video], plan: ShardPlan, threads: int
) -> Generator[Outcome, None, None]:
    """The outcome of every video, in the order given, a few being decoded ahead."""
    stopping = threading.Event()
    if threads == 1:
        yield from (_outcome(video, plan, stopping) for video in videos)
        return
    ahead: deque[Future[Outcome]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for video in videos:
                ahead.append(pool.submit(_outcome, video, plan, stopping))
                # Stored videos wait in memory: no further ahead than keeps the threads busy.
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BaseException:
            stopping.set()
            for future in ahead:
                future.cancel()
            kill_running()
            raise
