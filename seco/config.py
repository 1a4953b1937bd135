"""Settings of every command: one frozen dataclass each, every default with its source.

Nothing here imports torch or faiss, so `--help` stays fast. "SiamFC" is Bertinetto et al.,
"Fully-convolutional Siamese networks for object tracking" (ECCV Workshops 2016), with the values of
its public PyTorch code; the authors of SeCo name it and give no others (paper §5.2).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from shards.atomic import default_folder
from shards.errors import InputError
from shards.settings import require, setting
from shards.settings import require as _require

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
    loggers: str = setting(
        "tensorboard",
        "where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, several with commas "
        "between them, or none",
        resumable=True,
    )
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
        chosen["bn_group"] = default_group(config.batch_size, share)
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


def default_group(batch_size: int, share: int | None = None) -> int:
    """A quarter of the batch, or the largest part of a rank's ``share`` that is no larger."""
    share = share or batch_size
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


SPLIT_HELP = 'split to use [default: "1", else "official", else the only one]'
HELD_OUT_HELP = f'{SPLIT_HELP}; "held-out" tests on 30 % of the labelled videos'
TEST_HELP = "rows of the split to test on [default: test, or val where test has no labels]"
TEST_FEATURES_HELP = "feature folder of the test videos, if they are a set of their own"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """``seco probe``: a classifier on frozen features (paper §5.2)."""

    features: str = setting("", "feature folder of `seco extract-features`")
    test_features: str | None = setting(None, TEST_FEATURES_HELP)
    out: str | None = setting(
        None,
        "folder of the results [default: the feature folder; for other methods and splits than "
        "the usual a folder in it]",
    )
    split: str | None = setting(None, HELD_OUT_HELP)
    train_split: str = setting("train", "rows of the split to train on")
    test_split: str | None = setting(None, TEST_HELP)
    method: str = setting(
        "svm", "classifier", choices=("svm", "knn", "linear"), source="paper §5.2"
    )
    c: float = setting(1.0, "the SVM's C", flag="-C", source="authors' code")
    tolerance: float | None = setting(
        None,
        "stop the SVM where LIBLINEAR's -s 2 stops at this tolerance (the authors' is 0.01) "
        "[default: solve it exactly]",
    )
    sweep: str | None = setting(
        None,
        "choose C among these on a fifth of the training videos, for example 0.01,0.1,1,10; "
        "then -C is not used",
    )
    normalise: str = setting(
        "none",
        "scale features: to unit length, or to mean 0 and variance 1 of the training rows",
        choices=("none", "l2", "standard"),
        source="authors' code",
    )
    neighbours: int = setting(20, "k of kNN")
    temperature: float = setting(0.07, "a neighbour of similarity s votes with exp(s / this) (kNN)")
    lr: float = setting(
        30.0, "linear: first learning rate, divided by the mean squared length", source="MoCo"
    )
    epochs: int = setting(100, "linear: passes over the training videos", source="MoCo")
    batch_size: int = setting(256, "linear: videos a step", source="MoCo")
    weight_decay: float = setting(0.0, "linear: weight decay", source="MoCo")
    seed: int = setting(0, "linear: of the first weights and the order")
    device: str = setting("auto", "cpu, cuda, or a GPU when there is one")


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


ALL_SPLITS = "all"


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """Exact search, or an IVF-PQ and how it is searched."""

    ivfpq_above: int = setting(
        0, "approximate (IVF-PQ) index for more videos than this; 0: always an exact one"
    )
    code_bytes: int = setting(64, "bytes a video in an IVF-PQ, besides its number")
    probes: int = setting(32, "lists of an IVF-PQ that a query looks into")
    rerank: int = setting(
        10,
        "of an IVF-PQ take this many times the videos wanted, and order them by their exact "
        "cosine; 0: keep its own order",
    )


