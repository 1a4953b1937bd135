"""A small labelled set of real encoded videos, drawn where no data set is at hand.

The set has UCF101's layout, so that it takes the way any UCF101 copy takes::

    OUT/UCF-101/<Class>/v_<Class>_gNN_cNN.(avi|mp4|webm|mkv|mov)
    OUT/ucfTrainTestlist/classInd.txt, trainlist01.txt, testlist01.txt

It is no benchmark: its numbers compare features with one another on this set only. What the eight
classes show, and what is kept equal among them, is told in ``_rendered_scenes.py``. As in UCF101,
the clips of a group share their surroundings; here group NN of every class has the same background
pattern, and the first third of the groups is the test list.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from pipelines._ffmpeg import run_ffmpeg
from pipelines._rendered_scenes import CLASSES, render_clip
from shards.atomic import atomic_path, write_text
from shards.errors import InputError
from shards.progress import progress

CLIPS_PER_GROUP = 3
TEST_SHARE = 1 / 3  # of the groups, the first ones, as in UCF101
FRAMES_PER_SECOND = (25, 30, 24, 15)

# Width and height; most clips have the first.
FRAME_SIZES = ((160, 120), (160, 120), (160, 120), (176, 144), (192, 108), (120, 160), (128, 128))

# Suffix, ffmpeg's name of the container, options of the encoder. All write the same bytes for the
# same pixels on one thread.
ENCODINGS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (".avi", "avi", ("-c:v", "mpeg4", "-q:v", "3")),
    (".mp4", "mp4", ("-c:v", "libx264", "-preset", "veryfast", "-crf", "20")),
    (".webm", "webm", ("-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "1M")),
    (".mkv", "matroska", ("-c:v", "mjpeg", "-q:v", "3")),
    (".mov", "mov", ("-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-g", "8")),
    (".webm", "webm", ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "1M")),
)
