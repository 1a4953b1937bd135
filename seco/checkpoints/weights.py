"""The backbone that features are taken from: of a file of any known layout, or at random."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seco.checkpoints.foreign_checkpoints import read_weights
from seco.model.backbones import build_backbone
from shards.errors import InputError

RANDOM = "random"


@dataclass(frozen=True)
class Backbone:
    """A frozen feature extractor and where it came from."""

    network: nn.Module
    arch: str
    source: str
    sha256: str  # of the tensors
    tasks: str | None = None  # what it was pre-trained on, when the file says

    def record(self, seed: int) -> dict[str, Any]:
        """What results say of the encoder they were measured on; ``seed`` of random weights."""
        return {
            "arch": self.arch,
            "checkpoint": self.source,
            "sha256": self.sha256,
            "seed": seed if self.source == RANDOM else None,
            "tasks": self.tasks,
        }


def load_backbone(source: str, arch: str | None = None, seed: int = 0) -> Backbone:
    """The query backbone of a file, or a random one.

    Args:
        source: a file of any layout of :mod:`seco.checkpoints.foreign_checkpoints`, or ``random``.
        arch: of ``random``, resnet50 when not given; checked against a file when given.
        seed: of the random weights.

    Raises:
        InputError: not such a file, or one tensor is missing, of another shape or left over:
            features of half-loaded weights look plausible and are worthless.
    """
    if source == RANDOM:
        arch = arch or "resnet50"
        network = random_backbone(arch, seed)
        return Backbone(network, arch, RANDOM, tensors_sha256(network.state_dict()))
    weights = read_weights(Path(source))
    if arch is not None and arch != weights.arch:
        raise InputError(f"holds a {weights.arch}, not a {arch}", source, "leave --arch out")
    network = build_backbone(weights.arch)
    network.load_state_dict(weights.query.backbone, strict=True)
    digest = tensors_sha256(network.state_dict())
    return Backbone(network, weights.arch, source, digest, weights.tasks)


def random_backbone(arch: str, seed: int) -> nn.Module:
    """torchvision's initialisation under a seed of its own; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(arch)


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """A digest of names, shapes and values: equal exactly for equal weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
