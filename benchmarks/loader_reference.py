"""What the loader is compared with: its physical limit, and the plain ways to make views."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.io import decode_jpeg

from seco.data.crops import FrameDecoder, Pixels, crop_resize
from seco.data.gpu_transforms import as_tensors
from seco.data.transforms import ViewConfig
from seco.data.triplets import FRAME_OF_VIEW

Decoder = Callable[[bytes], Pixels]
Resizer = Callable[[Pixels, Sequence[int], int, Pixels], None]


def decoders() -> dict[str, Decoder]:
    """Ways to an (H, W, 3) array."""
    return {
        "libjpeg-turbo, memory reused": FrameDecoder().decode,
        "libjpeg-turbo": simplejpeg.decode_jpeg,
        "libjpeg-turbo, fast DCT and chroma": lambda data: simplejpeg.decode_jpeg(
            data, fastdct=True, fastupsample=True
        ),
        "libjpeg-turbo, half the size": _half_size,
        "torchvision": _by_torchvision,
        "PIL": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
    }


def _by_torchvision(data: bytes) -> Pixels:
    decoded: Pixels = decode_jpeg(as_tensors([data])[0]).permute(1, 2, 0).numpy()
    return decoded


def _half_size(data: bytes) -> Pixels:
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    reduced: Pixels = simplejpeg.decode_jpeg(
        data, min_height=-(-height // 2), min_width=-(-width // 2), min_factor=2
    )
    return reduced


def resizers() -> dict[str, Resizer]:
    """Ways from a box of an array to an (S, S, 3) one; antialiased bilinear all of them."""

    def by_torch(image: Pixels, box: Sequence[int], size: int, out: Pixels) -> None:
        crop_resize(image, box, size, out=out)

    def by_pil(image: Pixels, box: Sequence[int], size: int, out: Pixels) -> None:
        left, top, width, height = box
        corners = (left, top, left + width, top + height)
        picture = Image.fromarray(image)
        out[:] = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=corners))

    def by_torch_floats(image: Pixels, box: Sequence[int], size: int, out: Pixels) -> None:
        left, top, width, height = box
        cut = torch.from_numpy(image[top : top + height, left : left + width])
        floats = cut.permute(2, 0, 1)[None].float()
        done = torch.nn.functional.interpolate(
            floats, (size, size), mode="bilinear", antialias=True
        )
        out[:] = done[0].round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()

    return {
        "torch, uint8": by_torch,
        "PIL": by_pil,
        "torch, floats": by_torch_floats,
    }


def limit(
    samples: Sequence[Sequence[bytes]],
    boxes: NDArray[np.int64],
    size: int,
    out: Pixels,
    decode: Decoder,
    resize: Resizer,
) -> None:
    """Three decodes and four crop-resizes a triplet and nothing else.

    Args:
        samples: (N,) three frames each.
        boxes: (4, N, 4).
        size: S.
        out: (4, n, S, S, 3), used again and again.
        decode: the kernel.
        resize: the kernel.
    """
    plain_boxes = boxes.tolist()
    for number, jpegs in enumerate(samples):
        place = number % out.shape[1]
        for frame, jpeg in enumerate(jpegs):
            image = decode(jpeg)
            for view, of in enumerate(FRAME_OF_VIEW):
                if of == frame:
                    resize(image, plain_boxes[view][number], size, out[view, place])


class PilBlur:
    """MoCo's Gaussian blur, by PIL."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self._low, self._high = sigma

    def __call__(self, picture: Image.Image) -> Image.Image:
        sigma = torch.empty(1).uniform_(self._low, self._high).item()
        return picture.filter(ImageFilter.GaussianBlur(sigma))


def plain_transform(size: int, config: ViewConfig) -> Callable[[Image.Image], torch.Tensor]:
    """A view of a PIL image as MoCo v2's and the authors' code make it: torchvision's v1."""
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=config.crop_scale, ratio=config.crop_ratio),
            transforms.RandomApply(
                [transforms.ColorJitter(*strengths)], p=config.jitter_probability
            ),
            transforms.RandomGrayscale(p=config.grayscale_probability),
            transforms.RandomApply([PilBlur(config.blur_sigma)], p=config.blur_probability),
            transforms.RandomHorizontalFlip(p=config.flip_probability),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )
    made: Callable[[Image.Image], torch.Tensor] = chain
    return made


def plain_chain(
    samples: Sequence[Sequence[bytes]], transform: Callable[[Image.Image], torch.Tensor]
) -> None:
    """Each frame opened by PIL once, four views."""
    for jpegs in samples:
        pictures = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in jpegs]
        torch.stack([transform(pictures[frame]) for frame in FRAME_OF_VIEW])


def plain_crops(size: int, config: ViewConfig) -> Callable[[Image.Image], torch.Tensor]:
    """The part of the plain chain that our loader does before the device: crop and tensor."""
    made: Callable[[Image.Image], torch.Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=config.crop_scale, ratio=config.crop_ratio),
            transforms.PILToTensor(),
        ]
    )
    return made


def streamed_by_webdataset(
    addresses: Sequence[str],
    count: int,
    transform: Callable[[Image.Image], torch.Tensor],
    *,
    decode_all: bool,
) -> None:
    """``count`` triplets by stock WebDataset, which reads whole videos.

    Args:
        addresses: of local tars.
        count: of videos.
        transform: of each view.
        decode_all: by ``decode("pil")``, as its documentation has it; else the three frames alone.
    """
    import webdataset

    pipeline = webdataset.WebDataset(list(addresses), shardshuffle=False)
    videos: Iterator[dict[str, Any]] = iter(
        (pipeline.decode("pil") if decode_all else pipeline).repeat()
    )
    for _ in range(count):
        frames: list[Any] = [data for name, data in next(videos).items() if name.endswith("jpg")]
        chosen = [frames[i] for i in sorted(torch.randperm(len(frames))[:3].tolist())]
        if not decode_all:
            chosen = [Image.open(io.BytesIO(data)).convert("RGB") for data in chosen]
        torch.stack([transform(chosen[frame]) for frame in FRAME_OF_VIEW])
