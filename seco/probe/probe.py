"""``seco probe``: how well frozen features are classified by a linear classifier or neighbours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seco.evaluation.class_results import class_accuracies, confusions
from seco.evaluation.groups import SINGLE_VIDEOS, video_groups
from seco.evaluation.predictions import Predictions, judge
from seco.evaluation.splits import TrainTest, held_out, read_train_test, usual_split
from seco.features.matrix import FeatureMatrix, FeaturesTooLarge, fit_scaling
from seco.features.store import PROBES
from seco.probe.config import ProbeConfig
from seco.probe.knn import knn_votes
from seco.probe.linear_sgd import LinearClassifier, fit_linear
from seco.probe.result import ProbeResult, SweptC
from seco.probe.svm import LinearSVM, fit_svm
from seco.processes.device import resolve_device
from shards.atomic import require_writable
from shards.errors import InputError
from shards.progress import progress

_ACTIVITYNET_FRAMES = 50  # the authors' protocol; 30 elsewhere


@dataclass
class _Sets:
    """Training and test rows as a classifier gets them."""

    train: FeatureMatrix
    labels: NDArray[np.int64]
    test: FeatureMatrix
    test_labels: NDArray[np.int64]


def probe(config: ProbeConfig) -> ProbeResult:
    """Fit on the training rows, test on the others; write the results.

    Features are read a block at a time and may be larger than memory.

    Raises:
        InputError: settings or feature folders cannot be used.
    """
    sweep = _checked(config)
    device = resolve_device(config.device, spare_cores=0)
    rows = read_train_test(
        config.features, config.test_features, config.split, config.train_split, config.test_split
    )
    labels = rows.train_labels
    if len(np.unique(labels)) < 2:
        raise InputError(
            f"all {len(labels)} training videos are of one class "
            f"({rows.class_name(int(labels[0]))})",
            rows.train.folder,
            "there is nothing to tell apart",
        )
    out = results_folder(config, rows)
    require_writable(out)
    notes = rows.notes()
    if rows.test.dataset.startswith("activitynet"):
        taken = rows.test.meta.get("frames")
        if taken != _ACTIVITYNET_FRAMES:
            notes.append(
                f"features of {taken} frames a video; the protocol of ActivityNet has "
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
    result.write()
    return result


def results_folder(config: ProbeConfig, rows: TrainTest) -> Path:
    """Where results go: those of the SVM on the usual rows beside the features.

    Those of other methods and splits have folders of their own below, so that none replaces
    another's.
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
    return judge(classes, [(slice(None), scores)], labels).accuracies()


def _checked(config: ProbeConfig) -> list[float]:
    """Refuse settings that cannot be used; returns the values of ``--sweep``, ascending."""
    try:
        sweep = [float(value) for value in (config.sweep or "").split(",") if value.strip()]
    except ValueError:
        raise InputError(f"{config.sweep!r} is no list of numbers", "--sweep") from None
    if config.sweep is not None and not sweep:
        raise InputError("holds no number", "--sweep", "for example 0.01,0.1,1,10")
    if config.method != "svm" and sweep:
        raise InputError("only the SVM has a C", "--sweep", "leave it out or use --method svm")
    if config.method != "svm" and config.tolerance is not None:
        raise InputError("is for the SVM", "--tolerance", "leave it out or use --method svm")
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
    """Both sets scaled by what the training rows alone say."""
    scaling = fit_scaling(train, how)
    return _Sets(train.scaled(scaling), labels, test.scaled(scaling), test_labels)


def _choose_c(
    rows: TrainTest,
    sweep: Sequence[float],
    config: ProbeConfig,
    device: torch.device,
    notes: list[str],
) -> tuple[float, list[SweptC], dict[str, Any]]:
    """The C of the best top-1 on a part of the training rows (the smallest of equal ones)."""
    labels, features = rows.train_labels, rows.train
    groups, kind = video_groups(features)
    outside = held_out(labels, [groups[row] for row in rows.train_rows])
    if not outside.any() or len(np.unique(labels[~outside])) < 2:
        raise InputError(
            "no part of the training videos can be held out to choose C on",
            features.folder,
            "leave out --sweep: there are too few videos a class or recordings",
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
    """Fit on the training rows and judge the test rows; also says how an SVM was solved."""
    if config.method == "knn":
        classes = np.unique(sets.labels)
        votes = knn_votes(
            sets.train, sets.labels, sets.test,
            neighbours=config.neighbours, temperature=config.temperature, device=device,
        )  # fmt: skip
        return judge(classes, _shown(votes, len(sets.test)), sets.test_labels), ""
    try:
        fitted = _fit(config, c, sets, device, notes)
    except FeaturesTooLarge as error:
        raise InputError(
            "holds values too large for float32", config.features, "use --normalise l2 or standard"
        ) from error
    scores = ((place, fitted.scores(block)) for place, block in sets.test.blocks())
    solution = fitted.solution if isinstance(fitted, LinearSVM) else ""
    return judge(fitted.classes, scores, sets.test_labels), solution


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
            raise InputError("training diverged", "--lr", "give a smaller one")
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
