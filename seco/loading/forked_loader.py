"""Loader processes of torch's DataLoader, forked from this one, that are given tasks as they go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from seco.processes.stopping import kill_workers, leave_signals_to_parent

_Done = TypeVar("_Done")


@contextmanager
def forked_loader(
    dataset: Dataset[_Done], tasks: Callable[[], Iterator[Any]], workers: int, prefetch: int | None
) -> Iterator[Iterator[_Done]]:
    """Within the block, what became of each task, in their order.

    The processes are forked when the block begins; whatever ends it early kills them, also those
    that are stuck in a read.

    Args:
        dataset: its item of a task does it.
        tasks: makes them; torch asks for one as it hands it out.
        workers: processes; 0: tasks are done here, when they are asked for.
        prefetch: tasks of each process that are under way; None without processes.
    """
    loader: DataLoader[_Done] = DataLoader(
        dataset,
        sampler=_Tasks(tasks),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=leave_signals_to_parent if workers else None,
    )
    done = iter(loader)
    try:
        yield done
    except BaseException:
        kill_workers(done)
        raise
    finally:
        del done  # its processes end with it, not with the interpreter


class _Tasks:
    """The sampler."""

    def __init__(self, tasks: Callable[[], Iterator[Any]]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[Any]:
        return self._tasks()
