"""The backbones that ``--arch`` names: torchvision's, those for small images, timm's, and plug-ins.

A ResNet makes an image 32 times smaller before its last stage: of a 32 px image one cell is left.
Those for small images have a 3×3 stem and no max-pooling. Their sizes are in ``docs/pretrain.md``.
Another package adds backbones by the entry point ``seco.backbones``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import StochasticDepth

from seco.config import IMAGENET_MEAN, IMAGENET_STD
from shards.errors import InputError
from shards.signals import blocked

RESNETS, SMALL_IMAGES = "torchvision's ResNets", "ResNets for small images"  # families
TORCHVISION, TIMM, PLUGINS = "torchvision's others", "timm's", "plug-ins"
TIMM_PREFIX = "timm:"
_ENTRY_POINTS = "seco.backbones"
_Module = TypeVar("_Module", bound=nn.Module)
_NEAR_PX = 17  # patches have 14, 16 or 32 px


class SmallImageResNet(ResNet):  # type: ignore[misc]  # torchvision has no types
    """A ResNet of any width with a 3×3 stem and no max-pooling.

    Tensor names and initialisation are torchvision's; with ``width`` 64, so are all shapes except
    the stem's.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        blocks: number of blocks in each of the four stages.
        width: channels of the stem and of the first stage, a multiple of 16; each later stage has
            twice as many (four times that at the outputs of a ``Bottleneck``).
        stem_stride: 1 or 2; the total stride is 8 times this.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: Sequence[int],
        *,
        width: int,
        stem_stride: int,
    ) -> None:
        self._stem_width = width  # read by _make_layer, which torchvision's __init__ calls
        super().__init__(block, list(blocks))
        self.conv1 = nn.Conv2d(3, width, 3, stride=stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(8 * width * block.expansion, 1000)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        """Build one stage; torchvision calls this with 64, 128, 256 and 512 planes."""
        if planes == 64:
            self.inplanes = self._stem_width
        planes = planes * self._stem_width // 64
        stage: nn.Sequential = super()._make_layer(block, planes, blocks, stride, dilate)
        return stage


class _AnySizeViT(VisionTransformer):  # type: ignore[misc]
    """torchvision's ViT for images of any size that its patches divide.

    Position embeddings are interpolated from the grid of the image size it was built for, as in
    DINO and timm, so the shapes of its tensors do not depend on the size of the views.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, C), the class token."""
        if images.shape[2] % self.patch_size or images.shape[3] % self.patch_size:
            raise ValueError(f"the patches of {self.patch_size} px do not divide the images")
        patches = self.conv_proj(images)
        tokens = patches.flatten(2).transpose(1, 2)
        first = self.class_token.expand(images.shape[0], -1, -1)
        encoder = self.encoder
        places = _resized(encoder.pos_embedding, *patches.shape[2:])
        hidden = encoder.dropout(torch.cat([first, tokens], dim=1) + places)
        encoded: Tensor = encoder.ln(encoder.layers(hidden))[:, 0]
        return encoded


def _resized(places: Tensor, height: int, width: int) -> Tensor:
    """Interpolate (1, 1 + G·G, D) position embeddings to (1, 1 + height·width, D)."""
    grid = round((places.shape[1] - 1) ** 0.5)
    if (height, width) == (grid, grid):
        return places
    first, others = places[:, :1], places[:, 1:]
    square = others.view(1, grid, grid, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, (height, width), mode="bicubic", antialias=True)
    return torch.cat([first, square.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


@dataclass(frozen=True)
class BackboneSpec:
    """How to build one backbone.

    Args:
        family: one of the families above.
        build: returns a randomly initialised network from (N, 3, H, W) to (N, C).
        classifier: where files with a classifier keep it: prefixes of its tensors' names.
        mean: of the images it takes, RGB in 0 … 1.
        std: divides them after that.
        size: side of the images it is made for, px.
    """

    family: str
    build: Callable[[], nn.Module]
    classifier: tuple[str, ...] = ("fc.",)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: int = 224


def _torchvision(name: str, family: str, head: str) -> BackboneSpec:
    def build() -> nn.Module:
        network: nn.Module = torchvision.models.get_model(name, weights=None)
        parent, _, last = head.rpartition(".")
        setattr(network.get_submodule(parent), last, nn.Identity())
        if isinstance(network, VisionTransformer):
            network.__class__ = _AnySizeViT  # torchvision's functions build no other class
        return network

    weights = torchvision.models.get_model_weights(name)
    if not hasattr(weights, "IMAGENET1K_V1"):  # only weights for larger images than it is built for
        return BackboneSpec(family, build, (f"{head}.",))
    made_for = weights["IMAGENET1K_V1"].transforms()
    mean, std = tuple(made_for.mean), tuple(made_for.std)
    return BackboneSpec(family, build, (f"{head}.",), mean, std, made_for.crop_size[0])


def _small(
    block: type[BasicBlock | Bottleneck], blocks: Sequence[int], *, width: int, stem_stride: int
) -> BackboneSpec:
    def build() -> nn.Module:
        network = SmallImageResNet(block, blocks, width=width, stem_stride=stem_stride)
        setattr(network, "fc", nn.Identity())  # noqa: B010  # declared as a linear layer
        return network

    return BackboneSpec(SMALL_IMAGES, build)


# Names of torchvision begin with these; the last part of each network becomes nn.Identity.
_HEADS = {
    "regnet": "fc",
    "convnext": "classifier.2",
    "efficientnet": "classifier",
    "mobilenet_v3": "classifier",
    "vit": "heads",
    "swin": "head",
}
# A file that does not name its architecture is recognised by the shapes of its tensors: no two of
# these may differ only in strides. Files are compared in this order, the likeliest first.
_SPECS: dict[str, BackboneSpec] = {
    **{
        name: _torchvision(name, RESNETS, "fc")
        for name in (
            *("resnet50", "resnet18", "resnet34", "resnet101", "resnet152"),
            *("resnext50_32x4d", "wide_resnet50_2"),
            *("resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2"),
        )
    },
    # One block per stage.
    "resnet10_w16": _small(BasicBlock, (1, 1, 1, 1), width=16, stem_stride=2),
    "resnet10_w32": _small(BasicBlock, (1, 1, 1, 1), width=32, stem_stride=2),
    "resnet10_w64": _small(BasicBlock, (1, 1, 1, 1), width=64, stem_stride=2),
    # The CIFAR stem of SimCLR (appendix B.9), MoCo's CIFAR-10 demo and lightly.
    "resnet18_cifar": _small(BasicBlock, (2, 2, 2, 2), width=64, stem_stride=1),
    "resnet34_cifar": _small(BasicBlock, (3, 4, 6, 3), width=64, stem_stride=1),
    "resnet50_cifar": _small(Bottleneck, (3, 4, 6, 3), width=64, stem_stride=1),
    **{
        name: _torchvision(name, TORCHVISION, head)
        for prefix, head in _HEADS.items()
        for name in torchvision.models.list_models(module=torchvision.models)
        if name.startswith(prefix)
    },
}


def known_archs() -> tuple[str, ...]:
    """Names that ``--arch`` accepts, besides ``timm:NAME``."""
    return (*_SPECS, *_plugins())


def archs_of(*families: str) -> tuple[str, ...]:
    """Names of these families, which must be torchvision's or ours, the likeliest first."""
    return tuple(arch for arch, spec in _SPECS.items() if spec.family in families)


def told_by_tensors(arch: str) -> bool:
    """Whether files of this architecture are recognised; others have to name it."""
    return arch in _SPECS


@functools.cache
def backbone_spec(arch: str) -> BackboneSpec:
    """Look up a backbone.

    Raises:
        InputError: no backbone has this name, or its package is missing or fails.
    """
    if arch in _SPECS:
        return _SPECS[arch]
    if arch.startswith(TIMM_PREFIX):
        return _timm(arch)
    if arch in _plugins():
        return _plugin(arch)
    families = (RESNETS, SMALL_IMAGES, TORCHVISION)
    choices = "; ".join(
        f"{family}: {', '.join(name for name, spec in _SPECS.items() if spec.family == family)}"
        for family in families
    )
    choices += f"; timm's: {TIMM_PREFIX}NAME"
    close = difflib.get_close_matches(arch, known_archs(), n=2) + _of_timm(arch)
    meant = f"did you mean {' or '.join(close)}? Give " if close else "give "
    raise InputError(f"unknown architecture {arch!r}", "--arch", f"{meant}one of {choices}")


def _of_timm(name: str) -> list[str]:
    """The backbone of timm that has this name, if timm is there."""
    try:
        import timm
    except ImportError:
        return []
    return [TIMM_PREFIX + name] if timm.is_model(name) else []


def _timm(arch: str) -> BackboneSpec:
    name = arch.removeprefix(TIMM_PREFIX)
    timm = _timm_package(arch)
    if ":" in name:
        raise InputError(
            "names a file rather than a model",
            arch,
            f"download it, and give it as a file with --arch {TIMM_PREFIX}NAME",
        )
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        advice = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists all"
        raise InputError("timm has no such model", arch, advice)
    try:
        said = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part after the dot
        advice = f"give {TIMM_PREFIX}{name.partition('.')[0]}"
        raise InputError("timm has no such weights", arch, advice) from error
    if said is None:  # timm builds it under its new name, and knows no settings under this one
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        advice = f"perhaps to {' or '.join(close)}" if close else "timm.list_models() lists all"
        raise InputError("timm has renamed it", arch, advice)
    settings = said.to_dict()
    heads = settings.get("classifier") or ()
    return BackboneSpec(
        TIMM,
        functools.partial(_timm_network, arch),
        tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads)),
        mean=tuple(settings.get("mean", IMAGENET_MEAN)),
        std=tuple(settings.get("std", IMAGENET_STD)),
        size=settings.get("input_size", (3, 224, 224))[1],
    )


def _timm_package(arch: str) -> Any:
    try:
        import timm
    except ImportError:
        raise InputError("timm is not installed", arch, "pip install 'seco-video[timm]'") from None
    return timm


def _timm_network(arch: str, pretrained: bool = False) -> nn.Module:
    name = arch.removeprefix(TIMM_PREFIX)
    network: nn.Module = _timm_package(arch).create_model(
        name, num_classes=0, pretrained=pretrained, **timm_freedom(name)
    )
    return network


@functools.cache
def timm_freedom(name: str) -> dict[str, bool]:
    """The arguments by which a model of timm takes images of any size, if it has such."""
    create = _timm_package(TIMM_PREFIX + name).create_model
    for freedom in ({"dynamic_img_size": True}, {"strict_img_size": False}):
        try:
            built_empty(functools.partial(create, name, num_classes=0, **freedom))
        except (TypeError, ValueError, AttributeError):
            continue
        return freedom
    return {}


@functools.cache
def _plugins() -> Mapping[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=_ENTRY_POINTS)}


