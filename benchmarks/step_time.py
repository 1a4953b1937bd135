"""Time of one training step on synthetic views: triplets/s and peak memory.

    python benchmarks/step_time.py [--device cuda] [--arch resnet50] [--crop-size 224] \\
        [--batch-size 512] [--queue-size 131072] [--precision bf16] [--steps 20]

Prints one line; nothing is loaded or augmented, so this is the trainer's ceiling.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from seco.config import PretrainConfig, resolve
from seco.device import resolve_device
from seco.method import SeCo


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--crop-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--queue-size", type=int, default=131_072)
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--steps", type=int, default=20)
    given = vars(parser.parse_args())
    steps = given.pop("steps")
    config = resolve(PretrainConfig(**given))
    device = resolve_device(config.device)
    model = SeCo(config).to(device).train()
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.1, momentum=0.9, fused=True)
    n, size = config.batch_size, config.crop_size
    views = torch.randn(4, n, 3, size, size, device=device)
    order = torch.randint(0, 2, (n,), device=device)
    videos = torch.arange(n, device=device)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")

    def step(number: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            result = model(views, order, videos, torch.Generator().manual_seed(number))
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        optimizer.step()
        model.update_key_encoder()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for number in range(3):
        step(number)
    seconds = []
    for number in range(steps):
        began = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    print(
        f"{device.type:<5}{config.arch:<10}{size:>4} px  batch {n:>4}  "
        f"{'bf16' if bf16 else 'fp32'}  {1e3 * median:>8.1f} ms/step  "
        f"{n / median:>8.1f} triplets/s  peak {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()
