"""The backbones of ``--arch``: sizes, initialisation, files, and every command with a small one."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cli
from seco.checkpoints.convert import read_weights
from seco.checkpoints.weights import load_backbone, random_backbone
from seco.config import FinetuneConfig
from seco.evaluation.query import encode_frames
from seco.features.store import read_features
from seco.models.backbones import (
    RESNETS,
    backbone_spec,
    backbone_tensors,
    build_backbone,
    feature_dim,
    known_archs,
)
from seco.models.siamfc import DilatedBackbone
from seco.training.finetune import finetune
from shards.errors import InputError
from shards.opening import open_shards
from tests.data import ROOT
from tests.made_sequences import make_sequences
from tests.made_shards import make_set

SMALL = [
    *("resnet10_w16", "resnet10_w32", "resnet10_w64"),
    *("resnet18_cifar", "resnet34_cifar", "resnet50_cifar"),
]
TORCHVISION = [arch for arch in known_archs() if backbone_spec(arch).family == RESNETS]
SHRINKING = {arch: 16 if arch.startswith("resnet10") else 8 for arch in SMALL}
# torchvision's network with the same stages.
SAME_STAGES: dict[str, Callable[[], nn.Module]] = {
    "resnet18_cifar": torchvision.models.resnet18,
    "resnet34_cifar": torchvision.models.resnet34,
    "resnet50_cifar": torchvision.models.resnet50,
    "resnet10_w64": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]
    ),
}


def last_stage(network: Any, images: Tensor) -> Tensor:
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    for name in ("layer1", "layer2", "layer3", "layer4"):
        x = getattr(network, name)(x)
    assert isinstance(x, Tensor)
    return x


# What is built


def test_names_and_widths() -> None:
    assert set(known_archs()) > {*SMALL, *TORCHVISION}
    assert len(TORCHVISION) == 10
    for arch in TORCHVISION:
        with torch.device("meta"):
            assert feature_dim(arch) == torchvision.models.get_model(arch).fc.in_features
    assert [feature_dim(arch) for arch in SMALL] == [128, 256, 512, 512, 512, 2048]


@pytest.mark.parametrize("arch", SMALL)
def test_small_ones_keep_cells_of_a_small_image(arch: str) -> None:
    with torch.device("meta"):
        network = build_backbone(arch).eval()
        for px in (32, 48, 65):
            cells = -(-px // SHRINKING[arch])
            images = torch.zeros(2, 3, px, px)
            assert last_stage(network, images).shape == (2, feature_dim(arch), cells, cells)
            assert network(images).shape == (2, feature_dim(arch))


def test_the_documented_sizes() -> None:
    text = (ROOT / "docs/pretrain.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    documented = {arch: cells.split(" | ") for arch, cells in rows}
    assert set(SMALL) < set(documented) < {*SMALL, *TORCHVISION}
    for arch, (width, parameters, *multiply_adds) in documented.items():
        with torch.device("meta"):
            network = build_backbone(arch).eval()
        count = sum(parameter.numel() for parameter in network.parameters())
        assert (width, parameters) == (str(feature_dim(arch)), f"{count / 1e6:.1f}")
        for px, said in zip((32, 64, 112), multiply_adds[:3], strict=True):
            with FlopCounterMode(display=False) as counter:
                network(torch.zeros(1, 3, px, px, device="meta"))
            found = counter.get_total_flops() / 2e6
            assert said == (f"{found:.0f}" if found >= 10 else f"{found:.1f}")


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvisions_are_initialised_as_before(arch: str) -> None:
    """Every value, and how many random numbers it takes."""
    torch.manual_seed(3)
    theirs = torchvision.models.get_model(arch, weights=None).state_dict()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    ours = build_backbone(arch).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert list(ours) == [name for name in theirs if not name.startswith("fc.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("arch", SAME_STAGES)
def test_stages_are_initialised_as_torchvisions(arch: str) -> None:
    torch.manual_seed(3)
    theirs = SAME_STAGES[arch]().state_dict()
    torch.manual_seed(3)
    ours = build_backbone(arch).state_dict()
    assert list(ours) == [name for name in theirs if not name.startswith("fc.")]
    differing = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert differing == {"conv1.weight"}
    assert ours["conv1.weight"].shape == (64, 3, 3, 3)


def test_narrow_ones_are_initialised_by_the_same_rules() -> None:
    network = random_backbone("resnet10_w32", 0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            values = module.weight.numel()
            expected = (2 / fan_out) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(
                expected, rel=4 / values**0.5
            )
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    again, other = random_backbone("resnet10_w32", 0), random_backbone("resnet10_w32", 1)
    assert torch.equal(again.conv1.weight, network.conv1.weight)  # type: ignore[arg-type,union-attr]
    assert not torch.equal(other.conv1.weight, network.conv1.weight)  # type: ignore[arg-type,union-attr]


def test_the_cifar_stem_is_simclrs() -> None:
    """The plain way to write it, as in MoCo's demo: replace the stem, take the pooling out."""
    theirs = torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.fc = nn.Identity()
    ours = random_backbone("resnet18_cifar", 0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs.eval()(images))


