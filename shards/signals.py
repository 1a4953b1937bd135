"""Signals, and how child processes are started.

The first signal only sets a flag, which is looked at where everything can be saved. Children of
multiprocessing start with signals blocked, so that none ends in the middle of an import, and
receive them once they know what to do.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import util
from types import FrameType, TracebackType
from typing import Any

STOPPING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
)
_AGAIN_SECONDS = 1.0
_received = False


class StopWaiting(BaseException):
    """A signal came while the run was waiting for data."""


class StopRequest:
    """Turn the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP within the block into a flag.

    A second Ctrl-C interrupts at once, for users who do not want to wait; after it, the next one
    kills. (A second one counts only after a second: one Ctrl-C may come twice, from the terminal
    and from a launcher that forwards it.)

    Args:
        at_once: called by the handler of the first signal; must not wait for anything.
        interrupts: whether the second one raises KeyboardInterrupt.
    """

    def __init__(self, at_once: Callable[[], None] = lambda: None, interrupts: bool = True) -> None:
        self.signal_name: str | None = None
        self._at_once = at_once
        self._interrupts = interrupts
        self._since = 0.0
        self._waiting = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in STOPPING:
                # Under nohup, SIGHUP must stay ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
            unblock()
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
        global _received
        _received = True
        if self.signal_name is None:
            self.signal_name, self._since = signal.Signals(number).name, time.monotonic()
            self._at_once()
        elif number == signal.SIGINT and time.monotonic() - self._since > _AGAIN_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            if self._interrupts:
                raise KeyboardInterrupt
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
            signal.signal(number, handler)


def received() -> bool:
    """Whether a signal has asked this process to stop."""
    return _received


@contextmanager
def blocked() -> Iterator[None]:
    """Hold signals back within the block; processes started there begin with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock() -> None:
    """Receive signals again, and those held back, in a process that was started without."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def quiet_exit(code: int, before: Callable[[], None]) -> None:
    """From now on, and until a handler is set, let a signal end this process without a word.

    Args:
        code: the exit code.
        before: called before the exit.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        before()
        os._exit(code)

    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    unblock()


# multiprocessing starts children as `python -c`, for which Python searches the current folder
# first. Python 3.10 knows only -I, which also ignores PYTHONPATH.
SAFE_PATH = "-P" if sys.version_info >= (3, 11) else "-I"


def protect_children() -> None:
    """Protect the processes that multiprocessing starts; to be called before the first of them.

    They start with signals blocked, and with this process's search path: no file of the current
    folder runs because it is named like a module, and was unpacked with a dataset.
    """
    flags, spawn = util._args_from_interpreter_flags, util.spawnv_passfds  # type: ignore[attr-defined]
    if SAFE_PATH in flags():
        return

    def spawn_protected(*given: Any) -> int:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with blocked(), _environment("PYTHONPATH", path):
            return spawn(*given)

    util._args_from_interpreter_flags = lambda: [*flags(), SAFE_PATH]  # type: ignore[attr-defined]
    util.spawnv_passfds = spawn_protected  # type: ignore[assignment]


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
