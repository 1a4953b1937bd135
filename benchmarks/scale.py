"""Millions of videos: planning a list, handing its shards to Ray, opening tens of thousands.

    python benchmarks/scale.py plan --rows 10000000 --work /tmp/scale    # 300 MB of disk
    python benchmarks/scale.py ray --rows 10000000 --shards 5000 --work /tmp/scale
    python benchmarks/scale.py open --shards 40000 --work /tmp/scale     # 6 GB of disk

The list's videos do not exist: nothing is decoded, and what Ray's workers return is made up. The
shards that are opened are empty files of the right size; their indexes, of 250 videos of 30 frames
each, are real.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from pipelines import _engine
from pipelines._adapter import adapter
from pipelines._build import ShardResult
from pipelines._config import PrepareConfig
from pipelines._plan import FrameChoice, SetPlan, ShardPlan, Todo, plan_set
from pipelines._remote import NO_SPOOL
from shards.atomic import write_json
from shards.format import Manifest, ShardInfo
from shards.index import ShardIndex, read_index, write_index
from shards.opening import open_stream
from shards.videos import VideoList, write_videos

VIDEOS, FRAMES = 250, 30
_SHARDS_MADE = 2_000  # plans of shards that are made, to see what one costs
_BATCH = 256


def peak_mib() -> int:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def plan_list(rows: int, work: Path) -> SetPlan:
    """Plan the shards of a list of videos in a bucket."""
    listed = work / f"list-{rows}.csv"
    if not listed.exists():
        with open(listed, "w", encoding="utf-8") as file:
            file.write("path,label\n")
            file.writelines(f"{i // 1000:05d}/{i:09d}.mp4,class{i % 700}\n" for i in range(rows))
    config = PrepareConfig(
        dataset="list", src=str(listed), root="s3://bucket/videos", out=str(work / "out")
    )
    began = time.monotonic()
    found = adapter("list").discover(config)
    discovered = time.monotonic()
    planned = plan_set(
        found.sets[0],
        config,
        choice=FrameChoice(count=FRAMES),
        short_edge=256,
        root=found.root or "",
        binary="ffmpeg",
        ffmpeg_version="none",
        spool=NO_SPOOL,
    )
    ended = time.monotonic()
    names = list(planned.shards)[:_SHARDS_MADE]
    videos = sum(len(planned.shards[name].videos) for name in names)
    print(
        f"{rows} rows: read {discovered - began:.0f} s, planned {ended - discovered:.0f} s, "
        f"{len(planned.shards)} shards, peak {peak_mib()} MiB; the plans of {len(names)} shards, "
        f"{videos} videos: {time.monotonic() - ended:.1f} s"
    )
    return planned


def _pretended(plan: ShardPlan, threads: int) -> ShardResult:
    """What a worker returns for a shard, without the work."""
    info = ShardInfo(file=plan.tar, bytes=1, sha256="", videos=len(plan.videos), frames=0)
    return ShardResult(info=info, exclusions=[])


def schedule(planned: SetPlan, shards: int) -> None:
    """Have a Ray cluster on this machine pretend to build some shards of a plan."""
    todo = Todo(planned.shards, list(planned.shards)[:shards], set())
    done: list[float] = []
    _engine._build_on_node = _pretended
    build = _engine.ray_engine(None, limited=False)
    build(todo, 1, lambda plan, result: done.append(time.monotonic()), lambda tally: None)
    # The first ones wait for Ray and its workers to start.
    half = len(done) // 2
    rate = (len(done) - half) / (done[-1] - done[half - 1])
    print(f"{len(done)} shards handed to Ray and back: {rate:.0f} shards/s, peak {peak_mib()} MiB")


def make_shards(count: int, folder: Path) -> None:
    """Write indexes, empty tars, manifest and the list of videos."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(8_000, 14_000, VIDEOS * FRAMES).astype(np.uint32)
    ends = np.cumsum(sizes.astype(np.uint64) + 1024)
    infos = []
    for number in range(count):
        keys = [f"video-{number * VIDEOS + row:09d}_abcdef".encode() for row in range(VIDEOS)]
        details = {
            "splits": [{"official": "train"}] * VIDEOS,
            "sources": [[key.decode() + ".mp4", 1] for key in keys],
        }
        infos.append(
            ShardInfo(
                file=f"big-{number:03d}.tar",
                bytes=int(ends[-1]) + 20_000,
                sha256=f"{number:064x}",
                videos=VIDEOS,
                frames=VIDEOS * FRAMES,
            )
        )
        index = ShardIndex(
            info=infos[-1],
            plan_digest="",
            exclusions=[],
            first_frame=np.arange(0, VIDEOS * FRAMES + 1, FRAMES, dtype=np.uint32),
            frame_offset=ends - sizes,
            frame_size=sizes,
            frame_crc=sizes,
            record_offset=np.zeros(VIDEOS, np.uint64),
            record_size=np.zeros(VIDEOS, np.uint32),
            label=np.full(VIDEOS, number % 700, np.int32),
            key_end=np.cumsum([len(key) for key in keys], dtype=np.uint32),
            key_text=np.frombuffer(b"".join(keys), np.uint8),
            details=np.frombuffer(json.dumps(details).encode(), np.uint8),
        )
        write_index(folder / f"big-{number:03d}.idx", index)
        with open(folder / infos[-1].file, "wb") as tar:
            tar.truncate(infos[-1].bytes)
    indexes = (read_index(folder / f"big-{number:03d}.idx") for number in range(count))
    write_videos(folder / "big.videos", VideoList.of(indexes))
    manifest = Manifest(
        name="big",
        dataset="list",
        settings={},
        ffmpeg_version="none",
        label_names=[],
        shards=infos,
        excluded=0,
    )
    write_json(folder / "big.json", manifest.to_dict())


def opened(count: int, work: Path, steps: int = 20) -> None:
    """Open the shards for training, and read the places of some batches."""
    folder = work / f"shards-{count}"
    if not (folder / "big.json").exists():
        folder.mkdir(exist_ok=True)
        make_shards(count, folder)
        print("made; run it again to measure: the memory of this process counts its making")
        return
    before, began = peak_mib(), time.monotonic()
    stream = open_stream(str(folder / "big.json"), _BATCH, "uniform", 0)
    ready = time.monotonic()
    stream.digest()
    ended = time.monotonic()
    for step in range(steps):
        stream.read(0, step, range(_BATCH))
    each = (time.monotonic() - ended) / (steps * _BATCH)
    print(
        f"{count} shards: opened in {ready - began:.2f} s, digest {ended - ready:.2f} s, "
        f"peak {peak_mib()} MiB (before: {before}); {each * 1e6:.0f} µs to read a triplet"
    )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=("plan", "ray", "open"))
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=40_000)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.what == "plan":
        plan_list(given.rows, given.work)
    elif given.what == "ray":
        schedule(plan_list(given.rows, given.work), given.shards)
    else:
        opened(given.shards, given.work)


if __name__ == "__main__":
    main()
