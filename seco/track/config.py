"""Settings of ``seco track train``, ``eval`` and ``run``; every default with its source. No torch.

"SiamFC" is Bertinetto et al., "Fully-convolutional Siamese networks for object tracking" (ECCV
Workshops 2016), in the values of its public PyTorch code; the authors of SeCo name it and give no
others (paper §5.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from seco.config import TrainingConfig
from shards.errors import InputError
from shards.settings import require, setting

FEATURE_LAYERS = ("layer2", "layer3", "layer4")
STRIDE = 8  # px of the image that a cell of the features stands for (paper §5.2)
EXEMPLAR_PX = 127  # SiamFC
SEARCH_PX = 255  # SiamFC, when tracking
TRAIN_SEARCH_PX = 239  # SiamFC: what a random crop leaves of the 255
CONTEXT = 0.5  # SiamFC: of the box's width and height together, around it
OTB_SEQUENCES = 100
OTB = "otb100"  # the data set's name in its records


def response_cells(search_px: int) -> int:
    """Side of the response to a search crop of so many px: 17 cells of 255, 15 of 239."""
    return (search_px - EXEMPLAR_PX) // STRIDE + 1


@dataclass(frozen=True, kw_only=True)
class TrackTrainConfig(TrainingConfig):
    """``seco track train``: the 1×1 convolution of SiamFC on a frozen backbone."""

    shards: tuple[str, ...] = setting(
        (), "tracking shards to train on, for example GOT-10k's", resumable=True
    )
    checkpoint: str = setting(
        "", "backbone: checkpoint, ResNet state dict, or 'random'", resumable=True
    )
    out: str | None = setting(None, "folder of the run [default: runs/track-SET]", resumable=True)
    arch: str | None = setting(
        None, "backbone of 'random' [default: resnet50]; else the checkpoint's"
    )
    feature_layer: str = setting(
        "layer4", "stage whose features are used", source="paper §5.2", choices=FEATURE_LAYERS
    )
    channels: int = setting(256, "outputs of the 1×1 convolution", source="SiamFC")
    convolutions: str = setting(
        "shared",
        "one 1×1 convolution for exemplar and search, or one for each",
        source="paper §5.2",
        choices=("shared", "separate"),
    )
    raw_features: bool = setting(
        False, "do not standardise the features' channels before the convolution"
    )
    response_scale: float = setting(1e-3, "factor of the correlation", source="SiamFC")
    epochs: int = setting(50, "epochs", source="SiamFC")
    pairs_per_sequence: int = setting(1, "pairs of a sequence an epoch", source="SiamFC")
    max_gap: int = setting(99, "frames between exemplar and search, at most", source="SiamFC")
    batch_size: int = setting(8, "global batch, in pairs", source="SiamFC")
    lr: float = setting(1e-2, "learning rate of the first epoch", source="SiamFC")
    final_lr: float = setting(1e-5, "learning rate it falls to, geometrically", source="SiamFC")
    momentum: float = setting(0.9, "SGD momentum", source="SiamFC")
    weight_decay: float = setting(5e-4, "weight decay", source="SiamFC")
    positive_radius: float = setting(
        16.0, "px from the centre, city-block, that are the target", source="SiamFC"
    )
    max_stretch: float = setting(0.05, "random change of scale, up and down", source="SiamFC")
    window_shards: int | None = setting(
        None, "shuffle within so many shards, 0: all [default: 64 with --cache-dir, else all]"
    )
    cache_dir: str | None = setting(
        None, "keep remote shards in this folder of this machine", resumable=True
    )
    cache_gb: float = setting(100.0, "gigabytes they may take there", resumable=True)
    keep_every_epochs: int = setting(10, "epochs between checkpoints that are kept", resumable=True)


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """How a trained tracker follows its target: SiamFC's inference."""

    tracker: str = setting("", "a last.pt of `seco track train`")
    scales: int = setting(3, "scales that are searched, an odd number", source="SiamFC")
    scale_step: float = setting(1.0375, "between one scale and the next", source="SiamFC")
    scale_penalty: float = setting(0.9745, "factor of the other scales' scores", source="SiamFC")
    scale_update: float = setting(0.59, "share of a change of scale taken over", source="SiamFC")
    window: float = setting(0.176, "share of the Hann window in the response", source="SiamFC")
    upsampling: int = setting(16, "of the response, cubic", source="SiamFC")
    precision: str = setting("fp32", "bf16 or fp32", choices=("bf16", "fp32"))
    device: str = setting("auto", "cpu, cuda, or a GPU when there is one")


