"""Frames decoded and cropped on the training device, a batch at a time (``--decode nvjpeg``).

The loader's processes then read bytes and draw boxes, no more. Frames differ a little from those of
the CPU: nvJPEG repeats the chroma samples of subsampled (4:2:0) files where libjpeg-turbo
interpolates between them (which alone makes 1.3 to 1.6 of 255 in the mean on textures with hard
colour edges), and its inverse DCT rounds differently. Gray values should agree to 1.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from seco.processes.device import to_device

_END, _SCAN = b"\xff\xd9", b"\xff\xda"  # markers that cannot occur within a scan's data
_TAIL_BYTES = 64  # a whole file has its end marker here, unless something was appended
_BLOCK_BYTES = 2**31  # of temporary memory

Ints = NDArray[np.integer[Any]]


class DecodedFrames(NamedTuple):
    """What came of a list of JPEG files."""

    frames: list[Tensor | None]  # (3, H, W) uint8 RGB on the device; None for a broken file
    reasons: dict[int, str]  # why, for the numbers of the broken ones


def as_tensors(jpegs: Sequence[bytes]) -> list[Tensor]:
    """Each file's bytes as 1-D uint8, views of one copy: torch wants memory it could write to."""
    memory = torch.frombuffer(bytearray(b"".join(jpegs)), dtype=torch.uint8)
    return list(memory.split([len(jpeg) for jpeg in jpegs]))


def decode_frames(jpegs: Sequence[Tensor], device: torch.device | str) -> DecodedFrames:
    """Decode JPEG files in one call; by nvJPEG where the device is a GPU.

    Gray files come out with three equal channels.

    Args:
        jpegs: the files' bytes, 1-D uint8 on the CPU.
        device: where the frames are wanted.
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
    """The frames that can be decoded; the call gives none when one fails, so halves are tried."""
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
    # torchvision allocates for the current stream and decodes on its own, which does not wait for
    # that one: it could write to memory that the host has freed and queued kernels still read. The
    # memory of a stream that does nothing else is free only when those who read it are done.
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
    """Whether the last scan has no end. nvJPEG may fill what is missing with gray and not say so.

    A thumbnail in the header has markers of its own, but before the image's scans.
    """
    if _END in jpeg[-_TAIL_BYTES:].numpy().tobytes():
        return False
    data = jpeg.numpy().tobytes()
    return data.rfind(_END) <= data.rfind(_SCAN)


def _reason(error: RuntimeError) -> str:
    """torchvision's message on one line, without the place in its C++ that it begins with."""
    line = str(error).partition("\n")[0]
    return re.sub(r"^\w+, \S+:\d+, ", "", line)[:200] or type(error).__name__


def crop_resize_batch(
    frames: Sequence[Tensor | None], frame_of_view: Ints, boxes: Ints, size: int
) -> Tensor:
    """Cut a box out of a frame for each of V views and resize it to S × S.

    Bilinear with antialiasing as PIL does it: on average within 0.2 (of 255) of torchvision's
    ``resized_crop`` on PIL images. As two matrix products a view, with the weights of its rows and
    of its columns; these are zero outside the box, so all views of a block have one shape.

    Args:
        frames: (3, H, W) uint8, of any sizes, on one device; those without views may be None.
        frame_of_view: (V,) numbers of frames.
        boxes: (V, 4) left, top, width, height in px, inside the frames.
        size: S, px.

    Returns:
        (V, 3, S, S) uint8 on the frames' device.

    Raises:
        ValueError: a view of no frame, or a box that leaves its frame.
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
    """(V, 2) height and width of each view's frame, after a check of the boxes."""
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
    """Numbers of views, those of like frames together, whose temporaries fit ``_BLOCK_BYTES``."""
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
    """Of temporaries a view: pixels in 8 bits (twice) and as floats, weights, both products."""
    weights = size * (height + width) * (4 + 4 + 4)
    products = 3 * size * (height + 2 * size) * 4
    return 3 * height * width * (1 + 1 + 4) + weights + products


def _crop_resize(
    frames: Sequence[Tensor | None], frame_of_view: Ints, boxes: Ints, size: int, dtype: torch.dtype
) -> Tensor:
    """(V, 3, S, S) of integer values of ``dtype``, for views that fit into memory together."""
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
    # Half precision may pass 255 by a rounding, and 8 bits would begin anew at 0.
    return down.round_().clamp_(0, 255).view(v, size, 3, size).permute(0, 2, 1, 3)


def _padded(frames: Sequence[Tensor]) -> Tensor:
    """(F, H, 3, W) uint8 with zeros beyond each frame, H and W the largest.

    Rows outside and channels inside, so that both matrix products find theirs without a copy.
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
    """PIL's antialiased bilinear filter: how much of each of ``extent`` px makes each of S.

    Args:
        begin: (V,) first px of the box.
        length: (V,) px of the box.

    Returns:
        (V, S, extent) float32, rows of sum 1, zero outside the box.
    """
    begin, length = begin[:, None, None], length[:, None, None]
    scale = length / size
    px = torch.arange(extent, device=begin.device, dtype=torch.float32)
    middle = begin + (torch.arange(size, device=begin.device)[:, None] + 0.5) * scale  # (V, S, 1)
    weights = (px + 0.5) - middle  # in place from here: it is large
    weights.abs_().div_(-scale.clamp_min(1)).add_(1).clamp_min_(0)
    weights.mul_((px >= begin) & (px < begin + length))
    return weights.div_(weights.sum(2, keepdim=True))


def _to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(values)), device)