def _plugin(arch: str) -> BackboneSpec:
    try:
        made = _plugins()[arch].load()
    except Exception as error:  # another package's code
        raise _plugin_fails(arch, error) from error
    if isinstance(made, BackboneSpec):
        return dataclasses.replace(made, family=PLUGINS)  # it may be derived from one of ours
    return BackboneSpec(PLUGINS, made, classifier=())


def _plugin_fails(arch: str, error: Exception) -> InputError:
    return InputError(
        f"its plug-in fails ({type(error).__name__}: {str(error)[:200]})",
        arch,
        "repair or remove it",
    )


def build_backbone(arch: str) -> nn.Module:
    """Build a randomly initialised network from (N, 3, H, W) to pooled features (N, C).

    It takes images normalised as ImageNet's, whatever it was made for. Dropout and stochastic depth
    are off, as in MoCo v3: a step depends on nothing but the weights and the batch.

    Raises:
        InputError: no backbone has this name, or its package is missing or fails.
    """
    spec = backbone_spec(arch)
    if arch not in _plugins() or arch in _SPECS:
        return _adapted(spec.build(), spec)
    try:
        return _adapted(spec.build(), spec)
    except Exception as error:  # another package's code
        raise _plugin_fails(arch, error) from error


def require_timm_weights(arch: str) -> None:
    """Check that timm has a model and weights for it, which may still have to be fetched.

    Raises:
        InputError: it has not, or the model is no backbone.
    """
    feature_dim(arch)
    name = arch.removeprefix(TIMM_PREFIX)
    said = _timm_package(arch).get_pretrained_cfg(name)
    if not said.has_weights:
        advice = f"give a file of them with --arch {arch}, or random:{arch}"
        raise InputError("timm has no weights for it", arch, advice)


