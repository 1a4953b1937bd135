"""Settings of ``seco extract-features``. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from shards.settings import setting


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Frozen features, one vector a video (paper §5.2)."""

    shards: tuple[str, ...] = setting((), "shards: pattern, glob, manifest or folder")
    checkpoint: str = setting("", "checkpoint, ResNet state dict, or 'random'")
    out: str | None = setting(None, "feature folder [default: features/SET]")
    arch: str | None = setting(None, "torchvision ResNet; needed for 'random' alone")
    frames: int = setting(30, "frames a video, evenly spaced", source="paper §5.2; ActivityNet 50")
    short_edge: int = setting(256, "frames are resized to this short edge", source="paper §5.2")
    crop_size: int = setting(224, "centre crop", source="paper §5.2")
    batch_size: int = setting(64, "frames a forward")
    device: str = setting("auto", "cpu, cuda, or a GPU when there is one")
    workers: int = setting(2, "loader processes; never changes a result")
    seed: int = setting(0, "seed of 'random' weights")
