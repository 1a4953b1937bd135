"""A short run: save, resume, extract; its float32 losses compared with those of a CPU.

``smoke`` runs and compares, ``nvjpeg`` runs with frames decoded on the GPU, ``reference`` writes
what the CPU finds, for a later comparison on a machine with a GPU (``make gpu-kit``).

Compared are runs whose views were finished on the CPU, where both devices see the same bits: views
made on a GPU differ at the borders of blurred images.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.data import KIT, clips, cut_set
from benchmarks.gpu.table import Table, arguments
from seco.checkpoints.io import load_checkpoint
from seco.config import ExtractConfig, PretrainConfig
from seco.features.extract import extract_features
from seco.features.store import read_features
from seco.models.seco import SeCo
from seco.training.pretrain import pretrain
from shards.atomic import write_json

REFERENCE = KIT / "reference.json"
FIRST = "epoch-0001.pt"
LOSSES = ("loss", "loss_inter", "loss_intra", "loss_order")
_STEPS = 4  # an epoch each, so that there can be a checkpoint after each
_REFERENCE_STEPS = 2  # rounding grows a hundredfold with each update
# Between two layouts on one CPU (ResNet-50, sizes as here) the losses of the two steps were 1.8e-5
# and 0.0096 apart, the norms of the updates 0.0052: bounds are five times that and four times.
_MOST_LOSS = (1e-4, 0.05)
_MOST_UPDATE = 0.02
_MOST_DECODED = 0.2  # of a loss of about 10: chroma is repeated, not interpolated
_MOST_FEATURES = 1e-3  # relative, float32


def settings(device: torch.device, *, small: bool) -> dict[str, Any]:
    """Of runs as by default, but for their size."""
    if small:
        sizes: dict[str, Any] = {"arch": "resnet18", "crop_size": 64, "queue_size": 64}
        sizes |= {"batch_size": 8, "bn_group": 4}
    else:
        sizes = {"arch": "resnet50", "crop_size": 224, "queue_size": 4096}
        sizes |= {"batch_size": 64, "bn_group": 16}
    # A learning rate that stays as it is, however many epochs there are.
    more: dict[str, Any] = {"lr": 1e-3, "final_lr": 1e-3, "log_every": 1}
    return sizes | more | {"device": str(device), "compile": False}


def compared(device: torch.device, *, small: bool) -> dict[str, Any]:
    """Of runs whose losses are compared: float32, views that the CPU finishes, a smaller batch."""
    sizes = {} if small else {"batch_size": 16, "bn_group": 8}  # a CPU takes a minute
    more = {"precision": "fp32", "views_on": "workers", "keep_every_epochs": 1}
    return {**settings(device, small=small), **sizes, **more}


def smoke_set(work: Path, videos: int, *, small: bool) -> str:
    """As many videos as a step takes."""
    source = clips(work, (48, 64) if small else (256, 340))
    return cut_set(source, work, f"smoke{videos}", videos, 4, per_shard=videos)


def run(out: Path, shards: str, *, steps: int = _STEPS, **changes: Any) -> list[dict[str, float]]:
    """Train; the lines of metrics.jsonl."""
    pretrain(PretrainConfig(shards=(shards,), out=str(out), epochs=steps, **changes))
    return lines_of(out)


def lines_of(out: Path) -> list[dict[str, float]]:
    """Of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def make_reference(work: Path, *, small: bool, **changes: Any) -> dict[str, Any]:
    """What the CPU of this machine finds."""
    given = compared(torch.device("cpu"), small=small)
    shards = smoke_set(work, given["batch_size"], small=small)
    began = time.perf_counter()
    lines = run(work / "reference", shards, steps=_REFERENCE_STEPS, **{**given, **changes})
    return {
        **expected_of(shards, given),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
        "losses": [values(line) for line in lines],
        "updates": update_norms(work / "reference" / FIRST),
    }


def expected_of(shards: str, given: dict[str, Any]) -> dict[str, Any]:
    """What a reference must have been made with to be one of this run."""
    known = {name: value for name, value in given.items() if name not in ("device", "compile")}
    return {"settings": known, "set": hashlib.sha256(Path(shards).read_bytes()).hexdigest()}


def update_norms(checkpoint: Path) -> dict[str, float]:
    """How far each trained tensor is from where the run began."""
    content = load_checkpoint(checkpoint)
    config = PretrainConfig(**content["config"])
    torch.manual_seed(config.seed)
    begun = SeCo(config).query_encoder.state_dict()
    names = [name for name, _ in SeCo(config).query_encoder.named_parameters()]
    return {
        name: float((content["model"][f"query_encoder.{name}"] - begun[name]).norm())
        for name in names
    }


def reference_for(
    work: Path, shards: str, given: dict[str, Any], table: Table, *, small: bool
) -> dict[str, Any]:
    """The kit's reference; where they are of something else, what this machine's CPU finds."""
    expected = expected_of(shards, given)
    found = json.loads(REFERENCE.read_text("utf-8")) if REFERENCE.is_file() else {}
    whose = "the kit's"
    if {name: found.get(name) for name in expected} != expected:
        # In the other layout: on the CPU, too, what is compared then are other kernels.
        found, whose = make_reference(work, small=small, channels_last=True), "made here"
    table.row("losses of a CPU", f"{whose}, torch {found['torch']}, {found['seconds']} s")
    return found


