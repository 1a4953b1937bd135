"""The parts of the tracker beside references that can be checked by eye."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from seco.checkpoints.weights import random_backbone
from seco.config import (
    CONTEXT,
    EXEMPLAR_PX,
    SEARCH_PX,
    STRIDE,
    TRAIN_SEARCH_PX,
    TrackerConfig,
    TrackTrainConfig,
    response_cells,
)
from seco.data.pairs import PairMaker, box_of, mean_colour, square_crops, target_of, training_crop
from seco.evaluation.tracker import peak
from seco.models.backbones import build_backbone, tensors_sha256
from seco.models.siamfc import DilatedBackbone, SiameseHead, SiamFC, cross_correlation
from seco.processes.ranks import Ranks
from seco.training.track import PairStep, balanced_loss, response_labels
from shards.opening import open_shards
from shards.pairs import PairStream, draw_pair
from tests.made_sequences import make_sequences

# Backbone


def stages(network: torch.nn.Module, images: Tensor) -> Tensor:
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))  # type: ignore[operator]
    for name in ("layer1", "layer2", "layer3", "layer4"):
        x = getattr(network, name)(x)
    return x


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_every_fourth_cell_is_what_the_network_had_before(arch: str) -> None:
    # In float64: sums are taken in another order.
    network = random_backbone(arch, 0).eval().double()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 128, 96, generator=generator, dtype=torch.float64)
    before_sha = tensors_sha256(network.state_dict())
    with torch.no_grad():
        before = stages(network, images)
        dilated = DilatedBackbone(network, "layer4")
        after = dilated(images)
    assert after.shape == (1, before.shape[1], 16, 12)
    assert dilated.width == before.shape[1]
    torch.testing.assert_close(after[..., ::4, ::4], before, rtol=1e-9, atol=1e-9)
    assert tensors_sha256(network.state_dict()) == before_sha


def test_bottlenecks_are_torchvisions_dilated_ones() -> None:
    network = random_backbone("resnet50", 0).eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(network.state_dict(), strict=True)
    images = torch.randn(1, 3, 65, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            DilatedBackbone(network, "layer4")(images), stages(theirs, images)
        )


@pytest.mark.parametrize(("layer", "width"), [("layer2", 128), ("layer3", 256), ("layer4", 512)])
def test_feature_layers_have_stride_8_and_stay_frozen(layer: str, width: int) -> None:
    model = SiamFC(build_backbone("resnet18"), TrackTrainConfig(feature_layer=layer))
    model.train()
    assert not any(module.training for module in model.backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    for px, cells in ((127, 16), (239, 30), (255, 32)):
        assert model.backbone(torch.zeros(1, 3, px, px)).shape == (1, width, cells, cells)
        assert response_cells(px) == cells - 16 + 1


# Crops


def padded_crop(
    frame: NDArray[np.uint8], centre: tuple[float, float], side: float, size: int
) -> NDArray[np.float64]:
    """SiamFC's: continue the image with its mean, then interpolate; a pixel at a time."""
    mean = frame.reshape(-1, 3).astype(np.float64).mean(0)
    height, width = frame.shape[:2]

    def at(row: int, column: int) -> NDArray[np.float64]:
        inside = 0 <= row < height and 0 <= column < width
        return frame[row, column].astype(np.float64) if inside else mean

    crop = np.empty((3, size, size))
    for v in range(size):
        for u in range(size):
            x = centre[0] - side / 2 + (u + 0.5) * side / size
            y = centre[1] - side / 2 + (v + 0.5) * side / size
            left, top = math.floor(x), math.floor(y)
            a, b = x - left, y - top
            crop[:, v, u] = (1 - b) * ((1 - a) * at(top, left) + a * at(top, left + 1)) + b * (
                (1 - a) * at(top + 1, left) + a * at(top + 1, left + 1)
            )
    return crop


def crops_of(
    frame: NDArray[np.uint8], centre: tuple[float, float], sides: list[float], size: int
) -> NDArray[np.float32]:
    fill = torch.from_numpy(mean_colour(frame))
    return square_crops(torch.from_numpy(frame), centre, sides, size, fill).numpy()


