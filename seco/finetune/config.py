"""Settings of ``seco finetune`` and ``seco finetune-eval``. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from seco.config import WORKERS_HELP, TrainingConfig, largest_part
from shards.atomic import default_folder
from shards.errors import InputError
from shards.settings import require, setting

FREEZE_BN = ("all-but-first", "all", "none")
_BN_CLIPS = 16  # authors' code: a GPU's part of the batch
_EPOCHS, _DECAY_EPOCHS = 150, (50, 100)  # authors' code


@dataclass(frozen=True, kw_only=True)
class FinetuneTestConfig:
    """``seco finetune-eval``: a test protocol, by default its run's, on a fine-tuned checkpoint."""

    shards: tuple[str, ...] = setting((), "shards: pattern, glob, manifest or folder")
    checkpoint: str = setting("", "a checkpoint of `seco finetune`")
    out: str | None = setting(None, "folder of the results [default: the checkpoint's]")
    clips: int | None = setting(None, "clips of a test video [default: the run's]")
    clip_frames: int | None = setting(None, "consecutive frames of a clip [default: the run's]")
    crops: int | None = setting(None, "crops of a clip: 1 or 3 [default: the run's]")
    test_size: int | None = setting(
        None, "side of the crops and short edge of the frames, px [default: the run's]"
    )
    max_failures: float = setting(
        5.0,
        "exit with code 3 if more than this percentage of the test videos cannot be read",
        resumable=True,
    )
    test_frames: int = setting(
        32, "frames of a test video whose crops make one forward", resumable=True
    )
    precision: str = setting(
        "auto", "bf16, fp32, or bf16 on a GPU and fp32 elsewhere", choices=("auto", "bf16", "fp32")
    )
    device: str = setting("auto", "cpu, cuda, or a GPU when there is one", resumable=True)
    processes: int | None = setting(
        None, "processes on this machine [default: one a visible GPU, else 1]", resumable=True
    )
    workers: int | None = setting(None, WORKERS_HELP, resumable=True)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(FinetuneTestConfig, TrainingConfig):
    """``seco finetune``: a whole network trained on labelled videos (paper §5.2, authors' code)."""

    dataset: str | None = setting(
        None, "name of the set [default: what the shards say]", resumable=True
    )
    shards: tuple[str, ...] = setting(
        (), "its shards [default: DATASET.json where `seco prepare` puts it]", resumable=True
    )
    checkpoint: str = setting(
        "", "pre-trained checkpoint, ResNet state dict, or 'random'", resumable=True
    )
    out: str | None = setting(
        None, "folder of the run [default: runs/DATASET-finetune-SPLIT]", resumable=True
    )
    split: str = setting("1", "official split")
    arch: str | None = setting(
        None, "backbone of 'random' [default: resnet50]; else the checkpoint's", resumable=True
    )
    epochs: int = setting(_EPOCHS, "epochs", source="authors' code")
    batch_size: int = setting(256, "global batch, in videos", source="authors' code: 16 x 4 x 4")
    lr: float = setting(1e-3, "learning rate at the start", source="authors' code")
    lr_decay_epochs: str | None = setting(
        None,
        "epochs after which it is divided by ten, separated by commas, or 'none' "
        "[default: 50,100 of 150, in proportion]",
        source="authors' code",
    )
    momentum: float = setting(0.9, "SGD momentum, Nesterov's", source="authors' code")
    weight_decay: float = setting(1e-4, "weight decay, on every parameter", source="authors' code")
    clip_norm: float = setting(40.0, "largest norm of the gradient", source="authors' code")
    segments: int = setting(7, "segments of a video, one frame of each", source="authors' code")
    dropout: float = setting(0.9, "share of the feature that is dropped", source="authors' code")
    freeze_bn: str = setting(
        "all-but-first",
        "BatchNorm layers that keep statistics, weight and bias",
        choices=FREEZE_BN,
        source="authors' code",
    )
    bn_group: int | None = setting(
        None,
        "clips normalised together by the BatchNorm layers that are not frozen [default: 16, or "
        "the largest number below that divides a process's share]",
        source="authors' code",
    )
    accumulate: int | None = setting(
        None,
        "cut a process's share into so many parts, for memory [default: parts of a BN group]",
        resumable=True,
    )
    crop_size: int = setting(224, "side of a training view in px", source="authors' code")
    clips: int = setting(20, "clips of a test video", source="authors' code", resumable=True)
    clip_frames: int = setting(
        16, "consecutive frames of a clip", source="authors' code", resumable=True
    )
    crops: int = setting(3, "crops of a clip: 1 or 3", source="authors' code", resumable=True)
    test_size: int = setting(
        256,
        "side of the crops and short edge of the frames, px",
        source="authors' code",
        resumable=True,
    )
    min_crop_area: float = setting(
        0.2, "smallest area of a random crop, of the frame's", source="authors' code"
    )
    validate_every_epochs: int = setting(
        10,
        "epochs between quick validations: one clip of the segments' middles, centre crop",
        resumable=True,
    )
    skip_test: bool = setting(
        False, "leave the test after training to `seco finetune-eval`", resumable=True
    )
    checkpoint_every_steps: int = setting(100, "steps between saves of last.pt", resumable=True)

    def decay_epochs(self) -> tuple[int, ...]:
        """After which the learning rate falls.

        Raises:
            InputError: ``lr_decay_epochs`` is no list of whole numbers.
        """
        if self.lr_decay_epochs is None:
            share = self.epochs / _EPOCHS
            return tuple(sorted({max(1, round(share * epoch)) for epoch in _DECAY_EPOCHS}))
        if self.lr_decay_epochs.strip() in ("", "none"):
            return ()
        try:
            epochs = tuple(int(part) for part in self.lr_decay_epochs.split(","))
        except ValueError:
            epochs = (0,)
        if min(epochs) < 1:
            raise InputError(
                f"{self.lr_decay_epochs!r} is no list of epochs", "--lr-decay-epochs", "as 50,100"
            )
        return tuple(sorted(set(epochs)))


