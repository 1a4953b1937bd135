"""What feeds a training step and what comes after it.

``views``, ``loader``, ``extract``, ``svm``, ``track``; several are separated by commas.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.card import seconds
from benchmarks.gpu.data import large_set
from benchmarks.gpu.table import Table, arguments
from benchmarks.loader import triplets_per_second
from benchmarks.track import bench_track
from benchmarks.views import bench_views
from seco.checkpoints.weights import load_backbone
from seco.config import ExtractConfig
from seco.evaluation.svm import fit_svm
from seco.features.extract import extract_features
from shards.opening import open_shards
from shards.stream import TripletStream

_WORKERS = 14  # of 16 cores


def views(work: Path, device: torch.device, table: Table) -> None:
    """The views of a batch of 512, and frames decoded by the GPU."""
    on_gpu = device.type == "cuda"
    repeats, batch = (3, None) if on_gpu else (1, 4)
    found = bench_views((large_set(work, device),), repeats, device=str(device), batch=batch)
    fused = "inductor's three kernels move 6.8 GB for 2,048 views, at 3.0 TB/s"
    cut = "two batched products per view of 0.3 GFLOP and 1.2 MB, in blocks"
    predicted = {
        "regrouped": ("15 to 40 ms", "each group of operations copies its images: 30 to 100 GB"),
        "one compiled graph": ("2.5 to 4 ms (wanted 12)", fused),
        "copy to the device": ("6 to 7 ms", "308 MB at about 50 GB/s of PCIe 5 x16"),
        "nvjpeg decode of 1,536 frames": ("80 to 400 ms", "4,000 to 20,000 frames/s, a guess"),
        "crop-resize of 2,048 views": ("5 to 15 ms", cut),
    }
    images = found.device.pop("images")
    for name, ms in found.device.items():
        label = name.removesuffix("_ms")
        what = label if "of" in label.split() else f"{label}, {images:.0f} views"
        table.row(what, f"{ms:.3g} ms", *predicted[label])


def loader(work: Path, device: torch.device, table: Table) -> None:
    """Batches of triplets by themselves."""
    on_gpu = device.type == "cuda"
    stream = TripletStream(
        open_shards([large_set(work, device)]), 512 if on_gpu else 8, "uniform", 0
    )
    for workers in (8, _WORKERS) if on_gpu else (1,):
        table.row(
            f"loader, {workers} workers",
            f"{triplets_per_second(stream, workers):,.0f} triplets/s",
            f"{workers * 560:,}",
            "1.37 CPU ms per triplet of 340x256 frames on an EPYC, 1.3 times that for larger ones",
        )


def extract(work: Path, device: torch.device, table: Table) -> None:
    """The command, and bare forwards of as many frames."""
    on_gpu = device.type == "cuda"
    shards = large_set(work, device)
    sizes = (8, 256, 224, "resnet50") if on_gpu else (2, 36, 32, "resnet18")
    frames, short_edge, crop, arch = sizes
    config = ExtractConfig(
        shards=(shards,), checkpoint="random", arch=arch, out=str(work / "extracted"),
        frames=frames, short_edge=short_edge, crop_size=crop, device=str(device),
        workers=_WORKERS if on_gpu else 1,
    )  # fmt: skip
    count = len(open_shards([shards])) * frames
    for again in ("", ", again"):  # the first time includes what is loaded once
        began = time.perf_counter()
        extract_features(config, quiet=True)
        taken = time.perf_counter() - began
        table.row(
            f"extract-features, {count:,} frames{again}",
            f"{taken:.3g} s, {count / taken:,.0f} frames/s",
            "2 to 4 s",
            "forwards at 7,000 frames/s, 14 workers decode 9,000; and a second to start",
        )
        config = ExtractConfig(**{**vars(config), "out": str(work / "extracted-again")})
    network = load_backbone("random", arch).network.to(device).eval()
    batch = 256 if on_gpu else 4
    images = torch.randn(batch, 3, crop, crop, device=device)
    network, images = (  # type: ignore[assignment]
        each.to(memory_format=torch.channels_last) for each in (network, images)
    )

    def forward() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            network(images)

    rate = batch / seconds(forward, device, 10 if on_gpu else 1)
    why = "8.2 GFLOP and 150 MB per image: 20,000 per second by bytes, of which a third is usual"
    table.row("bare forwards", f"{rate:,.0f} frames/s", "6,000 to 9,000", why)


def made_features(
    rows: int, classes: int, dimension: int, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Like pooled ReLU outputs, classes overlapping: benchmarks.probe_reference.made_rows."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rank = min(256, dimension)
    size = torch.arange(1, rank + 1, device=device) ** -0.5
    mixing, bias = normal(rank, dimension), 0.5 * normal(dimension) - 0.5
    labels = torch.arange(rows, device=device) % classes
    centres = 0.25 * normal(classes, rank)
    features = np.empty((rows, dimension), dtype=np.float32)
    for begin in range(0, rows, 20_000):
        some = labels[begin : begin + 20_000]
        mixed = (size / size.norm() * (centres[some] + normal(len(some), rank))) @ mixing + bias
        mixed += 0.03 * normal(*mixed.shape)
        made = torch.nn.functional.softplus(4 * mixed) / 8
        features[begin : begin + 20_000] = made.cpu().numpy()
    return features, labels.cpu().numpy()


def svm(work: Path, device: torch.device, table: Table) -> None:
    """All classes of a set of Kinetics' size."""
    rows, classes, dimension = (240_000, 400, 2048) if device.type == "cuda" else (200, 3, 16)
    fit_svm(*made_features(200, 3, 16, device), device=device)  # what is loaded once
    features, labels = made_features(rows, classes, dimension, device)
    began = time.perf_counter()
    found = fit_svm(features, labels, device=device)
    taken = time.perf_counter() - began
    table.row(
        f"SVM of {rows:,} x {dimension:,}, {classes} classes",
        f"{taken:.3g} s",
        "10 to 30 s (wanted 30)",
        "15 Tflop of float32 at 50 TFLOP/s and 9 of float64 at 40 take half a second, 275 passes "
        "over 2 GB another; the rest is small steps, on a CPU four fifths of 1,660 s",
    )
    rounds = f"{found.rounds.mean():.3g}, {found.passes}"
    table.row("rounds per class, passes", rounds, "15, 275", "measured on a CPU")
    table.check("classes not proven", float((~found.converged).sum()), 0)


