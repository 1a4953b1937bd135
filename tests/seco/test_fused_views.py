"""The dense graph of the views against ``apply_views``, image by image, on the same parameters.

Differences are means in steps of 8 bits (1/255). The two agree to rounding but at the edges of
blurred images, where PIL repeats the edge before each of three boxes and this once before all.
"""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import ImageFilter
from torch import Tensor

from seco.data import gpu_transforms as fused
from seco.data.gpu_transforms import blur_radius, dense_views, fused_views, pack
from seco.data.transforms import (
    IMAGENET_STD,
    ViewConfig,
    ViewParameters,
    apply_views,
    draw_views,
    normalise,
)
from seco.processes import device as compiler
from tests.data import lacking
from tests.seco.test_augment import (
    ADJUST,
    NEVER,
    PLAIN,
    STRENGTHS,
    authors_chain,
    drawn,
    from_pil,
    only,
    steps_apart,
    textures,
    to_pil,
    uniform,
)


def dense(images: Tensor, views: ViewParameters, config: ViewConfig = PLAIN) -> Tensor:
    return fused_views(images, views, config, compiled=False)


def assert_equal_views(ours: Tensor, reference: Tensor, views: ViewParameters) -> None:
    """Image by image, and without the edges of those that are blurred."""
    radius = blur_radius(PLAIN)
    inside = slice(radius, -radius)
    for number in range(len(ours)):
        a, b = ours[number], reference[number]
        if views.blur[number]:
            assert steps_apart(a, b) < 0.5  # edges and all; 0.02 for most
            a, b = a[:, inside, inside], b[:, inside, inside]
        assert steps_apart(a, b) < 0.02
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_dense_graph_gives_the_views_of_apply_views(seed: int) -> None:
    images, views = textures(64, 40, seed), drawn(64, seed)
    for flags in (views.jitter, views.grayscale, views.blur, views.flip):
        assert 0 < flags.sum() < 64
    assert len(np.unique(views.order, axis=0)) > 15
    assert_equal_views(dense(images, views), apply_views(images, views, PLAIN), views)


@pytest.mark.parametrize("op", range(4), ids=STRENGTHS)
def test_each_jitter_operation_equals_torchvisions(op: int) -> None:
    images, views = textures(24, 40), drawn(24, **only(op))
    ours = dense(images, views)
    for number, image in enumerate(images):
        factor = float(getattr(views, STRENGTHS[op])[number])
        assert steps_apart(ours[number], ADJUST[op](image / 255, factor)) < 0.001
        assert steps_apart(ours[number], image / 255) > 0.02  # something was done


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.25, 0.5])
def test_hue_of_every_kind_of_colour(turns: float) -> None:
    levels = torch.tensor([0, 1, 100, 254, 255], dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 5, 25)
    views = dataclasses.replace(drawn(1, **only(3)), hue=np.array([turns]))
    reference = apply_views(colours, views, PLAIN)
    torch.testing.assert_close(dense(colours, views), reference, atol=1e-5, rtol=0)


