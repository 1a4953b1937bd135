"""The public API: the commands as functions, and the parts of a training loop of one's own.

``import seco`` loads none of this, nor torch; the names below are loaded when they are used. Every
function raises :class:`seco.InputError` with what is wrong, where, and what to do.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import os
import tempfile
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
from torch import nn

from seco.checkpoints.weights import Backbone, load_backbone
from seco.config import (
    ExportConfig,
    ExtractConfig,
    PretrainConfig,
    ProbeConfig,
    PublishConfig,
    resolve_pretrain,
)
from seco.data.loader import EpochLoader, TripletBatch
from seco.data.transforms import view_config
from seco.data.triplets import Triplet, TripletDataset
from seco.evaluation.probe import ProbeResult
from seco.evaluation.splits import train_test
from seco.features.store import Features, read_features
from seco.models.seco import SeCo, SeCoOutput
from seco.training.logging import Callback
from shards.errors import InputError
from shards.opening import CacheSettings, open_stream
from shards.terminal import say

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from pipelines._prepare import PrepareReport
    from seco.report.publish import Published

__all__ = [
    "Backbone",
    "Callback",
    "Features",
    "InputError",
    "ProbeResult",
    "Run",
    "SeCo",
    "SeCoOutput",
    "Triplet",
    "TripletBatch",
    "TripletDataset",
    "export",
    "extract",
    "load_backbone",
    "prepare",
    "pretrain",
    "probe",
    "publish",
    "read_features",
    "recall_at_k",
    "triplet_loader",
]

REPORT = "report.html"
_IN_MEMORY = "memory"
_Config = TypeVar("_Config", bound="DataclassInstance")
Specification = str | Path | Iterable[str | Path]


def prepare(dataset: str, src: str | Path, out: str | Path = "", **settings: Any) -> PrepareReport:
    """Decode the videos of a dataset into shards: ``seco prepare``.

    Args:
        dataset: ``kinetics``, ``ucf101``, ..., or ``folder`` for any tree of videos.
        src: folder of the raw videos.
        out: folder the shards go to.
        settings: other options of the command, for example ``short_edge=256``.

    Returns:
        What was made; ``sets[0].manifest`` is what the other functions take as ``shards``.

    Raises:
        InputError: something given cannot be used, or no video at all could be read.
        TooManyExcluded: all is written, but more than ``max_failures`` percent failed.
    """
    from pipelines._config import PrepareConfig
    from pipelines._prepare import prepare as run

    return run(_given(PrepareConfig, dataset=dataset, src=str(src), out=str(out), **settings))


def triplet_loader(
    shards: Specification,
    batch_size: int = 256,
    crop_size: int = 224,
    *,
    workers: int = 4,
    seed: int = 0,
    sampling: str = "uniform",
    split: str | None = None,
    max_gap_seconds: float | None = None,
    negatives: str = "all",
    min_crop_area: float = 0.2,
    cache_dir: str | None = None,
    cache_gb: float = 100.0,
    window_shards: int | None = None,
    steps_per_epoch: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> EpochLoader:
    """The batches that ``seco pretrain`` trains on; each iteration is the next epoch.

    Args:
        shards: pattern, glob, manifest or folder.
        batch_size: of all ranks.
        crop_size: S, side of a view in px.
        workers: processes that read, decode and crop; they never change a result.
        seed: of order, frames and augmentations.
        sampling: ``uniform`` (paper) or ``halves`` (authors' code).
        split: the training videos of this official split only.
        max_gap_seconds: longest time from the first frame of a triplet to the last.
        negatives: give :class:`SeCo` the same; with ``other-groups``, ``batch.video`` has the
            numbers of groups, such as the clips of one recording.
        min_crop_area: smallest area of a random crop, of the frame's.
        cache_dir: keep remote shards in this folder, at most ``cache_gb`` gigabytes of them.
        window_shards: shuffle within so many shards; 0: all.
        steps_per_epoch: length of an epoch of shards without an index.
        rank: of this process, of ``world_size``; each gets its part of every batch.

    Raises:
        InputError: the shards cannot be used, or hold fewer videos than one batch.
    """
    # For its checks of ranges.
    config = resolve_pretrain(
        _given(
            PretrainConfig,
            batch_size=batch_size, crop_size=crop_size, workers=workers, sampling=sampling,
            max_gap_seconds=max_gap_seconds, negatives=negatives, min_crop_area=min_crop_area,
            cache_gb=cache_gb, window_shards=window_shards, steps_per_epoch=steps_per_epoch,
        ),
        world_size,
    )  # fmt: skip
    stream = open_stream(
        _specification(shards),
        batch_size,
        sampling,
        seed,
        cache=CacheSettings(cache_dir, cache_gb) if cache_dir else None,
        window_shards=window_shards,
        steps_per_epoch=steps_per_epoch,
        split=split,
        max_gap_seconds=max_gap_seconds,
        by_group=negatives == "other-groups",
        rank=rank,
        world_size=world_size,
    )
    return EpochLoader(stream, crop_size, view_config(config), workers)


@dataclass(frozen=True)
class Run:
    """A finished pre-training."""

    folder: Path
    checkpoint: Path  # the last

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        lines = (self.folder / "metrics.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]


def pretrain(
    config: PretrainConfig | None = None, *, callbacks: Sequence[Callback] = (), **settings: Any
) -> Run:
    """Run or resume a pre-training on the processes there are, and write its report.

    In a notebook that is one process with one GPU; under ``torchrun`` each process calls it. The
    command ``seco pretrain`` starts one process per GPU by itself.

    Args:
        config: all settings.
        settings: options of the command by name, for example ``shards="k400.json", epochs=100``;
            they replace those of ``config``.
        callbacks: told of steps, epochs and checkpoints; only those of the first rank are.

    Raises:
        InputError: settings, shards, checkpoint or output folder cannot be used; the loss is no
            longer finite; too many samples cannot be read.
        Stopped: a signal came; everything is saved.
        PeerLost: another process ended, and has said why.
    """
    from seco.training.pretrain import pretrain as train

    given = (vars(config) if config else {}) | settings
    for name in ("shards", "knn_shards"):
        if name in given:
            given[name] = _specification(given[name])
    config = _given(PretrainConfig, **given)
    last = train(config, callbacks)
    if os.environ.get("RANK", "0") == "0":
        _report(last.parent)
    return Run(last.parent, last)


def _report(run: Path) -> None:
    """The run's curves as a page in its folder; a page that fails costs no run."""
    from seco.report.report import write_report

    try:
        found = write_report([run], run / REPORT)
    except InputError as error:
        say(f"seco pretrain: no report was written: {error}")
        return
    for item in found.unread:
        say(
            f"seco pretrain: could not be read for the report: {item.path}: {item.reason}",
        )


def extract(
    backbone: nn.Module | str | Path,
    shards: Specification,
    out: str | Path | None = None,
    **settings: Any,
) -> Features:
    """Frozen features, one vector per video: ``seco extract-features``.

    Args:
        backbone: of :func:`load_backbone`; a checkpoint; ``random``; or any module that makes
            (N, C) of normalised images (N, 3, H, W). It is copied, and the copy is frozen.
        shards: pattern, glob, manifest or folder.
        out: feature folder to write; None: the features are kept in memory.
        settings: other options of the command, for example ``frames=30, crop_size=224``.

    Raises:
        InputError: something given cannot be used, or not one video can be read.
        TooManyExcluded: more than ``max_failures`` percent of the videos cannot be read.
    """
    from seco.features.extract import extract_features

    if isinstance(backbone, (str, Path)):
        backbone = load_backbone(backbone, settings.pop("arch", None), settings.get("seed", 0))
    else:
        backbone = copy.deepcopy(backbone)
    if not isinstance(backbone, Backbone):
        backbone = Backbone(backbone, type(backbone).__name__, _IN_MEMORY)
    settings |= {"shards": _specification(shards), "checkpoint": backbone.source}
    if out is not None:
        config = _given(ExtractConfig, **settings, out=str(out))
        return read_features(extract_features(config, backbone))
    with tempfile.TemporaryDirectory(prefix="seco-") as folder:
        found = read_features(
            extract_features(_given(ExtractConfig, **settings, out=folder), backbone, quiet=True)
        )
        return dataclasses.replace(
            found,
            folder=Path(_IN_MEMORY),
            features=np.array(found.features),
            halves=np.array(found.halves),
            all_frames=None if found.all_frames is None else np.array(found.all_frames),
        )


def export(checkpoint: str | Path, out: str | Path, format: str, **settings: Any) -> Path:
    """Write the backbone in a format that other programs read: ``seco export``.

    Args:
        checkpoint: any file that :func:`load_backbone` takes.
        out: file to write; for ``huggingface`` a new folder.
        format: ``onnx``, ``torch-export``, ``huggingface``, ``safetensors``, ``torchvision``,
            ``moco`` or ``seco-authors``.
        settings: other options of the command, for example ``size=112``.

    Returns:
        ``out``.

    Raises:
        InputError: something given cannot be used, or a package is missing.
    """
    from seco.checkpoints.exchange import export_checkpoint

    given = {"file": str(checkpoint), "out": str(out), "format": format, **settings}
    export_checkpoint(_given(ExportConfig, **given))
    return Path(out)


def probe(features: Features | str | Path, **settings: Any) -> ProbeResult:
    """Classify frozen features with a linear SVM, kNN or softmax: ``seco probe``.

    Args:
        features: of :func:`extract`, or a feature folder.
        settings: options of the command, for example ``split="1", method="knn"``. Results of
            features in memory are written only with ``out``, those of a folder always.

    Raises:
        InputError: no labels or splits, or a setting that cannot be used.
    """
    from seco.evaluation.probe import probe as run

    if isinstance(features, Features):
        return run(_given(ProbeConfig, features=str(features.folder), **settings), features)
    return run(_given(ProbeConfig, features=str(features), **settings))


def recall_at_k(
    features: Features | str | Path,
    k: int = 1,
    *,
    split: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
) -> float:
    """The share of test videos with a training video of their class among the nearest k.

    Similarity is the cosine. ``seco retrieve evaluate`` measures more.

    Args:
        features: of :func:`extract`, or a feature folder.
        split: default: "1", else "official", else the only one.

    Raises:
        InputError: no labels or splits, or ``k`` below 1.
    """
    from seco.evaluation.nearest import ExactIndex
    from seco.features.matrix import unit_vectors

    if k < 1:
        raise InputError("must be 1 or more", "k")
    if not isinstance(features, Features):
        features = read_features(features)
    rows = train_test(features, features, split, train_split, test_split)
    index = ExactIndex(unit_vectors(features.features, rows.train_rows), "cpu")
    queries = unit_vectors(features.features, rows.test_rows)
    _, found = index.search(queries, min(k, len(rows.train_rows)))
    right = (rows.train_labels[found] == rows.test_labels[:, None]) & (found >= 0)
    return float(right.any(axis=1).mean())


def publish(run: Run | str | Path, out: str | Path, **settings: Any) -> Published:
    """Write a folder to share, with weights and model card: ``seco publish``.

    Args:
        run: of :func:`pretrain`, or the folder of a run.
        out: folder to write.
        settings: options of the command, for example ``results="features/mine"``,
            ``license="apache-2.0"``, ``push="me/seco-mine"``, ``private=False``.

    Returns:
        The folder, and the address on the Hub if ``push`` is given.

    Raises:
        InputError: the run, the shards or a result cannot be used, ``out`` holds other files, or
            the Hub refuses the upload.
    """
    from seco.report.publish import publish as run_publish

    for name in ("shards", "results"):
        if name in settings:
            settings[name] = _specification(settings[name])
    folder = run.folder if isinstance(run, Run) else run
    return run_publish(_given(PublishConfig, run=str(folder), out=str(out), **settings))


def _given(kind: type[_Config], **settings: Any) -> _Config:
    """Return settings that were given by name, as the command line would check them."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name, value in settings.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=3)
            advice = f"did you mean {' or '.join(close)}?" if close else "see --help of the command"
            raise InputError("there is no such setting", name, advice)
        settings[name] = value = _of_type(hints[name], name, value)
        choices = fields[name].metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise InputError(f"{value!r} is not one of {', '.join(choices)}", name)
    lacking = (
        name
        for name, field in fields.items()
        if name not in settings and field.default is field.default_factory is dataclasses.MISSING
    )
    for name in lacking:
        raise InputError("has to be given", name)
    return kind(**settings)


def _of_type(hint: Any, name: str, value: Any) -> Any:
    """A value of its field's type; 10 for a float stays 10, which is what digests of sets have."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Path):
        value = str(value)
    try:
        converted = msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        raise InputError(str(error).replace("null", "None"), name) from error
    return value if converted == value else converted


def _specification(shards: Specification) -> tuple[str, ...]:
    return (str(shards),) if isinstance(shards, (str, Path)) else tuple(map(str, shards))
