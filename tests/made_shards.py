"""Small shards for tests, written by the real writer from drawn pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg

from shards.atomic import write_json
from shards.format import Manifest, VideoRecord
from shards.writer import ShardWriter

CLASSES = ("Circle", "Square", "Triangle")


def drawn_frame(video: int, frame: int, size: tuple[int, int] = (48, 64)) -> bytes:
    """A JPEG whose picture depends on video and frame: smooth waves, so that it compresses well."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    rng = np.random.default_rng(video)
    channels = []
    for _ in range(3):
        a, b, phase = (*rng.uniform(0.05, 0.4, 2).tolist(), rng.uniform(0, 6))
        channels.append(127 + 100 * np.sin(a * x + b * y + phase + 0.5 * frame))
    picture = np.stack(channels, axis=-1).astype(np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=90)


def make_set(
    folder: Path,
    videos: int = 24,
    frames: int | Callable[[int], int] = 6,
    per_shard: int = 10,
    name: str = "made",
    size: tuple[int, int] = (48, 64),
    first: int = 0,
    group: Callable[[int], str | None] = lambda video: None,
) -> str:
    """Write ``NAME-000.tar`` …, indexes and manifest; returns the manifest's path.

    ``frames`` and ``group`` may depend on the video's number; these count from ``first``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for number, begin in enumerate(range(first, first + videos, per_shard)):
        with ShardWriter(folder / f"{name}-{number:03d}.tar", "digest") as writer:
            for video in range(begin, min(begin + per_shard, first + videos)):
                count = frames if isinstance(frames, int) else frames(video)
                label = video % len(CLASSES)
                record = VideoRecord(
                    key=f"video_{video:04d}",
                    dataset="made",
                    source=f"{CLASSES[label]}/video_{video:04d}.avi",
                    label=label,
                    label_name=CLASSES[label],
                    splits={"1": "test" if video // 3 % 3 == 0 else "train"},
                    width=size[1],
                    height=size[0],
                    frame_times=[f / 25 for f in range(count)],
                    source_fps=25.0,
                    source_frames=count,
                    source_duration=count / 25,
                    group=group(video),
                )
                writer.add(record, [drawn_frame(video, f, size) for f in range(count)])
        assert writer.info is not None
        infos.append(writer.info)
    manifest = Manifest(
        name=name,
        dataset="made",
        settings={},
        ffmpeg_version="none",
        label_names=list(CLASSES),
        shards=infos,
        excluded=0,
    )
    write_json(folder / f"{name}.json", manifest.to_dict())
    return str(folder / f"{name}.json")
