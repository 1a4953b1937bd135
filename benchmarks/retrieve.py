"""A million features of 2,048 values: building an index and 1,000 queries, time and peak memory.

    python benchmarks/retrieve.py --work /tmp/seco-retrieve --json found.json

The features are drawn, block by block, into a feature folder on the disk (8 GB; its halves are
a file with holes): videos of 400 classes in 128 directions of falling weight, projected to 2,048
values with a ReLU behind, plus noise. A query is a video's feature with as much noise again. Every
stage is a process of its own, whose peak memory the system tells; the build is `seco retrieve
build` itself. Memory counts pages of mapped files as well.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import machine  # noqa: E402
from seco.evaluation.index import (  # noqa: E402
    INDEX,
    ApproximateIndex,
    open_index,
)
from seco.evaluation.nearest import ExactIndex, NearestIndex  # noqa: E402
from seco.features.matrix import unit_vectors  # noqa: E402
from seco.features.store import (  # noqa: E402
    FEATURES,
    FORMAT_VERSION,
    HALVES,
    META,
    VIDEOS,
    read_features,
)
from shards.atomic import write_json  # noqa: E402
from shards.progress import progress  # noqa: E402

CLASSES, LATENT, NOISE = 400, 128, 0.1
BLOCK = 8192
K = 10
PROBES = (8, 32, 128)
BUILD = ["-m", "cli", "retrieve", "build", "--ivfpq-above", "1", "--device", "cpu"]


def generate(folder: Path, videos: int, dimension: int, queries: int) -> None:
    """A feature folder and ``queries.npy``; one that is there is kept."""
    if (folder / META).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    weights = (np.arange(1, LATENT + 1) ** -0.5).astype(np.float32)
    centres = rng.standard_normal((CLASSES, LATENT), dtype=np.float32)
    projection = rng.standard_normal((LATENT, dimension), dtype=np.float32)
    features = open_memmap(folder / FEATURES, "w+", np.float32, (videos, dimension))
    open_memmap(folder / HALVES, "w+", np.float32, (videos, 2, dimension)).flush()
    with progress("Drawing", videos, "videos") as shown:
        for start in range(0, videos, BLOCK):
            rows = min(BLOCK, videos - start)
            latent = centres[rng.integers(0, CLASSES, rows)]
            latent = (latent + rng.standard_normal((rows, LATENT), dtype=np.float32)) * weights
            drawn = np.maximum(latent @ projection, 0)
            features[start : start + rows] = noisy(drawn, rng)
            shown.advance(rows)
    features.flush()
    asked = np.sort(rng.choice(videos, queries, replace=False))
    np.save(folder / "queries.npy", noisy(features[asked], rng))
    with open(folder / VIDEOS, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("key", "source", "label", "label_name", "frames", "shard", "split.1"))
        for number in range(videos):
            writer.writerow((f"v{number}", f"v{number}.mp4", "", "", 30, "drawn-000.tar", "train"))
    encoder = {"arch": "drawn", "checkpoint": "drawn", "sha256": "00", "dimension": dimension}
    write_json(folder / META, {"format_version": FORMAT_VERSION, "encoder": encoder})


def noisy(x: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """The same with noise of a tenth of their mean size."""
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    made: NDArray[np.float32] = x + np.float32(NOISE) * np.float32(x.std()) * noise
    return made


def stage(command: list[str], title: str) -> dict[str, Any]:
    """Run it; its seconds, peak memory in MB and what it printed."""
    print(f"{title} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{title} ended with code {process.returncode}")
    return {
        "seconds": time.monotonic() - began,
        "peak_mb": used.ru_maxrss / 1024,
        "printed": printed.strip().splitlines(),
    }


def search(folder: Path, name: str) -> None:
    """The stage of a search: prints seconds, and saves what it found."""
    queries = unit_vectors(np.load(folder / "queries.npy"))
    features = read_features(folder)
    vectors = unit_vectors(features.features)
    kind, _, probes = name.partition("-")
    index: NearestIndex
    if kind == "exact":
        index = ExactIndex(vectors, "cpu")
    else:
        index = open_index(folder / INDEX, features, "cpu", int(probes))
        if kind == "codes":
            assert isinstance(index, ApproximateIndex)
            index = ApproximateIndex(index.index, vectors, 0, "cpu")
    began = time.monotonic()
    _, found = index.search(queries, K)
    print(json.dumps({"search_seconds": time.monotonic() - began}))
    np.save(folder / f"found-{name}.npy", found)


def recall(folder: Path, name: str) -> float:
    """The share of the exact K nearest that were found."""
    true, found = (np.load(folder / f"found-{n}.npy") for n in ("exact", name))
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(true, found, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--keep", action="store_true", help="Leave the 8 GB where they are.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.work / f"{given.videos}x{given.dimension}"
    if given.stage == "generate":
        generate(folder, given.videos, given.dimension, given.queries)
        return
    if given.stage:
        search(folder, given.stage)
        return
    again = [str(Path(__file__)), "--work", str(given.work), "--videos", str(given.videos)]
    again += ["--dimension", str(given.dimension), "--queries", str(given.queries), "--stage"]
    # Apart, like all stages: a process begins with the peak of the one that started it.
    stage([*again, "generate"], "generate")
    found: dict[str, Any] = {"machine": machine("faiss-cpu", "faiss-gpu", "numpy")}
    found["build"] = stage(
        [*BUILD, "--features", str(folder)],
        "seco retrieve build",
    )
    names = ["exact", *(f"ivfpq-{n}" for n in PROBES), *(f"codes-{n}" for n in PROBES)]
    for name in names:
        found[name] = stage([*again, name], name)
        found[name] |= json.loads(found[name].pop("printed")[-1])
        found[name]["queries_s"] = given.queries / found[name]["search_seconds"]
        found[name]["recall@10"] = recall(folder, name)
    found["index_mb"] = (folder / INDEX).stat().st_size / 1e6
    print(table(found, given.videos, given.dimension, given.queries))
    if given.json:
        write_json(given.json, found)
    if not given.keep:
        shutil.rmtree(folder)


def table(found: dict[str, Any], videos: int, dimension: int, queries: int) -> str:
    """Markdown, to keep."""
    lines = [", ".join(f"{name} {value}" for name, value in found["machine"].items())]
    lines += [f"{videos:,} x {dimension:,} features, {queries:,} queries, {K} nearest", ""]
    lines += found["build"]["printed"]
    lines += [
        f"build: {found['build']['seconds']:.0f} s in all, peak {found['build']['peak_mb']:.0f} MB",
        "",
        "| search | queries/s | times exact | recall@10 | peak MB |",
        "|---|---|---|---|---|",
    ]
    for name, row in found.items():
        if isinstance(row, dict) and "queries_s" in row:
            lines.append(
                f"| {name} | {row['queries_s']:.3g} | "
                f"{row['queries_s'] / found['exact']['queries_s']:.3g} | "
                f"{row['recall@10']:.3f} | {row['peak_mb']:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
