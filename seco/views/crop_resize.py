"""The resize of the views: a box of a decoded frame to S × S, written where it is wanted.

Torch's antialiased bilinear kernel for interleaved uint8 images takes a third of PIL's time and
differs from it by rounding (``benchmarks/results/loader.md``); written straight into the batch it
saves one allocation and one copy a view.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from seco.views.crops import Pixels

_resize_into = torch.ops.aten._upsample_bilinear2d_aa.out  # F.interpolate has no out=


def crop_resize(image: Pixels, box: Sequence[int], size: int, out: Pixels | None = None) -> Pixels:
    """Cut ``box`` out of an (H, W, 3) image and resize it to (size, size, 3).

    Bilinear with antialiasing. Within 1 of torchvision's ``resized_crop`` on PIL images, on
    average within 0.25 (of 255): both round intermediate results to 8 bits, at different places.

    Args:
        image: (H, W, 3) uint8.
        box: left, top, width, height, px, inside the image.
        size: S, side of the result in px.
        out: (S, S, 3) contiguous uint8 array to write to; made when None.
    """
    left, top, width, height = box
    result: Pixels = np.empty((size, size, 3), dtype=np.uint8) if out is None else out
    with torch.inference_mode():
        # (1, 3, h, w) over interleaved memory is torch's channels_last: the quick kernel.
        cut = torch.from_numpy(image[None, top : top + height, left : left + width])
        target = torch.from_numpy(result[None])
        _resize_into(
            cut.permute(0, 3, 1, 2),
            [size, size],
            False,  # align_corners
            None,
            None,
            out=target.permute(0, 3, 1, 2),
        )
    return result
