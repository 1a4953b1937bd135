"""What a figure was measured with, setting by setting, beside what the paper (or its authors' code)
used: what equals it, what differs, and what nobody wrote down.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seco.report.origin import tasks_of
from seco.report.paper_tables import TEST_VIDEOS, TRAIN_VIDEOS, is_whole, known_dataset
from seco.report.records import Evaluation, Probe, words
from seco.report.sources import Run

SAME, DIFFERS, UNKNOWN = "same", "differs", "unknown"
NOT_RECORDED = "not recorded"

_PAPER, _AUTHORS, _SIAMFC = "paper §5.2", "authors' code", "SiamFC; the paper is silent"
_LONGEST_NAME = 500
_SHARDS = re.compile(r"(-\d{3,}|[-_]?[{<*?\[].*)?\.(tar|json)$")
_EPOCH_CHECKPOINT = re.compile(r"epoch-(\d+)\.pt")


@dataclass(frozen=True)
class Compared:
    """A setting: the paper's value, ours as recorded, and whether they are the same."""

    stage: str
    what: str
    paper: str
    source: str  # of the paper's value
    here: str
    state: str  # SAME, DIFFERS or UNKNOWN

    @property
    def whose(self) -> str:
        """Who names the value that it is compared with."""
        return re.split(r" §| Eq|[:;]", self.source)[0] or "paper"


@dataclass(frozen=True)
class Reference:
    """The value of a setting in the paper; ``names`` are those it is recorded under."""

    what: str
    names: tuple[str, ...]
    value: str | float
    source: str = _PAPER


PRETRAINING = (
    Reference("batch", ("batch_size",), 512),
    Reference("queue", ("queue_size",), 131_072),
    Reference("view, px", ("crop_size",), 224),
    Reference("learning rate", ("lr",), 0.2),
    Reference("learning rate at the end", ("final_lr",), 0, "paper §5.2, “annealed down to zero”"),
    Reference("epochs of warm-up", ("warmup_epochs",), 0, "paper §5.2, which names none"),
    Reference("temperature", ("temperature",), 0.1),
    Reference("EMA", ("ema",), 0.999),
    Reference("embedding", ("embedding_dim",), 128),
    Reference("heads", ("heads",), "shared"),
    Reference("intra loss", ("intra",), "three-way", "paper Eq. 3"),
    Reference("frames of a triplet", ("sampling",), "uniform", "paper §4.1"),
    Reference("BatchNorm group", ("bn_group",), 128, "authors' code: 4 ranks of 128"),
    Reference("SGD momentum", ("momentum",), 0.9, _AUTHORS),
    Reference("weight decay", ("weight_decay",), 1e-4, _AUTHORS),
    Reference("smallest crop", ("min_crop_area",), 0.2, _AUTHORS),
    Reference("temperature of intra", ("intra_temperature",), 0.1),
    Reference("queue at the start", ("queue_init",), "unit", "MoCo; the paper is silent"),
    Reference("same video masked", ("mask_same_video",), "False", "paper Eq. 2, which masks none"),
)
FEATURES = (
    Reference("short edge, px", ("short_edge",), 256),
    Reference("centre crop, px", ("crop_size",), 224),
)
PROBE = (
    Reference("C", ("C",), 1, _AUTHORS),
    Reference("stopped at tolerance", ("tolerance",), 0.01, "authors' code: LIBLINEAR's default"),
    Reference("features scaled", ("normalise",), "none", _AUTHORS),
)
FINETUNING = (
    Reference("clips of a test video", ("clips",), 20, _AUTHORS),
    Reference("crops of a clip", ("crops",), 3, _AUTHORS),
    Reference("frames of a clip", ("clip_frames",), 16, _AUTHORS),
    Reference("test crop, px", ("test_size", "size"), 256, _AUTHORS),
    Reference("epochs", ("epochs",), 150, _AUTHORS),
    Reference("batch", ("batch_size",), 256, "authors' code: 16 × 4 × 4"),
    Reference("learning rate", ("lr",), 1e-3, _AUTHORS),
    Reference("segments", ("segments",), 7, _AUTHORS),
    Reference("dropout", ("dropout",), 0.9, _AUTHORS),
    Reference("frozen BatchNorm", ("freeze_bn",), "all-but-first", _AUTHORS),
    Reference("weight decay", ("weight_decay",), 1e-4, _AUTHORS),
    Reference("training view, px", ("crop_size",), 224, _AUTHORS),
    Reference("learning rate falls after", ("lr_decay_epochs",), "50,100", _AUTHORS),
    Reference("SGD momentum", ("momentum",), 0.9, _AUTHORS),
    Reference("largest gradient norm", ("clip_norm",), 40, _AUTHORS),
    Reference("BatchNorm group, clips", ("bn_group",), 16, _AUTHORS),
    Reference("smallest crop", ("min_crop_area",), 0.2, _AUTHORS),
)
TRACKING = (
    Reference("feature layer", ("feature_layer",), "layer4", "paper §5.2: on top of res5"),
    Reference("raw features", ("raw_features",), "True", "paper §5.2 names nothing else"),
    Reference("epochs", ("epochs",), 50, _SIAMFC),
    Reference("batch", ("batch_size",), 8, _SIAMFC),
    Reference("learning rate", ("lr",), 1e-2, _SIAMFC),
    Reference("learning rate at the end", ("final_lr",), 1e-5, _SIAMFC),
    Reference("SGD momentum", ("momentum",), 0.9, _SIAMFC),
    Reference("weight decay", ("weight_decay",), 5e-4, _SIAMFC),
    Reference("pairs of a sequence", ("pairs_per_sequence",), 1, _SIAMFC),
    Reference("frames between a pair", ("max_gap",), 99, _SIAMFC),
    Reference("change of scale in training", ("max_stretch",), 0.05, _SIAMFC),
    Reference("radius of the target, px", ("positive_radius",), 16, _SIAMFC),
    Reference("factor of the response", ("response_scale",), 1e-3, _SIAMFC),
    Reference("scales searched", ("scales",), 3, _SIAMFC),
    Reference("scale step", ("scale_step",), 1.0375, _SIAMFC),
    Reference("scale penalty", ("scale_penalty",), 0.9745, _SIAMFC),
    Reference("change of scale", ("scale_update",), 0.59, _SIAMFC),
    Reference("window", ("window",), 0.176, _SIAMFC),
)


