"""Views on a GPU: frames decoded and cropped by nvJPEG, augmentations as one compiled graph.

With ``--decode nvjpeg`` the loader's workers only read bytes and draw boxes. Frames differ slightly
from those of the CPU: nvJPEG repeats the chroma samples of subsampled (4:2:0) files where
libjpeg-turbo interpolates (which alone makes a mean difference of 1.3 to 1.6 of 255 on textures
with hard colour edges), and its inverse DCT rounds differently. Gray values should agree to 1.

``apply_views`` regroups the images between two operations. On a GPU, moving them costs more than
computing what is not needed, so here every image goes through every operation, with parameters that
leave it unchanged where none was drawn. The graph has no branch, no shape that depends on a draw,
and never waits for the host. Brightness, contrast, saturation and grayscale are one formula,
clamp(m + f · (x - m)), where m is 0, the mean gray of the image or the gray of the pixel; so the
order drawn for an image is a matter of parameters.

Inductor compiles it to three kernels for a GPU: the mean gray that contrast needs and the chain,
both from uint8; the blur across; the blur down with the normalisation. Per value these read and
write 1 + 1 + 4, 8 and 8 bytes: 6.8 GB for 2048 images of 224² px.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from seco.config import IMAGENET_MEAN, IMAGENET_STD
from seco.data.transforms import (
    GRAY,
    ViewConfig,
    ViewParameters,
    box_kernels,
    box_reach,
)
from seco.processes.device import to_device

_END, _SCAN = b"\xff\xd9", b"\xff\xda"  # markers that cannot occur within a scan's data
_TAIL_BYTES = 64  # a complete file has its end marker here, unless something was appended
_BLOCK_BYTES = 2**31  # of temporary memory

Ints = NDArray[np.integer[Any]]


class DecodedFrames(NamedTuple):
    """The result of decoding a list of JPEG files."""

    frames: list[Tensor | None]  # (3, H, W) uint8 RGB on the device; None for a broken file
    reasons: dict[int, str]  # for the numbers of the broken files


def as_tensors(jpegs: Sequence[bytes]) -> list[Tensor]:
    """Wrap each file as 1-D uint8, views of one copy: torch requires writable memory."""
    memory = torch.frombuffer(bytearray(b"".join(jpegs)), dtype=torch.uint8)
    return list(memory.split([len(jpeg) for jpeg in jpegs]))


def decode_frames(jpegs: Sequence[Tensor], device: torch.device | str) -> DecodedFrames:
    """Decode JPEG files in one call; with nvJPEG if the device is a GPU.

    Gray files give three equal channels.

    Args:
        jpegs: the files' bytes, 1-D uint8 on the CPU.
        device: of the frames.
    """
    reasons = {
        number: "broken JPEG: cut short" for number, jpeg in enumerate(jpegs) if _cut_short(jpeg)
    }
    numbers = [number for number in range(len(jpegs)) if number not in reasons]
    frames: list[Tensor | None] = [None] * len(jpegs)
    for number, frame in _decode(jpegs, numbers, torch.device(device), reasons):
        frames[number] = frame
    return DecodedFrames(frames, reasons)


def _decode(
    jpegs: Sequence[Tensor], numbers: list[int], device: torch.device, reasons: dict[int, str]
) -> Iterator[tuple[int, Tensor]]:
    """Yield the frames that can be decoded; as one bad file fails a whole call, try halves."""
    if not numbers:
        return
    try:
        frames = _decoded([jpegs[number] for number in numbers], device)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # not the files' fault
        raise
    except RuntimeError as error:
        if len(numbers) == 1:
            reasons[numbers[0]] = f"broken JPEG: {_reason(error)}"
            return
        half = len(numbers) // 2
        yield from _decode(jpegs, numbers[:half], device, reasons)
        yield from _decode(jpegs, numbers[half:], device, reasons)
    else:
        yield from zip(numbers, frames, strict=True)


def _decoded(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    if device.type != "cuda":
        decoded: list[Tensor] = decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
        return decoded
    # torchvision allocates for the current stream but decodes on its own, which does not wait for
    # it: it could overwrite memory that the host has freed and queued kernels still read. Memory
    # of a stream used for nothing else is free only when its readers are done.
    compute, own = torch.cuda.current_stream(device), _decoding_stream(device)
    with torch.cuda.stream(own):
        decoded = decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
    compute.wait_stream(own)
    for frame in decoded:
        frame.record_stream(compute)
    return decoded


@functools.cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _cut_short(jpeg: Tensor) -> bool:
    """Whether the last scan has no end. nvJPEG may fill the missing part with gray, silently.

    A thumbnail in the header has its own markers, but before the image's scans.
    """
    if _END in jpeg[-_TAIL_BYTES:].numpy().tobytes():
        return False
    data = jpeg.numpy().tobytes()
    return data.rfind(_END) <= data.rfind(_SCAN)


def _reason(error: RuntimeError) -> str:
    """torchvision's message on one line, without its leading C++ source location."""
    line = str(error).partition("\n")[0]
    return re.sub(r"^\w+, \S+:\d+, ", "", line)[:200] or type(error).__name__


