"""``extract-features``: frozen features of a set, one vector a video (paper §5.2).

The unit of work is a shard. Processes share the shards, each keeps what it has finished
(``extract_parts.py``), and the first one puts all together. What comes out depends on shards,
weights and settings alone: not on how many processes there were, nor on interruptions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seco import __version__
from seco.backbone_guard import BackboneChanged, BackboneGuard
from seco.device import resolve_device, uses_bf16
from seco.extract_config import ExtractConfig, frames_of, validate
from seco.extract_parts import Parts, ShardFeatures, digest_of, part_digests
from seco.feature_format import META
from seco.feature_writer import write_feature_parts
from seco.forwards import Forwards
from seco.ranks import Ranks, joined, local_rank
from seco.shard_features import shard_features
from seco.stopping import StopRequest, StopWaiting
from seco.weights import RANDOM, Backbone, load_backbone
from shards.access import UnreadableFrame
from shards.atomic import require_writable
from shards.errors import InputError, PeerLost, Stopped, TooManyExcluded
from shards.opening import open_shards
from shards.progress import progress
from shards.reader import ShardSet

_PARTS = "parts"
_BATCH_ON_GPU, _BATCH_ON_CPU = 256, 16
_PATIENCE = datetime.timedelta(days=7)  # a process may have a shard left when all others are done
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
        validate(config)
        if config.out:
            require_writable(Path(config.out))  # before anything that takes long
        self.shards = open_shards(config.shards)
        self.backbone = load_backbone(config.checkpoint, config.arch, config.seed)
        self.out = Path(config.out or f"features/{self.shards.name}")
        require_writable(self.out)
        self.dataset = _dataset(self.shards)
        self.config = resolved(config, self.dataset, device)
        self.names = [Path(address).name for address in self.shards.addresses]
        indexes = self.shards.indexes
        self.digests = part_digests(self.config, self.backbone, device.type, indexes)
        self.digest = digest_of(self.digests)
        self.parts = Parts(self.out / _PARTS, self.names, self.digests)

    def done(self) -> bool:
        """Whether an earlier run has written all of it."""
        try:
            meta = json.loads((self.out / META).read_bytes())
            return bool(meta["digest"] == self.digest and meta["unreadable"] == 0)
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
            f"{self.out / _PARTS}; go on with the same command"
        )

    def keep(self, shard: int, part: ShardFeatures) -> None:
        """Write a part, and name the videos it lacks."""
        for key, _, reason in part.failures:
            tell(f"left out: {key}: {reason}")
        self.parts.write(shard, part)

    def write(self, before_each: Callable[[], None]) -> None:
        """Put the parts together into the feature folder, then remove them.

        Raises:
            InputError: not one video could be read, a part is damaged, or the disk is full.
            TooManyExcluded: all is written, but more than ``max_failures`` percent is missing.
        """
        parts = [self.parts.open(shard) for shard in range(len(self.names))]
        failures = [row for part in parts for row in part.failures]
        if len(failures) == len(self.shards):
            raise InputError("not one video could be read", self.config.shards, failures[0][2])
        write_feature_parts(self.out, parts, self._meta(len(failures)), before_each)
        self.parts.remove_all()
        if failures:
            named = ", ".join(key for key, _, _ in failures[:_MOST_NAMED])
            more = ", …" if len(failures) > _MOST_NAMED else ""
            tell(
                f"{len(failures)} of {len(self.shards)} videos could not be read and are left out "
                f"({named}{more}); see errors.csv"
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
            "encoder": {
                "arch": backbone.arch,
                "checkpoint": backbone.source,
                "sha256": backbone.sha256,
                "seed": config.seed if backbone.source == RANDOM else None,
                "tasks": backbone.tasks,
            },
            "dataset": self.dataset,
            "shards": list(config.shards),
            "frames": config.frames,
            "short_edge": config.short_edge,
            "crop_size": config.crop_size,
            "precision": config.precision,
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


def _dataset(shards: ShardSet) -> str:
    """Of the first video that says."""
    for video in range(len(shards)):
        with contextlib.suppress(UnreadableFrame):
            return shards.record(video).dataset
    return ""


def extract_features(config: ExtractConfig, *, quiet: bool = False) -> Path:
    """Extract on the processes there are; returns the feature folder.

    Args:
        config: as given.
        quiet: show no progress: somebody else does.

    Raises:
        InputError: settings, shards, checkpoint or output folder cannot be used; a feature is not
            finite; not one video can be read.
        TooManyExcluded: all is written, but more than ``max_failures`` percent is missing.
        Stopped: a signal came; all finished shards are kept.
        PeerLost: another process ended, and has said why.
    """
    device = resolve_device(config.device)
    with joined(device, _PATIENCE) as ranks, StopRequest() as stop:
        try:
            extraction = Extraction(config, device)
        except InputError as error:
            # The same for all processes of a machine: its first one says it.
            raise error if local_rank() == 0 else PeerLost from error
        return _Worker(extraction, device, ranks, stop, quiet).run()


def forwards_of(backbone: Backbone, device: torch.device, config: ExtractConfig) -> Forwards:
    """With these (resolved) settings."""
    return Forwards(
        backbone.network,
        device,
        precision=config.precision,
        channels_last=config.layout == "channels_last",
    )


class _Worker:
    """One process of an extraction."""

    def __init__(
        self,
        extraction: Extraction,
        device: torch.device,
        ranks: Ranks,
        stop: StopRequest,
        quiet: bool,
    ) -> None:
        self._extraction = extraction
        self._device = device
        self._ranks = ranks
        self._stop = stop
        self._quiet = quiet or not ranks.first

    def run(self) -> Path:
        """See :func:`extract_features`."""
        extraction, ranks = self._extraction, self._ranks
        if not ranks.agree(extraction.digest):
            raise self._told_once(
                InputError(
                    "the processes do not see the same shards, checkpoint or settings",
                    extraction.out,
                    "start all of them with the same command, where all see the same files",
                )
            )
        done, todo = self._agreed_todo()
        if done:
            if ranks.first:
                extraction.parts.remove_all()  # of a run that was killed at its very end
                tell(f"these features are in {extraction.out} already")
            return extraction.out
        with contextlib.suppress(StopWaiting):  # the others have to be told
            self._extract(todo[ranks.rank :: ranks.size])
        if ranks.any(bool(self._stop)):
            raise self._stopped()
        self._write()
        return extraction.out

    def _agreed_todo(self) -> tuple[bool, list[int]]:
        """Whether all is written, else which shards are to be computed, as the first rank sees it.

        (Another would see what a quick one has finished in the meantime.)
        """
        extraction = self._extraction
        seen = np.array([[extraction.done(), *extraction.finished()]], dtype=np.float64)
        done, *finished = self._ranks.gather_host(seen)[0].tolist()
        if not done and self._ranks.first:
            extraction.tell_of_parts(finished)
        return bool(done), [shard for shard, there in enumerate(finished) if not there]

    def _extract(self, numbers: Sequence[int]) -> None:
        """Compute and keep these shards.

        Raises:
            StopWaiting: a signal came.
            InputError: a feature is not finite, the disk is full, or the backbone has changed.
        """
        extraction, ranks = self._extraction, self._ranks
        config, backbone = extraction.config, extraction.backbone
        videos = int(extraction.shards.counts[list(numbers)].sum())
        title = "Extracting" if ranks.size == 1 else f"Extracting, 1 of {ranks.size} processes"
        guard = BackboneGuard(backbone)
        kept: list[int] = []
        try:
            with (
                forwards_of(backbone, self._device, config) as forwards,
                progress(title, videos, "videos", quiet=self._quiet) as shown,
                contextlib.closing(
                    shard_features(
                        extraction.shards, numbers, forwards, config, self._stop, shown.advance
                    )
                ) as found,
            ):
                for shard, part in found:
                    guard.require_same_statistics()
                    extraction.keep(shard, part)
                    kept.append(shard)
            guard.require_unchanged()
        except BackboneChanged:
            extraction.parts.discard(kept)
            raise

    def _write(self) -> None:
        """The first rank puts all together, and all end for the same reason."""
        outcome: BaseException | None = None
        if self._ranks.first:
            try:
                self._extraction.write(self._stop_at_signal)
            except (InputError, OSError, StopWaiting) as error:
                outcome = error
        if self._ranks.any(isinstance(outcome, StopWaiting)):
            raise self._stopped()
        failed = self._ranks.any(outcome is not None and not isinstance(outcome, TooManyExcluded))
        if outcome is not None:
            raise outcome
        if failed:
            raise PeerLost

    def _stop_at_signal(self) -> None:
        if self._stop:
            raise StopWaiting

    def _stopped(self) -> Stopped:
        if not self._ranks.first:
            return Stopped("")
        return self._extraction.stopped(self._stop.signal_name or "another process was stopped")

    def _told_once(self, error: InputError) -> Exception:
        return error if self._ranks.first else PeerLost()


def tell(message: str) -> None:
    """A line for the user."""
    print(f"seco extract-features: {message}", file=sys.stderr, flush=True)