@pytest.fixture(scope="module")
def frame() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "centre",
    [
        *((15.0, 11.0), (15.3, 10.8), (0.0, 0.0), (30.0, 22.0), (29.6, 0.2)),
        *((-4.0, 5.0), (15.0, 40.0), (-30.0, -30.0), (1000.0, 3.0)),
    ],
)
@pytest.mark.parametrize("side", [0.4, 7.0, 15.5, 17.9])
def test_a_crop_is_siamfcs_on_the_padded_image(
    frame: NDArray[np.uint8], centre: tuple[float, float], side: float
) -> None:
    expected = padded_crop(frame, centre, side, 9)
    (found,) = crops_of(frame, centre, [side], 9)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_scales_are_cropped_at_once(frame: NDArray[np.uint8]) -> None:
    sides = [11.0, 12.5, 14.0]
    found = crops_of(frame, (20.2, 3.1), sides, 8)
    for crop, side in zip(found, sides, strict=True):
        np.testing.assert_allclose(crop, padded_crop(frame, (20.2, 3.1), side, 8), atol=0.02)


@pytest.mark.parametrize("centre", [(15.0, 11.0), (1.7, 20.0), (-3.0, 4.0), (40.0, 11.0)])
@pytest.mark.parametrize("factor", [2, 3])
def test_large_squares_are_averaged_first(
    frame: NDArray[np.uint8], centre: tuple[float, float], factor: int
) -> None:
    size = 6
    side = size * factor + 1.0
    # Blocks are counted from the first pixel that is read: the frame's, or what the square needs.
    left = max(0, math.floor(centre[0] - side / 2 - 3 * factor))
    top = max(0, math.floor(centre[1] - side / 2 - 3 * factor))
    mean = frame.reshape(-1, 3).astype(np.float64).mean(0)
    reach = 40 * factor
    padded = np.broadcast_to(mean, (2 * reach + 60, 2 * reach + 60, 3)).copy()
    padded[reach - top : reach - top + 23, reach - left : reach - left + 31] = frame
    blocks = padded[: len(padded) // factor * factor, : len(padded) // factor * factor]
    blocks = blocks.reshape(len(blocks) // factor, factor, -1, factor, 3).mean((1, 3))
    expected = np.empty((3, size, size))
    for v in range(size):
        for u in range(size):
            x = centre[0] - side / 2 + (u + 0.5) * side / size - left + reach
            y = centre[1] - side / 2 + (v + 0.5) * side / size - top + reach
            i, j = (x - (factor - 1) / 2) / factor, (y - (factor - 1) / 2) / factor
            column, row = math.floor(i), math.floor(j)
            a, b = i - column, j - row
            cells = blocks[row : row + 2, column : column + 2]
            expected[:, v, u] = (1 - b) * ((1 - a) * cells[0, 0] + a * cells[0, 1]) + b * (
                (1 - a) * cells[1, 0] + a * cells[1, 1]
            )
    (found,) = crops_of(frame, centre, [side], size)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_crop_of_its_own_size_is_a_copy(frame: NDArray[np.uint8]) -> None:
    (found,) = crops_of(frame, (12.0, 10.0), [9.0], 9)
    np.testing.assert_allclose(found, frame[6:15, 8:17].transpose(2, 0, 1), atol=1e-3)


def test_boxes_and_targets() -> None:
    target = target_of([11, 21, 5, 3])  # pixels 10 … 14 across and 20 … 22 down, counted from 0
    assert target[:2] == (12, 21)
    assert box_of(target).tolist() == [11, 21, 5, 3]
    # SiamFC: (w + c)(h + c) with c half of the sum of the sides.
    assert target.exemplar_side == pytest.approx(math.sqrt((5 + 4) * (3 + 4)))


def test_training_crops_are_shifted_and_stretched(frame: NDArray[np.uint8]) -> None:
    box = (10.0, 8.0, 9.0, 7.0)
    target = target_of(box)
    px = target.exemplar_side / 127 / 1.04
    centre = (target.x + 3 * px, target.y - 2 * px)
    expected = padded_crop(frame, centre, 239 * px, 239)
    found = training_crop(frame, box, 239, 1.04, (3, -2)).numpy()
    np.testing.assert_allclose(found, expected, atol=0.55)  # rounded to whole levels


# Correlation


def test_cross_correlation_is_a_grouped_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    exemplar = torch.randn(3, 5, 4, 3, generator=generator, dtype=torch.float64)
    search = torch.randn(3, 5, 7, 6, generator=generator, dtype=torch.float64)
    expected = F.conv2d(search.reshape(1, 15, 7, 6), exemplar, groups=3)[0]
    torch.testing.assert_close(cross_correlation(exemplar, search), expected)
    one = cross_correlation(exemplar[:1], search)
    torch.testing.assert_close(one, F.conv2d(search, exemplar[:1])[:, 0])


def test_gradients_of_the_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    exemplar = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    search = torch.randn(2, 3, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cross_correlation, (exemplar, search))


@pytest.mark.parametrize("separate", [False, True])
def test_the_head_standardises_and_scales(separate: bool) -> None:
    torch.manual_seed(0)
    head = SiameseHead(4, 3, 0.5, separate=separate)
    head.bias.data.fill_(0.25)
    mean, std = torch.randn(4), torch.rand(4) + 0.5
    head.measure(mean, std)
    exemplar, search = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 5, 4)
    convolutions = [head.exemplar_convolution, head.search_convolution or head.exemplar_convolution]
    a, b = (
        convolution((features - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1))
        for convolution, features in zip(convolutions, (exemplar, search), strict=True)
    )
    torch.testing.assert_close(head(exemplar, search), cross_correlation(a, b) * 0.5 + 0.25)
    assert separate == (convolutions[0] is not convolutions[1])
    raw = SiameseHead(4, 3, 0.5, standardise=False)
    raw.measure(mean, std)
    torch.testing.assert_close(raw.search(search), raw.exemplar_convolution(search))


def test_a_channel_that_hardly_moves_is_not_magnified() -> None:
    head = SiameseHead(4, 3, 1.0)
    head.measure(torch.zeros(4), torch.tensor([2.0, 2.0, 2.0, 1e-9]))
    assert head.std.tolist() == pytest.approx([2, 2, 2, 0.05 * 3**0.5], rel=1e-6)
    # Where it moves after all, as the others do, it stays within 20 times what they are.
    found = head.search(torch.full((1, 4, 1, 1), 2.0)) - head.search(torch.zeros(1, 4, 1, 1))
    weight = head.exemplar_convolution.weight.detach()[:, :, 0, 0].abs()
    assert bool((found[0, :, 0, 0].abs() < weight.sum(1) * 24).all())
    same = SiameseHead(4, 3, 1.0)
    same.measure(torch.ones(4), torch.zeros(4))
    assert same.search(torch.ones(1, 4, 2, 2)).isfinite().all()


# Labels and loss


def test_labels_are_a_diamond_of_two_cells() -> None:
    labels = response_labels(15, 16)
    for row in range(15):
        for column in range(15):
            near = 8 * (abs(row - 7) + abs(column - 7)) <= 16
            assert labels[row, column] == float(near)
    assert int(labels.sum()) == 13
    assert int(response_labels(16, 16).sum()) == 12  # the centre is between cells


def test_the_loss_weighs_both_kinds_one_half() -> None:
    generator = torch.Generator().manual_seed(0)
    responses = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64) * 3
    labels = response_labels(5, 8)
    total = 0.0
    for pair in responses.tolist():
        sums, counts = {1.0: 0.0, 0.0: 0.0}, {1.0: 0, 0.0: 0}
        for row, logits in enumerate(pair):
            for column, logit in enumerate(logits):
                label = float(labels[row, column])
                sums[label] += math.log(1 + math.exp(-logit if label else logit))
                counts[label] += 1
        total += sum(sums[label] / counts[label] for label in sums) / 2
    assert float(balanced_loss(responses, labels)) == pytest.approx(total / 2, rel=1e-6)


