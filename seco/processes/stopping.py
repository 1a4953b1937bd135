"""Stopping a run by a signal at a moment when everything can be saved."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from torch._C import _remove_worker_pids

_AGAIN_SECONDS = 1.0
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class StopWaiting(BaseException):
    """A signal came while the run was waiting for data."""


class StopRequest:
    """Turn the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP within the block into a flag.

    A second Ctrl-C interrupts at once, for users who do not want to wait. (It counts only after a
    second: one Ctrl-C may come twice, from the terminal and from a launcher that forwards it.)
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._since = 0.0
        self._waiting = False
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            # Under nohup, SIGHUP must stay ignored.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    @contextmanager
    def while_waiting(self) -> Iterator[None]:
        """Let a signal raise :class:`StopWaiting` within the block, which may wait forever."""
        if self:
            raise StopWaiting
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.signal_name is not None and time.monotonic() - self._since > _AGAIN_SECONDS
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal_name is None:
            self.signal_name, self._since = signal.Signals(number).name, time.monotonic()
        if self._waiting:
            self._waiting = False
            raise StopWaiting

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def leave_signals_to_parent(worker: int) -> None:
    """Ignore stop signals in a worker: they reach the whole group, but only the parent acts.

    A worker that died of the scheduler's SIGTERM would take the trainer with it before it can save.
    It ends when its parent tells it to, or has died. In a process group of its own, it can be
    killed together with the commands it runs (``pipe:``).
    """
    os.setpgid(0, 0)
    for name in _SIGNALS:
        if hasattr(signal, name):
            # Unlike SIG_IGN, a handler is not inherited by these commands.
            signal.signal(getattr(signal, name), _pass_by)


def _pass_by(number: int, frame: FrameType | None) -> None:
    pass


def kill_workers(loader: object) -> None:
    """Kill the workers of a DataLoader's iterator at once, whatever they are waiting for.

    They ignore SIGTERM, with which torch would end them, and may be stuck in a read.
    """
    workers = getattr(loader, "_workers", [])
    if workers:
        # Otherwise torch reports their death as an error here.
        _remove_worker_pids(id(loader))
        loader._worker_pids_set = False  # type: ignore[attr-defined]
    for worker in workers:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.kill()  # in case it has not made its group yet
        worker.join()
