"""``seco import`` and ``seco export``: this toolkit's checkpoints and those of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seco import __version__
from seco.checkpoints.convert import SHARED, TOOLKIT, EncoderWeights, Layer, Weights, read_weights
from seco.checkpoints.deploy import deploy
from seco.checkpoints.io import save_checkpoint, save_safetensors, save_torch_file
from seco.checkpoints.named import NamedWeights, weights_file
from seco.config import DEPLOY_FORMATS, TASKS, ExportConfig, ImportConfig, check_export
from seco.models.backbones import PLUGINS, RESNETS, backbone_spec
from shards.errors import InputError
from shards.index import sha256_of


def import_checkpoint(config: ImportConfig) -> str:
    """Convert a file to a checkpoint of this toolkit; returns a one-line summary.

    Raises:
        InputError: the file cannot be used, or the output cannot be written.
    """
    source, named, out = _paths(config.file, config.out)
    weights = _read(source, config.arch)
    heads = weights.query.heads
    settings = {
        "arch": weights.arch,
        "tasks": weights.tasks or "",  # MoCo has none of SeCo's tasks
        "heads": "shared" if SHARED in heads or not heads else "separate",
    }
    imported: dict[str, Any] = {
        "layout": weights.layout,
        "description": weights.description(),
        "file": source.name,
        "sha256": sha256_of(source),
        "left": list(weights.left),
        "toolkit": __version__,
        **({"name": named.name, **named.record()} if named else {}),
    }
    if weights.epoch is not None:
        imported["epoch"] = weights.epoch
    save_checkpoint(
        out, {"config": settings, "step": 0, "model": _own_state(weights), "imported": imported}
    )
    left = f"; not used: {', '.join(weights.left)}" if weights.left else ""
    whose = f" (licence: {named.licence})" if named else ""
    return f"{out}: {_contents(weights)} of {source.name} ({weights.description()}){left}{whose}"


def export_checkpoint(config: ExportConfig) -> str:
    """Convert a checkpoint to the layout ``config.format``; returns a one-line summary.

    Raises:
        InputError: the checkpoint cannot be used or lacks a part that the layout needs, a package
            is missing, or the output cannot be written.
    """
    check_export(config)
    source, _, out = _paths(config.file, config.out, folder=config.format == "huggingface")
    if config.format in DEPLOY_FORMATS:
        return deploy(config, source, out)
    weights = _read(source, config.arch)
    family = backbone_spec(weights.arch).family
    if config.format == "safetensors":
        metadata = {"format": "pt", "arch": weights.arch}  # "format" as in transformers
        if family == PLUGINS:
            metadata[TOOLKIT] = f"seco-video {__version__}"
        save_safetensors(out, weights.query.backbone, metadata)
    elif config.format == "torchvision":
        save_torch_file(out, weights.query.backbone)
    elif family != RESNETS:
        raise InputError(
            f"holds a {weights.arch}, which the code that reads this layout cannot build",
            source,
            "export it as torchvision or safetensors",
        )
    elif config.format == "moco":
        save_torch_file(out, _moco(weights, source))
    else:
        save_torch_file(out, _authors(weights, source))
    whole_model = config.format in ("moco", "seco-authors")
    held = _contents(weights) if whole_model else "query backbone"
    said = f"{out}: {held} of {source.name} ({weights.arch}) as {config.format}"
    if family == RESNETS:
        return said
    return f"{said}; build the network with seco.models.backbones.build_backbone({weights.arch!r})"


def _read(source: Path, arch: str | None) -> Weights:
    if arch is not None:
        backbone_spec(arch)  # raises for an unknown name
    weights = read_weights(source, arch)
    if arch not in (None, weights.arch):
        raise InputError(f"holds a {weights.arch}, not a {arch}", source, "leave --arch out")
    return weights


def _paths(file: str, out: str, folder: bool = False) -> tuple[Path, NamedWeights | None, Path]:
    target = Path(out)
    if folder and target.exists():
        raise InputError("already exists", target, "remove it or name another folder")
    if target.is_dir():
        raise InputError("is a folder", target, "name the file to write")
    source, named = weights_file(file)
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError("is the input file, which would be lost", target, "choose another --out")
    return source, named, target


def _own_state(weights: Weights) -> Layer:
    """State dict of :class:`seco.models.seco.SeCo`; parts that the file lacks are left out."""
    state: Layer = {}
    sides = (("query_encoder.", "", weights.query), ("key_encoder.", "key_", weights.key))
    for side, classifier_of, encoder in sides:
        if encoder is not None:
            state |= _prefixed(f"{side}backbone.", encoder.backbone)
            for name, head in encoder.heads.items():
                state |= _prefixed(f"{side}heads.{name}.", head)
            state |= _prefixed(f"{classifier_of}order_classifier.", encoder.order_classifier or {})
    if weights.queue is not None:
        state["queue.rows"] = weights.queue
        state["queue.next_slot"] = torch.tensor(weights.next_slot)
    return state


def _moco(weights: Weights, source: Path) -> dict[str, Any]:
    """MoCo v2's layout; with several heads, the one whose keys are in the queue.

    Exactly three top-level keys: that is how the SeCo authors' code recognises MoCo's files.
    """
    name = SHARED if SHARED in weights.query.heads else "inter"
    if name not in weights.query.heads:
        raise _lacks("no two-layer head", source)
    state: Layer = {}
    for side, encoder in (("encoder_q", weights.query), ("encoder_k", weights.key)):
        if encoder is not None:
            state |= _prefixed(f"module.{side}.", encoder.backbone)
            state |= _prefixed(f"module.{side}.fc.", encoder.heads[name])
    if weights.queue is not None:
        state["module.queue"] = weights.queue.t().contiguous()  # (D, K)
        state["module.queue_ptr"] = torch.tensor([weights.next_slot])
    return {"epoch": weights.epoch or 0, "arch": weights.arch, "state_dict": state}


def _authors(weights: Weights, source: Path) -> dict[str, Any]:
    """The authors' layout without optimizer; ``opt`` is a plain dict, so loading runs no code."""
    content: dict[str, Any] = {
        "opt": {"arch": weights.arch, "toolkit": __version__},
        "model": _prefixed("module.", _authors_encoder(weights.query, None, source)),
        "epoch": weights.epoch or 0,
        # A fourth key: their code takes a file with three keys for MoCo's.
        "toolkit": __version__,
    }
    if weights.key is not None:
        content["model_ema"] = _authors_encoder(weights.key, weights.query, source)
    if weights.queue is not None:
        # They store no pointer and continue at row 0, where the oldest key therefore has to be.
        memory = torch.roll(weights.queue, -weights.next_slot, dims=0)
        content["contrast"] = {"params": torch.tensor([-1]), "memory": memory}
    return content


