"""``seco export`` to formats that run without this toolkit: ONNX, torch.export, Hugging Face.

Each holds the query backbone, which maps normalised RGB images (N, 3, S, S) in float32 to features
(N, C), for any N and one S. The format's metadata say what that input is.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seco import __version__
from seco.checkpoints.io import save_safetensors
from seco.checkpoints.weights import Backbone, load_backbone
from seco.config import ExportConfig
from seco.models.backbones import (
    RESNETS,
    TIMM_PREFIX,
    archs_of,
    backbone_spec,
    require_size,
    timm_freedom,
    with_own_normalisation,
)
from shards.atomic import atomic_folder, atomic_path, json_text
from shards.errors import InputError

OPSET = 18  # the one that torch's exporter is written for; it converts to others
_CROP_SHARE = 0.875  # of the short edge: 224 of 256, as `seco extract-features` crops
_LARGEST_MESSAGE = 2**31 - 1  # bytes; protobuf's limit
# What a format needs; the extra that installs it has the name of the first.
_PACKAGES = {"onnx": ("onnx", "onnxscript"), "torch-export": (), "huggingface": ("timm",)}


def deploy(config: ExportConfig, source: Path, out: Path) -> str:
    """Write the backbone of ``source`` to ``out``; returns a one-line summary.

    Raises:
        InputError: the checkpoint cannot be used, a package is missing, the format cannot hold the
            backbone, or the output cannot be written.
    """
    write = {"onnx": _write_onnx, "torch-export": _write_program, "huggingface": _write_folder}
    for package in _PACKAGES[config.format]:
        _imported(package, config.format)
    backbone = load_backbone(source, config.arch)
    model = Deployed(backbone, preprocessing(backbone.arch, config.size))
    write[config.format](model, out)
    detail = f" (opset {OPSET})" if config.format == "onnx" else ""
    side = model.input.size_px
    return (
        f"{out}: query backbone of {source.name} ({backbone.arch}) as {config.format}{detail}; "
        f"images (N, 3, {side}, {side}) to features (N, {model.width})"
    )


class Preprocessing(NamedTuple):
    """How an image becomes the input of a backbone; mean and std are of RGB in 0 to 1."""

    size_px: int
    short_edge_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def text(self) -> str:
        """JSON, for a format's metadata."""
        steps = {
            "resize_short_edge_px": self.short_edge_px,
            "interpolation": "bilinear, antialiased",
            "center_crop_px": self.size_px,
            "channels": "RGB",
            "scale": "0 to 1",
            "mean": self.mean,
            "std": self.std,
            "layout": "NCHW, float32",
        }
        return json.dumps(steps)


def preprocessing(arch: str, size_px: int | None = None) -> Preprocessing:
    """The input of a backbone; ``size_px`` replaces its usual side.

    Raises:
        InputError: no backbone has this name.
    """
    spec = backbone_spec(arch)
    side = spec.size if size_px is None else size_px
    return Preprocessing(side, int(side / _CROP_SHARE), spec.mean, spec.std)


class Deployed:
    """A backbone with its input, checked by two images.

    Args:
        backbone: frozen; from now on, it takes images normalised as it was made for.
        given: its input.

    Attributes:
        images: (2, 3, S, S), drawn with a fixed seed.
        features: (2, C) of these images.

    Raises:
        InputError: the backbone does not take images of this size.
    """

    def __init__(self, backbone: Backbone, given: Preprocessing) -> None:
        with_own_normalisation(backbone.network)
        self.backbone = backbone
        self.input = given
        shape = (2, 3, given.size_px, given.size_px)
        self.images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                self.features: Tensor = backbone(self.images)
        except (AssertionError, RuntimeError, ValueError) as error:
            require_size(backbone.arch, given.size_px, "--size")
            raise InputError(
                f"{backbone.arch} does not take images of {given.size_px} px",
                "--size",
                "leave it out, or give the size it was trained with",
            ) from error

    @property
    def width(self) -> int:
        """C, the width of a feature."""
        return self.features.shape[1]

    def about(self) -> dict[str, str]:
        """Metadata that every format holds."""
        return {
            "arch": self.backbone.arch,
            "weights_sha256": self.backbone.sha256,
            "preprocessing": self.input.text(),
            "toolkit": f"seco-video {__version__}",
        }


