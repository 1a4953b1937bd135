"""Does pre-training pay? ResNet-18 at 112 px on labelled clips, seeds side by side on one device.

Each seed is a process: pre-training, features of the result and of its random beginning, a linear
SVM, and how often a video's first half is nearest to its own second half. Needs no faiss.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from benchmarks.gpu.data import labelled
from benchmarks.gpu.table import Table, arguments

_SEEDS = (0, 1, 2)


def main() -> int:
    """Start the seeds and print what they found. Without torch, which takes seconds to load."""
    given = arguments(__doc__, resolved=False)
    work, device = given.work / "learning", given.device
    labelled(work)  # made once
    seeds = _SEEDS if device == "cuda" else _SEEDS[:1]
    command = [sys.executable, "-m", "benchmarks.gpu.learning_seed", "--work", str(work)]
    running = [
        subprocess.Popen([*command, "--device", device, str(seed)], stdout=sys.stderr)
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
