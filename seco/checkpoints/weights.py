"""The frozen backbone that features come from: loaded from any known checkpoint, or random.

A BatchNorm left in training mode changes with every batch, and features then depend on their order;
so a frozen backbone is compared, before and after use, with what was loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from seco.checkpoints.convert import read_weights
from seco.checkpoints.io import FINETUNED, epochs_reached, load_checkpoint
from seco.checkpoints.named import NamedWeights, weights_file
from seco.config import IMAGENET_MEAN, IMAGENET_STD, TrackTrainConfig
from seco.models.backbones import (
    TIMM_PREFIX,
    backbone_spec,
    build_backbone,
    built_empty,
    pretrained_timm,
    tensors_sha256,
    timm_origin,
)
from seco.models.classifier import Classes, VideoClassifier
from seco.models.siamfc import TRACKER, SiamFC
from shards.errors import InputError
from shards.untrusted import convert

RANDOM = "random"
_Module = TypeVar("_Module", bound=nn.Module)


class Backbone(nn.Module):
    """A frozen feature extractor and where it came from: (N, 3, H, W) to (N, C).

    Args:
        network: set to evaluation mode.
        arch: its name.
        source: a file, a name of :mod:`seco.checkpoints.named`, ``timm:NAME``, ``random``, or
            ``memory``.
        tasks: tasks it was pre-trained on, if the file says.
        named: the origin of weights that were given by name.

    Attributes:
        sha256: digest of the tensors.
    """

    def __init__(
        self,
        network: nn.Module,
        arch: str,
        source: str,
        tasks: str | None = None,
        named: NamedWeights | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.arch = arch
        self.source = source
        self.tasks = tasks
        self.named = named
        self.sha256 = tensors_sha256(network.state_dict())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to pooled features (N, C)."""
        features: Tensor = self.network(images)
        return features

    @cached_property
    def transform(self) -> Callable[[Any], Tensor]:
        """Transform of a PIL image, array or uint8 tensor to (3, 224, 224), as for extraction."""
        from torchvision.transforms import v2

        composed: Callable[[Any], Tensor] = v2.Compose(
            [
                v2.ToImage(),
                v2.Resize(256, antialias=True),
                v2.CenterCrop(224),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
            ]
        )
        return composed

    def record(self, seed: int) -> dict[str, Any]:
        """Describe the encoder, for the results measured with it; ``seed`` is of random weights."""
        origin = self.named.record() if self.named else {}
        if self.source.startswith(TIMM_PREFIX):
            origin = timm_origin(self.source)
        return {
            "arch": self.arch,
            "checkpoint": self.source,
            "sha256": self.sha256,
            "seed": seed if self.source == RANDOM else None,
            "tasks": self.tasks,
            **origin,
        }


def load_backbone(source: str | Path, arch: str | None = None, seed: int = 0) -> Backbone:
    """Load the query backbone from a file or by name, or initialise a random one.

    Args:
        source: a file of any layout of :mod:`seco.checkpoints.convert`; a name such as
            ``imagenet-v1`` (:mod:`seco.checkpoints.named`; a ``Path`` is always a file);
            ``timm:NAME``, the weights timm has for this model; or ``random``.
        arch: architecture for ``random`` and ``imagenet-…`` (default: resnet50); else checked if
            given.
        seed: for random weights.

    Raises:
        InputError: named weights cannot be fetched; unknown layout; or a tensor is missing, has
            another shape or is left over: features of partly loaded weights look plausible and
            are worthless.
    """
    if str(source) == RANDOM:
        arch = arch or "resnet50"
        network = random_backbone(arch, seed)
        return Backbone(network, arch, RANDOM)
    if isinstance(source, str) and source.startswith(TIMM_PREFIX):
        if arch not in (None, source):
            raise InputError(f"is not a {arch}", source, "leave --arch out")
        return Backbone(pretrained_timm(source), source, source)
    if arch is not None:
        backbone_spec(arch)  # raises for an unknown name
    path, named = weights_file(source, arch)
    weights = read_weights(path, arch)
    if named is not None and named.arch != weights.arch:
        raise InputError(
            f"holds a {weights.arch}, not the {named.arch} of {source}", path, "delete it"
        )
    if arch is not None and arch != weights.arch:
        raise InputError(f"holds a {weights.arch}, not a {arch}", source, "leave --arch out")
    network = build_backbone(weights.arch)
    network.load_state_dict(weights.query.backbone, strict=True)
    return Backbone(network, weights.arch, str(source), weights.tasks, named)


