"""Settings of ``seco probe``, and words it shares with ``seco retrieve``. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from shards.settings import setting

SPLIT_HELP = 'split to use [default: "1", else "official", else the only one]'
TEST_HELP = "rows of the split to test on [default: test, or val where test has no labels]"
TEST_FEATURES_HELP = "feature folder of the test videos, if they are a set of their own"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """``seco probe``: a classifier on frozen features (paper §5.2)."""

    features: str = setting("", "feature folder of `seco extract-features`")
    test_features: str | None = setting(None, TEST_FEATURES_HELP)
    out: str | None = setting(None, "folder of the results [default: the feature folder]")
    split: str | None = setting(None, SPLIT_HELP)
    train_split: str = setting("train", "rows of the split to train on")
    test_split: str | None = setting(None, TEST_HELP)
    method: str = setting("svm", "classifier", choices=("svm", "knn"), source="paper §5.2")
    c: float = setting(1.0, "the SVM's C", flag="-C", source="authors' code")
    sweep: str | None = setting(None, "also report these values of C, for example 0.01,0.1,1,10")
    normalise: str = setting(
        "none",
        "scale features: to unit length, or to mean 0 and variance 1 of the training rows",
        choices=("none", "l2", "standard"),
        source="authors' code",
    )
    neighbours: int = setting(20, "k of kNN")
    temperature: float = setting(0.07, "a neighbour of similarity s votes with exp(s / this) (kNN)")
    device: str = setting("auto", "cpu, cuda, or a GPU when there is one")