# Defaults and where they go


def test_the_defaults_are_siamfcs() -> None:
    training = {
        **{"feature_layer": "layer4", "channels": 256, "convolutions": "shared"},
        **{"raw_features": False, "response_scale": 0.001, "epochs": 50},
        **{"pairs_per_sequence": 1, "max_gap": 99, "batch_size": 8, "lr": 0.01},
        **{"final_lr": 0.00001, "momentum": 0.9, "weight_decay": 0.0005},
        **{"positive_radius": 16.0, "max_stretch": 0.05},
    }
    inference = {
        **{"scales": 3, "scale_step": 1.0375, "scale_penalty": 0.9745, "scale_update": 0.59},
        **{"window": 0.176, "upsampling": 16},
    }
    for config, expected in ((TrackTrainConfig(), training), (TrackerConfig(), inference)):
        assert {name: getattr(config, name) for name in expected} == expected
    assert (STRIDE, EXEMPLAR_PX, SEARCH_PX, TRAIN_SEARCH_PX, CONTEXT) == (8, 127, 255, 239, 0.5)
    assert (response_cells(SEARCH_PX), response_cells(TRAIN_SEARCH_PX)) == (17, 15)


def test_the_optimizer_has_the_settings() -> None:
    config = TrackTrainConfig(
        feature_layer="layer2", lr=0.5, momentum=0.75, weight_decay=0.25, positive_radius=8
    )
    model = SiamFC(build_backbone("resnet18"), config)
    step = PairStep(model, config, Ranks(), torch.device("cpu"))
    (group,) = step.optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.75, 0.25)
    assert len(group["params"]) == 3  # weight and bias of the convolution, bias of the response
    assert torch.equal(step._labels, response_labels(15, 8))


