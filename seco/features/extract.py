"""``seco extract-features``: frozen features of a dataset, one vector per video (paper §5.2).

The unit of work is a shard. Ranks divide the shards, each stores what it has finished as a partial
result, and the first one joins them. The result depends on shards, weights and settings alone: not
on the number of ranks, and not on interruptions.
"""

from __future__ import annotations

import contextlib
import datetime
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seco.checkpoints.weights import Backbone, BackboneChanged, BackboneGuard
from seco.config import ExtractConfig
from seco.data.frames import FrameBatch, FrameLoader, VideoFrames
from seco.features.plan import Extraction, FeatureExtractor, ShardFeatures, feature_extractor, tell
from seco.processes.device import loader_workers, resolve_device
from seco.processes.ranks import Ranks, joined, local_rank
from shards.dataset import ShardSet
from shards.errors import InputError, PeerLost, Stopped, TooManyExcluded
from shards.progress import progress
from shards.signals import StopRequest, StopWaiting


def shard_features(
    shards: ShardSet,
    numbers: Sequence[int],
    forwards: FeatureExtractor,
    config: ExtractConfig,
    stop: StopRequest,
    on_videos: Callable[[int], object] = lambda count: None,
) -> Generator[tuple[int, ShardFeatures], None, None]:
    """Yield each shard's number and the features of its videos.

    Args:
        shards: the dataset.
        numbers: numbers of the shards to compute.
        forwards: computes the features.
        config: resolved settings.
        stop: interrupts the wait for data.
        on_videos: called with the number of newly finished videos.

    Raises:
        StopWaiting: a signal came; the current shard is lost.
    """
    assert config.frames is not None and config.batch_size is not None
    frames = VideoFrames(shards, config.frames, config.short_edge, config.crop_size)
    # The loader yields nothing for a shard whose videos have no frames.
    blank = [number for number in numbers if not frames.counts(number).any()]
    for number in blank:
        yield number, _Collected(frames, number, keep=config.per_frame).finish()
    loader = FrameLoader(
        frames,
        [number for number in numbers if number not in blank],
        config.batch_size,
        workers=loader_workers(config.workers, forwards.device),
        kept=forwards.at_once,
        pin=forwards.on_gpu,
    )
    pending: deque[tuple[FrameBatch, Future[NDArray[np.float32]]]] = deque()
    collected: _Collected | None = None
    with loader, contextlib.closing(iter(loader)) as batches:
        # Not until the loader has no more: its end takes time, and must not be interrupted.
        left = len(loader)
        while left or pending:
            if left:
                with stop.while_waiting():
                    batch = next(batches)
                pending.append((batch, forwards.submit(batch.parts)))
                left -= 1
            if len(pending) > forwards.at_once or (pending and not left):
                batch, computed = pending.popleft()
                if collected is None:
                    collected = _Collected(frames, batch.shard, keep=config.per_frame)
                on_videos(collected.add(batch, computed.result()))
                loader.release(batch)
                if batch.ends_shard:
                    yield batch.shard, collected.finish()
                    collected = None


class _Collected:
    """Collects the features of a shard's frames.

    Args:
        frames: of the dataset.
        shard: its number.
        keep: also keep the features of single frames.
    """

    def __init__(self, frames: VideoFrames, shard: int, *, keep: bool) -> None:
        self._shards = frames.shards
        self._shard = shard
        self._keep = keep
        self._counts = frames.counts(shard)
        self._ends = np.cumsum(self._counts)
        self._first_video = int(frames.shards.counts[:shard].sum())
        self._values: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._rows: dict[int, dict[str, Any]] = {}
        self._failures: dict[int, str] = {}

    def add(self, batch: FrameBatch, values: NDArray[np.float32]) -> int:
        """Add the (n, D) features of a batch; returns the number of videos this completes."""
        if not len(self._values):
            self._values = np.empty((int(self._ends[-1]), values.shape[1]), dtype=np.float32)
        last = batch.first + len(batch)
        self._values[batch.first : last] = values
        self._rows |= batch.rows
        self._failures = batch.failures | self._failures  # the first frame's reason
        return int(np.searchsorted(self._ends, last, "right")) - int(
            np.searchsorted(self._ends, batch.first, "right")
        )

    def finish(self) -> ShardFeatures:
        """Return the shard's features, once all frames have been added."""
        name = Path(self._shards.addresses[self._shard]).name
        rows, failures, means, halves, kept = [], [], [], [], []
        for place, count in enumerate(self._counts.tolist()):
            video = self._first_video + place
            if not count or video in self._failures:
                reason = self._failures.get(video, "has no frames")
                failures.append((self._shards.key(video), name, reason))
                continue
            end = int(self._ends[place])
            values = self._values[end - count : end]
            mean, both = pooled(values)
            rows.append(self._rows[video])
            means.append(mean)
            halves.append(both)
            kept.append(values)
        shape = (len(rows), self._values.shape[1])
        return ShardFeatures(
            rows=rows,
            failures=failures,
            features=np.array(means, dtype=np.float32).reshape(shape),
            halves=np.array(halves, dtype=np.float32).reshape(shape[0], 2, shape[1]),
            frames=np.concatenate([self._values[:0], *kept]) if self._keep else None,
        )


