"""The files of a feature folder, and what reader and writer of it share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seco.features.matrix import release
from shards.errors import InputError

FORMAT_VERSION = 1
FEATURES, HALVES, FRAMES = "features.npy", "halves.npy", "frames.npy"
PARTS = "parts"  # the folder in it of an extraction that is under way
VIDEOS, META, ERRORS = "videos.csv", "meta.json", "errors.csv"
# What other modules write beside the features they measured.
RESULTS = (
    "probe.json",
    "probe-confusion.png",
    "probe-per-class.csv",
    "retrieval.json",
    "duplicates.csv",
)
PROBES = "probe-"  # begins the folders of probes of other methods and splits
COLUMNS = ("key", "source", "label", "label_name", "frames", "shard")
SPLIT = "split."
GROUP = "group"  # an optional column: videos of one recording share it
_BLOCK_VALUES = 1 << 24


def require_finite(array: NDArray[np.float32], keys: Sequence[str], folder: Path) -> None:
    """Refuse a video (row) that holds NaN or infinity.

    Raises:
        InputError: names the video.
    """
    rows = max(1, _BLOCK_VALUES // max(1, int(np.prod(array.shape[1:]))))
    for start in range(0, len(array), rows):
        block = array[start : start + rows]
        bad = np.flatnonzero(~np.isfinite(block).reshape(len(block), -1).all(axis=1))
        release(array)
        if len(bad):
            raise InputError(
                f"the features of {keys[start + int(bad[0])]} are not finite",
                folder,
                "the checkpoint may be of a run that diverged",
            )


def discard(path: Path) -> None:
    """Remove a file if it is there.

    Raises:
        InputError: its folder cannot be written to.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot be written to ({error.strerror})", path.parent) from error
