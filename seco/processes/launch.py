"""Start the ranks of a run, one per GPU, with torch's elastic launcher.

Under ``torchrun`` (on several machines, too) the processes already exist, and each one joins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

from shards.errors import (
    EXIT_FAILED,
    EXIT_PEER_LOST,
    EXIT_STOPPED,
    EXIT_TOO_MANY_EXCLUDED,
    InputError,
    Stopped,
)
from shards.signals import protected_children, quiet_exit, received
from shards.terminal import say, show_everywhere

_SIGNALS = "SIGTERM,SIGINT,SIGUSR1,SIGHUP"  # forwarded to the processes
_SAVING_SECONDS = "1800"  # for saving after a signal; then torch kills the processes
_LAUNCHER_LOOKS_WITHIN = 15.0  # seconds; the launcher polls every half second
_MARK = "SECO_STOPPED"  # folder in which each rank marks how it has ended:
_STOPPED, _ENDED, _FAILED = "stopped, and all is saved", "at its end", "otherwise"


class ManyProcesses(Protocol):
    """Settings of a multi-process stage."""

    @property
    def processes(self) -> int | None:
        """How many; None: one per GPU, or one without a GPU."""

    @property
    def device(self) -> str:
        """``auto``, ``cpu`` or ``cuda``."""


_Config = TypeVar("_Config", bound=ManyProcesses)


def launch(
    config: _Config,
    run: Callable[[_Config], int],
    check: Callable[[_Config, int], object] = lambda config, processes: None,
    *,
    again: str = "run the same command again to resume",
) -> int:
    """Run a stage on all processes and return the exit code.

    Args:
        config: as given; pickled for the new processes.
        run: called in each process; returns its exit code. New processes import it by name.
        check: raises for settings that cannot work on so many processes, so that the error is
            reported once.
        again: advice to the user after a process was killed.

    Raises:
        InputError: more processes than GPUs; whatever ``check`` raises.
    """
    if "RANK" in os.environ:
        if config.processes is not None:
            raise InputError("cannot be used under torchrun", "--processes", "leave it out")
        code = run(config)
        _leave(EXIT_FAILED if code == EXIT_PEER_LOST else code)
        return code
    processes = _processes(config)
    if processes == 1:
        return run(config)
    check(config, processes)
    with tempfile.TemporaryDirectory(prefix="seco-run-") as scratch:
        os.environ[_MARK] = scratch
        return _launched(config, run, processes, scratch, again)


def _launched(
    config: _Config, run: Callable[[_Config], int], processes: int, scratch: str, again: str
) -> int:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", _SIGNALS)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SAVING_SECONDS)
    # Each process reports its error on one line; the launcher's own log adds only noise.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    launched = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"seco-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.5,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=scratch),
    )
    try:
        with protected_children(held_back=True), _orderly_signals() as started:
            elastic_launch(launched, _run_and_exit)(config, run)
    except ChildFailedError as error:
        if _all_stopped(scratch, processes):
            return EXIT_STOPPED
        if {f.exitcode for f in error.failures.values()} == {EXIT_TOO_MANY_EXCLUDED}:
            return EXIT_TOO_MANY_EXCLUDED
        for failure in error.failures.values():
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                say(
                    f"seco: process {failure.local_rank} was killed by signal {-failure.exitcode}; "
                    f"the others were stopped; {again}",
                )
        return EXIT_FAILED
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        endings = {_mark(scratch, rank) for rank in range(processes)} if started else {_STOPPED}
        if endings == {_ENDED}:
            return 0  # it came too late
        if endings <= {_STOPPED, _ENDED}:
            raise Stopped("") from None  # rank 0 has reported it
        raise InputError(f"{name} ended the run, and not everything could be saved") from None
    return 0


@contextlib.contextmanager
def _orderly_signals() -> Iterator[list[str]]:
    """Let torch's launcher raise for one signal, and not while it starts the processes.

    A second would disturb its cleaning. One in the middle of a start would leave a process without
    its first instructions, and another that nobody stops.

    Yields:
        What has been started: empty until then.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import api

    handler, start = api._terminate_process_handler, LocalElasticAgent._start_workers
    raised = starting = False
    started: list[str] = []
    early: list[tuple[int, FrameType | None]] = []

    def whole(agent: Any, group: Any) -> Any:
        nonlocal starting
        started.append("processes")
        starting = True
        try:
            ids = start(agent, group)
        finally:
            starting = False
        if early:
            handler(*early[0])
        return ids

    def once(signum: int, frame: FrameType | None) -> None:
        nonlocal raised
        if raised:
            return
        raised = True
        if starting:
            early.append((signum, frame))
        else:
            handler(signum, frame)

    api._terminate_process_handler = once
    LocalElasticAgent._start_workers = whole  # type: ignore[method-assign]
    try:
        yield started
    finally:
        api._terminate_process_handler = handler
        LocalElasticAgent._start_workers = start  # type: ignore[method-assign]


def _wait_until_all_have_stopped() -> None:
    """Wait until all ranks have ended: once one exits, the launcher kills the others."""
    waited_until = time.monotonic() + _LAUNCHER_LOOKS_WITHIN
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    while time.monotonic() < waited_until:
        if all(_mark(os.environ[_MARK], rank) for rank in range(processes)):
            break
        time.sleep(0.02)


def _all_stopped(scratch: str, processes: int) -> bool:
    return all(_mark(scratch, rank) == _STOPPED for rank in range(processes))


def _mark(scratch: str, rank: int) -> str:
    """How a rank has ended; empty while it runs."""
    path = Path(scratch, str(rank))
    return path.read_text() if path.is_file() else ""


def _leave_mark(ending: str) -> None:
    Path(os.environ[_MARK], os.environ["RANK"]).write_text(ending)


def _processes(config: ManyProcesses) -> int:
    """How many processes to start on this machine."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_gpus = config.device == "cuda" or (config.device == "auto" and gpus > 0)
    wanted = config.processes or (gpus if on_gpus else 1)
    if on_gpus and wanted > gpus:
        raise InputError(f"{wanted} processes, but {gpus} GPUs can be used here", "--processes")
    return max(1, wanted)


def _run_and_exit(config: _Config, run: Callable[[_Config], int]) -> None:
    show_everywhere()
    # Until the run can save something, a signal ends it as if it had been saved.
    quiet_exit(EXIT_STOPPED, lambda: _leave_mark(_STOPPED))
    try:
        code = run(config)
    except BaseException:
        traceback.print_exc()  # torch would not print it
        sys.exit(EXIT_FAILED)
    _leave_mark({EXIT_STOPPED: _STOPPED, 0: _ENDED}.get(code, _FAILED))
    if code == EXIT_STOPPED:
        _wait_until_all_have_stopped()
    if code == EXIT_PEER_LOST and not received():
        # The launcher reports the first failure it sees, which has to be the peer's; it kills this
        # process as soon as it has seen that one.
        time.sleep(_LAUNCHER_LOOKS_WITHIN)
    if code == 0 and received():
        _leave_soon()
    _leave(code)


def _leave_soon() -> None:
    """End in a while, if torch still waits for the launcher, which may have stopped looking.

    If a signal came too late to stop the run, the launcher waits for this process, and this process
    for the launcher to read its result; that stays readable.
    """
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.setitimer(signal.ITIMER_REAL, _LAUNCHER_LOOKS_WITHIN)


def _leave(code: int) -> None:
    """Exit after a failure, without the shutdown in which torch's waiting threads would abort."""
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