def pretraining_protocol(
    encoder: Mapping[str, Any], run: Run | None, arch: str
) -> Iterator[Compared]:
    """How an encoder was trained, as far as its run is in the report.

    Args:
        encoder: as a result records it.
        run: that trained it.
        arch: of the table's SeCo rows.
    """
    stage = "pre-training"
    yield _compared(stage, Reference("backbone", ("arch",), arch), encoder)
    checkpoint = words(encoder.get("checkpoint"))
    if checkpoint == "random":
        yield Compared(stage, "training", "400 epochs", _PAPER, "none: random weights", DIFFERS)
        return
    if run is None:
        here = f"the run of {checkpoint or 'its checkpoint'} is not in the report"
        yield Compared(stage, "training", "400 epochs, batch 512", _PAPER, here, UNKNOWN)
        return
    if tasks_of(run.config) is None:
        here = f"{run.folder}, which is no pre-training"
        yield Compared(stage, "training", "400 epochs, batch 512", _PAPER, here, DIFFERS)
        return
    yield from _pretraining_data(stage, run)
    yield _epochs(stage, run, checkpoint)
    init = run.config.get("init")
    here = f"{words(init)}, as named" if init else "random weights"
    state = UNKNOWN if init else DIFFERS
    yield Compared(stage, "start from", "MoCo on ImageNet", _PAPER, here, state)
    for reference in PRETRAINING:
        yield _compared(stage, reference, run.config)


def probe_protocol(probe: Probe, meta: Mapping[str, Any], dataset: str) -> Iterator[Compared]:
    """Features and classifier of a probe on a data set of the paper."""
    stage = "features"
    frames = 50 if dataset == "activitynet" else 30
    yield _compared(stage, Reference("frames a video", ("frames",), frames), meta)
    for reference in FEATURES:
        yield _compared(stage, reference, meta)
    unreadable = meta.get("unreadable")
    if unreadable:
        yield Compared(
            stage, "videos left out", "–", "", f"{words(unreadable)} unreadable", DIFFERS
        )
    stage = "linear SVM"
    yield _videos(stage, "training videos", TRAIN_VIDEOS[dataset], probe.n_train)
    yield _videos(stage, "test videos", TEST_VIDEOS[dataset], probe.n_test)
    tolerance = "exact" if probe.tolerance is None else probe.tolerance
    recorded = {"C": probe.c, "tolerance": tolerance, "normalise": probe.normalise or None}
    for reference in PROBE:
        yield _compared(stage, reference, recorded)


def evaluation_protocol(
    item: Evaluation, dataset: str, settings: Mapping[str, Any]
) -> Iterator[Compared]:
    """Training and test of a fine-tuned network or a tracker on a data set of the paper.

    Args:
        settings: of the run in the same folder, which the result's own settings complete.
    """
    recorded = {**settings, **item.settings}
    references: tuple[Reference, ...]
    if item.kind == "finetune":
        stage = "fine-tuning"
        yield _videos(stage, "training videos", TRAIN_VIDEOS[dataset], item.n_train)
        yield _videos(stage, "test videos", TEST_VIDEOS[dataset], item.n_test)
        split = item.split or NOT_RECORDED
        yield Compared(stage, "split", "not stated", "paper §5.1, §5.4", split, UNKNOWN)
        references = FINETUNING
    else:
        stage = "tracking"
        sequences = "of 100" if item.n_test is not None else ""
        here = f"{words(item.n_test)} {sequences}".strip() or NOT_RECORDED
        whole = UNKNOWN if item.n_test is None else SAME if item.n_test == 100 else DIFFERS
        yield Compared(stage, "sequences", "100", "paper §5.1", here, whole)
        yield _tracking_data(stage, item.settings.get("train_shards"))
        if "epochs_planned" not in item.settings:
            recorded.pop("epochs", None)  # older files name those planned; reached may be fewer
        references = TRACKING
    for reference in references:
        yield _compared(stage, reference, recorded)


