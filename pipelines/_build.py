"""Build one shard: a function of its plan and nothing else.

A video is decoded; a sequence, a folder of JPEG frames with a box per frame, is stored byte by
byte. Finished shards of an earlier run are compared with the plan and kept.
"""

from __future__ import annotations

import configparser
import io
import itertools
import math
import os
import platform
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipelines._adapter import (
    PICTURE_FORMATS,
    Video,
    is_picture,
    natural,
    read_text,
    source_bytes,
)
from pipelines._clips import NothingThere, Stored, decode_clips
from pipelines._colour import encode_jpeg, jpeg_planes
from pipelines._decode import (
    DecodeError,
    Decoding,
    Frame,
    WrongForecast,
    decoding,
    forecast_times,
)
from pipelines._ffmpeg import kill_running, require_going
from pipelines._plan import FrameChoice, SetPlan, ShardPlan, described, nearest_distinct, pieces
from shards.dataset import ShardSet
from shards.errors import InputError
from shards.format import Exclusion, ShardInfo, VideoRecord
from shards.index import MAX_FRAME_BYTES, ShardIndex, read_index
from shards.storage import Storage, UnreadableFrame, is_remote, open_storage
from shards.untrusted import read_regular, require_pixels
from shards.writer import ShardWriter

_FRAME = re.compile(r"(\d+)\.jpe?g", re.I)
_ASSUMED_FPS = 30.0  # OTB does not specify it
_START_OF_IMAGE = b"\xff\xd8"
_END_OF_IMAGE = b"\xff\xd9"
_BETWEEN = re.compile(r"[,;\s]+")

Box = list[float]  # x, y (the first pixel is 1), w, h; px


def store_sequence(video: Video, plan: ShardPlan) -> tuple[VideoRecord, list[bytes]]:
    """Read one sequence; resize its frames only if the plan sets a short edge.

    Raises:
        DecodeError: frames or annotations are missing or damaged.
    """
    layout = video.frames
    assert layout is not None
    boxes: list[Box] = []
    if layout.ground_truth is None:
        paths = _pictures(video)
        fps = layout.rate
    else:
        boxes = _boxes(video.path / layout.ground_truth)
        paths = _in_range(_frame_paths(video.path / layout.images), video, boxes)
        fps = _fps(video.path / "meta_info.ini")
    absence = _flags(video, "absence.label", len(paths))
    cover = _flags(video, "cover.label", len(paths))
    times = [round(number / (fps or _ASSUMED_FPS), 6) for number in range(len(paths))]
    chosen = _chosen(plan.choice, times)
    if len(chosen) < plan.min_frames:
        raise DecodeError("too-short", f"{len(chosen)} frames, fewer than {plan.min_frames}")
    # The frames of a tracking sequence are JPEGs, and stay as they are.
    read = _read if layout.ground_truth is not None else partial(_read_jpeg, quality=plan.quality)
    frames = [read(paths[number]) for number in chosen]
    width, height = _size(frames, [paths[number] for number in chosen])
    kept = [boxes[number] for number in chosen if number < len(boxes)]
    if plan.short_edge is not None:
        stored = _smaller_size(width, height, plan.short_edge)
        if stored != (width, height):
            frames = [
                _resized(frame, stored, plan.quality, paths[number].name)
                for frame, number in zip(frames, chosen, strict=True)
            ]
            kept = [_scaled(box, stored[0] / width, stored[1] / height) for box in kept]
            width, height = stored
    record = VideoRecord(
        **described(video, plan.dataset),
        width=width,
        height=height,
        frame_times=[times[number] for number in chosen],
        source_fps=fps,
        source_frames=len(paths),
        source_duration=None,
        boxes=kept if layout.ground_truth is not None else None,
        absence=[absence[number] for number in chosen] if absence else None,
        cover=[cover[number] for number in chosen] if cover else None,
    )
    return record, frames