@dataclass(frozen=True, kw_only=True)
class BuildConfig(IndexSettings):
    """``seco retrieve build``: an index of all videos of a feature folder."""

    features: str = setting("", "feature folder of `seco extract-features`")
    out: str | None = setting(None, "folder of the index [default: the feature folder]")
    device: str = setting("auto", "cpu, cuda, or the GPUs when faiss can use any")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(IndexSettings):
    """``seco retrieve evaluate``: R@k of test videos among training videos."""

    features: str = setting("", "feature folder of `seco extract-features`")
    test_features: str | None = setting(None, TEST_FEATURES_HELP)
    out: str | None = setting(None, "folder of the results [default: the feature folder]")
    split: str | None = setting(
        None, f"{HELD_OUT_HELP}; {ALL_SPLITS}: the mean over 1, 2, 3 (UCF101, HMDB51)"
    )
    train_split: str = setting("train", "rows of the split to search in")
    test_split: str | None = setting(None, TEST_HELP)
    device: str = setting("auto", "cpu, cuda, or the GPUs when faiss can use any")


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """``seco retrieve query``: the videos nearest to some."""

    features: str = setting("", "feature folder of `seco extract-features`")
    video: tuple[str, ...] = setting(
        (), "key of a query video (videos.csv lists them); repeat for several"
    )
    file: str | None = setting(None, "a video file as the query, instead of --video")
    checkpoint: str | None = setting(
        None, "encoder of --file; must be the features' own [default: the path they name]"
    )
    html: str = setting("nearest.html", "the page to write")
    neighbours: int = setting(10, "nearest videos to show")
    probes: int | None = setting(None, "lists of an IVF-PQ to look into [default: as built]")
    shards: tuple[str, ...] = setting((), "where pictures come from [default: as extracted]")
    out: str | None = setting(None, "folder of the index [default: the feature folder]")
    timeout: float = setting(300.0, "seconds the decoding of --file may take")
    device: str = setting("auto", "cpu, cuda, or the GPUs there are")


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """``seco retrieve duplicates``: the same video on both sides of a split."""

    features: str = setting("", "feature folder of `seco extract-features`")
    test_features: str | None = setting(None, TEST_FEATURES_HELP)
    out: str | None = setting(None, "folder of duplicates.csv [default: the feature folder]")
    html: str | None = setting(None, "also write a page with pictures of each pair")
    split: str | None = setting(None, SPLIT_HELP)
    candidates: int = setting(
        10, "videos compared with each, of each kind: nearest by feature, by picture, mirrored"
    )
    shards: tuple[str, ...] = setting((), "where frames come from [default: as extracted]")
    features_only: bool = setting(
        False, "do not look at frames: list every pair of --threshold or more"
    )
    threshold: float = setting(0.98, "cosine of two features, for --features-only")
    workers: int | None = setting(None, "videos decoded at once [default: the CPUs]")
    device: str = setting("auto", "cpu, cuda, or the GPUs when faiss can use any")


def validate_index(config: IndexSettings) -> None:
    """Refuse values that cannot work.

    Raises:
        InputError: named by its option.
    """
    for name, least in (("ivfpq_above", 0), ("code_bytes", 1), ("probes", 1), ("rerank", 0)):
        if getattr(config, name) < least:
            raise InputError(f"must be {least} or more", f"--{name.replace('_', '-')}")


