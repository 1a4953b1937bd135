"""``seco track train``: the 1×1 convolution of SiamFC on frozen features (paper §5.2)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from seco.checkpoints.io import load_checkpoint
from seco.checkpoints.weights import Backbone, BackboneGuard, load_backbone
from seco.config import STRIDE, TRAIN_SEARCH_PX, TrackTrainConfig, check_training, response_cells
from seco.data.pairs import PairBatch, PairLoader
from seco.data.transforms import normalise
from seco.models.siamfc import TRACKER, SiamFC
from seco.processes.device import loader_workers, resolve_device, to_device, uses_bf16
from seco.processes.ranks import Ranks, distributed, joined, one_voice
from seco.training.logging import RunLog
from seco.training.loop import TrainingRun, Waiting
from seco.training.state import RunState, checkpoint_to_resume
from shards.atomic import require_writable
from shards.errors import InputError
from shards.opening import CacheSettings, chosen_window, open_shards
from shards.pairs import PairStream, require_boxes
from shards.signals import StopRequest


def response_labels(size: int, radius_px: float) -> Tensor:
    """(size, size) float32: 1 within ``radius_px`` of the centre in city-block distance, else 0.

    Cells are 8 px apart and the target is in the middle, between cells where ``size`` is even.
    """
    away = (torch.arange(size) - (size - 1) / 2).abs()
    return ((away[:, None] + away[None, :]) * STRIDE <= radius_px).float()


def balanced_loss(responses: Tensor, labels: Tensor) -> Tensor:
    """The logistic loss, mean over pairs; positives and negatives have weight one half each.

    Args:
        responses: (N, S, S) logits.
        labels: (S, S) from :func:`response_labels`, with both positives and negatives.
    """
    positives = labels.sum()
    weights = torch.where(labels > 0, 0.5 / positives, 0.5 / (labels.numel() - positives))
    losses = F.binary_cross_entropy_with_logits(
        responses, labels.expand_as(responses), reduction="none"
    )
    return (losses * weights).sum() / len(responses)


_MEASURED_PAIRS = 64  # pairs to compute the features' mean and deviation on


def track_train(config: TrackTrainConfig) -> Path:
    """Train or resume a tracker on all ranks; return the path of its last checkpoint.

    Raises:
        InputError: settings, shards, checkpoint or output folder cannot be used; the loss is not
            finite; too many samples cannot be read; the backbone has changed.
        Stopped: a signal arrived; everything is saved.
        PeerLost: another process ended and has reported why.
    """
    device = resolve_device(config.device)
    with joined(device) as ranks:
        with one_voice():
            check_training(config, ranks.size)
            training = TrackTraining(config, ranks, device)
        return training.run()


class PairStep:
    """Forward, loss, backward and update on one batch of crops.

    Args:
        model: on ``device``, with frozen backbone.
        config: settings of the run.
        ranks: the process group, which averages gradients.
        device: where to compute.
    """

    def __init__(
        self, model: SiamFC, config: TrackTrainConfig, ranks: Ranks, device: torch.device
    ) -> None:
        self._model = model
        self._head = distributed(model.head, ranks, device)
        self._device = device
        self._bf16 = uses_bf16(config.precision, device)
        labels = response_labels(response_cells(TRAIN_SEARCH_PX), config.positive_radius)
        self._labels = labels.to(device)
        self.optimizer = torch.optim.SGD(
            model.trained_parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def run(self, exemplars: Tensor, searches: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Train on this rank's (n, 3, 127, 127) and (n, 3, 239, 239) uint8 crops.

        Returns:
            Their loss, and the fraction whose response peaks at the target, on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self._precision():
            responses = self._head(self.features(exemplars), self.features(searches))
        loss = balanced_loss(responses, self._labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            highest = responses.flatten(1).argmax(1)
            found = self._labels.flatten()[highest].mean()
        return loss.detach(), found

    def responses(self, exemplars: Tensor, searches: Tensor) -> Tensor:
        """(n, S, S) logits, without gradients."""
        with torch.no_grad(), self._precision():
            responses: Tensor = self._model.head(self.features(exemplars), self.features(searches))
        return responses

    def features(self, crops: Tensor) -> Tensor:
        """(n, C, S / 8, S / 8) features on the device, of (n, 3, S, S) uint8 crops on the host."""
        features: Tensor = self._model.backbone(normalise(to_device(crops, self._device)))
        return features

    def moments(self, exemplars: Tensor, searches: Tensor) -> Tensor:
        """(2, C) float64 means of the features and of their squares, over images and cells.

        Both kinds of crops have weight one half, since a channel may be silent in one of them.
        """
        moments = []
        for crops in (exemplars, searches):
            with self._precision():
                features = self.features(crops).double()
            moments.append(torch.stack([features, features.square()]).mean((1, 3, 4)))
        return torch.stack(moments).mean(0)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)


class TrackTraining(TrainingRun[PairBatch, Tensor]):
    """One process of a tracker training run."""

    command, title, replaced_by = "track train", "Training the tracker", "sequence"

    def __init__(self, config: TrackTrainConfig, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        if config.out and ranks.first:
            require_writable(Path(config.out))  # before anything slow
        cache = CacheSettings(config.cache_dir, config.cache_gb) if config.cache_dir else None
        shards = open_shards(config.shards, cache)
        require_boxes(shards)
        window = chosen_window(shards, cache, config.window_shards)
        self.stream = PairStream(
            shards,
            config.batch_size,
            config.seed,
            config.max_gap,
            rank=ranks.rank,
            world_size=ranks.size,
            window_shards=window,
        )
        self.out = Path(config.out or f"runs/track-{self.stream.name}")
        if ranks.first:
            require_writable(self.out)
        checkpoint = checkpoint_to_resume(self.out, config.resume)
        self.backbone = load_backbone(config.checkpoint, config.arch, config.seed)
        self.config = config = dataclasses.replace(
            config, out=str(self.out), window_shards=window, arch=self.backbone.arch
        )
        if self.stream.left_out:
            self._say(f"{self.stream.left_out} sequences have fewer than 2 frames and are left out")
        # An epoch of the stream is one pass: one pair per sequence.
        self.steps_per_epoch = config.pairs_per_sequence * self.stream.steps_per_epoch
        self.images_per_step = config.batch_size * 2
        torch.manual_seed(config.seed)
        self._guard = BackboneGuard(
            self.backbone, "while the tracker was trained; its end is not saved"
        )
        self.model = SiamFC(self.backbone.network, config).to(device)
        self.step = PairStep(self.model, config, ranks, device)
        self.state = RunState(
            self.out,
            config,
            self.model,
            self.step.optimizer,
            self.stream.digest(),
            writes=ranks.first,
            about={
                TRACKER: True,
                "encoder": self.backbone.record(config.seed),
                "steps_per_epoch": self.steps_per_epoch,
            },
        )
        if checkpoint is not None:
            _require_backbone(checkpoint, self.backbone)
            self.state.restore(checkpoint)
            self._say(f"resuming from step {self.state.step} of {self.total_steps} ({checkpoint})")
        self._said: set[str] = set()
        self._require_agreement()  # no rank writes before all have looked for a run

    def _batches(
        self, first: int, last: int
    ) -> contextlib.closing[Generator[PairBatch, None, None]]:
        workers = loader_workers(self.config.workers, self.device)
        loader = PairLoader(
            self.stream, self.config, workers=workers, first_step=first, last_step=last
        )
        return contextlib.closing(iter(loader))

    def _begin(self, log: RunLog | None, stop: StopRequest) -> None:
        """Initialise a new run's head from its first pairs.

        Sets mean and deviation of the feature channels, and the bias that makes the mean response
        zero; otherwise the first hundreds of steps would do nothing but find that bias.
        """
        if self.state.step:
            return
        batches = min(math.ceil(_MEASURED_PAIRS / self.config.batch_size), self.total_steps)
        measured: list[PairBatch] = []
        moments = []
        with self._batches(0, batches) as pairs:
            waiting = Waiting()
            for _ in range(batches):
                batch = waiting.next(pairs, stop)
                if self._stopping(batch, counted=False) or batch is None:
                    raise self._saved_and_stopped(stop)
                moments.append(self.step.moments(batch.exemplars, batch.searches))
                measured = [batch]
        total = self.ranks.mean(torch.stack(moments).mean(0).flatten()).view(2, -1)
        mean, square = total[0], total[1]
        head = self.model.head
        head.measure(mean.float(), (square - mean**2).clamp(min=0).sqrt().float())
        head.bias.data.zero_()  # a run stopped before its first step is initialised again
        responses = self.step.responses(measured[0].exemplars, measured[0].searches)
        head.bias.data.copy_(-self.ranks.mean(responses.mean().view(1))[0])

    def _train_step(self, batch: PairBatch, lr: float) -> Tensor:
        return torch.stack(self.step.run(batch.exemplars, batch.searches, lr))

    def _told(self, batch: PairBatch | None) -> NDArray[np.float64]:
        """Report unusable samples to the user; the other ranks need nothing."""
        for reason in batch.unusable if batch is not None else ():
            if reason not in self._said:  # it recurs in every epoch
                self._said.add(reason)
                self._tell(f"not usable, replaced by another sequence: {reason}")
        return super()._told(batch)

    def _learning_rate(self) -> float:
        """Geometric decay from ``lr`` towards ``final_lr`` per epoch, as in SiamFC."""
        config = self.config
        epoch = self.state.step // self.steps_per_epoch
        return float(config.lr * (config.final_lr / config.lr) ** (epoch / config.epochs))

    def _figures(self, result: Tensor) -> dict[str, float]:
        loss, found = self.ranks.mean(result).tolist()
        return {"loss": loss, "found": found}

    def _require_unchanged(self) -> None:
        self._guard.require_unchanged()

    def _status(self, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> str:
        return (
            f"loss {metrics['loss']:.3f}, found {metrics['found']:.0%}, "
            f"{speed['images_per_s']:.0f} crops/s, {speed['data_wait']:.0%} waiting for data"
        )


def _require_backbone(checkpoint: Path, backbone: Backbone) -> None:
    """Raise InputError if the run was on another backbone."""
    encoder = load_checkpoint(checkpoint).get("encoder")
    if not isinstance(encoder, dict) or encoder.get("sha256") != backbone.sha256:
        raise InputError(
            "was trained on another backbone", checkpoint, "resume with the run's own --checkpoint"
        )
