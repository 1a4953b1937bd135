"""Whole runs of ``seco prepare``, timed: how it scales, and what planning many videos takes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

_SCALING_VIDEOS = 24
_PLANNED = 100_000


def scaling_rates(paths: list[Path], folder: Path) -> dict[str, float]:
    """Videos a second of whole ``seco prepare`` runs, all frames, 1 and 2 workers."""
    raw = folder / "raw"
    raw.mkdir()
    for number in range(_SCALING_VIDEOS):
        path = paths[number % len(paths)]
        (raw / f"{number:03d}{path.suffix}").symlink_to(path.absolute())
    cpus = sorted(os.sched_getaffinity(0))
    runs = {
        "1_worker": (1, 1, cpus),
        "1_worker_on_1_cpu": (1, 1, cpus[:1]),
        "2_workers": (2, 1, cpus[:2]),
        "2_workers_1_shard": (2, _SCALING_VIDEOS, cpus[:2]),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(3):
        for name, (workers, videos_a_shard, allowed) in runs.items():
            out = folder / f"{name}-{repeat}"
            rates[name].append(_prepare_rate(raw, out, workers, videos_a_shard, allowed))
    found = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    return {
        **{f"{name}_videos_s": rate for name, rate in found.items()},
        "2_workers_on_2_cpus_times_1_on_1": found["2_workers"] / found["1_worker_on_1_cpu"],
        "2_workers_1_shard_times_1_on_1": found["2_workers_1_shard"] / found["1_worker_on_1_cpu"],
        "2_workers_times_1_unpinned": found["2_workers"] / found["1_worker"],
    }


def _prepare_rate(raw: Path, out: Path, workers: int, a_shard: int, cpus: list[int]) -> float:
    began = time.monotonic()
    subprocess.run(
        [
            *(sys.executable, "-m", "cli", "prepare", "folder", "--src", str(raw)),
            *("--out", str(out), "--all-frames", "--workers", str(workers)),
            *("--videos-per-shard", str(a_shard), "--keep-damaged"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    return _SCALING_VIDEOS / (time.monotonic() - began)


_PLANNING = """
import resource, sys, time
from pipelines import _engine, _prepare
from pipelines._build import ShardResult
from pipelines._config import PrepareConfig
from pipelines._prepare import prepare
from shards.format import ShardInfo
began = time.monotonic()
first = []
def stub(plan, threads, on_progress):
    first.append(time.monotonic())
    info = ShardInfo(file=plan.tar, bytes=0, sha256="", videos=len(plan.videos), frames=0)
    return ShardResult(info=info, exclusions=[])
_engine.build_shard = stub
_prepare._require_there = lambda *_: None
prepare(PrepareConfig(dataset="kinetics", src=sys.argv[1], out=sys.argv[2], workers=1))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(first[0] - began, time.monotonic() - began, peak, len(first))
"""


def planning_cost(folder: Path) -> dict[str, float]:
    """A whole run over empty files of Kinetics' names, in which no shard is really built."""
    raw = folder / "kinetics"
    (raw / "train").mkdir(parents=True)
    rows = ["label,youtube_id,time_start,time_end,split"]
    for number in range(_PLANNED):
        youtube_id = f"-id_{number:07d}"
        rows.append(f"label {number % 400:03d},{youtube_id},0,10,train")
        (raw / "train" / f"{youtube_id}_000000_000010.mp4").touch()
    (raw / "train.csv").write_text("\n".join(rows) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", _PLANNING, str(raw), str(folder / "planned")],
        check=True,
        capture_output=True,
        text=True,
    )
    planning, whole, peak, shards = map(float, done.stdout.split())
    return {
        "videos": _PLANNED,
        "shards": shards,
        "seconds_to_the_first_shard": round(planning, 2),
        "seconds": round(whole, 2),
        "peak_megabytes": round(peak, 1),
    }
