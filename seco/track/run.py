"""``seco track run``: follow one target through a video of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seco.checkpoints.weights import load_tracker
from seco.processes.device import resolve_device
from seco.track.config import TrackRunConfig, check_tracker, parse_box
from seco.track.tracker import Tracker
from seco.views.crops import Pixels, decode_jpeg
from shards.atomic import require_writable, write_text
from shards.errors import InputError

# Writes frames (H, W, 3), all of one size, as a video of so many frames a second.
WriteVideo = Callable[[Path, float, Iterable[Pixels]], None]

TRACKED = (255, 64, 32)
TRUE = (64, 220, 96)


def with_boxes(
    frame: Pixels, boxes: Iterable[tuple[Sequence[float] | NDArray[np.float64], tuple[int, ...]]]
) -> Pixels:
    """A copy of the frame with the outline of each (box, colour); what is outside is not drawn.

    Boxes are x, y, w, h, px; the first pixel is 1. A box of less than a pixel is drawn as one.
    """
    drawn: Pixels = frame.copy()
    height, width = frame.shape[:2]
    thick = max(1, round(min(height, width) / 160))
    for (x, y, box_width, box_height), colour in boxes:
        left, top = round(x) - 1, round(y) - 1
        right = max(left + 1, round(x + box_width) - 1)
        bottom = max(top + 1, round(y + box_height) - 1)
        inner_left, inner_right = left + thick, right - thick
        inner_top, inner_bottom = top + thick, bottom - thick
        for rows, columns in (
            ((top, min(inner_top, bottom)), (left, right)),
            ((max(inner_bottom, top), bottom), (left, right)),
            ((top, bottom), (left, min(inner_left, right))),
            ((top, bottom), (max(inner_right, left), right)),
        ):
            drawn[_inside(rows, height), _inside(columns, width)] = colour
    return drawn


def _inside(span: tuple[int, int], size: int) -> slice:
    first, after = (min(max(0, place), size) for place in span)
    return slice(first, after)


_HEADER = "frame,seconds,x,y,width,height,score\n"
_ASSUMED_FPS = 25.0  # ffmpeg's, where a file does not tell

TimedFrames = Iterable[tuple[float, bytes]]  # seconds, JPEG


def output_paths(config: TrackRunConfig) -> tuple[Path, Path]:
    """(boxes, video) that will be written.

    Raises:
        InputError: one would be written over the source or over the other, or is a folder.
    """
    stem = Path(config.video).stem
    boxes = Path(config.out or f"{stem}.boxes.csv")
    video = Path(config.out_video or f"{stem}.tracked.mp4")
    if Path(config.video).resolve() in (video.resolve(), boxes.resolve()):
        raise InputError("would be written over", config.video, "choose another --out")
    if boxes.resolve() == video.resolve():
        raise InputError("is given for boxes and video", boxes, "choose another --out-video")
    for option, path in (("--out", boxes), ("--out-video", video)):
        if path.is_dir():
            raise InputError("is a folder", path, f"give {option} the name of a file")
    return boxes, video


def track_run(
    config: TrackRunConfig,
    frames: TimedFrames,
    fps: Callable[[], float | None],
    write_video: WriteVideo,
) -> tuple[Path, Path]:
    """Track through frames as they come; returns the paths of boxes and video.

    Args:
        config: the tracker and the first box.
        frames: of the video, one after the other; only the current one is kept.
        fps: the video's rate, asked for when the first frame is there.
        write_video: writes the frames with their boxes.

    Raises:
        InputError: settings or tracker cannot be used, or the box is not in the first frame.
    """
    check_tracker(config)
    box = parse_box(config.box)
    boxes_path, video_path = output_paths(config)
    for path in (boxes_path, video_path):
        require_writable(path.parent)
    model, _ = load_tracker(Path(config.tracker))
    tracker = Tracker(model, config, resolve_device(config.device))
    coming = iter(frames)
    first_seconds, first = next(coming)
    frame = decode_jpeg(first)
    try:
        tracker.init(frame, box)
    except ValueError as error:
        height, width = frame.shape[:2]
        raise InputError(f"{error} of {width}x{height} px", "--box") from error
    rows = []

    def annotated() -> Iterator[Pixels]:
        for number, (seconds, jpeg) in enumerate(chain([(first_seconds, first)], coming)):
            pixels = decode_jpeg(jpeg)
            found = tracker.update(pixels) if number else box
            numbers = ",".join(f"{value:.3f}" for value in found)
            rows.append(f"{number},{seconds:.6f},{numbers},{tracker.score:.4f}\n")
            yield with_boxes(pixels, [(found, TRACKED)])

    write_video(video_path, fps() or _ASSUMED_FPS, annotated())
    write_text(boxes_path, _HEADER + "".join(rows))
    return boxes_path, video_path
