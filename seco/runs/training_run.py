"""What every training loop does alike: agree with the other processes, stop, fail, be logged."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import tomli_w

from seco.processes.ranks import Ranks, local_rank
from seco.processes.stopping import StopRequest, StopWaiting
from seco.runs.metrics import RunLog
from seco.runs.run_state import RunState
from shards.atomic import write_text
from shards.errors import InputError, PeerLost, Stopped
from shards.progress import Progress, progress
from shards.settings import as_settings

CONFIG = "config.toml"
_SAMPLES_JUDGED = 1000  # before so many a percentage of unreadable ones says little

_Batch = TypeVar("_Batch")


class Replacing(Protocol):
    """A batch in which other samples stand for what could not be read."""

    @property
    def unreadable(self) -> Sequence[str]:
        """Why, of each."""


class TrainingRun:
    """One process of a run.

    Subclasses set the attributes.

    Attributes:
        command: of the command line, for messages.
        config: resolved settings, with ``batch_size`` and ``max_unreadable``.
        ranks: the processes of the run.
        out: its folder.
        state: its checkpoints and position.
        total_steps: of the whole run.
    """

    command: str
    config: Any
    ranks: Ranks
    out: Path
    state: RunState
    total_steps: int

    def _require_agreement(self) -> None:
        """All processes must be about to do the same, or they would wait for each other."""
        if not self.ranks.agree(repr(self.state.plan())):
            raise self._told_once(
                InputError(
                    "the processes do not see the same run: other settings, videos or checkpoints",
                    self.out,
                    "put --out and --shards where all machines see them",
                )
            )

    @contextlib.contextmanager
    def _under_way(self, title: str) -> Iterator[tuple[RunLog | None, StopRequest, Progress]]:
        """The log (of the first rank), the signals and the progress display of the loop."""
        with contextlib.ExitStack() as open_things:
            log = None
            if self.ranks.first:
                write_text(self.out / CONFIG, tomli_w.dumps(as_settings(self.config)))
                log = RunLog(self.out, self.state.step or -1)
                open_things.callback(log.close)
            stop = open_things.enter_context(StopRequest())
            shown = open_things.enter_context(
                progress(
                    title, self.total_steps, "steps", self.state.step, quiet=not self.ranks.first
                )
            )
            yield log, stop, shown

    def _saved_and_stopped(self, stop: StopRequest) -> Stopped:
        """Save everything; raises InputError when that fails."""
        with contextlib.suppress(InputError):
            self.state.finish()  # whatever became of an earlier one, this one is tried
        self.state.save()
        self.state.finish()
        self.ranks.wait()  # nobody ends before everything is saved
        if not self.ranks.first:
            return Stopped("")
        return Stopped(
            f"{stop.signal_name or 'another process was stopped'}: saved step {self.state.step} of "
            f"{self.total_steps} in {self.state.last}; go on with the same command and "
            "--resume auto"
        )

    def _stopping(self, batch: Replacing | None, what: str = "video", counted: bool = True) -> bool:
        """Whether any rank was told to stop: one exchange of the hosts a step.

        Args:
            batch: this rank's; None when it was told to stop.
            what: takes the place of something unreadable.
            counted: whether this batch is trained on, so that its unreadable samples count.
        """
        unreadable = batch.unreadable if batch is not None and counted else []
        self._tell_of(unreadable, what)
        everyone = self.ranks.gather_host(np.array([[float(batch is None), len(unreadable)]]))
        stopping = bool(everyone[:, 0].any())
        if not stopping:  # else the batch comes again
            self._note_unreadable(int(everyone[:, 1].sum()))
        return stopping

    def _tell_of(self, unreadable: Sequence[str], what: str = "video") -> None:
        for reason in unreadable:
            self._tell(f"unreadable, replaced by another {what}: {reason}")

    def _note_unreadable(self, count: int) -> None:
        """Count samples of the step that no rank could read; InputError when they are too many."""
        state, config = self.state, self.config
        state.unreadable += count
        judged = max(_SAMPLES_JUDGED, (state.step + 1) * config.batch_size)
        if state.unreadable > config.max_unreadable / 100 * judged:
            raise self._told_once(
                InputError(
                    f"{state.unreadable} samples could not be read by step {state.step + 1}, more "
                    f"than --max-unreadable {config.max_unreadable} % allows",
                    "--shards",
                    "prepare or copy the named shards again",
                )
            )

    def _told_once(self, error: InputError) -> Exception:
        """All ranks end for the same reason; the first one says it."""
        return error if self.ranks.first else PeerLost()

    def _say(self, message: str) -> None:
        if self.ranks.first:
            self._tell(message)

    def _tell(self, message: str) -> None:
        print(f"seco {self.command}: {message}", file=sys.stderr, flush=True)


class Waiting:
    """The batches of a loop, and how long it waited for them since ``restart``."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new window of time."""
        self._began, self._waited = time.perf_counter(), 0.0

    def next(self, batches: Iterator[_Batch], stop: StopRequest) -> _Batch | None:
        """The next batch; None when a signal came: the other ranks have to be told."""
        asked = time.perf_counter()
        batch = None
        with contextlib.suppress(StopWaiting), stop.while_waiting():
            batch = next(batches)
        self._waited += time.perf_counter() - asked
        return batch

    def speed(self, images: int) -> dict[str, float]:
        """Images a second, and the share of the time that went in waiting."""
        elapsed = time.perf_counter() - self._began
        return {"images_per_s": images / elapsed, "data_wait": self._waited / elapsed}


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Mistakes found before the start are the same for all processes: a machine's first says them.

    Raises:
        InputError: in the first process of a machine.
        PeerLost: in the others.
    """
    try:
        yield
    except InputError as error:
        raise error if local_rank() == 0 else PeerLost from error
