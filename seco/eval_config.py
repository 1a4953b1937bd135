"""Settings of ``seco probe`` and ``seco retrieve``. No torch, no faiss here."""

from __future__ import annotations

from dataclasses import dataclass

from shards.settings import setting

_SPLIT_HELP = 'split to use [default: "1", else "official", else the only one]'
_TEST_HELP = "rows of the split to test on [default: test, or val where test has no labels]"
_TEST_FEATURES_HELP = "feature folder of the test videos, if they are a set of their own"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """``seco probe``: a classifier on frozen features (paper §5.2)."""

    features: str = setting("", "feature folder of `seco extract-features`")
    test_features: str | None = setting(None, _TEST_FEATURES_HELP)
    out: str | None = setting(None, "folder of the results [default: the feature folder]")
    split: str | None = setting(None, _SPLIT_HELP)
    train_split: str = setting("train", "rows of the split to train on")
    test_split: str | None = setting(None, _TEST_HELP)
    method: str = setting(
        "svm", "classifier", choices=("svm", "knn", "linear"), source="paper §5.2"
    )
    c: float = setting(1.0, "the SVM's C", flag="-C", source="authors' code")
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


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig:
    """``seco retrieve``: nearest videos by the cosine of their features."""

    features: str = setting("", "feature folder of `seco extract-features`")
    test_features: str | None = setting(None, _TEST_FEATURES_HELP)
    out: str | None = setting(None, "folder of results and index [default: the feature folder]")
    split: str | None = setting(None, _SPLIT_HELP)
    train_split: str = setting("train", "rows of the split to search in")
    test_split: str | None = setting(None, _TEST_HELP)
    ivfpq_above: int = setting(
        0, "approximate (IVF-PQ) index for more videos than this; 0: always an exact one"
    )
    neighbours: int = setting(10, "nearest videos a query shows")
    shards: tuple[str, ...] = setting((), "where pictures come from [default: as extracted]")
    threshold: float = setting(0.98, "cosine from which two videos count as near-duplicates")
    device: str = setting("auto", "cpu, cuda, or the GPUs when faiss can use any (exact index)")
