"""Checkpoints of every known layout: recognised, and read tensor by tensor under our names.

Layouts: MoCo v1 and v2 (``facebookresearch/moco``), SeCo by its authors and the networks they
fine-tuned (``YihengZhang-CV/SeCo-Sequence-Contrastive-Learning``), VCLR
(``amazon-science/video-contrastive-learning``), state dicts with torchvision's names (torch files
and safetensors), and the toolkit's own. A missing or extra tensor is an error.
Nothing in a file is ever executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from seco.checkpoints.io import (
    FINETUNED,
    FORMAT,
    checked_checkpoint,
    is_dense,
    load_torch_file,
)
from seco.config import TASKS
from seco.models.backbones import (
    RESNETS,
    SMALL_IMAGES,
    TIMM,
    TIMM_PREFIX,
    TORCHVISION,
    archs_of,
    backbone_spec,
    backbone_tensors,
    build_backbone,
    classifier_tensors,
    feature_dim,
    known_archs,
    told_by_tensors,
)
from shards.errors import InputError
from shards.untrusted import open_regular

_COUNTER = "num_batches_tracked"
_WRAPPED = "module."  # DistributedDataParallel's prefix of all names

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_WHOLE = (torch.int64, torch.int32)

Shape = tuple[int | None, ...]  # None: any size


class NamedTensors:
    """Tensors by name; each can be taken once.

    Args:
        content: a state dict.
        path: its file, for errors.
        prefix: of these names in the file, for errors.

    Raises:
        InputError: it is not a dictionary of tensors.
    """

    def __init__(self, content: object, path: Path, prefix: str = "") -> None:
        if not isinstance(content, Mapping):
            raise InputError(f"{prefix or 'its content'} is not a dictionary of tensors", path)
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise InputError(f"{prefix}{name} is not a tensor", path)
        self._tensors: dict[str, Tensor] = dict(content)
        self.path = path
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self._tensors)

    def names(self) -> list[str]:
        """Names of the tensors not taken yet."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor not taken yet."""
        return tuple(self._tensors[name].shape)

    def under(self, prefix: str) -> NamedTensors:
        """Take all tensors whose names begin with ``prefix``, which is removed from the names."""
        taken = {
            name[len(prefix) :]: self._tensors.pop(name)
            for name in self.names()
            if name.startswith(prefix)
        }
        return NamedTensors(taken, self.path, self.prefix + prefix)

    def unwrapped(self) -> NamedTensors:
        """Remove the prefix ``module.`` from all names; unchanged unless all have it."""
        if self._tensors and all(name.startswith(_WRAPPED) for name in self._tensors):
            return self.under(_WRAPPED)
        return self

    def take(self, name: str, shape: Shape, *, whole_numbers: bool = False) -> Tensor:
        """Take one tensor, in float32 (or int64 for ``whole_numbers``), on the CPU.

        Raises:
            InputError: it is missing, has another shape or dtype, or contains NaN or infinity.
        """
        full = self.prefix + name
        if name not in self._tensors:
            raise InputError(f"{full} is missing", self.path)
        tensor = self._tensors.pop(name).detach()
        if not _fits(tuple(tensor.shape), shape):
            raise InputError(
                f"{full} has shape {_text(tuple(tensor.shape))}, expected {_text(shape)}", self.path
            )
        if not is_dense(tensor) or tensor.dtype not in (_WHOLE if whole_numbers else _FLOATING):
            kind = "integers" if whole_numbers else "floating-point numbers"
            raise InputError(f"{full} is not a dense tensor of {kind}", self.path)
        if whole_numbers:
            return tensor.long()
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{full} holds values that are not finite", self.path)
        return tensor

    def drop(self, name: str) -> None:
        """Take one tensor, whatever it is, for no use."""
        del self._tensors[name]

    def require_empty(self) -> None:
        """Check that all tensors were taken.

        Raises:
            InputError: a tensor is left over.
        """
        if self._tensors:
            more = f" (and {len(self) - 1} more)" if len(self) > 1 else ""
            raise InputError(f"{self.prefix}{self.names()[0]} is left over{more}", self.path)


