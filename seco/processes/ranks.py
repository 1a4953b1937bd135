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
from shards.terminal import say

_EVERY = 1.0  # seconds between heartbeats
_GRACE = 10.0  # seconds in which the main thread may notice and report more
_ALIVE, _LEFT, _FAILED = 0, 1, 2


class PeerWatch:
    """A thread that exchanges heartbeats with the other ranks.

    A rank that waits in a GPU collective does not notice that a peer was killed, and a peer that
    hangs closes no connection. This thread ends such a rank and prints the reason.

    Args:
        group: process group of all ranks, used for nothing else; its timeout is the silence after
            which a rank counts as lost.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._leaving = threading.Event()
        self._says = _ALIVE
        self._thread = threading.Thread(target=self._watch, name="peer watch", daemon=True)
        self._thread.start()

    def leave(self, *, failed: bool) -> None:
        """End the watch on all ranks; if this rank has failed, the others end too."""
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
                return self._lost("another process has failed")
            if int(said) == _LEFT:
                return None
            self._leaving.wait(_EVERY)

    def _lost(self, reason: str) -> None:
        if self._leaving.wait(_GRACE):
            return
        rank = dist.get_rank()
        say(f"seco: process {rank} lost its peers ({reason})")
        os._exit(EXIT_FAILED)  # the main thread may wait forever


_TIMEOUT = datetime.timedelta(minutes=5)  # for connecting, and for collectives on GPUs
_HOST_TIMEOUT = datetime.timedelta(minutes=30)  # rank 0 may be saving to a slow disk
_SILENCE = datetime.timedelta(seconds=45)  # after which a rank counts as lost


# The second is its name before torch 2.14.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """This process's rank among ``size`` ranks, and the collectives."""

    def __init__(self, rank: int = 0, size: int = 1, host: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._host = host  # process group of the CPUs

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which logs and saves."""
        return self.rank == 0

    def gather_host(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """All-gather (n, F) to (size · n, F), in rank order, on the CPU."""
        if self.size == 1:
            return rows
        mine = torch.from_numpy(np.ascontiguousarray(rows))
        everyone = torch.empty((self.size * len(mine), *mine.shape[1:]), dtype=mine.dtype)
        with self.watched():
            _all_gather(everyone, mine, group=self._host)
        return everyone.numpy()

    def agree(self, text: str) -> bool:
        """Whether ``text`` is the same on all ranks."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
        everyone = self.gather_host(np.array([[float(number)]]))
        return bool((everyone == everyone[0]).all())

    def any(self, mine: bool) -> bool:
        """Whether ``mine`` is true on at least one rank."""
        return bool(self.gather_host(np.array([[float(mine)]])).any())

    def gather(self, rows: Tensor) -> Tensor:
        """All-gather (n, …) to (size · n, …), in rank order, on the device."""
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
            sent: number of rows for each rank.
            received: number of rows from each rank.

        Returns:
            The received rows, in rank order.
        """
        if self.size == 1:
            return rows
        came = rows.new_empty((sum(received), *rows.shape[1:]))
        with self.watched():
            dist.all_to_all_single(came, rows.contiguous(), list(received), list(sent))
        return came

    def mean(self, values: Tensor) -> Tensor:
        """Mean of (n,) values over the ranks."""
        if self.size == 1:
            return values
        total = values.clone()
        with self.watched():
            dist.all_reduce(total)
        return total / self.size

    def from_first(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast rank 0's values to all ranks, in place."""
        if self.size > 1:
            with self.watched():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise PeerLost if a collective within the block fails: another rank has died."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.size == 1:
                raise
            reason = " ".join(str(error).split())[:200]
            raise PeerLost(f"process {self.rank} lost its peers ({reason})") from error

    def wait(self) -> None:
        """Block until all ranks have reached this point."""
        if self.size > 1:
            self.gather_host(np.zeros((1, 1)))


@contextmanager
def joined(device: torch.device, patience: datetime.timedelta = _HOST_TIMEOUT) -> Iterator[Ranks]:
    """Join the run that the environment describes, for the duration of the block.

    Args:
        device: of this process.
        patience: how long a rank waits for the others. (A rank that has died is noticed at once.)

    Raises:
        InputError: the other ranks did not join.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    try:
        # gloo for tensors on the host, NCCL for those on GPUs.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
        host = _host_group(patience)
        watch = PeerWatch(_host_group(_SILENCE))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the {size} processes cannot connect ({reason})") from error
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
    assert isinstance(group, dist.ProcessGroup)  # this rank is in it
    return group


def local_rank() -> int:
    """This process's rank on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Report setup errors once per node (local rank 0); they are the same on all ranks.

    Raises:
        InputError: on local rank 0.
        PeerLost: on the other ranks.
    """
    try:
        yield
    except InputError as error:
        raise error if local_rank() == 0 else PeerLost from error


# The second is its name before torch 2.14.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"


def distributed(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Wrap the model so that gradients are averaged over the ranks; unchanged for one rank."""
    if ranks.size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Rank 0's BatchNorm running statistics are the ones that are saved.
        **{_SYNC_BUFFERS: False},  # type: ignore[arg-type]
    )


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Context for a backward pass: only a step's ``last`` micro-batch synchronises gradients."""
    if isinstance(model, DistributedDataParallel) and not last:
        unsynchronised: AbstractContextManager[None] = model.no_sync()
        return unsynchronised
    return nullcontext()
