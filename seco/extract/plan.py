"""What an extraction consists of, what of it is there already, and how it is put together."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from seco import __version__
from seco.checkpoints.weights import Backbone, load_backbone
from seco.extract.config import ExtractConfig, check_extract, frames_of
from seco.extract.forwards import Forwards
from seco.extract.parts import Parts, ShardFeatures, digest_of, part_digests
from seco.features.store import (
    ERRORS,
    FEATURES,
    FRAMES,
    HALVES,
    META,
    PARTS,
    VIDEOS,
    encoder_name,
    write_feature_parts,
)
from seco.processes.device import uses_bf16
from shards.access import UnreadableFrame
from shards.atomic import require_writable
from shards.errors import InputError, Stopped, TooManyExcluded
from shards.opening import open_shards
from shards.reader import ShardSet

_BATCH_ON_GPU, _BATCH_ON_CPU = 256, 16
_MOST_NAMED = 3


class Extraction:
    """What is to be extracted, and what of it is there already.

    Args:
        config: as given.
        device: where the backbone will compute.

    Raises:
        InputError: settings, shards, checkpoint or output folder cannot be used.
    """

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        check_extract(config)
        if config.out:
            require_writable(Path(config.out))  # before anything that takes long
        self.shards = open_shards(config.shards)
        self.backbone = load_backbone(config.checkpoint, config.arch, config.seed)
        self.out = Path(config.out or f"features/{self.shards.name}")
        require_writable(self.out)
        self.dataset = dataset_of(self.shards)
        self.config = resolved(config, self.dataset, device)
        self.names = [Path(address).name for address in self.shards.addresses]
        indexes = self.shards.indexes
        self.digests = part_digests(self.config, self.backbone, device.type, indexes)
        self.digest = digest_of(self.digests)
        self.parts = Parts(self.out / PARTS, self.names, self.digests)
        other = self._other_features()
        if other is not None and not config.overwrite:
            raise InputError(
                f"holds {other} already, which would be lost with their results",
                self.out,
                "give another --out, or --overwrite",
            )

    def _other_features(self) -> str | None:
        """What is finished there of another encoder, set or settings, in words."""
        try:
            meta = json.loads((self.out / META).read_bytes())
            if meta["digest"] == self.digest:
                return None
            return f"features of {encoder_name(meta['encoder'])}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def done(self) -> bool:
        """Whether an earlier run has written all of it."""
        return self._written(())

    def _written(self, failures: Sequence[tuple[str, str, str]]) -> bool:
        """Whether an earlier run has written all but these videos."""
        try:
            meta = json.loads((self.out / META).read_bytes())
            whole = meta["digest"] == self.digest and meta["unreadable"] == len(failures)
            names = (FEATURES, HALVES, VIDEOS, *([FRAMES] if self.config.per_frame else []))
            whole = whole and all((self.out / name).is_file() for name in names)
            if not whole or not failures:
                return bool(whole)
            with open(self.out / ERRORS, encoding="utf-8", newline="") as file:
                return [row["key"] for row in csv.DictReader(file)] == [row[0] for row in failures]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def finished(self) -> list[bool]:
        """(S,) whether a shard has a part that need not be made again."""
        return [self.parts.finished(shard) for shard in range(len(self.names))]

    def tell_of_parts(self, finished: Sequence[object]) -> None:
        """What of an earlier run is gone on with, and what is not."""
        if there := sum(map(bool, finished)):
            tell(f"going on: {there} of {len(finished)} shards are there")
        if unused := self.parts.unused():
            tell(f"{unused} finished shards of other settings or weights are not used")

    def stopped(self, why: str) -> Stopped:
        """What is said when a run ends before its end."""
        finished = self.finished()
        return Stopped(
            f"{why}: {sum(finished)} of {len(finished)} shards are done and kept in "
            f"{self.out / PARTS}; go on with the same command"
        )

    def keep(self, shard: int, part: ShardFeatures) -> None:
        """Write a part, and name the videos it lacks."""
        for key, _, reason in part.failures:
            tell(f"left out: {key}: {reason}")
        self.parts.write(shard, part)

    def write(self, before_each: Callable[[], None]) -> None:
        """Put the parts together into the feature folder, then remove them.

        While videos are missing they are kept, and the same command tries their shards again; what
        stands there stays where that changes nothing.

        Raises:
            InputError: not one video could be read, a part is damaged, or the disk is full.
            TooManyExcluded: all is written, but more than ``max_failures`` percent is missing.
        """
        parts = [self.parts.open(shard) for shard in range(len(self.names))]
        failures = [row for part in parts for row in part.failures]
        if len(failures) == len(self.shards):
            raise InputError("not one video could be read", self.config.shards, failures[0][2])
        if self._written(failures):
            tell(f"nothing has changed; these features are in {self.out} already")
        else:
            write_feature_parts(self.out, parts, self._meta(len(failures)), before_each)
        if not failures:
            self.parts.remove_all()
        else:
            named = ", ".join(key for key, _, _ in failures[:_MOST_NAMED])
            more = ", …" if len(failures) > _MOST_NAMED else ""
            tell(
                f"{len(failures)} of {len(self.shards)} videos could not be read and are left out "
                f"({named}{more}); see errors.csv. The same command tries their shards again, for "
                f"which {self.parts.folder} is kept"
            )
        if len(failures) * 100 > self.config.max_failures * len(self.shards):
            raise TooManyExcluded(
                f"{len(failures)} of {len(self.shards)} videos could not be read, more than "
                f"--max-failures {self.config.max_failures:g}",
                self.out,
                "prepare or copy the shards again; see errors.csv",
            )

    def _meta(self, unreadable: int) -> dict[str, Any]:
        backbone, config = self.backbone, self.config
        return {
            "encoder": backbone.record(config.seed),
            "dataset": self.dataset,
            "shards": list(config.shards),
            "frames": config.frames,
            "short_edge": config.short_edge,
            "crop_size": config.crop_size,
            "batch_size": config.batch_size,
            "precision": config.precision,
            "layout": config.layout,
            "unreadable": unreadable,
            "toolkit": __version__,
            "digest": self.digest,
        }


def resolved(config: ExtractConfig, dataset: str, device: torch.device) -> ExtractConfig:
    """The settings with what depends on the data set and the device filled in."""
    return dataclasses.replace(
        config,
        frames=frames_of(config, dataset),
        batch_size=config.batch_size or (_BATCH_ON_GPU if device.type == "cuda" else _BATCH_ON_CPU),
        precision="bf16" if uses_bf16(config.precision, device) else "fp32",
    )


def dataset_of(shards: ShardSet) -> str:
    """Of the first video that says."""
    for video in range(len(shards)):
        with contextlib.suppress(UnreadableFrame):
            return shards.record(video).dataset
    return ""


def forwards_of(backbone: Backbone, device: torch.device, config: ExtractConfig) -> Forwards:
    """With these (resolved) settings."""
    return Forwards(
        backbone.network,
        device,
        precision=config.precision,
        channels_last=config.layout == "channels_last",
    )


def tell(message: str) -> None:
    """A line for the user."""
    print(f"seco extract-features: {message}", file=sys.stderr, flush=True)