def _pictures(video: Video) -> list[Path]:
    """Return the pictures of a folder, ordered by the numbers in their names."""
    assert video.frames is not None
    if video.frames.only is not None:
        return [video.path / video.frames.only]
    try:
        with os.scandir(video.path) as entries:
            names = [entry.name for entry in entries if is_picture(entry.name) and entry.is_file()]
    except OSError as error:
        raise DecodeError("missing", f"{video.path.name}: {error.strerror}") from error
    if not names:
        raise DecodeError("zero-frames", f"{video.path.name} contains no pictures")
    return [video.path / name for name in sorted(names, key=natural)]


def _frame_paths(folder: Path) -> list[tuple[int, Path]]:
    """Return (number in the name, path), sorted by number."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise DecodeError("missing", f"{folder.name}: {error.strerror}") from error
    found = sorted((int(m[1]), folder / name) for name in names if (m := _FRAME.fullmatch(name)))
    if not found:
        raise DecodeError("zero-frames", f"{folder.name} contains no frames such as 0001.jpg")
    return found


def _in_range(frames: list[tuple[int, Path]], video: Video, boxes: list[Box]) -> list[Path]:
    """Return the annotated frames; copies that are already cut to them are not cut again."""
    layout = video.frames
    assert layout is not None
    if layout.range is not None and len(boxes) != len(frames):
        first, last = layout.range
        frames = [(number, path) for number, path in frames if first <= number <= last]
    # GOT-10k publishes only the first box of its test sequences.
    first_only = layout.flags and len(boxes) == 1 and video.splits.get("official") == "test"
    if len(boxes) != len(frames) and not first_only:
        raise DecodeError(
            "bad-annotation", f"{layout.ground_truth}: {len(boxes)} boxes for {len(frames)} frames"
        )
    return [path for _, path in frames]


def _boxes(path: Path) -> list[Box]:
    boxes = []
    for number, line in _lines(path):
        words = _BETWEEN.split(line)
        try:
            box = [float(word) for word in words]
        except ValueError:
            box = []
        if len(box) != 4 or not all(map(math.isfinite, box)):
            raise DecodeError(
                "bad-annotation", f"{path.name} line {number}: {line[:60]!r} is not x,y,w,h"
            )
        boxes.append(box)
    if not boxes:
        raise DecodeError("bad-annotation", f"{path.name} is empty")
    return boxes


def _flags(video: Video, file: str, frames: int) -> list[int] | None:
    """Return GOT-10k's number per frame (absence 0/1, cover 0 … 8); None if there is no file."""
    assert video.frames is not None
    path = video.path / file
    if not video.frames.flags or not path.is_file():
        return None
    lines = _lines(path)
    for number, line in lines:
        if not line.isdecimal():
            raise DecodeError(
                "bad-annotation", f"{file} line {number}: {line[:60]!r} is not a number"
            )
    if len(lines) != frames:
        raise DecodeError("bad-annotation", f"{file}: {len(lines)} lines for {frames} frames")
    return [int(line) for _, line in lines]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return (number from 1, text) of the lines that are not empty."""
    try:
        lines = enumerate(read_text(path).splitlines(), start=1)
        return [(number, line.strip()) for number, line in lines if line.strip()]
    except InputError as error:
        kind = "bad-annotation" if path.exists() else "missing"
        raise DecodeError(kind, f"{path.name}: {error.what}") from error


def _fps(path: Path) -> float | None:
    """Return the frame rate of a GOT-10k sequence, ``anno_fps: 10Hz`` in ``meta_info.ini``."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(read_text(path))
        fps = float(parser["METAINFO"]["anno_fps"].lower().removesuffix("hz"))
    except (InputError, configparser.Error, KeyError, ValueError):
        return None
    return fps if 0 < fps < math.inf else None


