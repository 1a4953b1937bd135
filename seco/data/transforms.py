"""Augment views on the training device: flip, jitter, grayscale, blur, normalisation, by the batch.

Every image has parameters of its own, drawn beforehand on the CPU. Between two operations the batch
is regrouped so that the images of each operation lie next to each other and are changed in place;
the host knows all groups in advance, so a GPU never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from seco.config import IMAGENET_MEAN, IMAGENET_STD
from seco.data.crops import CROP_RATIO, CROP_SCALE
from seco.processes.device import if_it_compiles, to_device
from shards.settings import setting

_BLUR_GIVEN_AT_PX = 224  # view size of the authors' sigma
VIEW_DRAWS = 13  # uniform numbers per view

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How views are drawn: MoCo v2's augmentation, which SeCo's authors use."""

    crop_scale: tuple[float, float] = setting(
        CROP_SCALE, "area of the crop / area of the frame", source="authors' code"
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
    """The settings of a run that determine its views."""

    @property
    def crop_size(self) -> int:
        """Side of a view, px."""

    @property
    def min_crop_area(self) -> float:
        """Smallest area of a crop, as a share of the frame's."""


def view_config(config: ViewSettings) -> ViewConfig:
    """Views of a run. The blur, given for views of 224 px, is scaled to the crop size."""
    weakest, strongest = ViewConfig().blur_sigma
    scale = config.crop_size / _BLUR_GIVEN_AT_PX
    return ViewConfig(
        crop_scale=(config.min_crop_area, 1.0), blur_sigma=(weakest * scale, strongest * scale)
    )


@dataclass(frozen=True)
class ViewParameters:
    """The augmentation parameters of N images."""

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
        """Index the parameters by image, for example to repeat one draw for a whole clip."""
        return ViewParameters(**{f.name: getattr(self, f.name)[images] for f in fields(self)})

    @staticmethod
    def joined(parts: Sequence[ViewParameters]) -> ViewParameters:
        """Concatenate one or more parts."""
        return ViewParameters(
            **{
                f.name: np.concatenate([getattr(part, f.name) for part in parts])
                for f in fields(ViewParameters)
            }
        )


def draw_views(uniform: Floats, config: ViewConfig | None = None) -> ViewParameters:
    """Turn (N, 13) random numbers in [0, 1) into the parameters of N images."""
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


GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights of R, G and B
_BOX_PASSES = 3  # PIL's GaussianBlur is a box blur applied three times
_CPU_BLOCK_PX = 2**19  # larger batches exceed the cache: measured at 32, 64 and 224 px


def normalise(
    images: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Convert (N, 3, H, W) uint8 to float32 in 0 … 1, subtract ``mean``, divide by ``std``."""
    return _standardise(images * (1 / 255), mean, std)


def _standardise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Standardise (N, 3, H, W) in place, per channel, which needs no constants on the device."""
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        x[:, channel].sub_(m).div_(s)
    return x


def apply_views(
    images: Tensor,
    views: ViewParameters,
    config: ViewConfig | None = None,
    *,
    fused: bool | None = None,
) -> Tensor:
    """Turn crops into normalised views, on the crops' device.

    Jitter, grayscale, blur and flip, in the authors' order. The operations are torchvision's for
    float images, the blur is PIL's. Values stay in float32 throughout, where PIL rounds to 8 bits
    after each operation.

    Args:
        images: (N, 3, S, S) uint8.
        views: of the N images.
        config: mean and standard deviation.
        fused: use the compiled graph of ``gpu_transforms.py``; None: on a GPU, if it compiles.

    Returns:
        (N, 3, S, S) float32.

    Raises:
        ValueError: the images are not uint8, or their number differs from that of the parameters.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    if len(images) != len(views):
        raise ValueError(f"{len(images)} images, but parameters for {len(views)}")
    config = config or ViewConfig()
    if fused or (fused is None and images.device.type == "cuda"):
        from seco.data.gpu_transforms import fused_views  # which imports this module

        def compiled() -> Tensor:
            return fused_views(images, views, config)

        done = compiled() if fused else if_it_compiles(compiled)
        if done is not None:
            return done
    block = _CPU_BLOCK_PX // images[0, 0].numel() + 1 if len(images) else 1
    if images.device.type != "cpu" or len(images) <= block:
        return _apply(images, views, config)
    out = torch.empty(images.shape, dtype=torch.float32)
    for begin in range(0, len(images), block):
        numbers = np.arange(begin, min(begin + block, len(images)))
        part = slice(begin, begin + block)
        out[part] = _apply(images[part], views.select(numbers), config)
    return out


def _apply(images: Tensor, views: ViewParameters, config: ViewConfig) -> Tensor:
    batch = _Regrouped(images * (1 / 255))
    for mirrored, _ in batch.regroup([views.flip]):  # commutes with all that follows
        mirrored.copy_(mirrored.flip(-1))
    strengths = (views.brightness, views.contrast, views.saturation, views.hue)
    for slot in range(4):
        groups = [views.jitter & (views.order[:, slot] == op) for op in range(4)]
        for op, (chosen, numbers) in enumerate(batch.regroup(groups)):
            if len(numbers):
                JITTER[op](chosen, _column(strengths[op][numbers], images.device))
    for chosen, _ in batch.regroup([views.grayscale]):
        chosen.copy_(_gray(chosen).expand_as(chosen))
    reach = box_reach(views.sigma)
    radii = np.unique(reach[views.blur])
    for chosen, numbers in batch.regroup([views.blur & (reach == r) for r in radii]):
        chosen.copy_(_blur(chosen, box_kernels(views.sigma[numbers])))
    batch.regroup_as_given()
    return _standardise(batch.pixels, config.mean, config.std)


class _Regrouped:
    """A batch whose images can be reordered so that each group is contiguous.

    Attributes:
        pixels: (N, 3, S, S) in the current order.
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self._numbers = np.arange(len(pixels))  # number of the image at each place

    def regroup(self, groups: Sequence[Flags]) -> list[tuple[Tensor, NDArray[np.int64]]]:
        """Move the images of each (disjoint) group together; the rest follow.

        Returns:
            For each group, a view of its images, to be changed in place, and their numbers (n,).
        """
        members = [np.flatnonzero(group) for group in groups]
        rest = np.ones(len(self._numbers), dtype=bool)
        for numbers in members:
            rest[numbers] = False
        if not rest.all():
            self._arrange(np.concatenate([*members, np.flatnonzero(rest)]))
        ends = np.cumsum([0, *map(len, members)])
        return [
            (self.pixels[begin:end], numbers)
            for numbers, begin, end in zip(members, ends[:-1], ends[1:], strict=True)
        ]

    def regroup_as_given(self) -> None:
        """Restore the original order."""
        self._arrange(np.arange(len(self._numbers)))

    def _arrange(self, numbers: NDArray[np.int64]) -> None:
        if np.array_equal(numbers, self._numbers):
            return
        place = np.empty_like(numbers)
        place[self._numbers] = np.arange(len(numbers))
        index = to_device(torch.from_numpy(place[numbers]), self.pixels.device)
        self.pixels = self.pixels.index_select(0, index)
        self._numbers = numbers


def _column(values: Floats, device: torch.device) -> Tensor:
    """Convert (n,) to a (n, 1, 1, 1) float32 tensor on the device."""
    return to_device(torch.from_numpy(values.astype(np.float32)), device)[:, None, None, None]


def _gray(x: Tensor) -> Tensor:
    """Convert (n, 3, H, W) to gray (n, 1, H, W)."""
    red, green, blue = x.split(1, dim=1)
    gray: Tensor = red * GRAY[0]
    return gray.add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    middle = _gray(x.mean((2, 3), keepdim=True))
    torch.lerp(middle, x, factor, out=x).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    torch.lerp(_gray(x), x, factor, out=x).clamp_(0, 1)


def _hue(x: Tensor, turns: Tensor) -> None:
    """Shift HSV's hue by ``turns``, keeping value and chroma."""
    red, green, blue = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    # lerp with weights 0 and 1 selects like torch.where, several times faster on the CPU.
    red_trails, green_trails = (value - red).sign_(), (value - green).sign_()
    by_green = torch.add(blue - red, chroma, alpha=2)
    by_blue = torch.add(red - green, chroma, alpha=4)
    sixths = torch.lerp(green - blue, by_green.lerp_(by_blue, green_trails), red_trails)
    # Without chroma, both sides of the division are 0 and any hue will do.
    sixths = sixths.div_(chroma.clamp_min(1e-10)).add_(turns * 6)
    sixths.sub_((sixths / 6).floor_(), alpha=6)
    shares = (
        (sixths - 3).abs_().sub_(1),
        (sixths - 2).abs_().neg_().add_(2),
        (sixths - 4).abs_().neg_().add_(2),
    )
    for channel, share in enumerate(shares):
        torch.addcmul(least, chroma, share.clamp_(0, 1), out=x[:, channel : channel + 1])


JITTER: tuple[Callable[[Tensor, Tensor], None], ...] = (_brightness, _contrast, _saturation, _hue)


def box_reach(sigma: Floats) -> NDArray[np.int64]:
    """Reach of PIL's box to either side, in whole px, for each sigma."""
    width = np.sqrt(12 * sigma**2 / _BOX_PASSES + 1)
    return np.floor((width - 1) / 2).astype(np.int64)


def box_kernels(sigma: Floats) -> Floats:
    """Return the boxes, with fractional ends, that PIL's ``GaussianBlur`` applies three times.

    Args:
        sigma: (n,) px, all with the same reach L = floor((sqrt(4 sigma² + 1) - 1) / 2).

    Returns:
        (n, 2L + 3) symmetric rows of sum 1 and variance sigma² / 3.
    """
    reach = int(box_reach(sigma)[0])
    variance = sigma**2 / _BOX_PASSES
    end = (2 * reach + 1) * (reach * (reach + 1) - 3 * variance)
    end /= 6 * (variance - (reach + 1) ** 2)
    box = np.ones((len(sigma), 2 * reach + 3))
    box[:, 0] = box[:, -1] = end
    box /= box.sum(axis=1, keepdims=True)
    return box


def _blur(x: Tensor, boxes: Floats) -> Tensor:
    """Convolve each of (n, 3, H, W) three times with its row of (n, 2R + 1), repeating edges.

    Across, then down, as sums of shifted images: on the CPU, this is faster than a grouped
    convolution, which has to be set up anew for every n.
    """
    radius = boxes.shape[1] // 2
    taps = to_device(torch.from_numpy(boxes.astype(np.float32)), x.device)
    taps = taps[..., None, None, None]
    for dim, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        size = x.shape[dim]
        for _ in range(_BOX_PASSES):
            padded = F.pad(x, padding, mode="replicate")
            x = padded.narrow(dim, radius, size) * taps[:, radius]
            for shift in range(1, radius + 1):
                before = padded.narrow(dim, radius - shift, size)
                after = padded.narrow(dim, radius + shift, size)
                x.addcmul_(before + after, taps[:, radius + shift])
    return x
