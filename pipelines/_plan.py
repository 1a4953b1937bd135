"""The shard plan: which video goes into which shard, fixed before the first decode."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines._adapter import Video, VideoSet
from pipelines._config import PrepareConfig
from pipelines._frames import FrameChoice


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """All that one shard is made from."""

    path: Path  # of the tar
    digest: str  # of the whole set's plan
    dataset: str
    videos: tuple[Video, ...]
    choice: FrameChoice
    short_edge: int  # px
    quality: int
    min_frames: int
    timeout_seconds: float
    binary: str  # ffmpeg


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """All shards of a set, with what its manifest says of them."""

    name: str
    dataset: str
    settings: dict[str, Any]
    shards: list[ShardPlan]
    videos: VideoSet


def plan_set(
    videos: VideoSet,
    config: PrepareConfig,
    *,
    choice: FrameChoice,
    binary: str,
    ffmpeg_version: str,
) -> SetPlan:
    """Cut a set into shards ``NAME-000.tar``, ``NAME-001.tar``, …

    Videos are ordered by the SHA-1 of their keys, so that each shard holds a mixture of classes and
    the order depends on nothing else.
    """
    ordered = sorted(
        videos.videos, key=lambda video: (hashlib.sha1(video.key.encode()).digest(), video.source)
    )
    settings = byte_settings(config, choice)
    digest = _digest(ordered, settings, ffmpeg_version)
    starts = range(0, len(ordered), config.videos_per_shard)
    digits = max(3, len(str(len(starts) - 1)))
    shards = [
        ShardPlan(
            path=Path(config.out) / f"{videos.name}-{number:0{digits}d}.tar",
            digest=digest,
            dataset=config.dataset,
            videos=tuple(ordered[start : start + config.videos_per_shard]),
            choice=choice,
            short_edge=config.short_edge,
            quality=config.quality,
            min_frames=config.min_frames,
            timeout_seconds=config.timeout,
            binary=binary,
        )
        for number, start in enumerate(starts)
    ]
    return SetPlan(
        name=videos.name,
        dataset=config.dataset,
        settings=settings,
        shards=shards,
        videos=videos,
    )


def byte_settings(config: PrepareConfig, choice: FrameChoice) -> dict[str, Any]:
    """The settings that change what is stored: no folders, no workers, no time limit."""
    return {
        "dataset": config.dataset,
        "frames": choice.count,
        "fps": choice.fps,
        "all_frames": choice == FrameChoice(),
        "min_frames": config.min_frames,
        "short_edge": config.short_edge,
        "quality": config.quality,
        "videos_per_shard": config.videos_per_shard,
    }


def _digest(videos: list[Video], settings: dict[str, Any], ffmpeg_version: str) -> str:
    digest = hashlib.sha256(json.dumps([settings, ffmpeg_version]).encode())
    for video in videos:
        row = asdict(video) | {"path": _size(video.path)}
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
