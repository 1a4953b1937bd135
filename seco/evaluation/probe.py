"""``seco probe``: classify frozen features with an SVM, by SGD, or by the nearest neighbours.

The SGD classifier is a softmax with biases in MoCo's protocol (lr 30, batch 256, 100 epochs,
momentum 0.9, no weight decay), which is for features of about unit length. Multiplying features by
s changes nothing if the rate is divided by s², so the rate is divided by the mean squared length of
the training rows: ``lr`` means the same for every scale of features, and is MoCo's for unit length.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy, linear

from seco.config import ProbeConfig
from seco.data.splits import held_out, usual_split
from seco.evaluation.knn import knn_votes
from seco.evaluation.metrics import (
    ClassAccuracy,
    Predictions,
    class_accuracies,
    class_lines,
    confusions,
    draw_confusion,
    predictions_of,
)
from seco.evaluation.splits import (
    SINGLE_VIDEOS,
    TrainTest,
    read_train_test,
    train_test,
    video_groups,
)
from seco.evaluation.svm import LinearSVM, fit_svm
from seco.features.matrix import FeatureMatrix, FeaturesTooLarge, fit_scaling
from seco.features.products import Products
from seco.features.store import PROBES, Features
from seco.processes.device import exact_products, resolve_device
from seco.schedule import learning_rate
from seco.text import percent
from shards.atomic import atomic_path, csv_text, require_writable, write_json, write_text
from shards.errors import InputError
from shards.progress import progress
from shards.terminal import printable

_MOMENTUM = 0.9
_FIRST_DEVIATION = 0.01  # of the initial weights, as in MoCo
_LARGEST_LENGTH = 1e15  # its square divides the learning rate


@dataclass(frozen=True)
class LinearClassifier:
    """A fitted linear classifier."""

    classes: NDArray[np.int64]  # (K,) ascending
    weights: NDArray[np.float32]  # (K, D)
    biases: NDArray[np.float32]  # (K,)

    def scores(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Logits (M, K) of features (M, D)."""
        logits: NDArray[np.float64] = features.astype(np.float64) @ self.weights.T + self.biases
        return logits


def fit_linear(
    features: FeatureMatrix,
    labels: NDArray[Any],
    *,
    lr: float = 30.0,
    epochs: int = 100,
    batch_size: int = 256,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    advance: Callable[[], object] = lambda: None,
) -> LinearClassifier:
    """Train on features (N, D) and labels (N,), with cosine decay of the learning rate to 0.

    Rows are shuffled in every epoch and read batch by batch, so features may be larger than memory.

    Args:
        lr: learning rate; divided by the mean squared length of a row.
        advance: called after each epoch.

    Raises:
        FeaturesTooLarge: the learning rate would not be representable in float32.
    """
    classes, targets = np.unique(labels, return_inverse=True)
    products = Products(features, torch.device(device))
    target = torch.from_numpy(targets.astype(np.int64)).to(products.device)
    count = products.count
    square = sum(float(b.double().square().sum()) for _, b in products.blocks(torch.float32))
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(len(classes), products.dimension, generator=generator)
    length = math.sqrt(square / count) or 1.0
    if not length < _LARGEST_LENGTH:
        raise FeaturesTooLarge("rows too long for float32")
    # So that the initial logits, too, are as for unit length.
    weights = (first * (_FIRST_DEVIATION / length)).to(products.device).requires_grad_()
    biases = torch.zeros(len(classes), device=products.device, requires_grad=True)
    # A bias is the weight of a constant feature 1, so its learning rate is not divided.
    optimizer = torch.optim.SGD(
        [{"params": [weights]}, {"params": [biases]}],
        lr=lr, momentum=_MOMENTUM, weight_decay=weight_decay,
    )  # fmt: skip
    steps = math.ceil(count / batch_size)
    with exact_products():
        for epoch in range(epochs):
            order = torch.randperm(count, generator=generator)
            for step, rows in enumerate(order.split(batch_size)):
                rate = learning_rate(
                    epoch * steps + step, base_lr=lr, final_lr=0.0, warmup_epochs=0,
                    epochs=epochs, steps_per_epoch=steps,
                )  # fmt: skip
                optimizer.param_groups[0]["lr"] = rate / length**2
                optimizer.param_groups[1]["lr"] = rate
                # Sorted, because files are read faster in order.
                chosen = rows.sort().values.to(products.device)
                logits = linear(products.take(chosen), weights, biases)
                optimizer.zero_grad(set_to_none=True)
                cross_entropy(logits, target[chosen]).backward()
                optimizer.step()
            advance()
    return LinearClassifier(
        classes.astype(np.int64), weights.detach().cpu().numpy(), biases.detach().cpu().numpy()
    )


