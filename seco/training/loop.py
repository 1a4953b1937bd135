"""The training loop: agree with the other ranks, step, log, save, stop, fail.

Pre-training, fine-tuning and tracking are subclasses that define a batch, a step and its metrics. A
step is logged before it is saved, so a resumed run writes the lines after its checkpoint and no
others.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import tomli_w
from numpy.typing import NDArray

from seco.processes.ranks import Ranks
from seco.training.logging import Callback, RunLog, loggers
from seco.training.state import RunState
from shards.atomic import write_text
from shards.errors import InputError, PeerLost, Stopped
from shards.progress import Progress, progress
from shards.settings import as_settings
from shards.signals import StopRequest, StopWaiting
from shards.stream import MAX_GAP
from shards.terminal import say

CONFIG = "config.toml"
_SAMPLES_JUDGED = 1000  # minimum base for the percentage of unreadable samples


class Replacing(Protocol):
    """A batch in which other samples replace unreadable ones."""

    @property
    def unreadable(self) -> Sequence[str]:
        """The reason for each unreadable sample."""


_Batch = TypeVar("_Batch", bound=Replacing)
_Any = TypeVar("_Any")
_Result = TypeVar("_Result")


class TrainingRun(ABC, Generic[_Batch, _Result]):
    """One process of a run.

    Subclasses set the attributes, implement the abstract methods, and may override the hooks that
    do nothing here.

    Attributes:
        command: command name, for messages.
        title: title of the progress display.
        replaced_by: what replaces something unreadable, in messages.
        config: resolved settings (:class:`seco.config.TrainingConfig`).
        ranks: the process group.
        out: the run's folder.
        state: checkpoints and position.
        steps_per_epoch: steps per epoch.
        images_per_step: images per step, over all ranks.
        callbacks: called on the first rank, after the loggers of the settings.
    """

    command: str
    title: str
    replaced_by = "video"
    config: Any
    ranks: Ranks
    out: Path
    state: RunState
    steps_per_epoch: int
    images_per_step: int
    callbacks: Sequence[Callback] = ()
    _gathered: NDArray[np.float64]

    @abstractmethod
    def _batches(self, first: int, last: int) -> AbstractContextManager[Iterator[_Batch]]:
        """This rank's batches for steps ``first`` to ``last`` - 1."""

    @abstractmethod
    def _train_step(self, batch: _Batch, lr: float) -> _Result:
        """Train on this rank's part of a batch."""

    @abstractmethod
    def _learning_rate(self) -> float:
        """The learning rate of the next step."""

    @abstractmethod
    def _figures(self, result: _Result) -> dict[str, float]:
        """The step's metrics over all ranks by name, including ``loss``."""

    @abstractmethod
    def _status(self, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> str:
        """Metrics for the end of the progress line."""

    def _told(self, batch: _Batch | None) -> NDArray[np.float64]:
        """(n, F) numbers of this batch to send to the other ranks; n ≥ 1 and F never change."""
        return np.zeros((1, 0))

    def _begin(self, log: RunLog | None, stop: StopRequest) -> None:
        """Hook before the first batch, also of a resumed run."""

    def _evaluates(self, epoch: int, last: bool) -> bool:
        """Whether to call :meth:`_evaluate` after this epoch."""
        return False

    def _evaluate(self) -> dict[str, float]:
        """More metrics to log with those of the step."""
        return {}

    def _look(self, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        """Hook at every logged step."""

    def _require_unchanged(self) -> None:
        """Hook before the last save; raises InputError if something frozen has changed."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return int(self.config.epochs) * self.steps_per_epoch

    def run(self) -> Path:
        """Train to the end; return the path of the last checkpoint.

        Raises:
            InputError: the loss is not finite; too many samples cannot be read; a checkpoint
                cannot be written.
            Stopped: a signal arrived; everything is saved.
            PeerLost: another process ended and has reported why.
        """
        with self._under_way() as (log, stop, shown):
            try:
                self._begin(log, stop)
                with self._batches(self.state.step, self.total_steps) as batches:
                    self._steps(batches, log, stop, shown)
            finally:
                self.state.finish()
                self._announce_checkpoints()
        return self.state.last

    def _steps(
        self, batches: Iterator[_Batch], log: RunLog | None, stop: StopRequest, shown: Progress
    ) -> None:
        config, state = self.config, self.state
        waiting, logged_step = Waiting(), state.step
        while state.step < self.total_steps:
            batch = waiting.next(batches, stop)
            if self._stopping(batch) or batch is None:
                raise self._saved_and_stopped(stop)
            lr = self._learning_rate()
            result = self._train_step(batch, lr)
            state.step += 1
            state.check()
            self._announce_checkpoints()
            epoch, rest = divmod(state.step, self.steps_per_epoch)
            last = state.step == self.total_steps
            evaluated = rest == 0 and self._evaluates(epoch, last)
            kept = rest == 0 and epoch % config.keep_every_epochs == 0
            saved = last or state.step % config.checkpoint_every_steps == 0
            logged = last or evaluated or state.step % config.log_every == 0
            if saved or logged or kept:
                metrics = self._metrics(result, lr)  # raises if the loss is not finite
            if last:
                self._require_unchanged()
            if logged:
                speed = waiting.speed((state.step - logged_step) * self.images_per_step)
                self._look(metrics, speed)
                if evaluated:
                    metrics |= self._evaluate()
                if log is not None:
                    log.log(state.step, metrics, speed)
                waiting.restart()
                logged_step = state.step
                shown.advance(0, self._status(metrics, speed))
            if saved:
                state.save()  # after logging, so that a resumed run does not log this step again
            shown.advance()
            if kept:
                state.keep_epoch(epoch)
            if rest == 0:
                for callback in self._heard:
                    callback.on_epoch(epoch, state.network)

    def _announce_checkpoints(self) -> None:
        while self.state.written:
            path = self.state.written.popleft()
            for callback in self._heard:
                callback.on_checkpoint(path)

    def _metrics(self, result: _Result, lr: float) -> dict[str, Any]:
        """A line of ``metrics.jsonl``.

        Raises:
            InputError: the loss is not finite.
        """
        figures = self._figures(result)
        loss = figures.pop("loss")
        if not math.isfinite(loss):
            raise self._rank_zero_error(self.state.not_finite(f"the loss ({loss})"))
        epoch = (self.state.step - 1) // self.steps_per_epoch
        unreadable = self.state.unreadable
        return {"epoch": epoch, "loss": loss, "lr": lr, **figures, "unreadable": unreadable}

    def _require_agreement(self) -> None:
        """Raise unless all ranks are about to do the same; else they would deadlock."""
        if not self.ranks.agree(repr(self.state.plan())):
            raise self._rank_zero_error(
                InputError(
                    "the ranks differ in settings, videos or checkpoints",
                    self.out,
                    "put --out and --shards on storage that all machines share",
                )
            )

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[tuple[RunLog | None, StopRequest, Progress]]:
        """Open the log (on the first rank), the signal handler and the progress display."""
        self._heard: list[Callback] = []
        with contextlib.ExitStack() as open_things:
            log = None
            if self.ranks.first:
                write_text(self.out / CONFIG, tomli_w.dumps(as_settings(self.config)))
                callbacks = [*loggers(self.config.loggers), *self.callbacks]
                log = RunLog(self.out, self.state.step or -1, self._heard)
                open_things.callback(log.close)
                for callback in callbacks:
                    callback.on_start(self.out, as_settings(self.config), self.state.step)
                    open_things.callback(callback.on_end)
                    self._heard.append(callback)
            stop = open_things.enter_context(StopRequest())
            shown = open_things.enter_context(
                progress(
                    *(self.title, self.total_steps, "steps", self.state.step),
                    quiet=not self.ranks.first,
                )
            )
            yield log, stop, shown

    def _saved_and_stopped(self, stop: StopRequest) -> Stopped:
        """Save everything and return the exception to raise; InputError if saving fails."""
        with contextlib.suppress(InputError):
            self.state.finish()  # even if an earlier save failed, try this one
        self.state.save()
        self.state.finish()
        self.ranks.wait()  # no rank ends before everything is saved
        if not self.ranks.first:
            return Stopped("")
        return Stopped(
            f"{stop.signal_name or 'another process was stopped'}: saved step {self.state.step} of "
            f"{self.total_steps} in {self.state.last}; resume with the same command and "
            "--resume auto"
        )

    def _stopping(self, batch: _Batch | None, counted: bool = True) -> bool:
        """Whether any rank was told to stop.

        The only exchange between hosts per step; sets ``_gathered`` to all ranks' :meth:`_told`.

        Args:
            batch: this rank's batch; None if it was told to stop.
            counted: whether the batch is trained on, so that its unreadable samples count.
        """
        unreadable = batch.unreadable if batch is not None and counted else []
        for reason in unreadable:
            self._tell(f"unreadable, replaced by another {self.replaced_by}: {reason}")
        told = self._told(batch)
        mine = np.column_stack([np.zeros((len(told), 2)), told])
        mine[0, :2] = batch is None, len(unreadable)
        everyone = self.ranks.gather_host(mine)
        stopping = bool(everyone[:, 0].any())
        if not stopping:  # else the batch is repeated after resuming
            self._note_unreadable(int(everyone[:, 1].sum()))
        self._gathered = everyone[:, 2:]
        return stopping

    def _note_unreadable(self, count: int) -> None:
        """Count the step's unreadable samples over all ranks; InputError if there are too many."""
        state, config = self.state, self.config
        state.unreadable += count
        judged = max(_SAMPLES_JUDGED, (state.step + 1) * config.batch_size)
        if state.unreadable > config.max_unreadable / 100 * judged:
            gap = getattr(config, "max_gap_seconds", None)
            or_raise = "" if gap is None else f", or raise {MAX_GAP}"
            raise self._rank_zero_error(
                InputError(
                    f"{state.unreadable} samples could not be read by step {state.step + 1}, more "
                    f"than --max-unreadable {config.max_unreadable} % allows",
                    "--shards",
                    "see the reasons above; prepare or copy these shards again" + or_raise,
                )
            )

    def _rank_zero_error(self, error: InputError) -> Exception:
        """The exception for an error common to all ranks; only the first one reports it."""
        return error if self.ranks.first else PeerLost()

    def _say(self, message: str) -> None:
        if self.ranks.first:
            self._tell(message)

    def _tell(self, message: str) -> None:
        say(f"seco {self.command}: {message}")


class Waiting:
    """Fetches batches and measures the time spent waiting since ``restart``."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start a new time window."""
        self._began, self._waited = time.perf_counter(), 0.0

    def next(self, batches: Iterator[_Any], stop: StopRequest) -> _Any | None:
        """The next batch; None if a signal arrived (the other ranks must then be told)."""
        asked = time.perf_counter()
        batch = None
        with contextlib.suppress(StopWaiting), stop.while_waiting():
            batch = next(batches)
        self._waited += time.perf_counter() - asked
        return batch

    def speed(self, images: int) -> dict[str, float]:
        """Images per second, and the fraction of the time spent waiting for data."""
        elapsed = time.perf_counter() - self._began
        return {"images_per_s": images / elapsed, "data_wait": self._waited / elapsed}
