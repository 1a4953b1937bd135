"""Checkpoints of others: told apart, taken whole or not at all, never run, and given back equal."""

from __future__ import annotations

import argparse
import builtins
import collections
import functools
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

import cli
from seco.checkpoints.convert import read_weights
from seco.checkpoints.io import load_torch_file
from seco.checkpoints.weights import load_backbone
from seco.config import PretrainConfig, resolve_pretrain
from seco.models.seco import SeCo
from seco.training.pretrain import initialise
from shards.errors import InputError
from tests.made_shards import make_set

State = dict[str, Tensor]
TASKS = ("inter", "intra", "order")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Full-size checkpoints are large: they go as soon as the test is over."""
    yield tmp_path
    shutil.rmtree(tmp_path)


# Files as the others' code writes them. None of this uses the toolkit.


@functools.cache
def network(arch: str) -> torch.nn.Module:
    """A torchvision ResNet whose BatchNorm has seen something."""
    torch.manual_seed(1)
    made: torch.nn.Module = torchvision.models.get_model(arch, weights=None)
    for name, tensor in made.state_dict().items():
        if name.endswith("running_mean"):
            tensor.uniform_(-0.2, 0.2)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(77)
    return made.eval()


def backbone(arch: str) -> State:
    return {n: t for n, t in network(arch).state_dict().items() if not n.startswith("fc.")}


def width(arch: str) -> int:
    return int(network(arch).state_dict()["fc.weight"].shape[1])


def other(state: State) -> State:
    """The same names with other values: a key encoder."""
    return {n: t * 1.25 if t.is_floating_point() else t + 1 for n, t in state.items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def mlp(prefix: str, c: int, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (c, c), "0.bias": (c,), "2.weight": (128, c), "2.bias": (128,)}
    return {prefix + n: torch.randn(*s, generator=generator) for n, s in shapes.items()}


def linear(prefix: str, c: int, rows: int, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, c, generator=generator)
    return {f"{prefix}weight": weight, f"{prefix}bias": torch.randn(rows, generator=generator)}


def momentum(state: State) -> dict[str, Any]:
    """The state dict of an SGD optimizer, cut short."""
    buffers = {0: {"momentum_buffer": torch.ones(3)}}
    group = {"lr": 0.03, "momentum": 0.9, "nesterov": False, "params": list(range(len(state)))}
    return {"state": buffers, "param_groups": [group]}


def moco(arch: str, version: int = 2, keys: int = 3, size: int = 65_536) -> dict[str, Any]:
    c = width(arch)
    head = mlp("fc.", c, 2) if version == 2 else linear("fc.", c, 128, 2)
    query = backbone(arch) | head
    state = prefixed("module.encoder_q.", query) | prefixed("module.encoder_k.", other(query))
    state["module.queue"] = torch.nn.functional.normalize(torch.randn(128, size), dim=0)
    state["module.queue_ptr"] = torch.tensor([512 % size])
    content = {"epoch": 200, "arch": arch, "state_dict": collections.OrderedDict(state)}
    return content | ({"optimizer": momentum(state)} if keys == 4 else {})


def authors(arch: str, size: int = 131_072) -> dict[str, Any]:
    c = width(arch)
    model = backbone(arch)
    for seed, task in enumerate(TASKS):
        model |= mlp(f"fc_{task}.", c, seed)
    model |= linear("fc_order_classifier.", 3 * 128, 2, 9)
    return {
        "opt": argparse.Namespace(nce_k=size, lr_decay_epochs=[120, 160], resume="", rng_seed=None),
        "model": prefixed("module.", model),
        "model_ema": other(model),
        "contrast": {"params": torch.tensor([-1]), "memory": torch.rand(size, 128)},
        "optimizer": momentum(model),
        "scheduler": {"multiplier": 100, "after_scheduler": {"T_max": 5, "_last_lr": [0.1]}},
        "epoch": 400,
    }


def vclr(arch: str, size: int = 96) -> dict[str, Any]:
    """As train_vclr.py of amazon-science/video-contrastive-learning writes it."""
    content, c = authors(arch, size), width(arch)
    model = {n.replace("module.", ""): t for n, t in content["model"].items()}
    model |= linear("fc_order_classifier.", 6 * 128, 4, 9) | mlp("fc_tsn.", c, 4)
    content |= {"model": prefixed("module.", model), "model_ema": other(model)}
    return content | {"contrast_tsn": dict(content["contrast"])}


def finetuned(arch: str) -> dict[str, Any]:
    model = backbone(arch) | linear("fc.", width(arch), 101, 3)
    steps = {"after_scheduler": {"milestones": collections.Counter({500: 1}), "gamma": 0.1}}
    return {
        "opt": argparse.Namespace(net_name=arch, num_classes=101),
        "model": prefixed("module.", model),
        "optimizer": steps,  # exchanged in their code
        "scheduler": momentum(model),
        "epoch": 150,
    }


def whole_network(arch: str) -> State:
    return dict(network(arch).state_dict())


LAYOUTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "moco v1": lambda arch: moco(arch, 1, 4, 96),
    "moco v2": lambda arch: moco(arch, 2, 3, 96),
    "authors": lambda arch: authors(arch, 96),
    "vclr": vclr,
    "finetuned": finetuned,
    "torchvision": whole_network,
}
STATE_OF = {"moco v1": "state_dict", "moco v2": "state_dict", "authors": "model"}
STATE_OF |= {"vclr": "model", "finetuned": "model"}


def saved(path: Path, content: object, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def state_of(layout: str, content: dict[str, Any]) -> dict[str, Any]:
    inner: dict[str, Any] = content[STATE_OF[layout]] if layout in STATE_OF else content
    return inner


def converted(command: str, source: Path, out: Path, *options: str) -> Path:
    assert cli.run([command, str(source), "--out", str(out), *options]) == 0
    return out


def exported(source: Path, layout: str) -> Any:
    """The content of the exported file; plain torch.load takes it, as others will."""
    out = converted("export", source, source.with_suffix(f".{layout}"), "--format", layout)
    if layout == "safetensors":
        return safetensors.torch.load_file(out)
    return torch.load(out, weights_only=True)


def same(found: State, expected: State) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in expected)


# Round trips, each layout at the size of ResNet-50.


@pytest.mark.parametrize(
    ("arch", "keys", "zipped"), [("resnet50", 3, True), ("resnet18", 4, False)]
)
def test_moco_v2_comes_back_equal(
    arch: str, keys: int, zipped: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = moco(arch, 2, keys)
    source = saved(folder / "moco.pth.tar", content, zipped)
    imported = converted("import", source, folder / "moco.pt")
    said = capsys.readouterr().out
    assert f"MoCo v2, {arch}, epoch 200" in said
    assert "head shared, key encoder, queue of 65536" in said
    back = exported(imported, "moco")
    assert list(back) == ["epoch", "arch", "state_dict"]  # three: so the authors' code knows MoCo's
    assert (back["epoch"], back["arch"]) == (200, arch)
    assert same(back["state_dict"], content["state_dict"])
    assert back["state_dict"]["module.queue"].shape == (128, 65_536)
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    ("arch", "keys", "zipped"), [("resnet18", 3, False), ("resnet50", 4, True)]
)
def test_moco_v1_gives_its_backbone(
    arch: str, keys: int, zipped: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(folder / "moco.pth.tar", moco(arch, 1, keys), zipped)
    imported = converted("import", source, folder / "moco.pt")
    assert "not used: one-layer head" in capsys.readouterr().out
    assert same(exported(imported, "torchvision"), backbone(arch))
    to_moco = ["export", str(imported), "--format", "moco", "--out", str(folder / "x")]
    assert cli.run(to_moco) == 1
    assert "no two-layer head" in capsys.readouterr().err
    assert not (folder / "x").exists()


def test_the_authors_seco_comes_back_equal(folder: Path) -> None:
    content = authors("resnet50")
    imported = converted("import", saved(folder / "seco.pth", content), folder / "seco.pt")
    back = exported(imported, "seco-authors")
    for part in ("model", "model_ema", "contrast"):
        assert same(back[part], content[part])
    assert back["epoch"] == 400
    assert len(back) > 3  # their code takes a file of three keys for MoCo's
    assert load_backbone(str(imported)).tasks == "inter,intra,order"


def test_their_fine_tuned_network_gives_its_backbone(folder: Path) -> None:
    source = saved(folder / "current.pth", finetuned("resnet50"))
    imported = converted("import", source, folder / "tuned.pt")
    assert same(exported(imported, "safetensors"), backbone("resnet50"))
    found = load_backbone(str(imported))
    assert found.tasks is None
    assert same(found.network.state_dict(), backbone("resnet50"))


@pytest.mark.parametrize(
    ("kind", "arch"), [("zip", "resnet50"), ("non-zip", "resnet18"), ("safetensors", "resnet34")]
)
def test_features_equal_those_of_the_original_network(kind: str, arch: str, folder: Path) -> None:
    source = folder / arch
    if kind == "safetensors":
        safetensors.torch.save_file(whole_network(arch), source)
    else:
        saved(source, whole_network(arch), zipped=kind == "zip")
    imported = converted("import", source, folder / "imported.pt")
    original = torchvision.models.get_model(arch)
    original.load_state_dict(whole_network(arch))
    original.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = original.eval()(images)
        for file in (source, imported):
            assert torch.equal(load_backbone(str(file)).network.eval()(images), expected)
    for layout in ("torchvision", "safetensors"):
        assert same(exported(imported, layout), backbone(arch))


def test_extract_features_takes_a_file_of_any_layout(folder: Path) -> None:
    shards = make_set(folder / "shards", videos=4, frames=3)
    small = shlex.split("--frames 2 --short-edge 36 --crop-size 32 --workers 0 --device cpu")
    found = []
    for layout, make in LAYOUTS.items():
        source, out = saved(folder / "file", make("resnet18")), folder / layout
        command = ["extract-features", "--shards", shards, "--checkpoint", str(source)]
        assert cli.run([*command, "--out", str(out), *small]) == 0
        found.append(np.load(out / "features.npy"))
        meta = json.loads((out / "meta.json").read_text())["encoder"]
        assert (meta["arch"], len(meta["sha256"])) == ("resnet18", 64)
    assert found[0].shape == (4, 512)
    assert all(np.array_equal(features, found[0]) for features in found)


# Strictness.

DAMAGES = ("missing", "left over", "shape", "not finite", "not a tensor")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_one_wrong_tensor_is_named(layout: str, damage: str, folder: Path) -> None:
    content = LAYOUTS[layout]("resnet18")
    state = state_of(layout, content)
    victim = next(name for name in state if name.endswith("layer3.0.conv2.weight"))
    if damage == "missing":
        del state[victim]
    elif damage == "left over":
        victim = victim.replace("conv2", "conv9")
        state[victim] = torch.ones(3)
    elif damage == "shape":
        state[victim] = state[victim][:, :-1]
    elif damage == "not finite":
        state[victim] = state[victim].clone().fill_(float("nan"))
    else:
        state[victim] = 3
    path = saved(folder / "file", content)
    wanted = "is neither" if layout == "torchvision" and damage == "not a tensor" else damage
    with pytest.raises(InputError, match=wanted) as caught:
        load_backbone(str(path))
    assert victim in str(caught.value) or wanted == "is neither"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "part", "name"),
    [
        ("moco v1", "state_dict", "module.encoder_q.fc.bias"),
        ("moco v2", "state_dict", "module.encoder_q.fc.2.weight"),
        ("moco v2", "state_dict", "module.encoder_k.fc.0.bias"),
        ("moco v2", "state_dict", "module.encoder_k.bn1.running_var"),
        ("moco v2", "state_dict", "module.queue_ptr"),
        ("authors", "model", "module.fc_intra.0.weight"),
        ("authors", "model", "module.fc_order_classifier.bias"),
        ("authors", "model_ema", "fc_order.2.bias"),
        ("authors", "model_ema", "layer4.1.bn2.weight"),
        ("authors", "contrast", "memory"),
        ("vclr", "model", "module.fc_tsn.2.bias"),
        ("vclr", "model", "module.fc_order_classifier.weight"),
        ("finetuned", "model", "module.fc.bias"),
        ("torchvision", None, "fc.weight"),
        ("torchvision", None, "bn1.num_batches_tracked"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_every_part_is_checked(
    layout: str, part: str | None, name: str, damage: str, folder: Path
) -> None:
    content = LAYOUTS[layout]("resnet18")
    state = content if part is None else content[part]
    if damage == "missing":
        del state[name]
    else:
        state[name] = torch.ones(1, 2, 3, dtype=state[name].dtype)
    with pytest.raises(InputError, match=damage) as caught:
        read_weights(saved(folder / "file", content))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "part", "name"),
    [
        ("moco v1", "state_dict", "module.encoder_q.fc.2.weight"),
        ("moco v2", "state_dict", "module.encoder_q.fc.4.weight"),
        ("moco v2", "state_dict", "module.encoder_k.fc_extra"),
        ("moco v2", "state_dict", "module.queue2"),
        ("authors", "model", "module.fc_extra.bias"),
        ("authors", "model_ema", "fc_inter.4.bias"),
        ("authors", "contrast", "index"),
        ("vclr", "model", "module.fc_tsn.4.bias"),
        ("finetuned", "model", "module.fc.0.bias"),
        ("torchvision", None, "fc2.weight"),
        ("torchvision", None, "fc.0.weight"),
    ],
)
def test_every_part_is_taken_whole(layout: str, part: str | None, name: str, folder: Path) -> None:
    content = LAYOUTS[layout]("resnet18")
    (content if part is None else content[part])[name] = torch.ones(3)
    with pytest.raises(InputError, match="is left over") as caught:
        read_weights(saved(folder / "file", content))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(3)],
        {},
        {"epoch": 3},
        {"weight": torch.ones(3)},
        {"state_dict": {"module.backbone.conv1.weight": torch.ones(3)}},
        {"opt": 1, "model": 2},
        {"format": "seco-checkpoint", "version": 1, "config": {"arch": "r", "tasks": ""}},
    ],
)
def test_other_files_are_refused_in_one_line(content: object, folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_weights(saved(folder / "file", content))
    assert "\n" not in str(caught.value)


def test_another_architecture_is_named(folder: Path) -> None:
    path = saved(folder / "file", moco("resnet18", size=96) | {"arch": "resnet50"})
    with pytest.raises(InputError, match=r"module\.encoder_q\.\* is not a resnet50"):
        read_weights(path)
    for arch in ("resnet34", "wide_resnet50_2"):
        assert read_weights(saved(folder / "file", whole_network(arch))).arch == arch


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("how", ["sparse", "stretched", "meta"])
def test_tensors_without_their_bytes_are_refused(how: str, folder: Path) -> None:
    """A few bytes may claim to be a queue that fills the memory."""
    content = moco("resnet18", size=96)
    queue = {
        "sparse": lambda: torch.sparse_coo_tensor(size=(128, 10**9)),
        "stretched": lambda: torch.ones(128, 1).expand(128, 10**9),
        "meta": lambda: torch.empty(128, 10**9, device="meta"),
    }[how]()
    content["state_dict"]["module.queue"] = queue
    with pytest.raises(
        InputError, match=r"module\.queue is not a dense tensor|is not a checkpoint"
    ):
        read_weights(saved(folder / "file", content))


@pytest.mark.parametrize("cut", [4, 9, 50, 100_000])
def test_damaged_safetensors(cut: int, folder: Path) -> None:
    whole = safetensors.torch.save(backbone("resnet18"))
    (folder / "file").write_bytes(whole[:cut])
    with pytest.raises(InputError, match=r"damaged|not a checkpoint"):
        read_weights(folder / "file")


def test_files_from_before_batches_were_counted(folder: Path) -> None:
    """As torchvision's first weights, still the ones most people have."""
    state = {n: t for n, t in whole_network("resnet18").items() if not n.endswith("tracked")}
    found = load_backbone(str(saved(folder / "file", state, zipped=False)))
    expected = backbone("resnet18")
    for name, tensor in found.network.state_dict().items():
        assert torch.equal(tensor, expected[name]) or name.endswith("tracked")


