"""Small videos drawn by ffmpeg, and trees of links to real ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipelines._colour import encode_jpeg, jpeg_planes
from pipelines._decode import decoding
from pipelines._ffmpeg import ffmpeg_binary, local_url, run_ffmpeg


def draw_video(
    path: Path,
    *,
    size: str = "64x48",
    frames: int = 8,
    options: Iterable[str] = (),
    rate: int = 25,
) -> Path:
    """A moving test picture, ``rate`` frames a second; ``options`` stand before the output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"testsrc2=size={size}:rate={rate}"
    run_ffmpeg(
        [
            *("-f", "lavfi", "-i", source, "-frames:v", str(frames), "-threads", "1"),
            *(options or ("-c:v", "mpeg4", "-qscale:v", "4")),
            *("-y", local_url(path)),
        ]
    )
    return path


def link_into(folder: Path, videos: Iterable[Path]) -> None:
    """Links to ``videos`` in ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for video in videos:
        (folder / video.name).symlink_to(video)


def decode(path: Path, *, short_edge: int = 256, timeout_seconds: float = 60.0) -> list[float]:
    """The times of all frames."""
    with decoding(
        path, short_edge=short_edge, timeout_seconds=timeout_seconds, binary=ffmpeg_binary()
    ) as decoded:
        return [frame.time for frame in decoded]


def stored_pictures(
    path: Path, *, short_edge: int = 256, most: int = 3, quality: int = 90
) -> NDArray[np.uint8]:
    """RGB ``(N, H, W, 3)`` of the first frames, after JPEG, as a reader of a shard sees them."""
    pictures = []
    with decoding(
        path, short_edge=short_edge, timeout_seconds=60, binary=ffmpeg_binary()
    ) as decoded:
        for frame in decoded:
            planes = jpeg_planes(frame.planes, decoded.width, decoded.height, *frame.colour)
            pictures.append(simplejpeg.decode_jpeg(encode_jpeg(planes, quality), "RGB"))
            if len(pictures) == most:
                break
    return np.stack(pictures)
