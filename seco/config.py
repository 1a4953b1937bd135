"""Settings of every command: a frozen dataclass per command, with the source of each default.

Nothing here imports torch or faiss, so `--help` stays fast. "SiamFC" is Bertinetto et al.,
"Fully-convolutional Siamese networks for object tracking" (ECCV Workshops 2016), with the values of
its public PyTorch code. SeCo's authors refer to SiamFC and give no values (paper §5.2).
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
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0 … 1
IMAGENET_STD = (0.229, 0.224, 0.225)
WORKERS_HELP = (
    "data-loading workers per process; does not affect results [default: 2 on the CPU; on a GPU, "
    "the process's cores minus 2, from 2 to 16]"
)

# Options in which the paper and its authors' code differ default to None: the preset's value.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "heads": "shared",  # §5.2 "an MLP head"
        "intra": "three-way",  # Eq. 3
        "sampling": "uniform",  # §4.1
        "queue_init": "unit",  # MoCo's; the paper is silent
        "warmup_epochs": 0,  # §5.2 mentions only a cosine
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


OPTIMIZERS = ("auto", "sgd", "adamw", "lars")
_WEIGHT_DECAYS = {"sgd": 1e-4, "adamw": 0.1, "lars": 1e-6}  # authors' code; MoCo v3; MoCo v3
# Of a batch of 256: MoCo v3's for ViTs, and for ResNet-50 in 300 epochs.
_LR_AT_256 = {"adamw": 1.5e-4, "lars": 0.3}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Options that pre-training, fine-tuning and tracker training share."""

    precision: str = setting(
        "auto", "bf16 or fp32; auto: bf16 on a GPU, else fp32", choices=("auto", "bf16", "fp32")
    )
    device: str = setting("auto", "cpu or cuda; auto: a GPU if there is one", resumable=True)
    processes: int | None = setting(
        None,
        "processes on this machine [default: one per visible GPU, else 1]",
        resumable=True,
    )
    workers: int | None = setting(None, WORKERS_HELP, resumable=True)
    seed: int = setting(0, "random seed")
    max_unreadable: float = setting(
        1.0, "stop when more than this percentage of the samples is unreadable", resumable=True
    )
    log_every: int = setting(10, "log metrics every N steps", resumable=True)
    loggers: str = setting(
        "tensorboard",
        "where to log besides metrics.jsonl: tensorboard, wandb, mlflow (comma-separated), or none",
        resumable=True,
    )
    resume: str | None = setting(
        None, "resume from this checkpoint; 'auto': from the run's last.pt, if any", resumable=True
    )
    checkpoint_every_steps: int = setting(1000, "save last.pt every N steps", resumable=True)
    keep_every_epochs: int = setting(100, "keep a checkpoint every N epochs", resumable=True)
    keep: int = setting(5, "keep only the newest N epoch checkpoints", resumable=True)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """``seco pretrain``: options of the method and of the run."""

    shards: tuple[str, ...] = setting(
        (), "shards to train on: manifest, pattern, glob, folder or address", resumable=True
    )
    split: str | None = setting(
        None, "train only on the training videos of this official split [default: all videos]"
    )
    out: str | None = setting(None, "run folder [default: runs/DATASET]", resumable=True)
    preset: str = setting(
        "paper",
        "sets the options in which the paper and its authors' code differ",
        choices=tuple(PRESETS),
        resumable=True,
    )
    tasks: str = setting(
        "inter,intra,order", "proxy tasks, comma-separated", source="paper Eq. 5, Table 1"
    )
    arch: str = setting(
        "resnet50",
        "backbone: torchvision's resnet50, vit_b_16, convnext_tiny, …; timm:NAME; for small images "
        "resnet10_w32, resnet18_cifar, …",
        source="paper §5.2",
    )
    init: str | None = setting(
        None,
        "initial weights: a checkpoint, a state dict, or a name: moco-v2, imagenet-v1, "
        "imagenet-v2, vclr, timm:NAME",
        resumable=True,
    )
    epochs: int = setting(400, "training epochs", source="paper §5.2")
    batch_size: int = setting(512, "global batch size, in videos", source="paper §5.2")
    lr: float | None = setting(
        None,
        "peak learning rate [default: 0.2; with --preset authors, 0.1 x batch size / 256; adamw: "
        "1.5e-4 x batch size / 256; lars: 0.3 x batch size / 256]",
        source="paper §5.2",
    )
    optimizer: str = setting(
        "auto",
        "sgd as in the paper, or adamw or lars as in MoCo v3; auto: adamw for a backbone without "
        "BatchNorm, else sgd",
        source="paper §5.2: SGD",
        choices=OPTIMIZERS,
    )
    momentum: float = setting(0.9, "momentum; of adamw, beta 1", source="authors' code")
    weight_decay: float | None = setting(
        None,
        "weight decay [default: sgd 1e-4; adamw 0.1; lars 1e-6]",
        source="authors' code",
    )
    decay_weights_only: bool = setting(
        False, "no weight decay on norms and biases; always so with lars", source="authors' code"
    )
    warmup_epochs: int | None = setting(
        None, "epochs of linear warm-up from lr / 100 [default: the preset's]"
    )
    final_lr: float | None = setting(
        None, "learning rate at the end of the cosine schedule [default: the preset's]"
    )
    queue_size: int = setting(
        131_072,
        "keys in the queue of negatives; 0: no queue, only the batch's other videos as in MoCo v3",
        source="paper §5.2",
    )
    queue_init: str | None = setting(
        None,
        "initial queue: unit vectors, or uniform numbers [default: the preset's]",
        choices=("unit", "uniform"),
    )
    mask_same_video: bool = setting(False, "the same as --negatives other-videos")
    negatives: str = setting(
        "all",
        "which queued keys are negatives: all, or not those of the query's own video, or not those "
        "of its group, such as the clips of one recording",
        choices=("all", "other-videos", "other-groups"),
    )
    temperature: float = setting(0.1, "temperature of the inter loss", source="paper §5.2")
    intra_temperature: float = setting(0.1, "temperature of the intra loss", source="paper §5.2")
    ema: float = setting(0.999, "EMA momentum of the key encoder", source="paper §5.2, Eq. 6")
    heads: str | None = setting(
        None,
        "one MLP head, or one per task [default: the preset's]",
        choices=("shared", "separate"),
    )
    embedding_dim: int = setting(128, "embedding dimension", source="paper §5.2")
    intra: str | None = setting(
        None,
        "form of the intra loss [default: the preset's]",
        choices=("three-way", "pairwise"),
    )
    sampling: str | None = setting(
        None,
        "frames of a triplet: any three, or the anchor and the other two from opposite halves "
        "of the video [default: the preset's]",
        choices=("uniform", "halves"),
    )
    max_gap_seconds: float | None = setting(
        None, "longest time from the first frame of a triplet to the last [default: any]"
    )
    crop_size: int = setting(224, "side of a view, in px", source="paper §5.2")
    min_crop_area: float = setting(
        0.2, "smallest random crop, as a fraction of the frame's area", source="authors' code"
    )
    bn_group: int | None = setting(
        None,
        "images normalised together by shuffled BatchNorm [default: the largest divisor of the "
        "per-rank batch up to batch_size / 4]",
        source="authors' code: 4 ranks of 128",
    )
    accumulate: int = setting(
        1, "accepted and ignored: each BatchNorm group is its own micro-batch", resumable=True
    )
    channels_last: bool | None = setting(
        None, "use the channels-last memory format [default: on a GPU]", resumable=True
    )
    compile: bool | None = setting(
        None, "compile the encoders with torch.compile [default: on a GPU]", resumable=True
    )
    decode: str = setting(
        "cpu",
        "JPEG decoder: on the CPU in the workers, or nvJPEG on the GPU",
        choices=("cpu", "nvjpeg"),
    )
    views_on: str = setting(
        "device",
        "where crops are augmented: on the training device, or in the workers",
        choices=("device", "workers"),
    )
    window_shards: int | None = setting(
        None, "shuffle within windows of N shards; 0: all [default: 64 with --cache-dir, else all]"
    )
    cache_dir: str | None = setting(None, "local folder for caching remote shards", resumable=True)
    cache_gb: float = setting(100.0, "cache limit, in GB", resumable=True)
    steps_per_epoch: int | None = setting(None, "steps per epoch, for shards without an index")
    knn_shards: tuple[str, ...] = setting(
        (), "labelled shards for an online kNN during training", resumable=True
    )
    knn_every_epochs: int = setting(10, "run the online kNN every N epochs", resumable=True)


