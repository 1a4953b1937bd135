"""Reading byte ranges of shards, wherever these are kept.

What cannot be read is returned in the place of its bytes, not raised: one lost shard must not
take the other samples of a batch with it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

_MOST_OPEN = 256  # files; a process may usually have 1,024 open, and a set has more shards


class UnreadableFrame(Exception):
    """A frame's bytes could not be read: its shard was cut, altered or deleted, or is far away."""


class ByteRange(NamedTuple):
    """A part of a shard."""

    address: str  # path or URL of the tar
    offset: int  # bytes
    size: int  # bytes


class Access(Protocol):
    """A way to the bytes; may be pickled to other processes and used after a fork."""

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes | UnreadableFrame]:
        """The bytes of each range, or why they cannot be had."""


class LocalAccess:
    """Files of this machine, or of a disk that all machines share, read with ``pread``."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._descriptors = OrderedDict()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes | UnreadableFrame]:
        return [self._read(*wanted) for wanted in ranges]

    def _read(self, path: str, offset: int, size: int) -> bytes | UnreadableFrame:
        try:
            data = os.pread(self._descriptor(path), size, offset)
        except OSError as error:
            return UnreadableFrame(f"{path}: {error.strerror}")
        if len(data) != size:
            return UnreadableFrame(f"{path}: ends before byte {offset + size}")
        return data

    def _descriptor(self, path: str) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors[path] = descriptor
            if len(self._descriptors) > _MOST_OPEN:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(path)
        return descriptor