def crop_resize_batch(
    frames: Sequence[Tensor | None], frame_of_view: Ints, boxes: Ints, size: int
) -> Tensor:
    """Crop a box from a frame for each of V views and resize it to S × S.

    Bilinear with PIL's antialiasing: on average within 0.2 (of 255) of torchvision's
    ``resized_crop`` on PIL images. Two matrix products per view, with the weights of its rows and
    of its columns; these are zero outside the box, so all views of a block have one shape.

    Args:
        frames: (3, H, W) uint8, of any sizes, on one device; those without views may be None.
        frame_of_view: (V,) frame numbers.
        boxes: (V, 4) left, top, width, height in px, inside the frames.
        size: S, px.

    Returns:
        (V, 3, S, S) uint8 on the frames' device.

    Raises:
        ValueError: a view without a frame, or a box that exceeds its frame.
    """
    frame_of_view, boxes = np.asarray(frame_of_view), np.asarray(boxes).reshape(-1, 4)
    if not len(frame_of_view):
        return torch.empty((0, 3, size, size), dtype=torch.uint8)
    sizes = _frame_sizes(frames, frame_of_view, boxes)
    some = frames[frame_of_view[0]]
    assert some is not None
    out = torch.empty((len(boxes), 3, size, size), dtype=torch.uint8, device=some.device)
    dtype = torch.float16 if some.device.type == "cuda" else torch.float32
    for views in _blocks(sizes, size):
        crops = _crop_resize(frames, frame_of_view[views], boxes[views], size, dtype)
        if np.array_equal(views, np.arange(len(boxes))):
            out.copy_(crops)
        else:
            out[_to_device(views, some.device)] = crops.to(torch.uint8)
    return out


def _frame_sizes(frames: Sequence[Tensor | None], frame_of_view: Ints, boxes: Ints) -> Ints:
    """Check the boxes and return the (V, 2) height and width of each view's frame."""
    shapes = np.array([(0, 0) if frame is None else frame.shape[1:] for frame in frames])
    sizes: Ints = shapes[frame_of_view]
    inside = (
        (boxes[:, :2] >= 0) & (boxes[:, 2:] > 0) & (boxes[:, :2] + boxes[:, 2:] <= sizes[:, ::-1])
    )
    if not inside.all():
        view = int(np.flatnonzero(~inside.all(axis=1))[0])
        height, width = sizes[view]
        raise ValueError(
            f"view {view}: box {boxes[view].tolist()} is not inside frame {frame_of_view[view]}"
            f" of {width}x{height}"
        )
    return sizes


def _blocks(sizes: Ints, size: int) -> Iterator[Ints]:
    """Yield blocks of views, grouped by frame size, whose temporaries fit ``_BLOCK_BYTES``."""
    if (sizes == sizes[0]).all():
        order: Ints = np.arange(len(sizes))
    else:
        order = np.lexsort((sizes[:, 0], sizes[:, 1]))
    begin, tallest, widest = 0, 0, 0
    for end, view in enumerate(order):
        tallest, widest = max(tallest, sizes[view, 0]), max(widest, sizes[view, 1])
        if end > begin and (end + 1 - begin) * _view_bytes(tallest, widest, size) > _BLOCK_BYTES:
            yield order[begin:end]
            begin, (tallest, widest) = end, sizes[view]
    yield order[begin:]


