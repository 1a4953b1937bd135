"""How views differ: the settings, and what is drawn for each image. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from seco.views.crops import CROP_RATIO, CROP_SCALE
from shards.settings import setting

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BLUR_GIVEN_AT_PX = 224  # the authors' sigma is for views of this side
VIEW_DRAWS = 13  # uniform numbers a view's parameters take

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How views are drawn: MoCo v2's recipe, which the authors use."""

    crop_scale: tuple[float, float] = setting(
        CROP_SCALE, "area of the crop, of the frame's", source="authors' code"
    )
    crop_ratio: tuple[float, float] = setting(
        CROP_RATIO, "width / height of the crop", source="torchvision's default"
    )
    jitter_probability: float = setting(0.8, "share of jittered views", source="authors' code")
    brightness: float = setting(0.4, "factor within 1 ± this", source="authors' code")
    contrast: float = setting(0.4, "factor within 1 ± this", source="authors' code")
    saturation: float = setting(0.4, "factor within 1 ± this", source="authors' code")
    hue: float = setting(0.1, "shift within ± this, in turns", source="authors' code")
    grayscale_probability: float = setting(0.2, "share of gray views", source="authors' code")
    blur_probability: float = setting(0.5, "share of blurred views", source="authors' code")
    blur_sigma: tuple[float, float] = setting(
        (0.1, 2.0), "sigma of the blur, px", source="authors' code"
    )
    flip_probability: float = setting(0.5, "share of mirrored views", source="authors' code")
    mean: tuple[float, float, float] = setting(
        IMAGENET_MEAN, "subtracted from RGB in 0 … 1", source="authors' code: ImageNet's"
    )
    std: tuple[float, float, float] = setting(
        IMAGENET_STD, "divides RGB after that", source="authors' code: ImageNet's"
    )


class ViewSettings(Protocol):
    """The settings of a run that its views depend on."""

    @property
    def crop_size(self) -> int:
        """Side of a view, px."""

    @property
    def min_crop_area(self) -> float:
        """Smallest area of a crop, of the frame's."""


def view_config(config: ViewSettings) -> ViewConfig:
    """The views of a run. The blur, given in px of a 224 px view, shrinks with smaller views."""
    weakest, strongest = ViewConfig().blur_sigma
    scale = config.crop_size / _BLUR_GIVEN_AT_PX
    return ViewConfig(
        crop_scale=(config.min_crop_area, 1.0), blur_sigma=(weakest * scale, strongest * scale)
    )


@dataclass(frozen=True)
class ViewParameters:
    """What is done to each of N images."""

    flip: Flags  # (N,)
    jitter: Flags  # (N,)
    order: NDArray[np.int64]  # (N, 4) of 0 brightness, 1 contrast, 2 saturation, 3 hue
    brightness: Floats  # (N,) factor
    contrast: Floats  # (N,) factor
    saturation: Floats  # (N,) factor
    hue: Floats  # (N,) shift in turns, -0.5 … 0.5
    grayscale: Flags  # (N,)
    blur: Flags  # (N,)
    sigma: Floats  # (N,) px

    def __len__(self) -> int:
        return len(self.flip)

    def select(self, images: NDArray[np.int64]) -> ViewParameters:
        """The parameters of these images, for example one draw repeated for all of a clip."""
        return ViewParameters(**{f.name: getattr(self, f.name)[images] for f in fields(self)})

    @staticmethod
    def joined(parts: Sequence[ViewParameters]) -> ViewParameters:
        """The parameters of all images of one or more parts, one part after the other."""
        return ViewParameters(
            **{
                f.name: np.concatenate([getattr(part, f.name) for part in parts])
                for f in fields(ViewParameters)
            }
        )


def draw_views(uniform: Floats, config: ViewConfig | None = None) -> ViewParameters:
    """The parameters of N images from (N, 13) numbers in [0, 1)."""
    config = config or ViewConfig()
    low, high = config.blur_sigma
    return ViewParameters(
        jitter=uniform[:, 0] < config.jitter_probability,
        order=uniform[:, 1:5].argsort(axis=1),
        brightness=_factor(uniform[:, 5], config.brightness),
        contrast=_factor(uniform[:, 6], config.contrast),
        saturation=_factor(uniform[:, 7], config.saturation),
        hue=config.hue * (2 * uniform[:, 8] - 1),
        grayscale=uniform[:, 9] < config.grayscale_probability,
        blur=uniform[:, 10] < config.blur_probability,
        sigma=low + (high - low) * uniform[:, 11],
        flip=uniform[:, 12] < config.flip_probability,
    )


def _factor(uniform: Floats, strength: float) -> Floats:
    low, high = max(0.0, 1 - strength), 1 + strength
    return low + (high - low) * uniform
