"""The engine past one machine: shards built by the workers of a Ray cluster.

All nodes must see the raw videos under the same path, and ``--out`` must be an address (s3://…)
or a folder they share. A shard whose node is lost is built again on another.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines._build import ShardResult, Tally, build_shard
from pipelines._engine import sigterm_raises
from pipelines._ffmpeg import ffmpeg_binary, ffmpeg_version
from pipelines._plan import ShardPlan
from shards.errors import InputError

_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 10.0
_MOST_RETRIES = 5  # of one shard, when its worker or node dies


def ray_engine(address: str | None, *, limited: bool) -> Callable[..., None]:
    """What :func:`pipelines._engine.build_shards` is for one machine, on a cluster.

    Args:
        address: of the cluster; None: ``RAY_ADDRESS``, the one this machine is in, or a new one
            of this machine alone.
        limited: whether ``workers`` is a limit of the user's; else every CPU of the cluster works.

    Raises:
        InputError: Ray is not installed.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise InputError(
            "Ray is not installed", "--engine ray", 'pip install "seco-video[ray]"'
        ) from error
    return functools.partial(_build_shards, address=address, limited=limited)


def _build_shards(
    plans: Sequence[ShardPlan],
    workers: int,
    on_shard: Callable[[ShardPlan, ShardResult], None],
    on_progress: Callable[[Tally], None],
    *,
    address: str | None,
    limited: bool,
) -> None:
    import ray

    with sigterm_raises(), _connection(address):
        threads, most = _division(ray, len(plans), workers if limited else None)
        task = ray.remote(_build_on_node).options(
            num_cpus=threads, max_retries=_MOST_RETRIES, retry_exceptions=False
        )
        queue = iter(plans)
        running: dict[Any, ShardPlan] = {}
        try:
            while True:
                for plan in itertools.islice(queue, most - len(running)):
                    running[task.remote(plan, threads)] = plan
                if not running:
                    break
                done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
                for reference in done:
                    result = _result(ray, reference)
                    plan = running.pop(reference)
                    on_shard(plan, result)
                    on_progress(_tally(plan, result))
        except BaseException:
            for reference in running:
                ray.cancel(reference)
            # They put away what they have begun.
            with contextlib.suppress(Exception):
                ray.wait(list(running), num_returns=len(running), timeout=_PATIENCE_SECONDS)
            raise


@contextlib.contextmanager
def _connection(address: str | None) -> Iterator[None]:
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


def _require_answer(address: str | None) -> None:
    """Where nobody answers, Ray would end this process in its own words."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), _PATIENCE_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers ({error.strerror or error})", address, "see --ray-address"
        ) from error


def _division(ray: Any, shards: int, workers: int | None) -> tuple[int, int]:
    """Threads a shard, and shards handed out at once."""
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    wanted = workers or max(1, sum(cpus))
    # Fewer shards than workers: threads share a shard, as many as fit on any node.
    threads = max(1, min(math.ceil(wanted / shards), min(filter(None, cpus), default=1)))
    at_once = max(1, wanted // threads)
    # Twice as many keep every CPU busy, and let a cluster grow; a user's limit is a limit.
    return threads, at_once if workers else 2 * at_once


def _build_on_node(plan: ShardPlan, threads: int) -> ShardResult:
    binary = plan.binary if Path(plan.binary).is_file() else ffmpeg_binary()
    found = ffmpeg_version(binary)
    if found != plan.ffmpeg_version:
        raise InputError(
            f"this node has ffmpeg {found}, the driver {plan.ffmpeg_version}: their frames differ",
            binary,
            "install the same imageio-ffmpeg everywhere",
        )
    return build_shard(replace(plan, binary=binary), threads)


def _result(ray: Any, reference: Any) -> ShardResult:
    try:
        result = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise InputError(
            f"a shard's workers died {_MOST_RETRIES + 1} times ({type(error).__name__})",
            fix="run the same command again to go on; see Ray's logs for why",
        ) from error
    assert isinstance(result, ShardResult)
    return result


def _tally(plan: ShardPlan, result: ShardResult) -> Tally:
    return Tally(
        videos=len(plan.videos),
        frames=result.info.frames,
        bytes=result.info.bytes,
        failures=len(result.exclusions),
    )