def traced(network: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Trace a network for any batch size; ``images`` (2, 3, S, S) are an example of its input."""
    # An example of one image would fix the batch size at 1.
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    return program


def _write_program(model: Deployed, out: Path) -> None:
    program = traced(model.backbone.network, model.images)
    whole = io.BytesIO()
    torch.export.save(program, whole, extra_files={"seco.json": json.dumps(model.about())})
    _write(out, whole.getvalue())


def _write_onnx(model: Deployed, out: Path) -> None:
    onnx = _imported("onnx", "onnx")
    tensors = model.backbone.network.state_dict().values()
    if sum(tensor.nbytes for tensor in tensors) > _LARGEST_MESSAGE:
        raise InputError("has more weights than the 2 GiB of an ONNX file", model.backbone.source)
    program = torch.onnx.export(
        traced(model.backbone.network, model.images),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert program is not None
    proto: Any = program.model_proto
    # The exporter's notes: names of Python objects, and paths of this machine.
    del proto.metadata_props[:]
    for graph in (proto.graph, *proto.functions):
        for part in (graph, *graph.node, *graph.value_info):
            del part.metadata_props[:]
            part.doc_string = ""
    for part in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del part.metadata_props[:]
    for name, text in model.about().items():
        proto.metadata_props.add(key=name, value=text)
    onnx.checker.check_model(proto)
    _write(out, proto.SerializeToString(deterministic=True))


class TimmModel(NamedTuple):
    """The timm model that computes the same as one of the backbones.

    Args:
        name: for ``timm.create_model``.
        tensors: turns a state dict of the backbone into one of the timm model without classifier.
    """

    name: str
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


# timm's ResNets have the names and shapes of torchvision's.
_TIMM = {arch: TimmModel(arch) for arch in archs_of(RESNETS)}


def timm_model(arch: str) -> TimmModel | None:
    """The timm model for a backbone; None if timm has none."""
    if arch.startswith(TIMM_PREFIX):
        return TimmModel(arch.removeprefix(TIMM_PREFIX))
    return _TIMM.get(arch)


def _write_folder(model: Deployed, out: Path) -> None:
    with atomic_folder(out) as folder:
        write_for_timm(model, folder)
        (folder / "README.md").write_text(_card(model, out.name), "utf-8")


def write_for_timm(model: Deployed, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, which timm and transformers load.

    Raises:
        InputError: timm is not installed, or cannot build the network or builds another.
    """
    timm = _imported("timm", "huggingface")
    backbone = model.backbone
    theirs = timm_model(backbone.arch)
    if theirs is None or not timm.is_model(theirs.name):
        raise InputError(
            f"holds a {backbone.arch}, whose tensors have other names in timm, if it has it",
            backbone.source,
            "export it as onnx, torch-export or safetensors",
        )
    tensors = theirs.tensors(backbone.network.state_dict())
    arguments: dict[str, Any] = {}
    if backbone.arch.startswith(TIMM_PREFIX) and (freedom := timm_freedom(theirs.name)):
        arguments = {**freedom, "img_size": backbone_spec(backbone.arch).size}
    network = timm.create_model(theirs.name, pretrained=False, num_classes=0, **arguments)
    _require_same(model, network, tensors)
    named = {"format": "pt", "arch": backbone.arch}  # "format" as in transformers
    save_safetensors(folder / "model.safetensors", tensors, named)
    settings = _timm_settings(model, theirs.name, network)
    if arguments:
        settings["model_args"] = arguments
    (folder / "config.json").write_text(json_text(settings), "utf-8")


def _require_same(model: Deployed, network: Any, tensors: dict[str, Tensor]) -> None:
    """Check that timm's network takes the weights and computes the same features.

    Raises:
        InputError: it does not.
    """
    try:
        network.load_state_dict(tensors, strict=True)
        with torch.no_grad():
            features = network.eval()(model.images)
        torch.testing.assert_close(features, model.features, rtol=1e-4, atol=1e-4)
    except (AssertionError, RuntimeError) as error:
        raise InputError(
            f"holds a {model.backbone.arch}, and that of timm {metadata.version('timm')} differs",
            model.backbone.source,
            "export it as onnx, torch-export or safetensors",
        ) from error


def _timm_settings(model: Deployed, name: str, network: Any) -> dict[str, Any]:
    """``config.json`` as timm writes it, which transformers reads, too."""
    side = model.input.size_px
    known = network.pretrained_cfg
    input_settings = {
        "custom_load": False,
        "input_size": [3, side, side],
        "fixed_input_size": known.get("fixed_input_size", False),
        "interpolation": "bilinear",
        "crop_pct": _CROP_SHARE,
        "crop_mode": "center",
        "mean": model.input.mean,
        "std": model.input.std,
        "num_classes": 0,
        "first_conv": known.get("first_conv"),
        "classifier": known.get("classifier"),
    }
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": model.width,
        "pretrained_cfg": input_settings,
        "seco": {name: text for name, text in model.about().items() if name != "preprocessing"},
    }


def _card(model: Deployed, name: str) -> str:
    backbone, given = model.backbone, model.input
    trained = f" pre-trained by SeCo on video (tasks: {backbone.tasks})" if backbone.tasks else ""
    return f"""\
---
library_name: timm
tags:
- image-feature-extraction
- timm
- transformers
---
# {name}

A {backbone.arch} without classifier{trained},
exported by seco-video {__version__}. It maps images (N, 3, {given.size_px}, {given.size_px}) to
features (N, {model.width}).

Input: RGB; resize the short edge to {given.short_edge_px} px (bilinear), crop the central
{given.size_px} px, scale to 0 to 1, normalise with mean {given.mean} and std {given.std}.

```python
import timm

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image)[None])
```

```python
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{name}").eval()
features = model(**AutoImageProcessor.from_pretrained("{name}")(image)).pooler_output
```

SHA-256 of the weights, as the toolkit computes it: `{backbone.sha256}`.
"""


def _write(out: Path, content: bytes) -> None:
    with atomic_path(out) as temporary:
        temporary.write_bytes(content)


def _imported(module: str, layout: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{module} is not installed",
            f"--format {layout}",
            f'pip install "seco-video[{_PACKAGES[layout][0]}]"',
        ) from error
