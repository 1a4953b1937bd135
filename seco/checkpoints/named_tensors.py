"""The tensors of a file, taken one by one by name; what is missing or left over is an error."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from seco.model.backbones import build_backbone, known_archs
from shards.errors import InputError

_COUNTER = "num_batches_tracked"
_WRAPPED = "module."  # what DistributedDataParallel puts before every name

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_WHOLE = (torch.int64, torch.int32)

Shape = tuple[int | None, ...]  # None: any size


class NamedTensors:
    """Tensors by name, of which each may be taken once.

    Args:
        content: a state dict.
        path: the file it is from, for errors.
        prefix: what stands before these names in the file, for errors.

    Raises:
        InputError: it is no dictionary of tensors.
    """

    def __init__(self, content: object, path: Path, prefix: str = "") -> None:
        if not isinstance(content, Mapping):
            raise InputError(f"{prefix or 'its content'} is no dictionary of tensors", path)
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise InputError(f"{prefix}{name} is not a tensor", path)
        self._tensors: dict[str, Tensor] = dict(content)
        self.path = path
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self._tensors)

    def names(self) -> list[str]:
        """Of the tensors not taken yet."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there."""
        return tuple(self._tensors[name].shape)

    def under(self, prefix: str) -> NamedTensors:
        """Take all tensors whose names begin with ``prefix``; they are known by the rest of it."""
        taken = {
            name[len(prefix) :]: self._tensors.pop(name)
            for name in self.names()
            if name.startswith(prefix)
        }
        return NamedTensors(taken, self.path, self.prefix + prefix)

    def unwrapped(self) -> NamedTensors:
        """These without ``module.`` before every name; unchanged unless all have it."""
        if self._tensors and all(name.startswith(_WRAPPED) for name in self._tensors):
            return self.under(_WRAPPED)
        return self

    def take(self, name: str, shape: Shape, *, whole_numbers: bool = False) -> Tensor:
        """One tensor, in float32 (or int64 for ``whole_numbers``) on the CPU.

        Raises:
            InputError: it is missing, has another shape or kind, or holds NaN or infinity.
        """
        full = self.prefix + name
        if name not in self._tensors:
            raise InputError(f"{full} is missing", self.path)
        tensor = self._tensors.pop(name).detach()
        if not _fits(tuple(tensor.shape), shape):
            raise InputError(
                f"{full} has the shape {_text(tuple(tensor.shape))}, not {_text(shape)}", self.path
            )
        if not _is_plain(tensor) or tensor.dtype not in (_WHOLE if whole_numbers else _FLOATING):
            kind = "whole" if whole_numbers else "floating-point"
            raise InputError(f"{full} is no dense tensor of {kind} numbers", self.path)
        if whole_numbers:
            return tensor.long()
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{full} holds values that are not finite", self.path)
        return tensor

    def require_empty(self) -> None:
        """Raises:
        InputError: a tensor was not taken.
        """
        if self._tensors:
            more = f" (and {len(self) - 1} more)" if len(self) > 1 else ""
            raise InputError(f"{self.prefix}{self.names()[0]} is left over{more}", self.path)


def take_backbone(tensors: NamedTensors, stated: object = None) -> tuple[str, dict[str, Tensor]]:
    """The backbone under ``tensors``, whose names that begin with ``fc`` are left to others.

    Args:
        tensors: with torchvision's names.
        stated: the architecture that the file names; any other value is found by the tensors.

    Returns:
        the name of the architecture, and its tensors.

    Raises:
        InputError: one of its tensors is missing, left over or has another shape.
    """
    shapes = {name: tensors.shape(name) for name in tensors.names() if not name.startswith("fc")}
    # Files of torch before 0.4.1, torchvision's first weights among them, count no batches.
    uncounted = not any(name.endswith(_COUNTER) for name in shapes)
    candidates = (str(stated),) if stated in known_archs() else known_archs()
    closest, least = candidates[0], len(shapes) + 1_000
    for arch in candidates:
        expected = backbone_shapes(arch)
        if uncounted:
            expected = {n: shape for n, shape in expected.items() if not n.endswith(_COUNTER)}
        differing = _differences(shapes, expected)
        if len(differing) < least:
            closest, least, first = arch, len(differing), next(iter(differing), "")
        if not differing:
            break
    if least > len(backbone_shapes(closest)) // 2:
        held = f"{tensors.prefix}* is" if tensors.prefix else "is"
        kind = closest if len(candidates) == 1 else "ResNet that `--arch` knows"
        raise InputError(f"{held} not a {kind}", tensors.path)
    if least:
        more = f", {least - 1} more differ" if least > 1 else ""
        raise InputError(f"{tensors.prefix}{first} (compared with a {closest}{more})", tensors.path)
    backbone = {
        name: torch.zeros((), dtype=torch.long)
        if uncounted and name.endswith(_COUNTER)
        else tensors.take(name, shape, whole_numbers=name.endswith(_COUNTER))
        for name, shape in backbone_shapes(closest).items()
    }
    return closest, backbone


def take_mlp(tensors: NamedTensors, width: int, dim: int | None = None) -> dict[str, Tensor]:
    """A head ``Linear(C, C)-ReLU-Linear(C, D)``: ``{0,2}.{weight,bias}``; C = width, D = dim.

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
    """A layer ``Linear(C, M)``: ``weight`` (M, C) and ``bias`` (M,); C = width, M = rows.

    Raises:
        InputError: one of the two is missing or has another shape, or there is more.
    """
    weight = tensors.take("weight", (rows, width))
    layer = {"weight": weight, "bias": tensors.take("bias", (len(weight),))}
    tensors.require_empty()
    return layer


@functools.cache
def backbone_shapes(arch: str) -> Mapping[str, tuple[int, ...]]:
    """The shapes of a backbone's tensors by name."""
    with torch.device("meta"):
        state = build_backbone(arch).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _differences(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """One sentence a tensor that is missing, has another shape or is left over."""
    missing = [f"{name} is missing" for name in expected if name not in found]
    other = [
        f"{name} has the shape {_text(found[name])}, not {_text(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return missing + other + [f"{name} is left over" for name in found if name not in expected]


def _fits(found: tuple[int, ...], wanted: Shape) -> bool:
    return len(found) == len(wanted) and all(
        size in (None, actual) for actual, size in zip(found, wanted, strict=True)
    )


def _is_plain(tensor: Tensor) -> bool:
    """Dense, in memory, and with as many bytes in it as its shape says."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    )


def _text(shape: Shape) -> str:
    return "×".join("any" if size is None else str(size) for size in shape) or "()"