@pytest.mark.parametrize("make", [build_backbone, feature_dim])
@pytest.mark.parametrize("arch", ["resnet19", "vgg16", "resnet10_w33", ""])
def test_unknown_names_list_the_choices(arch: str, make: Callable[[str], object]) -> None:
    with pytest.raises(InputError) as caught:
        make(arch)
    said = str(caught.value)
    meant = {"resnet19": "resnet18 or resnet152", "vgg16": "timm:vgg16"}
    meant |= {"resnet10_w33": "resnet10_w32 or resnet10_w64"}
    asked = f"did you mean {meant[arch]}? Give" if arch in meant else "give"
    beginning = f"--arch: unknown architecture {arch!r} — {asked} one of torchvision's ResNets: "
    assert said.startswith(beginning)
    torchvisions, small = said.split("; ResNets for small images: ")
    assert small.split("; ")[0].split(", ") == SMALL
    assert said.endswith("; timm's: timm:NAME")
    assert all(f" {name}" in torchvisions for name in TORCHVISION)


# Files


def test_no_two_have_the_same_tensors() -> None:
    """Strides do not show in a file: a file without a name could be either."""
    shapes = {
        tuple((name, *tensor.shape) for name, tensor in backbone_tensors(arch).items())
        for arch in known_archs()
    }
    assert len(shapes) == len(known_archs())


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in expected)


def export(source: Path, layout: str, out: Path) -> int:
    return cli.run(["export", str(source), "--format", layout, "--out", str(out)])