def _view_bytes(height: int, width: int, size: int) -> int:
    """Temporary bytes per view: 8-bit pixels (twice), float pixels, weights, both products."""
    weights = size * (height + width) * (4 + 4 + 4)
    products = 3 * size * (height + 2 * size) * 4
    return 3 * height * width * (1 + 1 + 4) + weights + products


def _crop_resize(
    frames: Sequence[Tensor | None], frame_of_view: Ints, boxes: Ints, size: int, dtype: torch.dtype
) -> Tensor:
    """Crop views that fit into memory together: (V, 3, S, S) integer values in ``dtype``."""
    used, place = np.unique(frame_of_view, return_inverse=True)
    padded = _padded([frame for number in used if (frame := frames[number]) is not None])
    device = padded.device
    v, height, width = len(boxes), padded.shape[1], padded.shape[3]
    pixels = padded[_to_device(place, device)].to(dtype)  # (V, H, 3, W)
    left, top, box_width, box_height = _to_device(boxes.T.astype(np.float32), device)
    columns = _weights(left, box_width, width, size).to(dtype)  # (V, S, W)
    rows = _weights(top, box_height, height, size).to(dtype)  # (V, S, H)
    across = torch.bmm(pixels.view(v, height * 3, width), columns.mT)  # (V, H·3, S)
    down = torch.bmm(rows, across.view(v, height, 3 * size))  # (V, S, 3·S)
    # Half precision may round to more than 255, which would wrap around in 8 bits.
    return down.round_().clamp_(0, 255).view(v, size, 3, size).permute(0, 2, 1, 3)


def _padded(frames: Sequence[Tensor]) -> Tensor:
    """Zero-pad the frames to (F, H, 3, W) uint8, with the largest H and W.

    In this order of dimensions, neither matrix product needs a copy.
    """
    numbers_of: dict[tuple[int, int], list[int]] = {}
    for number, frame in enumerate(frames):
        numbers_of.setdefault((frame.shape[1], frame.shape[2]), []).append(number)
    if len(numbers_of) == 1:
        return torch.stack([frame.transpose(0, 1) for frame in frames])
    tallest, widest = (max(edge) for edge in zip(*numbers_of, strict=True))
    padded = frames[0].new_zeros((len(frames), tallest, 3, widest))
    for (height, width), numbers in numbers_of.items():  # few calls, however many frames
        alike = torch.stack([frames[number].transpose(0, 1) for number in numbers])
        padded[_to_device(np.array(numbers), padded.device), :height, :, :width] = alike
    return padded


def _weights(begin: Tensor, length: Tensor, extent: int, size: int) -> Tensor:
    """Weights of PIL's antialiased bilinear filter, from ``extent`` px to S.

    Args:
        begin: (V,) first px of the box.
        length: (V,) length of the box, px.

    Returns:
        (V, S, extent) float32, rows of sum 1, zero outside the box.
    """
    begin, length = begin[:, None, None], length[:, None, None]
    scale = length / size
    px = torch.arange(extent, device=begin.device, dtype=torch.float32)
    middle = begin + (torch.arange(size, device=begin.device)[:, None] + 0.5) * scale  # (V, S, 1)
    weights = (px + 0.5) - middle  # large, so in place from here
    weights.abs_().div_(-scale.clamp_min(1)).add_(1).clamp_min_(0)
    weights.mul_((px >= begin) & (px < begin + length))
    return weights.div_(weights.sum(2, keepdim=True))


def _to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(values)), device)


_SLOTS = 4  # of the jitter; grayscale is a fifth: saturation by 0
_BLEND = 4  # numbers per slot: factor, share of gray in m, share of the mean in m, turns of hue
_CHAIN = _BLEND * (_SLOTS + 1)  # from here, a 0 or 1 per jitter slot: whether before contrast
_FLIP = _CHAIN + _SLOTS
_TAPS = _FLIP + 1  # the blur's middle tap and those on one side of it

