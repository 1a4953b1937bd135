"""The ceilings of the card: memory, matrix products, and copies to it. ``--device cpu``: tiny."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu.table import Table, arguments
from benchmarks.measuring import machine
from seco.data.loader import BatchRing

_BATCH_BYTES = 512 * 4 * 3 * 224 * 224  # crops of a step, uint8


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The median; by the device's own clock on a GPU."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        return statistics.median(_cpu_seconds(work) for _ in range(repeats))
    found: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)


def _cpu_seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes read and written per second of a copy on the device."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, side: int) -> float:
    """Operations per second of a bf16 matrix product of random numbers."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device)


def batch_copy_seconds(host: torch.Tensor, device: torch.device) -> float:
    """A batch of crops from the host's memory to the device."""
    target = torch.empty_like(host, device=device)
    return seconds(lambda: target.copy_(host, non_blocking=True), device)


def describe(device: torch.device) -> str:
    """The machine on one line."""
    found = machine("torch", "torchvision", "numpy", "pillow", "simplejpeg", "webdataset")
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        version = Path("/proc/driver/nvidia/version")
        found |= {
            "gpu": about.name,
            "memory": f"{about.total_memory / 2**30:.1f} GiB",
            "multiprocessors": about.multi_processor_count,
            "driver": version.read_text().splitlines()[0] if version.is_file() else "unknown",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return ", ".join(f"{name} {value}" for name, value in found.items())


def main() -> int:
    """Measure and print."""
    given = arguments(__doc__)
    device: torch.device = given.device
    on_gpu = device.type == "cuda"
    print(describe(device), end="\n\n")
    table = Table(device)
    size, side, batch = (2**32, 8192, _BATCH_BYTES) if on_gpu else (2**20, 128, 2**20)
    for again in ("", ", again"):  # how far two measurements of one thing are apart
        table.row(
            f"copy on the device, read and written{again}",
            f"{copy_rate(device, size) / 1e12:.3g} TB/s",
            "3.0 (H200: 4.3)",
            "measured on such cards before",
        )
        table.row(
            f"bf16 product of {side}²{again}",
            f"{product_rate(device, side) / 1e12:.3g} TFLOP/s",
            "798 (H200: 790)",
            "measured on such cards before",
        )
    pageable = torch.randint(256, (batch,), dtype=torch.uint8)
    ring = BatchRing(1, (batch,), "uint8")
    ring[0][:] = pageable.numpy()
    hosts = {"pageable": (pageable, "15 to 40 ms", "a copy within the host comes first")}
    if on_gpu:
        pcie = "308 MB at about 50 GB/s of PCIe 5 x16"
        hosts["pinned"] = (pageable.pin_memory(), "6 to 7 ms", pcie)
        if not ring.pin():
            table.failed.append("the loader's memory cannot be pinned")
        hosts["the loader's ring"] = (torch.from_numpy(ring[0]), "6 to 7 ms", pcie)
    for name, (host, predicted, why) in hosts.items():
        taken = batch_copy_seconds(host, device)
        rate = f"{1e3 * taken:.3g} ms, {batch / taken / 1e9:.3g} GB/s"
        table.row(f"a batch of {batch / 1e6:.0f} MB to the device, {name}", rate, predicted, why)
    ring.close()
    return table.exit_code()


if __name__ == "__main__":
    sys.exit(main())
