"""Starting the processes of a run: one a GPU, by torch's elastic launcher.

Under ``torchrun`` (also on several machines) the processes are there already, and each joins.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from seco.config import PretrainConfig
from shards.errors import EXIT_FAILED, EXIT_STOPPED, InputError, Stopped

_SIGNALS = "SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT"  # handed on to the processes


def pretrain(config: PretrainConfig, run: Callable[[PretrainConfig], int]) -> int:
    """Run a pre-training on all processes; returns the exit code.

    Args:
        config: as given.
        run: what each process does; returns its exit code. Found by its name in the new processes.

    Raises:
        InputError: more processes than GPUs.
    """
    processes = _processes(config)
    if processes == 1 or "RANK" in os.environ:
        return run(config)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", _SIGNALS)
    # Each process says in one line what happened to it; the launcher's own pages add nothing.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
    )
    try:
        elastic_launch(launched, _run_and_exit)(config, run)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if codes == {EXIT_STOPPED}:
            return EXIT_STOPPED
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        if first.exitcode < 0:
            print(
                f"seco: process {first.local_rank} was killed by signal {-first.exitcode}; the "
                "others were stopped — go on with the same command and --resume auto",
                file=sys.stderr,
            )
        return EXIT_FAILED if first.exitcode in (0, EXIT_STOPPED) else abs(first.exitcode)
    except SignalException as error:
        raise Stopped(
            f"{error.sigval.name}: all processes were told to save and have ended"
        ) from None
    return 0


def _processes(config: PretrainConfig) -> int:
    """How many this machine runs."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_gpus = config.device == "cuda" or (config.device == "auto" and gpus > 0)
    wanted = config.processes or (gpus if on_gpus else 1)
    if on_gpus and wanted > gpus:
        raise InputError(f"{wanted} processes, but {gpus} GPUs can be used here", "--processes")
    return max(1, wanted)


def _run_and_exit(config: PretrainConfig, run: Callable[[PretrainConfig], int]) -> None:
    code = run(config)
    if code:
        sys.exit(code)