RESULT, CONFUSION, PER_CLASS = "probe.json", "probe-confusion.png", "probe-per-class.csv"


@dataclass(frozen=True)
class SweptC:
    """The metrics of one value of C on the validation videos."""

    c: float
    top1: float
    top5: float
    mean_class: float


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies as fractions; ``confusion`` (U, U) counts rows by true and predicted class."""

    method: str
    settings: dict[str, Any]  # C and tolerance, or neighbours and temperature, or SGD's; normalise
    solution: str  # for an SVM, exact or where it stopped; else empty
    top1: float
    top5: float
    mean_class: float
    per_class: list[ClassAccuracy]
    n_train: int
    n_test: int
    train_split: str
    test_split: str
    dataset: str
    encoder: dict[str, Any]
    sweep: list[SweptC]
    validation: dict[str, Any]  # videos that C was chosen on; empty without a sweep
    notes: list[str]
    class_names: list[str]
    confusion: NDArray[np.int64]
    folder: Path  # where the files go

    def to_json(self) -> dict[str, Any]:
        """The content of ``probe.json``."""
        sweep = [
            {"C": s.c, "top1": s.top1, "top5": s.top5, "mean_class": s.mean_class}
            for s in self.sweep
        ]
        return {
            "method": self.method,
            **self.settings,
            **({"solution": self.solution} if self.solution else {}),
            "top1": self.top1,
            "top5": self.top5,
            "mean_class": self.mean_class,
            "n_train": self.n_train,
            "n_test": self.n_test,
            "split": self.test_split,
            "train_split": self.train_split,
            "dataset": self.dataset,
            "encoder": self.encoder,
            "sweep": sweep,
            "validation": self.validation,
            "notes": self.notes,
            "per_class": [dataclasses.asdict(row) for row in self.per_class],
        }

    def write(self) -> None:
        """Write all files, each atomically."""
        with atomic_path(self.folder / CONFUSION) as temporary:
            draw_confusion(self).savefig(temporary, format="png", dpi=100)
        write_text(self.folder / PER_CLASS, self.per_class_csv())
        write_json(self.folder / RESULT, self.to_json())

    def per_class_csv(self) -> str:
        """One row per class: its accuracy, and the class its videos are most often mistaken for."""
        header = ("label", "label_name", "videos", "right", "accuracy", "mistaken_for", "times")
        rows: list[Sequence[object]] = [header]
        tested = [i for i, row in enumerate(self.confusion) if row.sum()]
        for i, found in zip(tested, self.per_class, strict=True):
            wrong = self.confusion[i].copy()
            right, wrong[i] = int(wrong[i]), 0
            most = int(wrong.argmax())
            mistaken = [self.class_names[most], int(wrong[most])] if wrong[most] else ["", 0]
            rows.append(
                [found.label, found.label_name, found.count, right, found.accuracy, *mistaken]
            )
        return csv_text(rows)

    def table(self) -> str:
        """The metrics as lines for a terminal."""
        given = {name: value for name, value in self.settings.items() if value is not None}
        settings = ", ".join(f"{name} {value}" for name, value in given.items())
        lines = [
            f"{self.method} ({settings}), trained on {self.n_train} videos ({self.train_split}), "
            f"tested on {self.n_test} ({self.test_split})",
            f"top-1 {percent(self.top1)}%   top-5 {percent(self.top5)}%   "
            f"mean class {percent(self.mean_class)}%",
        ]
        lines += [f"SVM: {self.solution}"] if self.solution else []
        if self.sweep:
            lines.append(
                f"C was chosen on {self.validation['videos']} of the training videos "
                f"({self.validation['drawn_by']}):"
            )
        lines += [
            f"C {row.c:g}: top-1 {percent(row.top1)}%   top-5 {percent(row.top5)}%   "
            f"mean class {percent(row.mean_class)}%"
            for row in self.sweep
        ]
        lines += class_lines(self.per_class)
        lines += [f"note: {printable(note)}" for note in self.notes]
        return "\n".join([*lines, printable(str(self.folder / RESULT))])


_ACTIVITYNET_FRAMES = 50  # in the authors' protocol; 30 elsewhere


@dataclass
class _Sets:
    """Training and test rows after scaling."""

    train: FeatureMatrix
    labels: NDArray[np.int64]
    test: FeatureMatrix
    test_labels: NDArray[np.int64]


def probe(config: ProbeConfig, features: Features | None = None) -> ProbeResult:
    """Fit on the training rows, test on the test rows, write the results.

    Features are read block by block and may be larger than memory.

    Args:
        config: settings as given.
        features: used instead of ``config.features``; results are then written only if
            ``config.out`` is set.

    Raises:
        InputError: settings or feature folders cannot be used.
    """
    sweep = _checked(config)
    device = resolve_device(config.device, spare_cores=0)
    chosen = (config.split, config.train_split, config.test_split)
    if features is None:
        rows = read_train_test(config.features, config.test_features, *chosen)
    else:
        rows = train_test(features, features, *chosen)
    labels = rows.train_labels
    if len(np.unique(labels)) < 2:
        raise InputError(
            f"all {len(labels)} training videos are of one class "
            f"({rows.class_name(int(labels[0]))})",
            rows.train.folder,
            "give training videos of at least two classes",
        )
    out = results_folder(config, rows)
    written = features is None or config.out is not None
    if written:
        require_writable(out)
    notes = rows.notes()
    if rows.test.dataset.startswith("activitynet"):
        taken = rows.test.meta.get("frames")
        if taken != _ACTIVITYNET_FRAMES:
            notes.append(
                f"features of {taken} frames per video; the protocol for ActivityNet uses "
                f"{_ACTIVITYNET_FRAMES}"
            )
    c = config.c
    swept: list[SweptC] = []
    validation: dict[str, Any] = {}
    if sweep:
        c, swept, validation = _choose_c(rows, sweep, config, device, notes)
    sets = _scaled(
        FeatureMatrix(rows.train.features, rows.train_rows), labels,
        FeatureMatrix(rows.test.features, rows.test_rows), rows.test_labels,
        config.normalise,
    )  # fmt: skip
    found, solution = _predict(config, c, sets, device, notes)
    result = _result(config, c, rows, found, solution, swept, validation, notes, out)
    if written:
        result.write()
    return result


def results_folder(config: ProbeConfig, rows: TrainTest) -> Path:
    """The folder for results: the feature folder for the SVM on the default rows.

    Other methods and splits get subfolders, so that no result replaces another.
    """
    if config.out is not None:
        return Path(config.out)
    usual = (
        config.method == "svm"
        and config.split in (None, usual_split(rows.train))
        and (config.train_split, config.test_split) == ("train", None)
    )
    name = f"{PROBES}{config.method}-{rows.train_split}-{rows.test_split}"
    return Path(config.features, "" if usual else re.sub(r"[^\w.]+", "-", name))


def accuracies(
    classes: NDArray[np.int64], scores: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Top-1, top-5 and mean class accuracy of scores (M, K) for labels (M,)."""
    return predictions_of(classes, [(slice(None), scores)], labels).accuracies()


