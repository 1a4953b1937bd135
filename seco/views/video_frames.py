"""A video's frames on their way to its feature: which ones, and their centre crops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seco.views.crops import BrokenJpeg, FrameDecoder, center_crop
from shards.access import UnreadableFrame, readable
from shards.draws import evenly_spaced
from shards.reader import ShardSet


class VideoFrames:
    """Centre crops of the evenly spaced frames of videos (paper §5.2).

    Args:
        shards: the set.
        frames: how many of a video; all of a shorter one.
        short_edge: frames are resized to it, px.
        crop_size: S, side of the crops, px.
    """

    def __init__(self, shards: ShardSet, frames: int, short_edge: int, crop_size: int) -> None:
        self.shards = shards
        self.crop_size = crop_size
        self._frames = frames
        self._short_edge = short_edge
        self._decoder = FrameDecoder()

    def counts(self, shard: int) -> NDArray[np.int64]:
        """(v,) frames that are taken of each video of a shard."""
        return np.minimum(self.shards.indexes[shard].frame_counts, self._frames)

    def numbers(self, video: int) -> list[int]:
        """Which of the stored frames are taken."""
        return evenly_spaced(self.shards.frame_count(video), self._frames)

    def crop_into(self, out: NDArray[np.uint8], wanted: Sequence[tuple[int, int]]) -> list[str]:
        """Write the crops of (video, frame) pairs.

        Args:
            out: (n, S, S, 3); a frame that cannot be read leaves zeros.
            wanted: (n,)

        Returns:
            (n,) why a frame cannot be read, or "".
        """
        reasons = []
        for place, data in enumerate(self.shards.read_frames(wanted)):
            try:
                image = self._decoder.decode(readable(data))
                out[place] = center_crop(image, self._short_edge, self.crop_size)
                reasons.append("")
            except (UnreadableFrame, BrokenJpeg) as error:
                out[place] = 0
                reasons.append(str(error))
        return reasons

    def video(self, video: int) -> tuple[Tensor, str]:
        """(F, 3, S, S) uint8 of one video, and why it cannot be read or ""."""
        wanted = [(video, number) for number in self.numbers(video)]
        crops = np.empty((len(wanted), self.crop_size, self.crop_size, 3), dtype=np.uint8)
        reason = next(filter(None, self.crop_into(crops, wanted)), "")
        return torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous(), reason