def _chosen(choice: FrameChoice, times: list[float]) -> list[int]:
    if choice.count is not None:
        return nearest_distinct(times, choice.count)
    chooser = choice.chooser()
    given: list[Frame] = []
    for number, moment in enumerate(times):
        given += chooser.offer(Frame(moment, np.array([number])))
    return [int(frame.planes[0]) for frame in given + chooser.finish()]


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_FRAME_BYTES)
    except InputError as error:
        raise DecodeError("unreadable", f"{path.name}: {error.what}") from error


def _read_jpeg(path: Path, quality: int) -> bytes:
    """Return the bytes of a JPEG as they are, those of another picture encoded as one."""
    data = _read(path)
    if data.startswith(_START_OF_IMAGE):
        return data
    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as picture:
            require_pixels(*picture.size)
            if picture.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits per channel")
            pixels = np.asarray(picture.convert("RGB"))
        return bytes(
            simplejpeg.encode_jpeg(
                pixels, quality=quality, colorspace="RGB", colorsubsampling="420"
            )
        )
    except UnidentifiedImageError as error:  # its text names an object in memory
        raise DecodeError("unreadable", f"{path.name} is not a picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError("unreadable", f"{path.name} cannot be stored ({error})") from error


def _size(frames: list[bytes], paths: list[Path]) -> tuple[int, int]:
    """Return the size that all frames share, from their headers."""
    sizes = []
    for frame, path in zip(frames, paths, strict=True):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(frame)
            require_pixels(width, height)
        except ValueError as error:
            raise DecodeError("unreadable", f"{path.name} is not a JPEG ({error})") from error
        # The end-of-image marker: some programs write data after it, and a thumbnail in front has
        # one of its own.
        if _END_OF_IMAGE not in frame[len(frame) // 2 :]:
            raise DecodeError("unreadable", f"{path.name} is cut short")
        sizes.append((width, height))
        if sizes[-1] != sizes[0]:
            raise DecodeError("unreadable", f"{path.name} is {width}x{height}, unlike the first")
    return sizes[0]


def _smaller_size(width: int, height: int, short_edge: int) -> tuple[int, int]:
    """Return the stored size, as for videos: never larger, sides even."""
    scale = min(1.0, short_edge / min(width, height))
    if scale == 1.0:
        return width, height
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def _resized(frame: bytes, size: tuple[int, int], quality: int, name: str) -> bytes:
    try:
        with Image.open(io.BytesIO(frame)) as picture:
            colour = "GRAY" if picture.mode == "L" else "RGB"
            whole = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
            pixels = np.asarray(whole.resize(size, Image.Resampling.BICUBIC))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError("unreadable", f"{name} cannot be decoded ({error})") from error
    shaped = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(shaped), quality=quality, colorspace=colour, colorsubsampling="420"
        )
    )


def _scaled(box: Box, across: float, down: float) -> Box:
    x, y, width, height = box
    return [(x - 1) * across + 1, (y - 1) * down + 1, width * across, height * down]


_MOST_NAMED = 3


def finished_indexes(plan: SetPlan, storage: Storage) -> Iterator[tuple[str, ShardIndex]]:
    """Yield the name and index of each shard of the plan that is finished.

    Raises:
        InputError: the folder contains shards of this name from another plan, or from files that
            have changed since.
    """
    sizes = storage.sizes()
    pattern = re.compile(re.escape(plan.name) + r"-\d{3,}\.idx")
    for file in sorted(name for name in sizes if pattern.fullmatch(name)):
        name = file.removesuffix(".idx")
        try:
            with storage.reading(file) as path:
                index = read_index(path)
        except InputError:
            continue  # incomplete after a crash: the shard is built again, if it is planned
        shard = plan.shards.get(name)
        if shard is None or index.plan_digest != shard.digest:
            raise InputError(
                f"holds shards of {plan.name} prepared from other videos, with other settings or "
                "by another ffmpeg",
                storage.url,
                "choose another --out or --name, or delete them",
            )
        if sizes.get(shard.tar) == index.info.bytes:
            _require_same_sources(shard, index, storage)
            yield name, index


