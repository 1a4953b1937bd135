"""Does each family of backbones learn? Each against itself untrained, on the demo's rendered set.

python benchmarks/families.py --work /tmp/families [--seeds 0,1,2] [--parallel 2]
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.recordings import seco

PX = 64  # side of the views; a ViT cuts them into 4 x 4 patches
# Temperature and momentum as in MoCo v3. With the demo's, and 1e-3 to 5e-3 or SGD, the training
# loss of these two had hardly fallen after 480 steps. Warm-up over a tenth of the steps.
MOCO_V3 = ("--ema", "0.99", "--temperature", "0.2", "--warmup-epochs", "20")
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "vit": ("timm:vit_tiny_patch16_224", ("--lr", "3e-4", *MOCO_V3)),
    "convnext": ("timm:convnext_atto", ("--lr", "5e-4", *MOCO_V3)),
    # As in the demo.
    "resnet": ("resnet10_w16", ("--lr", "0.05", "--ema", "0.9", "--temperature", "0.1")),
}
SETTINGS: tuple[str, ...] = ("--tasks", "inter", "--batch-size", "32", "--bn-group", "16")
SETTINGS += ("--queue-size", "0", "--views-on", "workers")
SETTINGS += ("--crop-size", str(PX), "--min-crop-area", "0.35")
MEASURES = ("svm@100", "r1@100")


def run(work: Path, family: str, seed: int, steps: int, threads: int) -> dict[str, Any]:
    """Train and compare; finished parts are kept."""
    arch, options = FAMILIES[family]
    out = work / f"{family}{seed}"
    manifest = work / "shards" / "raw.json"
    videos = json.loads((work / "train.json").read_text())
    epochs = max(1, round(steps / (videos // 32)))
    run_of = ("--shards", manifest, "--split", "1", "--out", out, "--resume", "auto")
    seco(
        *("pretrain", "--arch", arch, *options, *SETTINGS, *run_of),
        *("--epochs", epochs, "--seed", seed, "--workers", 1),
        log=work / "log.txt",
        threads=threads,
    )
    compared = out / "compare"
    if not (compared / "compare.json").exists():
        named = (f"trained={out}", f"untrained=random:{arch}:{seed}")
        seco(
            *("compare", "--shards", manifest, "--split", "1", "--out", compared),
            *(part for name in named for part in ("--encoder", name)),
            *("--baseline", "untrained", "--frames", 16, "--workers", 1),
            *("--short-edge", 72, "--crop-size", PX),
            log=work / "log.txt",
            threads=threads,
        )
    found: dict[str, Any] = json.loads((compared / "compare.json").read_text("utf-8"))
    return found


def row(family: str, seed: int, found: dict[str, Any]) -> str:
    """Lines of Markdown."""
    lines = []
    for key in MEASURES:
        (measure,) = (one for one in found["measures"] if one["key"] == key)
        (pair,) = (one for one in found["comparisons"] if one["encoder"] == "trained")
        (told,) = (one for one in pair["differences"] if one["key"] == key)
        values = {name: 100 * value["value"] for name, value in measure["values"].items()}
        low, high = (100 * told["interval"][end] for end in ("low", "high"))
        lines.append(
            f"| {key} | {FAMILIES[family][0]} | {seed} | {values['trained']:.1f} | "
            f"{values['untrained']:.1f} | {low:+.1f} to {high:+.1f} | {told['verdict']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    given = parser.parse_args()
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "train.json").exists():
        seco("render-demo", work / "raw", "--seed", 1, log=work / "log.txt")
        prepared = ("--out", work / "shards", "--short-edge", 72, "--frames", 16, "--name", "raw")
        seco("prepare", "ucf101", "--src", work / "raw", *prepared, log=work / "log.txt")
        (listed,) = (work / "raw").rglob("trainlist01.txt")
        (work / "train.json").write_text(str(len(listed.read_text().splitlines())))
    threads = max(1, (os.cpu_count() or 1) // given.parallel)
    jobs = [(family, int(seed)) for seed in given.seeds.split(",") for family in FAMILIES]
    with ThreadPoolExecutor(given.parallel) as pool:
        results = list(pool.map(lambda job: run(work, job[0], job[1], given.steps, threads), jobs))
    print("| measure | backbone | seed | trained % | untrained % | difference, 95 % | |")
    print("|---|---|---|---|---|---|---|")
    for job, found in sorted(zip(jobs, results, strict=True), key=lambda one: one[0]):
        print(row(*job, found))


if __name__ == "__main__":
    main()
