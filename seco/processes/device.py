"""The device that computes, the number of cores to use, and torch.compile where it works."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from seco.processes.ranks import local_rank, local_size
from shards.errors import InputError
from shards.settings import usable_cpus
from shards.terminal import say

_CPU_WORKERS = 2
_MOST_WORKERS = 16


def resolve_device(name: str, *, spare_cores: int = 1) -> torch.device:
    """Resolve ``--device``; ``auto`` is a GPU if there is one.

    If a machine runs several processes, each takes the GPU of its local rank, or its share of the
    cores. On the CPU, one core is left to the loader: compute threads that wait for each other at
    every layer lose far more than that core if they share theirs with a worker. The number of
    compute threads depends only on the machine and ``OMP_NUM_THREADS``, never on ``--workers``,
    because it may change the last bits of a sum.

    Args:
        spare_cores: cores left to the loader; 0 for work without one.

    Raises:
        InputError: unknown device, or a GPU is requested and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}", "--device", "cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}", "--device", "cpu or cuda")
    if device.type == "cuda":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        named: int | None = device.index
        if named is None:
            # A scheduler may show each process only its own GPU, as number 0.
            device = torch.device("cuda", local_rank() if gpus > 1 else 0)
        if (device.index or 0) >= gpus:
            there = f"only {gpus} GPUs can be used here" if gpus else "no GPU can be used here"
            raise InputError(f"{name}: {there}", "--device", "leave it out or give cpu")
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (usable_cpus() - spare_cores) // local_size()))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def loader_workers(given: int | None, device: torch.device, cores: int | None = None) -> int:
    """Return ``--workers``, or its default for a device.

    For a GPU, this is the process's share of the cores less two, and at most 16: 2,500 triplets
    per second take 14 (estimated from the CPU time per triplet in ``docs/loader.md``).

    Args:
        given: ``--workers``.
        device: the device to feed.
        cores: this process's share of the cores, if not on this machine.
    """
    if given is not None:
        return given
    if device.type != "cuda":
        return _CPU_WORKERS
    cores = usable_cpus() // local_size() if cores is None else cores
    return min(max(cores - 2, _CPU_WORKERS), _MOST_WORKERS)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether ``--precision`` means bf16 there; ``auto`` is bf16 on a GPU and fp32 elsewhere."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def wall_milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Time ``work`` in ms, including what it queues on the device."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) * 1e3


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 matrix products in float32 within the block: no TF32, no bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device without blocking, through pinned memory."""
    if device.type != "cuda":
        return host
    return host.pin_memory().to(device, non_blocking=True)


_Made = TypeVar("_Made")
_failures: list[str] = []  # not retried: each attempt costs seconds


def if_it_compiles(work: Callable[[], _Made]) -> _Made | None:
    """Run ``work``, which uses torch.compile; return None if compilation fails.

    The first failure is printed on one line; after it, nothing is compiled.
    """
    if _failures:
        return None
    try:
        return work()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ImportError, OSError) as error:  # dynamo's, inductor's: RuntimeErrors
        _failures.append(_reason(error))
        say(
            f"seco: torch.compile failed, running slower ({_failures[0]})",
        )
        return None


@functools.cache
def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile works for ``device``; takes a second or two."""
    return if_it_compiles(lambda: torch.compile(_twice)(torch.ones(8, device=device))) is not None


def _twice(x: Tensor) -> Tensor:
    return x * 2


@contextmanager
def compile_faults() -> Iterator[None]:
    """Turn errors of torch.compile within the block into one line.

    Raises:
        InputError: compilation failed.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise InputError(
            f"torch.compile failed on the encoders ({_reason(error)})",
            "--compile",
            "give --no-compile",
        ) from error


def _reason(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {line}"
