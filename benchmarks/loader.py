"""``seco bench loader``: what a triplet costs, beside its limit and the plain ways."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import loader_reference as reference
from benchmarks.measuring import cpu_seconds, in_turns, machine
from seco.data.loader import TripletLoader
from seco.data.transforms import ViewConfig
from shards.dataset import ShardSet
from shards.errors import InputError
from shards.opening import open_shards
from shards.progress import progress
from shards.sampling import EpochOrder, WindowOrder
from shards.stream import TripletFrames, TripletStream

_CROP_SIZE = 224
_SEED = 0
_START_SHARDS, _START_VIDEOS, _START_FRAMES = 1000, 240, 30
_ORDER_VIDEOS = 10**9


@dataclass
class LoaderBench:
    """All figures of a run; costs are median CPU milliseconds a triplet."""

    machine: dict[str, Any]
    repeats: int
    frames: dict[str, float]  # size of the frames read
    costs: dict[str, float]
    kernels: dict[str, str]  # those of the limit
    ratios: dict[str, float]
    scaling: dict[str, float]
    start: dict[str, float]
    order: dict[str, float]


def bench_loader(
    spec: Iterable[str],
    triplets: int = 128,
    repeats: int = 5,
    *,
    workers: tuple[int, ...] = (1, 2),
    start: bool = True,
) -> LoaderBench:
    """Measure on local shards of videos.

    Args:
        spec: of the shards.
        triplets: of one measurement.
        repeats: measurements of each figure.
        workers: how many loader processes the scaling is measured with.
        start: also measure the opening of a thousand shards.

    Raises:
        InputError: the shards hold fewer videos than one measurement needs.
    """
    if min(triplets, repeats) < 1:
        raise InputError("must be 1 or more", "--triplets, --repeats")
    torch.set_num_threads(1)
    shards = open_shards(spec)
    stream = TripletStream(shards, triplets, "uniform", _SEED)
    with progress("bench loader", repeats + repeats * len(workers) + start, "steps") as bar:
        costs, kernels, frames = _costs(shards, stream, repeats, bar.advance)
        scaling = {}
        for count in workers:
            rates = []
            for _ in range(repeats):
                rates.append(triplets_per_second(stream, count))
                bar.advance()
            scaling[f"{count}_workers_triplets_s"] = float(np.median(rates))
        if len(workers) > 1:
            first, last = (scaling[f"{n}_workers_triplets_s"] for n in (workers[0], workers[-1]))
            scaling[f"{workers[-1]}_workers_times_{workers[0]}"] = last / first
        opened = _start_cost() if start else {}
    return LoaderBench(
        machine=machine("torch", "torchvision", "simplejpeg", "pillow", "pillow-simd", "numpy"),
        repeats=repeats,
        frames=frames,
        costs=costs,
        kernels=kernels,
        ratios=_ratios(costs),
        scaling=scaling,
        start=opened,
        order=_order_cost(),
    )


def _costs(
    shards: ShardSet, stream: TripletStream, repeats: int, advance: Any
) -> tuple[dict[str, float], dict[str, str], dict[str, float]]:
    config, n = ViewConfig(), stream.rows
    samples = [s for s in stream.read(0, 0, range(n)) if isinstance(s, TripletFrames)]
    if len(samples) < n:
        raise InputError("some frames cannot be read", shards.addresses[0], "see `seco verify`")
    jpegs = [sample.jpegs for sample in samples]
    crops = _Batches(stream, config, "device")
    boxes = crops.first_boxes  # of these samples, which are the first batch's
    finished = _Batches(stream, config, "workers")
    out = np.empty((4, 32, _CROP_SIZE, _CROP_SIZE, 3), dtype=np.uint8)
    decode, resize = _fastest(jpegs, boxes, out)
    decoders, resizers = reference.decoders(), reference.resizers()
    transform = reference.plain_transform(_CROP_SIZE, config)
    only_crops = reference.plain_crops(_CROP_SIZE, config)
    streamed, quarter = shards.addresses, max(1, n // 4)
    medians = in_turns(
        {
            "ours": crops.next,
            "limit": lambda: reference.limit(
                jpegs, boxes, _CROP_SIZE, out, decoders[decode], resizers[resize]
            ),
            "ours, views finished on the CPU": finished.next,
            "plain chain": lambda: reference.plain_chain(jpegs, transform),
            "plain crops": lambda: reference.plain_chain(jpegs, only_crops),
            "WebDataset, decode('pil'), crops": lambda: reference.streamed_by_webdataset(
                streamed, quarter, only_crops, decode_all=True
            ),
            "WebDataset, three frames decoded, crops": lambda: reference.streamed_by_webdataset(
                streamed, quarter, only_crops, decode_all=False
            ),
        },
        repeats,
        after_each=advance,
    )
    counts = {name: quarter if name.startswith("WebDataset") else n for name in medians}
    costs = {name: cost / counts[name] for name, cost in medians.items()}
    read = _bytes_read(stream)
    sizes = [len(jpeg) for sample in jpegs for jpeg in sample]
    frames = {
        "bytes_a_frame": float(np.mean(sizes)),
        "bytes_read_a_triplet": read / n,
        "bytes_read_beyond_its_frames": read / n - 3 * float(np.mean(sizes)),
    }
    return costs, {"decode": decode, "resize": resize}, frames


class _Batches:
    """A loader without processes; each call makes the next batch, for ever."""

    def __init__(self, stream: TripletStream, config: ViewConfig, views_on: str) -> None:
        loader = TripletLoader(
            stream, _CROP_SIZE, config, workers=0, first_step=0, last_step=10**9, views_on=views_on
        )
        self._batches = iter(loader)
        self.first_boxes: NDArray[np.int64] = self.next().boxes.numpy().copy()

    def next(self) -> Any:
        return next(self._batches)


def _fastest(jpegs: list[tuple[bytes, bytes, bytes]], boxes: Any, out: Any) -> tuple[str, str]:
    """The kernels of the limit: the fastest present that give all of the frame."""
    some = [jpeg for sample in jpegs[:16] for jpeg in sample]
    decoders = {
        n: d for n, d in reference.decoders().items() if "half" not in n and "fast" not in n
    }
    decode = in_turns(
        {name: lambda d=d: [d(jpeg) for jpeg in some] for name, d in decoders.items()},  # type: ignore[misc]
        5,
    )
    images = [np.array(reference.decoders()["libjpeg-turbo"](sample[0])) for sample in jpegs[:16]]
    resize = in_turns(
        {
            name: lambda r=r: [  # type: ignore[misc]
                r(image, boxes[0, i].tolist(), _CROP_SIZE, out[0, i])
                for i, image in enumerate(images)
            ]
            for name, r in reference.resizers().items()
        },
        5,
    )
    return min(decode, key=decode.__getitem__), min(resize, key=resize.__getitem__)


def _bytes_read(stream: TripletStream) -> int:
    """What the kernel says this process has read for one batch."""

    def so_far() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("rchar")))

    stream.read(0, 0, range(stream.rows))
    before = so_far()
    overhead = so_far() - before
    before = so_far()
    stream.read(0, 0, range(stream.rows))
    return so_far() - before - overhead


def triplets_per_second(stream: TripletStream, workers: int) -> float:
    """By wall clock, once all workers are busy."""
    steps = 4
    loader = TripletLoader(
        stream, _CROP_SIZE, ViewConfig(), workers=workers, first_step=0, last_step=100
    )
    with loader:
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        began = time.perf_counter()
        for _ in range(steps):
            next(batches)
        seconds = time.perf_counter() - began
        batches.close()
    return steps * stream.rows / seconds


def _ratios(costs: dict[str, float]) -> dict[str, float]:
    """Above 1 is cheaper than what is compared with."""
    ours, finished = costs["ours"], costs["ours, views finished on the CPU"]
    return {
        "of the limit": costs["limit"] / ours,
        "times the plain chain": costs["plain chain"] / ours,
        "times the plain crops": costs["plain crops"] / ours,
        "times WebDataset, decode('pil')": costs["WebDataset, decode('pil'), crops"] / ours,
        "times WebDataset, three frames": costs["WebDataset, three frames decoded, crops"] / ours,
        "whole chain on the CPU, times the plain chain": costs["plain chain"] / finished,
    }


_START = """
import sys, time
import numpy
from shards.opening import open_stream
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
before = peak()
began = time.perf_counter()
stream = open_stream(sys.argv[1], 512, "uniform", 0)
stream.videos(0, range(512))
seconds = time.perf_counter() - began
print(seconds, peak(), peak() - before)
"""


def _start_cost() -> dict[str, float]:
    """Opening a set of Kinetics' size in a fresh process: its indexes are real, its tars empty."""
    from shards.format import VideoRecord
    from shards.index import FrameAt, IndexBuilder, write_index

    with tempfile.TemporaryDirectory(prefix="seco-bench-") as folder:
        for shard in range(_START_SHARDS):
            builder = IndexBuilder()
            for video in range(_START_VIDEOS):
                key = f"v_{shard:04d}_{video:04d}_000010_000020"
                record = VideoRecord(
                    key=key, dataset="kinetics", source=f"train/{key}.mp4", label=video % 400,
                    splits={"official": "train"}, source_bytes=10**6,
                )  # fmt: skip
                frames = [FrameAt(1000 + f * 23_000, 22_000, f) for f in range(_START_FRAMES)]
                builder.add(key, record, (512, 400), frames)
            name, size = f"start-{shard:03d}", 200 << 20
            digests = {"sha256": "0" * 64, "plan_digest": "0" * 64}
            index = builder.finish(file=f"{name}.tar", size=size, exclusions=[], **digests)
            write_index(Path(folder, f"{name}.idx"), index)
            with open(Path(folder, f"{name}.tar"), "wb") as tar:
                tar.truncate(size)
        done = [
            subprocess.run(
                [sys.executable, "-c", _START, folder], check=True, capture_output=True, text=True
            ).stdout.split()
            for _ in range(3)
        ]
    seconds, peak, more = np.median(np.array(done, dtype=float), axis=0)
    return {
        "shards": _START_SHARDS,
        "videos": _START_SHARDS * _START_VIDEOS,
        "frames": _START_SHARDS * _START_VIDEOS * _START_FRAMES,
        "seconds": float(seconds),
        "peak_megabytes": float(peak),
        "peak_megabytes_beyond_python_and_numpy": float(more),
    }


def _order_cost() -> dict[str, float]:
    """Microseconds to find videos in an order of a billion."""
    order = EpochOrder(np.array([_ORDER_VIDEOS]), 0, 0)
    windows = WindowOrder(np.full(10**5, 10**4), 64, 0, 0)
    batch = np.arange(512) + 12_345
    ways = {
        "one_position": lambda: [order.at([p]) for p in range(100)],
        "batch_of_512": lambda: [order.at(batch) for _ in range(100)],
        "batch_of_512_in_windows": lambda: [windows.at(batch) for _ in range(100)],
    }
    found = in_turns(ways, 5, lambda work: _seconds(work) * 1e6 / 100)
    return {"videos": _ORDER_VIDEOS, **{f"microseconds_{name}": us for name, us in found.items()}}


def _seconds(work: Any) -> float:
    began = cpu_seconds()
    work()
    return cpu_seconds() - began
