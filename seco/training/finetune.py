"""``seco finetune``: train encoder and classifier on labelled videos, then test (paper §5.2)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from seco.checkpoints.weights import RANDOM, BackboneChanged, about, load_backbone, load_finetuned
from seco.config import FinetuneConfig, resolve_finetune
from seco.data.clips import ClipBatch, ClipStream, LabelledVideos, clip_batches
from seco.data.transforms import ViewConfig, apply_views, view_config
from seco.evaluation.video_test import (
    ClipProtocol,
    FineTuned,
    FinetuneResult,
    scorer_of,
    tested,
    written,
)
from seco.models.backbones import require_size
from seco.models.classifier import Classes, VideoClassifier
from seco.processes.device import loader_workers, resolve_device, to_device, uses_bf16
from seco.processes.ranks import Ranks, distributed, joined, one_voice, synchronised
from seco.schedule import step_decay
from seco.training.loop import TrainingRun
from seco.training.state import RunState, checkpoint_to_resume, resumed_settings
from shards.atomic import require_writable
from shards.errors import InputError
from shards.sampling import sample_starts, uniforms
from shards.settings import as_settings


class FinetuneStep:
    """Runs training steps of a classifier.

    Args:
        model: on the device, in training mode.
        labels: (K,) labels of the classifier's rows, ascending.
        config: resolved settings.
        views: how to draw views.
        videos: the dataset.
        ranks: the process group.
        device: this rank's device.
    """

    def __init__(
        self,
        model: VideoClassifier,
        labels: list[int],
        config: FinetuneConfig,
        views: ViewConfig,
        videos: LabelledVideos,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self._model = model
        self._labels = np.array(labels)
        self._config = config
        self._view_config = views
        self._videos = videos
        self._ranks = ranks
        self._device = device
        self._bf16 = uses_bf16(config.precision, device)
        self.optimizer = torch.optim.SGD(
            model.trained_parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=True,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._trained = distributed(model, ranks, device)

    def run(self, batch: ClipBatch, epoch: int, lr: float) -> Tensor:
        """Train on this rank's part of a batch.

        Args:
            batch: n clips.
            epoch: seeds the dropout.
            lr: the learning rate.

        Returns:
            (3,) loss and accuracy of this rank's rows, norm of the global gradient.
        """
        config, n = self._config, len(batch.videos)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        parts = config.accumulate or 1
        size = n // parts
        sums = torch.zeros(2, device=self._device)
        for begin in range(0, n, size):
            rows = slice(begin, begin + size)
            videos = batch.videos[rows]
            targets = self._on_device(np.searchsorted(self._labels, self._videos.labels[videos]))
            images = self._views(batch, rows)
            dropout = self._on_device(self._dropout(videos, epoch))
            with synchronised(self._trained, last=rows.stop == n):
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                    scores = self._trained(images, dropout, config.bn_group, first=begin == 0)
                loss = F.cross_entropy(scores, targets)
                with self._ranks.watched():
                    (loss / parts).backward()
            right = (scores.argmax(1) == targets).float().mean()
            sums += torch.stack([loss.detach(), right]) / parts
        norm = torch.nn.utils.clip_grad_norm_(self._model.trained_parameters(), config.clip_norm)
        self.optimizer.step()
        return torch.cat([sums, norm.view(1)])

    def _views(self, batch: ClipBatch, rows: slice) -> Tensor:
        """(n, T, 3, S, S) float32 views of these rows, on the device."""
        crops = batch.images[rows]
        frames = crops.shape[1]
        numbers = np.arange(rows.start * frames, rows.stop * frames)
        flat = to_device(crops.flatten(0, 1), self._device)
        return apply_views(flat, batch.views.select(numbers), self._view_config).view(crops.shape)

    def _dropout(self, videos: NDArray[np.int64], epoch: int) -> NDArray[np.float32]:
        """(n, C) uniform values for the dropout, a function of (seed, epoch, video)."""
        keys = [self._videos.shards.key(video) for video in videos.tolist()]
        starts = sample_starts(self._config.seed, epoch, keys, "dropout")
        return uniforms(starts, self._model.classifier.in_features).astype(np.float32)

    def _on_device(self, values: NDArray[np.generic]) -> Tensor:
        return to_device(torch.from_numpy(values), self._device)


def finetune(config: FinetuneConfig) -> str:
    """Run or resume fine-tuning on all ranks, then test.

    Returns:
        Text for the user; empty on all ranks but the first.

    Raises:
        InputError: settings, shards, checkpoint or output folder cannot be used; the loss is not
            finite; too many videos cannot be read.
        TooManyExcluded: everything is written, but too many test videos could not be read.
        Stopped: a signal arrived; everything is saved.
        PeerLost: another process ended and has reported why.
    """
    device = resolve_device(config.device)
    with joined(device) as ranks:
        with one_voice():
            resolved = resolve_finetune(_adopted(config), ranks.size)
            run = Finetuning(resolved, ranks, device)
        run.run()
        if config.skip_test:
            return str(run.state.last) if ranks.first else ""
        return written(run.test(), run.config, run.out, ranks)


def _adopted(config: FinetuneConfig) -> FinetuneConfig:
    """Take the BatchNorm group of the run being resumed, unless it is given."""
    if config.bn_group is not None:
        return config
    group = resumed_settings(config.out, config.resume).get("bn_group")
    return dataclasses.replace(config, bn_group=group)


class Finetuning(TrainingRun[ClipBatch, Tensor]):
    """One process of a fine-tuning run.

    Args:
        config: resolved settings.
        ranks: the process group.
        device: this rank's device.
    """

    command, title = "finetune", "Fine-tuning"

    def __init__(self, config: FinetuneConfig, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        if config.out and ranks.first:
            require_writable(Path(config.out))  # before anything slow
        self.videos = videos = LabelledVideos(config.shards, config.split)
        videos.require("train")
        videos.require("test")
        if config.dataset not in (None, videos.dataset):
            raise InputError(f"holds {videos.dataset}, not {config.dataset}", videos.folder)
        self.out = Path(config.out or f"runs/{videos.dataset}-finetune-{videos.split}")
        if ranks.first:
            require_writable(self.out)
        checkpoint = checkpoint_to_resume(self.out, config.resume)
        torch.manual_seed(config.seed)
        self.fine_tuned = self._model(config, checkpoint)
        arch = self.fine_tuned.encoder["arch"]
        require_size(arch, config.crop_size)
        require_size(arch, config.test_size, "--test-size")
        self.model = model = self.fine_tuned.model.to(device)
        self.config = config = dataclasses.replace(config, out=str(self.out), arch=arch)
        self.views = view_config(config)
        self.stream = ClipStream(
            videos.shards,
            videos.train,
            config.batch_size,
            config.segments,
            config.crop_size,
            self.views,
            config.seed,
            ranks.rank,
            ranks.size,
        )
        self.steps_per_epoch = self.stream.steps_per_epoch
        self.images_per_step = config.batch_size * config.segments
        self.step = FinetuneStep(
            model, self.fine_tuned.classes.labels, config, self.views, videos, ranks, device
        )
        self._frozen = model.frozen_sha256()
        self.state = RunState(
            self.out,
            config,
            model,
            self.step.optimizer,
            videos.digest(),
            writes=ranks.first,
            about={
                **about(
                    self.fine_tuned.classes,
                    dataset=videos.dataset,
                    encoder=self.fine_tuned.encoder,
                    frozen_sha256=self._frozen,
                ),
                "steps_per_epoch": self.steps_per_epoch,
            },
        )
        if checkpoint is not None:
            self.state.restore(checkpoint)
            self._say(f"resuming from step {self.state.step} of {self.total_steps} ({checkpoint})")
        self._require_agreement()  # no rank writes before all have looked for a run

    def _model(self, config: FinetuneConfig, checkpoint: Path | None) -> FineTuned:
        """The classifier: new, on the pre-trained backbone, or that of the run being resumed."""
        if checkpoint is not None:
            model, classes, said, _ = load_finetuned(checkpoint)
            if model.frozen_sha256() != said.get("frozen_sha256"):
                raise InputError("has frozen BatchNorm layers that have changed", checkpoint)
            model.dropout = config.dropout
            return self._fine_tuned(config, model, classes, said["encoder"])
        backbone = load_backbone(config.checkpoint, config.arch, config.seed)
        labels = np.unique(self.videos.labels[self.videos.train]).tolist()
        classes = Classes(labels, [self.videos.class_name(label) for label in labels])
        model = VideoClassifier(backbone.arch, len(labels), config.freeze_bn, config.dropout)
        model.backbone.load_state_dict(backbone.network.state_dict(), strict=True)
        encoder = backbone.record(config.seed)
        if backbone.source == RANDOM and model.frozen:
            self._say("random weights with frozen BatchNorm hardly learn: use --freeze-bn none")
        return self._fine_tuned(config, model, classes, encoder)

    def _fine_tuned(
        self,
        config: FinetuneConfig,
        model: VideoClassifier,
        classes: Classes,
        encoder: dict[str, Any],
    ) -> FineTuned:
        """The record to test, as after all epochs."""
        settings = as_settings(config)
        return FineTuned(model, classes, encoder, self.videos.dataset, settings, config.epochs)

    def test(self) -> FinetuneResult:
        """Run the test protocol on the current weights."""
        return tested(self.fine_tuned, self.videos, self.config, self.device, self.ranks)

    def _batches(
        self, first: int, last: int
    ) -> contextlib.closing[Generator[ClipBatch, None, None]]:
        workers = loader_workers(self.config.workers, self.device)
        return contextlib.closing(clip_batches(self.stream, first, last, workers))

    def _train_step(self, batch: ClipBatch, lr: float) -> Tensor:
        return self.step.run(batch, self.state.step // self.steps_per_epoch, lr)

    def _learning_rate(self) -> float:
        return step_decay(
            self.state.step,
            base_lr=self.config.lr,
            decay_epochs=self.config.decay_epochs(),
            steps_per_epoch=self.steps_per_epoch,
        )

    def _figures(self, result: Tensor) -> dict[str, float]:
        loss, right, norm = self.ranks.mean(result).tolist()
        return {"loss": loss, "acc": right, "grad_norm": norm}

    def _evaluates(self, epoch: int, last: bool) -> bool:
        return last or epoch % self.config.validate_every_epochs == 0

    def _evaluate(self) -> dict[str, float]:
        """Compute ``val_top1`` and ``val_loss``: one clip of segment middles, centre crop."""
        self._require_unchanged()
        protocol = ClipProtocol(1, self.config.segments, 1, self.config.test_size, middles=True)
        scorer = scorer_of(self.videos, protocol, self.config, self.device, self.ranks)
        scores = scorer.of(self.model, self.videos.test)
        labels = self.videos.labels[self.videos.test]
        rows = np.searchsorted(self.fine_tuned.classes.labels, labels)
        rows = rows.clip(max=len(self.fine_tuned.classes.labels) - 1)
        taught = np.array(self.fine_tuned.classes.labels)[rows] == labels
        counted = taught & np.isfinite(scores).all(axis=1)
        if not counted.any():
            return {}
        chosen, targets = torch.from_numpy(scores[counted]), torch.from_numpy(rows[counted])
        right = float((chosen.argmax(1) == targets).double().mean())
        return {"val_top1": right, "val_loss": float(F.cross_entropy(chosen, targets))}

    def _require_unchanged(self) -> None:
        if self.model.frozen_sha256() != self._frozen:
            raise self._rank_zero_error(
                BackboneChanged(
                    "a frozen BatchNorm layer has changed", self.out, "please report this"
                )
            )

    def _status(self, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> str:
        validated = f", validation {metrics['val_top1']:.1%}" if "val_top1" in metrics else ""
        return (
            f"loss {metrics['loss']:.3f}, accuracy {metrics['acc']:.0%}{validated}, "
            f"{speed['images_per_s']:.0f} images/s, {speed['data_wait']:.0%} waiting for data"
        )
