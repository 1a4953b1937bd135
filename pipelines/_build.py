"""Building one shard: a function of its plan and nothing else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from pipelines._adapter import Video
from pipelines._colour import jpeg_planes
from pipelines._decode import DecodeError, decoding
from pipelines._ffmpeg import kill_running
from pipelines._jpeg import encode_jpeg
from pipelines._plan import ShardPlan
from shards.format import Exclusion, ShardInfo, VideoRecord
from shards.writer import ShardWriter

_JPEG_MOST_PX = 65_500


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What a finished shard holds, and what it could not."""

    info: ShardInfo
    exclusions: list[Exclusion]


@dataclass(frozen=True)
class StoredVideo:
    """A video as it goes into the tar."""

    record: VideoRecord
    frames: list[bytes]  # JPEG


def build_shard(
    plan: ShardPlan, threads: int = 1, on_video: Callable[[], None] | None = None
) -> ShardResult:
    """Decode the plan's videos and write their tar and index.

    Args:
        threads: videos decoded at once; never changes a byte.
        on_video: called when a video is done, stored or not.

    Raises:
        InputError: the disk is full, or cannot be written to.
    """
    exclusions = []
    with (
        ShardWriter(plan.path, plan.digest) as writer,
        closing(_in_order(plan, threads)) as outcomes,
    ):
        for outcome in outcomes:
            if isinstance(outcome, Exclusion):
                writer.exclude(outcome)
                exclusions.append(outcome)
            else:
                writer.add(outcome.record, outcome.frames)
            if on_video is not None:
                on_video()
    assert writer.info is not None
    return ShardResult(info=writer.info, exclusions=exclusions)


def store_video(video: Video, plan: ShardPlan) -> StoredVideo:
    """Decode one video and encode the frames the plan keeps.

    Raises:
        DecodeError: it cannot be stored.
    """
    chooser = plan.choice.chooser()
    times: list[float] = []
    frames: list[bytes] = []
    with decoding(
        video.path,
        short_edge=plan.short_edge,
        timeout_seconds=plan.timeout_seconds,
        binary=plan.binary,
    ) as decoded:

        def encode(chosen: Sequence[tuple[float, bytes]]) -> None:
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
    if len(frames) < plan.min_frames:
        raise DecodeError("too-short", f"{len(frames)} frames, fewer than {plan.min_frames}")
    record = VideoRecord(
        key=video.key,
        dataset=plan.dataset,
        source=video.source,
        label=video.label,
        label_name=video.label_name,
        splits=video.splits,
        width=decoded.width,
        height=decoded.height,
        frame_times=times,
        source_fps=decoded.source_fps,
        source_frames=decoded.frames,
        source_duration=decoded.source_duration,
    )
    return StoredVideo(record, frames)


def _outcome(video: Video, plan: ShardPlan) -> StoredVideo | Exclusion:
    try:
        return store_video(video, plan)
    except DecodeError as error:
        return Exclusion(source=video.source, kind=error.kind, message=error.message)


def _in_order(plan: ShardPlan, threads: int) -> Generator[StoredVideo | Exclusion, None, None]:
    """The outcome of every video, in the plan's order, a few being decoded ahead."""
    if threads == 1:
        yield from (_outcome(video, plan) for video in plan.videos)
        return
    ahead: deque[Future[StoredVideo | Exclusion]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for video in plan.videos:
                ahead.append(pool.submit(_outcome, video, plan))
                # Stored videos wait in memory: no further ahead than keeps the threads busy.
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BaseException:
            for future in ahead:
                future.cancel()
            kill_running()
            raise