def task_list(config: PretrainConfig) -> tuple[str, ...]:
    """Return the tasks in the order of Eq. 5.

    Raises:
        InputError: a task is unknown, or none is given.
    """
    named = [task.strip() for task in config.tasks.split(",") if task.strip()]
    unknown = [task for task in named if task not in TASKS]
    if unknown or not named:
        raise InputError(
            f"unknown task {unknown[0]!r}" if unknown else "no task given",
            "--tasks",
            f"choose from {','.join(TASKS)}",
        )
    return tuple(task for task in TASKS if task in named)


def resolve_pretrain(config: PretrainConfig, processes: int = 1) -> PretrainConfig:
    """Fill in defaults that depend on other options, and check all values.

    Args:
        config: the options as given.
        processes: number of ranks, over all machines.

    Raises:
        InputError: a value is out of range; names the option.
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
        f"{config.batch_size} is not divisible by {processes} ranks",
    )
    share = config.batch_size // processes
    if config.bn_group is None:
        chosen["bn_group"] = default_group(config.batch_size, share)
    if config.lr is None:
        chosen["lr"] = _default_lr(config)
    if config.weight_decay is None:
        chosen["weight_decay"] = _WEIGHT_DECAYS[optimizer_of(config)]
    resolved = dataclasses.replace(config, **chosen, tasks=",".join(task_list(config)))
    _require_ranges(resolved, share)
    return resolved


def negative_count(queue_size: int, batch_size: int) -> int:
    """Return K of Eq. 2: the queue size, or without a queue the keys of the other videos."""
    return queue_size or 3 * (batch_size - 1)


def optimizer_of(config: PretrainConfig) -> str:
    """Return the optimizer of resolved settings: ``sgd``, ``adamw`` or ``lars``."""
    return "sgd" if config.optimizer == "auto" else config.optimizer


def peak_lr(config: PretrainConfig) -> float:
    """Return the peak learning rate of resolved settings."""
    assert config.lr is not None
    return config.lr


def _default_lr(config: PretrainConfig) -> float:
    """Return 0.2 (paper §5.2), the authors' 0.1 x batch size / 256 (0.2 at 512), or MoCo v3's."""
    kind = optimizer_of(config)
    if kind in _LR_AT_256:
        return _LR_AT_256[kind] * config.batch_size / 256
    return config.batch_size / 2560 if config.preset == "authors" else 0.2


def default_group(batch_size: int, share: int | None = None) -> int:
    """Return the largest divisor of the per-rank batch ``share`` up to ``batch_size`` / 4."""
    share = share or batch_size
    return largest_part(share, max(2, min(batch_size // 4, share)))


def largest_part(share: int, most: int) -> int:
    """Return the largest divisor of ``share`` from 2 to ``most``; ``share`` if there is none."""
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
    gap = config.max_gap_seconds
    _require(gap is None or 0 < gap < float("inf"), "max_gap_seconds", "must be above 0")
    _require(config.cache_gb > 0, "cache_gb", "must be above 0")
    _require(
        config.decode == "cpu" or config.views_on == "device",
        "views_on",
        "must be device with --decode nvjpeg",
    )
    _require((config.weight_decay or 0) >= 0, "weight_decay", "must not be negative")
    _require((config.workers or 0) >= 0, "workers", "must not be negative")
    _require(config.accumulate >= 1, "accumulate", "must be 1 or more")
    _require(0 < config.min_crop_area <= 1, "min_crop_area", "must be above 0 and at most 1")
    _require(config.processes is None or config.processes >= 1, "processes", "must be 1 or more")
    group = config.bn_group or 0
    whole = (
        f"the batch of {share}" if share == config.batch_size else f"the per-rank batch of {share}"
    )
    _require(group >= 2 and share % group == 0, "bn_group", f"must be 2 or more and divide {whole}")
    warmup = config.warmup_epochs or 0
    _require(0 <= warmup <= config.epochs, "warmup_epochs", "must be from 0 to --epochs")


DEPLOY_FORMATS = ("onnx", "torch-export", "huggingface")  # run without this toolkit
EXPORT_FORMATS = ("torchvision", "safetensors", "moco", "seco-authors", *DEPLOY_FORMATS)


_ARCH_OF_FILE = "backbone of a state dict that does not tell it: timm:NAME or a plug-in's"


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """``seco import``: convert a file of any known layout to a checkpoint of this toolkit."""

    file: str = setting("", "file of MoCo or of SeCo's authors, state dict, safetensors, or a name")
    out: str = setting("", "checkpoint to write")
    arch: str | None = setting(None, _ARCH_OF_FILE)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """``seco export``: convert a checkpoint of this toolkit to another layout."""

    file: str = setting("", "checkpoint, for example a run's last.pt")
    format: str = setting("", "layout to write", choices=EXPORT_FORMATS)
    out: str = setting("", "file to write; for huggingface a new folder")
    arch: str | None = setting(None, _ARCH_OF_FILE)
    size: int | None = setting(
        None,
        "side of the images for onnx, torch-export and huggingface, in px [default: that the "
        "network was made for, 224 of ResNets]",
    )


def check_export(config: ExportConfig) -> None:
    """Check the values of the options.

    Raises:
        InputError: a value is invalid; names the option.
    """
    if config.size is not None:
        formats = f"has no effect with --format {config.format}"
        require(config.format in DEPLOY_FORMATS, "size", formats)
        # An example of this size is traced: two images in memory.
        require(16 <= config.size <= 2048, "size", "must be from 16 to 2048")


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """``seco publish``: a run's encoder as a folder to share, with a model card."""

    run: str = setting("", "folder of a `seco pretrain` run")
    out: str = setting("", "folder to write: a new or empty one, or one of an earlier publish")
    results: tuple[str, ...] = setting(
        (), "more results for the card than those in RUN: files such as probe.json, or folders"
    )
    shards: tuple[str, ...] = setting(
        (), "the shards of the run, for the card; refused if the run was trained on others"
    )
    name: str | None = setting(None, "name of the model [default: of the folder RUN]")
    license: str | None = setting(
        None, "licence of the weights, as the Hub names it, such as apache-2.0 or cc-by-nc-4.0"
    )
    data_license: str | None = setting(None, "licence of the training data, in words")
    push: str | None = setting(
        None, "also upload the files to this repository of the Hugging Face Hub: OWNER/NAME"
    )
    private: bool = setting(
        True,
        "visibility of a new repository; an existing one must have it already",
        flag="--private/--public",
    )


