"""The scores of test videos: the mean over clips and crops of a clip's scores (authors' code).

Clips overlap and a frame's feature does not depend on its neighbours, so each distinct frame is
decoded once and goes through the backbone once for each crop; clips are means over its rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from seco.finetune.labelled_videos import LabelledVideos
from seco.finetune.segments import clip_starts, segment_middles
from seco.finetune.video_classifier import VideoClassifier
from seco.loading.forked_loader import forked_loader
from seco.processes.device import to_device
from seco.processes.ranks import Ranks
from seco.views.augment import normalise
from seco.views.crops import crop_corners, decode_jpeg, resize_short_edge
from shards.access import UnreadableFrame, readable
from shards.errors import InputError


@dataclass(frozen=True)
class ClipProtocol:
    """How a video is tested."""

    clips: int
    clip_frames: int
    crops: int  # 1 or 3
    size: int  # short edge and side of the crops, px
    middles: bool = False  # instead: one clip of the middle frames of ``clip_frames`` segments

    def frames(self, count: int) -> list[list[int]]:
        """The frames of each clip of a video with ``count``."""
        if self.middles:
            return [segment_middles(count, self.clip_frames)]
        starts = clip_starts(count, self.clips, self.clip_frames)
        return [list(range(start, min(start + self.clip_frames, count))) for start in starts]


@dataclass(frozen=True)
class _Part:
    """Some frames of a test video: (F, H, W, 3) uint8, or why they cannot be read."""

    images: Tensor | None
    reason: str = ""


class _Frames(Dataset[_Part]):
    """Item (video, frames): the frames, resized."""

    def __init__(self, videos: LabelledVideos, short_edge: int) -> None:
        self._shards = videos.shards
        self._short_edge = short_edge

    def __getitem__(self, task: tuple[int, list[int]]) -> _Part:
        video, frames = task
        try:
            images = [
                resize_short_edge(decode_jpeg(readable(jpeg)), self._short_edge)
                for jpeg in self._shards.read_frames([(video, frame) for frame in frames])
            ]
            return _Part(torch.from_numpy(np.stack(images)))
        except (UnreadableFrame, ValueError) as error:  # broken, or of two sizes
            return _Part(None, str(error))


class VideoScores:
    """Scores videos with a classifier, on all ranks together.

    A video's scores do not depend on which rank computes them, nor on the other videos.

    Args:
        videos: the set.
        protocol: which clips and crops.
        device: this rank's.
        ranks: the processes; each takes every ``size``-th video.
        bf16: whether the backbone runs in bf16.
        workers: loader processes; never changes a result.
        frames_a_forward: frames whose crops go through the backbone together.
    """

    def __init__(
        self,
        videos: LabelledVideos,
        protocol: ClipProtocol,
        device: torch.device,
        ranks: Ranks,
        *,
        bf16: bool,
        workers: int,
        frames_a_forward: int,
    ) -> None:
        self._videos = videos
        self._protocol = protocol
        self._device = device
        self._ranks = ranks
        self._bf16 = bf16
        self._workers = workers
        self._step = frames_a_forward

    def of(
        self,
        model: VideoClassifier,
        numbers: NDArray[np.int64],
        done: Callable[[], None] = lambda: None,
    ) -> NDArray[np.float64]:
        """The scores (M, K) of videos (M,); NaN where one cannot be read, which is said.

        Args:
            model: on the device; put back into training mode where it was.
            done: called after each video of this rank; may raise.

        Raises:
            InputError: the network gives a video scores that are not finite.
        """
        ranks = self._ranks
        ranks.from_first(model.backbone.buffers())  # the running statistics that are saved
        classes = model.classifier.out_features
        share = -(-len(numbers) // ranks.size)
        mine = numbers[ranks.rank :: ranks.size]
        rows = np.full((share, classes), np.nan)
        training = model.training
        model.eval()
        try:
            for place, scores in enumerate(self._scores(model, mine)):
                if scores is not None:
                    self._require_finite(scores, int(mine[place]))
                    rows[place] = scores
                done()
        finally:
            model.train(training)
        everyone = ranks.gather_host(rows).reshape(ranks.size, share, classes)
        # Rank r's video i is number i · size + r.
        merged: NDArray[np.float64] = everyone.transpose(1, 0, 2).reshape(-1, classes)
        return merged[: len(numbers)]

    def _require_finite(self, scores: NDArray[np.float64], video: int) -> None:
        if not np.isfinite(scores).all():
            raise InputError(
                "the network's scores are not finite",
                self._videos.shards.key(video),
                "train again with a lower --lr, or try --precision fp32",
            )

    @torch.inference_mode()
    def _scores(
        self, model: VideoClassifier, numbers: Sequence[int] | NDArray[np.int64]
    ) -> Iterator[NDArray[np.float64] | None]:
        plans = [self._protocol.frames(self._videos.shards.frame_count(int(v))) for v in numbers]
        distinct = [sorted({frame for clip in clips for frame in clip}) for clips in plans]
        parts = [[f[at : at + self._step] for at in range(0, len(f), self._step)] for f in distinct]
        tasks = [(int(v), part) for v, p in zip(numbers, parts, strict=True) for part in p]
        wanted = _Frames(self._videos, self._protocol.size)
        with forked_loader(wanted, lambda: iter(tasks), self._workers, None) as read:
            for video, clips, frames, cut in zip(numbers, plans, distinct, parts, strict=True):
                features: list[Tensor] = []
                reason = ""
                for part in (next(read) for _ in cut):
                    reason = reason or part.reason
                    if part.images is not None and not reason:
                        features.append(self._features(model, part.images))
                if features and not reason:
                    yield _of_video(model, torch.cat(features), frames, clips)
                    continue
                key = self._videos.shards.key(int(video))
                print(
                    f"seco: left out: {key}: {reason or 'no frames'}", file=sys.stderr, flush=True
                )
                yield None

    def _features(self, model: VideoClassifier, frames: Tensor) -> Tensor:
        """(F, H, W, 3) uint8 frames to the (F, crops, C) features of their crops."""
        size, crops = self._protocol.size, self._protocol.crops
        images = to_device(frames, self._device).permute(0, 3, 1, 2)
        corners = crop_corners(images.shape[2], images.shape[3], size, crops)
        cut = [images[:, :, top : top + size, left : left + size] for top, left in corners]
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            features = model.backbone(normalise(torch.stack(cut, 1).flatten(0, 1)))
        together: Tensor = features.float().view(len(frames), crops, -1)
        return together


def _of_video(
    model: VideoClassifier, features: Tensor, frames: list[int], clips: list[list[int]]
) -> NDArray[np.float64]:
    """(F, crops, C) features of distinct frames to the (K,) mean score of all clips and crops."""
    place = {frame: number for number, frame in enumerate(frames)}
    index = torch.tensor([[place[frame] for frame in clip] for clip in clips])
    of_clips = features[index.to(features.device)].mean(1)  # (clips, crops, C)
    scores: NDArray[np.float64] = model.scores(of_clips).double().mean((0, 1)).cpu().numpy()
    return scores