Floats32 = NDArray[np.float32]
Core = Callable[[Tensor, Tensor, tuple[float, ...], tuple[float, ...]], Tensor]


def fused_views(
    images: Tensor,
    views: ViewParameters,
    config: ViewConfig | None = None,
    *,
    compiled: bool = True,
) -> Tensor:
    """Turn crops into normalised views like ``apply_views``, with the dense graph.

    Equal to ``apply_views`` except for rounding (1e-5) and for ``blur_radius(config)`` px at the
    edges of blurred images: PIL repeats the edge before each of three boxes, this only once. On
    textures this changes an image's mean by 0.02 (of 255) at 32 px and 0.001 at 224 px, but a
    single pixel by up to 30 where a hard edge runs along the border.

    Args:
        images: (N, 3, S, S) uint8, of any memory format; interleaved ones are not copied.
        views: of the N images.
        config: mean, standard deviation and largest sigma.
        compiled: with inductor, which recompiles for each S, but not for other draws or another
            N > 1. Uncompiled, the graph is slow: for tests.

    Returns:
        (N, 3, S, S) float32, contiguous.

    Raises:
        ValueError: a sigma is larger than the configuration's.
    """
    config = config or ViewConfig()
    parameters = torch.from_numpy(pack(views, blur_radius(config)))
    if images.device.type == "cuda":  # pinned, so that the copy does not block the host
        parameters = parameters.pin_memory().to(images.device, non_blocking=True)
    if not compiled or not len(images):
        return dense_views(images, parameters, config.mean, config.std)
    for batched in (images, parameters):
        torch._dynamo.maybe_mark_dynamic(batched, 0)
    # A change of the caller's modes would recompile: keys' views are made under autocast.
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        return _compiled()(images, parameters, config.mean, config.std)


def blur_radius(config: ViewConfig) -> int:
    """Reach in px, to either side, of three boxes of the largest sigma: 6 for a sigma of 2 px."""
    return 3 * (int(box_reach(np.array(config.blur_sigma)).max()) + 1)


def pack(views: ViewParameters, radius: int) -> Floats32:
    """Pack the parameters of N images into (N, 26 + radius) numbers for ``dense_views``.

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
    """PIL's three boxes as one kernel per image: (N, radius + 1), from the middle outwards."""
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
    """Turn (N, 3, S, S) uint8 and ``pack``'s (N, 26 + R) into (N, 3, S, S) float32 views."""
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
    """Split into red, green and blue, (N, S, S) in 0 … 1: a pixel's chain is computed once."""
    return [images[:, channel] * (1 / 255) for channel in range(3)]


def _channels(like: Tensor, values: tuple[float, ...]) -> Tensor:
    """Return one value per channel, (3, 1, 1)."""
    red, green, blue = values
    channel = torch.arange(3, device=like.device)[:, None, None]  # no constant to copy
    return torch.where(channel == 0, red, torch.where(channel == 1, green, blue)).to(like.dtype)


def _mean_before_contrast(images: Tensor, parameters: Tensor, slots: list[list[Tensor]]) -> Tensor:
    """Mean gray of each image right before its contrast step: (N, 1, 1)."""
    planes = _unit_planes(images)
    for slot in range(_SLOTS - 1):  # the last slot is never before contrast
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
    """Blend with ``middle`` or each pixel's gray; a factor of 1 must come with 0s."""
    m = of_gray * _fused_gray(planes) + middle
    return [(m + factor * (x - m)).clamp(0, 1) for x in planes]


def _turn_hue(planes: list[Tensor], turns: Tensor) -> list[Tensor]:
    """Shift HSV's hue by ``turns``, keeping value and chroma, as ``transforms._hue`` does."""
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
    """Blur (N, 3, S, S) across, then down, with (N, R + 1) halves of symmetric kernels."""
    radius = half_kernels.shape[1] - 1
    taps = half_kernels[:, :, None, None, None]
    for dim in (3, 2):
        # Clamped indices repeat the edge; a padded copy would cost a write and a read.
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
    # dynamic=False: image sizes are constants of the graph; only N is marked dynamic.
    return torch.compile(dense_views, fullgraph=True, dynamic=False)
