"""Settings of ``seco prepare``; every default with its source. Nothing heavy is imported here."""

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
    """``seco prepare``: what to store of which videos."""

    dataset: str = setting(dataclasses.MISSING, "the dataset's name: a file of pipelines/")
    src: str = setting(dataclasses.MISSING, "folder of the raw videos")
    out: str = setting(
        "",
        "folder the shards go to, or an address such as s3://bucket/shards "
        "[default: shards; in a clone, where that is code, data/shards]",
    )
    annotations: str | None = setting(
        None, "annotation file or folder [default: looked for in --src]"
    )
    split: str | None = setting(
        None, "only these official splits, separated by commas [default: all found]"
    )
    frames: int | None = setting(
        None,
        "frames a video, evenly spaced "
        "[default: 30; activitynet 50; all for ucf101, hmdb51, got10k, otb100]",
    )
    fps: float | None = setting(None, "frames a second of video, instead of --frames")
    all_frames: bool = setting(False, "every frame, instead of --frames")
    min_frames: int = setting(1, "exclude videos with fewer stored frames (too-short)")
    short_edge: int | None = setting(
        None,
        "shorter side of stored frames in px; smaller ones stay "
        "[default: 256 as in the authors' code; got10k and otb100 keep their files' bytes]",
    )
    quality: int = setting(90, "JPEG quality, 1 to 100")
    videos_per_shard: int = setting(240, "videos a shard")
    workers: int | None = setting(
        None, "videos decoded at once; never changes a result [default: the CPUs]"
    )
    keep_damaged: bool = setting(
        False, "store the frames that decode of videos with decoding errors (else: damaged)"
    )
    engine: str = setting("local", "processes of this machine, or a Ray cluster", choices=ENGINES)
    ray_address: str | None = setting(
        None,
        "of the Ray cluster [default: RAY_ADDRESS, the one this machine is in, or a new one]",
    )
    timeout: float = setting(300.0, "seconds a video may take before it is excluded")
    max_failures: float = setting(
        5.0, "exit with code 3 when more than this percentage of the videos failed"
    )
    retry_failed: bool = setting(
        False, "try the excluded videos of finished shards again, and only those"
    )
    dry_run: bool = setting(False, "tell what would be done, and stop")
    name: str | None = setting(None, "name of the set [default: the dataset's or folder's]")
    ffmpeg: str | None = setting(None, "ffmpeg binary [default: SECO_FFMPEG or the static one]")


def validate(config: PrepareConfig) -> None:
    """Refuse values that cannot work.

    Raises:
        InputError: named by its option.
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
        raise InputError("exclude each other", " and ".join(given), "give one of them")
    for name in ("frames", "min_frames", "videos_per_shard", "workers"):
        value = getattr(config, name)
        _require(value is None or value >= 1, name, "must be 1 or more")
    _require(config.fps is None or 0 < config.fps < math.inf, "fps", "must be above 0")
    _require(0 < config.timeout < math.inf, "timeout", "must be above 0")
    _require(1 <= config.quality <= 100, "quality", "must be from 1 to 100")
    _require(
        config.short_edge is None or (config.short_edge >= 2 and config.short_edge % 2 == 0),
        "short_edge",
        "must be even and 2 or more: JPEG's 4:2:0 halves both sides",
    )
    _require(
        config.name is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", config.name) is not None,
        "name",
        "must be letters, digits, dots, _ and -",
    )
    _require(config.engine in ENGINES, "engine", f"is one of {', '.join(ENGINES)}")
    _require(
        config.ray_address is None or config.engine == "ray", "ray_address", "needs --engine ray"
    )
    _require(0 <= config.max_failures <= 100, "max_failures", "must be from 0 to 100")
