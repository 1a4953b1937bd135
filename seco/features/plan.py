"""What an extraction computes: its plan, the forward passes, finished shards as partial results.

On the CPU each batch is computed by one thread, as many batches at a time as there are cores: no
thread waits for another at every layer (which costs most on a shared machine), and a sum is the
same to the last bit on a machine with any number of cores. On a GPU two batches are in flight, so
that one is copied while the other is computed.

``OUT/parts/SHARD-DIGEST.npz`` holds the features of one shard. The digest covers everything they
depend on, so features of other settings, weights or videos are never taken for them.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seco import __version__
from seco.checkpoints.weights import Backbone, load_backbone
from seco.config import ExtractConfig, check_extract, frames_of
from seco.data.transforms import normalise
from seco.features.store import (
    ERRORS,
    FEATURES,
    FRAMES,
    HALVES,
    META,
    PARTS,
    VIDEOS,
    FeaturePart,
    Floats,
    encoder_name,
    read_meta,
    require_finite,
    write_feature_parts,
)
from seco.models.backbones import require_size
from seco.processes.device import uses_bf16
from seco.processes.ranks import local_size
from shards.atomic import atomic_path, require_writable
from shards.dataset import ShardSet
from shards.errors import InputError, Stopped, TooManyExcluded
from shards.index import ShardIndex
from shards.opening import open_shards
from shards.settings import usable_cpus
from shards.storage import UnreadableFrame
from shards.terminal import say

_ON_A_GPU = 2


class FeatureExtractor:
    """Computes pooled features of crops; use as a context manager.

    Args:
        network: (N, 3, S, S) to (N, D); moved to the device and set to evaluation mode.
        device: where to compute.
        precision: ``auto``, ``bf16`` or ``fp32``. On a GPU, ``fp32`` does not use TF32.
        channels_last: memory format of images and weights.

    Attributes:
        at_once: number of batches computed at a time.
        on_gpu: whether crops should be in pinned memory.
    """

    def __init__(
        self, network: nn.Module, device: torch.device, *, precision: str, channels_last: bool
    ) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._network = network.to(device, memory_format=self._format).eval()  # type: ignore[call-overload]
        self._network.requires_grad_(False)
        self.device = device
        self._bf16 = uses_bf16(precision, device)
        self.on_gpu = device.type == "cuda"
        self.at_once = _ON_A_GPU if self.on_gpu else computing_threads()
        self._threads = ThreadPoolExecutor(
            self.at_once, thread_name_prefix="forward", initializer=self._start_thread
        )
        self._own = threading.local()
        self._settings = ExitStack()

    def __enter__(self) -> FeatureExtractor:
        if self.on_gpu:
            flags = {"benchmark": False, "deterministic": True, "allow_tf32": False}
            self._settings.enter_context(torch.backends.cudnn.flags(enabled=True, **flags))
            torch.cuda.synchronize(self.device)  # all streams can now read the weights
        else:
            self._settings.callback(torch.set_num_threads, torch.get_num_threads())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._settings.close()

    def submit(self, parts: Sequence[NDArray[np.uint8]]) -> Future[NDArray[np.float32]]:
        """Compute features (N, D) of crops (n, S, S, 3), which must not change until then."""
        return self._threads.submit(self._pooled, parts)

    def _start_thread(self) -> None:
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            self._own.stream = torch.cuda.Stream(self.device)
        else:
            torch.set_num_threads(1)

    def _pooled(self, parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        on_gpu = self.on_gpu
        with (
            torch.inference_mode(),
            torch.cuda.stream(self._own.stream) if on_gpu else nullcontext(),
        ):
            images = self._images(parts)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
                features = self._network(images)
            pooled: NDArray[np.float32] = features.float().cpu().numpy()  # waits for the stream
        return pooled

    def _images(self, parts: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Copy crops to the device and normalise them: (N, 3, S, S)."""
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        crops = torch.empty(shape, dtype=torch.uint8, device=self.device)
        begin = 0
        for part in parts:
            crops[begin : begin + len(part)].copy_(torch.from_numpy(part), non_blocking=True)
            begin += len(part)
        return normalise(crops.permute(0, 3, 1, 2)).contiguous(memory_format=self._format)


