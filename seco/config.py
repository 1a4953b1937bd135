"""Settings of a pre-training run; every default with its source. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from shards.errors import InputError
from shards.settings import require as _require
from shards.settings import setting

TASKS = ("inter", "intra", "order")
WORKERS_HELP = (
    "loader workers per process; never changes a result [default: 2 on the CPU; on a GPU the "
    "process's cores less two, 2 to 16]"
)

# Where the paper and its authors' code differ, a setting of None takes the preset's value.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "heads": "shared",  # §5.2 "an MLP head"
        "intra": "three-way",  # Eq. 3
        "sampling": "uniform",  # §4.1
        "queue_init": "unit",  # MoCo's; the paper is silent
        "warmup_epochs": 0,  # §5.2 names a cosine only
        "final_lr": 0.0,  # §5.2 "annealed down to zero"
    },
    "authors": {
        "heads": "separate",
        "intra": "pairwise",
        "sampling": "halves",
        "queue_init": "uniform",
        "warmup_epochs": 5,
        "final_lr": 1e-6,
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What pre-training, fine-tuning and tracking are told alike."""

    precision: str = setting(
        "auto", "bf16, fp32, or bf16 on a GPU and fp32 elsewhere", choices=("auto", "bf16", "fp32")
    )
    device: str = setting("auto", "cpu, cuda, or a GPU when there is one", resumable=True)
    processes: int | None = setting(
        None,
        "processes on this machine [default: one a visible GPU, else 1]",
        resumable=True,
    )
    workers: int | None = setting(None, WORKERS_HELP, resumable=True)
    seed: int = setting(0, "seed of every random draw")
    max_unreadable: float = setting(
        1.0, "stop when this percentage of the samples is unreadable", resumable=True
    )
    log_every: int = setting(10, "steps between lines of metrics.jsonl", resumable=True)
    resume: str | None = setting(
        None, "'auto' (the run's last.pt if there is one) or a checkpoint", resumable=True
    )
    checkpoint_every_steps: int = setting(1000, "steps between saves of last.pt", resumable=True)
    keep_every_epochs: int = setting(
        100, "epochs between checkpoints that are kept", resumable=True
    )
    keep: int = setting(5, "how many of those are kept, the newest", resumable=True)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """``seco pretrain``: one value for every switch of the method and the run."""

    shards: tuple[str, ...] = setting(
        (), "shards to train on: pattern, glob, manifest or folder", resumable=True
    )
    split: str | None = setting(
        None, "train on the training videos of this official split only [default: all videos]"
    )
    out: str | None = setting(None, "folder of the run [default: runs/SET]", resumable=True)
    preset: str = setting(
        "paper",
        "whose variant where paper and authors' code differ",
        choices=tuple(PRESETS),
        resumable=True,
    )
    tasks: str = setting(
        "inter,intra,order", "proxy tasks, separated by commas", source="paper Eq. 5, Table 1"
    )
    arch: str = setting(
        "resnet50",
        "backbone: a torchvision ResNet, or for small images resnet10_w32, resnet18_cifar, …",
        source="paper §5.2",
    )
    init: str | None = setting(
        None, "start from this checkpoint or ResNet state dict", resumable=True
    )
    epochs: int = setting(400, "epochs", source="paper §5.2")
    batch_size: int = setting(512, "global batch, in videos", source="paper §5.2")
    lr: float | None = setting(
        None,
        "peak learning rate [default: 0.2; with --preset authors 0.1 x batch size / 256]",
        source="paper §5.2",
    )
    momentum: float = setting(0.9, "SGD momentum", source="authors' code")
    weight_decay: float = setting(1e-4, "weight decay, on every parameter", source="authors' code")
    warmup_epochs: int | None = setting(None, "epochs of linear warm-up from lr/100")
    final_lr: float | None = setting(None, "learning rate at the end of the cosine")
    queue_size: int = setting(
        131_072,
        "keys kept as negatives; 0: those of the batch's other videos alone, as in MoCo v3",
        source="paper §5.2",
    )
    queue_init: str | None = setting(
        None, "the queue's first rows: unit vectors, or uniform", choices=("unit", "uniform")
    )
    mask_same_video: bool = setting(False, "leave queue rows of the query's own video out")
    temperature: float = setting(0.1, "temperature of inter", source="paper §5.2")
    intra_temperature: float = setting(0.1, "temperature of intra", source="paper §5.2")
    ema: float = setting(0.999, "momentum of the key encoder", source="paper §5.2, Eq. 6")
    heads: str | None = setting(
        None, "one MLP head, or one for each task", choices=("shared", "separate")
    )
    embedding_dim: int = setting(128, "width of the embedding", source="paper §5.2")
    intra: str | None = setting(None, "form of the intra loss", choices=("three-way", "pairwise"))
    sampling: str | None = setting(None, "frames of a triplet", choices=("uniform", "halves"))
    crop_size: int = setting(224, "side of a view in px", source="paper §5.2")
    min_crop_area: float = setting(
        0.2, "smallest area of a random crop, of the frame's", source="authors' code"
    )
    bn_group: int | None = setting(
        None,
        "images normalised together by shuffled BatchNorm [default: a quarter of the batch, or "
        "what of that divides a process's share]",
        source="authors' code: 4 ranks of 128",
    )
    accumulate: int = setting(
        1, "accepted and ignored: every BatchNorm group is a micro-batch of its own", resumable=True
    )
    channels_last: bool | None = setting(
        None, "keep images and weights channels last in memory [default: on a GPU]", resumable=True
    )
    compile: bool | None = setting(
        None, "compile the encoders with torch.compile [default: on a GPU]", resumable=True
    )
    decode: str = setting(
        "cpu", "who decodes the frames: loader processes, or the GPU", choices=("cpu", "nvjpeg")
    )
    views_on: str = setting(
        "device",
        "where crops become views: on the training device, or in the loader processes",
        choices=("device", "workers"),
    )
    window_shards: int | None = setting(
        None, "shuffle within so many shards, 0: all [default: 64 with --cache-dir, else all]"
    )
    cache_dir: str | None = setting(
        None, "keep remote shards in this folder of this machine", resumable=True
    )
    cache_gb: float = setting(100.0, "gigabytes they may take there", resumable=True)
    steps_per_epoch: int | None = setting(None, "length of an epoch of shards without index")
    knn_shards: tuple[str, ...] = setting(
        (), "labelled shards for an online kNN every few epochs", resumable=True
    )
    knn_every_epochs: int = setting(10, "epochs between these", resumable=True)


