"""Testing a fine-tuned network: ``seco finetune-eval``, and the end of ``seco finetune``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seco.checkpoints.weights import load_finetuned
from seco.finetune.config import PROTOCOL, FinetuneTestConfig, require_test_ranges
from seco.finetune.labelled_videos import LabelledVideos
from seco.finetune.result import RESULT, FinetuneResult, finetune_result
from seco.finetune.video_classifier import Classes, VideoClassifier
from seco.finetune.video_scores import ClipProtocol, VideoScores
from seco.processes.device import loader_workers, resolve_device, uses_bf16
from seco.processes.ranks import Ranks, joined, one_voice
from seco.processes.stopping import StopRequest
from shards.atomic import require_writable
from shards.errors import InputError, PeerLost, Stopped, TooManyExcluded
from shards.progress import progress

# What a result says of the training before it.
_TRAINING = (
    *("segments", "epochs", "batch_size", "lr", "lr_decay_epochs", "momentum", "weight_decay"),
    *("clip_norm", "dropout", "freeze_bn", "bn_group", "crop_size", "min_crop_area", "seed"),
)


@dataclass(frozen=True)
class FineTuned:
    """A classifier, what it tells apart, and what it was trained from and on."""

    model: VideoClassifier
    classes: Classes
    encoder: dict[str, Any]  # the pre-trained one
    dataset: str
    settings: Mapping[str, Any]  # of its run
    epochs: float | None  # reached; None where nobody wrote them down


def finetune_eval(config: FinetuneTestConfig) -> str:
    """Test a fine-tuned checkpoint on its split's test videos.

    Returns:
        What to show the user; nothing on all ranks but the first.

    Raises:
        InputError: the checkpoint or the shards cannot be used, or do not go together.
        TooManyExcluded: all is written, but more than ``max_failures`` percent could not be read.
        Stopped: a signal came.
    """
    device = resolve_device(config.device)
    with joined(device) as ranks:
        with one_voice():
            require_test_ranges(config)
            path = Path(config.checkpoint)
            model, classes, said, settings = load_finetuned(path)
            config = _as_its_run(config, settings)
            videos = LabelledVideos(config.shards, settings.get("split"))
            videos.require("test")
            _require_same_classes(videos, classes, path)
            out = Path(config.out or path.parent)
            _require_other_protocols_elsewhere(config, out)
            if ranks.first:
                require_writable(out)
        fine_tuned = FineTuned(
            model.to(device), classes, said["encoder"], said["dataset"], settings, said["epochs"]
        )
        return written(tested(fine_tuned, videos, config, device, ranks), config, out, ranks)


def tested(
    fine_tuned: FineTuned,
    videos: LabelledVideos,
    config: FinetuneTestConfig,
    device: torch.device,
    ranks: Ranks,
) -> FinetuneResult:
    """Score the test videos by the test protocol.

    Raises:
        Stopped: a signal came.
        InputError: no test video could be read.
    """
    protocol = _protocol(config)
    scorer = scorer_of(videos, protocol, config, device, ranks)
    mine = len(videos.test[ranks.rank :: ranks.size])
    with StopRequest() as stop, progress("Testing", mine, "videos", quiet=not ranks.first) as shown:

        def done() -> None:
            if stop:
                said = (
                    f"{stop.signal_name}: stopped while testing; `seco finetune-eval` tests again"
                )
                raise Stopped(said if ranks.first else "")
            shown.advance()

        scores = scorer.of(fine_tuned.model, videos.test, done)
    said = dataclasses.asdict(protocol)
    del said["middles"]
    said["precision"] = "bf16" if uses_bf16(config.precision, device) else "fp32"
    said["training"] = {name: fine_tuned.settings.get(name) for name in _TRAINING} | {
        "epochs": fine_tuned.epochs,
        "epochs_planned": fine_tuned.settings.get("epochs"),
    }
    return finetune_result(
        videos, fine_tuned.classes, scores, said, fine_tuned.encoder, fine_tuned.dataset
    )


def scorer_of(
    videos: LabelledVideos,
    protocol: ClipProtocol,
    config: FinetuneTestConfig,
    device: torch.device,
    ranks: Ranks,
) -> VideoScores:
    """Scores videos by a protocol, as the settings say."""
    return VideoScores(
        videos,
        protocol,
        device,
        ranks,
        bf16=uses_bf16(config.precision, device),
        workers=loader_workers(config.workers, device),
        frames_a_forward=config.test_frames,
    )


def written(result: FinetuneResult, config: FinetuneTestConfig, out: Path, ranks: Ranks) -> str:
    """Write a result, on the first rank; returns what to show the user, there.

    Raises:
        TooManyExcluded: all is written, but more than ``max_failures`` percent could not be read.
        PeerLost: the same, on the other ranks.
    """
    shown = f"{result.table()}\n{result.write(out)}" if ranks.first else ""
    wanted = result.n_test + result.unreadable
    if result.unreadable * 100 <= config.max_failures * wanted:
        return shown
    if not ranks.first:
        raise PeerLost
    print(shown)
    raise TooManyExcluded(
        f"{result.unreadable} of {wanted} test videos could not be read, more than "
        f"--max-failures {config.max_failures:g}",
        out,
        "prepare or copy the shards again",
    )


def _as_its_run(config: FinetuneTestConfig, settings: Mapping[str, Any]) -> FinetuneTestConfig:
    """With the run's test protocol where nothing else is said."""
    of_run: dict[str, Any] = {
        name: settings.get(name) for name in PROTOCOL if getattr(config, name) is None
    }
    if not all(isinstance(value, int) for value in of_run.values()):
        raise InputError("is a damaged checkpoint of `seco finetune`", config.checkpoint)
    resolved = dataclasses.replace(config, **of_run)
    require_test_ranges(resolved)
    return resolved


def _protocol(config: FinetuneTestConfig) -> ClipProtocol:
    clips, frames, crops, size = (getattr(config, name) for name in PROTOCOL)
    return ClipProtocol(clips, frames, crops, size)


def _require_other_protocols_elsewhere(config: FinetuneTestConfig, out: Path) -> None:
    """A result by another test protocol is not replaced unless its folder is named."""
    if config.out is not None:
        return
    there: Any = None
    with suppress(OSError, ValueError):  # no result, or none that anybody can read
        there = json.loads((out / RESULT).read_text(encoding="utf-8"))
    there = there.get("protocol") if isinstance(there, dict) else None
    for name, here in dataclasses.asdict(_protocol(config)).items():
        if isinstance(there, dict) and there.get(name, here) != here:
            raise InputError(
                f"is of another test protocol ({name} {there[name]}, not {here})",
                out / RESULT,
                "give --out",
            )


def _require_same_classes(videos: LabelledVideos, classes: Classes, path: Path) -> None:
    for label, name in zip(classes.labels, classes.names, strict=True):
        here = videos.class_name(label)
        if here != name:
            raise InputError(
                f"label {label} is {here!r} here and {name!r} in {path}",
                videos.folder,
                "give the shards it was trained on",
            )
