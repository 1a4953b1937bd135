"""Views of clips, for fine-tuning: one draw for all frames of a clip (authors' code)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seco.views.crop_resize import crop_resize
from seco.views.crops import CROP_DRAWS, FrameDecoder, draw_crops, jpeg_size
from seco.views.view_parameters import VIEW_DRAWS, ViewConfig, ViewParameters, draw_views
from shards.draws import uniforms


def clip_views(
    clips: Sequence[Sequence[bytes]],
    starts: NDArray[np.uint64],
    size: int,
    config: ViewConfig,
    decoder: FrameDecoder | None = None,
) -> tuple[Tensor, ViewParameters]:
    """Crop n clips of T frames, each clip by one box, and draw each clip's other changes once.

    Args:
        clips: (n,) the JPEG files of T frames each; a clip's frames are of one size.
        starts: (n,) where each clip's random numbers begin (:func:`shards.draws.sample_starts`).
        size: S, side of a view, px.
        config: how views are drawn.
        decoder: used again by a caller with many clips.

    Returns:
        (n, T, 3, S, S) uint8, and the parameters of the n·T images for
        :func:`seco.views.augment.apply_views`.

    Raises:
        BrokenJpeg: a frame does not decode.
        ValueError: the clips differ in length, or the frames of one in size.
    """
    decoder = decoder or FrameDecoder()
    if len({len(frames) for frames in clips}) > 1:
        raise ValueError(f"clips of {sorted({len(frames) for frames in clips})} frames")
    drawn = uniforms(starts, CROP_DRAWS + VIEW_DRAWS)
    sizes = np.array([jpeg_size(frames[0]) for frames in clips])
    boxes = draw_crops(
        drawn[:, :CROP_DRAWS], sizes[:, 0], sizes[:, 1], config.crop_scale, config.crop_ratio
    )
    crops = np.empty((len(clips), len(clips[0]), size, size, 3), dtype=np.uint8)
    for number, frames in enumerate(clips):
        for place, jpeg in enumerate(frames):
            image = decoder.decode(jpeg)
            if image.shape[1::-1] != tuple(sizes[number]):
                raise ValueError(f"frames of {image.shape[1::-1]} and {tuple(sizes[number])} px")
            crop_resize(image, boxes[number].tolist(), size, out=crops[number, place])
    once = draw_views(drawn[:, CROP_DRAWS:], config)
    repeated = once.select(np.repeat(np.arange(len(clips)), crops.shape[1]))
    return torch.from_numpy(crops).permute(0, 1, 4, 2, 3), repeated
