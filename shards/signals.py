"""Signals, and how child processes are started.

The first signal only sets a flag, which is looked at where everything can be saved. Children of
multiprocessing can be started with signals blocked, so that none ends in the middle of an import;
they receive them once they know what to do.
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
_watched = False  # by the thread of quiet_exit
_holding = 0  # blocks of blocked() in this process
_held: StopRequest | None = None  # it would have raised within them


class StopWaiting(BaseException):
    """A signal came while the run was waiting for data."""


class StopRequest:
    """Turn the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP within the block into a flag.

    A second Ctrl-C interrupts at once, for users who do not want to wait; a third one kills. (Each
    counts only a second after the one before: one Ctrl-C may come twice, from the terminal and from
    a launcher that forwards it.)

    Args:
        at_once: called by the handler of the first signal; must not wait for anything.
        interrupts: whether the second one raises KeyboardInterrupt.
    """

    def __init__(self, at_once: Callable[[], None] = lambda: None, interrupts: bool = True) -> None:
        self.signal_name: str | None = None
        self._at_once = at_once
        self._interrupts = interrupts
        self._since = 0.0
        self._hurried = False
        self._waiting = False  # within the block, and nothing raised yet
        self._in_block = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            if _watched:
                signal.set_wakeup_fd(-1)  # from now on, everything can be saved
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
        self._waiting = self._in_block = True
        try:
            yield
        finally:
            self._waiting = self._in_block = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        global _received
        _received = True
        if self.signal_name is None:
            self.signal_name, self._since = signal.Signals(number).name, time.monotonic()
            self._at_once()
        elif number == signal.SIGINT and time.monotonic() - self._since > _AGAIN_SECONDS:
            if self._hurried:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._hurried, self._since = True, time.monotonic()
            if self._interrupts:
                raise KeyboardInterrupt
        self.raise_if_waiting()

    def raise_if_waiting(self) -> None:
        """Raise :class:`StopWaiting` within a block of :meth:`while_waiting`, once."""
        global _held
        if self._waiting and _holding:
            _held = self
        elif self._waiting:
            self._waiting = False
            _remember(self._raise_again)
            raise StopWaiting

    def _raise_again(self) -> None:
        self._waiting = self._in_block  # which may have ended meanwhile
        self.raise_if_waiting()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


_interrupted: float | None = None  # when
_LATER_SECONDS = 0.02
_raise_again: Callable[[], None] | None = None  # what raised last


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal of a command that saves nothing: raise KeyboardInterrupt, once.

    Another one would disturb the cleaning up. After a second it ends the process.
    """
    global _interrupted
    now = time.monotonic()
    if _interrupted is None and not _received:
        _interrupted = now
        _raise_after_imports(number, frame)
        return
    _interrupted = _interrupted or now
    if now - _interrupted > _AGAIN_SECONDS:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _raise_after_imports(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not within an import, nor where signals are held back.

    Some packages take any exception in an import for a missing part and go on without it, so that
    the command would go on as well, with half a NumPy. Held back, a signal may still have come to
    another thread.
    """

    def look() -> None:
        if signal.getsignal(number) is interrupt:
            _raise_after_imports(number, sys._getframe())
        else:  # somebody else is to be told by now
            os.kill(os.getpid(), number)

    if _holding or _within_import(frame):
        _later(look)
    else:
        _remember(look)
        raise KeyboardInterrupt


def _within_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _later(call: Callable[[], None]) -> None:
    signal.signal(signal.SIGALRM, lambda number, frame: call())
    signal.setitimer(signal.ITIMER_REAL, _LATER_SECONDS)


def _remember(raise_again: Callable[[], None]) -> None:
    """Keep what raises the exception that is about to be raised, in case that is lost."""
    global _raise_again
    _raise_again = raise_again


def not_lost(unraisable: Any) -> None:
    """Be ``sys.unraisablehook``: an exception of a signal is raised again, and nothing is printed.

    It is lost where it came within a destructor, or a callback of a weak reference.
    """
    if unraisable.exc_type in (KeyboardInterrupt, StopWaiting) and _raise_again is not None:
        _later(_raise_again)
    else:
        sys.__unraisablehook__(unraisable)


def interrupt_no_more() -> None:
    """Let :func:`interrupt` raise nothing any more: the command is over."""
    global _interrupted
    _interrupted = _interrupted or time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0)


def received() -> bool:
    """Whether a signal has asked this process to stop."""
    return _received


@contextmanager
def blocked() -> Iterator[None]:
    """Hold signals back within the block; processes started there begin with them blocked."""
    global _holding, _held
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    # Another thread of this process may receive them all the same.
    _holding += 1
    try:
        yield
    finally:
        _holding -= 1
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if _held is not None and not _holding:
            held, _held = _held, None
            held.raise_if_waiting()


def unblock() -> None:
    """Receive signals again, and those held back, in a process that was started without."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def quiet_exit(code: int, before: Callable[[], None]) -> None:
    """From now on, and until a handler is set, let a signal end this process without a word.

    Args:
        code: the exit code.
        before: called before the exit.
    """

    leaving = threading.Lock()  # two signals, or two threads that hear of one

    def leave(number: int, frame: FrameType | None) -> None:
        if leaving.acquire(blocking=False):
            before()
            os._exit(code)

    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    _watch(leave)
    unblock()


def _watch(leave: Callable[[int, FrameType | None], None]) -> None:
    """Call the handler, while it is one, although the main thread is not in Python code.

    In a wait for other processes, which have left already, it would be called minutes later.
    """
    global _watched
    _watched = True
    come, note = os.pipe()
    os.set_blocking(note, False)
    signal.set_wakeup_fd(note, warn_on_full_buffer=False)

    def look() -> None:
        while number := os.read(come, 1):
            if signal.getsignal(number[0]) is leave:
                leave(number[0], None)

    threading.Thread(target=look, name="signals", daemon=True).start()


# multiprocessing starts children as `python -c`, for which Python searches the current folder
# first. Python 3.10 knows only -I, which also ignores PYTHONPATH.
_SAFE_PATH = "-P" if sys.version_info >= (3, 11) else "-I"
_flags, _spawn = util._args_from_interpreter_flags, util.spawnv_passfds  # type: ignore[attr-defined]
_protecting = 0
_lock = threading.Lock()


@contextmanager
def protected_children(held_back: bool = False) -> Iterator[None]:
    """Protect the processes that multiprocessing starts within the block.

    They run no file of the current folder: one that is named like a module, and was unpacked with a
    dataset, would be imported in its place. Other parts of this program start theirs as before.

    Args:
        held_back: start them with signals blocked; they must call :func:`unblock`.
    """
    global _protecting
    with _lock:
        _protecting += 1
        util._args_from_interpreter_flags = _safe_flags  # type: ignore[attr-defined]
        if held_back:
            util.spawnv_passfds = _spawn_blocked  # type: ignore[assignment]
    try:
        yield
    finally:
        with _lock:
            _protecting -= 1
            if not _protecting:
                util._args_from_interpreter_flags = _flags  # type: ignore[attr-defined]
                util.spawnv_passfds = _spawn


def _safe_flags() -> list[str]:
    flags: list[str] = _flags()
    return flags if _SAFE_PATH in flags else [*flags, _SAFE_PATH]


def _spawn_blocked(*given: Any) -> int:
    with blocked():
        return _spawn(*given)