PROTOCOL = ("clips", "clip_frames", "crops", "test_size")  # of a test


def resolve_finetune(config: FinetuneConfig, processes: int = 1) -> FinetuneConfig:
    """Fill in defaults that depend on other settings, and refuse values that cannot work.

    Args:
        config: as given.
        processes: of the run, on all machines.

    Raises:
        InputError: a value out of range, named by its option.
    """
    if not config.shards and config.dataset is None:
        raise InputError("is named neither by DATASET nor by --shards", "the set")
    shards = config.shards or (f"{default_folder()}/{config.dataset}.json",)
    require(config.batch_size >= 1, "batch_size", "must be 1 or more")
    require(
        config.batch_size % processes == 0,
        "batch_size",
        f"{config.batch_size} does not divide over {processes} processes",
    )
    share = config.batch_size // processes
    for name in ("bn_group", "accumulate"):
        require(getattr(config, name) != 0, name, "must be 1 or more")
    group = config.bn_group or largest_part(share, min(_BN_CLIPS, share))
    parts = config.accumulate or max(1, share // group)
    _require_finetune_ranges(config)
    require(
        parts >= 1 and share % parts == 0,
        "accumulate",
        f"must divide a process's share of {share}",
    )
    require(
        group >= 1 and (share // parts) % group == 0,
        "bn_group",
        f"must divide a process's part of {share // parts}",
    )
    decay = ",".join(map(str, config.decay_epochs())) or "none"
    return dataclasses.replace(
        config, shards=shards, bn_group=group, accumulate=parts, lr_decay_epochs=decay
    )


def require_test_ranges(config: FinetuneTestConfig) -> None:
    """Refuse values of the test protocol that cannot work; those not given yet are not looked at.

    Raises:
        InputError: a value out of range, named by its option.
    """
    for name in (*PROTOCOL, "test_frames"):
        value = getattr(config, name)
        require(value is None or value >= 1, name, "must be 1 or more")
    require(config.crops in (None, 1, 3), "crops", "must be 1 or 3")
    require((config.workers or 0) >= 0, "workers", "must not be negative")
    require(config.processes is None or config.processes >= 1, "processes", "must be 1 or more")


def _require_finetune_ranges(config: FinetuneConfig) -> None:
    require_test_ranges(config)
    for name in ("epochs", "segments", "crop_size", "log_every", "checkpoint_every_steps", "keep"):
        require(getattr(config, name) >= 1, name, "must be 1 or more")
    for name in ("validate_every_epochs", "keep_every_epochs"):
        require(getattr(config, name) >= 1, name, "must be 1 or more")
    for name in ("lr", "clip_norm"):
        require(0 < getattr(config, name) < float("inf"), name, "must be above 0")
    require(0 < config.momentum < 1, "momentum", "must be above 0 and below 1: it is Nesterov's")
    require(0 <= config.dropout < 1, "dropout", "must be 0 or more and below 1")
    require(config.weight_decay >= 0, "weight_decay", "must not be negative")
    require(0 < config.min_crop_area <= 1, "min_crop_area", "must be above 0 and at most 1")