def computing_threads() -> int:
    """Return ``OMP_NUM_THREADS``, or this process's share of the cores."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else max(1, usable_cpus() // local_size())


_NAMED = 16  # digits of the digest in file names


@dataclass(frozen=True)
class ShardFeatures:
    """Features of a shard's v readable videos, and why the others could not be read."""

    rows: list[dict[str, Any]]  # (v,) rows of videos.csv
    failures: list[tuple[str, str, str]]  # key, shard, reason
    features: Floats  # (v, D)
    halves: Floats  # (v, 2, D)
    frames: Floats | None = None  # (f, D)


class Parts:
    """The partial results of one run.

    Args:
        folder: where they are stored.
        names: (S,) file names of the shards.
        digests: (S,) digests of everything their features depend on.
    """

    def __init__(self, folder: Path, names: Sequence[str], digests: Sequence[str]) -> None:
        self.folder = folder
        self._digests = list(digests)
        self._paths = [
            folder / f"{PurePosixPath(name).stem}-{digest[:_NAMED]}.npz"
            for name, digest in zip(names, digests, strict=True)
        ]

    def finished(self, shard: int) -> bool:
        """Whether a shard has a partial result without failures, which would be retried."""
        try:
            part = _Opened(self._paths[shard], self._digests[shard])
        except InputError:
            return False
        return not part.failures

    def unused(self) -> int:
        """Count the partial results with other settings, weights or videos."""
        return len(set(self.folder.glob("*.npz")) - set(self._paths))

    def write(self, shard: int, part: ShardFeatures) -> None:
        """Write a partial result.

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
        """Open a partial result for merging.

        Raises:
            InputError: it is missing or damaged.
        """
        found = _Opened(self._paths[shard], self._digests[shard])
        return FeaturePart(lambda: found.read("rows"), found.arrays, found.failures)

    def discard(self, shards: Sequence[int]) -> None:
        """Remove these partial results."""
        for shard in shards:
            self._paths[shard].unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Remove the folder with all partial results, including those with other settings."""
        with contextlib.suppress(OSError):
            for path in (*self.folder.glob("*.npz"), *self.folder.glob("*.npz.*.part")):
                path.unlink(missing_ok=True)
            self.folder.rmdir()


class _Opened:
    """The file of a partial result; arrays are read on demand.

    Raises:
        InputError: it cannot be read, or has another digest.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        if self.read("digest") != digest:
            raise self._damaged()
        self.failures: list[tuple[str, str, str]] = [tuple(row) for row in self.read("failures")]

    def read(self, name: str) -> Any:
        """Read one of the JSON values."""
        return json.loads(self._load(name)[name].tobytes())

    def arrays(self) -> tuple[Floats, Floats, Floats | None]:
        """Read features, halves and frames."""
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
            "delete it and run the same command again; all machines must see the folder",
        )


def part_digests(
    config: ExtractConfig, backbone: Backbone, device: str, indexes: Sequence[ShardIndex]
) -> list[str]:
    """Digests, per shard, of everything its features depend on.

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


_BATCH_ON_GPU, _BATCH_ON_CPU = 256, 16
_MOST_NAMED = 3