ENGINES = ("local", "ray")
LAYOUTS = ("channels_last", "contiguous")
_FRAMES = 30  # paper §5.2
_FRAMES_OF = {"activitynet": 50}  # paper §5.2


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """``seco extract-features``: one frozen feature per video (paper §5.2)."""

    shards: tuple[str, ...] = setting((), "shards: manifest, pattern, glob, folder or address")
    checkpoint: str = setting(
        "",
        "weights: a checkpoint, a state dict, a name such as imagenet-v1, timm:NAME, or 'random'",
    )
    out: str | None = setting(None, "feature folder [default: features/DATASET]")
    overwrite: bool = setting(
        False,
        "replace features in --out that have another encoder or other settings, and their results",
    )
    arch: str | None = setting(
        None,
        "backbone of random, of imagenet-v1, -v2 [default: resnet50] and of state dicts of timm or "
        "a plug-in; else the checkpoint's",
    )
    frames: int | None = setting(
        None,
        "frames per video, evenly spaced from first to last; 1: the middle frame "
        "[default: 30; 50 for ActivityNet]",
        source="paper §5.2",
    )
    short_edge: int = setting(256, "resize frames to this short edge, in px", source="paper §5.2")
    crop_size: int = setting(224, "side of the centre crop, in px", source="paper §5.2")
    per_frame: bool = setting(False, "also write the feature of every frame, to frames.npy")
    batch_size: int | None = setting(
        None, "frames per forward pass, across videos [default: 256 on a GPU, else 16]"
    )
    precision: str = setting(
        "auto", "bf16 or fp32; auto: bf16 on a GPU, else fp32", choices=("auto", "bf16", "fp32")
    )
    layout: str = setting("channels_last", "memory format of the images", choices=LAYOUTS)
    device: str = setting("auto", "cpu or cuda; auto: a GPU if there is one")
    processes: int | None = setting(
        None, "processes on this machine [default: one per visible GPU, else 1]"
    )
    workers: int | None = setting(None, WORKERS_HELP)
    engine: str = setting("local", "run on this machine, or on a Ray cluster", choices=ENGINES)
    ray_address: str | None = setting(
        None,
        "address of the Ray cluster [default: RAY_ADDRESS, else this machine's, else a new one]",
    )
    max_failures: float = setting(
        5.0, "exit with code 3 if more than this percentage of the videos cannot be read"
    )
    seed: int = setting(0, "seed of the weights for --checkpoint random")


