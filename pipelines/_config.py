"""Settings of ``seco prepare``, with the source of each default. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from shards.errors import InputError
from shards.settings import require as _require
from shards.settings import setting

ENGINES = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """``seco prepare``: which videos and frames to store."""

    dataset: str = setting(dataclasses.MISSING, "name of the dataset: a module of pipelines/")
    src: str = setting(
        dataclasses.MISSING,
        "folder of the raw videos, or an address such as s3://bucket/raw; for list, the CSV or "
        "Parquet",
    )
    out: str = setting(
        "",
        "folder for the shards, or an address such as s3://bucket/shards "
        "[default: shards; data/shards if shards is Python code, as in a clone]",
    )
    annotations: str | None = setting(None, "annotation file or folder [default: search in --src]")
    split: str | None = setting(
        None, "official splits to prepare, comma-separated [default: all found]"
    )
    frames: int | None = setting(
        None,
        "frames per video, evenly spaced "
        "[default: 30; activitynet 50; all for ucf101, hmdb51, got10k, otb100]",
    )
    fps: float | None = setting(None, "frames per second of video, instead of --frames")
    all_frames: bool = setting(False, "store every frame, instead of --frames")
    clip_seconds: float | None = setting(
        None,
        "divide recordings into clips of this length, each stored as a video (folder, list, wds)",
    )
    clip_stride: float | None = setting(
        None, "seconds from the start of a clip to that of the next [default: --clip-seconds]"
    )
    cut_scenes: bool = setting(False, "of each clip, keep the longest part without a scene cut")
    keyframes: bool = setting(
        False, "decode key frames only: fast, and seconds apart; for hours of surveillance video"
    )
    frame_rate: float | None = setting(
        None, "frames per second of folders of frames [default: 30; for dataset frames]"
    )
    root: str | None = setting(
        None, "folder or address that the paths of a list are relative to [default: the list's]"
    )
    allow_outside: bool = setting(False, "accept paths of a list that lead out of --root")
    min_frames: int = setting(1, "exclude videos with fewer stored frames, as too-short")
    short_edge: int | None = setting(
        None,
        "short edge of stored frames, in px; smaller frames are not enlarged "
        "[default: 256, as in the authors' code; got10k and otb100 keep the files' bytes]",
    )
    quality: int = setting(90, "JPEG quality, from 1 to 100")
    videos_per_shard: int = setting(240, "videos per shard")
    workers: int | None = setting(
        None, "videos decoded in parallel; does not affect results [default: number of CPUs]"
    )
    keep_damaged: bool = setting(
        False, "store the decodable frames of damaged videos [default: exclude them]"
    )
    engine: str = setting("local", "run on this machine, or on a Ray cluster", choices=ENGINES)
    ray_address: str | None = setting(
        None,
        "address of the Ray cluster [default: RAY_ADDRESS, else this machine's, else a new one]",
    )
    timeout: float = setting(
        300.0,
        "time limit per video (of recordings, per minute), in seconds; slower videos fail",
    )
    max_failures: float = setting(
        5.0, "exit with code 3 if more than this percentage of the videos fails"
    )
    spool_gb: float = setting(
        20.0, "limit of remote videos that wait on the local disk (TMPDIR), in GB"
    )
    retry_failed: bool = setting(False, "retry only the excluded videos of finished shards")
    dry_run: bool = setting(False, "print the plan and exit")
    name: str | None = setting(None, "name of the output [default: the dataset's or the folder's]")
    ffmpeg: str | None = setting(
        None, "ffmpeg binary [default: SECO_FFMPEG, else imageio-ffmpeg's]"
    )


def validate(config: PrepareConfig) -> None:
    """Check the values of the options.

    Raises:
        InputError: a value is invalid; names the option.
    """
    given = [
        flag
        for flag, present in (
            ("--frames", config.frames is not None),
            ("--fps", config.fps is not None),
            ("--all-frames", config.all_frames),
        )
        if present
    ]
    if len(given) > 1:
        raise InputError("cannot be combined", " and ".join(given), "give one of them")
    for name in ("frames", "min_frames", "videos_per_shard", "workers"):
        value = getattr(config, name)
        _require(value is None or value >= 1, name, "must be 1 or more")
    for name in ("clip_seconds", "clip_stride", "frame_rate"):
        value = getattr(config, name)
        _require(value is None or 0 < value < math.inf, name, "must be above 0")
    _require(
        config.clip_stride is None or config.clip_seconds is not None,
        "clip_stride",
        "needs --clip-seconds",
    )
    _require(
        not (config.cut_scenes and config.keyframes),
        "cut_scenes",
        "cannot be combined with --keyframes, which are seconds apart",
    )
    _require(
        not config.cut_scenes or config.clip_seconds is not None,
        "cut_scenes",
        "needs --clip-seconds",
    )
    _require(config.fps is None or 0 < config.fps < math.inf, "fps", "must be above 0")
    _require(0 < config.spool_gb < math.inf, "spool_gb", "must be above 0")
    _require(0 < config.timeout < math.inf, "timeout", "must be above 0")
    _require(1 <= config.quality <= 100, "quality", "must be from 1 to 100")
    _require(
        config.short_edge is None or (config.short_edge >= 2 and config.short_edge % 2 == 0),
        "short_edge",
        "must be even and 2 or more: JPEG 4:2:0 halves both sides",
    )
    _require(
        config.name is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", config.name) is not None,
        "name",
        "must be letters, digits, ., _ and -, starting with a letter or digit",
    )
    _require(config.engine in ENGINES, "engine", f"must be one of {', '.join(ENGINES)}")
    _require(
        config.ray_address is None or config.engine == "ray", "ray_address", "needs --engine ray"
    )
    _require(0 <= config.max_failures <= 100, "max_failures", "must be from 0 to 100")
