"""Frozen features: the mean over a video's frames of the backbone's pooled feature (paper §5.2)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seco import __version__
from seco.augment import normalise
from seco.crops import BrokenJpeg, center_crop, decode_jpeg
from seco.device import resolve_device
from seco.extract_config import ExtractConfig
from seco.feature_store import write_features
from seco.stopping import leave_signals_to_parent
from seco.weights import Backbone, load_backbone
from shards.access import UnreadableFrame, readable
from shards.atomic import require_writable
from shards.errors import InputError
from shards.opening import open_shards
from shards.progress import progress
from shards.reader import ShardSet


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """``wanted`` frame numbers from the first to the last of ``count``, rounded; all if fewer."""
    if wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [count // 2]
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


class VideoFrames(Dataset[tuple[int, Tensor, str]]):
    """Item v: (v, (F, 3, S, S) uint8, why it could not be read or "")."""

    def __init__(self, shards: ShardSet, config: ExtractConfig) -> None:
        self._shards = shards
        self._config = config

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, video: int) -> tuple[int, Tensor, str]:
        config = self._config
        numbers = evenly_spaced(self._shards.frame_count(video), config.frames)
        try:
            crops = [
                center_crop(decode_jpeg(readable(jpeg)), config.short_edge, config.crop_size)
                for jpeg in self._shards.read_frames([(video, number) for number in numbers])
            ]
        except (UnreadableFrame, BrokenJpeg) as error:
            return video, torch.empty(0), str(error)
        return video, torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous(), ""


def extract_features(config: ExtractConfig) -> Path:
    """Write the features of every readable video of the shards; returns the folder.

    Raises:
        InputError: the settings, shards or checkpoint cannot be used, or no video can be read.
    """
    if config.short_edge < config.crop_size:
        raise InputError(
            f"{config.short_edge} is smaller than the crop of {config.crop_size}", "--short-edge"
        )
    if min(config.frames, config.crop_size, config.batch_size) < 1:
        raise InputError("must be 1 or more", "--frames, --crop-size, --batch-size")
    shards = open_shards(config.shards)
    backbone = load_backbone(config.checkpoint, config.arch, config.seed)
    device = resolve_device(config.device)
    out = Path(config.out or f"features/{shards.name}")
    require_writable(out)
    rows: list[dict[str, Any]] = []
    features: list[NDArray[np.float32]] = []
    halves: list[NDArray[np.float32]] = []
    failed = 0
    with progress("Extracting", len(shards), "videos") as shown:
        for video, frames, reason in _video_features(shards, backbone, device, config):
            shown.advance()
            try:
                row = _row(shards, video, config.frames)
            except UnreadableFrame as error:
                reason = reason or str(error)
            if reason:
                failed += 1
                print(f"seco: left out: {shards.keys[video]}: {reason}", file=sys.stderr)
                continue
            rows.append(row)
            features.append(frames.mean(0))
            middle = max(1, len(frames) // 2)
            halves.append(np.stack([frames[:middle].mean(0), frames[-middle:].mean(0)]))
    if not rows:
        raise InputError("not one video could be read", config.shards)
    write_features(
        out,
        np.stack(features),
        np.stack(halves),
        [{name: row[name] for name in row if name != "dataset"} for row in rows],
        _meta(config, backbone, failed, rows[0]["dataset"]),
    )
    return out


def _video_features(
    shards: ShardSet, backbone: Backbone, device: torch.device, config: ExtractConfig
) -> Iterator[tuple[int, NDArray[np.float32], str]]:
    """For every video in order: its number, the (F, C) features of its frames, or why not."""
    network = backbone.network.to(device).eval()
    loader = DataLoader(
        VideoFrames(shards, config),
        batch_size=None,
        num_workers=config.workers,
        worker_init_fn=leave_signals_to_parent if config.workers else None,
    )
    with torch.inference_mode():
        for video, frames, reason in loader:
            if reason:
                yield video, np.empty((0, 0), np.float32), reason
                continue
            parts = [
                network(normalise(part.to(device))).float().cpu()
                for part in frames.split(config.batch_size)
            ]
            yield video, torch.cat(parts).numpy(), ""


def _row(shards: ShardSet, video: int, frames: int) -> dict[str, Any]:
    record = shards.record(video)
    return {
        "key": shards.keys[video],
        "dataset": record.dataset,
        "source": record.source,
        "label": record.label,
        "label_name": record.label_name,
        "frames": min(frames, shards.frame_count(video)),
        "shard": Path(shards.shard_of(video)).name,
        "splits": record.splits,
    }


def _meta(config: ExtractConfig, backbone: Backbone, failed: int, dataset: str) -> dict[str, Any]:
    return {
        "encoder": backbone.record(config.seed),
        "dataset": dataset,
        "shards": list(config.shards),
        "frames": config.frames,
        "short_edge": config.short_edge,
        "crop_size": config.crop_size,
        "unreadable": failed,
        "toolkit": __version__,
    }
