"""Loader workers and signals: only their parent acts on them."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType

from torch._C import _remove_worker_pids

from shards.signals import STOPPING, unblock


def leave_signals_to_parent(worker: int) -> None:
    """Ignore stop signals in a worker: they reach the whole group, but only the parent acts.

    A worker that died of the scheduler's SIGTERM would take the trainer with it before it can save.
    It ends when its parent tells it to, or has died. In a process group of its own, it can be
    killed together with the commands it runs (``pipe:``).
    """
    os.setpgid(0, 0)
    for number in STOPPING:
        # Unlike SIG_IGN, a handler is not inherited by these commands.
        signal.signal(number, _pass_by)
    sys.excepthook = _report
    unblock()


def _pass_by(number: int, frame: FrameType | None) -> None:
    pass


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception, unless the parent has hung up.

    A worker's own exceptions go to its parent. But multiprocessing has a thread that hands over
    tensors, and a parent that stops may leave in the middle of one.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


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