def take_backbone(tensors: NamedTensors, stated: object = None) -> tuple[str, dict[str, Tensor]]:
    """Take the backbone from ``tensors``; those of a classifier are left.

    Args:
        tensors: with the names of torchvision, or of the package the backbone is from.
        stated: the architecture according to the file; if it is not a known one, the architecture
            is identified by the tensors.

    Returns:
        The name of the architecture, and its tensors.

    Raises:
        InputError: one of its tensors is missing, left over or has another shape.
    """
    all_shapes = {name: tensors.shape(name) for name in tensors.names()}
    # Files from before torch 0.4.1, such as torchvision's first weights, lack these counters.
    uncounted = not any(name.endswith(_COUNTER) for name in all_shapes)
    candidates = _candidates(all_shapes, stated)
    closest, least = candidates[0], len(all_shapes) + 1_000
    for arch in candidates:
        others = _behind(arch, all_shapes)
        shapes = {n: shape for n, shape in all_shapes.items() if n not in others}
        expected = {n: tuple(t.shape) for n, t in backbone_tensors(arch).items()}
        if uncounted:
            expected = {n: shape for n, shape in expected.items() if not n.endswith(_COUNTER)}
        differing = _differences(shapes, expected)
        if len(differing) < least:
            closest, least, first = arch, len(differing), next(iter(differing), "")
        if not differing:
            break
    if least > len(backbone_tensors(closest)) // 2:
        held = f"{tensors.prefix}* is" if tensors.prefix else "is"
        if len(candidates) == 1:
            raise InputError(f"{held} not a {closest}", tensors.path)
        raise InputError(
            f"{held} not a network that is recognised by its tensors",
            tensors.path,
            "give --arch if it is timm's or a plug-in's, for example --arch timm:NAME",
        )
    if least:
        more = f", {least - 1} more differ" if least > 1 else ""
        raise InputError(f"{tensors.prefix}{first} (compared with a {closest}{more})", tensors.path)
    backbone = {
        name: torch.zeros((), dtype=torch.long)
        if uncounted and name.endswith(_COUNTER)
        else tensors.take(name, tuple(like.shape), whole_numbers=not like.is_floating_point())
        for name, like in backbone_tensors(closest).items()
    }
    _require_constants(closest, backbone, tensors)
    return closest, backbone


def _require_constants(arch: str, backbone: dict[str, Tensor], tensors: NamedTensors) -> None:
    """Check the tensors of places, such as Swin's, by which a forward looks up others.

    Raises:
        InputError: one is not that of this architecture.
    """
    names = [
        name
        for name, tensor in backbone.items()
        if not tensor.is_floating_point() and not name.endswith(_COUNTER)
    ]
    own = build_backbone(arch).state_dict() if names else {}
    for name in names:
        if not torch.equal(backbone[name], own[name].long()):
            raise InputError(f"{tensors.prefix}{name} is not that of a {arch}", tensors.path)


def _candidates(shapes: Mapping[str, object], stated: object) -> tuple[str, ...]:
    """The architectures that a file may hold, the likeliest first."""
    if stated in known_archs() or (isinstance(stated, str) and stated.startswith(TIMM_PREFIX)):
        return (str(stated),)
    resnets = not any(name.startswith(_OTHERS) for name in shapes)
    kinds = (RESNETS, SMALL_IMAGES) if resnets else (TORCHVISION,)
    return archs_of(*kinds)


_OTHERS = ("features.", "stem.", "class_token")  # in all of torchvision's but ResNets


def _behind(arch: str, names: Iterable[str]) -> set[str]:
    """Which of these tensors of a file of others are behind the backbone."""
    spec = backbone_spec(arch)
    prefixes = ("fc",) if spec.family in (RESNETS, SMALL_IMAGES) else spec.classifier
    found = {name for name in names if name.startswith(prefixes)}
    if spec.family == TIMM:  # its classifiers may have parts of other names
        found |= classifier_tensors(arch).intersection(names)
    return found


def _built_here(stated: object, path: Path) -> str:
    """The architecture that a file of this toolkit names; its tensors may not tell it.

    Raises:
        InputError: it cannot be built here.
    """
    arch = str(stated)
    try:
        backbone_spec(arch)
    except InputError as error:
        known = arch.startswith(TIMM_PREFIX) or arch in known_archs()
        raise InputError(
            f"holds a {arch}, which cannot be built here ({error.what})",
            path,
            error.fix if known else "install the package that adds it",
        ) from error
    return arch


def take_mlp(tensors: NamedTensors, width: int, dim: int | None = None) -> dict[str, Tensor]:
    """Take a head ``Linear(C, C)-ReLU-Linear(C, D)``: ``{0,2}.{weight,bias}``; C = width, D = dim.

    Raises:
        InputError: one of its tensors is missing, left over or has another shape.
    """
    head = {
        "0.weight": tensors.take("0.weight", (width, width)),
        "0.bias": tensors.take("0.bias", (width,)),
        "2.weight": tensors.take("2.weight", (dim, width)),
    }
    head["2.bias"] = tensors.take("2.bias", (len(head["2.weight"]),))
    tensors.require_empty()
    return head


