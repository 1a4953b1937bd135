"""One step of fine-tuning, on one rank or many."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from seco.finetune.clip_loader import ClipBatch
from seco.finetune.config import FinetuneConfig
from seco.finetune.labelled_videos import LabelledVideos
from seco.finetune.video_classifier import VideoClassifier
from seco.processes.device import to_device, uses_bf16
from seco.processes.distributed import distributed, synchronised
from seco.processes.ranks import Ranks
from seco.views.augment import apply_views
from seco.views.view_parameters import ViewConfig
from shards.draws import sample_starts, uniforms


class FinetuneStep:
    """Runs steps of a classifier.

    Args:
        model: on the device, in training mode.
        labels: (K,) the labels of its rows, in increasing order.
        config: resolved settings.
        views: how views are drawn.
        videos: the set.
        ranks: the processes of the run.
        device: this rank's.
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
            batch: of n clips.
            epoch: the dropout depends on it.
            lr: the learning rate.

        Returns:
            (3,) loss and share of right answers of this rank's rows, norm of the global gradient.
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
        """(n, C) what the dropout is drawn from, a function of (seed, epoch, video)."""
        keys = [self._videos.shards.key(video) for video in videos.tolist()]
        starts = sample_starts(self._config.seed, epoch, keys, "dropout")
        return uniforms(starts, self._model.classifier.in_features).astype(np.float32)

    def _on_device(self, values: NDArray[np.generic]) -> Tensor:
        return to_device(torch.from_numpy(values), self._device)