def pooled(frames: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Average a video's (F, D) frame features to the mean (D,) and that of both halves (2, D).

    Summed in float64, in frame order. If F is odd, the middle frame is in neither half.
    """
    middle = max(1, len(frames) // 2)
    mean, *halves = (
        some.mean(axis=0, dtype=np.float64).astype(np.float32)
        for some in (frames, frames[:middle], frames[-middle:])
    )
    return mean, np.stack(halves)


_PATIENCE = datetime.timedelta(days=7)  # one rank may have a shard left when the others are done


def extract_features(
    config: ExtractConfig, backbone: Backbone | None = None, *, quiet: bool = False
) -> Path:
    """Extract features on all ranks; returns the feature folder.

    Args:
        config: as given.
        backbone: replaces the checkpoint that ``config`` names.
        quiet: show no progress, for callers that show their own.

    Raises:
        InputError: settings, shards, checkpoint or output folder cannot be used; a feature is not
            finite; no video can be read.
        TooManyExcluded: all is written, but more than ``max_failures`` percent is missing.
        Stopped: a signal came; all finished shards are kept.
        PeerLost: another rank ended, and has reported why.
    """
    device = resolve_device(config.device)
    with joined(device, _PATIENCE) as ranks, StopRequest() as stop:
        try:
            extraction = Extraction(config, device, backbone)
        except InputError as error:
            # Report it once per node (local rank 0).
            raise error if local_rank() == 0 else PeerLost from error
        return _Worker(extraction, device, ranks, stop, quiet).run()


class _Worker:
    """One rank of an extraction."""

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
            raise self._rank_zero_error(
                InputError(
                    "the processes have different shards, checkpoints or settings",
                    extraction.out,
                    "start all processes with the same command, on the same files",
                )
            )
        done, todo = self._agreed_todo()
        if done:
            if ranks.first:
                extraction.parts.remove_all()  # left by a run that was killed at its very end
                tell(f"these features are in {extraction.out} already")
            return extraction.out
        with contextlib.suppress(StopWaiting):  # the other ranks have to learn of it first
            self._extract(todo[ranks.rank :: ranks.size])
        if ranks.any(bool(self._stop)):
            raise self._stopped()
        self._write()
        return extraction.out

    def _agreed_todo(self) -> tuple[bool, list[int]]:
        """Whether all is written, and otherwise the shards to compute, according to rank 0.

        (Other ranks might see what a faster one has finished in the meantime.)
        """
        extraction = self._extraction
        seen = np.array([[extraction.done(), *extraction.finished()]], dtype=np.float64)
        done, *finished = self._ranks.gather_host(seen)[0].tolist()
        if not done and self._ranks.first:
            extraction.tell_of_parts(finished)
        return bool(done), [shard for shard, there in enumerate(finished) if not there]

    def _extract(self, numbers: Sequence[int]) -> None:
        """Compute these shards and store them as partial results.

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
                feature_extractor(backbone, self._device, config) as forwards,
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
        """Merge the partial results on rank 0; all ranks end for the same reason."""
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

    def _rank_zero_error(self, error: InputError) -> Exception:
        return error if self._ranks.first else PeerLost()
