"""Settings of ``seco retrieve``. No torch, no faiss here."""

from __future__ import annotations

from dataclasses import dataclass

from seco.probe.config import SPLIT_HELP, TEST_FEATURES_HELP, TEST_HELP
from shards.errors import InputError
from shards.settings import setting

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
        None, f"{SPLIT_HELP}; {ALL_SPLITS}: the mean over 1, 2, 3 (UCF101, HMDB51)"
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
