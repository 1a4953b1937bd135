"""The batched views against torchvision and PIL, image by image, on the same parameters.

Differences are means in steps of 8 bits (1/255). torchvision's operations on float images are met
to 0.001. PIL cuts to 8 bits after every operation and has 8 bits of hue: torchvision's own float
operations are 0.4 apart from it for one operation, 0.8 (at worst 1.4) for hue and 1.6 (at worst
2.6) for four in a row, and so are these. PIL's blur is met to its rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF

from seco.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VIEW_DRAWS,
    ViewConfig,
    ViewParameters,
    apply_views,
    box_kernels,
    draw_views,
    normalise,
)

PLAIN = ViewConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # leaves pixels in 0 … 1
NEVER: dict[str, float] = {
    "jitter_probability": 0,
    "grayscale_probability": 0,
    "blur_probability": 0,
    "flip_probability": 0,
}
STRENGTHS = ("brightness", "contrast", "saturation", "hue")
ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def textures(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth colours, hard edges, pure and gray patches, noise: (count, 3, size, size) uint8."""
    rng = np.random.default_rng(seed)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for image in images:
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((size, size), 3)).astype(float)
        for patch in range(5):
            left, top = rng.integers(size - 4, size=2)
            colour = rng.integers(0, 256, 3) if patch else rng.integers(0, 256)
            smooth[top : top + size // 3, left : left + size // 3] = colour
        noisy = smooth + rng.normal(0, 3, smooth.shape)
        noisy[: size // 8] = (255, 0, 0)
        noisy[-size // 8 :] = 90
        image[...] = noisy.clip(0, 255)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def uniform(count: int, seed: int = 0) -> np.ndarray:
    """(count, 13), the rows independent of their number."""
    return np.stack([np.random.default_rng([seed, row]).random(VIEW_DRAWS) for row in range(count)])


def drawn(count: int, seed: int = 0, **changes: Any) -> ViewParameters:
    return draw_views(uniform(count, seed), dataclasses.replace(PLAIN, **changes))


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def jitter(image: Any, views: ViewParameters, number: int) -> Any:
    """torchvision's ColorJitter on a PIL image or a float tensor."""
    for op in views.order[number]:
        image = ADJUST[op](image, float(getattr(views, STRENGTHS[op])[number]))
    return image


def steps_apart(ours: Tensor, reference: Tensor) -> float:
    """Mean absolute difference in 1/255."""
    assert ours.shape == reference.shape
    return float((ours - reference).abs().mean()) * 255


def only(op: int) -> dict[str, Any]:
    """Settings that draw nothing but one of the four jitter operations."""
    strengths = dict.fromkeys(STRENGTHS, 0.0)
    return {**NEVER, "jitter_probability": 1, **strengths, STRENGTHS[op]: (0.4, 0.4, 0.4, 0.1)[op]}


@pytest.mark.parametrize("op", range(4), ids=STRENGTHS)
def test_each_jitter_operation_equals_torchvisions(op: int) -> None:
    images = textures(24, 40)
    views = drawn(24, **only(op))
    ours = apply_views(images, views, PLAIN)
    factors = getattr(views, STRENGTHS[op])
    from_pils = []
    for number, image in enumerate(images):
        on_floats = ADJUST[op](image / 255, float(factors[number]))
        on_pil = from_pil(ADJUST[op](to_pil(image), float(factors[number])))
        assert steps_apart(ours[number], on_floats) < 0.001
        assert steps_apart(ours[number], image / 255) > 0.02  # something was done
        from_pils.append(steps_apart(ours[number], on_pil))
    assert np.mean(from_pils) < 1.0
    assert max(from_pils) < (1.6 if op == 3 else 1.0)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.25, 0.5])
def test_hue_of_every_kind_of_colour(turns: float) -> None:
    levels = torch.tensor([0, 1, 100, 254, 255], dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 5, 25)
    views = dataclasses.replace(drawn(1, **only(3)), hue=np.array([turns]))
    reference = TF.adjust_hue(colours / 255, turns)
    torch.testing.assert_close(apply_views(colours, views, PLAIN), reference, atol=1e-5, rtol=0)


def test_jitter_in_each_images_own_order() -> None:
    images = textures(64, 32)
    views = drawn(64, **NEVER | {"jitter_probability": 0.8})
    assert 5 < (~views.jitter).sum() < 25
    assert len(np.unique(views.order, axis=0)) > 15
    ours = apply_views(images, views, PLAIN)
    from_floats, from_pils = [], []
    for number, image in enumerate(images):
        if views.jitter[number]:
            from_floats.append(steps_apart(ours[number], jitter(image / 255, views, number)))
            reference = from_pil(jitter(to_pil(image), views, number))
            from_pils.append(steps_apart(ours[number], reference))
        else:
            torch.testing.assert_close(ours[number], image / 255, atol=1e-6, rtol=0)
    assert max(from_floats) < 0.001
    assert np.mean(from_pils) < 2.0
    assert max(from_pils) < 3.0


def test_grayscale_equals_torchvisions() -> None:
    images = textures(16, 32)
    views = drawn(16, **NEVER | {"grayscale_probability": 0.5})
    assert 0 < views.grayscale.sum() < 16
    ours = apply_views(images, views, PLAIN)
    for number, image in enumerate(images):
        gray = views.grayscale[number]
        reference = from_pil(TF.to_grayscale(to_pil(image), 3) if gray else to_pil(image))
        assert steps_apart(ours[number], reference) < 0.6
        if gray:
            on_floats = TF.rgb_to_grayscale(image / 255, 3)
            torch.testing.assert_close(ours[number], on_floats, atol=1e-6, rtol=0)


def test_flip_is_exact() -> None:
    images = textures(16, 32)
    views = drawn(16, **NEVER | {"flip_probability": 0.5})
    assert 0 < views.flip.sum() < 16
    reference = images.clone()
    reference[views.flip] = reference[views.flip].flip(-1)
    assert torch.equal(apply_views(images, views), normalise(reference))


@pytest.mark.parametrize("size", [32, 64])
def test_blur_equals_pils(size: int) -> None:
    images = textures(32, size)
    views = drawn(32, **NEVER | {"blur_probability": 1})
    assert views.sigma.min() < 0.4
    assert views.sigma.max() > 1.7
    ours = apply_views(images, views, PLAIN)
    from_gaussians = []
    for number, image in enumerate(images):
        sigma = float(views.sigma[number])
        by_pil = from_pil(to_pil(image).filter(ImageFilter.GaussianBlur(sigma)))
        assert steps_apart(ours[number], by_pil) < 0.8
        assert float((ours[number] - by_pil).abs().max()) * 255 < 4  # at the edges too
        gaussian = TF.gaussian_blur(image / 255, [13, 13], [sigma, sigma])
        from_gaussians.append(steps_apart(ours[number], gaussian))
    assert np.mean(from_gaussians) < 1.0


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.41, 1.42, 2.0, 3.5])
def test_three_boxes_have_the_variance_asked_for(sigma: float) -> None:
    (box,) = box_kernels(np.array([sigma]))
    kernel = np.convolve(np.convolve(box, box), box)
    offsets = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1)
    assert (kernel * offsets**2).sum() == pytest.approx(sigma**2)
    np.testing.assert_allclose(kernel, kernel[::-1], atol=1e-15)