def _authors_encoder(
    encoder: EncoderWeights, trained: EncoderWeights | None, source: Path
) -> Layer:
    """An encoder in the authors' layout; one without order classifier gets that of ``trained``."""
    state = dict(encoder.backbone)
    for task in TASKS:
        head = encoder.heads.get(task, encoder.heads.get(SHARED))
        if head is None:
            raise _lacks(f"no head for {task}", source)
        state |= _prefixed(f"fc_{task}.", head)
    classifier = encoder.order_classifier or (trained and trained.order_classifier)
    if not classifier:
        raise _lacks("no order classifier", source)
    return state | _prefixed("fc_order_classifier.", classifier)


def _lacks(what: str, source: Path) -> InputError:
    return InputError(
        f"has {what}, which this layout needs", source, "export it as torchvision or safetensors"
    )


def _contents(weights: Weights) -> str:
    """Summary such as ``backbone, heads inter/intra/order, order classifier, key encoder, …``."""
    parts = ["backbone"]
    if weights.query.heads:
        names = "/".join(weights.query.heads)
        parts.append(f"head {names}" if len(weights.query.heads) == 1 else f"heads {names}")
    parts += ["order classifier"] if weights.query.order_classifier else []
    parts += ["key encoder"] if weights.key is not None else []
    parts += [f"queue of {len(weights.queue)}"] if weights.queue is not None else []
    return ", ".join(parts)


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}
