"""The device part of the views as one dense graph, for GPUs: what ``apply_views`` does in groups.

On a GPU moving images to their groups costs more than computing what is not needed, so here every
image goes through every operation, with parameters that leave it as it is where none was drawn. The
graph has no branch, no shape that depends on a draw and no wait for the host. Brightness, contrast,
saturation and grayscale are one formula, clamp(m + f · (x - m)), in which m is 0, the mean gray of
the image or the gray of the pixel; so the order drawn for an image is a matter of parameters.

Compiled by inductor for a GPU it becomes three kernels: the mean gray that contrast needs and the
chain, both from uint8; the blur across; the blur down with the normalisation. Per value these read
and write 1 + 1 + 4, 8 and 8 bytes, 6.8 GB for 2048 images of 224² px.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seco.views.augment import GRAY, box_kernels, box_reach
from seco.views.view_parameters import IMAGENET_MEAN, IMAGENET_STD, ViewConfig, ViewParameters

_SLOTS = 4  # of the jitter; grayscale is a fifth, saturation by 0
_BLEND = 4  # numbers of a slot: factor, share of gray in m, share of the mean in m, turns of hue
_CHAIN = _BLEND * (_SLOTS + 1)  # then as many zeros and ones for the chain up to contrast, then:
_FLIP = _CHAIN + _SLOTS
_TAPS = _FLIP + 1  # the blur's middle tap and those to one side of it

Floats32 = NDArray[np.float32]
Core = Callable[[Tensor, Tensor, tuple[float, ...], tuple[float, ...]], Tensor]


def fused_views(
    images: Tensor,
    views: ViewParameters,
    config: ViewConfig | None = None,
    *,
    compiled: bool = True,
) -> Tensor:
    """Crops to normalised views, as ``apply_views`` makes them, through the dense graph.

    Equal to ``apply_views`` but for rounding (1e-5), and for the ``blur_radius(config)`` px at the
    edges of blurred images: there PIL repeats the edge before each of three boxes, this once. On
    textures that is 0.02 (of 255) in an image's mean at 32 px and 0.001 at 224 px, but up to 30 at
    a single pixel where a hard edge runs along the border.

    Args:
        images: (N, 3, S, S) uint8, of any memory format; interleaved ones are not copied.
        views: of the N images.
        config: gives the mean, the standard deviation and the largest sigma.
        compiled: by inductor, anew for each S and never for other draws or another N > 1. Not
            compiled the same graph is slow: for tests.

    Returns:
        (N, 3, S, S) float32, contiguous.

    Raises:
        ValueError: a sigma is larger than the configuration's.
    """
    config = config or ViewConfig()
    parameters = torch.from_numpy(pack(views, blur_radius(config)))
    if images.device.type == "cuda":  # from pinned memory the host does not wait for the copy
        parameters = parameters.pin_memory().to(images.device, non_blocking=True)
    if not compiled or not len(images):
        return dense_views(images, parameters, config.mean, config.std)
    for batched in (images, parameters):
        torch._dynamo.maybe_mark_dynamic(batched, 0)
    # The caller's modes would be more reasons to compile anew: keys' views are made under autocast.
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        return _compiled()(images, parameters, config.mean, config.std)


def blur_radius(config: ViewConfig) -> int:
    """How many px three boxes of the largest sigma reach to either side: 6 for a sigma of 2 px."""
    return 3 * (int(box_reach(np.array(config.blur_sigma)).max()) + 1)


def pack(views: ViewParameters, radius: int) -> Floats32:
    """All parameters of N images as the (N, 26 + radius) numbers that ``dense_views`` takes.

    Raises:
        ValueError: a blur reaches further than ``radius`` px.
    """
    count = len(views)
    slots = np.zeros((count, _SLOTS + 1, _BLEND))
    slots[:, :, 0] = 1  # a factor of 1 changes nothing
    strengths = (views.brightness, views.contrast, views.saturation)
    for slot in range(_SLOTS):
        op = np.where(views.jitter, views.order[:, slot], -1)
        for number, factors in enumerate(strengths):
            slots[op == number, slot, 0] = factors[op == number]
        slots[:, slot, 1] = op == 2
        slots[:, slot, 2] = op == 1
        slots[:, slot, 3] = np.where(op == 3, views.hue, 0)
    slots[:, _SLOTS, :2] = np.where(views.grayscale[:, None], (0, 1), (1, 0))
    before_contrast = np.cumsum(views.order == 1, axis=1) == 0
    columns = [slots.reshape(count, _CHAIN), before_contrast, views.flip[:, None]]
    return np.concatenate([*columns, _half_kernels(views, radius)], axis=1).astype(np.float32)


def _half_kernels(views: ViewParameters, radius: int) -> NDArray[np.float64]:
    """PIL's three boxes as one kernel an image: (N, radius + 1), from the middle outwards."""
    half = np.zeros((len(views), radius + 1))
    half[:, 0] = 1
    reach = box_reach(views.sigma)
    for r in np.unique(reach[views.blur]):
        if 3 * (r + 1) > radius:
            largest = views.sigma[views.blur].max()
            raise ValueError(f"sigma {largest:.3g} px reaches beyond {radius} px")
        chosen = np.flatnonzero(views.blur & (reach == r))
        for image, box in zip(chosen, box_kernels(views.sigma[chosen]), strict=True):
            kernel = np.convolve(np.convolve(box, box), box)
            half[image, : len(kernel) // 2 + 1] = kernel[len(kernel) // 2 :]
    return half


def dense_views(
    images: Tensor,
    parameters: Tensor,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    """(N, 3, S, S) uint8 and the (N, 26 + R) numbers of ``pack`` to (N, 3, S, S) float32."""
    slots = [
        [_per_image(parameters, _BLEND * slot + number) for number in range(_BLEND)]
        for slot in range(_SLOTS + 1)
    ]
    middle = _mean_before_contrast(images, parameters, slots)
    mirrored = _per_image(parameters, _FLIP) > 0
    planes = [torch.where(mirrored, x.flip(-1), x) for x in _unit_planes(images)]
    for factor, of_gray, of_mean, turns in slots[:_SLOTS]:
        planes = _turn_hue(_blend(planes, factor, of_gray, of_mean * middle), turns)
    factor, of_gray, _, _ = slots[_SLOTS]
    planes = _blend(planes, factor, of_gray, torch.zeros_like(factor))
    blurred = _fused_blur(torch.stack(planes, dim=1), parameters[:, _TAPS:])
    return (blurred - _channels(blurred, mean)) / _channels(blurred, std)


def _per_image(parameters: Tensor, column: int) -> Tensor:
    return parameters[:, column, None, None]


def _unit_planes(images: Tensor) -> list[Tensor]:
    """Red, green and blue apart, (N, S, S) in 0 … 1: each pixel's chain is computed once."""
    return [images[:, channel] * (1 / 255) for channel in range(3)]


def _channels(like: Tensor, values: tuple[float, ...]) -> Tensor:
    """One value a channel, (3, 1, 1)."""
    red, green, blue = values
    channel = torch.arange(3, device=like.device)[:, None, None]  # no constant to be copied
    return torch.where(channel == 0, red, torch.where(channel == 1, green, blue)).to(like.dtype)


def _mean_before_contrast(images: Tensor, parameters: Tensor, slots: list[list[Tensor]]) -> Tensor:
    """The image's mean gray at the place where contrast stands in its order: (N, 1, 1)."""
    planes = _unit_planes(images)
    for slot in range(_SLOTS - 1):  # none comes before contrast but in the first three
        before = _per_image(parameters, _CHAIN + slot)
        factor, of_gray, _, turns = slots[slot]
        factor = 1 + before * (factor - 1)
        planes = _blend(planes, factor, before * of_gray, torch.zeros_like(factor))
        planes = _turn_hue(planes, before * turns)
    return _fused_gray(planes).mean((1, 2), keepdim=True)


def _fused_gray(planes: list[Tensor]) -> Tensor:
    red, green, blue = planes
    return red * GRAY[0] + green * GRAY[1] + blue * GRAY[2]


def _blend(planes: list[Tensor], factor: Tensor, of_gray: Tensor, middle: Tensor) -> list[Tensor]:
    """Away from or towards ``middle`` or each pixel's gray; a factor of 1 must come with 0s."""
    m = of_gray * _fused_gray(planes) + middle
    return [(m + factor * (x - m)).clamp(0, 1) for x in planes]


def _turn_hue(planes: list[Tensor], turns: Tensor) -> list[Tensor]:
    """``augment._hue``: HSV's hue moved by ``turns``, with value and chroma kept."""
    red, green, blue = planes
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    sixths = torch.where(
        red == value,
        green - blue,
        torch.where(green == value, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    sixths = sixths / chroma.clamp_min(1e-10) + 6 * turns
    sixths = sixths - 6 * torch.floor(sixths * (1 / 6))
    shares = ((sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs())
    return [least + chroma * share.clamp(0, 1) for share in shares]


def _fused_blur(x: Tensor, half_kernels: Tensor) -> Tensor:
    """(N, 3, S, S) across, then down with the (N, R + 1) halves of symmetric kernels."""
    radius = half_kernels.shape[1] - 1
    taps = half_kernels[:, :, None, None, None]
    for dim in (3, 2):
        # The edge is repeated by its index: a padded copy would be written and read.
        place = torch.arange(x.shape[dim], device=x.device)
        out = x * taps[:, 0]
        for shift in range(1, radius + 1):
            before = _take(x, dim, (place - shift).clamp_min(0))
            after = _take(x, dim, (place + shift).clamp_max(x.shape[dim] - 1))
            out = out + (before + after) * taps[:, shift]
        x = out
    return x


def _take(x: Tensor, dim: int, place: Tensor) -> Tensor:
    return x[:, :, :, place] if dim == 3 else x[:, :, place]


@functools.cache
def _compiled() -> Core:
    # dynamic=False: an image size is a constant of the graph; N alone is marked as free.
    return torch.compile(dense_views, fullgraph=True, dynamic=False)
