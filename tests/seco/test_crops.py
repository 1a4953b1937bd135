"""Decoding and cropping against torchvision and PIL. Differences are in steps of 8 bits (1/255)."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torchvision import transforms

from seco.data.crops import (
    CROP_DRAWS,
    CROP_SCALE,
    BrokenJpeg,
    CropParameters,
    FrameDecoder,
    center_crop,
    crop_resize,
    decode_jpeg,
    draw_crops,
    jpeg_size,
)


def texture(seed: int, width: int, height: int) -> np.ndarray:
    """Smooth colours, hard edges and some noise: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), 3)).astype(float)
    for _ in range(6):
        left, top = rng.integers(width - 8), rng.integers(height - 8)
        w, h = rng.integers(8, width // 2), rng.integers(8, height // 2)
        image[top : top + h, left : left + w] = rng.integers(0, 256, 3)
    image += rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def jpeg(image: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="420")


def boxes(
    seed: int, width: int, height: int, count: int, scale: tuple[float, float] = CROP_SCALE
) -> np.ndarray:
    """(count, 4) left, top, width, height."""
    uniform = np.random.default_rng(seed).random((count, CROP_DRAWS))
    return draw_crops(uniform, np.full(count, width), np.full(count, height), scale)


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest gap between the two distribution functions."""
    points = np.concatenate([a, b])
    cdfs = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return float(np.abs(cdfs[0] - cdfs[1]).max())


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [
        (340, 256, (0.2, 1.0)),
        (256, 455, (0.2, 1.0)),
        (900, 100, (0.2, 1.0)),  # often no box fits, so the centre is taken
        (100, 900, (0.9, 1.0)),  # never does one fit
    ],
)
def test_crops_are_distributed_as_torchvisions(
    width: int, height: int, scale: tuple[float, float]
) -> None:
    ours = boxes(1, width, height, 4000, scale)
    torch.manual_seed(1)
    blank = torch.empty(3, height, width)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3])
            for _ in range(4000)
        ]
    )[:, [1, 0, 3, 2]]  # top, left, height, width
    # 0.03 is what samples of 4000 from one distribution exceed once in 20 at the most.
    for number, name in enumerate(CropParameters._fields):
        assert ks_distance(ours[:, number], theirs[:, number]) < 0.03, name
    for of in (lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 2] * b[:, 3]):  # ratio, area
        assert ks_distance(of(ours), of(theirs)) < 0.03
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= width).all()
    assert (ours[:, 1] + ours[:, 3] <= height).all()


def test_a_crop_does_not_depend_on_its_neighbours() -> None:
    uniform = np.random.default_rng(3).random((6, CROP_DRAWS))
    widths, heights = np.array([340, 256, 900, 3, 1, 340]), np.array([256, 455, 100, 2, 1, 256])
    together = draw_crops(uniform, widths, heights)
    for row in range(6):
        one = slice(row, row + 1)
        alone = draw_crops(uniform[one], widths[one], heights[one])
        np.testing.assert_array_equal(alone, together[one])
    assert (together[:, 2:] >= 1).all()


@pytest.mark.parametrize("size", [32, 64, 112, 224])
def test_crop_resize_agrees_with_torchvision_on_pil(size: int) -> None:
    for seed, drawn in enumerate(boxes(size, 340, 256, 5)):
        image = texture(seed, 340, 256)
        box = CropParameters(*drawn.tolist())
        pil = transforms.functional.resized_crop(
            Image.fromarray(image), box.top, box.left, box.height, box.width, [size, size]
        )
        reference, ours = np.asarray(pil), crop_resize(image, box, size)
        assert mean_difference(ours, reference) < 0.25
        assert np.abs(ours.astype(int) - reference.astype(int)).max() <= 1


def test_crop_resize_writes_where_it_is_told_and_nowhere_else() -> None:
    image, box = texture(1, 340, 256), CropParameters(20, 30, 200, 150)
    batch = np.full((3, 64, 64, 3), 7, dtype=np.uint8)
    assert crop_resize(image, box, 64, out=batch[1]).base is batch
    np.testing.assert_array_equal(batch[1], crop_resize(image, box, 64))
    assert (batch[[0, 2]] == 7).all()


def test_frame_decoder_gives_what_decode_jpeg_gives() -> None:
    decoder = FrameDecoder()
    for width, height in ((64, 48), (340, 256), (120, 80)):  # grows, then uses a part
        data = jpeg(texture(width, width, height))
        np.testing.assert_array_equal(decoder.decode(data), decode_jpeg(data))
        assert jpeg_size(data) == (width, height)
    with pytest.raises(BrokenJpeg, match="of 300 bytes"):
        decoder.decode(jpeg(texture(3, 128, 96))[:300])


@pytest.mark.parametrize(
    ("width", "height"), [(340, 256), (256, 341), (301, 411), (500, 97), (225, 224)]
)
@pytest.mark.parametrize(("short_edge", "size"), [(256, 224), (36, 32), (224, 224)])
def test_center_crop_equals_torchvision_on_pil(
    width: int, height: int, short_edge: int, size: int
) -> None:
    image = texture(7, width, height)
    chain = transforms.Compose([transforms.Resize(short_edge), transforms.CenterCrop(size)])
    reference = np.asarray(chain(Image.fromarray(image)))
    np.testing.assert_array_equal(center_crop(image, short_edge, size), reference)


def test_center_crop_larger_than_the_short_edge_is_refused() -> None:
    with pytest.raises(ValueError, match="224 px does not fit"):
        center_crop(texture(0, 64, 48), 200, 224)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoding_equals_pil(mode: str) -> None:
    file = io.BytesIO()
    Image.fromarray(texture(2, 341, 255)).convert(mode).save(file, "JPEG", quality=90)
    reference = np.asarray(Image.open(file).convert("RGB"))
    assert mean_difference(decode_jpeg(file.getvalue()), reference) < 0.05


def test_broken_jpegs_are_told_apart() -> None:
    data = jpeg(texture(3, 128, 96))
    for broken in (b"", b"no picture", data[:10], data[:300], data[: len(data) // 2], data[:-2]):
        with pytest.raises(BrokenJpeg, match=f"of {len(broken)} bytes"):
            decode_jpeg(broken)
