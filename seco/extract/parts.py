"""Finished shards of an extraction, kept until all are there: what a run is resumed from.

``OUT/parts/SHARD-DIGEST.npz`` holds the features of one shard. The digest is of all that they
depend on, so what was made with other settings, of other weights or of other videos is not taken
for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seco import __version__
from seco.checkpoints.weights import Backbone
from seco.extract.config import ExtractConfig
from seco.features.store import FeaturePart, Floats, require_finite
from shards.atomic import atomic_path
from shards.errors import InputError
from shards.index import ShardIndex

_NAMED = 16  # digits of the digest in a file's name


@dataclass(frozen=True)
class ShardFeatures:
    """Features of one shard's videos that could be read (v), and why the others could not."""

    rows: list[dict[str, Any]]  # (v,) of videos.csv
    failures: list[tuple[str, str, str]]  # key, shard, reason
    features: Floats  # (v, D)
    halves: Floats  # (v, 2, D)
    frames: Floats | None = None  # (f, D)


class Parts:
    """The parts of one run.

    Args:
        folder: where they are.
        names: (S,) file names of the shards.
        digests: (S,) of what their features depend on.
    """

    def __init__(self, folder: Path, names: Sequence[str], digests: Sequence[str]) -> None:
        self.folder = folder
        self._digests = list(digests)
        self._paths = [
            folder / f"{PurePosixPath(name).stem}-{digest[:_NAMED]}.npz"
            for name, digest in zip(names, digests, strict=True)
        ]

    def finished(self, shard: int) -> bool:
        """Whether it is there and nothing in it is worth trying again."""
        try:
            part = _Opened(self._paths[shard], self._digests[shard])
        except InputError:
            return False
        return not part.failures

    def unused(self) -> int:
        """How many parts there are of other settings, weights or videos."""
        return len(set(self.folder.glob("*.npz")) - set(self._paths))

    def write(self, shard: int, part: ShardFeatures) -> None:
        """Keep a part.

        Raises:
            InputError: a feature is not finite, or the disk is full.
        """
        keys = [row["key"] for row in part.rows]
        require_finite(part.features, keys, self.folder.parent)
        texts = {"digest": self._digests[shard], "rows": part.rows, "failures": part.failures}
        arrays = {"features": part.features, "halves": part.halves}
        if part.frames is not None:
            arrays["frames"] = part.frames
        with atomic_path(self._paths[shard]) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{n: _as_bytes(text) for n, text in texts.items()}, **arrays)  # type: ignore[arg-type]

    def open(self, shard: int) -> FeaturePart:
        """A part for the writer.

        Raises:
            InputError: it is not there, or not whole.
        """
        found = _Opened(self._paths[shard], self._digests[shard])
        return FeaturePart(lambda: found.read("rows"), found.arrays, found.failures)

    def discard(self, shards: Sequence[int]) -> None:
        """Remove these parts."""
        for shard in shards:
            self._paths[shard].unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Remove the folder with all parts, also those of other settings."""
        with contextlib.suppress(OSError):
            for path in (*self.folder.glob("*.npz"), *self.folder.glob("*.npz.*.part")):
                path.unlink(missing_ok=True)
            self.folder.rmdir()


class _Opened:
    """A part's file. Arrays are read when they are asked for.

    Raises:
        InputError: it cannot be read, or is of another digest.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        if self.read("digest") != digest:
            raise self._damaged()
        self.failures: list[tuple[str, str, str]] = [tuple(row) for row in self.read("failures")]

    def read(self, name: str) -> Any:
        """One of the texts, as it was."""
        return json.loads(self._load(name)[name].tobytes())

    def arrays(self) -> tuple[Floats, Floats, Floats | None]:
        """features, halves and frames."""
        found = self._load("features", "halves", "frames")
        return found["features"], found["halves"], found.get("frames")

    def _load(self, *names: str) -> Mapping[str, NDArray[Any]]:
        try:
            with np.load(self._path, allow_pickle=False) as file:
                return {name: file[name] for name in names if name in file}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise self._damaged() from error

    def _damaged(self) -> InputError:
        return InputError(
            "is missing or damaged",
            self._path,
            "delete it and run the same command again; all machines have to see the folder",
        )


def part_digests(
    config: ExtractConfig, backbone: Backbone, device: str, indexes: Sequence[ShardIndex]
) -> list[str]:
    """Of all that each shard's features depend on.

    Args:
        config: resolved settings.
        backbone: with the digest of its tensors.
        device: ``cpu`` or ``cuda``.
        indexes: of the shards.
    """
    names = ("frames", "short_edge", "crop_size", "per_frame", "batch_size", "precision", "layout")
    run = {name: getattr(config, name) for name in names}
    run |= {"arch": backbone.arch, "sha256": backbone.sha256, "device": device}
    run |= {"toolkit": __version__, "torch": torch.__version__}
    return [digest_of({**run, "shard": _identity(index)}) for index in indexes]


def digest_of(value: object) -> str:
    """SHA-256 of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _identity(index: ShardIndex) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in ("first_frame", "frame_offset", "frame_crc", "key_text"):
        digest.update(getattr(index, name).tobytes())
    return {**dataclasses.asdict(index.info), "index": digest.hexdigest()}


def _as_bytes(value: object) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
