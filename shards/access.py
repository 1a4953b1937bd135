"""Reading byte ranges of shards, wherever these are kept.

What cannot be read is returned in the place of its bytes, not raised: one lost shard must not
take the other samples of a batch with it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from shards.remote import fetch_parts, in_words

_MOST_OPEN = 256  # files; a process may usually have 1,024 open, and a set has more shards
_GAP_BYTES = 64 << 10  # reading this much in vain is quicker than asking once more


class UnreadableFrame(Exception):
    """A frame's bytes could not be read: its shard was cut, altered or deleted, or is far away."""


def readable(data: bytes | UnreadableFrame) -> bytes:
    """What was read; raises UnreadableFrame where it could not be."""
    if isinstance(data, UnreadableFrame):
        raise data
    return data


class ByteRange(NamedTuple):
    """A part of a shard."""

    address: str  # path or URL of the tar
    offset: int  # bytes
    size: int  # bytes

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.offset + self.size


class Access(Protocol):
    """A way to the bytes; may be pickled to other processes and used after a fork."""

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes | UnreadableFrame]:
        """The bytes of each range, or why they cannot be had."""

    def want(self, addresses: Sequence[str]) -> None:
        """Hint: these shards will be read next, in this order."""

    def close(self) -> None:
        """Stop what goes on in the background."""


class LocalAccess:
    """Files of this machine, or of a disk that all machines share, read with ``pread``."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_descriptors"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._descriptors = OrderedDict()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes | UnreadableFrame]:
        return [self._read(wanted) for wanted in ranges]

    def want(self, addresses: Sequence[str]) -> None:
        pass  # the page cache does it

    def close(self) -> None:
        pass

    def _read(self, wanted: ByteRange) -> bytes | UnreadableFrame:
        try:
            data = os.pread(self._descriptor(wanted.address), wanted.size, wanted.offset)
        except OSError as error:
            self._forget(wanted.address)  # a file replaced on a shared disk can be opened anew
            return UnreadableFrame(f"{wanted.address}: {error.strerror}")
        if len(data) != wanted.size:
            self._forget(wanted.address)
            return UnreadableFrame(f"{wanted.address}: ends before byte {wanted.end}")
        return data

    def _descriptor(self, address: str) -> int:
        descriptor = self._descriptors.get(address)
        if descriptor is None:
            descriptor = os.open(self._path(address), os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors[address] = descriptor
            if len(self._descriptors) > _MOST_OPEN:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(address)
        return descriptor

    def _path(self, address: str) -> str:
        return address

    def _forget(self, address: str) -> None:
        descriptor = self._descriptors.pop(address, None)
        if descriptor is not None:
            os.close(descriptor)


class RangeAccess:
    """Shards behind fsspec, of which only the ranges asked for are fetched, many at a time.

    Ranges that lie close together are fetched as one. What fails is tried again with growing waits.
    """

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes | UnreadableFrame]:
        joined = joined_ranges(ranges)
        answers = fetch_parts([(r.address, r.offset, r.end) for r in joined])
        fetched = dict(zip(joined, answers, strict=True))
        parts: list[bytes | UnreadableFrame] = []
        for wanted in ranges:
            whole = next(r for r in joined if _within(wanted, r))
            parts.append(_part(wanted, whole, fetched[whole]))
        return parts

    def want(self, addresses: Sequence[str]) -> None:
        pass  # there is nowhere to keep them

    def close(self) -> None:
        pass


def joined_ranges(ranges: Sequence[ByteRange], gap: int = _GAP_BYTES) -> list[ByteRange]:
    """Fewer, longer ranges that cover these, with at most ``gap`` bytes in vain at each joint."""
    joined: list[ByteRange] = []
    for wanted in sorted(ranges):
        last = joined[-1] if joined else None
        if last and last.address == wanted.address and wanted.offset <= last.end + gap:
            size = max(last.end, wanted.end) - last.offset
            joined[-1] = ByteRange(last.address, last.offset, size)
        else:
            joined.append(wanted)
    return joined


def _within(wanted: ByteRange, whole: ByteRange) -> bool:
    same = wanted.address == whole.address
    return same and whole.offset <= wanted.offset and wanted.end <= whole.end


def _part(wanted: ByteRange, whole: ByteRange, data: bytes | Exception) -> bytes | UnreadableFrame:
    if isinstance(data, Exception):
        return UnreadableFrame(f"{wanted.address}: {in_words(data)}")
    if len(data) > whole.size:
        return UnreadableFrame(f"{wanted.address}: the server ignores ranges: give --cache-dir")
    start = wanted.offset - whole.offset
    part = data[start : start + wanted.size]
    if len(part) != wanted.size:
        return UnreadableFrame(f"{wanted.address}: ends before byte {wanted.end}")
    return part