def random_backbone(arch: str, seed: int) -> nn.Module:
    """Initialise a backbone with its own seed; the global RNG state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(arch)


def about(classes: Classes, **more: Any) -> dict[str, Any]:
    """Describe a classifier for its checkpoint."""
    return {FINETUNED: {"labels": classes.labels, "label_names": classes.names, **more}}


def load_finetuned(path: Path) -> tuple[VideoClassifier, Classes, dict[str, Any], dict[str, Any]]:
    """Load the classifier from a checkpoint of ``seco finetune``.

    Returns:
        The classifier; its classes; its description in the checkpoint (dataset, split, encoder, and
        ``epochs`` trained, or None); and the settings of its run.

    Raises:
        InputError: it is not such a checkpoint.
    """
    content = load_checkpoint(path)
    said, config = content.get(FINETUNED), content["config"]
    if not isinstance(said, dict):
        raise InputError("has no classifier", path, "give a checkpoint of `seco finetune`")
    try:
        classes = Classes([int(n) for n in said["labels"]], [str(n) for n in said["label_names"]])
        model = _built(
            lambda: VideoClassifier(config["arch"], len(classes.labels), config["freeze_bn"]),
            content["model"],
        )
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("is a damaged checkpoint of `seco finetune`", path) from error
    return model, classes, {**said, "epochs": epochs_reached(content)}, config


def load_tracker(path: Path) -> tuple[SiamFC, dict[str, Any]]:
    """Load a tracker of ``seco track train``, and its checkpoint's content except the weights.

    Raises:
        InputError: it is not such a checkpoint, or is damaged.
    """
    content = load_checkpoint(path)
    if TRACKER not in content:
        raise InputError("holds no tracker", path, "give a last.pt of `seco track train`")
    config = content["config"]
    try:
        names = ("feature_layer", "channels", "response_scale", "convolutions", "raw_features")
        needed = {name: config[name] for name in names}
        settings = convert(TrackTrainConfig, needed, path, "is a damaged tracker")
        model = _built(lambda: SiamFC(build_backbone(config["arch"]), settings), content["model"])
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError("is a damaged tracker", path) from error
    about: Mapping[str, Any] = {name: value for name, value in content.items() if name != "model"}
    return model.eval(), dict(about)


def _built(make: Callable[[], _Module], tensors: Mapping[str, Tensor]) -> _Module:
    """Build a module and load its tensors, if they fit; no memory is taken if they do not.

    Raises:
        ValueError: a tensor is missing, left over or has another shape.
    """
    expected = {name: tensor.shape for name, tensor in built_empty(make).state_dict().items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError("other tensors")
    module = make()
    module.load_state_dict(tensors, strict=True)
    return module


class BackboneChanged(InputError):
    """The backbone's weights changed; results would be meaningless."""


class BackboneGuard:
    """Detects changes to a backbone that should be frozen.

    Args:
        backbone: as loaded.
        meanwhile: for the error: when the backbone changed, and what happens to the results.
    """

    def __init__(
        self,
        backbone: Backbone,
        meanwhile: str = "while features were extracted; these features are discarded",
    ) -> None:
        self._backbone = backbone
        self._meanwhile = meanwhile
        self._statistics = self._of_buffers()

    def require_same_statistics(self) -> None:
        """Check BatchNorm's running statistics: cheap, and the first to change by mistake.

        Raises:
            BackboneChanged: they have changed.
        """
        if self._of_buffers() != self._statistics:
            raise self._changed("BatchNorm statistics")

    def require_unchanged(self) -> None:
        """Check every tensor.

        Raises:
            BackboneChanged: one has changed.
        """
        if tensors_sha256(self._backbone.network.state_dict()) != self._backbone.sha256:
            raise self._changed("weights")

    def _of_buffers(self) -> str:
        return tensors_sha256(dict(self._backbone.network.named_buffers()))

    def _changed(self, what: str) -> BackboneChanged:
        return BackboneChanged(
            f"its {what} changed {self._meanwhile}",
            self._backbone.source,
            "please report this",
        )