# What of `seco extract-features` can be chosen for the features that are missing.
EXTRACTION = (
    *("arch", "frames", "short_edge", "crop_size", "batch_size", "precision", "layout"),
    *("device", "processes", "workers", "max_failures"),
)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """``seco compare``: which of several encoders is better on one dataset."""

    shards: tuple[str, ...] = setting((), "shards: pattern, glob, manifest or folder")
    test_shards: tuple[str, ...] = setting((), "shards of the test videos, if apart")
    encoder: tuple[str, ...] = setting(
        (),
        "[NAME=] and a run folder, a checkpoint file, or random, random:ARCH, random:ARCH:SEED; "
        "repeat for each encoder",
    )
    features: tuple[str, ...] = setting(
        (), "[NAME=] and a feature folder, instead of --shards and --encoder; repeat for each"
    )
    test_features: tuple[str, ...] = setting(
        (), "feature folder of the test videos, if apart; one for each --features, in their order"
    )
    baseline: tuple[str, ...] = setting(
        (),
        "name of an encoder that the others are compared with; repeat for several [default: the "
        "first random one, else the last]",
    )
    out: str = setting("compare", "folder of the results, and of the features it extracts")
    split: str | None = setting(None, SPLIT_HELP)
    train_split: str = setting("train", "rows of the split to train on")
    test_split: str | None = setting(None, TEST_HELP)
    fractions: str = setting("1,10,100", "percentages of the training labels to measure with")
    repeats: int = setting(10, "draws of the labelled videos for each percentage below 100")
    svm_c: str = setting(
        "0.01,1,100", "values of the SVM's C to choose from, on held-out training videos"
    )
    neighbours: int = setting(20, "k of kNN")
    temperature: float = setting(0.07, "a neighbour of similarity s votes with exp(s / this) (kNN)")
    resamples: int = setting(4000, "bootstrap resamples of the groups of videos")
    seed: int = setting(0, "seed of the draws of labelled videos and of the bootstrap")


def check_compare(config: CompareConfig) -> None:
    """Refuse values that cannot work.

    Raises:
        InputError: named by its option.
    """
    if bool(config.features) == bool(config.shards):
        raise InputError("give one of them", "--features, --shards")
    if config.shards and not config.encoder:
        raise InputError("is missing", "--encoder", "for example --encoder runs/a --encoder random")
    if config.features and (config.encoder or config.test_shards):
        raise InputError("need --shards", "--encoder, --test-shards", "leave them out")
    if config.shards and config.test_features:
        raise InputError("needs --features", "--test-features", "give --test-shards")
    if config.test_features and len(config.test_features) != len(config.features):
        raise InputError(
            f"{len(config.test_features)} given for {len(config.features)} of --features",
            "--test-features",
            "give one for each, in the same order",
        )
    for name, least in (("repeats", 2), ("neighbours", 1), ("resamples", 2000)):
        require(getattr(config, name) >= least, name, f"must be {least} or more")
    require(config.temperature > 0, "temperature", "must be above 0")
    if max(fractions_of(config)) > 100:
        raise InputError("must be at most 100", "--fractions")
    values_of_c(config)


def fractions_of(config: CompareConfig) -> list[float]:
    """The percentages of ``--fractions``, ascending.

    Raises:
        InputError: not a list of numbers above 0.
    """
    return _numbers(config.fractions, "--fractions", "1,10,100")


def values_of_c(config: CompareConfig) -> list[float]:
    """The values of ``--svm-c``, ascending.

    Raises:
        InputError: not a list of numbers above 0.
    """
    return _numbers(config.svm_c, "--svm-c", "0.01,1,100")


def _numbers(text: str, option: str, example: str) -> list[float]:
    try:
        values = sorted({float(value) for value in text.split(",")})
    except ValueError:
        values = []
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise InputError(
            f"{text!r} is not a list of numbers above 0", option, f"for example {example}"
        )
    return values


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole chain, small: render or take videos, prepare, pre-train, extract, probe, report."""

    out: str = setting("demo", "folder of everything it makes")
    src: str | None = setting(None, "folder of your own videos [default: a rendered set]")
    dataset: str = setting("ucf101", "layout of --src: ucf101, hmdb51, kinetics or folder")
    seed: int = setting(0, "seed of weights and draws")
    tasks: str = setting(
        "inter",
        "proxy tasks; all three are inter,intra,order",
        source="paper Table 1, SeCo-Inter; measured in benchmarks/results/learning.md",
    )
    steps: int | None = setting(None, "training steps [default: what the demo's scale needs]")
    quick: bool = setting(False, "a few steps on a few clips: shows that the chain runs, no more")
