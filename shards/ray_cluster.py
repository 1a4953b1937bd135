"""A Ray cluster: joining it, and handing it one task after another."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from shards.errors import InputError
from shards.untrusted import VARIABLES

MOST_RETRIES = 5  # per task, if its worker or node dies
_POLL_SECONDS = 1.0
_SETTLE_SECONDS = 1.0
_PATIENCE_SECONDS = 10.0
_Task = TypeVar("_Task")


def require_ray() -> None:
    """Check that Ray is installed; raises InputError if not."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise InputError(
            "Ray is not installed", "--engine ray", 'pip install "seco-video[ray]"'
        ) from error


@contextlib.contextmanager
def connection(address: str | None) -> Iterator[None]:
    """Make this process a driver of a cluster within the block.

    Args:
        address: of the cluster; None: ``RAY_ADDRESS``, the one this machine is in, or a new one
            on this machine alone.

    Raises:
        InputError: no cluster answers.
    """
    import ray

    if ray.is_initialized():  # by a program that calls this as a library
        yield
        return
    _require_answer(address or os.environ.get("RAY_ADDRESS"))
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster answers ({error})", address or "RAY_ADDRESS", "see --ray-address"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def node_options() -> dict[str, Any]:
    """Return task options that give the nodes this process's limits for files from others."""
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {"runtime_env": {"env_vars": given}} if given else {}


def run_tasks(
    tasks: Iterable[_Task],
    start: Callable[[_Task], Any],
    most: int,
    on_done: Callable[[_Task, Any], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Run tasks on the cluster; call ``on_done`` as each finishes, in any order.

    Args:
        tasks: the tasks.
        start: submits one; returns Ray's reference to its result.
        most: tasks submitted at once.
        on_done: receives the result.
        meanwhile: called every second; an exception from it ends the run.

    Raises:
        InputError: a task raised it, or its workers died repeatedly.
    """
    import ray

    queue = iter(tasks)
    running: dict[Any, _Task] = {}
    try:
        while True:
            meanwhile()
            for task in itertools.islice(queue, most - len(running)):
                running[start(task)] = task
            if not running:
                break
            done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            for reference in done:
                result = _result(ray, reference)
                on_done(running.pop(reference), result)
    except BaseException:
        # Ray may abort this process if a task is cancelled just as it begins or ends (see its pull
        # request 54798). So those about to end may, and those that wait for a place come first.
        for reference in reversed(_left(ray, running, _SETTLE_SECONDS)):
            ray.cancel(reference)
        _left(ray, running, _PATIENCE_SECONDS)  # to clean up
        raise


def _left(ray: Any, references: Iterable[Any], seconds: float) -> list[Any]:
    """Wait for tasks; return those that have not ended by then."""
    left = list(references)
    with contextlib.suppress(Exception):
        _, left = ray.wait(left, num_returns=len(left), timeout=seconds)
    return left


def _require_answer(address: str | None) -> None:
    """Check that a cluster answers; otherwise Ray ends this process with a message of its own."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), _PATIENCE_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers ({error.strerror or error})", address, "see --ray-address"
        ) from error


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise InputError(
            f"a shard's workers died {MOST_RETRIES + 1} times ({type(error).__name__})",
            fix="see Ray's logs for why; run the same command again to resume",
        ) from error
