"""Decoding and cropping in batches against simplejpeg, torchvision and PIL; in steps of 1/255."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from seco.data import gpu_transforms as device_decode
from seco.data.crops import CROP_DRAWS, decode_jpeg, draw_crops
from seco.data.gpu_transforms import crop_resize_batch, decode_frames
from tests.seco.test_crops import jpeg, mean_difference, texture


def tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def planes(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def interleaved(image: Tensor | None) -> np.ndarray:
    assert image is not None
    return image.permute(1, 2, 0).cpu().numpy()


def by_pil(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    left, top, width, height = (int(px) for px in box)
    cut = TF.resized_crop(Image.fromarray(image), top, left, height, width, [size, size])
    return np.asarray(cut)


def random_boxes(rng: np.random.Generator, shapes: list[tuple[int, int]]) -> np.ndarray:
    """(n, 4): one in each frame of these widths and heights."""
    widths, heights = np.array(shapes).T
    return draw_crops(rng.random((len(shapes), CROP_DRAWS)), widths, heights)


def gray_jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert("L").save(file, "JPEG", quality=90)
    return file.getvalue()


def test_frames_are_those_of_the_loader() -> None:
    files = [jpeg(texture(n, width, 96)) for n, width in enumerate((128, 64, 128))]
    files.append(gray_jpeg(texture(4, 80, 60)))
    frames, reasons = decode_frames([tensor(data) for data in files], "cpu")
    assert not reasons
    for data, frame in zip(files, frames, strict=True):
        assert mean_difference(interleaved(frame), decode_jpeg(data)) < 0.05
    gray = interleaved(frames[3])
    assert (gray == gray[..., :1]).all()
    assert decode_frames([], "cpu") == ([], {})


def test_broken_files_are_named_and_the_others_decoded() -> None:
    whole = jpeg(texture(3, 128, 96))
    damaged = bytearray(whole)
    damaged[:2] = b"no"
    broken = (b"", b"no picture", whole[:10], whole[:300], whole[:-2], bytes(damaged))
    files = [whole, *broken, whole, whole + bytes(500)]  # the last: something appended
    frames, reasons = decode_frames([tensor(data) for data in files], "cpu")
    assert sorted(reasons) == list(range(1, 7))
    assert reasons[4] == "broken JPEG: cut short"
    assert reasons[6].startswith("broken JPEG: Not a JPEG file")
    for number, frame in enumerate(frames):
        assert (frame is None) == (number in reasons)
    for number in (7, 8):
        np.testing.assert_array_equal(interleaved(frames[number]), interleaved(frames[0]))


def test_a_thumbnail_does_not_hide_that_a_file_is_cut_short() -> None:
    whole, thumbnail = jpeg(texture(1, 128, 96)), jpeg(texture(1, 32, 24))
    exif = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = whole[:2] + exif + whole[2:]
    assert not decode_frames([tensor(data)], "cpu").reasons
    assert decode_frames([tensor(data[:-400])], "cpu").reasons == {0: "broken JPEG: cut short"}


@pytest.mark.parametrize("size", [32, 112, 224, 400])
def test_views_agree_with_torchvision_on_pil(size: int) -> None:
    rng = np.random.default_rng(size)
    shapes = [(340, 256), (256, 341), (340, 256), (500, 97), (120, 90)]
    images = [texture(n, *shape) for n, shape in enumerate(shapes)]
    frame_of_view = np.array([0, 0, 1, 2, 3, 4, 4, 1])
    boxes = random_boxes(rng, [shapes[n] for n in frame_of_view])
    boxes[3] = (0, 0, *shapes[2])  # the whole frame: its edges are the box's
    boxes[7] = (256 - 60, 341 - 40, 60, 40)  # the last corner
    views = crop_resize_batch([planes(image) for image in images], frame_of_view, boxes, size)
    assert views.shape == (8, 3, size, size)
    assert views.dtype == torch.uint8
    for view, frame, box in zip(views, frame_of_view, boxes, strict=True):
        assert mean_difference(interleaved(view), by_pil(images[frame], box, size)) < 0.3


@pytest.mark.parametrize("box", [(7, 5, 1, 1), (0, 0, 1, 48), (63, 0, 1, 48), (0, 47, 64, 1)])
def test_boxes_of_one_px(box: tuple[int, int, int, int]) -> None:
    image, boxes = texture(1, 64, 48), np.array([box])
    (view,) = crop_resize_batch([planes(image)], np.array([0]), boxes, 16)
    reference = by_pil(image, boxes[0], 16)
    assert np.abs(interleaved(view).astype(int) - reference.astype(int)).max() <= 1


def test_half_precision_is_enough() -> None:
    rng = np.random.default_rng(0)
    images = [texture(n, 340, 256) for n in range(3)]
    images.append(np.full((256, 340, 3), 255, dtype=np.uint8))  # white must stay white
    boxes = random_boxes(rng, [(340, 256)] * 4)
    frames, numbers = [planes(image) for image in images], np.arange(4)
    views = device_decode._crop_resize(frames, numbers, boxes, 64, torch.float16).to(torch.uint8)
    for view, image, box in zip(views, images, boxes, strict=True):
        assert mean_difference(interleaved(view), by_pil(image, box, 64)) < 0.5
    assert int(views[3].min()) >= 254


def test_blocks_change_nothing_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    shapes = [(120, 90), (90, 120), (64, 64), (120, 90)]
    frames: list[Tensor | None] = [planes(texture(n, *shape)) for n, shape in enumerate(shapes)]
    frames.append(None)  # broken, and not asked for
    frame_of_view = rng.integers(4, size=23)
    boxes = random_boxes(rng, [shapes[n] for n in frame_of_view])
    whole = crop_resize_batch(frames, frame_of_view, boxes, 32)
    bound = 3 * device_decode._view_bytes(120, 120, 32)
    monkeypatch.setattr(device_decode, "_BLOCK_BYTES", bound)
    blocks = list(device_decode._blocks(np.array(shapes)[frame_of_view, ::-1], 32))
    assert len(blocks) > 4
    np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), np.arange(23))
    in_blocks = crop_resize_batch(frames, frame_of_view, boxes, 32)
    assert (in_blocks.int() - whole.int()).abs().max() <= 1  # sums in another order, rounded


def test_mistaken_boxes_are_refused() -> None:
    frames: list[Tensor | None] = [planes(texture(0, 64, 48)), None]
    for box in ((-1, 0, 8, 8), (0, 0, 0, 8), (60, 0, 5, 8), (0, 41, 8, 8)):
        with pytest.raises(ValueError, match=r"view 1: box .* is not inside frame 0 of 64x48"):
            crop_resize_batch(frames, np.zeros(2, int), np.array([(0, 0, 8, 8), box]), 16)
    with pytest.raises(ValueError, match="frame 1 of 0x0"):
        crop_resize_batch(frames, np.array([1]), np.array([(0, 0, 8, 8)]), 16)
    assert crop_resize_batch(frames, np.array([], int), np.empty((0, 4), int), 16).shape[0] == 0


@pytest.mark.gpu
def test_a_gpu_decodes_the_same_frames() -> None:
    """Chroma of 4:2:0 files is repeated, not interpolated: textures have hard colour edges."""
    whole = [jpeg(texture(n, width, 96)) for n, width in enumerate((128, 64, 128))]
    files = [*whole, whole[0][:300], b"no picture", gray_jpeg(texture(4, 80, 60))]
    frames, reasons = decode_frames([tensor(data) for data in files], "cuda")
    assert sorted(reasons) == [3, 4]
    for number in (0, 1, 2, 5):
        apart = mean_difference(interleaved(frames[number]), decode_jpeg(files[number]))
        assert apart < (1.0 if number == 5 else 4.0)


@pytest.mark.gpu
def test_a_gpu_crops_the_same_views() -> None:
    rng = np.random.default_rng(2)
    shapes = [(340, 256), (256, 341), (120, 90)]
    images = [texture(n, *shape) for n, shape in enumerate(shapes)]
    frame_of_view = rng.integers(3, size=12)
    boxes = random_boxes(rng, [shapes[n] for n in frame_of_view])
    frames = [planes(image).cuda() for image in images]
    views = crop_resize_batch(frames, frame_of_view, boxes, 112)
    assert views.device.type == "cuda"
    for view, frame, box in zip(views, frame_of_view, boxes, strict=True):
        assert mean_difference(interleaved(view), by_pil(images[frame], box, 112)) < 1.0
