"""Clips: every frame of one is changed alike."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from seco.data.clips import clip_views
from seco.data.crops import BrokenJpeg, decode_jpeg
from seco.data.transforms import ViewConfig, apply_views
from shards.sampling import sample_starts
from tests.made_shards import drawn_frame

CONFIG = ViewConfig()
STARTS = sample_starts(0, 0, [f"clip {n}" for n in range(12)], "clip")


def test_all_frames_of_a_clip_are_changed_alike() -> None:
    still = [[drawn_frame(n, 0)] * 4 for n in range(12)]
    crops, parameters = clip_views(still, STARTS, 24, CONFIG)
    assert crops.shape == (12, 4, 3, 24, 24)
    views = apply_views(crops.flatten(0, 1), parameters, CONFIG).view(crops.shape)
    for frame in range(1, 4):
        torch.testing.assert_close(views[:, frame], views[:, 0], atol=1e-5, rtol=0)
    for field in fields(parameters):
        values = getattr(parameters, field.name).reshape(12, 4, -1)
        assert (values == values[:, :1]).all()
    assert len(np.unique(parameters.hue)) == 12
    assert 0 < parameters.flip.mean() < 1


def test_moving_clips_keep_their_frames_in_order_and_their_box() -> None:
    moving = [[drawn_frame(n, f) for f in range(3)] for n in range(12)]
    crops, _ = clip_views(moving, STARTS, 24, CONFIG)
    one_by_one = [
        clip_views([[frame]], STARTS[n : n + 1], 24, CONFIG)[0][0, 0]
        for n in range(12)
        for frame in moving[n]
    ]
    assert torch.equal(crops.flatten(0, 1), torch.stack(one_by_one))
    whole = ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(4 / 3, 4 / 3))
    (same,), _ = clip_views([moving[0]], STARTS[:1], 24, whole)
    mean = torch.from_numpy(decode_jpeg(moving[0][2])).float().mean()
    assert abs(same[2].float().mean() - mean) < 2


def test_what_cannot_be_a_clip() -> None:
    with pytest.raises(ValueError, match="frames of"):
        clip_views([[drawn_frame(0, 0), drawn_frame(0, 1, (32, 64))]], STARTS[:1], 24, CONFIG)
    with pytest.raises(BrokenJpeg):
        clip_views([[b"no picture"]], STARTS[:1], 24, CONFIG)