def take_linear(
    tensors: NamedTensors, width: int | None, rows: int | None = None
) -> dict[str, Tensor]:
    """Take a layer ``Linear(C, M)``: ``weight`` (M, C) and ``bias`` (M,); C = width, M = rows.

    Raises:
        InputError: one of the two is missing or has another shape, or a tensor is left over.
    """
    weight = tensors.take("weight", (rows, width))
    layer = {"weight": weight, "bias": tensors.take("bias", (len(weight),))}
    tensors.require_empty()
    return layer


def _differences(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """One phrase per tensor that is missing, has another shape or is left over."""
    missing = [f"{name} is missing" for name in expected if name not in found]
    other = [
        f"{name} has shape {_text(found[name])}, expected {_text(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return missing + other + [f"{name} is left over" for name in found if name not in expected]


def _fits(found: tuple[int, ...], wanted: Shape) -> bool:
    return len(found) == len(wanted) and all(
        size in (None, actual) for actual, size in zip(found, wanted, strict=True)
    )


def _text(shape: Shape) -> str:
    return "×".join("any" if size is None else str(size) for size in shape) or "()"


SECO, MOCO_V1, MOCO_V2, STATE_DICT = "seco", "moco-v1", "moco-v2", "torchvision"
AUTHORS, AUTHORS_FINETUNED = "seco-authors", "seco-authors-finetuned"
SECO_FINETUNED = "seco-finetuned"
VCLR = "vclr"
SHARED = "shared"  # head of a model that has one for all tasks

DESCRIPTIONS = {
    SECO: "a checkpoint of this toolkit",
    MOCO_V1: "MoCo v1",
    MOCO_V2: "MoCo v2",
    AUTHORS: "SeCo by its authors",
    AUTHORS_FINETUNED: "SeCo as fine-tuned by its authors",
    SECO_FINETUNED: "fine-tuned by this toolkit",
    VCLR: "VCLR",
    STATE_DICT: "a state dict",
}

Layer = dict[str, Tensor]
TOOLKIT = "toolkit"  # of the metadata, where tensors do not tell the architecture
_LONGEST_HEADER = 100_000_000  # bytes; the limit of safetensors


@dataclass(frozen=True, kw_only=True)
class EncoderWeights:
    """One encoder: the backbone with torchvision's names, and the layers after it.

    Args:
        backbone: float32, and BatchNorm's int64 counters.
        heads: ``{0,2}.{weight,bias}`` of C → C → D, by task or ``shared``.
        order_classifier: ``weight`` (2, 3D) and ``bias`` (2,).
    """

    backbone: Layer
    heads: dict[str, Layer]
    order_classifier: Layer | None = None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights in a file.

    Args:
        layout: a key of ``DESCRIPTIONS``; for an imported file, its original layout.
        arch: name of the backbone.
        query: the trained encoder.
        key: its moving average.
        queue: (K, D) keys.
        next_slot: row that the next key replaces.
        tasks: SeCo's tasks it was pre-trained on, if any.
        epoch: number of epochs, if the file says.
        left: parts of the file that are not used.
    """

    layout: str
    arch: str
    query: EncoderWeights
    key: EncoderWeights | None = None
    queue: Tensor | None = None
    next_slot: int = 0
    tasks: str | None = None
    epoch: int | None = None
    left: tuple[str, ...] = ()

    def description(self) -> str:
        """Summary such as ``MoCo v2, resnet50, epoch 200``."""
        epoch = [] if self.epoch is None else [f"epoch {self.epoch}"]
        return ", ".join([DESCRIPTIONS[self.layout], self.arch, *epoch])


def read_weights(path: Path, arch: str | None = None) -> Weights:
    """Read the weights from a file of any known layout.

    Args:
        path: of the file.
        arch: of a state dict that does not name its own, if its tensors do not tell it: one of
            timm's or a plug-in's.

    Raises:
        InputError: its layout is unknown, it would run code, or a tensor is missing, left over, has
            another shape or contains NaN.
    """
    if _is_safetensors(path):
        tensors, stated = _read_safetensors(path)
        return _torchvision(tensors, stated or _assumed(arch), path)
    content = load_torch_file(path)
    if not isinstance(content, Mapping):
        raise _unknown(path)
    if content.get("format") == FORMAT:
        return _own(checked_checkpoint(content, path), path)
    if "state_dict" in content:
        return _moco(content, path)
    model = content.get("model")
    if isinstance(model, Mapping) and any("fc_tsn." in str(name) for name in model):
        return _vclr(content, path)
    if "model" in content and "opt" in content:
        return _authors(content, path)
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise _unknown(path)
    return _torchvision(content, _assumed(arch), path)


def _assumed(arch: str | None) -> str | None:
    return None if arch is None or told_by_tensors(arch) else arch


def _unknown(path: Path) -> InputError:
    return InputError(
        "is neither a checkpoint of this toolkit, MoCo or SeCo's authors nor a state dict",
        path,
    )


def _torchvision(content: object, stated: object, path: Path) -> Weights:
    tensors = NamedTensors(content, path).unwrapped()
    arch, backbone = take_backbone(tensors, stated)
    if backbone_spec(arch).family in (RESNETS, SMALL_IMAGES):
        classified = any(name.startswith("fc.") for name in tensors.names())
        if classified:
            take_linear(tensors.under("fc."), feature_dim(arch))
    else:
        behind = _behind(arch, tensors.names())
        classified = len(behind) > 0
        for name in behind:
            tensors.drop(name)
    tensors.require_empty()
    return Weights(
        layout=STATE_DICT,
        arch=arch,
        query=EncoderWeights(backbone=backbone, heads={}),
        left=("classifier",) if classified else (),
    )


def _moco(content: Mapping[str, Any], path: Path) -> Weights:
    tensors = NamedTensors(content["state_dict"], path).unwrapped()
    left: tuple[str, ...] = ()
    layout = MOCO_V2
    dim: int | None = None
    encoders: list[EncoderWeights] = []
    arch = content.get("arch")
    for side in ("encoder_q.", "encoder_k."):
        encoder = tensors.under(side)
        if encoders and not len(encoder):
            continue  # published with the query encoder only
        arch, backbone = take_backbone(encoder, arch)
        head = encoder.under("fc.")
        if "weight" in head.names():
            dim = len(take_linear(head, feature_dim(arch), dim)["bias"])
            layout, left = MOCO_V1, ("one-layer head",)
            heads = {}
        else:
            heads = {SHARED: take_mlp(head, feature_dim(arch), dim)}
            dim = len(heads[SHARED]["2.bias"])
        encoder.require_empty()
        encoders.append(EncoderWeights(backbone=backbone, heads=heads))
    queue, next_slot = None, 0
    if len(tensors):
        queue = tensors.take("queue", (dim, None)).t().contiguous()  # (D, K) in the file
        next_slot = int(tensors.take("queue_ptr", (1,), whole_numbers=True))
    tensors.require_empty()
    return Weights(
        layout=layout,
        arch=str(arch),
        query=encoders[0],
        key=encoders[1] if len(encoders) > 1 else None,
        queue=queue,
        next_slot=next_slot,
        epoch=_epoch(content),
        left=left,
    )


def _authors(content: Mapping[str, Any], path: Path) -> Weights:
    tensors = NamedTensors(content["model"], path).unwrapped()
    if not any(name.startswith("fc_") for name in tensors.names()):
        arch, backbone = take_backbone(tensors)
        take_linear(tensors.under("fc."), feature_dim(arch))
        tensors.require_empty()
        query = EncoderWeights(backbone=backbone, heads={})
        return Weights(
            layout=AUTHORS_FINETUNED,
            arch=arch,
            query=query,
            epoch=_epoch(content),
            left=("classifier",),
        )
    arch, query = _authors_encoder(tensors)
    key, queue = None, None
    if "model_ema" in content:
        # Not "model_ema.", which would read as part of the tensor's name.
        arch, key = _authors_encoder(NamedTensors(content["model_ema"], path, "model_ema: "), arch)
    if "contrast" in content:
        contrast = NamedTensors(content["contrast"], path, "contrast: ")
        contrast.take("params", (1,), whole_numbers=True)  # unused in their code
        queue = contrast.take("memory", (None, len(query.heads["inter"]["2.bias"])))
        contrast.require_empty()
    return Weights(
        layout=AUTHORS,
        arch=arch,
        query=query,
        key=key,
        queue=queue,
        tasks=",".join(TASKS),
        epoch=_epoch(content),
    )


def _vclr(content: Mapping[str, Any], path: Path) -> Weights:
    """Read a file of VCLR's code, which is that of SeCo's authors with one head more.

    Its order classifier has four classes, of the features of two sequences of three frames.
    """
    tensors = NamedTensors(content["model"], path).unwrapped()
    arch, backbone = take_backbone(tensors)
    heads = {t: take_mlp(tensors.under(f"fc_{t}."), feature_dim(arch)) for t in (*TASKS, "tsn")}
    del heads["tsn"]
    sequence = 6 * len(heads["order"]["2.bias"])
    take_linear(tensors.under("fc_order_classifier."), sequence, rows=4)
    tensors.require_empty()
    others = {"model_ema": "key encoder", "contrast": "queue", "contrast_tsn": "queue of clips"}
    left = [said for name, said in others.items() if name in content]
    return Weights(
        layout=VCLR,
        arch=arch,
        query=EncoderWeights(backbone=backbone, heads=heads),
        epoch=_epoch(content),
        left=("head tsn", "order classifier", *left),
    )


def _authors_encoder(
    tensors: NamedTensors, stated: str | None = None
) -> tuple[str, EncoderWeights]:
    arch, backbone = take_backbone(tensors, stated)
    heads = {task: take_mlp(tensors.under(f"fc_{task}."), feature_dim(arch)) for task in TASKS}
    sequence = 3 * len(heads["order"]["2.bias"])
    classifier = take_linear(tensors.under("fc_order_classifier."), sequence, rows=2)
    tensors.require_empty()
    return arch, EncoderWeights(backbone=backbone, heads=heads, order_classifier=classifier)


def _own(content: Mapping[str, Any], path: Path) -> Weights:
    """Read a checkpoint of a run or of ``seco import``, where whole parts may be missing."""
    tensors = NamedTensors(content["model"], path)
    if FINETUNED in content:
        return _own_finetuned(tensors, _built_here(content["config"]["arch"], path))
    imported = content.get("imported")
    imported = imported if isinstance(imported, dict) else {}
    classifiers = [tensors.under("order_classifier."), tensors.under("key_order_classifier.")]
    encoders: list[EncoderWeights] = []
    arch = _built_here(content["config"]["arch"], path)
    for side, classifier in zip(("query_encoder.", "key_encoder."), classifiers, strict=True):
        encoder = tensors.under(side)
        if encoders and imported and not len(encoder):
            continue
        arch, backbone = take_backbone(encoder.under("backbone."), arch)
        names = dict.fromkeys(n.split(".")[1] for n in encoder.names() if n.startswith("heads."))
        heads = {n: take_mlp(encoder.under(f"heads.{n}."), feature_dim(arch)) for n in names}
        encoder.require_empty()
        encoders.append(
            EncoderWeights(
                backbone=backbone,
                heads=heads,
                order_classifier=take_linear(classifier, None, 2) if len(classifier) else None,
            )
        )
    queue, next_slot = None, 0
    queued = tensors.under("queue.")
    if len(queued):
        queue = queued.take("rows", (None, None))
        next_slot = int(queued.take("next_slot", (), whole_numbers=True))
    tensors.require_empty()
    layout = imported.get("layout", SECO)
    return Weights(
        layout=layout if layout in DESCRIPTIONS else SECO,
        arch=arch,
        query=encoders[0],
        key=encoders[1] if len(encoders) > 1 else None,
        queue=queue,
        next_slot=next_slot,
        tasks=str(content["config"].get("tasks") or "") or None,
        epoch=_epoch(imported),
    )


def _own_finetuned(tensors: NamedTensors, arch: str) -> Weights:
    arch, backbone = take_backbone(tensors.under("backbone."), arch)
    take_linear(tensors.under("classifier."), feature_dim(arch))
    tensors.require_empty()
    query = EncoderWeights(backbone=backbone, heads={})
    return Weights(layout=SECO_FINETUNED, arch=arch, query=query, left=("classifier",))


def _epoch(content: Mapping[str, Any]) -> int | None:
    epoch = content.get("epoch")
    return epoch if isinstance(epoch, int) else None


class _SafetensorsHeader(msgspec.Struct):
    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


def _is_safetensors(path: Path) -> bool:
    """Recognise safetensors by its first bytes: the length of a JSON header, and ``{``."""
    try:
        with open_regular(path) as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror or error})", path, "check the path"
        ) from error
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], object]:
    """Return the tensors, and the architecture if the file's metadata names it."""
    try:
        # Through memory: truncating a mapped file while it is read would kill the process.
        with open_regular(path) as file:
            whole = file.read()
        found = safetensors.torch.load(whole)
        header = msgspec.json.decode(
            whole[8 : 8 + int.from_bytes(whole[:8], "little")], type=_SafetensorsHeader
        )
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror or error})", path, "check the path"
        ) from error
    except Exception as error:  # damaged bytes, or a number type that torch lacks
        raise InputError("is a damaged safetensors file", path) from error
    stated = header.metadata.get("arch")
    return found, _built_here(stated, path) if TOOLKIT in header.metadata else stated
