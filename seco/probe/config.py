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
    out: str | None = setting(
        None,
        "folder of the results [default: the feature folder; for other methods and splits than "
        "the usual a folder in it]",
    )
    split: str | None = setting(None, SPLIT_HELP)
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