def in_state(protocol: Sequence[Compared], state: str) -> list[Compared]:
    """Those settings alone."""
    return [setting for setting in protocol if setting.state == state]


def _pretraining_data(stage: str, run: Run) -> Iterator[Compared]:
    shards = run.config.get("shards")
    names = _set_names(shards)
    trained = bool(names) and all(
        known_dataset(name) == "kinetics400" and "val" not in name for name in names
    )
    state = SAME if trained else DIFFERS if names else UNKNOWN
    here = ", ".join(names) or NOT_RECORDED
    if run.config.get("split") is not None:
        here += f", training videos of split {words(run.config['split'])}"
    yield Compared(stage, "data", "training set of Kinetics-400", _PAPER, here, state)
    videos = _videos_an_epoch(run)
    if videos is not None:
        whole = TRAIN_VIDEOS["kinetics400"]
        state = SAME if is_whole(videos, whole) else DIFFERS
        here = f"about {videos:,}, by its steps"
        yield Compared(stage, "videos", f"{whole:,}", "paper §5.1", here, state)


def _tracking_data(stage: str, shards: Any) -> Compared:
    names = _set_names(shards)
    whole = all(name.lower() in ("got10k", "got10k-train") for name in names)
    state = UNKNOWN if not names else SAME if whole else DIFFERS
    here = ", ".join(names) or NOT_RECORDED
    return Compared(stage, "training set", "GOT-10k", _PAPER, here, state)


def _set_names(shards: Any) -> list[str]:
    """Of a recorded ``shards``, whatever it is."""
    specs = [shards] if isinstance(shards, str) else shards if isinstance(shards, list) else []
    return [_set_name(words(spec)) for spec in specs]


def _set_name(spec: str) -> str:
    """``k400`` of ``shards/k400.json`` or ``shards/k400-{000..999}.tar``."""
    return _SHARDS.sub("", Path(spec[-_LONGEST_NAME:]).name) or spec


def _videos_an_epoch(run: Run) -> int | None:
    """From the last step and the batch, once the run is in its last epoch; batches are whole."""
    epoch, batch = run.log.curves.get("epoch"), run.config.get("batch_size")
    if epoch is None or not isinstance(batch, int) or not math.isfinite(epoch.last):
        return None
    epochs = int(epoch.last) + 1
    if epochs != run.config.get("epochs"):
        return None
    return round(run.log.last_step / epochs) * batch


def _epochs(stage: str, run: Run, checkpoint: str) -> Compared:
    planned = run.config.get("epochs")
    kept = _EPOCH_CHECKPOINT.fullmatch(Path(checkpoint).name)
    logged = run.log.curves.get("epoch")
    reached = logged.last + 1 if logged is not None and math.isfinite(logged.last) else None
    if kept:
        done: float | None = int(kept[1])
        here = f"{done:g} of {words(planned) or 'unknown'} planned"
    elif reached is not None and planned is not None and reached != planned:
        done, here = reached, f"its log ends in epoch {reached:g} of {words(planned)}"
    else:
        done = planned if isinstance(planned, int) else None
        here = words(planned) or NOT_RECORDED
    state = UNKNOWN if done is None else SAME if done == 400 else DIFFERS
    return Compared(stage, "epochs", "400", _PAPER, here, state)


def _videos(stage: str, what: str, whole: int, here: int | None) -> Compared:
    if here is None:
        return Compared(stage, what, f"{whole:,}", "paper §5.1", NOT_RECORDED, UNKNOWN)
    state = SAME if is_whole(here, whole) else DIFFERS
    return Compared(stage, what, f"{whole:,}", "paper §5.1", f"{here:,}", state)


def _compared(stage: str, reference: Reference, recorded: Mapping[str, Any]) -> Compared:
    found = [recorded[name] for name in reference.names if recorded.get(name) is not None]
    here = found[0] if found else None
    paper = words(reference.value)
    if here is None or words(here) == "":
        return Compared(stage, reference.what, paper, reference.source, NOT_RECORDED, UNKNOWN)
    state = SAME if _equal(here, reference.value) else DIFFERS
    return Compared(stage, reference.what, paper, reference.source, words(here), state)


def _equal(here: Any, paper: str | float) -> bool:
    if isinstance(paper, str):
        return words(here) == paper
    number = isinstance(here, (int, float)) and not isinstance(here, bool)
    return number and math.isclose(here, paper, rel_tol=1e-6, abs_tol=1e-12)
