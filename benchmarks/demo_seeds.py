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
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shards.atomic import write_text

FIGURES = ("probe_top1", "r_at_1", "same_video_r_at_1")


def run_demo(first: Path, tasks: str, seed: int, options: list[str], threads: int) -> Path:
    """One demo in a folder of its own that shares the first one's videos and shards.

    Returns its summary; a finished run is kept, so an interrupted benchmark goes on.
    """
    out = first.parents[1] / f"{tasks.replace(',', '-')}-seed{seed}"
    folder = out / first.name
    folder.mkdir(parents=True, exist_ok=True)
    for shared in ("raw", "shards"):
        if (first / shared).exists() and not (folder / shared).exists():
            (folder / shared).symlink_to((first / shared).resolve())
    summary = folder / "demo.json"
    if not summary.is_file():
        command = [sys.executable, "-m", "cli", "demo", "--out", str(out), "--tasks", tasks]
        command += ["--seed", str(seed), *options]
        with open(out / "log.txt", "w", encoding="utf-8") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    return summary


def table(summaries: dict[str, list[Path]]) -> str:
    """Markdown: for each task set and encoder every seed's figures, and the decisive comparison."""
    lines = [
        "| tasks | encoder | SVM top-1 % | R@1 % | same-video R@1 % |",
        "|---|---|---|---|---|",
    ]
    verdicts = []
    for tasks, paths in summaries.items():
        found = [json.loads(path.read_text("utf-8"))["rows"] for path in paths]
        for number, name in enumerate(row["encoder"] for row in found[0]):
            cells = [
                " / ".join(f"{100 * rows[number][figure]:.1f}" for rows in found)
                for figure in FIGURES
            ]
            lines.append(f"| {tasks} | {name} | {' | '.join(cells)} |")
        worst = 100 * min(rows[0]["probe_top1"] for rows in found)
        best = 100 * max(rows[1]["probe_top1"] for rows in found)
        verdicts.append(f"* {tasks}: worst pre-trained {worst:.1f} %, best random {best:.1f} %")
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
    if not list(once.glob("*/demo.json")):
        command = [sys.executable, "-m", "cli", "demo", "--out", str(once), "--steps", "1"]
        subprocess.run([*command, *options], check=True)
    (first,) = (summary.parent for summary in once.glob("*/demo.json"))
    options += ["--steps", str(given.steps)] if given.steps else []
    seeds = [int(seed) for seed in given.seeds.split(",")]
    with ThreadPoolExecutor(given.parallel) as pool:
        futures = {
            tasks: [pool.submit(run_demo, first, tasks, seed, options, threads) for seed in seeds]
            for tasks in given.tasks.split("/")
        }
        summaries = {tasks: [f.result() for f in runs] for tasks, runs in futures.items()}
    text = table(summaries)
    print(text)
    if given.out:
        write_text(given.out, text + "\n")


if __name__ == "__main__":
    main()