@pytest.mark.parametrize("arch", [*SMALL[:3], "resnet18_cifar"])
def test_files_keep_weights_and_architecture(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(random_backbone(arch, 5).state_dict())
    plain = tmp_path / "plain.pth"
    torch.save(state, plain)
    own = tmp_path / "own.pt"
    assert cli.run(["import", str(plain), "--out", str(own)]) == 0
    for layout in ("torchvision", "safetensors"):
        out = tmp_path / layout
        assert export(own, layout, out) == 0
        assert f"build_backbone('{arch}')" in capsys.readouterr().out
        found = load_backbone(str(out))
        assert found.arch == arch
        assert same(found.network.state_dict(), state)
    assert same(safetensors.torch.load_file(tmp_path / "safetensors"), state)
    for layout in ("moco", "seco-authors"):
        assert export(own, layout, tmp_path / layout) == 1
        said = capsys.readouterr().err
        assert f"holds a {arch}, which the code that reads this layout cannot build" in said
        assert not (tmp_path / layout).exists()


def test_safetensors_are_what_their_metadata_say(tmp_path: Path) -> None:
    state, path = dict(random_backbone("resnet10_w16", 0).state_dict()), tmp_path / "f"
    for metadata in (None, {"format": "pt"}, {"arch": "of another library"}):
        safetensors.torch.save_file(state, path, metadata)
        assert read_weights(path).arch == "resnet10_w16"
    safetensors.torch.save_file(state, path, {"arch": "resnet10_w32"})
    with pytest.raises(InputError, match="not a resnet10_w32"):
        read_weights(path)


def test_a_wrong_tensor_of_a_small_one_is_named(tmp_path: Path) -> None:
    state = dict(random_backbone("resnet18_cifar", 0).state_dict())
    del state["layer3.0.bn2.running_var"]
    torch.save(state, tmp_path / "f")
    with pytest.raises(InputError, match=r"running_var is missing \(compared with a resnet18_cif"):
        read_weights(tmp_path / "f")


# The tracker's stride


@pytest.mark.parametrize(("arch", "step"), [("resnet10_w16", 2), ("resnet18_cifar", 1)])
def test_dilated_ones_hold_the_values_from_before(arch: str, step: int) -> None:
    network = random_backbone(arch, 0).eval().double()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 64, 47, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        before = last_stage(network, images)
        after = DilatedBackbone(network, "layer4")(images)
    assert after.shape == (1, feature_dim(arch), 8, 6)
    torch.testing.assert_close(after[..., ::step, ::step], before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", ["resnet10_w32", "resnet34_cifar", "resnet50_cifar"])
def test_trackers_have_stride_8_or_are_refused(arch: str) -> None:
    usable = ["layer3", "layer4"] if arch.startswith("resnet10") else ["layer4"]
    for layer in ("layer2", "layer3", "layer4"):
        with torch.device("meta"):
            network = build_backbone(arch)
            if layer not in usable:
                stride = 4 if layer == "layer3" or len(usable) == 2 else 2
                with pytest.raises(
                    InputError,
                    match=f"{layer} of this backbone has stride {stride}; the tracker needs 8 — "
                    f"give {' or '.join(usable)}$",
                ):
                    DilatedBackbone(network, layer)
                continue
            backbone = DilatedBackbone(network, layer)
            for px, cells in ((127, 16), (239, 30), (255, 32)):
                shape = backbone(torch.zeros(1, 3, px, px)).shape
                assert shape == (1, backbone.width, cells, cells)


# Every command


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/made.json, and run/ of a few steps of pre-training on it."""
    folder = tmp_path_factory.mktemp("work")
    make_set(folder / "shards", videos=24)
    run = (
        "pretrain --epochs 1 --batch-size 8 --bn-group 4 --queue-size 16 --crop-size 32 --lr 0.01"
        f" --arch resnet10_w32 --shards {folder}/shards/made.json --out {folder}/run"
    )
    assert cli.run(shlex.split(f"{run} --workers 0 --device cpu")) == 0
    return folder


def features_of(work: Path, out: Path, checkpoint: str) -> dict[str, Any]:
    command = f"extract-features --shards {work}/shards/made.json --out {out} {checkpoint}"
    sizes = "--frames 2 --short-edge 36 --crop-size 32 --workers 0 --device cpu"
    assert cli.run(shlex.split(f"{command} {sizes}")) == 0
    encoder: dict[str, Any] = json.loads((out / "meta.json").read_text("utf-8"))["encoder"]
    return encoder


def test_features_probe_and_query(work: Path, tmp_path: Path) -> None:
    run = work / "run/last.pt"
    for checkpoint in (f"--checkpoint {run}", "--checkpoint random --arch resnet10_w32"):
        out = tmp_path / checkpoint.split()[1].rpartition("/")[2]
        encoder = features_of(work, out, checkpoint)
        assert encoder["arch"] == "resnet10_w32"
        features = read_features(out)
        assert features.features.shape == (24, 256)
        assert cli.run(["probe", "--features", str(out), "--split", "1"]) == 0
        shards = open_shards(f"{work}/shards/made.json")
        frames = [shards.read_frame(shards.find("video_0003"), n) for n in (0, 5)]
        np.testing.assert_allclose(
            encode_frames(frames, features, None),
            features.features[features.find("video_0003")],
            atol=1e-5,
        )
    with pytest.raises(InputError, match=r"holds a resnet10_w32, not a resnet18"):
        load_backbone(str(run), "resnet18")


def test_a_run_starts_from_another_and_is_exported(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_backbone(str(work / "run/last.pt"))
    assert export(work / "run/last.pt", "safetensors", tmp_path / "f") == 0
    assert load_backbone(str(tmp_path / "f")).sha256 == trained.sha256
    again = (
        "pretrain --epochs 1 --batch-size 8 --bn-group 4 --queue-size 16 --crop-size 32 --lr 1e-12"
        f" --arch resnet10_w32 --shards {work}/shards/made.json --out {tmp_path}/run"
        f" --init {tmp_path}/f --workers 0 --device cpu"
    )
    assert cli.run(shlex.split(again)) == 0
    assert "a state dict, resnet10_w32: loaded the backbone" in capsys.readouterr().err
    found = load_backbone(str(tmp_path / "run/last.pt")).network.state_dict()
    for name, tensor in trained.network.state_dict().items():
        moves = "running" in name or "tracked" in name
        assert moves or torch.allclose(found[name], tensor, atol=1e-8)
    assert cli.run(shlex.split(again.replace("resnet10_w32", "resnet10_w16") + "2")) == 1


def test_fine_tuning(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    settings = FinetuneConfig(
        shards=(f"{work}/shards/made.json",),
        checkpoint=str(work / "run/last.pt"),
        out=str(out),
        device="cpu",
        **{"epochs": 1, "batch_size": 4, "bn_group": 4, "segments": 2, "crop_size": 32},
        **{"test_size": 32, "clips": 2, "clip_frames": 2, "workers": 0},
    )
    finetune(settings)
    (result,) = out.glob("finetune*.json")
    assert json.loads(result.read_text("utf-8"))["encoder"]["arch"] == "resnet10_w32"
    assert features_of(work, tmp_path / "f", f"--checkpoint {out}/last.pt")["arch"] == (
        "resnet10_w32"
    )


def test_tracking(work: Path, tmp_path: Path) -> None:
    shards = make_sequences(tmp_path / "sequences", sequences=2)
    common = f"--shards {shards} --device cpu"
    train = (
        f"track train {common} --checkpoint {work}/run/last.pt --epochs 1 --batch-size 2"
        f" --channels 8 --workers 0 --out"
    )
    assert cli.run(shlex.split(f"{train} {tmp_path}/refused --feature-layer layer2")) == 1
    assert cli.run(shlex.split(f"{train} {tmp_path}/track --feature-layer layer3")) == 0
    evaluate = f"track eval {common} --tracker {tmp_path}/track/last.pt --out {tmp_path}/eval"
    assert cli.run(shlex.split(evaluate)) == 0
    found = json.loads((tmp_path / "eval/track.json").read_text("utf-8"))
    assert found["encoder"]["arch"] == "resnet10_w32"


def test_the_report_names_it(work: Path, tmp_path: Path) -> None:
    features_of(work, tmp_path / "f", f"--checkpoint {work}/run/last.pt")
    assert cli.run(["probe", "--features", str(tmp_path / "f"), "--split", "1"]) == 0
    page = tmp_path / "report.md"
    command = ["report", str(work / "run"), str(tmp_path / "f"), "--markdown", str(page)]
    assert cli.run([*command, "--out", str(tmp_path / "report.html")]) == 0
    assert r"resnet10\_w32" in page.read_text("utf-8")
    assert "resnet10_w32" in (tmp_path / "report.html").read_text("utf-8")
