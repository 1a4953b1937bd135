"""The engine past one machine: shards built by the workers of a Ray cluster.

All nodes must see the raw videos under the same path, and ``--out`` must be an address (s3://…)
or a folder they share. A shard whose node is lost is built again on another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines._build import ShardResult, Tally, build_shard
from pipelines._engine import sigterm_raises
from pipelines._ffmpeg import ffmpeg_binary, ffmpeg_version
from pipelines._plan import ShardPlan
from shards.errors import InputError
from shards.ray_cluster import MOST_RETRIES, connection, require_ray, run_tasks


def ray_engine(address: str | None, *, limited: bool) -> Callable[..., None]:
    """What :func:`pipelines._engine.build_shards` is for one machine, on a cluster.

    Args:
        address: of the cluster; None: ``RAY_ADDRESS``, the one this machine is in, or a new one
            of this machine alone.
        limited: whether ``workers`` is a limit of the user's; else every CPU of the cluster works.

    Raises:
        InputError: Ray is not installed.
    """
    require_ray()
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

    with sigterm_raises(), connection(address):
        threads, most = _division(ray, len(plans), workers if limited else None)
        task = ray.remote(_build_on_node).options(
            num_cpus=threads, max_retries=MOST_RETRIES, retry_exceptions=False
        )

        def on_done(plan: ShardPlan, result: ShardResult) -> None:
            on_shard(plan, result)
            on_progress(_tally(plan, result))

        run_tasks(plans, lambda plan: task.remote(plan, threads), most, on_done)


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


def _tally(plan: ShardPlan, result: ShardResult) -> Tally:
    return Tally(
        videos=len(plan.videos),
        frames=result.info.frames,
        bytes=result.info.bytes,
        failures=len(result.exclusions),
    )
