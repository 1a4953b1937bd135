"""``seco bench track``: tracking and its training beside their bare cost and the plain way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import in_turns, machine
from benchmarks.track_reference import PlainStep, PlainTracker, bare_tracking, bare_training
from seco.checkpoints.weights import random_backbone
from seco.config import EXEMPLAR_PX, TRAIN_SEARCH_PX, TrackerConfig, TrackTrainConfig
from seco.data.crops import Pixels
from seco.data.pairs import PairLoader
from seco.evaluation.otb import frames_ahead
from seco.evaluation.tracker import Tracker
from seco.models.siamfc import SiamFC
from seco.processes.device import resolve_device, wall_milliseconds
from seco.processes.ranks import Ranks
from seco.training.track import PairStep
from shards.dataset import ShardSet
from shards.errors import InputError
from shards.opening import open_shards
from shards.pairs import PairStream, boxes_of
from shards.progress import progress

_FRAME = (480, 640)  # height and width of what is tracked through
_BOX = (280.0, 200.0, 80.0, 90.0)
_WARM_UP = 2


@dataclass
class TrackBench:
    """Median milliseconds and what follows from them.

    By wall clock on a GPU. On the CPU it is processor time, which others on the machine change
    least; the loader then works within the process, so that its time counts.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    tracking: dict[str, float] = field(default_factory=dict)
    tracking_ratios: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    training_ratios: dict[str, float] = field(default_factory=dict)
    fps: dict[str, float] = field(default_factory=dict)
    pairs_s: dict[str, float] = field(default_factory=dict)


def bench_track(
    arch: str,
    feature_layer: str,
    *,
    shards: tuple[str, ...] = (),
    batch_size: int = 8,
    workers: int = 2,
    device: str = "auto",
    repeats: int = 5,
) -> TrackBench:
    """Measure on random weights and synthetic frames; with ``shards`` also fed from them.

    Args:
        arch: of the backbone.
        feature_layer: of its features.
        shards: of a tracking set.
        batch_size: pairs of a training step.
        workers: loader processes of the step that is fed from shards, on a GPU.
        device: where it computes.
        repeats: measurements of each figure.

    Raises:
        InputError: settings or shards cannot be used.
    """
    if min(repeats, batch_size) < 1 or workers < 0:
        raise InputError("must be 1 or more", "--repeats, --batch-size")
    where = resolve_device(device)
    found = TrackBench(machine("torch", "torchvision"), {"arch": arch, "layer": feature_layer})
    found.settings |= {"pairs": batch_size, "device": where.type}
    if where.type == "cuda":
        found.machine["gpu"] = torch.cuda.get_device_name(where)
    else:
        found.settings["threads"] = torch.get_num_threads()
    config = TrackTrainConfig(
        feature_layer=feature_layer,
        batch_size=batch_size,
        workers=workers if where.type == "cuda" else 0,
        precision="fp32",
    )
    torch.manual_seed(0)
    model = SiamFC(random_backbone(arch, 0), config).to(where)
    opened = open_shards(shards) if shards else None
    _tracking(found, model, where, repeats, opened)
    _training(found, model, config, where, repeats, opened)
    return found


def _tracking(
    found: TrackBench, model: SiamFC, device: torch.device, repeats: int, shards: ShardSet | None
) -> None:
    rng = np.random.default_rng(0)
    frame: Pixels = rng.integers(0, 256, (*_FRAME, 3), dtype=np.uint8)
    config = TrackerConfig()
    ours, plain = Tracker(model, config, device), PlainTracker(model, config, device)
    ours.init(frame, _BOX)
    plain.init(frame, _BOX)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.update(frame),
        "bare cost": bare_tracking(model, device, config.scales),
        "plain": lambda: plain.update(frame),
    }
    if shards is not None:
        fed = Tracker(model, config, device)
        frames = _frames_for_ever(shards, fed)
        ways["ours, fed from shards"] = lambda: fed.update(next(frames))
    found.tracking = _measured(ways, repeats, device, "tracking")
    ms = found.tracking
    found.tracking_ratios = {
        "frames a second of ours, of the bare cost's": ms["bare cost"] / ms["ours"],
        "ours, times plain": ms["plain"] / ms["ours"],
    }
    if shards is not None:
        ratio = ms["bare cost"] / ms["ours, fed from shards"]
        found.tracking_ratios["the same, decoding included"] = ratio
    found.fps = {name: 1e3 / value for name, value in ms.items()}


def _frames_for_ever(shards: ShardSet, tracker: Tracker) -> Iterator[Pixels]:
    """Frames of the sequences in turn, the tracker being started on each's first."""
    for video in cycle(range(len(shards))):
        frames = frames_ahead(shards, video)
        first = next(frames)
        if isinstance(first, str):
            raise InputError(first, shards.shard_of(video))
        tracker.init(first, boxes_of(shards.record(video))[0])
        yield from (frame for frame in frames if not isinstance(frame, str))


def _training(
    found: TrackBench,
    model: SiamFC,
    config: TrackTrainConfig,
    device: torch.device,
    repeats: int,
    shards: ShardSet | None,
) -> None:
    n = config.batch_size
    exemplars = torch.randint(256, (n, 3, EXEMPLAR_PX, EXEMPLAR_PX), dtype=torch.uint8)
    searches = torch.randint(256, (n, 3, TRAIN_SEARCH_PX, TRAIN_SEARCH_PX), dtype=torch.uint8)
    step = PairStep(model, config, Ranks(), device)
    # As a run does: saturated responses have gradients too small for quick arithmetic.
    mean, square = step.moments(exemplars, searches)
    model.head.measure(mean.float(), (square - mean**2).clamp(min=0).sqrt().float())
    plain = PlainStep(model, device, config.response_scale)
    rate = 1e-9  # the weights stay as they are
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: step.run(exemplars, searches, rate),
        "bare cost": bare_training(model, device, n),
        "plain": lambda: plain(exemplars, searches),
    }
    batches = None
    if shards is not None:
        stream = PairStream(shards, n, 0, config.max_gap)
        batches = iter(
            PairLoader(stream, config, workers=config.workers or 0, first_step=0, last_step=10**9)
        )

        def fed() -> None:
            assert batches is not None
            batch = next(batches)
            step.run(batch.exemplars, batch.searches, rate)

        ways["ours, fed from shards"] = fed
    try:
        found.training = _measured(ways, repeats, device, "training")
    finally:
        if batches is not None:
            batches.close()
    ms = found.training
    found.training_ratios = {
        "bare cost, of ours": ms["bare cost"] / ms["ours"],
        "ours, times plain": ms["plain"] / ms["ours"],
    }
    if shards is not None:
        ratio = ms["bare cost"] / ms["ours, fed from shards"]
        found.training_ratios["the same, fed from shards"] = ratio
    found.pairs_s = {name: 1e3 * n / value for name, value in ms.items()}


def _measured(
    ways: dict[str, Callable[[], object]], repeats: int, device: torch.device, what: str
) -> dict[str, float]:
    for work in ways.values():
        for _ in range(_WARM_UP):
            work()
    with progress(f"bench track, {what}", repeats, "repeats") as shown:
        return in_turns(ways, repeats, lambda work: wall_milliseconds(work, device), shown.advance)