def track(work: Path, device: torch.device, table: Table) -> None:
    """SiamFC: a frame tracked and a training step."""
    on_gpu = device.type == "cuda"
    arch, layer = ("resnet50", "layer4") if on_gpu else ("resnet18", "layer2")
    pairs, repeats = (8, 10) if on_gpu else (2, 1)
    found = bench_track(arch, layer, device=str(device), batch_size=pairs, repeats=repeats)
    launches = "bound by launches: 55 layers, some 170 kernels of 10 us with the host's work"
    for name, ms in found.tracking.items():
        predicted = {"ours": "4 to 8 ms", "bare cost": "3 to 5 ms"}.get(name, "10 to 20 ms")
        table.row(f"a frame tracked, {name}", f"{ms:.3g} ms", predicted, launches)
    for name, ms in found.training.items():
        predicted = {"ours": "8 to 15 ms", "bare cost": "6 to 12 ms"}.get(name, "15 to 30 ms")
        table.row(f"a step of {pairs} pairs, {name}", f"{ms:.3g} ms", predicted, launches)


def main() -> int:
    """Measure what is asked for."""
    given = arguments(__doc__, "what")
    parts = {"views": views, "loader": loader, "extract": extract, "svm": svm, "track": track}
    table = Table(given.device)
    for name in given.what.split(","):
        parts[name](given.work, given.device, table)
    return table.exit_code()


if __name__ == "__main__":
    sys.exit(main())
