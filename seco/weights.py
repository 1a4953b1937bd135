"""Backbone weights from a checkpoint, a torchvision state dict or at random; never partial."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from seco.checkpoint import FORMAT, checked_checkpoint, load_torch_file
from seco.encoder import build_backbone
from shards.errors import InputError

RANDOM = "random"
_QUERY_BACKBONE = "query_encoder.backbone."
_COMMON_ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclass(frozen=True)
class Backbone:
    """A frozen feature extractor and where it came from."""

    network: nn.Module
    arch: str
    source: str
    sha256: str  # of the tensors
    tasks: str | None = None  # what it was pre-trained on, when the file says


def load_backbone(source: str, arch: str | None = None, seed: int = 0) -> Backbone:
    """The backbone of a checkpoint of this toolkit, of a torchvision ResNet file, or a random one.

    Args:
        source: a file, or ``random``.
        arch: needed for ``random``; checked against a file when given.
        seed: of the random weights.

    Raises:
        InputError: not such a file, or one backbone tensor is missing, of another shape or left
            over: features of half-loaded weights look plausible and are worthless.
    """
    if source == RANDOM:
        arch = arch or "resnet50"
        network = random_backbone(arch, seed)
        return Backbone(network, arch, RANDOM, tensors_sha256(network.state_dict()))
    path = Path(source)
    content = load_torch_file(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        content = checked_checkpoint(content, path)
        state = {
            name[len(_QUERY_BACKBONE) :]: tensor
            for name, tensor in content["model"].items()
            if name.startswith(_QUERY_BACKBONE)
        }
        found, tasks = content["config"]["arch"], content["config"]["tasks"]
    else:
        tasks = None
        state = _torchvision_state(content, path)
        found = arch or _arch_of(state, path)
    if arch is not None and arch != found:
        raise InputError(f"holds a {found}, not a {arch}", path, "leave --arch out")
    network = build_backbone(found)
    _load_strictly(network, state, path)
    return Backbone(network, found, source, tensors_sha256(network.state_dict()), tasks)


def random_backbone(arch: str, seed: int) -> nn.Module:
    """torchvision's initialisation under a seed of its own; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(arch)


def _torchvision_state(content: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise InputError("is neither a checkpoint of this toolkit nor a ResNet state dict", path)
    return {name: t for name, t in content.items() if not name.startswith("fc.")}


def _arch_of(state: dict[str, Tensor], path: Path) -> str:
    for arch in _COMMON_ARCHS:
        with torch.device("meta"):
            expected = torchvision.models.get_model(arch, weights=None).state_dict()
        shapes = {k: v.shape for k, v in expected.items() if not k.startswith("fc.")}
        if {k: v.shape for k, v in state.items()} == shapes:
            return arch
    raise InputError(
        "is not the state dict of a torchvision ResNet",
        path,
        f"its backbone tensors fit none of {', '.join(_COMMON_ARCHS)}",
    )


def _load_strictly(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    expected = network.state_dict()
    wrong = sorted(set(expected) ^ set(state)) + sorted(
        name for name in set(expected) & set(state) if expected[name].shape != state[name].shape
    )
    if wrong:
        raise InputError(
            f"{len(wrong)} backbone tensors are missing, left over or of another shape, "
            f"first {wrong[0]}",
            path,
        )
    network.load_state_dict(state, strict=True)


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """A digest of names, shapes and values: equal exactly for equal weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
