"""Does pre-training pay? ResNet-18 at 112 px on labelled clips, seeds side by side on one device.

Each seed is a process: pre-training, features of the result and of its random beginning, a linear
SVM, and how often a video's first half is nearest to its own second half. Needs no faiss.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.data import labelled
from benchmarks.gpu.table import Table, arguments
from seco.config import PretrainConfig
from seco.evaluation.splits import read_train_test
from seco.extract.config import ExtractConfig
from seco.extract.extract import extract_features
from seco.pretrain.trainer import pretrain
from seco.probe.config import ProbeConfig
from seco.probe.probe import probe
from shards.opening import open_shards

_SEEDS = (0, 1, 2)


def settings(device: torch.device, videos: int) -> dict[str, Any]:
    """Of the pre-training: the demo's, at a larger size."""
    if device.type == "cpu":
        sizes: dict[str, Any] = {"crop_size": 32, "batch_size": 8, "bn_group": 4, "epochs": 1}
    else:
        sizes = {"crop_size": 112, "batch_size": 64, "bn_group": 32, "epochs": 130, "workers": 4}
    more = {"arch": "resnet18", "tasks": "inter", "lr": 0.04, "temperature": 0.2, "ema": 0.99}
    queue = int(0.2 * 3 * videos) // 16 * 16 or 16
    return {**sizes, **more, "queue_size": queue, "compile": False, "device": str(device)}


def features_of(checkpoint: str, config: dict[str, Any], shards: str, out: Path, seed: int) -> str:
    """The feature folder."""
    crop = config["crop_size"]
    extract_features(
        ExtractConfig(
            shards=(shards,), checkpoint=checkpoint, arch="resnet18", out=str(out), seed=seed,
            frames=12, short_edge=crop, crop_size=crop, device=config["device"], workers=2,
        ),
        quiet=True,
    )  # fmt: skip
    return str(out)


def same_video(folder: str) -> float:
    """The share of test videos whose first half is nearest to their own second half."""
    found = read_train_test(folder)
    halves = np.asarray(found.test.halves[found.test_rows], dtype=np.float64)
    halves /= np.linalg.norm(halves, axis=2, keepdims=True)
    nearest = (halves[:, 0] @ halves[:, 1].T).argmax(axis=1)
    return float((nearest == np.arange(len(nearest))).mean())


def one_seed(work: Path, device: torch.device, seed: int) -> dict[str, Any]:
    """Everything of one seed."""
    shards = labelled(work)
    config = settings(device, len(open_shards([shards])))
    folder = work / f"seed-{seed}"
    began = time.perf_counter()
    last = pretrain(PretrainConfig(shards=(shards,), out=str(folder / "run"), seed=seed, **config))
    lines = (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "steps": json.loads(lines[-1])["step"],
        "loss": json.loads(lines[-1])["loss"],
    }
    for name, checkpoint in (("SeCo", str(last)), ("random", "random")):
        features = features_of(checkpoint, config, shards, folder / name, seed)
        result = probe(ProbeConfig(features=features, device="cpu"))
        found[name] = {"svm": result.top1, "same_video": same_video(features)}
    return found


def main() -> int:
    """Start the seeds and print what they found; with ``--seed`` one of them."""
    given = arguments(__doc__, "--seed")
    work, device = given.work / "learning", given.device
    if given.seed is not None:
        found = one_seed(work, device, int(given.seed))
        (work / f"seed-{given.seed}.json").write_text(json.dumps(found), "utf-8")
        return 0
    work.mkdir(parents=True, exist_ok=True)
    labelled(work)
    seeds = _SEEDS if device.type == "cuda" else _SEEDS[:1]
    command = [sys.executable, "-m", "benchmarks.gpu.learning", "--work", str(given.work)]
    running = [
        subprocess.Popen(
            [*command, "--device", device.type, "--seed", str(seed)], stdout=sys.stderr
        )
        for seed in seeds
    ]
    table = Table(device)
    codes = [process.wait() for process in running]
    if any(codes):
        return 1
    results = [json.loads((work / f"seed-{seed}.json").read_text("utf-8")) for seed in seeds]
    took = max(result["seconds"] for result in results)
    what = f"{results[0]['steps']} steps, {len(seeds)} seeds side by side"
    table.row(what, f"{took:.3g} s", "15 to 30 s", "30 ms per step, bound by the host's launches")
    table.row("loss at the end", listed([result["loss"] for result in results], 1, ""))
    for name, title in (("svm", "SVM, top-1"), ("same_video", "same-video R@1")):
        ours, random = ([result[who][name] for result in results] for who in ("SeCo", "random"))
        gained = statistics.mean(ours) - statistics.mean(random)
        table.row(f"{title}, random weights", listed(random, 100, " %"))
        table.row(
            f"{title}, pre-trained",
            f"{listed(ours, 100, ' %')}, {100 * gained:+.1f} points in the mean",
            {"svm": "-5 to +5 points", "same_video": "0 to +15 points"}[name],
            "the demo at 32 px did; a test video is one point, chance of 8 classes 12.5 %",
        )
    return table.exit_code()


def listed(values: list[float], times: float, unit: str) -> str:
    """All seeds' values."""
    return " / ".join(f"{times * value:.3g}" for value in values) + unit


if __name__ == "__main__":
    sys.exit(main())