def frames_of(config: ExtractConfig, dataset: str) -> int:
    """Return the frames per video: ``config.frames``, else the dataset's default."""
    return config.frames or _FRAMES_OF.get(dataset, _FRAMES)


def check_extract(config: ExtractConfig) -> None:
    """Check the values of the options.

    Raises:
        InputError: a value is invalid; names the option.
    """
    for name in ("frames", "short_edge", "crop_size", "batch_size", "processes"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError("must be 1 or more", f"--{name.replace('_', '-')}")
    if (config.workers or 0) < 0:
        raise InputError("must be 0 or more", "--workers")
    if config.short_edge < config.crop_size:
        raise InputError(
            f"{config.short_edge} px is smaller than the crop of {config.crop_size} px",
            "--short-edge",
            "raise it, or lower --crop-size",
        )
    if not 0 <= config.max_failures <= 100:
        raise InputError("must be from 0 to 100", "--max-failures")
    if config.engine != "ray" and config.ray_address is not None:
        raise InputError("needs --engine ray", "--ray-address")
    if config.engine == "ray" and config.processes is not None:
        raise InputError("needs --engine local", "--processes", "leave it out")


SPLIT_HELP = 'split to use [default: "1", else "official", else the only split]'
HELD_OUT_HELP = f'{SPLIT_HELP}; "held-out": test on 30 % of the labelled videos'
TEST_HELP = "rows of the split to test on [default: test, or val if test has no labels]"
TEST_FEATURES_HELP = "feature folder of the test videos, if separate"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """``seco probe``: a classifier on frozen features (paper §5.2)."""

    features: str = setting("", "feature folder of `seco extract-features`")
    test_features: str | None = setting(None, TEST_FEATURES_HELP)
    out: str | None = setting(
        None,
        "results folder [default: the feature folder; a subfolder if method or split is not the "
        "default]",
    )
    split: str | None = setting(None, HELD_OUT_HELP)
    train_split: str = setting("train", "rows of the split to train on")
    test_split: str | None = setting(None, TEST_HELP)
    method: str = setting(
        "svm",
        "classifier: linear SVM, kNN, or linear by SGD",
        choices=("svm", "knn", "linear"),
        source="paper §5.2",
    )
    c: float = setting(1.0, "C of the SVM", flag="-C", source="authors' code")
    tolerance: float | None = setting(
        None,
        "stop the SVM as LIBLINEAR's -s 2 does at this tolerance (authors: 0.01) "
        "[default: solve exactly]",
    )
    sweep: str | None = setting(
        None,
        "values of C to choose from on a fifth of the training videos, for example "
        "0.01,0.1,1,10; replaces -C",
    )
    normalise: str = setting(
        "none",
        "scale features to unit length, or to mean 0 and variance 1 over the training rows",
        choices=("none", "l2", "standard"),
        source="authors' code",
    )
    neighbours: int = setting(20, "kNN: number of neighbours")
    temperature: float = setting(
        0.07, "kNN: a neighbour at cosine s votes with exp(s / temperature)"
    )
    lr: float = setting(
        30.0,
        "linear: initial learning rate, divided by the features' mean squared norm",
        source="MoCo",
    )
    epochs: int = setting(100, "linear: training epochs", source="MoCo")
    batch_size: int = setting(256, "linear: batch size, in videos", source="MoCo")
    weight_decay: float = setting(0.0, "linear: weight decay", source="MoCo")
    seed: int = setting(0, "linear: seed of the initial weights and the shuffling")
    device: str = setting("auto", "cpu or cuda; auto: a GPU if there is one")


FREEZE_BN = ("all-but-first", "all", "none")
_BN_CLIPS = 16  # authors' code: the micro-batch of a GPU
_EPOCHS, _DECAY_EPOCHS = 150, (50, 100)  # authors' code


@dataclass(frozen=True, kw_only=True)
class FinetuneTestConfig:
    """``seco finetune-eval``: test a fine-tuned checkpoint, by default with its run's protocol."""

    shards: tuple[str, ...] = setting((), "shards: manifest, pattern, glob, folder or address")
    checkpoint: str = setting("", "checkpoint of `seco finetune`")
    out: str | None = setting(None, "results folder [default: the checkpoint's folder]")
    clips: int | None = setting(None, "clips per test video [default: the run's]")
    clip_frames: int | None = setting(None, "consecutive frames per test clip [default: the run's]")
    crops: int | None = setting(None, "crops per test clip: 1 or 3 [default: the run's]")
    test_size: int | None = setting(
        None, "short edge of test frames and side of their crops, in px [default: the run's]"
    )
    max_failures: float = setting(
        5.0,
        "exit with code 3 if more than this percentage of the test videos cannot be read",
        resumable=True,
    )
    test_frames: int = setting(
        32, "test frames per forward pass, each with all its crops", resumable=True
    )
    precision: str = setting(
        "auto", "bf16 or fp32; auto: bf16 on a GPU, else fp32", choices=("auto", "bf16", "fp32")
    )
    device: str = setting("auto", "cpu or cuda; auto: a GPU if there is one", resumable=True)
    processes: int | None = setting(
        None, "processes on this machine [default: one per visible GPU, else 1]", resumable=True
    )
    workers: int | None = setting(None, WORKERS_HELP, resumable=True)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(FinetuneTestConfig, TrainingConfig):
    """``seco finetune``: train backbone and classifier on labelled videos (paper §5.2)."""

    dataset: str | None = setting(
        None, "name of the dataset [default: as recorded in the shards]", resumable=True
    )
    shards: tuple[str, ...] = setting(
        (),
        "shards to train and test on [default: DATASET.json in `seco prepare`'s default --out]",
        resumable=True,
    )
    checkpoint: str = setting(
        "",
        "pre-trained weights: a checkpoint, a state dict, a name such as imagenet-v1, timm:NAME, "
        "or 'random'",
        resumable=True,
    )
    out: str | None = setting(
        None, "run folder [default: runs/DATASET-finetune-SPLIT]", resumable=True
    )
    split: str = setting("1", "official split")
    arch: str | None = setting(
        None,
        "backbone of random, of imagenet-v1, -v2 [default: resnet50] and of state dicts of timm or "
        "a plug-in; else the checkpoint's",
        resumable=True,
    )
    epochs: int = setting(_EPOCHS, "training epochs", source="authors' code")
    batch_size: int = setting(
        256, "global batch size, in videos", source="authors' code: 16 x 4 x 4"
    )
    lr: float = setting(1e-3, "initial learning rate", source="authors' code")
    lr_decay_epochs: str | None = setting(
        None,
        "epochs after which the learning rate is divided by 10, comma-separated, or 'none' "
        "[default: 50,100 for 150 epochs, scaled with --epochs]",
        source="authors' code",
    )
    momentum: float = setting(0.9, "SGD momentum (Nesterov)", source="authors' code")
    weight_decay: float = setting(
        1e-4, "weight decay, applied to every parameter", source="authors' code"
    )
    clip_norm: float = setting(40.0, "maximum gradient norm", source="authors' code")
    segments: int = setting(
        7, "segments per training video, one frame from each", source="authors' code"
    )
    dropout: float = setting(0.9, "dropout rate before the classifier", source="authors' code")
    freeze_bn: str = setting(
        "all-but-first",
        "BatchNorm layers to freeze: statistics, weight and bias",
        choices=FREEZE_BN,
        source="authors' code",
    )
    bn_group: int | None = setting(
        None,
        "clips normalised together by the BatchNorm layers that are not frozen [default: the "
        "largest divisor of the per-rank batch up to 16]",
        source="authors' code",
    )
    accumulate: int | None = setting(
        None,
        "gradient accumulation steps; the micro-batch must be divisible by --bn-group [default: "
        "one BatchNorm group per micro-batch]",
        resumable=True,
    )
    crop_size: int = setting(224, "side of a training view, in px", source="authors' code")
    clips: int = setting(20, "clips per test video", source="authors' code", resumable=True)
    clip_frames: int = setting(
        16, "consecutive frames per test clip", source="authors' code", resumable=True
    )
    crops: int = setting(3, "crops per test clip: 1 or 3", source="authors' code", resumable=True)
    test_size: int = setting(
        256,
        "short edge of test frames and side of their crops, in px",
        source="authors' code",
        resumable=True,
    )
    min_crop_area: float = setting(
        0.2, "smallest random crop, as a fraction of the frame's area", source="authors' code"
    )
    validate_every_epochs: int = setting(
        10,
        "run a quick validation (one clip per video, centre crop) every N epochs",
        resumable=True,
    )
    skip_test: bool = setting(
        False, "do not test after training; use `seco finetune-eval` later", resumable=True
    )
    checkpoint_every_steps: int = setting(100, "save last.pt every N steps", resumable=True)

    def decay_epochs(self) -> tuple[int, ...]:
        """Return the epochs after which the learning rate is divided by 10.

        Raises:
            InputError: ``lr_decay_epochs`` is not a list of whole numbers.
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
                f"{self.lr_decay_epochs!r} is not a list of epochs",
                "--lr-decay-epochs",
                "for example 50,100",
            )
        return tuple(sorted(set(epochs)))


PROTOCOL = ("clips", "clip_frames", "crops", "test_size")  # the test protocol


def resolve_finetune(config: FinetuneConfig, processes: int = 1) -> FinetuneConfig:
    """Fill in defaults that depend on other options, and check all values.

    Args:
        config: the options as given.
        processes: number of ranks, over all machines.

    Raises:
        InputError: a value is out of range; names the option.
    """
    if not config.shards and config.dataset is None:
        raise InputError("both are missing", "DATASET, --shards", "give at least one")
    shards = config.shards or (f"{default_folder()}/{config.dataset}.json",)
    require(config.batch_size >= 1, "batch_size", "must be 1 or more")
    require(
        config.batch_size % processes == 0,
        "batch_size",
        f"{config.batch_size} is not divisible by {processes} ranks",
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
        f"must divide the per-rank batch of {share}",
    )
    require(
        group >= 1 and (share // parts) % group == 0,
        "bn_group",
        f"must divide the micro-batch of {share // parts}",
    )
    decay = ",".join(map(str, config.decay_epochs())) or "none"
    return dataclasses.replace(
        config, shards=shards, bn_group=group, accumulate=parts, lr_decay_epochs=decay
    )


def require_test_ranges(config: FinetuneTestConfig) -> None:
    """Check the options of the test; None is allowed.

    Raises:
        InputError: a value is out of range; names the option.
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
    require(0 < config.momentum < 1, "momentum", "must be above 0 and below 1 (Nesterov)")
    require(0 <= config.dropout < 1, "dropout", "must be 0 or more and below 1")
    require(config.weight_decay >= 0, "weight_decay", "must not be negative")
    require(0 < config.min_crop_area <= 1, "min_crop_area", "must be above 0 and at most 1")


FEATURE_LAYERS = ("layer2", "layer3", "layer4")
STRIDE = 8  # px of the image per feature cell (paper §5.2)
EXEMPLAR_PX = 127  # SiamFC
SEARCH_PX = 255  # SiamFC, when tracking
TRAIN_SEARCH_PX = 239  # SiamFC: a random crop of the 255 px
CONTEXT = 0.5  # SiamFC: margin added to width and to height, as a fraction of their sum
OTB_SEQUENCES = 100
OTB = "otb100"  # the dataset's name in its records


def response_cells(search_px: int) -> int:
    """Return the side of the response in cells: 17 for a search crop of 255 px, 15 for 239 px."""
    return (search_px - EXEMPLAR_PX) // STRIDE + 1


@dataclass(frozen=True, kw_only=True)
class TrackTrainConfig(TrainingConfig):
    """``seco track train``: train SiamFC's 1×1 convolution on a frozen backbone."""

    shards: tuple[str, ...] = setting(
        (), "tracking shards to train on, for example GOT-10k", resumable=True
    )
    checkpoint: str = setting(
        "",
        "backbone weights: a checkpoint, a ResNet's state dict, a name such as imagenet-v1, or "
        "'random'",
        resumable=True,
    )
    out: str | None = setting(None, "run folder [default: runs/track-DATASET]", resumable=True)
    arch: str | None = setting(
        None,
        "backbone of random, of imagenet-v1, -v2 [default: resnet50] and of state dicts of timm or "
        "a plug-in; else the checkpoint's",
    )
    feature_layer: str = setting(
        "layer4", "ResNet stage to take features from", source="paper §5.2", choices=FEATURE_LAYERS
    )
    channels: int = setting(256, "output channels of the 1×1 convolution", source="SiamFC")
    convolutions: str = setting(
        "shared",
        "one 1×1 convolution for exemplar and search crop, or one for each",
        source="paper §5.2",
        choices=("shared", "separate"),
    )
    raw_features: bool = setting(
        False, "do not standardise the feature channels before the convolution"
    )
    response_scale: float = setting(1e-3, "scale of the cross-correlation", source="SiamFC")
    epochs: int = setting(50, "training epochs", source="SiamFC")
    pairs_per_sequence: int = setting(1, "pairs per sequence and epoch", source="SiamFC")
    max_gap: int = setting(
        99, "maximum distance of exemplar and search frame, in frames", source="SiamFC"
    )
    batch_size: int = setting(8, "global batch size, in pairs", source="SiamFC")
    lr: float = setting(1e-2, "learning rate of the first epoch", source="SiamFC")
    final_lr: float = setting(
        1e-5, "learning rate of the last epoch (geometric decay)", source="SiamFC"
    )
    momentum: float = setting(0.9, "SGD momentum", source="SiamFC")
    weight_decay: float = setting(5e-4, "weight decay", source="SiamFC")
    positive_radius: float = setting(
        16.0, "radius of the positive labels, in px (city-block distance)", source="SiamFC"
    )
    max_stretch: float = setting(
        0.05, "maximum random scale change, as a fraction", source="SiamFC"
    )
    window_shards: int | None = setting(
        None, "shuffle within windows of N shards; 0: all [default: 64 with --cache-dir, else all]"
    )
    cache_dir: str | None = setting(None, "local folder for caching remote shards", resumable=True)
    cache_gb: float = setting(100.0, "cache limit, in GB", resumable=True)
    keep_every_epochs: int = setting(10, "keep a checkpoint every N epochs", resumable=True)


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """SiamFC inference, shared by ``seco track eval`` and ``seco track run``."""

    tracker: str = setting("", "last.pt of `seco track train`")
    scales: int = setting(3, "number of search scales, odd", source="SiamFC")
    scale_step: float = setting(1.0375, "ratio of neighbouring scales", source="SiamFC")
    scale_penalty: float = setting(
        0.9745, "penalty factor on responses at other scales", source="SiamFC"
    )
    scale_update: float = setting(
        0.59, "fraction of a scale change applied per frame", source="SiamFC"
    )
    window: float = setting(0.176, "weight of the Hann window in the response", source="SiamFC")
    upsampling: int = setting(16, "bicubic upsampling factor of the response", source="SiamFC")
    precision: str = setting("fp32", "bf16 or fp32", choices=("bf16", "fp32"))
    device: str = setting("auto", "cpu or cuda; auto: a GPU if there is one")


@dataclass(frozen=True, kw_only=True)
class TrackEvalConfig(TrackerConfig):
    """``seco track eval``: one-pass evaluation of a tracker."""

    shards: tuple[str, ...] = setting((), "tracking shards to evaluate on, for example OTB-100")
    out: str | None = setting(None, "results folder [default: RUN/eval-DATASET]")
    name: str = setting("seco", "name of the tracker in results and plots")
    video: bool = setting(False, "also write an mp4 per sequence, with the boxes drawn")


@dataclass(frozen=True, kw_only=True)
class TrackRunConfig(TrackerConfig):
    """``seco track run``: track one target through a video file."""

    video: str = setting("", "video file")
    box: str = setting("", "target in the first frame: x,y,w,h in px; the first pixel is 1")
    out: str | None = setting(None, "CSV file of the boxes [default: ./VIDEO.boxes.csv]")
    out_video: str | None = setting(None, "mp4 with the box drawn [default: ./VIDEO.tracked.mp4]")


def check_training(config: TrackTrainConfig, processes: int = 1) -> None:
    """Check the options of a training on this many ranks.

    Raises:
        InputError: a value is out of range; names the option.
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
        f"must be 0 or more and below {2 * half_px:g} px: some labels must be negative",
    )
    require((config.workers or 0) >= 0, "workers", "must not be negative")
    require((config.window_shards or 0) >= 0, "window_shards", "must not be negative")
    require(config.processes is None or config.processes >= 1, "processes", "must be 1 or more")
    require(
        config.batch_size % processes == 0,
        "batch_size",
        f"{config.batch_size} is not divisible by {processes} ranks",
    )


def check_tracker(config: TrackerConfig) -> None:
    """Check the options of inference.

    Raises:
        InputError: a value is out of range; names the option.
    """
    require(config.scales >= 1 and config.scales % 2 == 1, "scales", "must be odd: 1, 3, 5, …")
    require(1 <= config.scale_step < 2, "scale_step", "must be 1 or more and below 2")
    require(0 < config.scale_penalty <= 1, "scale_penalty", "must be above 0 and at most 1")
    require(0 <= config.scale_update <= 1, "scale_update", "must be from 0 to 1")
    require(0 <= config.window <= 1, "window", "must be from 0 to 1")
    require(1 <= config.upsampling <= 64, "upsampling", "must be from 1 to 64")


def parse_box(text: str) -> tuple[float, float, float, float]:
    """Return the four numbers of ``--box``.

    Raises:
        InputError: not four numbers, or an empty box.
    """
    try:
        x, y, width, height = (float(word) for word in text.split(","))
    except ValueError as error:
        raise InputError(f"{text!r} is not x,y,w,h", "--box", "for example 120,80,40,60") from error
    box = (x, y, width, height)
    if not all(abs(number) < 1e6 for number in box) or width <= 0 or height <= 0:
        raise InputError(
            f"{text!r} is not a valid box",
            "--box",
            "width and height must be above 0, all numbers below 1e6",
        )
    return box


ALL_SPLITS = "all"


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """Options of exact and IVF-PQ search."""

    ivfpq_above: int = setting(
        0, "use an approximate (IVF-PQ) index above this number of videos; 0: always exact"
    )
    code_bytes: int = setting(64, "IVF-PQ: code bytes per video")
    probes: int = setting(32, "IVF-PQ: lists searched per query")
    rerank: int = setting(
        10,
        "IVF-PQ: retrieve N times the requested videos and rank them by exact cosine; 0: do not "
        "rerank",
    )


@dataclass(frozen=True, kw_only=True)
class BuildConfig(IndexSettings):
    """``seco retrieve build``: index all videos of a feature folder."""

    features: str = setting("", "feature folder of `seco extract-features`")
    out: str | None = setting(None, "index folder [default: the feature folder]")
    device: str = setting("auto", "cpu or cuda; auto: the GPUs if faiss can use them")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(IndexSettings):
    """``seco retrieve evaluate``: R@k of test videos among training videos."""

    features: str = setting("", "feature folder of `seco extract-features`")
    test_features: str | None = setting(None, TEST_FEATURES_HELP)
    out: str | None = setting(None, "results folder [default: the feature folder]")
    split: str | None = setting(
        None, f"{HELD_OUT_HELP}; {ALL_SPLITS}: the mean over 1, 2, 3 (UCF101, HMDB51)"
    )
    train_split: str = setting("train", "rows of the split to search")
    test_split: str | None = setting(None, TEST_HELP)
    device: str = setting("auto", "cpu or cuda; auto: the GPUs if faiss can use them")


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """``seco retrieve query``: find the videos nearest to query videos."""

    features: str = setting("", "feature folder of `seco extract-features`")
    video: tuple[str, ...] = setting(
        (), "key of a query video, as in videos.csv; repeat for several"
    )
    file: str | None = setting(None, "video file to use as query, instead of --video")
    checkpoint: str | None = setting(
        None, "encoder for --file: the one that made the features [default: the path they record]"
    )
    html: str = setting("nearest.html", "page to write")
    neighbours: int = setting(10, "number of nearest videos to show")
    probes: int | None = setting(None, "IVF-PQ: lists searched per query [default: as built]")
    shards: tuple[str, ...] = setting(
        (), "shards to take pictures from [default: those of the features]"
    )
    out: str | None = setting(None, "index folder [default: the feature folder]")
    timeout: float = setting(300.0, "time limit for decoding --file, in seconds")
    device: str = setting("auto", "cpu or cuda; auto: the GPUs if there are any")


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """``seco retrieve duplicates``: find videos that are on both sides of a split."""

    features: str = setting("", "feature folder of `seco extract-features`")
    test_features: str | None = setting(None, TEST_FEATURES_HELP)
    out: str | None = setting(None, "folder for duplicates.csv [default: the feature folder]")
    html: str | None = setting(None, "also write a page with pictures of each pair")
    split: str | None = setting(None, SPLIT_HELP)
    candidates: int = setting(
        10, "candidates per test video, each by feature, by picture and by mirrored picture"
    )
    shards: tuple[str, ...] = setting(
        (), "shards to take frames from [default: those of the features]"
    )
    features_only: bool = setting(
        False, "do not compare frames; list every pair at or above --threshold"
    )
    threshold: float = setting(0.98, "minimum cosine of a pair, for --features-only")
    workers: int | None = setting(None, "videos decoded in parallel [default: number of CPUs]")
    device: str = setting("auto", "cpu or cuda; auto: the GPUs if faiss can use them")


def validate_index(config: IndexSettings) -> None:
    """Check the values of the options.

    Raises:
        InputError: a value is invalid; names the option.
    """
    for name, least in (("ivfpq_above", 0), ("code_bytes", 1), ("probes", 1), ("rerank", 0)):
        if getattr(config, name) < least:
            raise InputError(f"must be {least} or more", f"--{name.replace('_', '-')}")


# Options of `seco extract-features` that `seco compare` takes, for missing features.
EXTRACTION = (
    *("arch", "frames", "short_edge", "crop_size", "batch_size", "precision", "layout"),
    *("device", "processes", "workers", "max_failures"),
)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """``seco compare``: compare encoders on one dataset."""

    shards: tuple[str, ...] = setting((), "shards: manifest, pattern, glob, folder or address")
    test_shards: tuple[str, ...] = setting((), "shards of the test videos, if separate")
    encoder: tuple[str, ...] = setting(
        (),
        "[NAME=]SOURCE: a run folder, a checkpoint file, a name such as imagenet-v1, random, "
        "random:ARCH or random:ARCH:SEED; repeat for each encoder",
    )
    features: tuple[str, ...] = setting(
        (), "[NAME=]FOLDER: a feature folder, instead of --shards and --encoder; repeat for each"
    )
    test_features: tuple[str, ...] = setting(
        (), "feature folder of the test videos, if separate; one per --features, in the same order"
    )
    baseline: tuple[str, ...] = setting(
        (),
        "name of an encoder to compare the others with; repeat for several [default: the first "
        "random one, else the last]",
    )
    out: str = setting("compare", "folder for the results and the extracted features")
    split: str | None = setting(None, SPLIT_HELP)
    train_split: str = setting("train", "rows of the split to train on")
    test_split: str | None = setting(None, TEST_HELP)
    fractions: str = setting("1,10,100", "percentages of the training labels to use")
    repeats: int = setting(10, "random label subsets per percentage below 100")
    svm_c: str = setting(
        "0.01,1,100", "values of the SVM's C to choose from on held-out training videos"
    )
    neighbours: int = setting(20, "kNN: number of neighbours")
    temperature: float = setting(
        0.07, "kNN: a neighbour at cosine s votes with exp(s / temperature)"
    )
    resamples: int = setting(4000, "bootstrap resamples of the groups of videos")
    seed: int = setting(0, "seed of the label subsets and the bootstrap")


def check_compare(config: CompareConfig) -> None:
    """Check the values of the options.

    Raises:
        InputError: a value is invalid; names the option.
    """
    if bool(config.features) == bool(config.shards):
        raise InputError("give exactly one of them", "--features, --shards")
    if config.shards and not config.encoder:
        raise InputError("is missing", "--encoder", "for example --encoder runs/a --encoder random")
    if config.features and (config.encoder or config.test_shards):
        raise InputError(
            "cannot be used with --features", "--encoder, --test-shards", "leave them out"
        )
    if config.shards and config.test_features:
        raise InputError("cannot be used with --shards", "--test-features", "give --test-shards")
    if config.test_features and len(config.test_features) != len(config.features):
        raise InputError(
            f"{len(config.test_features)} given for {len(config.features)} --features",
            "--test-features",
            "give one per --features, in the same order",
        )
    for name, least in (("repeats", 2), ("neighbours", 1), ("resamples", 2000)):
        require(getattr(config, name) >= least, name, f"must be {least} or more")
    require(config.temperature > 0, "temperature", "must be above 0")
    if max(fractions_of(config)) > 100:
        raise InputError("must be at most 100", "--fractions")
    values_of_c(config)


def fractions_of(config: CompareConfig) -> list[float]:
    """Return the percentages of ``--fractions``, ascending.

    Raises:
        InputError: not a list of numbers above 0.
    """
    return _numbers(config.fractions, "--fractions", "1,10,100")


def values_of_c(config: CompareConfig) -> list[float]:
    """Return the values of ``--svm-c``, ascending.

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
    """``seco demo``: every stage on a small dataset, rendered or your own."""

    out: str = setting("demo", "folder for all outputs")
    src: str | None = setting(None, "folder of your own videos [default: render a dataset]")
    dataset: str = setting("ucf101", "layout of --src: ucf101, hmdb51, kinetics or folder")
    seed: int = setting(0, "random seed")
    tasks: str = setting(
        "inter",
        "proxy tasks; all three: inter,intra,order",
        source="paper Table 1, SeCo-Inter; measured in benchmarks/results/learning.md",
    )
    steps: int | None = setting(None, "training steps [default: 1300, or 12 with --quick]")
    quick: bool = setting(False, "a few steps on a few clips, only to check that every stage runs")
