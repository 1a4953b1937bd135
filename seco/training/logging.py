"""The log of a run: ``metrics.jsonl``, ``speed.jsonl`` and TensorBoard events.

``metrics.jsonl`` holds only what the computation determines, so a resumed run's file equals that of
an undisturbed one; clock readings go to ``speed.jsonl``. A run of 400 epochs logs some 20,000
lines, others ten times as many, and a chart shows a thousand points: a reader joins neighbouring
lines as it reads, so its memory does not grow with the run.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from torch import nn

from shards.atomic import write_text
from shards.errors import InputError
from shards.untrusted import open_regular

METRICS = "metrics.jsonl"
SPEED = "speed.jsonl"


class Callback:
    """Hooks of a run, called on its first rank; override what you need.

    An exception raised here ends the run; earlier checkpoints remain.
    """

    def on_start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Called before the first step, with folder, settings, and the step it resumes after."""

    def on_step(self, step: int, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        """Called after every logged step with the lines of metrics.jsonl and speed.jsonl."""

    def on_epoch(self, epoch: int, model: nn.Module) -> None:
        """Called after each epoch, counted from 1, with the current model."""

    def on_checkpoint(self, path: Path) -> None:
        """Called once a checkpoint is complete on disk."""

    def on_end(self) -> None:
        """Called when the run ends, for whatever reason."""


class TensorBoardLogger(Callback):
    """Writes events to the run's folder ``tensorboard``."""

    def on_start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        # Takes half a second to import, and only the first rank needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=(step or -1) + 1)
        # Its thread would print a traceback when the disk is full; the next on_step raises in any
        # case.
        before = self._hook = threading.excepthook
        threading.excepthook = lambda fault: (
            None if type(fault.thread).__name__ == "_AsyncWriterThread" else before(fault)
        )

    def on_step(self, step: int, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        for name, value in {**metrics, **speed}.items():
            self._board.add_scalar(name, value, step)

    def on_end(self) -> None:
        try:
            self._board.close()
        finally:
            threading.excepthook = self._hook


class WandbLogger(Callback):
    """Logs to Weights & Biases; a resumed run continues the same W&B run.

    wandb's own variables set project, entity and mode (``WANDB_PROJECT``, ``WANDB_MODE``).
    """

    def on_start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        wandb = _imported("wandb", "wandb")
        known = folder / "wandb-run.txt"
        number = known.read_text("utf-8").strip() if step and known.is_file() else None
        with _starting("wandb", "log in with `wandb login`, or set WANDB_MODE=offline"):
            self._run = wandb.init(
                name=folder.name, dir=str(folder), config=dict(config), id=number, resume="allow"
            )
        write_text(known, f"{self._run.id}\n")

    def on_step(self, step: int, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        self._run.log({**metrics, **speed}, step=step)

    def on_end(self) -> None:
        self._run.finish()


class MLflowLogger(Callback):
    """Logs to MLflow at ``MLFLOW_TRACKING_URI``; a resumed run continues the same MLflow run."""

    def on_start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._mlflow = _imported("mlflow", "mlflow")
        known = folder / "mlflow-run.txt"
        number = known.read_text("utf-8").strip() if step and known.is_file() else None
        settings = {name: str(value)[:500] for name, value in config.items()}
        with _starting("mlflow", "set MLFLOW_TRACKING_URI to a server, such as http://host:5000"):
            run = self._mlflow.start_run(run_id=number, run_name=None if number else folder.name)
            if number is None:
                self._mlflow.log_params(settings)
        write_text(known, f"{run.info.run_id}\n")

    def on_step(self, step: int, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({**metrics, **speed}, step=step)

    def on_end(self) -> None:
        self._mlflow.end_run()


LOGGERS: dict[str, type[Callback]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MLflowLogger,
}


def loggers(names: str) -> list[Callback]:
    """The loggers of ``--loggers``, a comma-separated list; "none" stands for no logger.

    Raises:
        InputError: a name is unknown.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    for name in wanted:
        if name not in LOGGERS:
            raise InputError(
                f"unknown logger {name!r}", "--loggers", f"choose from {', '.join(LOGGERS)}, none"
            )
    return [LOGGERS[name]() for name in dict.fromkeys(wanted)]


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{module} is not installed", "--loggers", f'pip install "seco-video[{extra}]"'
        ) from error


@contextmanager
def _starting(name: str, advice: str) -> Iterator[None]:
    """Turn whatever another package raises into one line."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        told = f"{name} does not start ({type(error).__name__}: {said})"
        raise InputError(told, "--loggers", advice) from error


class RunLog:
    """Appends a line per logged step, after dropping earlier lines beyond ``start_step``.

    A new run has ``start_step`` -1, which drops the line of step 0, too.
    """

    def __init__(self, folder: Path, start_step: int, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = callbacks
        self._files: dict[str, TextIO] = {}
        for name in (METRICS, SPEED):
            _drop_after(folder / name, start_step)
            self._files[name] = open(folder / name, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, metrics: dict[str, Any], speed: dict[str, Any]) -> None:
        """Write one line to each file and call the callbacks."""
        for name, values in ((METRICS, metrics), (SPEED, speed)):
            self._files[name].write(json.dumps({"step": step, **values}) + "\n")
            self._files[name].flush()
        for callback in self._callbacks:
            callback.on_step(step, metrics, speed)

    def close(self) -> None:
        """Flush and close the files."""
        for file in self._files.values():
            file.close()


def _drop_after(path: Path, step: int) -> None:
    if path.is_file():
        kept = [line for line in path.read_text("utf-8").splitlines() if _step(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill


MAX_POINTS = 1024  # per curve; must be even
MAX_COLUMNS = 64
_MAX_LINE_CHARACTERS = 1 << 16
_STEP = "step"


@dataclass(frozen=True)
class Curve:
    """A column of a log as (P,) ascending steps and (P,) values, each a mean of joined lines.

    A value is nan if no line has one, and infinity if one of them is not finite: a mean over the
    others would hide it.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    last: float  # the last value as logged
    not_finite: int  # number of non-finite values


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """The numeric columns of a ``.jsonl`` log."""

    curves: dict[str, Curve]
    last_step: float
    lines: int  # usable ones, without those logged again after a resume
    lines_a_point: int  # lines joined per point; 1 for none
    skipped_lines: int


@dataclass
class _Point:
    """Consecutive lines of the log, joined."""

    first_step: float
    last_step: float
    step_sum: float
    lines: int = 1
    sums: dict[str, float] = field(default_factory=dict)  # of finite values
    counts: dict[str, int] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def join(self, later: _Point) -> None:
        self.last_step = later.last_step
        self.step_sum += later.step_sum
        self.lines += later.lines
        for name, value in later.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for mine, theirs in ((self.counts, later.counts), (self.not_finite, later.not_finite)):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        self.last |= later.last

    def value(self, name: str) -> float:
        if self.not_finite.get(name):
            return math.inf
        count = self.counts.get(name)
        return self.sums[name] / count if count else math.nan


def read_log(path: Path) -> LoggedRun:
    """Read a ``.jsonl`` log.

    A run resumed from an older checkpoint logs some steps again: the later lines count (a point
    that already joins some of them is dropped whole). A last line cut short by a kill is not
    counted as unusable.

    Raises:
        ValueError: no line is usable.
        OSError: the file cannot be read.
    """
    reader = _Reader()
    skipped, cut_short, inside = 0, False, False
    with io.TextIOWrapper(open_regular(path), encoding="utf-8", errors="replace") as file:
        while line := file.readline(_MAX_LINE_CHARACTERS):
            continued, inside = inside, not line.endswith("\n")
            if continued or not line.strip():
                continue  # the rest of an overlong line, or a blank line
            row = _numbers(line)
            if row is None:
                skipped += 1
                cut_short = inside
            else:
                reader.add(row)
    if not reader.points:
        raise ValueError("has no usable line" if skipped else "has no line yet")
    return reader.log(skipped - cut_short)


class _Reader:
    def __init__(self) -> None:
        self.points: list[_Point] = []
        self._width = 1  # lines per full point
        self._names: dict[str, None] = {}  # in order of appearance

    def add(self, row: dict[str, float]) -> None:
        step = row.pop(_STEP)
        while self.points and self.points[-1].last_step >= step:
            self.points.pop()  # logged again
        line = _Point(step, step, step)
        for name, value in row.items():
            if name not in self._names and len(self._names) >= MAX_COLUMNS:
                continue
            self._names[name] = None
            line.last[name] = value
            if math.isfinite(value):
                line.sums[name], line.counts[name] = value, 1
            else:
                line.not_finite[name] = 1
        if self.points and self.points[-1].lines < self._width:
            self.points[-1].join(line)
            return
        if len(self.points) == MAX_POINTS:
            self._join_pairs()
        self.points.append(line)

    def _join_pairs(self) -> None:
        for kept, joined in zip(self.points[::2], self.points[1::2], strict=True):
            kept.join(joined)
        del self.points[1::2]
        self._width *= 2

    def log(self, skipped: int) -> LoggedRun:
        last: dict[str, float] = {}
        for point in self.points:
            last |= point.last
        steps = np.array([point.step_sum / point.lines for point in self.points])
        curves = {
            name: Curve(
                steps,
                np.array([point.value(name) for point in self.points]),
                last[name],
                sum(point.not_finite.get(name, 0) for point in self.points),
            )
            for name in self._names
            if name in last
        }
        return LoggedRun(
            curves=curves,
            last_step=self.points[-1].last_step,
            lines=sum(point.lines for point in self.points),
            lines_a_point=self._width,
            skipped_lines=skipped,
        )


def _numbers(line: str) -> dict[str, float] | None:
    """The line's numbers by name, infinity if not finite; None if it has no step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    numbers = {}
    for name, value in row.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            numbers[name] = number if math.isfinite(number) else math.inf
    return numbers if math.isfinite(numbers.get(_STEP, math.inf)) else None
