"""Backbones other than ResNets: every family from pre-training to use elsewhere, and each name."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import (
    ConvNeXt,
    EfficientNet,
    RegNet,
    SwinTransformer,
    VisionTransformer,
)
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams

import cli
from seco.checkpoints.io import load_checkpoint
from seco.checkpoints.weights import load_backbone, random_backbone
from seco.config import PretrainConfig, resolve_pretrain
from seco.data.transforms import normalise
from seco.evaluation.compare import parse_encoders
from seco.evaluation.query import encode_frames
from seco.features.store import read_features
from seco.models import backbones
from seco.models.backbones import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    backbone_shape,
    backbone_spec,
    backbone_tensors,
    build_backbone,
    feature_dim,
    known_archs,
    require_size,
)
from seco.models.classifier import VideoClassifier
from seco.models.seco import KEYS, KeyShuffle, SeCo
from seco.training.optimizers import LARS, optimizer_for
from seco.training.pretrain import with_optimizer
from shards.errors import InputError
from shards.opening import open_shards
from tests.made_shards import make_set

# One of each family, with fewer and narrower blocks than any that torchvision names.
SMALLER: dict[str, Callable[[], nn.Module]] = {
    "regnet_y_400mf": lambda: RegNet(
        BlockParams.from_init_params(4, 16, 8.0, 2.0, 8, se_ratio=0.25)
    ),
    "efficientnet_b0": lambda: EfficientNet(
        [MBConvConfig(1, 3, 1, 8, 8, 1, 1, 1), MBConvConfig(4, 3, 2, 8, 16, 2, 1, 1)], 0.2
    ),
    "convnext_tiny": lambda: ConvNeXt(
        [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], stochastic_depth_prob=0.5
    ),
    "vit_b_32": lambda: VisionTransformer(64, 16, 2, 2, 32, 64, dropout=0.1),
    "swin_t": lambda: SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], dropout=0.1),
}
FAMILIES = [
    *("mobilenet_v3_small", *SMALLER),
    *("timm:test_vit", "timm:test_convnext", "timm:test_efficientnet"),
]
# Also those that a later change adds: what another test left in one would be of the full networks.
CACHES = [found for found in vars(backbones).values() if hasattr(found, "cache_clear")]


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made = torchvision.models.get_model

    def get_model(name: str, **given: object) -> nn.Module:
        found: nn.Module = SMALLER[name]() if name in SMALLER else made(name, **given)
        return found

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(tmp_path_factory.mktemp("made"), videos=24, frames=4, size=(64, 80))


def run(command: str) -> None:
    assert cli.run(shlex.split(command)) == 0


def pretrain_and_resume(options: str, shards: str, folder: Path) -> str:
    """Pre-train into ``run``, resume its half into ``again`` to the same bits; return a command.

    It lacks only the name of the run's folder.
    """
    pretrain = (
        f"pretrain {options} --shards {shards} --epochs 2 --batch-size 8 --bn-group 4"
        " --queue-size 16 --crop-size 32 --workers 0 --device cpu --log-every 1 --loggers none"
        f" --keep-every-epochs 1 --out {folder}"
    )
    run(f"{pretrain}/run")
    (folder / "again").mkdir()
    shutil.copy(folder / "run/epoch-0001.pt", folder / "again/last.pt")
    shutil.copy(folder / "run/metrics.jsonl", folder / "again")
    run(f"{pretrain}/again --resume auto")
    ours, theirs = (load_checkpoint(folder / name / "last.pt") for name in ("run", "again"))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    logged = [(folder / name / "metrics.jsonl").read_text() for name in ("run", "again")]
    assert logged[0] == logged[1]
    return pretrain


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_from_pretraining_to_use_elsewhere(
    arch: str, shards: str, tmp_path: Path
) -> None:
    pretrain_and_resume(f"--arch {arch} --channels-last", shards, tmp_path)

    run(
        f"extract-features --shards {shards} --checkpoint {tmp_path}/run/last.pt --frames 2"
        f" --short-edge 40 --crop-size 32 --workers 0 --device cpu --out {tmp_path}/features"
    )
    features = read_features(tmp_path / "features")
    assert features.features.shape == (24, feature_dim(arch))
    assert features.encoder["arch"] == arch
    run(f"probe --features {tmp_path}/features --split 1")

    run(f"export {tmp_path}/run/last.pt --format safetensors --out {tmp_path}/exported")
    ours = load_backbone(str(tmp_path / "run/last.pt"))
    assert load_backbone(str(tmp_path / "exported"), arch).sha256 == ours.sha256
    tensors = safetensors.torch.load_file(tmp_path / "exported")
    px = 64 if arch in SMALLER else backbone_spec(arch).size
    images = torch.rand(2, 3, px, px, generator=torch.Generator().manual_seed(0))
    if arch.startswith("timm:"):
        theirs = timm.create_model(arch.removeprefix("timm:"), num_classes=0)
        theirs.load_state_dict(tensors, strict=True)
    else:
        theirs = torchvision.models.get_model(arch, weights=None)
        heads = backbone_spec(arch).classifier
        found = theirs.load_state_dict(tensors, strict=False)
        assert not found.unexpected_keys
        assert all(name.startswith(heads) for name in found.missing_keys)
        parent, _, last = heads[0].rstrip(".").rpartition(".")
        setattr(theirs.get_submodule(parent), last, nn.Identity())
    run(f"publish {tmp_path}/run --out {tmp_path}/published")
    assert load_backbone(str(tmp_path / "published/model.safetensors")).sha256 == ours.sha256
    spec = backbone_spec(arch)
    if arch.startswith("timm:"):
        run(
            f"export {tmp_path}/run/last.pt --format huggingface --out {tmp_path}/folder"
            f" --size {px}"
        )
        theirs = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True)
    given = [(images - _channels(mean)) / _channels(std) for mean, std in (IMAGENET, of(spec))]
    with torch.no_grad():
        torch.testing.assert_close(ours(given[0]), theirs.eval()(given[1]), rtol=1e-4, atol=1e-5)


IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)


def of(spec: backbones.BackboneSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return spec.mean, spec.std


def _channels(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1)


@pytest.mark.parametrize("arch", ["vit_b_32", "convnext_tiny", "timm:test_efficientnet"])
def test_onnxruntime_computes_the_same(arch: str, tmp_path: Path) -> None:
    import onnxruntime

    network = random_backbone(arch, 1).eval()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w", {"arch": arch})
    for layout in ("onnx", "torch-export"):
        run(f"export {tmp_path}/w --format {layout} --size 96 --out {tmp_path}/{layout}")
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx"), providers=providers)
    program = torch.export.load(tmp_path / "torch-export").module()
    spec = backbone_spec(arch)
    for count in (1, 3):
        pixels = torch.randint(0, 256, (count, 3, 96, 96), dtype=torch.uint8)
        given = normalise(pixels, spec.mean, spec.std)
        with torch.no_grad():
            wanted = network(normalise(pixels))
        (found,) = session.run(["features"], {"images": given.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(program(given), wanted, rtol=0, atol=1e-4)


# Names


def test_what_torchvisions_networks_are_made_for() -> None:
    sizes = {"resnet50": 224, "vit_h_14": 224, "swin_v2_t": 256, "efficientnet_b4": 380}
    assert {arch: backbone_spec(arch).size for arch in sizes} == sizes
    assert of(backbone_spec("efficientnet_v2_l")) == ((0.5,) * 3, (0.5,) * 3)
    assert of(backbone_spec("efficientnet_v2_m")) == IMAGENET


def test_every_name_of_torchvision() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    refused = [name for name in names if name not in known_archs()]
    assert len(names) - len(refused) > 45
    for name in refused:
        with pytest.raises(InputError, match=r"^--arch: unknown architecture .*timm:NAME$") as told:
            backbone_spec(name)
        assert "\n" not in str(told.value)
    for name in set(names) - set(refused):
        shape = backbone_shape(name)
        assert shape.width >= 32
        assert all(tensor.device.type == "meta" for tensor in backbone_tensors(name).values())


@pytest.mark.parametrize("step", [60, pytest.param(1, marks=pytest.mark.soak)])
def test_every_name_of_timm(step: int) -> None:
    names = timm.list_models()[::step]
    accepted, refused = 0, list[str]()
    for name in names:
        try:
            accepted += backbone_shape(f"timm:{name}").width > 0
        except InputError as error:
            refused.append(f"{name} {error}")
        for cache in (backbone_spec, backbone_shape):
            cache.cache_clear()
    assert accepted > 0.95 * len(names), refused
    assert all("\n" not in told and f" timm:{told.split()[0]}: " in told for told in refused)


def test_a_network_that_computes_with_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_small_patch16_rope_mixed_224"
    assert backbone_shape(f"timm:{name}") == (384, False)
    make = functools.partial(timm.create_model, name, num_classes=0)
    entry = SimpleNamespace(load=lambda: make)
    monkeypatch.setattr(backbones, "_plugins", lambda: {"theirs": entry})
    assert backbone_shape("theirs") == (384, False)


@pytest.mark.parametrize(
    ("arch", "what"),
    [
        ("timm:nonsense", "timm has no such model"),
        ("timm:hf-hub:timm/test_vit", "names a file rather than a model — download it"),
        ("timm:local-dir:/tmp", "names a file rather than a model — download it"),
        ("timm:test_vitt", "timm has no such model — did you mean test_vit"),
        ("test_vit", "unknown architecture 'test_vit' — did you mean timm:test_vit. Give one of"),
        ("convnext_tny", "did you mean convnext_tiny"),
        ("timm:", "timm has no such model"),
        ("timm:resnet18.bogus", "timm has no such weights"),
        ("timm:vit_tiny_patch16_224_in21k", "timm has renamed it — perhaps to vit_tiny_patch16_22"),
        ("timm:vit_base_patch16_224_sam", "timm has renamed it"),
        ("timm:gemma4_vit_167m_enc", "does not make one feature of each image"),
    ],
)
def test_names_that_are_refused(arch: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        backbone_shape(arch)


def test_timm_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(InputError, match=r"timm:test_vit: timm is not installed — pip install"):
        backbone_spec("timm:test_vit")


def test_backbones_of_another_package(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "their_networks.py").write_text(
        "from torch import nn\n"
        "def flat():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8))\n"
        "def sized(width):\n"
        "    return flat()\n"
    )
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[seco.backbones]\nflat = their_networks:flat\nlost = their_networks:lost\n"
        "sized = their_networks:sized\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    backbones._plugins.cache_clear()
    assert {"flat", "lost"} < set(known_archs())
    assert backbone_shape("flat")[:2] == (8, False)
    with pytest.raises(InputError, match=r"lost: its plug-in fails \(AttributeError: "):
        backbone_spec("lost")
    assert cli.run(shlex.split(f"pretrain --arch sized --shards {shards} --out {tmp_path}/no")) == 1
    assert "sized: its plug-in fails (TypeError: " in capsys.readouterr().err
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "t.pt")
    assert load_backbone(str(tmp_path / "t.pt")).arch == "resnet18"
    run(
        f"pretrain --arch flat --shards {shards} --epochs 1 --batch-size 8 --queue-size 0"
        f" --crop-size 32 --workers 0 --device cpu --out {tmp_path}/run"
    )
    assert load_backbone(str(tmp_path / "run/last.pt")).arch == "flat"
    assert 'optimizer = "adamw"' in (tmp_path / "run/config.toml").read_text()
    run(f"publish {tmp_path}/run --out {tmp_path}/shared")
    card = (tmp_path / "shared/README.md").read_text()
    assert "With the toolkit, and the package that adds this backbone to it:" in card
    backbones._plugins.cache_clear()
    backbone_spec.cache_clear()
    (about / "entry_points.txt").unlink()
    with pytest.raises(InputError, match=r"last.pt: holds a flat, which cannot be built here"):
        load_backbone(str(tmp_path / "run/last.pt"))


def test_a_network_that_is_not_there_is_not_taken_for_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its tensors are those of a ResNet; what it makes of images is not."""
    normalised = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    theirs = dataclasses.replace(backbone_spec("resnet18"), **normalised)
    with monkeypatch.context() as installed:
        entry = SimpleNamespace(load=lambda: theirs)
        installed.setattr(backbones, "_plugins", lambda: {"theirs": entry})
        torch.save(build_backbone("theirs").state_dict(), tmp_path / "t.pt")
        run(
            f"export {tmp_path}/t.pt --arch theirs --format safetensors"
            f" --out {tmp_path}/t.safetensors"
        )
        assert load_backbone(str(tmp_path / "t.safetensors")).arch == "theirs"
    backbone_spec.cache_clear()
    with pytest.raises(InputError, match="holds a theirs, which cannot be built here"):
        load_backbone(str(tmp_path / "t.safetensors"))


