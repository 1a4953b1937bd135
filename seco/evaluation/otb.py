"""``seco track eval``: one-pass evaluation of a tracker on sequences with boxes (paper §5.2).

The metrics are OTB's (Wu et al., PAMI 2015): overlap, centre error, success and precision, with the
conventions of the GOT-10k toolkit, whose numbers they equal. Boxes are (x, y, w, h) in px and cover
x … x + w; the overlap of two empty boxes is 0. Success counts overlaps *above* a threshold, so even
a perfect tracker has none at 1 and scores 20/21; precision counts centre errors *up to* one. Curves
are averaged over sequences, whatever their length.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from seco.checkpoints.io import epochs_reached
from seco.checkpoints.weights import load_tracker
from seco.config import OTB, OTB_SEQUENCES, TrackEvalConfig, check_tracker
from seco.data.crops import BrokenJpeg, Pixels, decode_jpeg
from seco.evaluation.tracker import TRACKED, TRUE, Tracker, WriteVideo, with_boxes
from seco.models.backbones import tensors_sha256
from seco.pages import INK
from seco.processes.device import resolve_device
from shards.atomic import atomic_path, json_text, require_writable, write_json, write_text
from shards.dataset import ShardSet
from shards.errors import InputError
from shards.opening import open_shards
from shards.pairs import boxes_of, require_boxes
from shards.progress import Progress, progress
from shards.storage import UnreadableFrame, readable
from shards.terminal import say

Floats = NDArray[np.float64]

SUCCESS_THRESHOLDS: Floats = np.linspace(0, 1, 21)  # of the overlap
PRECISION_THRESHOLDS: Floats = np.arange(51.0)  # px
_PRECISION_AT_PX = 20
_EPS = np.finfo(float).eps  # added to the union, as in the GOT-10k toolkit


@dataclass(frozen=True)
class Curves:
    """Success and precision of a sequence, or means over sequences; fractions of frames."""

    success: Floats  # (21,) at SUCCESS_THRESHOLDS
    precision: Floats  # (51,) at PRECISION_THRESHOLDS

    @property
    def success_auc(self) -> float:
        """The mean of the success curve."""
        return float(self.success.mean())

    @property
    def precision_auc(self) -> float:
        """The mean of the precision curve: the paper's "AUC of precision"."""
        return float(self.precision.mean())

    @property
    def precision_20(self) -> float:
        """Fraction of frames with a centre error of at most 20 px, the usual OTB metric."""
        return float(self.precision[_PRECISION_AT_PX])


def overlaps(boxes: Floats, truth: Floats) -> Floats:
    """(F,) intersections over unions of two (F, 4) arrays of boxes, 0 … 1."""
    start = np.maximum(boxes[:, :2], truth[:, :2])
    end = np.minimum(boxes[:, :2] + boxes[:, 2:], truth[:, :2] + truth[:, 2:])
    common = np.maximum(end - start, 0).prod(axis=1)
    union = boxes[:, 2:].prod(axis=1) + truth[:, 2:].prod(axis=1) - common
    shares: Floats = np.clip(common / (union + _EPS), 0.0, 1.0)
    return shares


def centre_errors(boxes: Floats, truth: Floats) -> Floats:
    """(F,) distances between the centres of two (F, 4) arrays of boxes, px."""
    apart = boxes[:, :2] + (boxes[:, 2:] - 1) / 2 - truth[:, :2] - (truth[:, 2:] - 1) / 2
    errors: Floats = np.sqrt((apart**2).sum(axis=1))
    return errors


def curves(boxes: Floats, truth: Floats) -> Curves:
    """Compute the curves of one sequence.

    Args:
        boxes: (F, 4) boxes of the tracker, F ≥ 1. The first is the given one and counts.
        truth: (F, 4) true boxes.

    Raises:
        ValueError: there are no frames, or the numbers of boxes differ.
    """
    if boxes.shape != truth.shape or not len(boxes):
        raise ValueError(f"{len(boxes)} boxes for {len(truth)} frames")
    overlap, error = overlaps(boxes, truth), centre_errors(boxes, truth)
    return Curves(
        success=(overlap[:, None] > SUCCESS_THRESHOLDS).mean(axis=0),
        precision=(error[:, None] <= PRECISION_THRESHOLDS).mean(axis=0),
    )


