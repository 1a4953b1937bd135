"""Settings of ``seco compare``. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from seco.probe.config import SPLIT_HELP, TEST_HELP
from shards.errors import InputError
from shards.settings import require, setting

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
