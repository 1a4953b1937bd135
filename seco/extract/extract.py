"""``extract-features``: frozen features of a set, one vector a video (paper §5.2).

The unit of work is a shard. Processes share the shards, each keeps what it has finished
(``parts.py``), and the first one puts all together. What comes out depends on shards,
weights and settings alone: not on how many processes there were, nor on interruptions.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from seco.checkpoints.backbone_guard import BackboneChanged, BackboneGuard
from seco.extract.config import ExtractConfig
from seco.extract.plan import Extraction, forwards_of, tell
from seco.extract.shard_features import shard_features
from seco.processes.device import resolve_device
from seco.processes.ranks import Ranks, joined, local_rank
from seco.processes.stopping import StopRequest, StopWaiting
from shards.errors import InputError, PeerLost, Stopped, TooManyExcluded
from shards.progress import progress

_PATIENCE = datetime.timedelta(days=7)  # a process may have a shard left when all others are done


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