def test_images_that_nothing_is_drawn_for_pass_unchanged() -> None:
    images = textures(8, 24)
    ours = dense(images, drawn(8, **NEVER), ViewConfig())
    torch.testing.assert_close(ours, normalise(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["flip", "grayscale"])
def test_flip_and_grayscale_alone(name: str) -> None:
    images, views = textures(16, 32), drawn(16, **NEVER | {f"{name}_probability": 0.5})
    assert 0 < getattr(views, name).sum() < 16
    torch.testing.assert_close(
        dense(images, views), apply_views(images, views, PLAIN), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("size", [32, 64])
def test_blur_is_pils_but_for_the_edges(size: int) -> None:
    images, views = textures(32, size), drawn(32, **NEVER | {"blur_probability": 1})
    assert views.sigma.min() < 0.4
    assert views.sigma.max() > 1.7
    ours = dense(images, views)
    for number, image in enumerate(images):
        blurred = to_pil(image).filter(ImageFilter.GaussianBlur(float(views.sigma[number])))
        by_pil = from_pil(blurred)
        assert steps_apart(ours[number], by_pil) < 1.5
        inside = slice(6, size - 6)
        apart = ours[number][:, inside, inside] - by_pil[:, inside, inside]
        assert float(apart.abs().mean()) * 255 < 0.8  # PIL's rounding, as in test_augment
        assert float(apart.abs().max()) * 255 < 4


def test_blur_of_images_smaller_than_its_reach() -> None:
    flat = torch.tensor([10, 200, 90], dtype=torch.uint8)[None, :, None, None].expand(5, 3, 4, 4)
    views = drawn(5, **NEVER | {"blur_probability": 1})
    torch.testing.assert_close(dense(flat, views), flat / 255, atol=1e-6, rtol=0)


def test_whole_chain_equals_the_authors() -> None:
    images, views = textures(64, 64), draw_views(uniform(64))
    ours = dense(images, views, ViewConfig())
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    apart = [
        steps_apart(ours[number] * std, authors_chain(image, views, number) * std)
        for number, image in enumerate(images)
    ]
    assert np.mean(apart) < 1.7
    assert max(apart) < 3.0


def test_an_image_does_not_depend_on_its_neighbours_or_its_memory() -> None:
    images, views = textures(24, 32), drawn(24)
    together = dense(images, views)
    mixed = np.random.default_rng(0).permutation(24)
    rearranged = dense(images[mixed], views.select(mixed))
    torch.testing.assert_close(rearranged, together[mixed], atol=1e-6, rtol=0)
    alone = dense(images[3:4], views.select(np.array([3])))
    torch.testing.assert_close(alone, together[3:4], atol=1e-6, rtol=0)
    interleaved = dense(images.contiguous(memory_format=torch.channels_last), views)
    torch.testing.assert_close(interleaved, together, atol=1e-6, rtol=0)
    assert interleaved.is_contiguous()


def test_the_number_of_taps_follows_the_configuration() -> None:
    assert blur_radius(PLAIN) == 6
    wide = dataclasses.replace(PLAIN, blur_sigma=(0.1, 4.0))
    images, views = textures(8, 48), drawn(8, blur_sigma=(3.0, 4.0), blur_probability=1)
    radius = blur_radius(wide)
    assert pack(views, radius).shape == (8, 26 + radius)
    inside = slice(radius, -radius)
    apart = dense(images, views, wide) - apply_views(images, views, wide)
    assert float(apart[:, :, inside, inside].abs().max()) < 1e-5
    with pytest.raises(ValueError, match="reaches beyond 6 px"):
        dense(images, views, PLAIN)


def test_other_draws_and_batches_are_not_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(dense_views, backend=counter, fullgraph=True, dynamic=False)
    monkeypatch.setattr(fused, "_compiled", lambda: compiled)
    for seed, count in ((0, 8), (1, 8), (2, 8), (3, 12)):
        images, views = textures(count, 16, seed), drawn(count, seed)
        ours = fused_views(images, views, PLAIN)
        torch.testing.assert_close(ours, dense(images, views), atol=1e-5, rtol=0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            fused_views(images, views, PLAIN)
    fused_views(textures(8, 16), drawn(8, **NEVER), PLAIN)
    assert counter.frame_count == 1
    fused_views(textures(8, 20), drawn(8), PLAIN)  # another size is another graph
    assert counter.frame_count == 2


def test_compiled_by_inductor_the_views_are_the_same() -> None:
    if shutil.which("g++") is None:
        lacking("inductor needs a C++ compiler, g++")
    images, views = textures(16, 16), drawn(16)
    ours = apply_views(images, views, PLAIN, fused=True)
    torch.testing.assert_close(ours, dense(images, views), atol=1e-5, rtol=0)


def test_without_a_compiler_views_come_regrouped_after_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler() -> fused.Core:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(compiler, "_failures", [])
    monkeypatch.setattr(fused, "_compiled", no_compiler)
    images, views = textures(4, 16), drawn(4)
    for _ in range(2):
        done = compiler.if_it_compiles(lambda: fused_views(images, views, PLAIN))
        assert done is None
    assert capsys.readouterr().err.splitlines() == [
        "seco: torch.compile failed, running slower (RuntimeError: Failed to find C compiler.)"
    ]
    apply_views(images, views, PLAIN)  # needs none on the CPU


@pytest.mark.gpu
def test_a_gpu_gives_the_same_fused_views() -> None:
    for count, size in ((64, 32), (48, 32), (8, 224)):
        images, views = textures(count, size), drawn(count)
        interleaved = images.contiguous(memory_format=torch.channels_last).cuda()
        ours = apply_views(interleaved, views, PLAIN, fused=True).cpu()
        torch.testing.assert_close(ours, dense(images, views), atol=1e-4, rtol=0)
        assert torch.equal(apply_views(interleaved, views, PLAIN).cpu(), ours)
        regrouped = apply_views(interleaved, views, PLAIN, fused=False).cpu()
        assert_equal_views(regrouped, apply_views(images, views, PLAIN), views)
    assert not compiler._failures