def mean_curves(found: list[Curves]) -> Curves:
    """Mean over sequences, all with the same weight."""
    return Curves(
        success=np.mean([one.success for one in found], axis=0),
        precision=np.mean([one.precision for one in found], axis=0),
    )


RESULT = "track.json"
_TOOLKIT_FOLDER = "OTB2015"  # the GOT-10k toolkit's name for OTB-100
_TARGET = re.compile(r"(Jogging|Skating2)-([12])")
_FILE_NAME = re.compile(r"\w[\w.-]*")
_ROUNDING = 1e-3  # of three decimals
_IDENTITY = "tracking.json"  # says whose results a folder holds

MOST_NAMED = 10  # excluded sequences to print; track.json names all


def is_file_name(text: str) -> bool:
    """Whether the text is safe as a file name; keys in foreign shards could be paths."""
    return bool(_FILE_NAME.fullmatch(text))


def sequence_name(key: str, dataset: str) -> str:
    """The sequence's name in the GOT-10k toolkit, such as ``Jogging.1``."""
    if dataset != OTB:
        return key
    # The toolkit finds one target in Human4: the other one's file is empty.
    return _TARGET.sub(r"\1.\2", "Human4" if key == "Human4-2" else key)


@dataclass(frozen=True)
class Tracked:
    """The result of tracking one sequence."""

    name: str
    boxes: Floats  # (F, 4) x, y, w, h, px, as written
    seconds: Floats  # (F,) tracker time without reading and decoding; 0 if it did not run

    @property
    def rated(self) -> tuple[int, float]:
        """Number of frames searched (all but the first), and their seconds."""
        searched = self.seconds[1:][self.seconds[1:] > 0]
        return len(searched), float(searched.sum())


