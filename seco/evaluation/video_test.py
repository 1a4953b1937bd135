"""Test a fine-tuned classifier: mean scores over clips and crops of each video (authors' code).

Clips overlap and a frame's feature does not depend on its neighbours, so each distinct frame is
decoded once and passes through the backbone once per crop; clips are means over its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from seco import __version__
from seco.checkpoints.weights import load_finetuned
from seco.config import PROTOCOL, FinetuneTestConfig, require_test_ranges
from seco.data.clips import LabelledVideos, clip_starts, segment_middles
from seco.data.crops import crop_corners, decode_jpeg, resize_short_edge
from seco.data.loader import forked_loader
from seco.data.splits import split_notes
from seco.data.transforms import normalise
from seco.evaluation.metrics import (
    ClassAccuracy,
    class_accuracies,
    class_lines,
    confusions,
    draw_confusion,
    predictions_of,
)
from seco.models.backbones import require_size
from seco.models.classifier import Classes, VideoClassifier
from seco.processes.device import loader_workers, resolve_device, to_device, uses_bf16
from seco.processes.ranks import Ranks, joined, one_voice
from seco.text import percent
from shards.atomic import atomic_path, require_writable, write_json
from shards.errors import InputError, PeerLost, Stopped, TooManyExcluded
from shards.progress import progress
from shards.signals import StopRequest
from shards.storage import UnreadableFrame, readable
from shards.terminal import printable, say, show
from shards.untrusted import decode_json, read_regular

RESULT, CONFUSION = "finetune.json", "finetune-confusion.png"


@dataclass(frozen=True)
class FinetuneResult:
    """Accuracies as fractions; ``confusion`` (U, U) counts videos by true and predicted class."""

    dataset: str
    split: str
    top1: float
    top5: float
    mean_class: float
    clips: int
    crops: int
    protocol: dict[str, Any]
    encoder: dict[str, Any]
    n_train: int
    n_test: int
    unreadable: int  # excluded test videos
    classes: int
    notes: list[str]
    per_class: list[ClassAccuracy]
    class_names: list[str]
    confusion: NDArray[np.int64]
    method: str = "fine-tuned"

    def to_json(self) -> dict[str, Any]:
        """The content of ``finetune.json``."""
        left_out = ("class_names", "confusion", "method")
        fields = [f.name for f in dataclasses.fields(self) if f.name not in left_out]
        rows = [dataclasses.asdict(row) for row in self.per_class]
        given = {name: getattr(self, name) for name in fields}
        return {**given, "per_class": rows, "toolkit": __version__}

    def table(self) -> str:
        """The metrics as lines for a terminal."""
        lines = [
            f"{printable(self.dataset)} split {printable(self.split)}: trained on {self.n_train} "
            f"videos, tested on {self.n_test} with {self.clips} clips x {self.crops} crops",
            f"top-1 {percent(self.top1)}%   top-5 {percent(self.top5)}%   "
            f"mean class {percent(self.mean_class)}%",
            *class_lines(self.per_class),
        ]
        return "\n".join(lines + [f"note: {printable(note)}" for note in self.notes])

    def write(self, folder: Path) -> Path:
        """Write ``finetune.json`` and the confusion matrix; return the path of the former."""
        with atomic_path(folder / CONFUSION) as temporary:
            draw_confusion(self).savefig(temporary, format="png", dpi=100)
        write_json(folder / RESULT, self.to_json())
        return folder / RESULT


def finetune_result(
    videos: LabelledVideos,
    classes: Classes,
    scores: NDArray[np.float64],
    protocol: dict[str, Any],
    encoder: dict[str, Any],
    dataset: str,
) -> FinetuneResult:
    """Compute the result from scores (M, K) of the test videos; NaN rows are unreadable videos.

    Raises:
        InputError: no test video could be read.
    """
    known = np.isfinite(scores).all(axis=1)
    if not known.any():
        raise InputError("no test video could be read", videos.folder, "see `seco verify`")
    labels, scores = videos.labels[videos.test][known], scores[known]
    row_labels = np.array(classes.labels, dtype=np.int64)
    names = dict(zip(classes.labels, classes.names, strict=True))
    found = predictions_of(row_labels, [(slice(None), scores)], labels)
    every, confusion = confusions(row_labels, found)
    class_names = [names.get(label, videos.class_name(label)) for label in every.tolist()]
    notes = split_notes(videos.unlabelled, row_labels, labels, videos.class_name)
    training = protocol["training"]
    epochs, planned = training["epochs"], training["epochs_planned"]
    if epochs is not None and epochs != planned:
        notes.append(f"training stopped after {epochs:g} of {planned} epochs")
    if videos.empty:
        notes.append(f"{videos.empty} training videos without frames are left out")
    if not known.all():
        notes.append(f"{int((~known).sum())} test videos could not be read and are left out")
    top1, top5, mean_class = found.accuracies()
    return FinetuneResult(
        dataset=dataset,
        split=videos.split,
        top1=top1,
        top5=top5,
        mean_class=mean_class,
        clips=protocol["clips"],
        crops=protocol["crops"],
        protocol=protocol,
        encoder=encoder,
        n_train=len(videos.train),
        n_test=len(labels),
        unreadable=int((~known).sum()),
        classes=len(classes.labels),
        notes=notes,
        per_class=class_accuracies(every, class_names, confusion),
        class_names=class_names,
        confusion=confusion,
    )


@dataclass(frozen=True)
class ClipProtocol:
    """The clips and crops each video is tested with."""

    clips: int
    clip_frames: int
    crops: int  # 1 or 3
    size: int  # short edge and side of the crops, px
    middles: bool = False  # instead: one clip of the middle frames of ``clip_frames`` segments

    def frames(self, count: int) -> list[list[int]]:
        """The frame numbers of each clip of a video with ``count`` frames."""
        if self.middles:
            return [segment_middles(count, self.clip_frames)]
        starts = clip_starts(count, self.clips, self.clip_frames)
        return [list(range(start, min(start + self.clip_frames, count))) for start in starts]


@dataclass(frozen=True)
class _Part:
    """Some frames of a test video: (F, H, W, 3) uint8, or the reason they are unreadable."""

    images: Tensor | None
    reason: str = ""


class _Frames(Dataset[_Part]):
    """Dataset whose item (video, frames) is these frames, resized."""

    def __init__(self, videos: LabelledVideos, short_edge: int) -> None:
        self._shards = videos.shards
        self._short_edge = short_edge

    def __getitem__(self, task: tuple[int, list[int]]) -> _Part:
        video, frames = task
        try:
            images = [
                resize_short_edge(decode_jpeg(readable(jpeg)), self._short_edge)
                for jpeg in self._shards.read_frames([(video, frame) for frame in frames])
            ]
            return _Part(torch.from_numpy(np.stack(images)))
        except (UnreadableFrame, ValueError) as error:  # damaged, or frames of different sizes
            return _Part(None, str(error))


class VideoScores:
    """Scores videos with a classifier, on all ranks together.

    A video's scores do not depend on which rank computes them, nor on the other videos.

    Args:
        videos: the dataset.
        protocol: which clips and crops.
        device: this rank's device.
        ranks: the process group; each rank takes every ``size``-th video.
        bf16: whether the backbone runs in bf16.
        workers: number of workers; does not change results.
        frames_a_forward: frames per forward pass, each with all its crops.
    """

    def __init__(
        self,
        videos: LabelledVideos,
        protocol: ClipProtocol,
        device: torch.device,
        ranks: Ranks,
        *,
        bf16: bool,
        workers: int,
        frames_a_forward: int,
    ) -> None:
        self._videos = videos
        self._protocol = protocol
        self._device = device
        self._ranks = ranks
        self._bf16 = bf16
        self._workers = workers
        self._step = frames_a_forward

    def of(
        self,
        model: VideoClassifier,
        numbers: NDArray[np.int64],
        done: Callable[[], None] = lambda: None,
    ) -> NDArray[np.float64]:
        """Scores (M, K) of videos (M,); NaN for unreadable videos, which are reported.

        Args:
            model: on the device; its training mode is restored.
            done: called after each video of this rank; may raise.

        Raises:
            InputError: a video's scores are not finite.
        """
        ranks = self._ranks
        ranks.from_first(model.backbone.buffers())  # use the running statistics that are saved
        classes = model.classifier.out_features
        share = -(-len(numbers) // ranks.size)
        mine = numbers[ranks.rank :: ranks.size]
        rows = np.full((share, classes), np.nan)
        training = model.training
        model.eval()
        try:
            for place, scores in enumerate(self._scores(model, mine)):
                if scores is not None:
                    self._require_finite(scores, int(mine[place]))
                    rows[place] = scores
                done()
        finally:
            model.train(training)
        everyone = ranks.gather_host(rows).reshape(ranks.size, share, classes)
        # Rank r's video i is number i · size + r.
        merged: NDArray[np.float64] = everyone.transpose(1, 0, 2).reshape(-1, classes)
        return merged[: len(numbers)]

    def _require_finite(self, scores: NDArray[np.float64], video: int) -> None:
        if not np.isfinite(scores).all():
            raise InputError(
                "the network's scores are not finite",
                self._videos.shards.key(video),
                "train again with a lower --lr, or try --precision fp32",
            )

    @torch.inference_mode()
    def _scores(
        self, model: VideoClassifier, numbers: Sequence[int] | NDArray[np.int64]
    ) -> Iterator[NDArray[np.float64] | None]:
        plans = [self._protocol.frames(self._videos.shards.frame_count(int(v))) for v in numbers]
        distinct = [sorted({frame for clip in clips for frame in clip}) for clips in plans]
        parts = [[f[at : at + self._step] for at in range(0, len(f), self._step)] for f in distinct]
        tasks = [(int(v), part) for v, p in zip(numbers, parts, strict=True) for part in p]
        wanted = _Frames(self._videos, self._protocol.size)
        with forked_loader(wanted, lambda: iter(tasks), self._workers, None) as read:
            for video, clips, frames, cut in zip(numbers, plans, distinct, parts, strict=True):
                features: list[Tensor] = []
                reason = ""
                for part in (next(read) for _ in cut):
                    reason = reason or part.reason
                    if part.images is not None and not reason:
                        features.append(self._features(model, part.images))
                if features and not reason:
                    yield _of_video(model, torch.cat(features), frames, clips)
                    continue
                key = self._videos.shards.key(int(video))
                say(f"seco: left out: {key}: {reason or 'no frames'}")
                yield None

    def _features(self, model: VideoClassifier, frames: Tensor) -> Tensor:
        """(F, crops, C) features of the crops of (F, H, W, 3) uint8 frames."""
        size, crops = self._protocol.size, self._protocol.crops
        images = to_device(frames, self._device).permute(0, 3, 1, 2)
        corners = crop_corners(images.shape[2], images.shape[3], size, crops)
        cut = [images[:, :, top : top + size, left : left + size] for top, left in corners]
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            features = model.backbone(normalise(torch.stack(cut, 1).flatten(0, 1)))
        together: Tensor = features.float().view(len(frames), crops, -1)
        return together


def _of_video(
    model: VideoClassifier, features: Tensor, frames: list[int], clips: list[list[int]]
) -> NDArray[np.float64]:
    """(K,) mean score over clips and crops, from (F, crops, C) features of distinct frames."""
    place = {frame: number for number, frame in enumerate(frames)}
    index = torch.tensor([[place[frame] for frame in clip] for clip in clips])
    of_clips = features[index.to(features.device)].mean(1)  # (clips, crops, C)
    scores: NDArray[np.float64] = model.scores(of_clips).double().mean((0, 1)).cpu().numpy()
    return scores


# Training settings recorded in a result.
_TRAINING = (
    *("segments", "epochs", "batch_size", "lr", "lr_decay_epochs", "momentum", "weight_decay"),
    *("clip_norm", "dropout", "freeze_bn", "bn_group", "crop_size", "min_crop_area", "seed"),
)


@dataclass(frozen=True)
class FineTuned:
    """A classifier with its classes and the record of its training."""

    model: VideoClassifier
    classes: Classes
    encoder: dict[str, Any]  # the pre-trained encoder
    dataset: str
    settings: Mapping[str, Any]  # of the fine-tuning run
    epochs: float | None  # epochs reached; None if not recorded


def finetune_eval(config: FinetuneTestConfig) -> str:
    """Test a fine-tuned checkpoint on its split's test videos.

    Returns:
        Text for the user; empty on all ranks but the first.

    Raises:
        InputError: the checkpoint or the shards cannot be used, or do not match.
        TooManyExcluded: everything is written, but more than ``max_failures`` percent of the
            videos could not be read.
        Stopped: a signal arrived.
    """
    device = resolve_device(config.device)
    with joined(device) as ranks:
        with one_voice():
            require_test_ranges(config)
            path = Path(config.checkpoint)
            model, classes, said, settings = load_finetuned(path)
            config = _as_its_run(config, settings)
            require_size(settings["arch"], _protocol(config).size, "--test-size")
            videos = LabelledVideos(config.shards, settings.get("split"))
            videos.require("test")
            _require_same_classes(videos, classes, path)
            out = Path(config.out or path.parent)
            _require_other_protocols_elsewhere(config, out)
            if ranks.first:
                require_writable(out)
        fine_tuned = FineTuned(
            model.to(device), classes, said["encoder"], said["dataset"], settings, said["epochs"]
        )
        return written(tested(fine_tuned, videos, config, device, ranks), config, out, ranks)


def tested(
    fine_tuned: FineTuned,
    videos: LabelledVideos,
    config: FinetuneTestConfig,
    device: torch.device,
    ranks: Ranks,
) -> FinetuneResult:
    """Score the test videos by the test protocol.

    Raises:
        Stopped: a signal arrived.
        InputError: no test video could be read.
    """
    protocol = _protocol(config)
    scorer = scorer_of(videos, protocol, config, device, ranks)
    mine = len(videos.test[ranks.rank :: ranks.size])
    with StopRequest() as stop, progress("Testing", mine, "videos", quiet=not ranks.first) as shown:

        def done() -> None:
            if stop:
                said = (
                    f"{stop.signal_name}: stopped while testing; run `seco finetune-eval` to test"
                )
                raise Stopped(said if ranks.first else "")
            shown.advance()

        scores = scorer.of(fine_tuned.model, videos.test, done)
    said = dataclasses.asdict(protocol)
    del said["middles"]
    said["precision"] = "bf16" if uses_bf16(config.precision, device) else "fp32"
    said["training"] = {name: fine_tuned.settings.get(name) for name in _TRAINING} | {
        "epochs": fine_tuned.epochs,
        "epochs_planned": fine_tuned.settings.get("epochs"),
    }
    return finetune_result(
        videos, fine_tuned.classes, scores, said, fine_tuned.encoder, fine_tuned.dataset
    )


def scorer_of(
    videos: LabelledVideos,
    protocol: ClipProtocol,
    config: FinetuneTestConfig,
    device: torch.device,
    ranks: Ranks,
) -> VideoScores:
    """A scorer of videos for a protocol and settings."""
    return VideoScores(
        videos,
        protocol,
        device,
        ranks,
        bf16=uses_bf16(config.precision, device),
        workers=loader_workers(config.workers, device),
        frames_a_forward=config.test_frames,
    )


def written(result: FinetuneResult, config: FinetuneTestConfig, out: Path, ranks: Ranks) -> str:
    """Write a result on the first rank; return the text for the user there.

    Raises:
        TooManyExcluded: everything is written, but more than ``max_failures`` percent of the
            videos could not be read.
        PeerLost: the same, on the other ranks.
    """
    shown = f"{result.table()}\n{result.write(out)}" if ranks.first else ""
    wanted = result.n_test + result.unreadable
    if result.unreadable * 100 <= config.max_failures * wanted:
        return shown
    if not ranks.first:
        raise PeerLost
    show(shown)
    raise TooManyExcluded(
        f"{result.unreadable} of {wanted} test videos could not be read, more than "
        f"--max-failures {config.max_failures:g}",
        out,
        "prepare or copy the shards again",
    )


def _as_its_run(config: FinetuneTestConfig, settings: Mapping[str, Any]) -> FinetuneTestConfig:
    """Fill in the run's test protocol where ``config`` leaves it open."""
    of_run: dict[str, Any] = {
        name: settings.get(name) for name in PROTOCOL if getattr(config, name) is None
    }
    if not all(isinstance(value, int) for value in of_run.values()):
        raise InputError("is a damaged checkpoint of `seco finetune`", config.checkpoint)
    resolved = dataclasses.replace(config, **of_run)
    require_test_ranges(resolved)
    return resolved


class _Result(msgspec.Struct):
    protocol: dict[str, Any]


def _protocol(config: FinetuneTestConfig) -> ClipProtocol:
    clips, frames, crops, size = (getattr(config, name) for name in PROTOCOL)
    return ClipProtocol(clips, frames, crops, size)


def _require_other_protocols_elsewhere(config: FinetuneTestConfig, out: Path) -> None:
    """Refuse to replace a result of another test protocol unless ``--out`` is given."""
    if config.out is not None:
        return
    there: dict[str, Any] = {}
    with suppress(InputError):  # no result, or an unreadable one
        found = out / RESULT
        there = decode_json(_Result, read_regular(found), found, "is not a result").protocol
    for name, here in dataclasses.asdict(_protocol(config)).items():
        if there.get(name, here) != here:
            raise InputError(
                f"is of another test protocol ({name} {there[name]}, not {here})",
                out / RESULT,
                "give --out",
            )


def _require_same_classes(videos: LabelledVideos, classes: Classes, path: Path) -> None:
    for label, name in zip(classes.labels, classes.names, strict=True):
        here = videos.class_name(label)
        if here != name:
            raise InputError(
                f"label {label} is {here!r} here and {name!r} in {path}",
                videos.folder,
                "give the shards it was trained on",
            )