# What they compute


def test_a_vit_of_another_size_is_torchvisions_with_interpolated_places() -> None:
    ours = random_backbone("vit_b_32", 3).eval()
    theirs = torchvision.models.get_model("vit_b_32")
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.heads = nn.Identity()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.eval()(images))
        places = theirs.encoder.pos_embedding
        resized = timm.layers.resample_abs_pos_embed(places, [6, 5], num_prefix_tokens=1)
        torch.testing.assert_close(backbones._resized(places, 6, 5), resized)
        assert ours(images[..., :48, :32]).shape == (2, 32)


@pytest.mark.parametrize("arch", [*FAMILIES, "timm:repghostnet_050", "timm:legacy_seresnet18"])
def test_a_training_forward_draws_no_random_numbers(arch: str) -> None:
    network = random_backbone(arch, 0).train()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(network(images), network(images))


def test_images_are_normalised_as_a_network_was_made_for() -> None:
    spec = backbone_spec("timm:vit_tiny_patch16_224")
    assert of(spec) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    (given,) = backbones._Renormalise(spec)(nn.Identity(), (normalise(pixels),))
    torch.testing.assert_close(given, normalise(pixels, spec.mean, spec.std))


FINE_TUNING = (
    "finetune --shards {shards} --split 1 --checkpoint random --arch {arch} --epochs 1"
    " --batch-size 4 --segments 2 --crop-size 32 --workers 0 --device cpu --freeze-bn none"
    " --out {out}"
)