def _checked(config: ProbeConfig) -> list[float]:
    """Validate the settings; return the values of ``--sweep``, ascending."""
    try:
        sweep = [float(value) for value in (config.sweep or "").split(",") if value.strip()]
    except ValueError:
        raise InputError(f"{config.sweep!r} is not a list of numbers", "--sweep") from None
    if config.sweep is not None and not sweep:
        raise InputError("is empty", "--sweep", "give numbers, for example 0.01,0.1,1,10")
    if config.method != "svm" and sweep:
        raise InputError("only the SVM has a C", "--sweep", "remove it or use --method svm")
    if config.method != "svm" and config.tolerance is not None:
        raise InputError("is for the SVM", "--tolerance", "remove it or use --method svm")
    if config.tolerance is not None and not 0 < config.tolerance < math.inf:
        raise InputError("must be above 0", "--tolerance", "LIBLINEAR's default is 0.01")
    if not all(value > 0 and math.isfinite(value) for value in [config.c, *sweep]):
        raise InputError("must be above 0", "-C, --sweep")
    if config.neighbours < 1 or not config.temperature > 0:
        raise InputError("must be above 0", "--neighbours, --temperature")
    if min(config.epochs, config.batch_size) < 1 or not 0 < config.lr < math.inf:
        raise InputError("must be above 0", "--lr, --epochs, --batch-size")
    if not 0 <= config.weight_decay < math.inf:
        raise InputError("must be 0 or more", "--weight-decay")
    return sorted(set(sweep))


def _scaled(
    train: FeatureMatrix,
    labels: NDArray[np.int64],
    test: FeatureMatrix,
    test_labels: NDArray[np.int64],
    how: str,
) -> _Sets:
    """Scale both sets with statistics of the training rows only."""
    scaling = fit_scaling(train, how)
    return _Sets(train.scaled(scaling), labels, test.scaled(scaling), test_labels)


