"""The one reader of tars: where each member lies. Nothing is ever unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.errors import InputError


class TarMember(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int  # bytes from the start of the tar to its data
    size: int  # bytes

    @property
    def key(self) -> str:
        """What WebDataset groups by: the name up to the first dot of its base name."""
        folder, _, base = self.name.rpartition("/")
        stem = base.partition(".")[0]
        return f"{folder}/{stem}" if folder else stem

    @property
    def extension(self) -> str:
        """All behind the first dot of the base name, for example ``0003.jpg``."""
        return self.name.rpartition("/")[2].partition(".")[2]

    @property
    def is_jpeg(self) -> bool:
        """Whether its name says so."""
        return self.extension.rpartition(".")[2].lower() in ("jpg", "jpeg")

    def read(self, tar: BinaryIO) -> bytes:
        """Its data; shorter than ``size`` when the tar has been cut since."""
        tar.seek(self.offset)
        return tar.read(self.size)


def tar_members(path: Path) -> Iterator[TarMember]:
    """The files in a tar, in its order.

    Raises:
        InputError: not a tar, or one that is not whole.
    """
    members_end = 0
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar, open(path, "rb") as raw:
            for member in tar:
                blocks = -(-member.size // tarfile.BLOCKSIZE) if member.isreg() else 0
                members_end = member.offset_data + blocks * tarfile.BLOCKSIZE
                tar.members = []  # type: ignore[attr-defined]  # a tar of a million files must not be held in memory
                if not member.isreg():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("a member ends beyond the file")
                yield TarMember(member.name, member.offset_data, member.size)
            # Python's reader takes a cut tar, and one with a damaged header, for a whole one.
            _require_closing_blocks(raw, members_end, size)
    except (tarfile.TarError, EOFError) as error:
        raise InputError(
            f"is truncated or not a tar ({error})", path, "prepare or copy it again"
        ) from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path) from error


def _require_closing_blocks(raw: BinaryIO, members_end: int, size: int) -> None:
    """After its last member a tar holds two blocks of zeros or more, and nothing else."""
    if size - members_end < 2 * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the closing blocks are missing")
    raw.seek(members_end)
    while piece := raw.read(1 << 20):
        if piece.strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at or after byte {members_end}")