def _require_same_sources(shard: ShardPlan, index: ShardIndex, storage: Storage) -> None:
    """Check the source files: changed ones are another input, missing ones are not."""
    videos = {video.key: video for video in shard.videos}
    changed = [
        source
        for key, (source, size) in zip(index.keys, index.sources, strict=True)
        if key in videos and _size_now(videos[key], source) not in (size, -1)
    ]
    if changed:
        named = ", ".join(changed[:_MOST_NAMED]) + (", …" if changed[_MOST_NAMED:] else "")
        raise InputError(
            f"{shard.tar} was made from other files than those now in --src: {named}",
            storage.url,
            f"delete {shard.index} to rebuild it, or choose another --out or --name",
        )


def _size_now(video: Video, source: str) -> int:
    return source_bytes(video) if video.source == source else -2


class FinishedShard:
    """The videos of a finished shard, to be copied as they are."""

    def __init__(self, tar: Path, index: ShardIndex) -> None:
        self.info: ShardInfo = index.info
        self.exclusions: Sequence[Exclusion] = index.exclusions
        self._set = ShardSet([str(tar)], [index], [])
        self._keys = frozenset(index.keys)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def read(self, key: str) -> tuple[VideoRecord, list[bytes]]:
        """Return the record and frames of one video.

        Raises:
            InputError: the tar is damaged.
        """
        video = self._set.find(key)
        try:
            frames = [
                self._set.read_frame(video, frame) for frame in range(self._set.frame_count(video))
            ]
            return self._set.record(video), frames
        except UnreadableFrame as error:
            raise InputError(str(error), fix="see `seco verify`") from error


@contextmanager
def finished_shard(storage: Storage, plan: ShardPlan) -> Iterator[FinishedShard]:
    """Open a shard that an earlier run finished."""
    with storage.reading(plan.tar) as tar, storage.reading(plan.index) as path:
        yield FinishedShard(tar, read_index(path))


LONG_SECONDS = 60.0
_JPEG_MOST_PX = 65_500
_GATE_SECONDS = 0.5
_MOST_ATTEMPTS = 3  # for a video whose ffmpeg was killed from outside


@dataclass(frozen=True)
class Tally:
    """Counts of processed videos."""

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
    """The contents of a finished shard, and what could not be stored."""

    info: ShardInfo
    exclusions: list[Exclusion]
    long: int = 0  # videos of more than a minute that are not clips
    seconds: float = 0.0  # spent building it
    host: str = ""


@dataclass(frozen=True)
class StoredVideo:
    """A video as it goes into the tar."""

    record: VideoRecord
    frames: list[bytes]  # JPEG


Outcome = StoredVideo | Exclusion
_T = TypeVar("_T")


def build_shard(
    plan: ShardPlan,
    threads: Callable[[], int] = lambda: 1,
    on_progress: Callable[[Tally], None] | None = None,
) -> ShardResult:
    """Decode the plan's videos and write their tar and index.

    With ``plan.retry``, videos in the finished shard are copied from it; if none of the others can
    be stored this time either, it stays as it is. The bytes equal those of a shard built anew.

    Args:
        threads: how many videos, or pieces of recordings, to decode at once; may grow meanwhile;
            does not affect the bytes.
        on_progress: called for each finished video, stored or not.

    Raises:
        InputError: the disk is full or not writable, or the raw folder is missing.
    """
    began = time.monotonic()
    if not (is_remote(plan.src) or Path(plan.src).is_dir()):
        # A disk that is not mounted must not look like thousands of missing videos.
        raise InputError(f"not found on {platform.node()}", plan.src, "mount it and resume")
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
                return _result(kept.info, failed, 0, began)
            told = _merged(plan, kept, itertools.chain(failed, told))
        folder = stack.enter_context(storage.writing())
        info, exclusions, long = _write(plan, folder, told)
    return _result(info, exclusions, long, began)


