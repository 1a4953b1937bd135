"""Do intra and order add to inter (paper Table 1)? Every task set over several seeds.

    python benchmarks/ablation.py --work W [--shards MANIFEST] [--all-videos] [--seeds 0,1,2,3,4]
        [--epochs 217] [--parallel 2] [--out FILE] [--pretrain "--heads separate"]

Without ``--shards`` it draws a set in which the signals of all three tasks exist. In each of its
clips three things happen one after the other: white discs, black discs and rings come on a striped
ground. **The classes are the six orders of these three**, so the class is in how the frames change
and in nothing that all frames show. The ground, which stays, tells the clips apart and says nothing
of the class. First and last frames look the same in all classes; those between show what has come
so far, so a mean over frames can tell the classes if frames are encoded with their state. (Clips
played backwards are beyond any mean over frames.)

The settings are the demo's. ``seco compare`` judges the runs of a seed beside untrained networks;
the table gives means over seeds with 95 % t intervals, and those of the differences by seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from scipy import stats

from seco.demo import FULL
from shards.atomic import write_json, write_text
from shards.format import Manifest, VideoRecord
from shards.writer import ShardWriter

MARKS = ("white", "black", "ring")
ORDERS = list(itertools.permutations(range(len(MARKS))))
FRAMES = 24
SIDE_PX = 54
CELLS_A_SIDE = 6
TRAIN, TEST = 192, 96  # clips
SET_SEED = 0
TASK_SETS = ("inter", "inter,intra", "inter,order", "inter,intra,order")
UNTRAINED = ("untrained", "untrained-ResNet-18")
MEASURES = {
    "svm@100": "SVM top-1 %",
    "knn@100": "kNN top-1 %",
    "r1@100": "R@1 %",
    "same_video": "same-video R@1 %",
}

FloatArray = NDArray[np.float64]


def draw_clip(order: tuple[int, ...], rng: np.random.Generator) -> list[bytes]:
    """JPEGs of one clip: its marks come in this order, on a ground of its own."""
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX] + 0.5
    angle, wave = rng.uniform(0, np.pi), rng.uniform(0.3, 1.0)
    along = np.cos(angle) * x + np.sin(angle) * y
    share = 0.5 + 0.5 * np.sin(wave * along + rng.uniform(0, 2 * np.pi))
    first, second = 0.5 + 0.16 * rng.uniform(-1, 1, (2, 3))
    ground = first + share[..., None] * (second - first)
    cell = SIDE_PX / CELLS_A_SIDE
    places = rng.permutation(CELLS_A_SIDE**2)
    counts = rng.integers(8, 13, len(MARKS))  # of each kind
    ends = np.cumsum(counts)
    # When each of the three changes begins and ends.
    spans = rng.dirichlet(np.full(2 * len(MARKS) + 1, 6.0))
    at = np.cumsum(spans)
    starts, stops = at[0:-1:2], at[1::2]
    frames = []
    for frame in range(FRAMES):
        time = frame / (FRAMES - 1)
        picture = ground.copy()
        for place, mark in enumerate(order):
            progress = np.clip((time - starts[place]) / (stops[place] - starts[place]), 0, 1)
            of_kind = places[ends[mark] - counts[mark] : ends[mark]]
            for spot in of_kind[: round(progress * counts[mark])]:
                row, column = divmod(int(spot), CELLS_A_SIDE)
                away = np.hypot(y - (row + 0.5) * cell, x - (column + 0.5) * cell) / cell
                disc, hole = away < 0.45, away < 0.25
                picture[disc] = (1.0, 0.0, 1.0)[mark]
                if MARKS[mark] == "ring":
                    picture[hole] = 0.0
        picture = picture * rng.uniform(0.85, 1.0) + 0.02 * rng.standard_normal(picture.shape)
        pixels = np.clip(255 * picture, 0, 255).astype(np.uint8)
        frames.append(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=92))
    return frames


def make_set(folder: Path) -> str:
    """Draw all clips into one shard; returns the manifest's path."""
    path = folder / "orders.json"
    if path.is_file():
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["-".join(MARKS[mark] for mark in order) for order in ORDERS]
    with ShardWriter(folder / "orders-000.tar", "digest") as writer:
        for video in range(TRAIN + TEST):
            label = video % len(ORDERS)
            record = VideoRecord(
                key=f"clip_{video:04d}",
                dataset="orders",
                source=f"{names[label]}/clip_{video:04d}.avi",
                label=label,
                label_name=names[label],
                splits={"1": "train" if video < TRAIN else "test"},
                width=SIDE_PX,
                height=SIDE_PX,
                frame_times=[frame / 25 for frame in range(FRAMES)],
                source_fps=25.0,
                source_frames=FRAMES,
                source_duration=FRAMES / 25,
            )
            writer.add(record, draw_clip(ORDERS[label], np.random.default_rng((SET_SEED, video))))
    assert writer.info is not None
    manifest = Manifest(
        name="orders",
        dataset="orders",
        settings={},
        ffmpeg_version="none",
        label_names=names,
        shards=[writer.info],
        excluded=0,
    )
    write_json(path, manifest.to_dict())
    return str(path)