def task_list(config: PretrainConfig) -> tuple[str, ...]:
    """The tasks in the order of Eq. 5.

    Raises:
        InputError: an unknown task, or none.
    """
    named = [task.strip() for task in config.tasks.split(",") if task.strip()]
    unknown = [task for task in named if task not in TASKS]
    if unknown or not named:
        raise InputError(
            f"unknown task {unknown[0]!r}" if unknown else "names no task",
            "--tasks",
            f"choose from {','.join(TASKS)}",
        )
    return tuple(task for task in TASKS if task in named)


def resolve_pretrain(config: PretrainConfig, processes: int = 1) -> PretrainConfig:
    """Fill in what the preset decides, and refuse values that cannot work.

    Args:
        config: as given.
        processes: of the run, on all machines.

    Raises:
        InputError: a value out of range, named by its option.
    """
    chosen = {
        name: value
        for name, value in PRESETS[config.preset].items()
        if getattr(config, name) is None
    }
    _require(config.batch_size >= 2, "batch_size", "must be 2 or more: BatchNorm needs two images")
    _require(
        config.batch_size % processes == 0,
        "batch_size",
        f"{config.batch_size} does not divide over {processes} processes",
    )
    share = config.batch_size // processes
    if config.bn_group is None:
        chosen["bn_group"] = _default_group(config.batch_size, share)
    if config.lr is None:
        chosen["lr"] = _default_lr(config)
    resolved = dataclasses.replace(config, **chosen, tasks=",".join(task_list(config)))
    _require_ranges(resolved, share)
    return resolved


def negative_count(queue_size: int, batch_size: int) -> int:
    """K of Eq. 2: the rows of the queue, or without one the keys of the batch's other videos."""
    return queue_size or 3 * (batch_size - 1)


def peak_lr(config: PretrainConfig) -> float:
    """The peak learning rate of resolved settings."""
    assert config.lr is not None
    return config.lr


def _default_lr(config: PretrainConfig) -> float:
    """0.2 (paper §5.2), or the authors' 0.1 x batch size / 256: the same at a batch of 512."""
    return config.batch_size / 2560 if config.preset == "authors" else 0.2


def _default_group(batch_size: int, share: int) -> int:
    """A quarter of the batch, or the largest part of a process's share that is no larger."""
    return largest_part(share, max(2, min(batch_size // 4, share)))


def largest_part(share: int, most: int) -> int:
    """The largest number from 2 to ``most`` that divides ``share``; itself if there is none."""
    return next((size for size in range(most, 1, -1) if share % size == 0), share)


def _require_ranges(config: PretrainConfig, share: int) -> None:
    _require(config.queue_size >= 0, "queue_size", "must not be negative")
    for name in ("epochs", "crop_size", "embedding_dim", "log_every", "keep"):
        _require(getattr(config, name) >= 1, name, "must be 1 or more")
    for name in ("checkpoint_every_steps", "keep_every_epochs", "knn_every_epochs"):
        _require(getattr(config, name) >= 1, name, "must be 1 or more")
    for name in ("lr", "temperature", "intra_temperature"):
        _require(0 < getattr(config, name) < float("inf"), name, "must be above 0")
    for name in ("momentum", "ema"):
        _require(0 <= getattr(config, name) < 1, name, "must be 0 or more and below 1")
    for name in ("window_shards", "steps_per_epoch"):
        _require((getattr(config, name) or 0) >= 0, name, "must not be negative")
    _require(config.steps_per_epoch != 0, "steps_per_epoch", "must be 1 or more")
    _require(config.cache_gb > 0, "cache_gb", "must be above 0")
    _require(
        config.decode == "cpu" or config.views_on == "device",
        "views_on",
        "must be device when the GPU decodes",
    )
    _require(config.weight_decay >= 0, "weight_decay", "must not be negative")
    _require((config.workers or 0) >= 0, "workers", "must not be negative")
    _require(config.accumulate >= 1, "accumulate", "must be 1 or more")
    _require(0 < config.min_crop_area <= 1, "min_crop_area", "must be above 0 and at most 1")
    _require(config.processes is None or config.processes >= 1, "processes", "must be 1 or more")
    group = config.bn_group or 0
    whole = f"the batch of {share}" if share == config.batch_size else f"a process's {share} rows"
    _require(group >= 2 and share % group == 0, "bn_group", f"must be 2 or more and divide {whole}")
    warmup = config.warmup_epochs or 0
    _require(0 <= warmup <= config.epochs, "warmup_epochs", "must not exceed --epochs")
