"""The ranks of a run, one per GPU, and what they exchange.

A process started by torchrun or ``seco.processes.launch`` finds the others through the environment;
any other process is alone, and then nothing here communicates.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import inspect
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shards.errors import EXIT_FAILED, InputError, PeerLost, Stopped

_EVERY = 1.0  # seconds between two signs of life
_GRACE = 10.0  # seconds in which the process itself may notice and say more
_ALIVE, _LEFT, _FAILED = 0, 1, 2


class PeerWatch:
    """A thread that exchanges signs of life with those of the other processes.

    A process that waits in a GPU's collective hears nothing of a peer that was killed, and a peer
    that hangs closes no connection. This one ends such a process, with the reason on screen.

    Args:
        group: of all processes, for this alone; its timeout is the silence after which a process
            counts as lost.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._leaving = threading.Event()
        self._says = _ALIVE
        self._thread = threading.Thread(target=self._watch, name="peer watch", daemon=True)
        self._thread.start()

    def leave(self, *, failed: bool) -> None:
        """End the watch of all processes; where this one has failed, the others end too."""
        self._says = _FAILED if failed else _LEFT
        self._leaving.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            said = torch.tensor([self._says])
            try:
                dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group)
            except RuntimeError as error:
                return self._lost(" ".join(str(error).split())[:200])
            if int(said) == _FAILED:
                return self._lost("one of them has failed")
            if int(said) == _LEFT:
                return None
            self._leaving.wait(_EVERY)

    def _lost(self, reason: str) -> None:
        if self._leaving.wait(_GRACE):
            return
        rank = dist.get_rank()
        print(f"seco: process {rank} has lost the others ({reason})", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)  # its main thread may wait forever


_TIMEOUT = datetime.timedelta(minutes=5)  # to find each other, and of what GPUs exchange
_HOST_TIMEOUT = datetime.timedelta(minutes=30)  # the first one may be saving to a slow disk
_SILENCE = datetime.timedelta(seconds=45)  # after which a process counts as lost


# Its name before torch 2.14.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """This process's place among ``size`` processes."""

    def __init__(self, rank: int = 0, size: int = 1, host: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._host = host  # what the processors exchange, apart from the devices

    @property
    def first(self) -> bool:
        """Whether this is the one that logs and saves."""
        return self.rank == 0

    def gather_host(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, F) of every rank to (size · n, F), rank after rank, without the device."""
        if self.size == 1:
            return rows
        mine = torch.from_numpy(np.ascontiguousarray(rows))
        everyone = torch.empty((self.size * len(mine), *mine.shape[1:]), dtype=mine.dtype)
        with self.watched():
            _all_gather(everyone, mine, group=self._host)
        return everyone.numpy()

    def agree(self, text: str) -> bool:
        """Whether all ranks say the same."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
        everyone = self.gather_host(np.array([[float(number)]]))
        return bool((everyone == everyone[0]).all())

    def any(self, mine: bool) -> bool:
        """Whether it holds for at least one rank."""
        return bool(self.gather_host(np.array([[float(mine)]])).any())

    def gather(self, rows: Tensor) -> Tensor:
        """(n, …) of every rank to (size · n, …), rank after rank, on the device."""
        if self.size == 1:
            return rows
        everyone = rows.new_empty((self.size * len(rows), *rows.shape[1:]))
        with self.watched():
            _all_gather(everyone, rows.contiguous())
        return everyone

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send the first ``sent[0]`` rows to rank 0, the next ``sent[1]`` to rank 1, …

        Args:
            rows: (M, …) on the device.
            sent: how many go to each rank.
            received: how many come from each.

        Returns:
            what came, rank after rank.
        """
        if self.size == 1:
            return rows
        came = rows.new_empty((sum(received), *rows.shape[1:]))
        with self.watched():
            dist.all_to_all_single(came, rows.contiguous(), list(received), list(sent))
        return came

    def mean(self, values: Tensor) -> Tensor:
        """(n,) of every rank to their means."""
        if self.size == 1:
            return values
        total = values.clone()
        with self.watched():
            dist.all_reduce(total)
        return total / self.size

    def from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the first one's values."""
        if self.size > 1:
            with self.watched():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A fault of what the block exchanges means that another process has gone."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.size == 1:
                raise
            reason = " ".join(str(error).split())[:200]
            raise PeerLost(f"process {self.rank} has lost the others ({reason})") from error

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            self.gather_host(np.zeros((1, 1)))


@contextmanager
def joined(device: torch.device, patience: datetime.timedelta = _HOST_TIMEOUT) -> Iterator[Ranks]:
    """Within the block this process belongs to the run that the environment names.

    Args:
        device: of this process.
        patience: how long one that waits for the others does so. (One that has died is noticed
            at once.)

    Raises:
        InputError: the others do not come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    try:
        # Numbers of the host go by gloo, those of GPUs by NCCL.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
        host = _host_group(patience)
        watch = PeerWatch(_host_group(_SILENCE))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the {size} processes do not find each other ({reason})") from error
    failed = True
    try:
        yield Ranks(dist.get_rank(), size, host)
        failed = False
    except Stopped:
        failed = False
        raise
    finally:
        watch.leave(failed=failed)
        dist.destroy_process_group()


def _host_group(timeout: datetime.timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # this process is in it
    return group


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Mistakes found before the start are the same for all processes: a machine's first says them.

    Raises:
        InputError: in the first process of a machine.
        PeerLost: in the others.
    """
    try:
        yield
    except InputError as error:
        raise error if local_rank() == 0 else PeerLost from error


# Its name before torch 2.14.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"


def distributed(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The model itself on one process; on many, its gradients are the means over all ranks'."""
    if ranks.size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # BatchNorm's running statistics are those of rank 0.
        **{_SYNC_BUFFERS: False},  # type: ignore[arg-type]
    )


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a backward pass: only the ``last`` micro-batch of a step exchanges gradients."""
    if isinstance(model, DistributedDataParallel) and not last:
        unsynchronised: AbstractContextManager[None] = model.no_sync()
        return unsynchronised
    return nullcontext()
