"""Result folders as the commands leave them, with made-up figures."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CONFIG = """\
tasks = "inter,intra,order"
arch = "resnet50"
intra = "three-way"
queue_size = 4096
epochs = 4
"""
HOSTILE = "<script>alert('x')</script>"
# The paper's settings, as `seco pretrain` writes them.
PAPER_CONFIG: dict[str, Any] = {
    "shards": ["shards/k400.json"],
    "preset": "paper",
    "arch": "resnet50",
    "epochs": 400,
    "batch_size": 512,
    "lr": 0.2,
    "momentum": 0.9,
    "weight_decay": 0.0001,
    "warmup_epochs": 0,
    "final_lr": 0.0,
    "queue_size": 131_072,
    "temperature": 0.1,
    "ema": 0.999,
    "heads": "shared",
    "embedding_dim": 128,
    "intra": "three-way",
    "sampling": "uniform",
    "crop_size": 224,
    "min_crop_area": 0.2,
    "intra_temperature": 0.1,
    "queue_init": "unit",
    "mask_same_video": False,
    "bn_group": 128,
    "seed": 0,
}


def write_run(folder: Path, steps: int = 20, config: str = CONFIG) -> Path:
    """A short run of the toolkit."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config)
    with (folder / "metrics.jsonl").open("w") as log:
        for step in range(steps):
            row = {"step": step, "epoch": step // 5, "loss": 9.0 - step / 10, "lr": 0.1}
            row |= {"loss_inter": 8.0, "loss_intra": 1.0, "loss_order": 0.6, "acc_order": 0.5}
            log.write(json.dumps(row) + "\n")
    return folder


def write_paper_run(folder: Path, tasks: str, points: int = 600, **changes: Any) -> Path:
    """A run by the paper's settings, with curves as they may look; ``points`` lines of its log."""
    settings = {**PAPER_CONFIG, "tasks": tasks, **changes}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("\n".join(lines) + "\n")
    epochs, steps = settings["epochs"], settings["epochs"] * 468
    noise = np.random.default_rng(0).normal(size=(points, 4))
    with (
        (folder / "metrics.jsonl").open("w") as log,
        (folder / "speed.jsonl").open("w") as speed,
    ):
        for number in range(points):
            done = (number + 1) / points
            step = round(done * steps)
            fall, wobble = math.exp(-6 * done), noise[number] / 40
            row: dict[str, Any] = {"step": step, "epoch": (step - 1) // 468}
            row |= {"loss": 0.0, "lr": 0.1 * (1 + math.cos(math.pi * done))}
            for task, at_chance, end, w in (
                ("inter", math.log(1 + settings["queue_size"]), 5.0, wobble[0] * 4),
                ("intra", math.log(3), 0.55, wobble[1]),
                ("order", math.log(2), 0.5, wobble[2]),
            ):
                if task in tasks.split(","):
                    row[f"loss_{task}"] = end + (at_chance - end) * fall + w
                    row[f"acc_{task}"] = min(1.0, max(0.0, 0.75 - 0.6 * fall + w / 4))
                    row["loss"] += row[f"loss_{task}"]
            row |= {"feature_std": 0.9 - 0.5 * fall, "queue_fill": min(1.0, number / 4)}
            row["unreadable"] = 0
            if number % (points // 20) == 0:
                row["knn_top1"] = 0.5 - 0.45 * fall
            log.write(json.dumps(row) + "\n")
            clock = {"images_per_s": 8000 + 300 * noise[number][3], "data_wait": 0.02}
            speed.write(json.dumps({"step": step, **clock}) + "\n")
    assert epochs >= 1
    return folder


def write_features(folder: Path, dataset: str, **probe: Any) -> Path:
    """A probed feature folder; ``meta`` among the values goes to ``meta.json``."""
    folder.mkdir(parents=True)
    values: dict[str, Any] = {"method": "svm", "C": 1.0, "top1": 0.6102, "split": "official val"}
    values |= {"n_train": 240_000, "n_test": 19_800} | probe
    values.setdefault("encoder", {"arch": "resnet50", "tasks": "inter,intra,order"})
    meta = {"dataset": dataset, **values.pop("meta", {})}
    (folder / "probe.json").write_text(json.dumps(values))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def write_evaluation(folder: Path, kind: str, **values: Any) -> Path:
    """``finetune.json`` or ``track.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}.json").write_text(json.dumps(values))
    return folder


def png(size: tuple[int, int] = (4, 4)) -> bytes:
    """A grey picture."""
    picture = io.BytesIO()
    Image.new("L", size, 128).save(picture, format="PNG")
    return picture.getvalue()


def write_everything(folder: Path) -> Path:
    """One of each: three runs of an ablation with probes, fine-tuning, tracking, a demo, faults."""
    features, runs = folder / "features", folder / "runs"
    extraction = {"frames": 30, "short_edge": 256, "crop_size": 224, "unreadable": 0}
    classes = [
        {"label_name": f"class {number}", "accuracy": (number % 97) / 97, "count": 49}
        for number in range(400)
    ]
    for number, tasks in enumerate(("inter", "inter,intra", "inter,intra,order")):
        name = tasks.replace(",", "-")
        changes = {"epochs": 100} if tasks == "inter" else {}
        run = write_paper_run(runs / f"k400-{name}", tasks, **changes)
        encoder = {"arch": "resnet50", "checkpoint": str(run / "last.pt"), "tasks": tasks}
        probed = write_features(
            features / f"k400-{name}",
            "kinetics400",
            top1=0.55 + number / 50,
            top5=0.8,
            mean_class=0.54 + number / 50,
            normalise="none",
            encoder=encoder,
            meta=extraction,
            per_class=classes,
            notes=["3 videos without a label are left out"] if number == 0 else [],
        )
        recalls = {"label": {"1": 0.4, "5": 0.6, "10": 0.7}, "same_video": {"1": 0.95}}
        sizes = {"queries": 19_800, "gallery": 240_000}
        (probed / "retrieval.json").write_text(json.dumps({**recalls, **sizes}))
    (probed / "probe-confusion.png").write_bytes(png((300, 300)))
    random = {"arch": "resnet50", "checkpoint": "random", "seed": 0}
    write_features(
        features / "k400-random",
        "kinetics400",
        top1=0.11,
        normalise="none",
        encoder=random,
        meta=extraction,
        per_class=classes,
    )
    for split, top1 in ((1, 0.871), (2, 0.862), (3, 0.868)):
        write_evaluation(
            runs / f"ucf101-finetune-{split}",
            "finetune",
            dataset="ucf101",
            split=split,
            top1=top1,
            top5=0.97,
            mean_class=top1 - 0.004,
            clips=20,
            crops=3,
            n_test=3_783,
            encoder=encoder,
            protocol={"epochs": 150, "segments": 7, "batch_size": 64, "lr": 0.001},
            per_class=classes[:101] if split == 1 else [],
            notes=[],
        )
    write_evaluation(
        runs / "otb100",
        "track",
        dataset="otb100",
        precision_20=0.701,
        precision_auc=0.655,
        success_auc=0.499,
        fps=31.5,
        sequences=4,
        frames=2_212,
        of_sequences=100,
        encoder=encoder,
        settings={"epochs": 50, "batch_size": 8},
        notes=["96 of 100 sequences are not in the shards"],
    )
    rows = [
        {"encoder": "SeCo", "probe_top1": 0.69, "r_at_1": 0.49, "same_video_r_at_1": 0.72},
        {"encoder": "random initialisation", "probe_top1": 0.56, "r_at_1": 0.38},
    ]
    (folder / "demo.json").write_text(json.dumps({"rows": rows, "dataset": "ucf101", "seed": 0}))
    (features / "broken").mkdir()
    (features / "broken" / "probe.json").write_text('{"top1": 61.9}')
    return folder
