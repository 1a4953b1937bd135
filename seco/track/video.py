"""Frames with boxes drawn on them, for annotated videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seco.views.crops import Pixels

# Writes frames (H, W, 3), all of one size, as a video of so many frames a second.
WriteVideo = Callable[[Path, float, Iterable[Pixels]], None]

TRACKED = (255, 64, 32)
TRUE = (64, 220, 96)


def with_boxes(
    frame: Pixels, boxes: Iterable[tuple[Sequence[float] | NDArray[np.float64], tuple[int, ...]]]
) -> Pixels:
    """A copy of the frame with the outline of each (box, colour); what is outside is not drawn.

    Boxes are x, y, w, h, px; the first pixel is 1. A box of less than a pixel is drawn as one.
    """
    drawn: Pixels = frame.copy()
    height, width = frame.shape[:2]
    thick = max(1, round(min(height, width) / 160))
    for (x, y, box_width, box_height), colour in boxes:
        left, top = round(x) - 1, round(y) - 1
        right = max(left + 1, round(x + box_width) - 1)
        bottom = max(top + 1, round(y + box_height) - 1)
        inner_left, inner_right = left + thick, right - thick
        inner_top, inner_bottom = top + thick, bottom - thick
        for rows, columns in (
            ((top, min(inner_top, bottom)), (left, right)),
            ((max(inner_bottom, top), bottom), (left, right)),
            ((top, bottom), (left, min(inner_left, right))),
            ((top, bottom), (max(inner_right, left), right)),
        ):
            drawn[_inside(rows, height), _inside(columns, width)] = colour
    return drawn


def _inside(span: tuple[int, int], size: int) -> slice:
    first, after = (min(max(0, place), size) for place in span)
    return slice(first, after)