class ResultFolder:
    """``OUT/OTB2015/NAME/SEQUENCE.txt`` and ``times/SEQUENCE_time.txt``, as the toolkit reads them.

    Args:
        out: output folder of the evaluation.
        dataset: name of the dataset.
        tracker: name of the tracker.
        identity: what the results depend on; other files are refused.

    Raises:
        InputError: the folder holds results of another tracker or with other settings.
    """

    def __init__(self, out: Path, dataset: str, tracker: str, identity: dict[str, Any]) -> None:
        self.folder = out / (_TOOLKIT_FOLDER if dataset == OTB else dataset) / tracker
        mark = self.folder / _IDENTITY
        text = json_text(identity)
        if mark.is_file():
            if mark.read_text("utf-8") != text:
                raise InputError(
                    "holds results of another tracker or with other settings",
                    self.folder,
                    "choose another --name or --out, or delete it",
                )
        elif any(self.folder.glob("*.txt")):
            raise InputError(
                "holds results of another program", self.folder, "choose another --name or --out"
            )
        else:
            write_text(mark, text)

    def finished(self, name: str, truth: Floats) -> Tracked | None:
        """Result of a sequence that an interrupted evaluation finished; ``truth`` is (F, 4).

        None if frames were unreadable: they are reported again, or have been repaired since.
        """
        found = self._written(name, truth)
        return None if found is not None and (found.seconds[1:] == 0).any() else found

    def _written(self, name: str, truth: Floats) -> Tracked | None:
        frames = len(truth)
        try:
            boxes = np.loadtxt(self._boxes(name), delimiter=",", ndmin=2)
            seconds = np.loadtxt(self._times(name), ndmin=1)
        except (OSError, ValueError):
            return None
        if boxes.shape != (frames, 4) or seconds.shape != (frames,):
            return None
        if np.abs(boxes[0] - truth[0]).max() > _ROUNDING:
            return None  # tracked on frames of another size
        return Tracked(name, boxes, seconds)

    def write(self, name: str, boxes: Floats, seconds: Floats) -> Tracked:
        """Write a sequence; return it with boxes rounded to the format's three decimals."""
        write_text(self._times(name), "".join(f"{value:.8f}\n" for value in seconds))
        write_text(
            self._boxes(name),
            "".join(",".join(f"{value:.3f}" for value in box) + "\n" for box in boxes),
        )
        found = self._written(name, boxes)
        assert found is not None
        return found

    def _boxes(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def _times(self, name: str) -> Path:
        return self.folder / "times" / f"{name}_time.txt"


@dataclass
class Evaluation:
    """The metrics of a tracker on a dataset."""

    dataset: str
    tracker: str  # name
    encoder: dict[str, Any]
    settings: dict[str, Any]
    in_set: int  # sequences in the dataset
    names: list[str] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # that are counted
    rates: list[tuple[int, float]] = field(default_factory=list)  # frames, seconds
    left_out: dict[str, str] = field(default_factory=dict)  # sequence: why
    notes: list[str] = field(default_factory=list)

    def add(self, tracked: Tracked, curves: Curves, frames: int) -> None:
        """Add a sequence."""
        self.names.append(tracked.name)
        self.curves.append(curves)
        self.frames.append(frames)
        self.rates.append(tracked.rated)

    @property
    def mean(self) -> Curves:
        """Means over the sequences."""
        return mean_curves(self.curves)

    @property
    def of_sequences(self) -> int:
        """Number of sequences in the whole dataset."""
        return OTB_SEQUENCES if self.dataset == OTB else self.in_set

    def write(self, out: Path) -> None:
        """Write ``track.json``."""
        rows = [
            {
                "sequence": name,
                "frames": frames,
                **_figures(curves),
                "fps": _rate([rate]),
                "success_curve": _rounded(curves.success),
                "precision_curve": _rounded(curves.precision),
            }
            for name, curves, frames, rate in zip(
                self.names, self.curves, self.frames, self.rates, strict=True
            )
        ]
        content = {
            "dataset": self.dataset,
            "tracker": self.tracker,
            **_figures(self.mean),
            "success_curve": _rounded(self.mean.success),
            "precision_curve": _rounded(self.mean.precision),
            "fps": _rate(self.rates),
            "sequences": len(self.names),
            "of_sequences": self.of_sequences,
            "frames": sum(self.frames),
            "encoder": self.encoder,
            "settings": self.settings,
            "notes": [*self.notes, *self.lines_of_left_out()],
            "per_sequence": rows,
        }
        write_json(out / RESULT, content)

    def lines_of_left_out(self, most: int | None = None) -> list[str]:
        """One line per excluded sequence; beyond ``most``, one line with their number."""
        lines = [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        rest = len(lines[most:]) if most is not None else 0
        return [*lines[:most], f"left out: {rest} more"] if rest else lines

    def table(self) -> str:
        """Lines for a terminal."""
        width = max(len(name) for name in [*self.names, "mean"])
        lines = [f"{'':{width}}  success  precision@20  precision AUC   frames/s"]
        rows = zip([*self.names, "mean"], [*self.curves, self.mean], strict=True)
        for (name, curves), rate in zip(rows, [*self.rates, None], strict=True):
            fps = _rate(self.rates if rate is None else [rate])
            lines.append(
                f"{name:{width}}  {curves.success_auc:7.3f}  {curves.precision_20:12.3f}  "
                f"{curves.precision_auc:13.3f}  {fps if fps is not None else '-':>9}"
            )
        whole = f"{len(self.names)} of {self.of_sequences} sequences, {sum(self.frames)} frames"
        lines.append(f"{self.dataset}: {whole}, one pass, means over sequences")
        lines += self.notes
        lines += self.lines_of_left_out(MOST_NAMED)
        return "\n".join(lines)


def _figures(curves: Curves) -> dict[str, float]:
    return {
        "precision_20": curves.precision_20,
        "precision_auc": curves.precision_auc,
        "success_auc": curves.success_auc,
    }


def _rounded(curve: Floats) -> list[float]:
    return [round(value, 6) for value in curve.tolist()]


def _rate(rates: list[tuple[int, float]]) -> float | None:
    """Frames per second; None if no frame was searched."""
    frames, seconds = sum(rate[0] for rate in rates), sum(rate[1] for rate in rates)
    return round(frames / seconds, 2) if seconds > 0 else None


_READ_AT_ONCE = 8  # frames; one round trip for remote shards


def frames_ahead(shards: ShardSet, video: int) -> Iterator[Pixels | str]:
    """Yield the (H, W, 3) frames of a sequence; for an unreadable frame, the reason."""
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
_FEW = 8  # up to so many sequences get their own curves
_STYLES = ("-", "--", "-.", ":")


def write_plots(out: Path, tracker: str, mean: Curves, sequences: dict[str, Curves]) -> None:
    """Write ``success.png`` and ``precision.png``; few sequences get their own curves, too."""
    plots = (
        (SUCCESS_PLOT, SUCCESS_THRESHOLDS, "success", "overlap threshold", mean.success_auc, "AUC"),
        (
            PRECISION_PLOT,
            PRECISION_THRESHOLDS,
            "precision",
            "centre error, px",
            mean.precision_20,
            "at 20 px",
        ),
    )
    for name, thresholds, kind, axis, score, what in plots:
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.add_subplot()
        if len(sequences) <= _FEW:
            for number, (sequence, one) in enumerate(sequences.items()):
                # Line styles, too: eight colours alone are hard to distinguish.
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
            ylabel=f"{kind}, fraction of frames",
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


_ASSUMED_FPS = 30.0  # for videos if the dataset has no frame rate
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
    counted: np.ndarray[tuple[int], np.dtype[np.bool_]]  # (F,) the target is visible
    fps: float


class _LeftOut(Exception):
    """Why a sequence cannot be evaluated."""


def track_eval(config: TrackEvalConfig, write_video: WriteVideo | None = None) -> Evaluation:
    """Track every sequence from its first box and compare with the true boxes.

    Writes result files, ``track.json`` and plots. Sequences finished by an interrupted evaluation
    of the same tracker are not tracked again.

    Args:
        config: what to evaluate, and how.
        write_video: needed for ``config.video``.

    Raises:
        InputError: the settings, shards or tracker cannot be used, or no sequence can be evaluated.
    """
    check_tracker(config)
    if not is_file_name(config.name):
        raise InputError(f"{config.name!r} is not a valid file name", "--name")
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
                    say(f"seco: {found.lines_of_left_out()[-1]}")
            shown.advance(done + shards.frame_count(video) - shown.done)
    if len(found.left_out) > MOST_NAMED:
        say(f"seco: {found.lines_of_left_out(MOST_NAMED)[-1]}")
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
    """The training settings recorded in a tracker's checkpoint."""
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
    """Read a sequence's record; raises _LeftOut if it cannot be evaluated."""
    try:
        record = shards.record(video)
        truth = boxes_of(record)
    except (UnreadableFrame, ValueError) as error:
        raise _LeftOut(str(error)) from error
    frames = shards.frame_count(video)
    if not is_file_name(str(record.key)):
        raise _LeftOut(f"{record.key!r} is not a valid file name")
    if record.dataset == OTB and not record.splits:
        raise _LeftOut("is not part of OTB-100")
    if record.dataset == OTB and record.source_frames not in (None, frames):
        raise _LeftOut(f"{frames} of {record.source_frames} frames are stored, OTB-100 uses all")
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
    """Track a sequence; return (F, 4) boxes and (F,) seconds.

    An unreadable frame keeps the previous box, is counted and reported.
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
            say(f"seco: {found.notes[-1]}")
            boxes.append(boxes[-1])
            seconds.append(0.0)
            continue
        began = time.perf_counter()
        boxes.append(tracker.update(frame))
        seconds.append(time.perf_counter() - began)
    return np.array(boxes), np.array(seconds)


def _evaluate(found: Evaluation, sequence: _Sequence, tracked: Tracked) -> None:
    boxes = tracked.boxes.copy()
    boxes[0] = sequence.truth[0]  # as given, not as rounded in the file
    counted = sequence.counted
    found.add(tracked, curves(boxes[counted], sequence.truth[counted]), int(counted.sum()))
    absent = len(counted) - int(counted.sum())
    if absent:
        found.notes.append(f"{sequence.name}: {absent} frames without the target are not counted")


def _annotated(shards: ShardSet, sequence: _Sequence, tracked: Tracked) -> Iterator[Pixels]:
    """Yield frames with true and tracked box; an unreadable frame repeats the previous one."""
    last: Pixels | None = None
    frames = frames_ahead(shards, sequence.video)
    for frame, box, truth in zip(frames, tracked.boxes, sequence.truth, strict=True):
        last = last if isinstance(frame, str) else frame
        if last is not None:
            yield with_boxes(last, [(truth, TRUE), (box, TRACKED)])