# Nothing in a file is run.


class Runs:
    """Unpickled by plain pickle, this calls ``function``."""

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.call


def first_tensors(content: dict[str, Any]) -> dict[str, Any]:
    """A small file of the same layout."""
    return {
        name: dict(list(part.items())[:3]) if isinstance(part, dict) else part
        for name, part in list(content.items())[:9]
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", [*LAYOUTS, "own"])
def test_a_malicious_file_is_refused_and_not_run(layout: str, zipped: bool, folder: Path) -> None:
    marker = folder / "ran"
    calls = [
        Runs(os.system, f"touch {marker}"),
        Runs(builtins.exec, f"open({str(marker)!r}, 'w')"),
        Runs(argparse.FileType("w"), str(marker)),  # of the module whose Namespace is allowed
    ]
    for evil in calls:
        content = {} if layout == "own" else first_tensors(LAYOUTS[layout]("resnet18"))
        places: list[dict[str, Any]] = [content]
        places += [part for part in content.values() if isinstance(part, dict)]
        for place in places:
            place["evil"] = evil
            path = saved(folder / "file", content, zipped)
            with pytest.raises(InputError, match="holds more than tensors"):
                read_weights(path)
            del place["evil"]
        if "opt" in content:
            content["opt"].evil = evil
            with pytest.raises(InputError, match="holds more than tensors"):
                read_weights(saved(folder / "file", content, zipped))
    assert not marker.exists()
    # The files would have run it.
    with pytest.raises(Exception, match=r".*"):
        torch.load(path, weights_only=False)["nothing"]
    assert marker.exists()


def test_a_namespace_is_read_as_nothing_and_allowed_only_meanwhile(folder: Path) -> None:
    allowed = set(torch.serialization.get_safe_globals())
    state = {"__setstate__": 1, "__class__": 2, "lr": 3}
    settings = argparse.Namespace()
    settings.__dict__.update(state)
    opt = load_torch_file(saved(folder / "file", {"opt": settings}))["opt"]
    assert not isinstance(opt, argparse.Namespace)
    assert not hasattr(opt, "lr")
    assert not hasattr(opt, "__dict__")
    assert set(torch.serialization.get_safe_globals()) == allowed
    with pytest.raises(Exception, match="argparse"):
        torch.load(folder / "file", weights_only=True)


# --init.


def settings(path: Path, **changes: Any) -> PretrainConfig:
    small = {"arch": "resnet18", "queue_size": 8, "batch_size": 4, "preset": "authors"}
    return resolve_pretrain(PretrainConfig(init=str(path), **{**small, **changes}))


def initialised(path: Path, **changes: Any) -> tuple[State, State]:
    """All tensors of a model before and after."""
    torch.manual_seed(5)
    model = SeCo(settings(path, **changes))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialise(model, model.config)
    return before, model.state_dict()


def expected_backbones(key: State | None = None) -> State:
    query = backbone("resnet18")
    return prefixed("query_encoder.backbone.", query) | prefixed(
        "key_encoder.backbone.", key or query
    )


def expected_heads(source: dict[str, State]) -> State:
    return {
        f"{side}_encoder.heads.{task}.{name}": tensor
        for task, head in source.items()
        for side in ("query", "key")
        for name, tensor in head.items()
    }


def assert_exactly(before: State, after: State, taken: State) -> None:
    """``taken`` is in the model, and all else is as it was."""
    assert set(taken) <= set(after)
    for name, tensor in after.items():
        assert torch.equal(tensor, taken.get(name, before[name])), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("heads", "through_import"), [("separate", False), ("separate", True), ("shared", False)]
)
def test_init_takes_exactly_what_it_says(
    layout: str,
    heads: str,
    through_import: bool,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = LAYOUTS[layout]("resnet18")
    path = saved(folder / "file", content)
    if through_import:
        path = converted("import", path, folder / "imported.pt")
    capsys.readouterr()
    before, after = initialised(path, heads=heads)
    said = capsys.readouterr().err
    names = TASKS if heads == "separate" else ("shared",)
    taken = expected_backbones()
    if layout == "moco v2":
        taken |= expected_heads({name: mlp("", 512, 2) for name in names})
        assert f"loaded the backbone, head{'s' * (heads == 'separate')} {'/'.join(names)}" in said
    elif layout == "authors":
        ema = content["model_ema"]
        taken = expected_backbones({n: t for n, t in ema.items() if not n.startswith("fc_")})
        if heads == "separate":
            for side, state, before_name in (
                ("query", content["model"], "module.fc_"),
                ("key", ema, "fc_"),
            ):
                taken |= {
                    f"{side}_encoder.heads.{name[len(before_name) :]}": tensor
                    for name, tensor in state.items()
                    if name.startswith(before_name) and "classifier" not in name
                }
            taken |= linear("order_classifier.", 384, 2, 9)
            assert "heads inter/intra/order, the order classifier, the key encoder" in said
        else:
            assert "not loaded: heads inter/intra/order, order classifier" in said
            assert "new: head shared" in said
    elif layout == "vclr" and heads == "separate":
        taken |= expected_heads({task: mlp("", 512, seed) for seed, task in enumerate(TASKS)})
        assert "loaded the backbone, heads inter/intra/order" in said
        if not through_import:
            assert "VCLR, resnet18, epoch 400" in said
            left = "head tsn, order classifier, key encoder, queue, queue of clips"
            assert f"not loaded: {left}" in said
    else:
        assert f"new: head{'s' * (heads == 'separate')} {'/'.join(names)}" in said
    assert_exactly(before, after, taken)
    assert said.count("\n") == 1
    assert said.startswith(f"seco pretrain: --init {path}: ")


def test_init_from_a_run_takes_the_heads_of_the_same_name(folder: Path) -> None:
    torch.manual_seed(6)
    run = SeCo(settings(Path("none"), tasks="inter,order"))
    config = {"arch": "resnet18", "tasks": "inter,order"}
    content = {"format": "seco-checkpoint", "version": 1, "config": config}
    state = run.state_dict()
    for name in state:
        if name.startswith("key_encoder") and state[name].is_floating_point():
            state[name] = state[name] * 2
    path = saved(folder / "last.pt", content | {"model": state})
    before, after = initialised(path)
    query = {n[14:]: t for n, t in state.items() if n.startswith("query_encoder.")}
    taken = prefixed("query_encoder.", query) | prefixed("key_encoder.", query)
    taken |= {name: tensor for name, tensor in state.items() if name.startswith("order_classifier")}
    assert_exactly(before, after, taken)
    before, after = initialised(path, heads="shared")
    assert_exactly(before, after, {n: t for n, t in taken.items() if ".backbone." in n})


def test_init_of_another_width_or_architecture(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(folder / "file", moco("resnet18", size=96))
    before, after = initialised(path, embedding_dim=64)
    assert_exactly(before, after, expected_backbones())
    assert "new: heads inter/intra/order" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds a resnet18, not a resnet34 — give --arch resnet18"):
        initialised(path, arch="resnet34")


# Export of a run.


def test_a_run_is_exported_with_its_queue(folder: Path) -> None:
    """The pointer is kept where the layout has one, and the oldest key is first where not."""
    model = SeCo(settings(Path("none")))
    model.queue.append(torch.nn.functional.normalize(torch.randn(11, 128)), torch.arange(11))
    assert int(model.queue.next_slot) == 3
    config = {"arch": "resnet18", "tasks": "inter,intra,order"}
    content = {"format": "seco-checkpoint", "version": 1, "config": config, "step": 5}
    source = saved(folder / "last.pt", content | {"model": model.state_dict()})
    rows = model.queue.rows
    state = exported(source, "moco")["state_dict"]
    assert torch.equal(state["module.queue"], rows.t())
    assert state["module.queue_ptr"].tolist() == [3]
    head = model.query_encoder.heads["inter"].state_dict()  # whose keys are in the queue
    assert torch.equal(state["module.encoder_q.fc.2.weight"], head["2.weight"])
    theirs = exported(source, "seco-authors")
    assert torch.equal(theirs["contrast"]["memory"], torch.cat([rows[3:], rows[:3]]))
    found = {name.replace("module.", ""): tensor for name, tensor in theirs["model"].items()}
    assert same(
        {n: t for n, t in found.items() if not n.startswith("fc_")},
        model.query_encoder.backbone.state_dict(),
    )
    assert set(theirs["model_ema"]) == set(found)
    for layout in ("torchvision", "safetensors"):
        state = exported(source, layout)
        assert same(state, model.query_encoder.backbone.state_dict())
        assert not torchvision.models.resnet18().load_state_dict(state, strict=False)[1]


def test_mistakes_of_import_and_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(folder / "file", whole_network("resnet18"))
    before = path.read_bytes()
    for command, message in (
        (f"import {path} --out {path}", "is the input file"),
        (f"import {path} --out {folder}", "is a folder"),
        (f"import {folder}/none --out {folder}/x", "none: cannot be read"),
        (f"export {path} --format moco --out {folder}/x", "no two-layer head"),
        (f"export {path} --format seco-authors --out {folder}/x", "no head for inter"),
        (f"import {path} --out {path}/x", "cannot be written"),
    ):
        assert cli.run(command.split()) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert path.read_bytes() == before
    assert [p.name for p in folder.iterdir()] == ["file"]