def pretrained_timm(arch: str) -> nn.Module:
    """Build a network of timm with the weights timm has for it, from its cache or the network.

    Raises:
        InputError: timm is missing, has no such model or no weights for it, or they cannot be had.
    """
    spec = backbone_spec(arch)
    try:
        network = _timm_network(arch, pretrained=True)
    except Exception as error:  # of several packages that fetch files
        said = _timm_package(arch).get_pretrained_cfg(arch.removeprefix(TIMM_PREFIX))
        where = f"https://huggingface.co/{said.hf_hub_id}" if said.hf_hub_id else said.url
        reason = textwrap.shorten(str(error), 120, placeholder=" …")
        raise InputError(
            f"timm cannot load its weights ({type(error).__name__}: {reason})",
            arch,
            f"check the network, or fetch the file from {where} elsewhere and give it with "
            f"--arch {arch}",
        ) from error
    return _adapted(network, spec)


def timm_origin(arch: str) -> dict[str, str]:
    """The weights that timm has for a model, by their full name, and their licence."""
    said = _timm_package(arch).get_pretrained_cfg(arch.removeprefix(TIMM_PREFIX))
    weights = f"{said.architecture}.{said.tag}" if said.tag else said.architecture
    return {"weights": weights, "licence": said.license or "not stated"}


