"""Entry points of PyTorch Hub, which reads this file from the repository's root."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

dependencies = ["torch", "torchvision", "msgspec", "safetensors", "simplejpeg"]


def seco_backbone(weights: str, arch: str | None = None) -> nn.Module:
    """Frozen backbone of a checkpoint: normalised images (N, 3, H, W) to features (N, C).

    ``torch.hub.load("path/to/repository", "seco_backbone", source="local", weights="last.pt")``

    Args:
        weights: a file that :func:`seco.load_backbone` reads, or ``random``.
        arch: architecture for ``random``; for a file, checked if given.

    Returns:
        The module, in evaluation mode; its ``transform`` makes an input from an image.

    Raises:
        InputError: the file cannot be used.
    """
    # Not at the top: the hub checks the dependencies after importing this file.
    from seco.checkpoints.weights import load_backbone

    return load_backbone(weights, arch)