class Extraction:
    """What to extract, and what of it exists already.

    Args:
        config: as given.
        device: where the backbone will compute.
        backbone: replaces the checkpoint that ``config`` names.

    Raises:
        InputError: settings, shards, checkpoint or output folder cannot be used.
    """

    def __init__(
        self, config: ExtractConfig, device: torch.device, backbone: Backbone | None = None
    ) -> None:
        check_extract(config)
        if config.out:
            require_writable(Path(config.out))  # before anything that takes long
        self.shards = open_shards(config.shards)
        self.backbone = backbone or load_backbone(config.checkpoint, config.arch, config.seed)
        if backbone is None:
            require_size(self.backbone.arch, config.crop_size)
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
                f"already holds {other}, which would be lost with their results",
                self.out,
                "give another --out, or --overwrite",
            )

    def _other_features(self) -> str | None:
        """Describe finished features of another encoder, dataset or settings in the folder."""
        if not os.path.lexists(self.out / META):
            return None
        try:
            meta = read_meta(self.out / META)
        except InputError:
            return "features that cannot be read"
        if meta.get("digest") == self.digest:
            return None
        return f"features of {encoder_name(meta['encoder'])}"

    def done(self) -> bool:
        """Whether an earlier run has written everything."""
        return self._written(())

    def _written(self, failures: Sequence[tuple[str, str, str]]) -> bool:
        """Whether an earlier run has written everything except these videos."""
        try:
            meta = read_meta(self.out / META)
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
        """Whether each shard has a partial result that can be reused, (S,)."""
        return [self.parts.finished(shard) for shard in range(len(self.names))]

    def tell_of_parts(self, finished: Sequence[object]) -> None:
        """Report how much of an earlier run is reused, and what is not."""
        if there := sum(map(bool, finished)):
            tell(f"resuming: {there} of {len(finished)} shards are done")
        if unused := self.parts.unused():
            tell(f"ignoring {unused} finished shards with other settings or weights")

    def stopped(self, why: str) -> Stopped:
        """The message for a run that is stopped."""
        finished = self.finished()
        return Stopped(
            f"{why}: {sum(finished)} of {len(finished)} shards are done and kept in "
            f"{self.out / PARTS}; run the same command again to resume"
        )

    def keep(self, shard: int, part: ShardFeatures) -> None:
        """Write a partial result, and report the videos it lacks."""
        for key, _, reason in part.failures:
            tell(f"left out: {key}: {reason}")
        self.parts.write(shard, part)

    def write(self, before_each: Callable[[], None]) -> None:
        """Merge the partial results into the feature folder, then remove them.

        While videos are missing, the partial results are kept, and the same command retries the
        shards of these videos. If the same videos are missing again, nothing is written.

        Raises:
            InputError: no video could be read, a partial result is damaged, or the disk is full.
            TooManyExcluded: all is written, but more than ``max_failures`` percent is missing.
        """
        parts = [self.parts.open(shard) for shard in range(len(self.names))]
        failures = [row for part in parts for row in part.failures]
        if len(failures) == len(self.shards):
            raise InputError("no video could be read", self.config.shards, failures[0][2])
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
                f"({named}{more}); see errors.csv. To retry their shards, run the same command "
                f"again; {self.parts.folder} is kept for this"
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
    """Fill in the settings that depend on the dataset and the device."""
    return dataclasses.replace(
        config,
        frames=frames_of(config, dataset),
        batch_size=config.batch_size or (_BATCH_ON_GPU if device.type == "cuda" else _BATCH_ON_CPU),
        precision="bf16" if uses_bf16(config.precision, device) else "fp32",
    )


def dataset_of(shards: ShardSet) -> str:
    """Return the dataset's name from the first readable record."""
    for video in range(len(shards)):
        with contextlib.suppress(UnreadableFrame):
            return shards.record(video).dataset
    return ""


def feature_extractor(
    backbone: Backbone, device: torch.device, config: ExtractConfig
) -> FeatureExtractor:
    """Make a FeatureExtractor with these (resolved) settings."""
    return FeatureExtractor(
        backbone.network,
        device,
        precision=config.precision,
        channels_last=config.layout == "channels_last",
    )


def tell(message: str) -> None:
    """Print a line for the user."""
    say(f"seco extract-features: {message}")