# Where modules of torchvision, torch and timm keep a probability of dropping something.
_PROBABILITIES = ("dropout", "attention_dropout", "drop_prob", "drop_rate")


def _adapted(network: nn.Module, spec: BackboneSpec) -> nn.Module:
    if spec.family in (RESNETS, SMALL_IMAGES):
        return network
    for module in network.modules():
        if isinstance(module, (_DropoutNd, StochasticDepth)):
            module.p = 0.0
        for name in _PROBABILITIES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if (spec.mean, spec.std) != (IMAGENET_MEAN, IMAGENET_STD):
        # A hook: a module around the network would change the names of its tensors.
        network.register_forward_pre_hook(_Renormalise(spec))
    return network


def with_own_normalisation(network: nn.Module) -> None:
    """From now on, let a network take images normalised by its spec's ``mean`` and ``std``."""
    for number, hook in list(network._forward_pre_hooks.items()):
        if isinstance(hook, _Renormalise):
            del network._forward_pre_hooks[number]


class _Renormalise:
    """Turns images normalised as ImageNet's into those a network was made for."""

    def __init__(self, spec: BackboneSpec) -> None:
        self._factors = [old / new for old, new in zip(IMAGENET_STD, spec.std, strict=True)]
        self._shifts = [
            (old - new) / std
            for old, new, std in zip(IMAGENET_MEAN, spec.mean, spec.std, strict=True)
        ]

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = zip(given[0].unbind(1), self._factors, self._shifts, strict=True)
        return (torch.stack([x * factor + shift for x, factor, shift in rows], dim=1),)