def test_the_default_gap_is_siamfcs() -> None:
    """The frames of its pairs are less than 100 apart."""
    frames = np.array([0, 99, 199], dtype=np.int64)
    gap = TrackTrainConfig().max_gap
    assert {draw_pair(uniform, frames, gap) for uniform in (0.0, 0.5, 0.99)} == {(0, 99)}


def test_pairs_are_stretched_and_shifted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def recorded(
        frame: object, box: object, size: int, scale: float, moved: Sequence[int] = (0, 0)
    ) -> Tensor:
        given.append((size, scale, tuple(moved)))
        return torch.zeros(3, size, size, dtype=torch.uint8)

    monkeypatch.setattr("seco.data.pairs.training_crop", recorded)
    spec = make_sequences(tmp_path, sequences=8, frames=3)
    maker = PairMaker(PairStream(open_shards(spec), 8, 0, 100), 0.05)
    for step in range(12):
        maker[step]
    for size in (127, 239):
        scales = [scale for crop, scale, _ in given if crop == size]
        assert len(scales) == 96
        assert 0.95 <= min(scales) < 0.96
        assert 1.04 < max(scales) <= 1.05
    exemplars, searches = ([m for crop, _, m in given if crop == size] for size in (127, 239))
    for crops in (exemplars, searches):  # SiamFC takes a random 239 of 247 px for both
        for axis in (0, 1):
            assert {moved[axis] for moved in crops} == set(range(-4, 5))
        assert len(set(crops)) > 40
    pairs = list(zip(given[::2], given[1::2], strict=True))
    assert sum(one[1] == other[1] for one, other in pairs) == 0  # drawn for each
    assert sum(one[2] == other[2] for one, other in pairs) < 10


# Inference


def cubic(t: float) -> float:
    """OpenCV's kernel, a = -0.75."""
    a, t = -0.75, abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def enlarged(response: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """Cubic interpolation with the border repeated, an element at a time."""
    n = len(response)
    weights = np.zeros((n * times, n))
    for place in range(n * times):
        at = (place + 0.5) / times - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            weights[place, min(max(tap, 0), n - 1)] += cubic(at - tap)
    return weights @ response @ weights.T


@pytest.mark.parametrize("seed", range(4))
def test_the_peak_is_siamfcs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    responses = rng.normal(size=(3, 5, 5))
    times, influence = 4, 0.176
    window = np.outer(np.hanning(20), np.hanning(20))
    window /= window.sum()
    penalty = np.array([0.9745, 1, 0.9745])
    larger = [enlarged(one, times) * factor for one, factor in zip(responses, penalty, strict=True)]
    scale = int(np.argmax([one.max() for one in larger]))
    chosen = larger[scale] - larger[scale].min()
    mixed = (1 - influence) * chosen / chosen.sum() + influence * window
    row, column = np.unravel_index(mixed.argmax(), mixed.shape)
    found = peak(
        torch.from_numpy(responses), torch.from_numpy(penalty), torch.from_numpy(window), influence
    )
    assert found[:3].tolist() == [scale, row, column]
    assert float(found[3]) == pytest.approx(larger[scale][row, column], abs=1e-9)
