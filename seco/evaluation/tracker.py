"""SiamFC's inference: follow one target from frame to frame (Bertinetto et al., ECCVW 2016).

``seco track run`` does so in a video of your own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from seco.checkpoints.weights import load_tracker
from seco.config import (
    EXEMPLAR_PX,
    SEARCH_PX,
    STRIDE,
    TrackerConfig,
    TrackRunConfig,
    check_tracker,
    parse_box,
    response_cells,
)
from seco.data.crops import Pixels, decode_jpeg
from seco.data.pairs import Target, box_of, mean_colour, square_crops, target_of
from seco.data.transforms import normalise
from seco.models.siamfc import SiamFC
from seco.processes.device import resolve_device, to_device
from shards.atomic import require_writable, write_text
from shards.errors import InputError
from shards.untrusted import real_path

# Limits of the size in the original (MATLAB) code, as factors of the first box.
_SMALLEST, _LARGEST = 0.2, 5.0


class Tracker:
    """Follows a target; the exemplar is from the first frame and is not updated.

    The centre is clamped to the frame, and the size to 0.2 to 5 times the first. Boxes may extend
    beyond the frame.

    Args:
        model: the result of :func:`seco.checkpoints.weights.load_tracker`.
        config: inference settings.
        device: where to compute.
    """

    def __init__(self, model: SiamFC, config: TrackerConfig, device: torch.device) -> None:
        self._model = model.to(device).eval()
        self._config = config
        self._device = device
        around = config.scales // 2
        exponents = np.arange(-around, around + 1)
        self._factors: list[float] = (config.scale_step**exponents).tolist()
        penalty = np.where(exponents == 0, 1.0, config.scale_penalty)
        self._penalty = torch.tensor(penalty, dtype=torch.float32, device=device)
        self._response_px = response_cells(SEARCH_PX) * config.upsampling
        hann = torch.hann_window(self._response_px, periodic=False, dtype=torch.float64)
        window = torch.outer(hann, hann)
        self._window = (window / window.sum()).to(device, torch.float32)
        self._bias = model.head.bias.item()
        self.target = Target(0, 0, 0, 0)
        self.score = 0.0  # the head's confidence in the last frame, 0 … 1

    def init(self, frame: Pixels, box: Any) -> None:
        """Start tracking the target in ``box``.

        Args:
            frame: (H, W, 3) uint8.
            box: x, y, w, h, px; the first pixel is 1.

        Raises:
            ValueError: the box is empty, not finite, or its centre is outside the frame.
        """
        target = target_of(box)
        height, width = frame.shape[:2]
        if not np.isfinite(target).all() or min(target.width, target.height) <= 0:
            raise ValueError("the first box is empty")
        if not (-0.5 <= target.x <= width - 0.5 and -0.5 <= target.y <= height - 0.5):
            raise ValueError("the first box's centre is outside the frame")
        self.target, self._scale, self.score = target, 1.0, 1.0
        self._first = target
        with torch.inference_mode():
            self._fill = to_device(torch.from_numpy(mean_colour(frame)), self._device)
            crops = self._crops(frame, [target.exemplar_side], EXEMPLAR_PX)
            with self._precision():
                features = self._model.backbone(normalise(crops))
                self._exemplar = self._model.head.exemplar(features)

    def update(self, frame: Pixels) -> NDArray[np.float64]:
        """(4,) x, y, w, h in the next frame, of any size; also sets :attr:`score`."""
        side = self.target.exemplar_side * SEARCH_PX / EXEMPLAR_PX
        with torch.inference_mode():
            crops = self._crops(frame, [side * factor for factor in self._factors], SEARCH_PX)
            with self._precision():
                search = self._model.head.search(self._model.backbone(normalise(crops)))
                # Without the learnt bias: a penalty factor on a negative response would reward it.
                responses = self._model.head.correlation(self._exemplar, search)
            found = peak(responses, self._penalty, self._window, self._config.window)
        number, down, across, response = found.tolist()
        self.score = (1 + math.tanh((response + self._bias) / 2)) / 2  # sigmoid; exp overflows
        factor = self._factors[int(number)]
        # px of the frame per cell of the upsampled response.
        px = STRIDE / self._config.upsampling * side * factor / SEARCH_PX
        middle = (self._response_px - 1) / 2
        self._move((across - middle) * px, (down - middle) * px, factor, frame)
        return box_of(self.target)

    def _move(self, across: float, down: float, factor: float, frame: Pixels) -> None:
        height, width = frame.shape[:2]
        update = self._config.scale_update
        scale = self._scale * ((1 - update) + update * factor)
        self._scale = min(max(scale, _SMALLEST), _LARGEST)
        self.target = Target(
            min(max(self.target.x + across, 0.0), width - 1.0),
            min(max(self.target.y + down, 0.0), height - 1.0),
            self._first.width * self._scale,
            self._first.height * self._scale,
        )

    def _crops(self, frame: Pixels, sides: list[float], size: int) -> Tensor:
        pixels = to_device(torch.from_numpy(frame), self._device)
        return square_crops(pixels, (self.target.x, self.target.y), sides, size, self._fill)

    def _precision(self) -> torch.autocast:
        enabled = self._config.precision == "bf16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)


def peak(responses: Tensor, penalty: Tensor, window: Tensor, influence: float) -> Tensor:
    """Locate the target: the scale with the highest response, and the position in it.

    Args:
        responses: (n, 17, 17) responses of the scales.
        penalty: (n,) factors applied to the upsampled responses.
        window: (S, S) Hann window of sum 1; responses are upsampled to S.
        influence: weight of the window, 0 … 1.

    Returns:
        (4,) float64: scale, row and column in the upsampled response, and the response there.
    """
    size = len(window)
    # Bicubic with a = -0.75 and the border repeated: OpenCV's.
    upsampled = F.interpolate(responses[:, None], size=(size, size), mode="bicubic")[:, 0]
    upsampled = upsampled * penalty.view(-1, 1, 1)
    scale = upsampled.flatten(1).amax(1).argmax()
    chosen = upsampled.index_select(0, scale.view(1))[0]
    shifted = chosen - chosen.min()
    mixed = (1 - influence) * shifted / (shifted.sum() + 1e-16) + influence * window
    place = mixed.argmax()
    score = chosen.flatten().index_select(0, place.view(1))[0]
    # One tensor, so that one copy fetches it from the device.
    return torch.stack(
        [scale.double(), place.double() // size, place.double() % size, score.double()]
    )


# Writes frames (H, W, 3) of equal size as a video: (path, frames per second, frames).
WriteVideo = Callable[[Path, float, Iterable[Pixels]], None]

TRACKED = (255, 64, 32)
TRUE = (64, 220, 96)


def with_boxes(
    frame: Pixels, boxes: Iterable[tuple[Sequence[float] | NDArray[np.float64], tuple[int, ...]]]
) -> Pixels:
    """A copy of the frame with the outline of each (box, colour), clipped to the frame.

    Boxes are x, y, w, h, px; the first pixel is 1. Boxes are drawn at least one pixel large.
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
_ASSUMED_FPS = 25.0  # ffmpeg's default, for files without a frame rate

TimedFrames = Iterable[tuple[float, bytes]]  # seconds, JPEG


def output_paths(config: TrackRunConfig) -> tuple[Path, Path]:
    """The output paths (boxes, video).

    Raises:
        InputError: one would overwrite the source or the other, or is a folder.
    """
    stem = Path(config.video).stem
    boxes = Path(config.out or f"{stem}.boxes.csv")
    video = Path(config.out_video or f"{stem}.tracked.mp4")
    if real_path(config.video) in (real_path(video), real_path(boxes)):
        raise InputError("would be overwritten", config.video, "choose another --out")
    if real_path(boxes) == real_path(video):
        raise InputError("is given for both boxes and video", boxes, "choose another --out-video")
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
    """Track through a stream of frames; return the paths of boxes and video.

    Args:
        config: the tracker and the first box.
        frames: the video's frames in order; only the current one is kept in memory.
        fps: returns the video's frame rate; called once the first frame has arrived.
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