def authors_chain(image: Tensor, views: ViewParameters, number: int) -> Tensor:
    """The chain of the authors' code after the crop, on PIL images."""
    picture = to_pil(image)
    if views.jitter[number]:
        picture = jitter(picture, views, number)
    if views.grayscale[number]:
        picture = TF.to_grayscale(picture, 3)
    if views.blur[number]:
        picture = picture.filter(ImageFilter.GaussianBlur(float(views.sigma[number])))
    if views.flip[number]:
        picture = TF.hflip(picture)
    return TF.normalize(TF.to_tensor(picture), IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("size", [32, 64])
def test_whole_chain_equals_the_authors(size: int) -> None:
    images = textures(64, size)
    views = draw_views(uniform(64))
    ours = apply_views(images, views)
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    apart = [
        steps_apart(ours[number] * std, authors_chain(image, views, number) * std)
        for number, image in enumerate(images)
    ]
    assert np.mean(apart) < 1.7
    assert max(apart) < 3.0


def test_normalise_is_torchvisions() -> None:
    images = textures(4, 24)
    reference = TF.normalize(images / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(normalise(images), reference, atol=1e-5, rtol=0)


def test_same_seeds_same_views_and_inputs_untouched() -> None:
    images = textures(16, 32)
    before = images.clone()
    first, again, other = (apply_views(images, draw_views(uniform(16, seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)
    everything = dict.fromkeys(NEVER, 1.0)  # every image in every group: nothing is moved
    apply_views(images, drawn(16, **everything))
    assert torch.equal(images, before)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    images, views = textures(24, 32), drawn(24)
    together = apply_views(images, views)
    alone = torch.cat(
        [apply_views(images[i : i + 1], views.select(np.array([i]))) for i in range(24)]
    )
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    mixed = np.random.default_rng(0).permutation(24)
    rearranged = apply_views(images[mixed], views.select(mixed))
    torch.testing.assert_close(rearranged, together[mixed], atol=1e-5, rtol=0)


def test_large_batches_are_cut_into_blocks_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    images, views = textures(23, 32), drawn(23)
    whole = apply_views(images, views)
    # 5, 5, 5, 5 and 3 images
    monkeypatch.setattr("seco.data.transforms._CPU_BLOCK_PX", 5 * 32 * 32 - 1)
    torch.testing.assert_close(apply_views(images, views), whole, atol=1e-5, rtol=0)


def test_mistaken_inputs_are_refused() -> None:
    images, views = textures(4, 16), drawn(3)
    with pytest.raises(ValueError, match="4 images, but parameters for 3"):
        apply_views(images, views)
    with pytest.raises(ValueError, match="uint8"):
        apply_views(images[:3].float(), views)


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest gap between the two distribution functions."""
    points = np.concatenate([a, b])
    cdfs = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return float(np.abs(cdfs[0] - cdfs[1]).max())


def test_jitter_is_distributed_as_torchvisions() -> None:
    count = 4000
    ours = draw_views(uniform(count))
    torch.manual_seed(0)
    colour = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = [
        colour.get_params(colour.brightness, colour.contrast, colour.saturation, colour.hue)
        for _ in range(count)
    ]
    for number, name in enumerate(STRENGTHS, start=1):
        drawn_by_torchvision = np.array([parameters[number] for parameters in theirs])
        assert ks_distance(getattr(ours, name), drawn_by_torchvision) < 0.035, name
    places = 4 ** np.arange(4)
    orders = np.unique(ours.order @ places, return_counts=True)[1]
    their_orders = np.array([parameters[0].tolist() for parameters in theirs]) @ places
    assert len(orders) == len(np.unique(their_orders)) == 24
    expected = count / 24
    assert ((orders - expected) ** 2 / expected).sum() < 45  # chi², 23 degrees: p = 0.004


def test_probabilities_and_ranges_are_the_authors() -> None:
    count = 8000
    views = draw_views(uniform(count, seed=3))
    for name, probability in [("jitter", 0.8), ("grayscale", 0.2), ("blur", 0.5), ("flip", 0.5)]:
        deviation = np.sqrt(probability * (1 - probability) / count)
        assert abs(getattr(views, name).mean() - probability) < 4 * deviation, name
    assert ks_distance(views.sigma, np.linspace(0.1, 2.0, count)) < 0.025
    assert views.sigma.min() >= 0.1
    flags = np.array([views.jitter, views.grayscale, views.blur, views.flip], dtype=float)
    assert np.abs(np.corrcoef(flags) - np.eye(4)).max() < 0.05  # drawn independently


@pytest.mark.gpu
def test_a_gpu_gives_the_same_views() -> None:
    images, views = textures(64, 32), draw_views(uniform(64))
    # Regrouped on both: the fused graph, a GPU's default, has other borders of blurred images.
    on_gpu = apply_views(images.cuda(), views, fused=False).cpu()
    on_cpu = apply_views(images, views, fused=False)
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=0)
