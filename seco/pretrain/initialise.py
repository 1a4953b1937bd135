"""``seco pretrain --init``: start from a file of any layout (paper §5.2 starts from MoCo)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch import nn

from seco.checkpoints.foreign_checkpoints import (
    AUTHORS,
    SHARED,
    EncoderWeights,
    Layer,
    Weights,
    read_weights,
)
from seco.config import PretrainConfig
from seco.model.method import SeCo
from shards.errors import InputError


def initialise(model: SeCo, config: PretrainConfig) -> None:
    """Load ``--init`` into a new model and say in one line what was taken.

    Both encoders start from the file's query encoder, as in MoCo; from the authors' own SeCo each
    starts from its counterpart. A head is taken where the file has one of its name; a file's one
    head for all is copied into each (so do the authors with MoCo v2's). The queue is never taken:
    its keys are of other images. The key encoder takes the BatchNorm statistics, too, which the
    authors' code leaves new; in training, nothing reads them.

    Raises:
        InputError: the file cannot be used, or holds another architecture.
    """
    path = Path(str(config.init))
    weights = read_weights(path)
    if weights.arch != config.arch:
        raise InputError(
            f"holds a {weights.arch}, not a {config.arch}", path, f"give --arch {weights.arch}"
        )
    query = weights.query
    key = weights.key if weights.layout == AUTHORS and weights.key is not None else query
    model.query_encoder.backbone.load_state_dict(query.backbone, strict=True)
    model.key_encoder.backbone.load_state_dict(key.backbone, strict=True)
    heads = [name for name in model.query_encoder.heads if _take_head(model, name, query, key)]
    classified = model.head_of.get("order") in heads and _take(
        model.order_classifier, query.order_classifier
    )
    if os.environ.get("RANK", "0") == "0":  # once for a run of several processes
        said = _summary(weights, model, heads, classified, own_key=key is not query)
        print(f"seco pretrain: --init {path}: {said}", file=sys.stderr, flush=True)


def _take_head(model: SeCo, name: str, query: EncoderWeights, key: EncoderWeights) -> bool:
    source = name if name in query.heads else SHARED
    return _take(model.query_encoder.heads[name], query.heads.get(source)) and _take(
        model.key_encoder.heads[name], key.heads.get(source)
    )


def _take(module: nn.Module, layer: Layer | None) -> bool:
    """Load ``layer`` if it is there and fits (a head of another width stays new)."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if layer is None or {name: tensor.shape for name, tensor in layer.items()} != shapes:
        return False
    module.load_state_dict(layer, strict=True)
    return True


def _summary(
    weights: Weights, model: SeCo, heads: list[str], classified: bool, own_key: bool
) -> str:
    """One line: what the file is, what came from it, what of it stays there, what starts new."""
    new = [name for name in model.query_encoder.heads if name not in heads]
    copied = " (its one head)" if heads and set(heads).isdisjoint(weights.query.heads) else ""
    used = {name if name in weights.query.heads else SHARED for name in heads}
    unused = [name for name in weights.query.heads if name not in used]
    taken = ["the backbone"]
    taken += [f"{_named_heads(heads)}{copied}"] if heads else []
    taken += ["the order classifier"] if classified else []
    taken += ["the key encoder"] if own_key else []
    left = [*weights.left, *([_named_heads(unused)] if unused else [])]
    left += ["order classifier"] if weights.query.order_classifier and not classified else []
    left += ["key encoder"] if weights.key is not None and not own_key else []
    left += ["queue"] if weights.queue is not None else []
    parts = [f"{weights.description()}: took {', '.join(taken)}"]
    parts += [f"left its {', '.join(left)}"] if left else []
    parts += [f"new: {_named_heads(new)}"] if new else []
    return "; ".join(parts)


def _named_heads(names: list[str]) -> str:
    return f"head{'s' if len(names) > 1 else ''} {'/'.join(names)}"
