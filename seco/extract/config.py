"""Settings of ``seco extract-features``. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from seco.config import WORKERS_HELP
from shards.errors import InputError
from shards.settings import setting

ENGINES = ("local", "ray")
LAYOUTS = ("channels_last", "contiguous")
_FRAMES = 30  # paper §5.2
_FRAMES_OF = {"activitynet": 50}  # paper §5.2


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Frozen features, one vector a video (paper §5.2)."""

    shards: tuple[str, ...] = setting((), "shards: pattern, glob, manifest or folder")
    checkpoint: str = setting("", "checkpoint, ResNet state dict, or 'random'")
    out: str | None = setting(None, "feature folder [default: features/SET]")
    overwrite: bool = setting(
        False, "replace features of another encoder or other settings in --out, and their results"
    )
    arch: str | None = setting(
        None, "backbone of 'random' [default: resnet50]; else the checkpoint's"
    )
    frames: int | None = setting(
        None,
        "frames per video, evenly spaced from the first to the last; 1 is the middle frame "
        "[default: 30; 50 for ActivityNet]",
        source="paper §5.2",
    )
    short_edge: int = setting(256, "frames are resized to this short edge", source="paper §5.2")
    crop_size: int = setting(224, "centre crop", source="paper §5.2")
    per_frame: bool = setting(False, "also keep the feature of every frame, in frames.npy")
    batch_size: int | None = setting(
        None, "frames a forward, of several videos [default: 256 on a GPU, else 16]"
    )
    precision: str = setting(
        "auto", "bf16, fp32, or bf16 on a GPU and fp32 elsewhere", choices=("auto", "bf16", "fp32")
    )
    layout: str = setting("channels_last", "how images lie in memory", choices=LAYOUTS)
    device: str = setting("auto", "cpu, cuda, or a GPU when there is one")
    processes: int | None = setting(
        None, "processes on this machine [default: one a visible GPU, else 1]"
    )
    workers: int | None = setting(None, WORKERS_HELP)
    engine: str = setting("local", "this machine, or a Ray cluster", choices=ENGINES)
    ray_address: str | None = setting(None, "Ray cluster [default: RAY_ADDRESS, else a new one]")
    max_failures: float = setting(
        5.0, "exit with code 3 if more than this percentage of the videos cannot be read"
    )
    seed: int = setting(0, "seed of 'random' weights")


def frames_of(config: ExtractConfig, dataset: str) -> int:
    """How many frames a video of this data set; ``config`` may say."""
    return config.frames or _FRAMES_OF.get(dataset, _FRAMES)


def check_extract(config: ExtractConfig) -> None:
    """Refuse values that cannot work.

    Raises:
        InputError: named by its option.
    """
    for name in ("frames", "short_edge", "crop_size", "batch_size", "processes"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError("must be 1 or more", f"--{name.replace('_', '-')}")
    if (config.workers or 0) < 0:
        raise InputError("must be 0 or more", "--workers")
    if config.short_edge < config.crop_size:
        raise InputError(
            f"{config.short_edge} is smaller than the crop of {config.crop_size}", "--short-edge"
        )
    if not 0 <= config.max_failures <= 100:
        raise InputError("must be from 0 to 100", "--max-failures")
    if config.engine != "ray" and config.ray_address is not None:
        raise InputError("needs --engine ray", "--ray-address")
    if config.engine == "ray" and config.processes is not None:
        raise InputError("is for --engine local", "--processes", "leave it out")
