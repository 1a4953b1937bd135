"""Small tracking sets for tests: textured patches that move over plain backgrounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from shards.atomic import write_json
from shards.format import Manifest, VideoRecord
from shards.writer import ShardWriter

SIZE = (160, 240)  # height, width


def patch_frames(
    number: int,
    frames: int,
    size: tuple[int, int] = SIZE,
    growth: float = 0.35,
    grows_to: float | None = None,
) -> tuple[list[NDArray[np.uint8]], list[list[float]]]:
    """A sequence's frames (H, W, 3) and its boxes: a patch that moves and changes its size.

    Texture, colours and path depend on ``number``. The size goes up and down by ``growth``, or
    steadily to ``grows_to`` times the first.
    """
    height, width = size
    rng = np.random.default_rng(number)
    texture = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    plain = rng.integers(60, 200, 3, dtype=np.uint8)
    phases = rng.uniform(0, 2 * math.pi, 3)
    pictures, boxes = [], []
    for frame in range(frames):
        if grows_to is None:
            side = round(36 * (1 + growth * math.sin(phases[0] + frame / 8)))
        else:
            side = round(36 * grows_to ** (frame / (frames - 1)))
        x = round(width / 2 + 0.3 * width * math.sin(phases[1] + frame / 11) - side / 2)
        y = round(height / 2 + 0.25 * height * math.sin(phases[2] + frame / 14) - side / 2)
        picture = np.broadcast_to(plain, (height, width, 3)).copy()
        resized = texture.resize((side, side), Image.Resampling.BICUBIC)
        picture[y : y + side, x : x + side] = np.asarray(resized)
        pictures.append(picture)
        boxes.append([x + 1.0, y + 1.0, float(side), float(side)])
    return pictures, boxes


def make_sequences(
    folder: Path,
    sequences: int = 8,
    frames: int = 6,
    name: str = "patches",
    dataset: str = "patches",
    first: int = 0,
    keys: Sequence[str] | None = None,
    change: Callable[[int, dict[str, object]], None] = lambda number, fields: None,
    per_shard: int = 3,
    grows_to: float | None = None,
) -> str:
    """Write a set of such sequences; returns the manifest's path.

    ``change`` may alter the fields of a sequence's record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for shard, begin in enumerate(range(0, sequences, per_shard)):
        with ShardWriter(folder / f"{name}-{shard:03d}.tar", "digest") as writer:
            for number in range(begin, min(begin + per_shard, sequences)):
                pictures, boxes = patch_frames(first + number, frames, grows_to=grows_to)
                fields: dict[str, object] = {
                    "key": keys[number] if keys else f"patch_{first + number:03d}",
                    "dataset": dataset,
                    "source": f"patch_{first + number:03d}",
                    "splits": {"official": "test"},
                    "width": SIZE[1],
                    "height": SIZE[0],
                    "frame_times": [frame / 10 for frame in range(frames)],
                    "source_fps": 10.0,
                    "source_frames": frames,
                    "boxes": boxes,
                }
                change(number, fields)
                jpegs = [simplejpeg.encode_jpeg(picture, quality=95) for picture in pictures]
                writer.add(VideoRecord(**fields), jpegs)  # type: ignore[arg-type]
        assert writer.info is not None
        infos.append(writer.info)
    manifest = Manifest(
        name=name,
        dataset=dataset,
        settings={},
        ffmpeg_version="none",
        label_names=[],
        shards=infos,
        excluded=0,
    )
    write_json(folder / f"{name}.json", manifest.to_dict())
    return str(folder / f"{name}.json")
