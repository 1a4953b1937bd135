"""A kNN on labelled shards every few epochs: does the backbone learn what classes share?"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from seco.config import PretrainConfig
from seco.model.method import SeCo
from seco.probe.knn import knn_scores
from seco.processes.ranks import Ranks
from seco.views.augment import normalise
from seco.views.video_frames import VideoFrames
from shards.errors import InputError
from shards.opening import open_shards

_FRAMES = 5  # of each video: a trend needs no more
_CROP_OF_EDGE = 224 / 256
_HELD_OUT = 2  # without splits every second video of the set is the test


class OnlineKnn:
    """Accuracy of a kNN on the mean backbone feature of a few frames of each video.

    Training videos vote for test videos where the shards have splits; without, even videos for odd
    ones. The ranks share the videos.

    Args:
        config: resolved settings.
        device: this rank's.
        ranks: the processes of the run.

    Raises:
        InputError: the shards have no labels.
    """

    def __init__(self, config: PretrainConfig, device: torch.device, ranks: Ranks) -> None:
        self._every = config.knn_every_epochs
        self._device = device
        self._ranks = ranks
        self._shards = open_shards(config.knn_shards)
        self._labels = self._shards.labels.astype(np.int64)
        size = config.crop_size
        short_edge = max(size, round(size / _CROP_OF_EDGE))
        self._frames = VideoFrames(self._shards, _FRAMES, short_edge, size)
        labelled = self._labels >= 0
        train, test = self._split()
        self._train, self._test = train & labelled, test & labelled
        self._untrained: float | None = None
        if not self._train.any() or not self._test.any():
            raise InputError(
                "hold no labelled videos to vote or to be judged", "--knn-shards", "name others"
            )

    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        for values in self._shards.splits.values():
            names = np.array([value or "" for value in values])
            if (names == "train").any() and (names != "train").any():
                return names == "train", (names != "train") & (names != "")
        odd = np.arange(len(self._shards)) % _HELD_OUT == 1
        return ~odd, odd

    def due(self, epoch: int, last: bool) -> bool:
        """Whether it is to be done after this epoch: every few, and after the last."""
        return last or epoch % self._every == 0

    def figures(self, model: SeCo) -> dict[str, float]:
        """``knn_top1``; nothing if no video can be read."""
        features = self._features(model)
        known = np.isfinite(features).all(axis=1)
        train, test = self._train & known, self._test & known
        if not train.any() or not test.any():
            return {}
        classes, votes = knn_scores(features[train], self._labels[train], features[test])
        right = classes[votes.argmax(1)] == self._labels[test]
        return {"knn_top1": float(right.mean())}

    def sentence(self, step: int, found: Mapping[str, float]) -> str:
        """What the figures of a step say, beside the untrained network's where they are known."""
        if not found:
            return "kNN: no video can be read"
        top1 = found["knn_top1"]
        if step == 0:
            self._untrained = top1
            return f"kNN, untrained: {top1:.1%} of {int(self._test.sum())} videos are right"
        beside = "" if self._untrained is None else f"; untrained {self._untrained:.1%}"
        return f"kNN, step {step}: {top1:.1%}{beside}"

    @torch.no_grad()
    def _features(self, model: SeCo) -> np.ndarray:
        """(V, C), NaN where a video cannot be read."""
        backbone = model.query_encoder.backbone
        self._ranks.from_first(backbone.buffers())  # the running statistics that are saved
        share = -(-len(self._shards) // self._ranks.size)
        mine = range(
            self._ranks.rank * share, min((self._ranks.rank + 1) * share, len(self._shards))
        )
        rows: list[np.ndarray] = []
        with _evaluating(backbone):
            for video in mine:
                frames, reason = self._frames.video(video)
                if reason:
                    rows.append(np.full(0, np.nan))
                    continue
                feature = backbone(normalise(frames.to(self._device))).float().mean(0)
                rows.append(feature.cpu().numpy().astype(np.float64))
        width = self._ranks.gather_host(np.array([[max((len(r) for r in rows), default=0)]]))
        padded = np.full((share, int(width.max())), np.nan)
        for place, row in enumerate(rows):
            padded[place, : len(row)] = row
        everyone: np.ndarray = self._ranks.gather_host(padded)[: len(self._shards)]
        return everyone


@contextlib.contextmanager
def _evaluating(backbone: torch.nn.Module) -> Any:
    backbone.eval()
    try:
        yield
    finally:
        backbone.train()
