"""The shard plan: which video goes into which shard, fixed before the first decode."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from pipelines._adapter import Video, VideoSet, source_bytes, source_folder
from pipelines._config import PrepareConfig
from pipelines._frames import FrameChoice


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """All that one shard is made from."""

    folder: str  # a path, or an address fsspec knows
    name: str  # of the shard: NAME-000
    digest: str  # of the whole set's plan
    dataset: str
    videos: tuple[Video, ...]
    choice: FrameChoice
    short_edge: int | None  # px
    quality: int
    min_frames: int
    keep_damaged: bool
    timeout_seconds: float
    src: str  # the folder of the raw videos
    binary: str  # ffmpeg
    ffmpeg_version: str
    retry: bool = False  # take what the finished shard holds from it, and try the rest again

    @property
    def tar(self) -> str:
        """The tar's file name."""
        return f"{self.name}.tar"

    @property
    def index(self) -> str:
        """The index's file name."""
        return f"{self.name}.idx"


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
    short_edge: int | None,
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
    settings = byte_settings(config, choice, short_edge)
    digest = _digest(ordered, settings, ffmpeg_version)
    starts = range(0, len(ordered), config.videos_per_shard)
    digits = max(3, len(str(len(starts) - 1)))
    # Absolute, for nodes of a cluster start elsewhere.
    folder = config.out if "://" in config.out else os.path.abspath(config.out)
    shards = [
        ShardPlan(
            folder=folder,
            name=f"{videos.name}-{number:0{digits}d}",
            digest=digest,
            dataset=config.dataset,
            videos=tuple(ordered[start : start + config.videos_per_shard]),
            choice=choice,
            short_edge=short_edge,
            quality=config.quality,
            min_frames=config.min_frames,
            keep_damaged=config.keep_damaged,
            timeout_seconds=config.timeout,
            src=str(source_folder(config)),
            binary=binary,
            ffmpeg_version=ffmpeg_version,
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


def byte_settings(
    config: PrepareConfig, choice: FrameChoice, short_edge: int | None
) -> dict[str, Any]:
    """The settings that change what is stored: no folders, no workers, no time limit."""
    return {
        "dataset": config.dataset,
        "frames": choice.count,
        "fps": choice.fps,
        "all_frames": choice == FrameChoice(),
        "min_frames": config.min_frames,
        "keep_damaged": config.keep_damaged,
        "short_edge": short_edge,
        "quality": config.quality,
        "videos_per_shard": config.videos_per_shard,
    }


def _digest(videos: list[Video], settings: dict[str, Any], ffmpeg_version: str) -> str:
    """What decides which bytes go where.

    Where a video was found and how large it is are not part of it: a broken file may be replaced
    by a whole one, for ``--retry-failed``. The index of a shard has them for what it holds.
    """
    digest = hashlib.sha256(json.dumps([settings, ffmpeg_version]).encode())
    for video in videos:
        row = [video.key, video.label, video.label_name, sorted(video.splits.items())]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def described(video: Video, dataset: str) -> dict[str, Any]:
    """The fields of a :class:`shards.format.VideoRecord` that are known without decoding."""
    return {
        "key": video.key,
        "dataset": dataset,
        "source": video.source,
        "label": video.label,
        "label_name": video.label_name,
        "splits": video.splits,
        "source_bytes": source_bytes(video),
    }
