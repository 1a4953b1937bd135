"""``seco bench extract``: videos a second, beside bare forwards and the plain way."""

from __future__ import annotations

import dataclasses
import io
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from benchmarks.measuring import cpu_seconds, in_turns, machine
from seco.checkpoints.weights import load_backbone
from seco.config import IMAGENET_MEAN, IMAGENET_STD, ExtractConfig, check_extract
from seco.data.frames import FrameLoader, VideoFrames
from seco.data.transforms import normalise
from seco.features.extract import extract_features
from seco.features.plan import computing_threads, dataset_of, feature_extractor, resolved
from seco.processes.device import resolve_device, uses_bf16, wall_milliseconds
from shards.dataset import ShardSet
from shards.errors import InputError
from shards.opening import open_shards
from shards.progress import progress

_BARE_FRAMES = 512  # of one measurement of bare forwards, or all there are
_OURS, _PLAIN = "ours", "the plain way"
_BARE, _SIDE_BY_SIDE = "bare forwards", "bare forwards, side by side"


@dataclass
class ExtractBench:
    """All figures of a run."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    repeats: int
    videos_s: dict[str, float]  # medians, by wall clock
    ratios: dict[str, float]
    cpu_ms: dict[str, float]  # a frame, of all processes; medians
    decode_cpu_ms: dict[str, float]  # a frame: reading, decoding, cropping; medians


def bench_extract(config: ExtractConfig, repeats: int = 3) -> ExtractBench:
    """Measure on real shards.

    Args:
        config: shards, weights, sizes, device, precision; ``out`` is not written to.
        repeats: measurements of each figure.

    Raises:
        InputError: a setting that cannot work, or frames that cannot be read.
    """
    check_extract(config)
    if repeats < 1:
        raise InputError("must be 1 or more", "--repeats")
    device = resolve_device(config.device)
    shards = open_shards(config.shards)
    config = resolved(config, dataset_of(shards), device)
    assert config.frames is not None and config.batch_size is not None
    frames = VideoFrames(shards, config.frames, config.short_edge, config.crop_size)
    total = sum(int(frames.counts(shard).sum()) for shard in range(len(shards.counts)))
    ways = _Ways(config, device, shards, frames, total)
    ways.decode()  # refuses a set that is not whole, before anything is measured
    with progress("bench extract", 2 * repeats, "repeats") as bar:
        compared = {
            _OURS: ways.ours,
            _BARE: ways.bare,
            _SIDE_BY_SIDE: ways.side_by_side,
            _PLAIN: ways.plain,
        }
        clock = _Clocks(device)
        wall = in_turns(compared, repeats, clock.wall_ms, bar.advance)
        cpu = {name: clock.cpu_ms(work) for name, work in compared.items()}
        decodes = {_OURS: ways.decode, _PLAIN: ways.plain_decode}
        decoding = in_turns(decodes, repeats, after_each=bar.advance)
    for name in (_BARE, _SIDE_BY_SIDE):
        wall[name] *= total / ways.bare_frames
        cpu[name] *= total / ways.bare_frames
    found = machine("torch", "torchvision", "simplejpeg", "pillow", "pillow-simd", "numpy")
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return ExtractBench(
        machine=found,
        settings=_settings(config, device, shards, total),
        repeats=repeats,
        videos_s={name: 1e3 * len(shards) / value for name, value in wall.items()},
        ratios={
            "of bare forwards": wall[_BARE] / wall[_OURS],
            "of bare forwards side by side": wall[_SIDE_BY_SIDE] / wall[_OURS],
            "of bare forwards side by side, by CPU time": cpu[_SIDE_BY_SIDE] / cpu[_OURS],
            "times the plain way": wall[_PLAIN] / wall[_OURS],
            "times the plain way, by CPU time": cpu[_PLAIN] / cpu[_OURS],
            "decoding, times the plain way": decoding[_PLAIN] / decoding[_OURS],
        },
        cpu_ms={name: value / total for name, value in cpu.items()},
        decode_cpu_ms={name: value / total for name, value in decoding.items()},
    )


class _Clocks:
    """Wall clock and CPU time of the same calls: on a busy machine the second says more."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu: dict[Callable[[], object], list[float]] = {}

    def wall_ms(self, work: Callable[[], object]) -> float:
        """Do it once."""
        began = cpu_seconds()
        wall = wall_milliseconds(work, self._device)
        self._cpu.setdefault(work, []).append((cpu_seconds() - began) * 1e3)
        return wall

    def cpu_ms(self, work: Callable[[], object]) -> float:
        """The median of all times it was done."""
        return statistics.median(self._cpu[work])


