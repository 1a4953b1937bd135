"""The demo over several seeds and task sets: is pre-training ahead beyond seed noise?

    python benchmarks/demo_seeds.py --work /tmp/seeds [--src DIR --dataset NAME] \\
        [--seeds 0,1,2] [--tasks inter/inter,intra/inter,intra,order] [--parallel 2] [--steps N]

Every run is ``seco demo`` with its own seed of weights and draws; videos and shards are made once.
Prints and writes (``--out``) a table of all figures as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from seco.demo import SECO
from seco.evaluation.nearest import ExactIndex
from seco.evaluation.query import right_among_nearest
from seco.features.matrix import unit_vectors
from seco.features.store import read_features
from shards.atomic import write_text

MEASURES = {"svm@100": "SVM top-1 %", "r1@100": "R@1 %", "same_video": "same-video R@1 %"}
NEIGHBOURS = 10


def run_demo(first: Path, tasks: str, seed: int, options: list[str], threads: int) -> Path:
    """One demo in a folder of its own that begins with the first one's videos and shards.

    Returns its comparison's folder; a finished run is kept, so an interrupted benchmark goes on.
    """
    out = first.parents[1] / f"{tasks.replace(',', '-')}-seed{seed}"
    folder = out / first.name
    folder.mkdir(parents=True, exist_ok=True)
    if (first / "raw").exists() and not (folder / "raw").exists():
        (folder / "raw").symlink_to((first / "raw").resolve())
    if not (folder / "shards").exists():  # a copy: one `seco prepare` at a time looks at a folder
        shutil.copytree(first / "shards", folder / "shards")
    compared = folder / "compare"
    if not (compared / "compare.json").is_file():
        command = [sys.executable, "-m", "cli", "demo", "--out", str(out), "--tasks", tasks]
        command += ["--seed", str(seed), *options]
        with open(out / "log.txt", "w", encoding="utf-8") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    return compared


def figures(folder: Path) -> dict[str, list[float]]:
    """By encoder, percentages: the measures, and of the nearest videos those of the same class."""
    found = json.loads((folder / "compare.json").read_text("utf-8"))
    rows = {}
    for name in found["encoders"]:
        features = read_features(folder / "features" / name)
        index = ExactIndex(unit_vectors(features.features), "cpu")
        nearest = right_among_nearest(features, NEIGHBOURS, index)
        values = {m["key"]: m["values"][name]["value"] for m in found["measures"]}
        shares = [values[key] for key in MEASURES] + [nearest.share if nearest else 0.0]
        rows[name] = [100 * share for share in shares]
    return rows


def table(folders: dict[str, list[Path]]) -> str:
    """Markdown: for each task set and encoder every seed's figures, and the decisive comparison."""
    titles = [*MEASURES.values(), f"of {NEIGHBOURS} nearest right %"]
    lines = [f"| tasks | encoder | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    verdicts = []
    for tasks, paths in folders.items():
        seeds = [figures(path) for path in paths]
        for name in seeds[0]:
            cells = [
                " / ".join(f"{rows[name][column]:.1f}" for rows in seeds)
                for column in range(len(titles))
            ]
            lines.append(f"| {tasks} | {name} | {' | '.join(cells)} |")
        for column, title in enumerate(titles):
            worst = min(rows[SECO][column] for rows in seeds)
            best = max(v[column] for rows in seeds for name, v in rows.items() if name != SECO)
            verdicts.append(
                f"* {tasks}, {title}: worst {SECO} {worst:.1f}, best untrained {best:.1f}"
            )
    return "\n".join([*lines, "", *verdicts])


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--src")
    parser.add_argument("--dataset", default="ucf101")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tasks", default="inter", help="sets separated by /")
    parser.add_argument("--steps", type=int, help="instead of the demo's own number")
    parser.add_argument("--parallel", type=int, default=1, help="demos at a time, one thread each")
    given = parser.parse_args()
    options = ["--src", given.src, "--dataset", given.dataset] if given.src else []
    # Demos side by side must not each take the whole machine; one alone knows what to take.
    threads = max(1, (os.cpu_count() or 1) // given.parallel) if given.parallel > 1 else 0
    once = given.work / "first"
    if not list(once.glob("*/compare/compare.json")):
        command = [sys.executable, "-m", "cli", "demo", "--out", str(once), "--steps", "1"]
        subprocess.run([*command, *options], check=True)
    (first,) = (found.parents[1] for found in once.glob("*/compare/compare.json"))
    options += ["--steps", str(given.steps)] if given.steps else []
    seeds = [int(seed) for seed in given.seeds.split(",")]
    with ThreadPoolExecutor(given.parallel) as pool:
        futures = {
            tasks: [pool.submit(run_demo, first, tasks, seed, options, threads) for seed in seeds]
            for tasks in given.tasks.split("/")
        }
        folders = {tasks: [f.result() for f in runs] for tasks, runs in futures.items()}
    text = table(folders)
    print(text)
    if given.out:
        write_text(given.out, text + "\n")


if __name__ == "__main__":
    main()