def _write(
    plan: ShardPlan, folder: Path, outcomes: Iterable[Outcome]
) -> tuple[ShardInfo, list[Exclusion], int]:
    exclusions = []
    long = 0
    with ShardWriter(folder / plan.tar, plan.digest) as writer:
        for outcome in outcomes:
            if isinstance(outcome, Exclusion):
                writer.exclude(outcome)
                exclusions.append(outcome)
            else:
                writer.add(outcome.record, outcome.frames)
                record = outcome.record
                part = record.start is not None
                seconds = record.duration if part else record.source_duration
                long += (seconds or 0.0) > LONG_SECONDS
    assert writer.info is not None
    return writer.info, exclusions, long


def _result(info: ShardInfo, exclusions: list[Exclusion], long: int, began: float) -> ShardResult:
    seconds = round(time.monotonic() - began, 3)
    return ShardResult(
        info=info, exclusions=exclusions, long=long, seconds=seconds, host=platform.node()
    )


def _up_to_first_stored(
    outcomes: Iterable[Outcome],
) -> tuple[list[Exclusion], Iterable[Outcome]]:
    """Return the exclusions before the first stored video, and the rest; () if none is stored."""
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
    """Yield old and new outcomes in the plan's order."""
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
    """Decode one video and encode the frames that the plan selects.

    Raises:
        DecodeError: it cannot be stored.
    """
    if video.frames is not None:
        return StoredVideo(*store_sequence(video, plan))
    count = plan.choice.count
    forecast = count is not None and not plan.keyframes
    times = forecast_times(video.path, video.inside) if forecast else None
    if count is not None and times is not None:
        try:
            only = nearest_distinct(times.tolist(), count)
            stored, all_times = _decoded(video, plan, only)
            if nearest_distinct(all_times, count) == only:
                return stored
        except WrongForecast:
            pass
        except DecodeError as error:
            # If every frame is decoded, the same failure has the same kind in all containers.
            if error.kind in ("timeout", "crashed", "damaged"):
                raise
    return _decoded(video, plan, None)[0]


def _jpegs(plan: ShardPlan, decoded: Decoding) -> Callable[[Frame], bytes]:
    """Return what encodes the frames of a pass."""

    def encode(frame: Frame) -> bytes:
        if max(decoded.width, decoded.height) > _JPEG_MOST_PX:
            raise DecodeError("unreadable", "the picture is too large for JPEG")
        width, height = decoded.width, decoded.height
        exact = jpeg_planes(frame.planes, width, height, *frame.colour)
        return encode_jpeg(exact, plan.quality)

    return encode


