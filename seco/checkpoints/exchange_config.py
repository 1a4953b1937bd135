"""Settings of ``seco import`` and ``seco export``. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from shards.settings import setting

EXPORT_FORMATS = ("torchvision", "safetensors", "moco", "seco-authors")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """A file of any known layout to a checkpoint of this toolkit."""

    file: str = setting("", "MoCo, SeCo of its authors, ResNet state dict, or safetensors")
    out: str = setting("", "the checkpoint to write")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A checkpoint of this toolkit to another layout."""

    file: str = setting("", "a checkpoint, for example a run's last.pt")
    format: str = setting("", "layout to write", choices=EXPORT_FORMATS)
    out: str = setting("", "the file to write")
