"""Exports that run without the toolkit: read by the programs they are for, with equal features."""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import cli
import seco
from seco.checkpoints import deploy
from seco.checkpoints.deploy import OPSET, Deployed, preprocessing, timm_model, traced
from seco.checkpoints.weights import Backbone, load_backbone, random_backbone
from seco.models.backbones import backbone_tensors, known_archs
from shards import atomic
from shards.errors import InputError
from tests.data import ROOT

SIZE = 64  # px
SMALL, FULL = "resnet10_w16", "resnet18"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing here may be downloaded, or kept outside of the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))


def seen(network: nn.Module) -> nn.Module:
    """The network with BatchNorm statistics that are not those of a new one."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean"):
            tensor.uniform_(-0.2, 0.2, generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {arch: folder / f"{arch}.pth" for arch in (SMALL, FULL)}
    for arch, path in paths.items():
        torch.save(seen(random_backbone(arch, 3)).state_dict(), path)
    return paths


def images(count: int, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def features(network: Callable[[Tensor], Any], given: Tensor) -> Tensor:
    with torch.no_grad():
        found = network(given)
    assert isinstance(found, Tensor)
    return found


def photograph() -> Image.Image:
    y, x = np.mgrid[:300, :400]
    waves = [127 + 120 * np.sin(x / a + y / b) for a, b in ((31, 47), (23, -61), (83, 29))]
    return Image.fromarray(np.stack(waves, axis=2).astype(np.uint8))


# ONNX


def onnx_features(path: Path, given: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["features"], {"images": given.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("arch", [SMALL, FULL])
def test_onnxruntime_computes_the_same(
    arch: str, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "backbone.onnx"
    command = ["export", str(checkpoints[arch]), "--format", "onnx", "--out", str(out)]
    assert cli.run([*command, "--size", str(SIZE)]) == 0
    said = f"({arch}) as onnx (opset {OPSET}); images (N, 3, 64, 64) to features"
    assert said in capsys.readouterr().out
    backbone = load_backbone(checkpoints[arch])
    for count in (1, 5):
        given = images(count)
        difference = onnx_features(out, given) - features(backbone, given)
        assert float(difference.abs().max()) <= 1e-4


def test_an_onnx_file_says_what_it_is(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import onnx

    out = seco.export(checkpoints[SMALL], tmp_path / "a.onnx", "onnx", size=32)
    model = onnx.load(str(out))
    assert [(each.domain, each.version) for each in model.opset_import] == [("", OPSET)]
    (given,), (result,) = model.graph.input, model.graph.output
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (given, result)
    ]
    assert (given.name, result.name) == ("images", "features")
    assert shapes == [["batch", 3, 32, 32], ["batch", 128]]
    about = {each.key: each.value for each in model.metadata_props}
    assert about["arch"] == SMALL
    assert about["weights_sha256"] == load_backbone(checkpoints[SMALL]).sha256
    assert about["toolkit"] == f"seco-video {seco.__version__}"
    steps = json.loads(about["preprocessing"])
    assert (steps["resize_short_edge_px"], steps["center_crop_px"]) == (36, 32)
    assert steps["mean"] == [0.485, 0.456, 0.406]
    assert steps["std"] == [0.229, 0.224, 0.225]


@pytest.mark.parametrize(("layout", "name"), [("onnx", "f.onnx"), ("torch-export", "f.pt2")])
def test_bytes_are_reproducible_and_hold_no_paths(
    layout: str, name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    first, second = (
        seco.export(checkpoints[SMALL], tmp_path / folder / name, layout, size=32).read_bytes()
        for folder in ("a", "b")
    )
    assert first == second
    for place in (str(ROOT), str(tmp_path), "site-packages", ".py"):
        assert place.encode() not in first


def test_the_description_of_the_input_is_the_transform() -> None:
    """What the metadata say, written out, equals ``Backbone.transform``."""
    from torchvision.transforms.v2 import functional as F

    image = photograph()
    steps = json.loads(preprocessing(FULL).text())
    found = F.resize(F.to_image(image), [steps["resize_short_edge_px"]], antialias=True)
    found = F.center_crop(found, [steps["center_crop_px"]])
    found = F.normalize(F.to_dtype(found, torch.float32, scale=True), steps["mean"], steps["std"])
    assert torch.equal(found, load_backbone("random", FULL).transform(image))


# torch.export


def test_a_torch_export_is_loaded_without_the_toolkit(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    out = seco.export(checkpoints[FULL], tmp_path / "f.pt2", "torch-export", size=SIZE)
    torch.save({count: images(count) for count in (1, 2, 5)}, tmp_path / "images")
    program = (
        "import sys, torch\n"
        "extra = {'seco.json': ''}\n"
        "model = torch.export.load(sys.argv[1] + '/f.pt2', extra_files=extra).module()\n"
        "images = torch.load(sys.argv[1] + '/images')\n"
        "with torch.no_grad():\n"
        "    found = {n: model(x) for n, x in images.items()}\n"
        "torch.save((found, extra), sys.argv[1] + '/found')\n"
        "assert not {'seco', 'torchvision'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=tmp_path)
    found, extra = torch.load(tmp_path / "found")
    backbone = load_backbone(checkpoints[FULL])
    for count, vectors in found.items():
        torch.testing.assert_close(vectors, features(backbone, images(count)), rtol=0, atol=1e-5)
    assert json.loads(extra["seco.json"])["weights_sha256"] == backbone.sha256
    assert out == tmp_path / "f.pt2"


def test_a_transformer_is_traced_for_any_batch_and_one_size() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
    vit.heads = nn.Identity()
    model = traced(vit, images(2, 32)).module()
    for count in (1, 5):
        given = images(count, 32)
        torch.testing.assert_close(features(model, given), features(vit, given))
    with pytest.raises(InputError, match="--size: resnet18 does not take images of 64 px"):
        Deployed(Backbone(vit, FULL, "memory"), preprocessing(FULL, 64))


# Hugging Face


@pytest.fixture(scope="module")
def folder(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seco.export(
        checkpoints[FULL], tmp_path_factory.mktemp("hub") / "backbone", "huggingface", size=SIZE
    )


def test_the_folder_is_complete_and_reproducible(
    folder: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in folder.parent.iterdir()] == ["backbone"]
    again = seco.export(checkpoints[FULL], tmp_path / "backbone", "huggingface", size=SIZE)
    for name in names:
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    ours = load_backbone(checkpoints[FULL])
    assert load_backbone(folder / "model.safetensors").sha256 == ours.sha256
    assert ours.sha256 in (folder / "README.md").read_text()


def test_timm_loads_the_folder(folder: Path, checkpoints: dict[str, Path]) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = load_backbone(checkpoints[FULL])
    given = images(3)
    torch.testing.assert_close(features(model, given), features(ours, given), rtol=0, atol=1e-5)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == [3, SIZE, SIZE]
    assert timm.data.create_transform(**config)(photograph()).shape == (3, SIZE, SIZE)


def test_transformers_load_the_folder(folder: Path, checkpoints: dict[str, Path]) -> None:
    model, loaded = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "TimmWrapperModel"
    assert not any(loaded.values())
    model = model.eval()
    ours = load_backbone(checkpoints[FULL])
    given = images(3)
    found = features(lambda x: model(pixel_values=x).pooler_output, given)
    torch.testing.assert_close(found, features(ours, given), rtol=0, atol=1e-5)


def test_its_image_processor_makes_our_input(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """PIL resizes in another way than torchvision: by at most one of 255 grey levels."""
    out = seco.export(checkpoints[FULL], tmp_path / "backbone", "huggingface")
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    (found,) = processor(photograph())["pixel_values"]
    expected = load_backbone(checkpoints[FULL]).transform(photograph())
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1.01 / 255 / 0.224


def test_timm_has_the_tensors_of_every_torchvision_resnet() -> None:
    theirs = {arch: timm_model(arch) for arch in known_archs()}
    assert {arch for arch, found in theirs.items() if found} == {
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"),
        *("resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    }
    for arch, found in theirs.items():
        if found is not None:
            with torch.device("meta"):
                state = timm.create_model(found.name, num_classes=0).state_dict()
            ours = backbone_tensors(arch)
            assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in ours.items()}
    named = timm_model("timm:vit_tiny_patch16_224")
    assert named is not None
    assert named.name == "vit_tiny_patch16_224"


def test_a_network_that_timm_builds_differently_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("resnet34", "resnet18d"):  # other tensors
        monkeypatch.setitem(deploy._TIMM, FULL, deploy.TimmModel(name))
        with pytest.raises(InputError, match=r"and that of timm [\d.]+ differs"):
            seco.export(checkpoints[FULL], tmp_path / "out", "huggingface")
    assert not list(tmp_path.iterdir())


# PyTorch Hub


def test_the_hub_loads_a_backbone(checkpoints: dict[str, Path]) -> None:
    found: Any = torch.hub.load(
        str(ROOT), "seco_backbone", source="local", weights=str(checkpoints[SMALL])
    )
    assert isinstance(found, nn.Module) and not found.training
    given = images(2, 32)
    assert torch.equal(features(found, given), features(load_backbone(checkpoints[SMALL]), given))
    assert found.transform(photograph()).shape == (3, 224, 224)
    with pytest.raises(InputError, match="holds a resnet10_w16, not a resnet50"):
        torch.hub.load(
            str(ROOT), "seco_backbone", source="local",
            weights=str(checkpoints[SMALL]), arch="resnet50",
        )  # fmt: skip


def test_the_hub_sees_what_a_backbone_needs() -> None:
    """The packages it checks for are those that loading a backbone imports, and exist."""
    shown = runpy.run_path(str(ROOT / "hubconf.py"))
    assert [name for name, found in shown.items() if isinstance(found, FunctionType)] == [
        "seco_backbone"  # what the hub lists
    ]
    assert all(importlib.util.find_spec(name) for name in shown["dependencies"])


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--format huggingface", "holds a resnet10_w16, whose tensors have other names in timm"),
        ("--format torchvision --size 64", "--size: has no effect with --format torchvision"),
        ("--format onnx --size 15", "--size: must be from 16 to 2048"),
        ("--format onnx --size 4000", "--size: must be from 16 to 2048"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str,
    message: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["export", str(checkpoints[SMALL]), *arguments.split()]
    assert cli.run([*command, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_replaced(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(InputError, match="already exists — remove it or name another folder"):
            seco.export(checkpoints[FULL], out, "huggingface")
    with pytest.raises(InputError, match="cannot be written"):
        seco.export(checkpoints[FULL], tmp_path / "mine" / "out", "huggingface")
    with pytest.raises(InputError, match="is a folder — name the file to write"):
        seco.export(checkpoints[FULL], tmp_path, "onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("package", "layout", "extra"),
    [("onnx", "onnx", "onnx"), ("onnxscript", "onnx", "onnx"), ("timm", "huggingface", "timm")],
)
def test_a_missing_package_is_named(
    package: str,
    layout: str,
    extra: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = (
        rf'--format {layout}: {package} is not installed — pip install "seco-video\[{extra}\]"'
    )
    with pytest.raises(InputError, match=message):
        seco.export(checkpoints[FULL], tmp_path / "out", layout)
    assert not list(tmp_path.iterdir())


def test_an_atomic_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic.atomic_folder(tmp_path / "a") as made:
        (made / "file").write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with atomic.atomic_folder(tmp_path / "b" / "a") as made:
        (made / "file").write_text("whole")
        assert not (tmp_path / "b" / "a").exists()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["a"]
    refused = pytest.raises(InputError, match="cannot be written")
    with refused, atomic.atomic_folder(tmp_path / "b") as made:
        (made / "file").write_text("not over another")
    assert (tmp_path / "b" / "a" / "file").read_text() == "whole"
