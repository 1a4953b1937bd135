"""One seed of the learning part: pre-training, then features of the result and of its beginning."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.data import labelled
from benchmarks.gpu.table import arguments
from seco.config import ExtractConfig, PretrainConfig, ProbeConfig
from seco.evaluation.probe import probe
from seco.evaluation.splits import read_train_test
from seco.features.extract import extract_features
from seco.training.pretrain import pretrain
from shards.opening import open_shards


def settings(device: torch.device, videos: int) -> dict[str, Any]:
    """Of the pre-training: the demo's, at a larger size."""
    if device.type == "cpu":
        sizes: dict[str, Any] = {"crop_size": 32, "batch_size": 12, "bn_group": 6, "epochs": 1}
    else:
        sizes = {"crop_size": 112, "batch_size": 64, "bn_group": 32, "epochs": 130, "workers": 4}
    more = {"arch": "resnet18", "tasks": "inter", "lr": 0.04, "temperature": 0.2, "ema": 0.99}
    queue = int(0.2 * 3 * videos) // 16 * 16 or 16
    return {**sizes, **more, "queue_size": queue, "compile": False, "device": str(device)}


def features_of(checkpoint: str, config: dict[str, Any], shards: str, out: Path, seed: int) -> str:
    """The feature folder."""
    crop = config["crop_size"]
    frames = 12 if config["device"].startswith("cuda") else 2
    extract_features(
        ExtractConfig(
            shards=(shards,), checkpoint=checkpoint, arch="resnet18", out=str(out), seed=seed,
            frames=frames, short_edge=crop, crop_size=crop, device=config["device"], workers=2,
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
    """Write what was found to seed-N.json."""
    given = arguments(__doc__, "seed")
    found = one_seed(given.work, given.device, int(given.seed))
    (given.work / f"seed-{given.seed}.json").write_text(json.dumps(found), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
