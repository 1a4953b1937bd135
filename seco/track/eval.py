"""``seco track eval``: one-pass evaluation of a tracker on sequences with boxes (paper §5.2)."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from seco.checkpoints.checkpoint import epochs_reached
from seco.checkpoints.weights import load_tracker
from seco.model.backbones import tensors_sha256
from seco.pages.html import INK
from seco.processes.device import resolve_device
from seco.track.config import OTB, TrackEvalConfig, check_tracker
from seco.track.otb_metrics import PRECISION_THRESHOLDS, SUCCESS_THRESHOLDS, Curves, curves
from seco.track.results import (
    MOST_NAMED,
    Evaluation,
    Floats,
    ResultFolder,
    Tracked,
    is_file_name,
    sequence_name,
)
from seco.track.run import TRACKED, TRUE, WriteVideo, with_boxes
from seco.track.tracker import Tracker
from seco.views.crops import BrokenJpeg, Pixels, decode_jpeg
from shards.access import UnreadableFrame, readable
from shards.atomic import atomic_path, require_writable
from shards.errors import InputError
from shards.opening import open_shards
from shards.pairs import boxes_of, require_boxes
from shards.progress import Progress, progress
from shards.reader import ShardSet

_READ_AT_ONCE = 8  # frames; remote shards answer for all of them in one round trip


def frames_ahead(shards: ShardSet, video: int) -> Iterator[Pixels | str]:
    """The (H, W, 3) frames of a sequence in time order; in the place of an unreadable one, why."""
    count = shards.frame_count(video)

    def read(first: int) -> list[Pixels | str]:
        numbers = range(first, min(first + _READ_AT_ONCE, count))
        return [_decoded(data) for data in shards.read_frames([(video, n) for n in numbers])]

    with ThreadPoolExecutor(1, thread_name_prefix="frames") as thread:
        ahead = thread.submit(read, 0)
        for first in range(0, count, _READ_AT_ONCE):
            frames = ahead.result()
            if first + _READ_AT_ONCE < count:
                ahead = thread.submit(read, first + _READ_AT_ONCE)
            yield from frames


def _decoded(data: bytes | UnreadableFrame) -> Pixels | str:
    try:
        return decode_jpeg(readable(data))
    except (UnreadableFrame, BrokenJpeg) as error:
        return str(error)


SUCCESS_PLOT, PRECISION_PLOT = "success.png", "precision.png"
_INCHES = (5.2, 3.9)
_DPI = 150
_FEW = 8  # sequences that are drawn one by one
_STYLES = ("-", "--", "-.", ":")


def write_plots(out: Path, tracker: str, mean: Curves, sequences: dict[str, Curves]) -> None:
    """Write ``success.png`` and ``precision.png``; a few sequences are drawn one by one, too."""
    plots = (
        (SUCCESS_PLOT, SUCCESS_THRESHOLDS, "success", "overlap threshold", mean.success_auc, "AUC"),
        (
            PRECISION_PLOT,
            PRECISION_THRESHOLDS,
            "precision",
            "distance of the centres, px",
            mean.precision_20,
            "at 20 px",
        ),
    )
    for name, thresholds, kind, axis, score, what in plots:
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.add_subplot()
        if len(sequences) <= _FEW:
            for number, (sequence, one) in enumerate(sequences.items()):
                # Line styles, too: not everybody tells eight colours apart.
                style = _STYLES[number % len(_STYLES)]
                axes.plot(thresholds, getattr(one, kind), style, linewidth=1, label=sequence)
        axes.plot(
            thresholds,
            getattr(mean, kind),
            color=INK,
            linewidth=2.5,
            label=f"{tracker}, {what} {score:.3f}",
        )
        if kind == "precision":
            axes.axvline(20, color="#707070", linewidth=0.8, linestyle=":")
        axes.set(
            xlabel=axis,
            ylabel=f"{kind}, share of frames",
            xlim=(thresholds[0], thresholds[-1]),
            ylim=(0, 1.02),
            title=f"{kind.capitalize()}, one pass, mean of {len(sequences)} sequences",
        )
        axes.grid(visible=True, color="#e4e4e4", linewidth=0.6)
        axes.legend(
            loc="lower right" if kind == "precision" else "upper right",
            framealpha=0.9,
            fontsize="small",
        )
        with atomic_path(out / name) as temporary:
            figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})


_ASSUMED_FPS = 30.0  # of videos, where the data set does not tell
_INFERENCE = (
    *("scales", "scale_step", "scale_penalty", "scale_update", "window", "upsampling"),
    "precision",
)
_TRAINED = (
    *("feature_layer", "channels", "convolutions", "raw_features", "response_scale"),
    *("batch_size", "lr", "final_lr", "momentum", "weight_decay"),
    *("pairs_per_sequence", "max_gap", "max_stretch", "positive_radius"),
)


@dataclass(frozen=True)
class _Sequence:
    name: str
    video: int
    truth: Floats  # (F, 4)
    counted: np.ndarray[tuple[int], np.dtype[np.bool_]]  # (F,) the target is there
    fps: float


class _LeftOut(Exception):
    """Why a sequence cannot be evaluated."""


def track_eval(config: TrackEvalConfig, write_video: WriteVideo | None = None) -> Evaluation:
    """Track every sequence from its first box, and compare with the others.

    Result files, ``track.json`` and plots are written into the folder; sequences that an
    interrupted evaluation of the same tracker has finished are not tracked again.

    Args:
        config: what to evaluate, and how.
        write_video: needed for ``video``.

    Raises:
        InputError: the settings, shards or tracker cannot be used, or no sequence can be evaluated.
    """
    check_tracker(config)
    if not is_file_name(config.name):
        raise InputError(f"{config.name!r} is no file name", "--name")
    shards = open_shards(config.shards)
    require_boxes(shards)
    model, said = load_tracker(Path(config.tracker))
    out = Path(config.out or Path(config.tracker).parent / f"eval-{shards.name}")
    require_writable(out)
    dataset = _dataset(shards)
    settings = {name: getattr(config, name) for name in _INFERENCE}
    results = ResultFolder(
        out,
        dataset,
        config.name,
        {"tracker": tensors_sha256(model.state_dict()), **settings},
    )
    settings |= _training_of(said)
    found = Evaluation(dataset, config.name, said["encoder"], settings, len(shards))
    tracker = Tracker(model, config, resolve_device(config.device))
    total = int(shards.frame_counts.sum())
    with progress("Tracking", total, "frames") as shown:
        for video in range(len(shards)):
            done = shown.done
            try:
                sequence = _sequence(shards, video)
                tracked = results.finished(sequence.name, sequence.truth)
                if tracked is None:
                    boxes, seconds = _track(tracker, shards, sequence, found, shown)
                    tracked = results.write(sequence.name, boxes, seconds)
                _evaluate(found, sequence, tracked)
                if config.video and write_video is not None:
                    path = out / "videos" / f"{sequence.name}.mp4"
                    write_video(path, sequence.fps, _annotated(shards, sequence, tracked))
            except _LeftOut as why:
                found.left_out[shards.key(video)] = str(why)
                if len(found.left_out) <= MOST_NAMED:
                    print(f"seco: {found.lines_of_left_out()[-1]}", file=sys.stderr)
            shown.advance(done + shards.frame_count(video) - shown.done)
    if len(found.left_out) > MOST_NAMED:
        print(f"seco: {found.lines_of_left_out(MOST_NAMED)[-1]}", file=sys.stderr)
    if not found.names:
        raise InputError(
            f"none of the {len(shards)} sequences can be evaluated",
            " ".join(config.shards),
            next(iter(found.left_out.values())),
        )
    found.write(out)
    sequences = dict(zip(found.names, found.curves, strict=True))
    write_plots(out, config.name, found.mean, sequences)
    found.notes.append(f"written to {out}")
    return found


def _training_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """How a tracker was trained, as far as its checkpoint tells."""
    config = checkpoint["config"]
    found = {name: config[name] for name in _TRAINED if name in config}
    for name, recorded in (("train_shards", "shards"), ("epochs_planned", "epochs")):
        if recorded in config:
            found[name] = config[recorded]
    epochs = epochs_reached(checkpoint)
    return found if epochs is None else {**found, "epochs": epochs}


def _dataset(shards: ShardSet) -> str:
    with contextlib.suppress(UnreadableFrame):
        named = str(shards.record(0).dataset)
        if is_file_name(named):
            return named
    return shards.name


def _sequence(shards: ShardSet, video: int) -> _Sequence:
    """What is known of a sequence; raises _LeftOut when it cannot be evaluated."""
    try:
        record = shards.record(video)
        truth = boxes_of(record)
    except (UnreadableFrame, ValueError) as error:
        raise _LeftOut(str(error)) from error
    frames = shards.frame_count(video)
    if not is_file_name(str(record.key)):
        raise _LeftOut(f"{record.key!r} is no file name")
    if record.dataset == OTB and not record.splits:
        raise _LeftOut("is not of OTB-100")
    if record.dataset == OTB and record.source_frames not in (None, frames):
        raise _LeftOut(f"{frames} of its {record.source_frames} frames are stored, OTB-100 has all")
    if len(truth) != frames:
        raise _LeftOut(f"{len(truth)} boxes for {frames} frames")
    counted = np.ones(frames, dtype=np.bool_)
    if record.absence is not None and len(record.absence) == frames:
        counted = np.array(record.absence) == 0
    if not counted[0]:
        raise _LeftOut("the target is absent from the first frame")
    name = sequence_name(record.key, record.dataset)
    return _Sequence(name, video, truth, counted, record.source_fps or _ASSUMED_FPS)


def _track(
    tracker: Tracker, shards: ShardSet, sequence: _Sequence, found: Evaluation, shown: Progress
) -> tuple[Floats, Floats]:
    """(F, 4) boxes and (F,) seconds of the tracker.

    A frame that cannot be read keeps the box before, is counted and named.
    """
    frames = frames_ahead(shards, sequence.video)
    first = next(frames)
    if isinstance(first, str):
        raise _LeftOut(f"the first frame cannot be read: {first}")
    boxes, seconds = [sequence.truth[0]], []
    began = time.perf_counter()
    try:
        tracker.init(first, sequence.truth[0])
    except ValueError as error:
        raise _LeftOut(str(error)) from error
    seconds.append(time.perf_counter() - began)
    for number, frame in enumerate(frames, start=1):
        shown.advance(status=sequence.name)
        if isinstance(frame, str):
            found.notes.append(f"{sequence.name}: frame {number} cannot be read: {frame}")
            print(f"seco: {found.notes[-1]}", file=sys.stderr)
            boxes.append(boxes[-1])
            seconds.append(0.0)
            continue
        began = time.perf_counter()
        boxes.append(tracker.update(frame))
        seconds.append(time.perf_counter() - began)
    return np.array(boxes), np.array(seconds)


def _evaluate(found: Evaluation, sequence: _Sequence, tracked: Tracked) -> None:
    boxes = tracked.boxes.copy()
    boxes[0] = sequence.truth[0]  # the given one, whatever its file has rounded
    counted = sequence.counted
    found.add(tracked, curves(boxes[counted], sequence.truth[counted]), int(counted.sum()))
    absent = len(counted) - int(counted.sum())
    if absent:
        found.notes.append(f"{sequence.name}: {absent} frames without the target do not count")


def _annotated(shards: ShardSet, sequence: _Sequence, tracked: Tracked) -> Iterator[Pixels]:
    """The frames with true and tracked box; an unreadable one shows the frame before."""
    last: Pixels | None = None
    frames = frames_ahead(shards, sequence.video)
    for frame, box, truth in zip(frames, tracked.boxes, sequence.truth, strict=True):
        last = last if isinstance(frame, str) else frame
        if last is not None:
            yield with_boxes(last, [(truth, TRUE), (box, TRACKED)])