class _Ways:
    """What is compared. Each call goes over the whole set, bare forwards over a part of it."""

    def __init__(
        self,
        config: ExtractConfig,
        device: torch.device,
        shards: ShardSet,
        frames: VideoFrames,
        total: int,
    ) -> None:
        self._config = config
        self._device = device
        self._shards = shards
        self._frames = frames
        assert config.batch_size is not None
        self._batch = min(config.batch_size, total)
        self._batches = max(1, min(total, _BARE_FRAMES) // self._batch)
        self.bare_frames = self._batches * self._batch
        self._bf16 = uses_bf16(config.precision, device)
        self._format = (
            torch.channels_last if config.layout == "channels_last" else torch.contiguous_format
        )
        self._backbone = load_backbone(config.checkpoint, config.arch, config.seed)
        size = config.crop_size
        crops = np.random.default_rng(0).integers(0, 256, (self._batch, size, size, 3))
        self._crops = crops.astype(np.uint8)
        self._transform = transforms.Compose(
            [
                transforms.Resize(config.short_edge),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def ours(self) -> None:
        """From the command's settings to a feature folder, the weights' loading included."""
        with tempfile.TemporaryDirectory(prefix="seco-bench-") as out:
            config = dataclasses.replace(self._config, out=str(Path(out, "features")))
            extract_features(config, quiet=True)

    def bare(self) -> None:
        """Forward passes of one normalised batch, again and again, as torch does them by itself."""
        network = self._network()
        images = normalise(torch.from_numpy(self._crops).to(self._device).permute(0, 3, 1, 2))
        images = images.contiguous(memory_format=self._format)
        for _ in range(self._batches):
            self._forward(network, images)

    def side_by_side(self) -> None:
        """The same as ours does them, without a loader."""
        running: list[Future[Any]] = []
        with feature_extractor(self._backbone, self._device, self._config) as forwards:
            for number in range(self._batches):
                running.append(forwards.submit([self._crops]))
                if number >= forwards.at_once:
                    running[number - forwards.at_once].result()
            for future in running:
                future.result()

    def plain(self) -> None:
        """Video after video: PIL, torchvision's transforms, a forward; all in one process."""
        network = self._network()
        for images in self._plain_images():
            self._forward(network, images.to(self._device)).float().mean(0).cpu()

    def decode(self) -> None:
        """The loader alone, without processes of its own."""
        numbers = range(len(self._shards.counts))
        loader = FrameLoader(self._frames, numbers, self._batch, workers=0, kept=1)
        with loader:
            for batch in loader:
                if batch.failures:
                    reason = next(iter(batch.failures.values()))
                    raise InputError(f"some frames cannot be read ({reason})")
                loader.release(batch)

    def plain_decode(self) -> None:
        """PIL and torchvision's transforms alone."""
        for _ in self._plain_images():
            pass

    def _plain_images(self) -> Iterator[Tensor]:
        """For each video (F, 3, S, S)."""
        for video in range(len(self._shards)):
            pictures = [
                Image.open(io.BytesIO(self._shards.read_frame(video, number))).convert("RGB")
                for number in self._frames.numbers(video)
            ]
            yield torch.stack([self._transform(picture) for picture in pictures])

    def _network(self) -> nn.Module:
        if self._device.type == "cpu":
            torch.set_num_threads(computing_threads())
        network = self._backbone.network.to(self._device, memory_format=self._format)  # type: ignore[call-overload]
        made: nn.Module = network.eval()
        return made

    def _forward(self, network: nn.Module, images: Tensor) -> Tensor:
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16),
        ):
            features: Tensor = network(images)
        return features


def _settings(
    config: ExtractConfig, device: torch.device, shards: ShardSet, total: int
) -> dict[str, Any]:
    names = ("arch", "crop_size", "batch_size", "precision", "layout", "workers")
    found = {name: getattr(config, name) for name in names}
    return found | {"device": device.type, "videos": len(shards), "frames": total}
