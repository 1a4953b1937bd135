"""``extract-features`` on a Ray cluster: a task a shard, with the bits of the local engine.

Nodes see the shards under the same address. The weights come from the driver, and what is computed
goes back to it: checkpoint and ``--out`` are its own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from seco.checkpoints.weights import Backbone, BackboneGuard
from seco.config import ExtractConfig
from seco.features.extract import shard_features
from seco.features.plan import Extraction, ShardFeatures, feature_extractor, part_digests, tell
from seco.processes.device import loader_workers, resolve_device
from shards.errors import InputError
from shards.opening import open_shards
from shards.progress import progress
from shards.ray_cluster import MOST_RETRIES, connection, node_options, require_ray, run_tasks
from shards.signals import StopRequest, StopWaiting
from shards.storage import is_remote
from shards.untrusted import real_path

_AHEAD = 2  # tasks submitted per task that can run


def extract_on_cluster(config: ExtractConfig) -> Path:
    """Extract on a cluster, on its GPUs if it has any; returns the feature folder.

    Raises:
        InputError: as for :func:`seco.features.extract.extract_features`, or no cluster answers.
        TooManyExcluded: all is written, but more than ``max_failures`` percent is missing.
        Stopped: a signal came; all finished shards are kept.
    """
    require_ray()
    with connection(config.ray_address), StopRequest() as stop:
        import ray

        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        device = _device(config, resources)
        extraction = Extraction(config, device)
        if extraction.done():
            extraction.parts.remove_all()
            tell(f"these features are in {extraction.out} already")
            return extraction.out
        finished = extraction.finished()
        extraction.tell_of_parts(finished)
        todo = [shard for shard, there in enumerate(finished) if not there]
        settings = extraction.config
        if device.type == "cuda":
            cores = int(resources.get("CPU", 1) // resources["GPU"])
            workers = loader_workers(settings.workers, device, cores)
            settings = dataclasses.replace(settings, workers=workers)
            needs, at_once = {"num_gpus": 1, "num_cpus": 1 + workers}, resources["GPU"]
        else:
            # One thread computes and decodes: the parallelism is across shards.
            needs, at_once = {"num_cpus": 1}, resources.get("CPU", 1)
            settings = dataclasses.replace(settings, workers=0)
        task = ray.remote(_extract_on_node).options(
            **needs, max_retries=MOST_RETRIES, retry_exceptions=False, **node_options()
        )
        backbone = ray.put(extraction.backbone)

        def start(shard: int) -> Any:
            address, digest = extraction.shards.addresses[shard], extraction.digests[shard]
            if not is_remote(address):
                address = str(real_path(address))
            return task.remote(backbone, settings, address, digest, device.type)

        def stop_at_signal() -> None:
            if stop:
                raise StopWaiting

        videos = int(extraction.shards.counts[todo].sum())
        try:
            with progress("Extracting", videos, "videos") as shown:

                def on_done(shard: int, part: ShardFeatures) -> None:
                    extraction.keep(shard, part)
                    shown.advance(int(extraction.shards.counts[shard]))

                most = max(1, int(at_once)) * _AHEAD
                run_tasks(todo, start, most, on_done, stop_at_signal)
            extraction.write(stop_at_signal)
        except StopWaiting:
            raise extraction.stopped(str(stop.signal_name)) from None
    return extraction.out


def _device(config: ExtractConfig, resources: dict[str, float]) -> torch.device:
    gpus = int(resources.get("GPU", 0))
    name = config.device
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"{name!r} cannot be used on a cluster", "--device", "give cpu or cuda")
    if name == "cuda" and not gpus:
        raise InputError("the cluster has no GPU", "--device", "leave it out or give cpu")
    return torch.device(name)


def _extract_on_node(
    backbone: Backbone, config: ExtractConfig, address: str, digest: str, device: str
) -> ShardFeatures:
    """Compute one shard. ``digest`` is that of its partial result, according to the driver."""
    shards = open_shards([address])
    if part_digests(config, backbone, device, shards.indexes) != [digest]:
        raise InputError(
            "differs on this node from the driver's copy, or this node's toolkit or torch does",
            address,
            "put the shards where all nodes see them, and install the same versions everywhere",
        )
    guard = BackboneGuard(backbone)
    here = resolve_device(device)  # Ray shows the task only its own GPU
    with feature_extractor(backbone, here, config) as forwards, StopRequest() as stop:
        ((_, part),) = shard_features(shards, [0], forwards, config, stop)
    guard.require_unchanged()
    return part
