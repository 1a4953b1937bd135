"""``seco bench views``: the kernels a view is made of, and the device part in batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import loader_reference as reference
from benchmarks.measuring import in_turns, machine
from seco.data.crops import draw_crops
from seco.data.transforms import VIEW_DRAWS, ViewConfig, apply_views, draw_views
from seco.processes.device import resolve_device, wall_milliseconds
from shards.errors import InputError
from shards.opening import open_shards
from shards.progress import progress

_CROP_SIZE = 224
_FRAMES = 48


@dataclass
class ViewsBench:
    """Medians: microseconds of CPU a frame or view, milliseconds of the device a batch."""

    machine: dict[str, Any]
    repeats: int
    decode: dict[str, float] = field(default_factory=dict)
    resize: dict[str, float] = field(default_factory=dict)
    plain: dict[str, float] = field(default_factory=dict)
    device: dict[str, float] = field(default_factory=dict)


def bench_views(
    spec: tuple[str, ...], repeats: int = 5, *, device: str = "auto", batch: int | None = None
) -> ViewsBench:
    """Measure on frames of local shards.

    Args:
        spec: of the shards.
        repeats: measurements of each figure.
        device: where the device part is measured.
        batch: images of it; 2,048 on a GPU, 64 elsewhere.
    """
    if repeats < 1 or (batch is not None and batch < 1):
        raise InputError("must be 1 or more", "--repeats, --batch")
    where = resolve_device(device)
    torch.set_num_threads(1)
    names = ["torch", "torchvision", "simplejpeg", "pillow", "pillow-simd", "numpy"]
    found = ViewsBench(machine(*names), repeats)
    if where.type == "cuda":
        found.machine["gpu"] = torch.cuda.get_device_name(where)
    shards = open_shards(spec)
    videos = np.linspace(0, len(shards) - 1, _FRAMES).astype(int)
    jpegs = [
        shards.read_frame(int(v), i % shards.frame_count(int(v))) for i, v in enumerate(videos)
    ]
    decoders = reference.decoders()
    images = [np.array(decoders["libjpeg-turbo"](jpeg)) for jpeg in jpegs]
    sizes = np.array([image.shape[1::-1] for image in images])
    uniform = np.random.default_rng(0).random((len(images), 22))
    boxes = draw_crops(uniform, sizes[:, 0], sizes[:, 1]).tolist()
    with progress("bench views", 4, "steps") as bar:
        found.decode = _per_item(
            {name: functools.partial(_each, decode, jpegs) for name, decode in decoders.items()},
            repeats,
        )
        bar.advance()
        out = np.empty((_CROP_SIZE, _CROP_SIZE, 3), dtype=np.uint8)

        def resized(resize: reference.Resizer) -> None:
            for image, box in zip(images, boxes, strict=True):
                resize(image, box, _CROP_SIZE, out)

        resizers = reference.resizers()
        found.resize = _per_item(
            {name: functools.partial(resized, resize) for name, resize in resizers.items()}, repeats
        )
        bar.advance()
        config = ViewConfig()
        pictures = [Image.fromarray(image) for image in images]
        chain = reference.plain_transform(_CROP_SIZE, config)
        crops = reference.plain_crops(_CROP_SIZE, config)
        found.plain = _per_item(
            {
                "plain chain without decoding": lambda: _each(chain, pictures),
                "its crop alone": lambda: _each(crops, pictures),
            },
            repeats,
        )
        bar.advance()
        found.device = _device_part(where, batch or (2048 if where.type == "cuda" else 64), repeats)
        if where.type == "cuda":
            found.device |= _nvjpeg(jpegs, boxes, where, repeats)
        bar.advance()
    return found


def _each(work: Callable[[Any], object], items: list[Any]) -> None:
    for item in items:
        work(item)


def _per_item(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Microseconds of CPU."""
    return {name: 1e3 * cost / _FRAMES for name, cost in in_turns(ways, repeats).items()}


def _device_part(device: torch.device, batch: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a batch: in groups, and as one compiled graph."""
    rng = np.random.default_rng(0)
    crops = torch.from_numpy(
        rng.integers(0, 256, (batch, _CROP_SIZE, _CROP_SIZE, 3), dtype=np.uint8)
    )
    images = crops.permute(0, 3, 1, 2).to(device)
    views = draw_views(rng.random((batch, VIEW_DRAWS)))
    ways: dict[str, Callable[[], object]] = {
        "regrouped": lambda: apply_views(images, views, fused=False),
        "one compiled graph": lambda: apply_views(images, views, fused=True),
    }
    if device.type == "cuda":
        pinned = crops.pin_memory()
        ways["copy to the device"] = lambda: pinned.to(device, non_blocking=True)
    for work in ways.values():
        for _ in range(3):
            work()
    found = in_turns(ways, max(repeats, 5), lambda work: wall_milliseconds(work, device))
    return {"images": batch, **{f"{name}_ms": value for name, value in found.items()}}


def _nvjpeg(
    jpegs: list[bytes], boxes: list[list[int]], device: torch.device, repeats: int
) -> dict[str, float]:
    """A batch of 512 triplets decoded and cropped on the device."""
    from seco.data.gpu_transforms import as_tensors, crop_resize_batch, decode_frames

    triplets = 512
    files = as_tensors([jpegs[i % _FRAMES] for i in range(3 * triplets)])
    frame_of_view = np.arange(4 * triplets) % (3 * triplets)
    of_view = np.array([boxes[i % _FRAMES] for i in frame_of_view])
    frames = decode_frames(files, device).frames
    ways = {
        "nvjpeg decode of 1,536 frames": lambda: decode_frames(files, device),
        "crop-resize of 2,048 views": lambda: crop_resize_batch(
            frames, frame_of_view, of_view, _CROP_SIZE
        ),
    }
    found = in_turns(ways, max(repeats, 5), lambda work: wall_milliseconds(work, device))
    return {f"{name}_ms": value for name, value in found.items()}
