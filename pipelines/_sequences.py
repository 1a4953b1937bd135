"""Storing a sequence: a folder of JPEG frames whose bytes pass through, with a box a frame."""

from __future__ import annotations

import configparser
import io
import math
import os
import re
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from pipelines._adapter import Video, read_text
from pipelines._decode import DecodeError, Frame
from pipelines._frames import FrameChoice, nearest_distinct
from pipelines._plan import ShardPlan, described
from shards.errors import InputError
from shards.format import VideoRecord

_FRAME = re.compile(r"(\d+)\.jpe?g", re.I)
_ASSUMED_FPS = 30.0  # OTB's files do not tell
_END_OF_IMAGE = b"\xff\xd9"
_BETWEEN = re.compile(r"[,;\s]+")

Box = list[float]  # x, y (of the first pixel: 1), w, h; px


def store_sequence(video: Video, plan: ShardPlan) -> tuple[VideoRecord, list[bytes]]:
    """Read one sequence; its frames are resized only where the plan asks for a short edge.

    Raises:
        DecodeError: frames or annotations are missing or damaged.
    """
    assert video.frames is not None
    boxes = _boxes(video.path / video.frames.ground_truth)
    paths = _in_range(_frame_paths(video.path / video.frames.images), video, boxes)
    absence = _flags(video, "absence.label", len(paths))
    cover = _flags(video, "cover.label", len(paths))
    fps = _fps(video.path / "meta_info.ini")
    times = [round(number / (fps or _ASSUMED_FPS), 6) for number in range(len(paths))]
    chosen = _chosen(plan.choice, times)
    if len(chosen) < plan.min_frames:
        raise DecodeError("too-short", f"{len(chosen)} frames, fewer than {plan.min_frames}")
    frames = [_read(paths[number]) for number in chosen]
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
        boxes=kept,
        absence=[absence[number] for number in chosen] if absence else None,
        cover=[cover[number] for number in chosen] if cover else None,
    )
    return record, frames


def _frame_paths(folder: Path) -> list[tuple[int, Path]]:
    """(number in the name, path) in the order of the numbers."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise DecodeError("missing", f"{folder.name}: {error.strerror}") from error
    found = sorted((int(m[1]), folder / name) for name in names if (m := _FRAME.fullmatch(name)))
    if not found:
        raise DecodeError("zero-frames", f"{folder.name} holds no 0001.jpg or the like")
    return found


def _in_range(frames: list[tuple[int, Path]], video: Video, boxes: list[Box]) -> list[Path]:
    """The annotated frames; copies that are already cut to them are not cut again."""
    layout = video.frames
    assert layout is not None
    if layout.range is not None and len(boxes) != len(frames):
        first, last = layout.range
        frames = [(number, path) for number, path in frames if first <= number <= last]
    # Of GOT-10k's test sequences only the first box is published.
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
    """GOT-10k's number a frame (absence 0/1, cover 0 … 8); None where there is no such file."""
    assert video.frames is not None
    path = video.path / file
    if not video.frames.flags or not path.is_file():
        return None
    lines = _lines(path)
    for number, line in lines:
        if not line.isdecimal():
            raise DecodeError("bad-annotation", f"{file} line {number}: {line[:60]!r} is no number")
    if len(lines) != frames:
        raise DecodeError("bad-annotation", f"{file}: {len(lines)} lines for {frames} frames")
    return [int(line) for _, line in lines]


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, text) of the lines that are not empty."""
    try:
        lines = enumerate(read_text(path).splitlines(), start=1)
        return [(number, line.strip()) for number, line in lines if line.strip()]
    except InputError as error:
        kind = "bad-annotation" if path.exists() else "missing"
        raise DecodeError(kind, f"{path.name}: {error.what}") from error


def _fps(path: Path) -> float | None:
    """The rate GOT-10k's frames were taken at, as ``anno_fps: 10Hz`` of ``meta_info.ini``."""
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
    for number, time in enumerate(times):
        given += chooser.offer(Frame(time, np.array([number])))
    return [int(frame.planes[0]) for frame in given + chooser.finish()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DecodeError("unreadable", f"{path.name}: {error.strerror}") from error


def _size(frames: list[bytes], paths: list[Path]) -> tuple[int, int]:
    """The one size all frames have, from their headers."""
    sizes = []
    for frame, path in zip(frames, paths, strict=True):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(frame)
        except ValueError as error:
            raise DecodeError("unreadable", f"{path.name} is not a JPEG ({error})") from error
        # The mark of the end; some programs write something behind it, and thumbnails have one
        # of their own in front.
        if _END_OF_IMAGE not in frame[len(frame) // 2 :]:
            raise DecodeError("unreadable", f"{path.name} is cut short")
        sizes.append((width, height))
        if sizes[-1] != sizes[0]:
            raise DecodeError("unreadable", f"{path.name} is {width}x{height}, the first is not")
    return sizes[0]


def _smaller_size(width: int, height: int, short_edge: int) -> tuple[int, int]:
    """As for videos: never larger, sides even."""
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