@dataclass(frozen=True, kw_only=True)
class TrackEvalConfig(TrackerConfig):
    """``seco track eval``: one-pass evaluation."""

    shards: tuple[str, ...] = setting((), "shards of sequences, for example OTB-100's")
    out: str | None = setting(None, "folder of the results [default: RUN/eval-SET]")
    name: str = setting("seco", "the tracker's name in results and plots")
    video: bool = setting(False, "write an mp4 a sequence, with its boxes")


@dataclass(frozen=True, kw_only=True)
class TrackRunConfig(TrackerConfig):
    """``seco track run``: follow one target through a video file."""

    video: str = setting("", "video file")
    box: str = setting("", "x,y,w,h of the target in the first frame, px; the first pixel is 1")
    out: str | None = setting(None, "boxes, a CSV file [default: VIDEO.boxes.csv here]")
    out_video: str | None = setting(None, "mp4 with the box [default: VIDEO.tracked.mp4 here]")


def check_training(config: TrackTrainConfig, processes: int = 1) -> None:
    """Refuse settings that cannot work on so many processes.

    Raises:
        InputError: a value out of range, named by its option.
    """
    for name in ("channels", "epochs", "pairs_per_sequence", "max_gap", "batch_size", "log_every"):
        require(getattr(config, name) >= 1, name, "must be 1 or more")
    for name in ("checkpoint_every_steps", "keep_every_epochs", "keep"):
        require(getattr(config, name) >= 1, name, "must be 1 or more")
    for name in ("lr", "final_lr", "response_scale", "cache_gb"):
        require(0 < getattr(config, name) < float("inf"), name, "must be above 0")
    require(0 <= config.momentum < 1, "momentum", "must be 0 or more and below 1")
    require(config.weight_decay >= 0, "weight_decay", "must not be negative")
    require(0 <= config.max_stretch < 1, "max_stretch", "must be 0 or more and below 1")
    half_px = (TRAIN_SEARCH_PX - EXEMPLAR_PX) / 2
    require(
        0 <= config.positive_radius < 2 * half_px,
        "positive_radius",
        f"must be from 0 to below {2 * half_px:g}: elsewhere than the target must remain",
    )
    require((config.workers or 0) >= 0, "workers", "must not be negative")
    require((config.window_shards or 0) >= 0, "window_shards", "must not be negative")
    require(config.processes is None or config.processes >= 1, "processes", "must be 1 or more")
    require(
        config.batch_size % processes == 0,
        "batch_size",
        f"{config.batch_size} does not divide over {processes} processes",
    )


def check_tracker(config: TrackerConfig) -> None:
    """Refuse settings of the inference that cannot work.

    Raises:
        InputError: a value out of range, named by its option.
    """
    require(config.scales >= 1 and config.scales % 2 == 1, "scales", "must be odd: 1, 3, 5, …")
    require(1 <= config.scale_step < 2, "scale_step", "must be from 1 to below 2")
    require(0 < config.scale_penalty <= 1, "scale_penalty", "must be above 0 and at most 1")
    require(0 <= config.scale_update <= 1, "scale_update", "must be from 0 to 1")
    require(0 <= config.window <= 1, "window", "must be from 0 to 1")
    require(1 <= config.upsampling <= 64, "upsampling", "must be from 1 to 64")


def parse_box(text: str) -> tuple[float, float, float, float]:
    """``x,y,w,h`` of ``--box``.

    Raises:
        InputError: not four numbers, or nothing inside.
    """
    try:
        x, y, width, height = (float(word) for word in text.split(","))
    except ValueError as error:
        raise InputError(f"{text!r} is not x,y,w,h", "--box", "for example 120,80,40,60") from error
    box = (x, y, width, height)
    if not all(abs(number) < 1e6 for number in box) or width <= 0 or height <= 0:
        raise InputError(f"{text!r} holds no pixels", "--box", "width and height are above 0")
    return box
