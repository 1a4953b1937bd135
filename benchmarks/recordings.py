"""Long recordings: are clips with groups worth it, beside 30 frames spread over each file?

    python benchmarks/recordings.py --work /tmp/recordings [--seeds 0,1,2,3,4] [--parallel 2]

The training clips of the demo's rendered set are joined, in random order, to recordings of six.
Three encoders a seed see these recordings alone: as videos of 30 frames (``whole``), as clips found
by ``--cut-scenes`` (``clips``), and as clips that are no negatives of their recording's others
(``groups``). ``seco compare`` judges them on the rendered set, whose test clips none has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines._ffmpeg import local_url, run_ffmpeg
from shards.atomic import write_text

CLIPS_A_RECORDING = 6
SHAPE = "scale=96:72:force_original_aspect_ratio=increase,crop=96:72,setsar=1,fps=25"
DATA = {
    "whole": ["--frames", "30"],
    "clips": ["--frames", "16", "--clip-seconds", "1", "--cut-scenes", "--min-frames", "3"],
}
ARMS = {"whole": ("whole", []), "clips": ("clips", []), "groups": ("clips", ["other-groups"])}
SCALE: tuple[str, ...] = ("--arch", "resnet10_w16", "--tasks", "inter")
SCALE += ("--batch-size", "32", "--bn-group", "16")
# As in the demo.
SCALE += ("--queue-size", "0", "--ema", "0.9", "--lr", "0.05", "--temperature", "0.1")
SCALE += ("--crop-size", "32", "--min-crop-area", "0.35", "--views-on", "workers")
MEASURES = ("svm@100", "r1@100")


def seco(*arguments: object, log: Path, threads: int = 0) -> None:
    """Run one command; its output goes to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, "-m", "cli", *map(str, arguments)]
        subprocess.run(command, check=True, stdout=file, stderr=file, env=environment)


def join(videos: list[Path], path: Path) -> None:
    """Write a recording of these clips, one after the other."""
    inputs = [part for video in videos for part in ("-i", local_url(video))]
    numbers = range(len(videos))
    graph = "".join(f"[{n}:v:0]{SHAPE}[v{n}];" for n in numbers)
    graph += "".join(f"[v{n}]" for n in numbers) + f"concat=n={len(videos)}[out]"
    encoded = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-g", "50")
    run_ffmpeg([*inputs, "-filter_complex", graph, "-map", "[out]", *encoded, local_url(path)])


def make_data(work: Path) -> None:
    """Render the clips, join those of the training list, and prepare all sets."""
    log = work / "data.txt"
    if (work / "shards" / "done").exists():
        return
    if not (work / "raw").exists():
        seco("render-demo", work / "raw", "--seed", 1, log=log)
    (listed,) = (work / "raw").rglob("trainlist01.txt")
    names = sorted(Path(line.split()[0]).name for line in listed.read_text().splitlines())
    found = {path.name: path for path in (work / "raw").rglob("*") if path.name in set(names)}
    random.Random(0).shuffle(names)
    (work / "recordings").mkdir(exist_ok=True)
    for number in range(0, len(names), CLIPS_A_RECORDING):
        videos = [found[name] for name in names[number : number + CLIPS_A_RECORDING]]
        join(videos, work / "recordings" / f"{number // CLIPS_A_RECORDING:03d}.mp4")
    for name, options in DATA.items():
        out = ("--out", work / "shards", "--name", name, "--short-edge", 72)
        seco("prepare", "folder", "--src", work / "recordings", *out, *options, log=log)
    test = ("--out", work / "shards", "--name", "test", "--short-edge", 72, "--frames", 16)
    seco("prepare", "ucf101", "--src", work / "raw", *test, log=log)
    (work / "shards" / "done").touch()


def run_seed(work: Path, seed: int, steps: int, threads: int) -> dict[str, Any]:
    """Train the three encoders of a seed and compare them; finished parts are kept."""
    folder = work / f"seed{seed}"
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    for arm, (data, negatives) in ARMS.items():
        manifest = work / "shards" / f"{data}.json"
        videos = sum(row["videos"] for row in json.loads(manifest.read_text())["shards"])
        epochs = max(1, round(steps / (videos // 32)))
        others = ("--negatives", *negatives) if negatives else ()
        seco(
            *("pretrain", "--shards", manifest, "--out", folder / arm, "--resume", "auto"),
            *(*SCALE, "--epochs", epochs, "--seed", seed, "--workers", 1, *others),
            log=log,
            threads=threads,
        )
    compared = folder / "compare"
    if not (compared / "compare.json").exists():
        encoders = {name: folder / name for name in ARMS} | {
            "untrained": f"random:resnet10_w16:{seed}"
        }
        named = [part for n, of in encoders.items() for part in ("--encoder", f"{n}={of}")]
        seco(
            *("compare", "--shards", work / "shards" / "test.json", *named, "--split", "1"),
            *("--baseline", "whole", "--out", compared, "--frames", 16, "--workers", 1),
            *("--short-edge", 54, "--crop-size", 48),
            log=log,
            threads=threads,
        )
    found: dict[str, Any] = json.loads((compared / "compare.json").read_text("utf-8"))
    return found


def table(seeds: dict[int, dict[str, Any]]) -> str:
    """Markdown: every encoder's figures, and the differences to ``whole`` with their verdicts."""
    lines = [
        "| measure | seed | encoder | % (95 %) | more than whole | |",
        "|---|---|---|---|---|---|",
    ]
    for key in MEASURES:
        for seed, found in seeds.items():
            (measure,) = (one for one in found["measures"] if one["key"] == key)
            told = {
                pair["encoder"]: one
                for pair in found["comparisons"]
                for one in pair["differences"]
                if one["key"] == key
            }
            for name, value in measure["values"].items():
                cells = [f"{key} | {seed} | {name} | {_percent(value)}"]
                if name in told:
                    cells += [_percent(told[name]["interval"]), told[name]["verdict"]]
                else:
                    cells += ["", ""]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(value: dict[str, float]) -> str:
    middle, low, high = (100 * value[name] for name in ("value", "low", "high"))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--parallel", type=int, default=1, help="seeds at a time, one thread each")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    make_data(given.work)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    threads = max(1, (os.cpu_count() or 1) // given.parallel)
    with ThreadPoolExecutor(given.parallel) as pool:
        found = pool.map(lambda seed: run_seed(given.work, seed, given.steps, threads), seeds)
        text = table(dict(zip(seeds, found, strict=True)))
    print(text)
    if given.out:
        write_text(given.out, text + "\n")


if __name__ == "__main__":
    main()
