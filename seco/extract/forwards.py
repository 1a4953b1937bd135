"""Forwards of a frozen backbone, several batches at a time.

On the CPU each batch is computed by one thread, as many batches at a time as there are cores: no
thread waits for another at every layer (which costs most on a machine that is shared), and a sum
is the same to the last bit on a machine with any number of cores. On a GPU two batches are under
way, so that one is copied while the other is computed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seco.processes.device import uses_bf16
from seco.processes.ranks import local_size
from seco.views.augment import normalise
from shards.cpus import usable_cpus

_ON_A_GPU = 2


class Forwards:
    """Within the block, computes pooled features of crops.

    Args:
        network: (N, 3, S, S) to (N, D); is put on the device, in evaluation mode.
        device: where it computes.
        precision: ``auto``, ``bf16`` or ``fp32``. On a GPU ``fp32`` is without TF32.
        channels_last: the layout of images and weights.

    Attributes:
        at_once: how many batches are computed at a time.
        on_gpu: whether it has to be fed from pinned memory.
    """

    def __init__(
        self, network: nn.Module, device: torch.device, *, precision: str, channels_last: bool
    ) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._network = network.to(device, memory_format=self._format).eval()  # type: ignore[call-overload]
        self._network.requires_grad_(False)
        self.device = device
        self._bf16 = uses_bf16(precision, device)
        self.on_gpu = device.type == "cuda"
        self.at_once = _ON_A_GPU if self.on_gpu else computing_threads()
        self._threads = ThreadPoolExecutor(
            self.at_once, thread_name_prefix="forward", initializer=self._start_thread
        )
        self._own = threading.local()
        self._settings = ExitStack()

    def __enter__(self) -> Forwards:
        if self.on_gpu:
            flags = {"benchmark": False, "deterministic": True, "allow_tf32": False}
            self._settings.enter_context(torch.backends.cudnn.flags(enabled=True, **flags))
            torch.cuda.synchronize(self.device)  # the weights are there, for all streams
        else:
            self._settings.callback(torch.set_num_threads, torch.get_num_threads())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._settings.close()

    def submit(self, parts: Sequence[NDArray[np.uint8]]) -> Future[NDArray[np.float32]]:
        """Crops (n, S, S, 3), which must stay as they are until the result is there, to (N, D)."""
        return self._threads.submit(self._pooled, parts)

    def _start_thread(self) -> None:
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            self._own.stream = torch.cuda.Stream(self.device)
        else:
            torch.set_num_threads(1)

    def _pooled(self, parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        on_gpu = self.on_gpu
        with (
            torch.inference_mode(),
            torch.cuda.stream(self._own.stream) if on_gpu else nullcontext(),
        ):
            images = self._images(parts)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
                features = self._network(images)
            pooled: NDArray[np.float32] = features.float().cpu().numpy()  # waits for the stream
        return pooled

    def _images(self, parts: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(N, 3, S, S), normalised, on the device."""
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        crops = torch.empty(shape, dtype=torch.uint8, device=self.device)
        begin = 0
        for part in parts:
            crops[begin : begin + len(part)].copy_(torch.from_numpy(part), non_blocking=True)
            begin += len(part)
        return normalise(crops.permute(0, 3, 1, 2)).contiguous(memory_format=self._format)


def computing_threads() -> int:
    """This process's share of the cores, or what ``OMP_NUM_THREADS`` says."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else max(1, usable_cpus() // local_size())