def exact_float32() -> None:
    """No TF32, which has 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest difference of a step's losses."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def values(line: dict[str, float]) -> list[float]:
    """A step's losses."""
    return [line[name] for name in LOSSES]


def smoke(work: Path, device: torch.device) -> int:
    """Run, save, resume, extract, compare."""
    small = device.type == "cpu"
    exact_float32()
    table, fp32 = Table(device), compared(device, small=small)
    shards = smoke_set(work, fp32["batch_size"], small=small)
    whole = run(work / "fp32", shards, **fp32)
    reference = reference_for(work, shards, fp32, table, small=small)
    for step, most in enumerate(_MOST_LOSS):
        away = apart(values(whole[step]), reference["losses"][step])
        table.check(f"step {step + 1}, losses apart from a CPU's", away, most)
    updates, theirs = update_norms(work / "fp32" / FIRST), reference["updates"]
    differing = sum((norm - theirs[name]) ** 2 for name, norm in updates.items())
    relative = math.sqrt(differing / sum(norm**2 for norm in theirs.values()))
    table.check("norms of the tensors' first updates apart, relative", relative, _MOST_UPDATE)
    second = {"resume": str(work / "fp32" / "epoch-0002.pt"), "keep_every_epochs": 100}
    resumed = run(work / "resumed", shards, **{**fp32, **second})
    for name, line, most in zip(("first", "second"), resumed, _MOST_LOSS, strict=True):
        away = apart(values(line), values(whole[int(line["step"]) - 1]))
        table.check(f"{name} step after a resume, losses apart", away, most)
    ours = extracted(work, shards, device.type, "channels_last", small=small)
    cpus = extracted(work, shards, "cpu", "contiguous", small=small)
    relative = float(np.linalg.norm(ours - cpus) / np.linalg.norm(cpus))
    table.check("features apart from a CPU's, relative", relative, _MOST_FEATURES)
    odd = [value for value in values(default(work, device, table)) if not math.isfinite(value)]
    table.check("losses of a run as by default that are not finite", len(odd), 0)
    table.note("float32 without TF32; bounds: see benchmarks/gpu/smoke.py")
    return table.exit_code()


def default(work: Path, device: torch.device, table: Table) -> dict[str, float]:
    """The first step of a run as by default, but not compiled; what the smoke part left."""
    small, folder = device.type == "cpu", work / "default"
    if not (folder / "last.pt").is_file():
        given = settings(device, small=small)
        began = time.perf_counter()
        run(folder, smoke_set(work, given["batch_size"], small=small), **given)
        table.row("4 steps as by default, not compiled", f"{time.perf_counter() - began:.1f} s")
    return lines_of(folder)[0]


def extracted(
    work: Path, shards: str, device: str, layout: str, *, small: bool
) -> NDArray[np.float64]:
    """(N, C) features by the run's checkpoint, float32."""
    config = ExtractConfig(
        shards=(shards,),
        checkpoint=str(work / "fp32" / "last.pt"),
        out=str(work / f"features-{device}-{layout}"),
        layout=layout,
        frames=2,
        short_edge=72 if small else 256,
        crop_size=64 if small else 224,
        precision="fp32",
        device=device,
        workers=2,
    )
    extract_features(config, quiet=True)
    return np.asarray(read_features(config.out or "").features, dtype=np.float64)


def nvjpeg(work: Path, device: torch.device) -> int:
    """A run whose frames the GPU decodes; on the CPU, which cannot, they are decoded as usual."""
    table, small = Table(device), device.type == "cpu"
    usual, given = default(work, device, table), settings(device, small=small)
    shards = smoke_set(work, given["batch_size"], small=small)
    began = time.perf_counter()
    lines = run(work / "nvjpeg", shards, **given, decode="cpu" if small else "nvjpeg")
    table.row("4 steps, frames decoded on the GPU", f"{time.perf_counter() - began:.1f} s")
    table.check("videos replaced", max(line["unreadable"] for line in lines), 0)
    away = apart(values(lines[0]), values(usual))
    table.check("step 1, losses apart from those of frames decoded on the CPU", away, _MOST_DECODED)
    odd = sum(not math.isfinite(value) for line in lines for value in values(line))
    table.check("losses that are not finite", odd, 0)
    return table.exit_code()


def main() -> int:
    """Do what is asked for."""
    given = arguments(__doc__, "what")
    if given.what == "reference":
        found = make_reference(given.work, small=False)
        write_json(REFERENCE, found)
        print(f"{REFERENCE}: {found['losses']}")
        return 0
    parts = {"smoke": smoke, "nvjpeg": nvjpeg}
    return max(parts[name](given.work, given.device) for name in given.what.split(","))


if __name__ == "__main__":
    sys.exit(main())