def test_sizes_that_do_not_fit(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_size("vit_b_32", 48)
    require_size("resnet18", 1)
    with pytest.raises(InputError, match=r"^--crop-size: vit_b_32 takes no images of 50 px"):
        require_size("vit_b_32", 50)
    shared = f"--shards {shards} --out {tmp_path}/out --crop-size 50 --workers 0 --device cpu"
    assert cli.run(shlex.split(f"pretrain --arch vit_b_32 --batch-size 8 {shared}")) == 1
    features = f"extract-features --checkpoint random --arch timm:test_vit {shared}"
    assert cli.run(shlex.split(features)) == 1
    with pytest.raises(InputError, match=r"it is made for 224 px; 64 px would do$"):
        require_size("vit_b_32", 60)
    tuned = FINE_TUNING.format(shards=shards, arch="timm:test_vit", out=tmp_path / "tuned")
    assert cli.run(shlex.split(f"{tuned} --test-size 40")) == 1
    assert "--test-size: timm:test_vit takes no images of 40 px" in capsys.readouterr().err
    run(f"{tuned} --test-size 32")
    assert cli.run(shlex.split(f"{tuned} --test-size 40 --resume auto")) == 1
    assert "--test-size: timm:test_vit takes no images of 40 px" in capsys.readouterr().err
    command = f"finetune-eval --shards {shards} --checkpoint {tmp_path}/tuned/last.pt --device cpu"
    assert cli.run(shlex.split(f"{command} --test-size 40 --out {tmp_path}/tested")) == 1
    assert "--test-size: timm:test_vit takes no images of 40 px" in capsys.readouterr().err


def test_files_of_timm_need_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = timm.create_model("test_vit")
    torch.save(network.state_dict(), tmp_path / "t.pt")
    with pytest.raises(InputError, match="is recognised by its tensors — give --arch if it is tim"):
        load_backbone(str(tmp_path / "t.pt"))
    with pytest.raises(InputError, match="unknown architecture 'test_vit' — did you mean timm"):
        load_backbone(str(tmp_path / "t.pt"), "test_vit")
    assert cli.run(shlex.split(f"import {tmp_path}/t.pt --arch test_vit --out {tmp_path}/n")) == 1
    assert "unknown architecture 'test_vit'" in capsys.readouterr().err
    found = load_backbone(str(tmp_path / "t.pt"), "timm:test_vit")
    network.reset_classifier(0)
    assert found.network.state_dict().keys() == network.state_dict().keys()
    with pytest.raises(InputError, match="compared with a timm:test_vit2"):
        load_backbone(str(tmp_path / "t.pt"), "timm:test_vit2")
    (spec,) = parse_encoders([f"ref={tmp_path}/t.pt"], "timm:test_vit")
    assert spec.arch == "timm:test_vit"
    for command in ("import", "export --format torchvision"):
        run(f"{command} {tmp_path}/t.pt --arch timm:test_vit --out {tmp_path}/{command[:2]}.pt")
    assert load_backbone(str(tmp_path / "im.pt")).sha256 == found.sha256
    assert load_backbone(str(tmp_path / "ex.pt"), "timm:test_vit").sha256 == found.sha256
    assert cli.run(shlex.split(f"import {tmp_path}/im.pt --arch resnet18 --out {tmp_path}/n")) == 1


def test_queries_know_the_network_of_a_timm_file(shards: str, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "t.pt")
    run(
        f"extract-features --shards {shards} --checkpoint {tmp_path}/t.pt --arch timm:test_vit"
        f" --frames 4 --short-edge 40 --crop-size 32 --workers 0 --device cpu --out {tmp_path}/out"
    )
    features, opened = read_features(tmp_path / "out"), open_shards(shards)
    frames = [opened.read_frame(opened.find("video_0003"), frame) for frame in range(4)]
    found = encode_frames(frames, features, None, "cpu")
    np.testing.assert_allclose(found, features.features[features.find("video_0003")], atol=1e-5)


def test_queries_of_other_features(shards: str, tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r.pt")
    run(
        f"extract-features --shards {shards} --checkpoint {tmp_path}/r.pt --frames 4"
        f" --short-edge 40 --crop-size 32 --workers 0 --device cpu --out {tmp_path}/out"
    )
    features, opened = read_features(tmp_path / "out"), open_shards(shards)
    frames = [opened.read_frame(opened.find("video_0003"), frame) for frame in range(4)]
    expected = encode_frames(frames, features, None, "cpu")
    older = {name: value for name, value in features.encoder.items() if name != "arch"}
    for encoder in (older, {**older, "arch": None}, {**older, "arch": "ResNet"}):
        features.meta["encoder"] = encoder
        assert np.array_equal(encode_frames(frames, features, f"{tmp_path}/r.pt", "cpu"), expected)
    features.meta["encoder"] = {**older, "arch": "timm:test_vit", "sha256": "0" * 64}
    with pytest.raises(InputError, match="is another encoder"):
        encode_frames(frames, features, f"{tmp_path}/r.pt", "cpu")


@pytest.mark.parametrize("name", ["levit_128s", "repvit_m0_9"])
def test_classifiers_of_timm_with_other_parts(name: str, tmp_path: Path) -> None:
    torch.save(timm.create_model(name).state_dict(), tmp_path / "t.pt")
    found = load_backbone(str(tmp_path / "t.pt"), f"timm:{name}")
    assert found.network.state_dict().keys() == backbone_tensors(f"timm:{name}").keys()


@pytest.mark.parametrize("arch", SMALLER)
def test_files_of_torchvision_are_recognised(arch: str, tmp_path: Path) -> None:
    network = torchvision.models.get_model(arch, weights=None)
    torch.save(network.state_dict(), tmp_path / "t.pt")
    assert load_backbone(str(tmp_path / "t.pt")).arch == arch


def test_timms_own_weights(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    shards: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = timm.create_model
    weights = made("test_vit").state_dict()

    def with_weights(name: str, pretrained: bool = False, **given: object) -> nn.Module:
        if not pretrained:
            return made(name, **given)
        overlay = {"file": str(tmp_path / "t.safetensors"), "source": "file"}
        return made(name, pretrained=True, pretrained_cfg_overlay=overlay, **given)

    safetensors.torch.save_file(weights, tmp_path / "t.safetensors")
    monkeypatch.setattr(timm, "create_model", with_weights)
    found = load_backbone("timm:test_vit")
    assert torch.equal(found.network.state_dict()["pos_embed"], weights["pos_embed"])
    record = found.record(0)
    assert record["checkpoint"] == "timm:test_vit"
    assert (record["weights"], record["licence"]) == ("test_vit.r160_in1k", "apache-2.0")
    start = (
        f"pretrain --shards {shards} --epochs 1 --batch-size 8 --queue-size 0 --crop-size 32"
        f" --workers 0 --device cpu --lr 1e-12 --init timm:test_vit --out {tmp_path}/"
    )
    run(f"{start}run --arch timm:test_vit")
    assert "timm:test_vit: loaded the backbone" in capsys.readouterr().err
    trained = load_backbone(str(tmp_path / "run/last.pt")).network.state_dict()
    torch.testing.assert_close(trained["pos_embed"], weights["pos_embed"])
    (tmp_path / "t.safetensors").unlink()
    assert cli.run(shlex.split(f"{start}other --arch resnet18")) == 1  # nothing is fetched
    said = capsys.readouterr().err
    assert "holds a timm:test_vit, not a resnet18 — give --arch timm:test_vit" in said
    with pytest.raises(InputError, match=r"timm:test_vit: timm cannot load its weights") as told:
        load_backbone("timm:test_vit")
    assert "\n" not in str(told.value)
    assert "https://huggingface.co/timm/test_vit.r160_in1k" in str(told.value)


def test_places_of_a_swin_are_its_own(tmp_path: Path) -> None:
    tensors = torchvision.models.get_model("swin_t").state_dict()
    name = next(name for name in tensors if name.endswith("relative_position_index"))
    tensors[name] = tensors[name] + 10**9
    torch.save(tensors, tmp_path / "t.pt")
    with pytest.raises(InputError, match=f"{name} is not that of a swin_t"):
        load_backbone(str(tmp_path / "t.pt"))


def test_a_vit_is_exported_for_the_size_it_was_trained_with(tmp_path: Path) -> None:
    network = random_backbone("timm:vit_tiny_patch16_224", 0).eval()
    metadata = {"arch": "timm:vit_tiny_patch16_224"}
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w", metadata)
    run(f"export {tmp_path}/w --format huggingface --size 112 --out {tmp_path}/folder")
    theirs = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True).eval()
    spec = backbone_spec("timm:vit_tiny_patch16_224")
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    with torch.no_grad():
        ours = network(normalise(pixels))
        torch.testing.assert_close(theirs(normalise(pixels, *of(spec))), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["timm:test_vit", "mobilenet_v3_small"])
def test_fine_tuning(arch: str, shards: str, tmp_path: Path) -> None:
    tuned = FINE_TUNING.format(shards=shards, arch=arch, out=tmp_path / "run")
    run(f"{tuned} --test-size 32")
    assert load_backbone(str(tmp_path / "run/last.pt")).arch == arch


def test_every_kind_of_batchnorm_is_frozen() -> None:
    model = VideoClassifier("timm:levit_128s", 2, "all")
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert layers
    assert not any(layer.training or layer.weight.requires_grad for layer in layers)


def test_comparisons_refuse_what_cannot_work_before_any_extraction(
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(InputError, match=r"timm:vovnet57a: timm has no weights for it — give a fi"):
        parse_encoders(["timm:vovnet57a"], None)
    command = f"compare --shards {shards} --out {tmp_path}/out --encoder random:resnet10_w16"
    command += " --encoder timm:test_vit --crop-size 50 --device cpu"
    assert cli.run(shlex.split(command)) == 1
    assert "--crop-size: timm:test_vit takes no images of 50 px" in capsys.readouterr().err
    torch.save(torchvision.models.get_model("vit_b_32").state_dict(), tmp_path / "vit.pt")
    assert cli.run(shlex.split(command.replace("timm:test_vit", f"{tmp_path}/vit.pt"))) == 1
    assert "--crop-size: vit_b_32 takes no images of 50 px" in capsys.readouterr().err
    command = command.replace("--crop-size 50", "--crop-size 32")
    assert cli.run(shlex.split(f"{command} --baseline randm")) == 1
    assert "--baseline: no encoder is named 'randm'" in capsys.readouterr().err
    made = timm.create_model

    def unreachable(name: str, pretrained: bool = False, **given: object) -> nn.Module:
        if pretrained:
            raise OSError("the network is unreachable")
        return made(name, **given)

    monkeypatch.setattr(timm, "create_model", unreachable)
    assert cli.run(shlex.split(command)) == 1
    assert "timm:test_vit: timm cannot load its weights (OSError" in capsys.readouterr().err
    assert not (tmp_path / "out" / "features").exists()


def test_comparisons_of_timms_files_with_others(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "t.pt")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r.pt")
    found = parse_encoders([f"{tmp_path}/t.pt", f"{tmp_path}/r.pt"], "timm:test_vit")
    assert [(spec.arch, spec.network) for spec in found] == [
        ("timm:test_vit", "timm:test_vit"),
        (None, "resnet18"),
    ]


def test_trackers_need_a_resnet() -> None:
    from seco.models.siamfc import DilatedBackbone

    with pytest.raises(InputError, match="is not a ResNet"):
        DilatedBackbone(build_backbone("timm:test_vit"), "layer4")


# Without BatchNorm


def test_keys_are_shuffled_only_where_batchnorm_could_tell() -> None:
    assert SeCo("resnet10_w16", queue_size=8).shuffles_keys
    assert not SeCo("timm:test_vit", queue_size=8).shuffles_keys
    for size in (1, 2, 4):
        for rank in range(size):
            plan = KeyShuffle(8, rank, size, None)
            assert plan.sent.tolist() == list(range(KEYS * 8 // size))
            assert plan.sent_counts[rank] == KEYS * 8 // size
    vectors = torch.arange(2 * KEYS * 4).view(-1, 1)  # of two ranks with four rows each
    by_row = KeyShuffle(8, 0, 2, None).by_row(vectors)[..., 0]
    assert by_row[0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]


def test_two_ranks_of_a_vit_are_one(shards: str, tmp_path: Path) -> None:
    from tests import commands

    for processes in (1, 2):
        command = commands.start(
            *("pretrain", "--arch", "timm:test_vit", "--shards", shards, "--epochs", 2),
            *("--batch-size", 8, "--queue-size", 16, "--crop-size", 32, "--workers", 0),
            *("--device", "cpu", "--log-every", 1, "--processes", processes),
            *("--out", tmp_path / f"{processes}"),
        )
        _, said = command.communicate(timeout=600)
        assert command.returncode == 0, said
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "12"
    )
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def given(**settings: object) -> PretrainConfig:
    return PretrainConfig(**{"batch_size": 512, **settings})  # type: ignore[arg-type]


def test_defaults_of_each_optimizer() -> None:
    resolve = functools.partial(resolve_pretrain)
    plain = resolve(with_optimizer(given()))
    assert (plain.optimizer, plain.lr, plain.weight_decay) == ("auto", 0.2, 1e-4)
    vit = resolve(with_optimizer(given(arch="timm:test_vit")))
    assert (vit.optimizer, vit.lr, vit.weight_decay) == ("adamw", 3e-4, 0.1)
    lars = resolve(with_optimizer(given(optimizer="lars")))
    assert (lars.lr, lars.weight_decay) == (0.6, 1e-6)
    sgd = resolve(with_optimizer(given(arch="timm:test_vit", optimizer="sgd")))
    assert (sgd.optimizer, sgd.lr) == ("sgd", 0.2)
    assert resolve(with_optimizer(given(optimizer="sgd"))) == plain  # resumes it, and is resumed


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_norms_and_biases_are_not_decayed_if_asked(kind: str) -> None:
    layer = nn.Linear(3, 3)
    config = resolve_pretrain(
        given(optimizer=kind, decay_weights_only=True, weight_decay=0.5, lr=0.1)
    )
    optimizer = optimizer_for(list(layer.parameters()), config)
    before = layer.weight.clone(), layer.bias.clone()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before[0] * 0.95)
    assert torch.equal(layer.bias, before[1])


def test_lars_is_as_its_formula_says() -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(3, 2)), rng.normal(size=3)
    parameters = [nn.Parameter(torch.tensor(value)) for value in (weight, bias)]
    optimizer = LARS(parameters, lr=0.5, momentum=0.9, weight_decay=0.01)
    moved: list[np.ndarray] = [np.zeros((3, 2)), np.zeros(3)]
    for _ in range(3):
        gradients = rng.normal(size=(3, 2)), rng.normal(size=3)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
        change = gradients[0] + 0.01 * weight
        change *= 0.001 * np.linalg.norm(weight) / np.linalg.norm(change)
        moved = [0.9 * moved[0] + change, 0.9 * moved[1] + gradients[1]]
        weight, bias = weight - 0.5 * moved[0], bias - 0.5 * moved[1]
    np.testing.assert_allclose(parameters[0].detach().numpy(), weight, rtol=1e-12)
    np.testing.assert_allclose(parameters[1].detach().numpy(), bias, rtol=1e-12)


@pytest.mark.parametrize("kind", ["lars", "adamw"])
def test_runs_with_other_optimizers_resume_to_the_bit(
    kind: str, shards: str, tmp_path: Path
) -> None:
    options = f"--arch resnet10_w16 --optimizer {kind} --decay-weights-only"
    again = f"{pretrain_and_resume(options, shards, tmp_path)}/again --resume auto"
    run(again)  # nothing is left to do
    damaged = load_checkpoint(tmp_path / "again/last.pt")
    state = damaged["optimizer"]["state"]
    for values in (
        {},
        {"step": torch.ones(())},
        {**state[0], "exp_avg": None},
        {**state[0], "x": 1},
    ):
        state[0] = values
        torch.save(damaged, tmp_path / "again/last.pt")
        assert cli.run(shlex.split(again)) == 1