def _decoded(
    video: Video, plan: ShardPlan, only: Sequence[int] | None
) -> tuple[StoredVideo, list[float]]:
    """Return the video, and the times of all its frames.

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
        keyframes=plan.keyframes,
        inside=video.inside,
    ) as decoded:
        encode = _jpegs(plan, decoded)
        for frame in decoded:
            for chosen in chooser.offer(frame):
                times.append(chosen.time)
                frames.append(encode(chosen))
        for chosen in chooser.finish():
            times.append(chosen.time)
            frames.append(encode(chosen))
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


def _fetched_outcomes(
    piece: Sequence[Video],
    wanted: Sequence[Video],
    plan: ShardPlan,
    stopping: threading.Event,
) -> list[Outcome]:
    """Return the outcomes of the wanted videos of a piece, wherever it is."""
    try:
        with plan.spool.at_hand(piece[0]) as here:

            def local(video: Video) -> Video:
                metadata = here.metadata if video.texts else video.metadata
                at = replace(video, path=here.path, inside=here.inside, address=None)
                return replace(at, texts={}, metadata=metadata)

            if here is not piece[0]:
                piece, wanted = [[local(video) for video in some] for some in (piece, wanted)]
            return _outcomes(piece, wanted, plan, stopping)
    except DecodeError as error:
        return [_excluded(video, error) for video in wanted]


def _outcomes(
    piece: Sequence[Video], wanted: Sequence[Video], plan: ShardPlan, stopping: threading.Event
) -> list[Outcome]:
    """Return the outcomes of the wanted videos of a piece: one video, or clips of a recording."""
    if piece[0].span is None:
        return [_outcome(piece[0], lambda: store_video(piece[0], plan), stopping)]

    def clips(
        of: Sequence[Video], some: Sequence[Video], again: bool = False
    ) -> list[Stored | DecodeError]:
        found = _tried(
            lambda: decode_clips(of, some, plan, lambda decoded: _jpegs(plan, decoded), again),
            stopping,
        )
        return [found] * len(some) if isinstance(found, DecodeError) else found

    found = clips(piece, wanted)
    failed = all(isinstance(one, DecodeError) for one in found)
    if len(piece) > 1 and failed and not isinstance(found[0], NothingThere):
        # Damage in one place must not exclude minutes of video.
        found = []
        for video in wanted:
            if stopping.is_set():
                return []  # nobody waits for them
            found += clips([video], [video], again=True)
    return [
        _excluded(video, one) if isinstance(one, DecodeError) else StoredVideo(*one)
        for video, one in zip(wanted, found, strict=True)
    ]


def _outcome(video: Video, store: Callable[[], StoredVideo], stopping: threading.Event) -> Outcome:
    found = _tried(store, stopping)
    return _excluded(video, found) if isinstance(found, DecodeError) else found


def _excluded(video: Video, error: DecodeError) -> Exclusion:
    return Exclusion(source=video.shown, kind=error.kind, message=error.message)


def _tried(store: Callable[[], _T], stopping: threading.Event) -> _T | DecodeError:
    """Return what ``store`` returns, or why it cannot."""
    for attempt in itertools.count(1):
        require_going()
        try:
            return store()
        except DecodeError as error:
            require_going()  # a video whose ffmpeg was stopped has not failed
            # ffmpeg may have been killed for other reasons than this video, mostly lack of memory.
            if error.kind != "crashed" or attempt == _MOST_ATTEMPTS or stopping.is_set():
                return error
    raise AssertionError("unreachable")


class _Gate:
    """Lets as many threads through at once as ``most`` says at that moment."""

    def __init__(self, most: Callable[[], int], stopping: threading.Event) -> None:
        self._most = most
        self._stopping = stopping
        self._inside = 0
        self._left = threading.Condition()

    def __enter__(self) -> None:
        with self._left:
            while self._inside >= self._most() and not self._stopping.is_set():
                self._left.wait(_GATE_SECONDS)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._left:
            self._inside -= 1
            self._left.notify()


def _in_order(
    videos: Sequence[Video], plan: ShardPlan, threads: Callable[[], int]
) -> Generator[Outcome, None, None]:
    """Yield the outcome of every given video of the plan, in order, decoding a few pieces ahead."""
    stopping = threading.Event()
    todo = {video.key for video in videos}
    work = [
        (piece, wanted)
        for piece in pieces(plan.videos)
        if (wanted := [video for video in piece if video.key in todo])
    ]
    # Of remote ones, one is fetched while another is decoded.
    each = 2 if any(piece[0].address is not None for piece, _ in work) else 1
    gate = _Gate(lambda: each * threads(), stopping)
    # Stored videos wait in memory: only as far ahead as keeps the threads busy. Pieces of
    # recordings are large, and take equally long.
    further = 1 if any(piece[0].span is not None for piece, _ in work) else 2

    def outcomes(piece: Sequence[Video], wanted: Sequence[Video]) -> list[Outcome]:
        with gate:
            return [] if stopping.is_set() else _fetched_outcomes(piece, wanted, plan, stopping)

    ahead: deque[Future[list[Outcome]]] = deque()
    with ThreadPoolExecutor(max(1, len(work))) as pool:  # a thread is started when one is needed
        try:
            for piece, wanted in work:
                ahead.append(pool.submit(outcomes, piece, wanted))
                while len(ahead) > further * each * threads():
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        except BaseException:
            stopping.set()
            for future in ahead:
                future.cancel()
            kill_running()
            raise