class _WithoutValues(TorchFunctionMode):
    """Creates parameters and buffers that have a shape but take no memory.

    Not ``torch.device("meta")``: it would also take the values of ``torch.arange`` and the like,
    from which some networks compute their sizes.
    """

    _MADE = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._MADE and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def without_values() -> Iterator[None]:
    """Build networks whose tensors have a shape but take no memory; ``to("meta")`` them then.

    Signals wait: an exception within torch's own handling of modes leaves these unbalanced.
    """
    with blocked(), _WithoutValues():
        yield


def built_empty(make: Callable[[], _Module]) -> _Module:
    """Build a network whose tensors have a shape but take no memory; ``to("meta")`` it then."""
    try:
        with without_values():
            return make()
    except (RuntimeError, InputError) as error:
        # Some compute with the tensors that they have just made. Of a plug-in, that is the cause.
        if not isinstance(error.__cause__ or error, RuntimeError):
            raise
        with blocked(), torch.device("meta"):
            return make()


class BackboneShape(NamedTuple):
    """What is known of a backbone without giving it memory."""

    width: int  # C, of the pooled feature
    has_batchnorm: bool


@functools.cache
def backbone_shape(arch: str) -> BackboneShape:
    """Return the width of a backbone's pooled feature, and whether it has BatchNorm.

    Raises:
        InputError: no backbone has this name, or it does not make one feature of an image.
    """
    network = _empty(arch)
    feature = _features(network, backbone_spec(arch).size)
    if not isinstance(feature, Tensor) or feature.ndim != 2:
        raise InputError("does not make one feature of each image", arch, "choose another --arch")
    layers = any(isinstance(module, _BatchNorm) for module in network.modules())
    return BackboneShape(feature.shape[1], layers)


@functools.cache
def backbone_tensors(arch: str) -> Mapping[str, Tensor]:
    """Return the tensors of a backbone by name, on the meta device.

    Raises:
        InputError: no backbone has this name.
    """
    return _empty(arch).state_dict()


@functools.cache
def classifier_tensors(arch: str) -> frozenset[str]:
    """Names of tensors that timm's model with a classifier has, and the backbone has not."""
    name = arch.removeprefix(TIMM_PREFIX)
    make = functools.partial(_timm_package(arch).create_model, name, **timm_freedom(name))
    return frozenset(built_empty(make).state_dict().keys() - backbone_tensors(arch).keys())


def _empty(arch: str) -> nn.Module:
    return built_empty(lambda: build_backbone(arch)).to("meta").eval()


def _features(network: nn.Module, size: int) -> object:
    """What the network makes of two images of this size; None if it takes no such images."""
    try:
        with torch.no_grad():
            return network(torch.empty(2, 3, size, size, device="meta"))
    except Exception:  # each network says it in another way
        return None


def feature_dim(arch: str) -> int:
    """C, the width of the pooled feature.

    Raises:
        InputError: as for :func:`backbone_shape`.
    """
    return backbone_shape(arch).width


def require_size(arch: str, size: int, option: str = "--crop-size") -> None:
    """Check that a backbone takes images of this size, in px.

    Raises:
        InputError: it does not.
    """
    spec = backbone_spec(arch)
    if spec.family in (RESNETS, SMALL_IMAGES):
        return
    network = _empty(arch)
    if _features(network, size) is None:
        near = (size + by * sign for by in range(1, _NEAR_PX) for sign in (-1, 1))
        taken = next((px for px in near if px > 0 and _features(network, px) is not None), None)
        also = f"; {taken} px would do" if taken is not None else ""
        raise InputError(
            f"{arch} takes no images of {size} px",
            option,
            f"it is made for {spec.size} px{also}",
        )


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and values: equal if and only if the weights are equal."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
