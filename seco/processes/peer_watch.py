"""Noticing that another process of the run has died or hangs, whatever this one is waiting for."""

from __future__ import annotations

import os
import sys
import threading

import torch
import torch.distributed as dist

from shards.errors import EXIT_FAILED

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
