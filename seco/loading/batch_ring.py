"""Memory for a few batches, which loader processes write and the trainer reads.

Sending a batch through the queue of torch's DataLoader costs a shared file, its page faults and a
copy each time: a third of what the loader spends on the views themselves (``docs/loader.md``). An
anonymous shared mapping is made once, needs no room in /dev/shm, and a loader process that was
forked writes its part of a batch where the trainer will read it.
"""

from __future__ import annotations

import contextlib
import mmap
import sys

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray


class BatchRing:
    """Slots of one batch each.

    Args:
        slots: how many.
        shape: of a batch.
        dtype: numpy's, of a batch.
    """

    def __init__(self, slots: int, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.slots = slots
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize * slots
        self._memory = mmap.mmap(-1, max(size, 1))  # shared with the processes forked later
        flat = np.frombuffer(self._memory, dtype=dtype, count=slots * int(np.prod(shape)))
        self._batches: NDArray[np.generic] = flat.reshape(slots, *shape)
        self._pinned = False

    def __getitem__(self, slot: int) -> NDArray[np.generic]:
        batch: NDArray[np.generic] = self._batches[slot]
        return batch

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("shared memory is inherited by a fork, it cannot be sent")

    def pin(self) -> bool:
        """Let a GPU read it by itself, so that copies need no second buffer and nobody waits.

        Returns:
            whether the driver agreed; copies work without it, too, but block.
        """
        pointer, size = self._batches.ctypes.data, self._batches.nbytes
        failed = torch.cuda.cudart().cudaHostRegister(pointer, size, 0)
        self._pinned = int(failed) == 0
        if not self._pinned:
            # The error would be reported again by the next kernel, which has done nothing wrong.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device="cuda").add_(1)
            print("seco: the loader's memory cannot be pinned; copies will wait", file=sys.stderr)
        return self._pinned

    def close(self) -> None:
        """Give the memory back to the driver; it is freed with its last user."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._batches.ctypes.data)
            self._pinned = False