def train(tasks: str, seed: int, shards: str, given: argparse.Namespace) -> Path:
    """Pre-train with one task set, or go on with an interrupted run; returns its folder."""
    run = Path(given.work) / "runs" / f"{_name(tasks)}-seed{seed}"
    options = [
        *("--shards", shards, *(() if given.all_videos else ("--split", "1"))),
        *("--tasks", tasks, "--seed", str(seed), "--epochs", str(given.epochs)),
        *("--arch", given.arch, "--batch-size", str(FULL.batch)),
        *("--bn-group", str(FULL.batch // 2)),
        *("--queue-size", "0", "--ema", str(FULL.ema), "--lr", str(FULL.lr)),
        *("--temperature", str(FULL.temperature), "--crop-size", str(FULL.crop_px)),
        *("--min-crop-area", str(FULL.min_crop_area), "--workers", "1", "--views-on", "workers"),
        *(*shlex.split(given.pretrain), "--out", str(run), "--resume", "auto"),
    ]
    _seco("pretrain", options, given)
    return run


def compare(runs: dict[str, Path], seed: int, shards: str, given: argparse.Namespace) -> Path:
    """All task sets of one seed beside untrained networks; returns ``compare.json``."""
    out = Path(given.work) / f"compare-seed{seed}"
    encoders = {_name(tasks): str(run) for tasks, run in runs.items()}
    encoders |= {
        UNTRAINED[0]: f"random:{given.arch}:{seed}",
        UNTRAINED[1]: f"random:resnet18:{seed}",
    }
    options = [
        *(part for name, of in encoders.items() for part in ("--encoder", f"{name}={of}")),
        *("--shards", shards, "--split", "1", "--baseline", UNTRAINED[0], "--out", str(out)),
        *("--frames", str(FULL.frames), "--short-edge", str(FULL.feature_short_edge_px)),
        *("--crop-size", str(FULL.feature_crop_px), "--workers", "1"),
    ]
    if not (out / "compare.json").is_file():
        _seco("compare", options, given)
    return out / "compare.json"


def _name(tasks: str) -> str:
    """Of an encoder, or in a folder's name."""
    return tasks.replace(",", "-")


def _seco(command: str, options: list[str], given: argparse.Namespace) -> None:
    """One command of its own, which shares the machine with others."""
    name = Path(options[options.index("--out") + 1]).name
    threads = max(1, (os.cpu_count() or 1) // given.parallel)
    with open(Path(given.work) / f"{name}.log", "w", encoding="utf-8") as to:
        subprocess.run(
            [sys.executable, "-m", "cli", command, *options],
            check=True,
            stdout=to,
            stderr=to,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )


def table(found: list[Path], tasks: list[str]) -> str:
    """Markdown: by encoder every seed's figures, mean and interval, and paired differences."""
    results = [json.loads(path.read_text("utf-8")) for path in found]
    values: dict[str, dict[str, FloatArray]] = {
        name: {
            key: np.array([_measured(result, key, name) for result in results]) for key in MEASURES
        }
        for name in (*UNTRAINED, *map(_name, tasks))
    }
    lines = [f"| tasks | {' | '.join(MEASURES.values())} |", "|---|" + "---|" * len(MEASURES)]
    for name, by_key in values.items():
        cells = [f"{_interval(v)} ({' / '.join(f'{x:.1f}' for x in v)})" for v in by_key.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for before, after in itertools.permutations(tasks, 2):
        added = set(after.split(",")) - set(before.split(","))
        if len(added) == 1 and set(before.split(",")) < set(after.split(",")):
            gains = [values[_name(after)][key] - values[_name(before)][key] for key in MEASURES]
            cells = [_interval(gain, "+") for gain in gains]
            lines.append(f"| {added.pop()} added to {before} | {' | '.join(cells)} |")
    lines.append("")
    for name in map(_name, tasks):
        worst = values[name]["svm@100"].min()
        best = max(values[other]["svm@100"].max() for other in UNTRAINED)
        lines.append(f"* {name}, SVM: worst {worst:.1f} %, best untrained {best:.1f} %")
    return "\n".join(lines)


def _measured(result: dict[str, Any], key: str, name: str) -> float:
    """Percent."""
    (measure,) = (measure for measure in result["measures"] if measure["key"] == key)
    return 100 * float(measure["values"][name]["value"])


def _interval(values: FloatArray, sign: str = "") -> str:
    """Mean and half width of its 95 % t interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else np.nan
    return f"{values.mean():{sign}.1f} ± {half:.1f}"


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shards", help="manifest of a labelled set with a split named 1")
    parser.add_argument(
        "--all-videos", action="store_true", help="pre-train on the test videos, too"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tasks", default="/".join(TASK_SETS), help="sets separated by /")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--epochs", type=int, default=217)
    parser.add_argument("--arch", default=FULL.arch)
    parser.add_argument("--parallel", type=int, default=2, help="commands at a time")
    parser.add_argument("--pretrain", default="", help="more options of seco pretrain")
    given = parser.parse_args()
    shards = given.shards or make_set(given.work / "shards")
    tasks = given.tasks.split("/")
    seeds = [int(seed) for seed in given.seeds.split(",")]
    with ThreadPoolExecutor(given.parallel) as pool:
        runs = {
            seed: {one: pool.submit(train, one, seed, shards, given) for one in tasks}
            for seed in seeds
        }
        jobs = []
        for seed, of_seed in runs.items():
            folders = {one: run.result() for one, run in of_seed.items()}
            jobs.append(pool.submit(compare, folders, seed, shards, given))
        found = [job.result() for job in jobs]
    text = table(found, tasks)
    print(text)
    if given.out:
        write_text(given.out, text + "\n")


if __name__ == "__main__":
    main()