def _choose_c(
    rows: TrainTest,
    sweep: Sequence[float],
    config: ProbeConfig,
    device: torch.device,
    notes: list[str],
) -> tuple[float, list[SweptC], dict[str, Any]]:
    """Choose the C with the best top-1 on held-out training rows (ties: the smallest)."""
    labels, features = rows.train_labels, rows.train
    groups, kind = video_groups(features)
    outside = held_out(labels, [groups[row] for row in rows.train_rows])
    if not outside.any() or len(np.unique(labels[~outside])) < 2:
        raise InputError(
            "no training videos can be held out to choose C",
            features.folder,
            "remove --sweep: there are too few videos per class or too few recordings",
        )
    inner = _scaled(
        FeatureMatrix(features.features, rows.train_rows[~outside]), labels[~outside],
        FeatureMatrix(features.features, rows.train_rows[outside]), labels[outside],
        config.normalise,
    )  # fmt: skip
    swept = []
    for c in sweep:
        said: list[str] = []
        found, _ = _predict(config, c, inner, device, said)
        swept.append(SweptC(c, *found.accuracies()))
        notes += [f"C {c:g}: {note}" for note in said]
    best = max(swept, key=lambda row: row.top1).c
    validation = {
        "videos": int(outside.sum()),
        "classes": len(np.unique(labels[outside])),
        "drawn_by": kind if kind == SINGLE_VIDEOS else f"{kind} kept whole",
    }
    return best, swept, validation


def _predict(
    config: ProbeConfig, c: float, sets: _Sets, device: torch.device, notes: list[str]
) -> tuple[Predictions, str]:
    """Fit on the training rows, predict the test rows; also return an SVM's solution."""
    if config.method == "knn":
        classes = np.unique(sets.labels)
        votes = knn_votes(
            sets.train, sets.labels, sets.test,
            neighbours=config.neighbours, temperature=config.temperature, device=device,
        )  # fmt: skip
        return predictions_of(classes, _shown(votes, len(sets.test)), sets.test_labels), ""
    try:
        fitted = _fit(config, c, sets, device, notes)
    except FeaturesTooLarge as error:
        raise InputError(
            "holds values too large for float32", config.features, "use --normalise l2 or standard"
        ) from error
    scores = ((place, fitted.scores(block)) for place, block in sets.test.blocks())
    solution = fitted.solution if isinstance(fitted, LinearSVM) else ""
    return predictions_of(fitted.classes, scores, sets.test_labels), solution


def _fit(
    config: ProbeConfig, c: float, sets: _Sets, device: torch.device, notes: list[str]
) -> LinearSVM | LinearClassifier:
    if config.method == "linear":
        with progress("Linear classifier", config.epochs, "epochs") as shown:
            linear = fit_linear(
                sets.train, sets.labels, lr=config.lr, epochs=config.epochs,
                batch_size=config.batch_size, weight_decay=config.weight_decay, seed=config.seed,
                device=device, advance=shown.advance,
            )  # fmt: skip
        if not np.isfinite(linear.weights).all():
            raise InputError("training diverged", "--lr", "lower it")
        return linear
    with progress(f"SVM, C {c:g}", len(np.unique(sets.labels)), "classes") as shown:
        svm = fit_svm(
            sets.train, sets.labels, c=c, tolerance=config.tolerance, device=device,
            advance=shown.advance,
        )  # fmt: skip
    if not svm.converged.all():
        notes.append(
            f"{int((~svm.converged).sum())} classes of the SVM did not converge (at most "
            f"{svm.gap.max():.1g} above the minimum)"
        )
    return svm


def _shown(
    blocks: Iterator[tuple[slice, NDArray[np.float64]]], total: int
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    with progress("Neighbours", total, "videos") as shown:
        for place, votes in blocks:
            yield place, votes
            shown.advance(place.stop - place.start)


def _result(
    config: ProbeConfig,
    c: float,
    rows: TrainTest,
    found: Predictions,
    solution: str,
    sweep: list[SweptC],
    validation: dict[str, Any],
    notes: list[str],
    folder: Path,
) -> ProbeResult:
    every, confusion = confusions(rows.train_labels, found)
    names = [rows.class_name(int(label)) for label in every]
    settings: dict[str, Any] = {"C": c, "tolerance": config.tolerance}
    if config.method == "knn":
        settings = {"neighbours": config.neighbours, "temperature": config.temperature}
    elif config.method == "linear":
        own = ("lr", "epochs", "batch_size", "weight_decay", "seed")
        settings = {name: getattr(config, name) for name in own}
    top1, top5, mean_class = found.accuracies()
    return ProbeResult(
        method=config.method,
        settings={**settings, "normalise": config.normalise},
        solution=solution,
        top1=top1,
        top5=top5,
        mean_class=mean_class,
        per_class=class_accuracies(every, names, confusion),
        n_train=len(rows.train_rows),
        n_test=len(rows.test_rows),
        train_split=rows.train_split,
        test_split=rows.test_split,
        dataset=rows.test.dataset,
        encoder=rows.train.encoder,
        sweep=sweep,
        validation=validation,
        notes=notes,
        class_names=names,
        confusion=confusion,
        folder=folder,
    )
