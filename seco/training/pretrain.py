"""``seco pretrain``: the run, its warnings about the model's health, and the online kNN."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from seco.checkpoints.convert import (
    AUTHORS,
    SHARED,
    STATE_DICT,
    EncoderWeights,
    Layer,
    Weights,
    read_weights,
)
from seco.checkpoints.named import weights_file
from seco.config import TASKS, PretrainConfig, negative_count, peak_lr, resolve_pretrain
from seco.data.frames import VideoFrames
from seco.data.loader import Batch, DeviceViews, TripletLoader
from seco.data.transforms import VIEW_DRAWS, normalise, view_config
from seco.data.triplets import VIEWS
from seco.evaluation.knn import knn_scores
from seco.models.backbones import TIMM_PREFIX, backbone_shape, pretrained_timm, require_size
from seco.models.seco import SeCo, SeCoOutput, spread
from seco.processes.device import loader_workers, resolve_device
from seco.processes.ranks import Ranks, joined, one_voice
from seco.schedule import learning_rate
from seco.training.logging import Callback, RunLog
from seco.training.loop import TrainingRun
from seco.training.state import RunState, checkpoint_to_resume, resumed_settings
from seco.training.step import GlobalRows, TrainingStep, for_device
from shards.atomic import require_writable
from shards.errors import InputError
from shards.opening import CacheSettings, open_shards, open_stream
from shards.signals import StopRequest
from shards.terminal import say

_ORDER_TRIAL_EPOCHS = 20  # still at chance: the clips may have no direction of time
_CHANCE_BAND = 0.02  # around the chance accuracy of 0.5
_COLLAPSED = 0.1  # feature std; 1 for embeddings spread evenly over the sphere
_WAITS_TOO_LONG = 0.2  # fraction of the time
_SETTLED_STEPS = 50  # the loader fills its buffers first
_ORDER_LOOKS = 20  # minimum number of logged steps
_MEMORY = 0.9  # of the running mean of the order accuracy


def chance_levels(config: PretrainConfig) -> dict[str, float]:
    """The loss of each task at chance: ln(1 + K), ln 3 or ln 2, ln 2."""
    intra = 3 if config.intra == "three-way" else 2
    return {
        "inter": math.log(1 + negative_count(config.queue_size, config.batch_size)),
        "intra": math.log(intra),
        "order": math.log(2),
    }


def status(metrics: Mapping[str, Any], speed: Mapping[str, float]) -> str:
    """Metrics for the end of the progress line."""
    parts = [f"{t} {metrics[f'loss_{t}']:.3f}" for t in TASKS if f"loss_{t}" in metrics]
    accuracies = [f"{metrics[f'acc_{t}']:.0%}" for t in TASKS if f"acc_{t}" in metrics]
    queue = f"queue {metrics['queue_fill']:.0%}, " if "queue_fill" in metrics else ""
    return (
        f"loss {metrics['loss']:.3f} ({', '.join(parts)}), "
        f"accuracy {'/'.join(accuracies)}, feature std {metrics['feature_std']:.2f}, {queue}"
        f"{speed['images_per_s']:.0f} images/s, {speed['data_wait']:.0%} waiting for data"
    )


class Health:
    """Checks every logged step and prints each kind of warning once.

    Args:
        config: resolved settings.
        say: prints a line to the user.
    """

    def __init__(self, config: PretrainConfig, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()
        self._begun_at: int | None = None
        self._order: float | None = None
        self._looks = 0
        chance = chance_levels(config)
        # Fewer where queued keys are masked, which depends on the batch.
        masks = config.mask_same_video or config.negatives != "all"
        about = {"inter": "at most "} if masks else {}
        tasks = [task for task in TASKS if task in config.tasks.split(",")]
        levels = ", ".join(f"{task} {about.get(task, '')}{chance[task]:.3f}" for task in tasks)
        say(f"loss at chance: {levels}")

    def look(self, step: int, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        """Warn about problems that these metrics show.

        Args:
            step: steps done.
            metrics: metrics of the step.
            speed: speed since the last logged step.
        """
        if self._begun_at is None:
            self._begun_at = step
        if "acc_order" in metrics:
            accuracy = float(metrics["acc_order"])
            before = accuracy if self._order is None else self._order
            self._order = _MEMORY * before + (1 - _MEMORY) * accuracy
            self._looks += 1
            at_chance = self._looks >= _ORDER_LOOKS and abs(self._order - 0.5) < _CHANCE_BAND
            if metrics["epoch"] >= _ORDER_TRIAL_EPOCHS and at_chance:
                self._warn(
                    "order",
                    f"order accuracy is still at chance after {metrics['epoch']} epochs: the clips "
                    "may have no direction of time; --tasks inter,intra removes the task",
                )
        if metrics["feature_std"] < _COLLAPSED:
            self._warn(
                "spread",
                f"feature collapse (feature std {metrics['feature_std']:.3f} of 1): lower --lr",
            )
        if step - self._begun_at > _SETTLED_STEPS and speed["data_wait"] > _WAITS_TOO_LONG:
            self._warn(
                "data",
                f"{speed['data_wait']:.0%} of the time is spent waiting for data: raise --workers, "
                "keep the shards on a local disk, or use --decode nvjpeg on a GPU",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(f"warning: {message}")


_FRAMES = 5  # per video; enough for a trend
_CROP_OF_EDGE = 224 / 256
_HELD_OUT = 2  # without splits, every second video is a test video


class OnlineKnn:
    """Accuracy of a kNN on the mean backbone feature of a few frames of each video.

    Training videos vote on test videos if the shards have splits; otherwise even-numbered videos
    vote on odd ones. The ranks share the videos.

    Args:
        config: resolved settings.
        device: this rank's device.
        ranks: the process group.

    Raises:
        InputError: the shards have no labels.
    """

    def __init__(self, config: PretrainConfig, device: torch.device, ranks: Ranks) -> None:
        self._every = config.knn_every_epochs
        self._device = device
        self._ranks = ranks
        self._shards = open_shards(config.knn_shards)
        self._labels = self._shards.labels.astype(np.int64)
        size = config.crop_size
        short_edge = max(size, round(size / _CROP_OF_EDGE))
        self._frames = VideoFrames(self._shards, _FRAMES, short_edge, size)
        labelled = self._labels >= 0
        train, test = self._split()
        self._train, self._test = train & labelled, test & labelled
        self._untrained: float | None = None
        if not self._train.any() or not self._test.any():
            raise InputError(
                "hold no labelled training or test videos", "--knn-shards", "give labelled shards"
            )

    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        for values in self._shards.splits.values():
            names = np.array([value or "" for value in values])
            if (names == "train").any() and (names != "train").any():
                return names == "train", (names != "train") & (names != "")
        odd = np.arange(len(self._shards)) % _HELD_OUT == 1
        return ~odd, odd

    def due(self, epoch: int, last: bool) -> bool:
        """Whether to run after this epoch."""
        return last or epoch % self._every == 0

    def figures(self, model: SeCo) -> dict[str, float]:
        """Compute ``knn_top1``; empty if no video can be read."""
        features = self._features(model)
        known = np.isfinite(features).all(axis=1)
        train, test = self._train & known, self._test & known
        if not train.any() or not test.any():
            return {}
        classes, votes = knn_scores(features[train], self._labels[train], features[test])
        right = classes[votes.argmax(1)] == self._labels[test]
        return {"knn_top1": float(right.mean())}

    def sentence(self, step: int, found: Mapping[str, float]) -> str:
        """Format the accuracy of a step, compared with the untrained encoder's if known."""
        if not found:
            return "kNN: no video can be read"
        top1 = found["knn_top1"]
        if step == 0:
            self._untrained = top1
            return f"kNN, untrained: accuracy {top1:.1%} on {int(self._test.sum())} videos"
        beside = "" if self._untrained is None else f"; untrained {self._untrained:.1%}"
        return f"kNN, step {step}: accuracy {top1:.1%}{beside}"

    @torch.no_grad()
    def _features(self, model: SeCo) -> np.ndarray:
        """(V, C) features; NaN for unreadable videos."""
        backbone = model.query_encoder.backbone
        self._ranks.from_first(backbone.buffers())  # use the running statistics that are saved
        share = -(-len(self._shards) // self._ranks.size)
        mine = range(
            self._ranks.rank * share, min((self._ranks.rank + 1) * share, len(self._shards))
        )
        rows: list[np.ndarray] = []
        with _evaluating(backbone):
            for video in mine:
                frames, reason = self._frames.video(video)
                if reason:
                    rows.append(np.full(0, np.nan))
                    continue
                feature = backbone(normalise(frames.to(self._device))).float().mean(0)
                rows.append(feature.cpu().numpy().astype(np.float64))
        width = self._ranks.gather_host(np.array([[max((len(r) for r in rows), default=0)]]))
        padded = np.full((share, int(width.max())), np.nan)
        for place, row in enumerate(rows):
            padded[place, : len(row)] = row
        everyone: np.ndarray = self._ranks.gather_host(padded)[: len(self._shards)]
        return everyone


@contextlib.contextmanager
def _evaluating(backbone: torch.nn.Module) -> Any:
    backbone.eval()
    try:
        yield
    finally:
        backbone.train()


def initialise(model: SeCo, config: PretrainConfig) -> None:
    """Load ``--init`` into a new model and report in one line what was loaded.

    Both encoders start from the file's query encoder, as in MoCo; with the authors' SeCo files,
    each starts from its counterpart. A head is loaded if the file has one of the same name; a
    file's single head is copied into each (as the authors do with MoCo v2). The queue is not
    loaded: its keys are of other images. The key encoder takes the BatchNorm statistics, too, which
    the authors' code leaves at their defaults; training does not read them.

    Raises:
        InputError: the file cannot be used, or has another architecture; weights given by name
            cannot be had.
    """
    assert config.init is not None
    named = None
    if config.init.startswith(TIMM_PREFIX):
        _require_arch(config.init, config)  # before it is fetched
        backbone = pretrained_timm(config.init).state_dict()
        query = EncoderWeights(backbone=backbone, heads={})
        weights = Weights(layout=STATE_DICT, arch=config.init, query=query)
    else:
        path, named = weights_file(config.init, config.arch)
        weights = read_weights(path, config.arch)
    _require_arch(weights.arch, config)
    query = weights.query
    key = weights.key if weights.layout == AUTHORS and weights.key is not None else query
    model.query_encoder.backbone.load_state_dict(query.backbone, strict=True)
    model.key_encoder.backbone.load_state_dict(key.backbone, strict=True)
    heads = [name for name in model.query_encoder.heads if _take_head(model, name, query, key)]
    classified = model.head_of.get("order") in heads and _take(
        model.order_classifier, query.order_classifier
    )
    if os.environ.get("RANK", "0") == "0":  # once per run
        said = _summary(weights, model, heads, classified, own_key=key is not query)
        licence = f" (licence: {named.licence})" if named else ""
        say(f"seco pretrain: --init {config.init}{licence}: {said}")


def _require_arch(arch: str, config: PretrainConfig) -> None:
    if arch != config.arch:
        advice = f"give --arch {arch}"
        raise InputError(f"holds a {arch}, not a {config.arch}", config.init, advice)


def _take_head(model: SeCo, name: str, query: EncoderWeights, key: EncoderWeights) -> bool:
    source = name if name in query.heads else SHARED
    return _take(model.query_encoder.heads[name], query.heads.get(source)) and _take(
        model.key_encoder.heads[name], key.heads.get(source)
    )


def _take(module: nn.Module, layer: Layer | None) -> bool:
    """Load ``layer`` if it exists and fits (a head of another width stays new)."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if layer is None or {name: tensor.shape for name, tensor in layer.items()} != shapes:
        return False
    module.load_state_dict(layer, strict=True)
    return True


def _summary(
    weights: Weights, model: SeCo, heads: list[str], classified: bool, own_key: bool
) -> str:
    """One line: what the file is, what was loaded from it, what was not, what starts new."""
    new = [name for name in model.query_encoder.heads if name not in heads]
    copied = (
        " (from its single head)" if heads and set(heads).isdisjoint(weights.query.heads) else ""
    )
    used = {name if name in weights.query.heads else SHARED for name in heads}
    unused = [name for name in weights.query.heads if name not in used]
    taken = ["the backbone"]
    taken += [f"{_named_heads(heads)}{copied}"] if heads else []
    taken += ["the order classifier"] if classified else []
    taken += ["the key encoder"] if own_key else []
    left = [*weights.left, *([_named_heads(unused)] if unused else [])]
    left += ["order classifier"] if weights.query.order_classifier and not classified else []
    left += ["key encoder"] if weights.key is not None and not own_key else []
    left += ["queue"] if weights.queue is not None else []
    parts = [f"{weights.description()}: loaded {', '.join(taken)}"]
    parts += [f"not loaded: {', '.join(left)}"] if left else []
    parts += [f"new: {_named_heads(new)}"] if new else []
    return "; ".join(parts)


def _named_heads(names: list[str]) -> str:
    return f"head{'s' if len(names) > 1 else ''} {'/'.join(names)}"


_DRAWN = VIEWS * VIEW_DRAWS  # first columns of the rows that ranks exchange; then:
_ORDER, _VIDEO, _COLUMNS = range(_DRAWN, _DRAWN + 3)


def pretrain(config: PretrainConfig, callbacks: Sequence[Callback] = ()) -> Path:
    """Run or resume pre-training on all ranks; return the path of its last checkpoint.

    Args:
        config: settings as given.
        callbacks: called on the first rank.

    Raises:
        InputError: settings, shards, checkpoint or output folder cannot be used; the loss is not
            finite; too many samples cannot be read.
        Stopped: a signal arrived; everything is saved.
        PeerLost: another process ended and has reported why.
    """
    device = resolve_device(config.device)
    with joined(device) as ranks:
        with one_voice():
            config = with_optimizer(config)
            trainer = Trainer(_adopted(resolve_pretrain(config, ranks.size), config), ranks, device)
            trainer.callbacks = callbacks
        return trainer.run()


def with_optimizer(config: PretrainConfig) -> PretrainConfig:
    """Choose AdamW, as in MoCo v3, for a backbone without BatchNorm unless another is given.

    Raises:
        InputError: no backbone has this name.
    """
    if backbone_shape(config.arch).has_batchnorm:
        # What auto means: a run made with either is resumed with the other.
        return dataclasses.replace(config, optimizer=config.optimizer.replace("sgd", "auto"))
    return dataclasses.replace(config, optimizer=config.optimizer.replace("auto", "adamw"))


def _adopted(resolved: PretrainConfig, given: PretrainConfig) -> PretrainConfig:
    """Take BatchNorm group and learning rate of the run being resumed, unless they are given.

    The default group depends on the number of ranks, which may have changed; the default learning
    rate was 0.2 for every batch size in earlier versions.
    """
    left_open = [name for name in ("bn_group", "lr") if getattr(given, name) is None]
    run = resumed_settings(given.out, given.resume) if left_open else {}
    kept = {name: run[name] for name in left_open if name in run}
    return dataclasses.replace(resolved, **kept)


class Trainer(TrainingRun[Batch, SeCoOutput]):
    """One process of a pre-training run: data, model, optimizer, log, position."""

    command, title = "pretrain", "Pre-training"

    def __init__(
        self,
        config: PretrainConfig,
        ranks: Ranks | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.ranks = ranks = ranks or Ranks()
        self.device = device = device or resolve_device(config.device)
        if config.out and ranks.first:
            require_writable(Path(config.out))  # before anything slow
        self.stream = open_stream(
            config.shards,
            config.batch_size,
            config.sampling or "uniform",
            config.seed,
            cache=CacheSettings(config.cache_dir, config.cache_gb) if config.cache_dir else None,
            window_shards=config.window_shards,
            steps_per_epoch=config.steps_per_epoch,
            split=config.split,
            max_gap_seconds=config.max_gap_seconds,
            by_group=config.negatives == "other-groups",
            rank=ranks.rank,
            world_size=ranks.size,
        )
        self.out = Path(config.out or f"runs/{self.stream.name}")
        # Record the chosen window: another one would give another order.
        window = self.stream.window_shards if config.steps_per_epoch is None else None
        self.config = config = dataclasses.replace(config, out=str(self.out), window_shards=window)
        if ranks.first:
            require_writable(self.out)
        checkpoint = checkpoint_to_resume(self.out, config.resume)
        if config.decode == "nvjpeg" and device.type != "cuda":
            raise InputError("nvjpeg needs a GPU", "--decode", "remove it")
        if self.stream.left_out:
            self._say(f"{self.stream.left_out} videos have fewer than 3 frames and are left out")
        self.steps_per_epoch = self.stream.steps_per_epoch
        self.images_per_step = config.batch_size * VIEWS
        require_size(config.arch, config.crop_size)
        torch.manual_seed(config.seed)
        model = SeCo(config)
        if config.init and checkpoint is None:
            initialise(model, config)
        self.model = model.to(device).train()
        self.view_config = view_config(config)
        self.device_views = DeviceViews(device, config.crop_size, self.view_config)
        self.knn = OnlineKnn(config, device, ranks) if config.knn_shards else None
        self.step = TrainingStep(
            model,
            for_device(config, device),
            self.view_config,
            self.device_views,
            ranks,
            device,
        )
        self.state = RunState(
            self.out,
            config,
            model,
            self.step.optimizer,
            self.stream.digest(),
            writes=ranks.first,
            about={"steps_per_epoch": self.steps_per_epoch},
        )
        if checkpoint is not None:
            self.state.restore(checkpoint)
            self._say(f"resuming from step {self.state.step} of {self.total_steps} ({checkpoint})")
        self.health = Health(config, self._say)
        self._require_agreement()  # no rank writes before all have looked for a run

    @contextlib.contextmanager
    def _batches(self, first: int, last: int) -> Iterator[Iterator[Batch]]:
        loader = TripletLoader(
            self.stream,
            self.config.crop_size,
            self.view_config,
            workers=loader_workers(self.config.workers, self.device),
            first_step=first,
            last_step=last,
            decode=self.config.decode,
            views_on=self.config.views_on,
            pin=self.device.type == "cuda",
        )
        with loader, contextlib.closing(iter(loader)) as batches:
            yield batches

    def _begin(self, log: RunLog | None, stop: StopRequest) -> None:
        """Log the kNN accuracy of the untrained encoder."""
        if self.knn is not None and self.state.step == 0:
            found = self._evaluate()
            if log is not None:
                log.log(0, found, {})

    def _evaluates(self, epoch: int, last: bool) -> bool:
        return self.knn is not None and self.knn.due(epoch, last)

    def _evaluate(self) -> dict[str, float]:
        assert self.knn is not None
        found = self.knn.figures(self.model)
        self._say(self.knn.sentence(self.state.step, found))
        return found

    def _look(self, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        self.health.look(self.state.step, metrics, speed)

    def _told(self, batch: Batch | None) -> NDArray[np.float64]:
        """Random numbers, order and video of each row: the shuffle sends views to other ranks."""
        n = self.stream.rows
        told = np.zeros((n, _COLUMNS))
        if batch is not None:
            told[:, :_DRAWN] = batch.uniform.transpose(1, 0, 2).reshape(n, _DRAWN)
            told[:, _ORDER], told[:, _VIDEO] = batch.order.numpy(), batch.videos.numpy()
        return told

    def _train_step(self, batch: Batch, lr: float) -> SeCoOutput:
        rows = self._gathered
        uniform = rows[:, :_DRAWN].reshape(-1, VIEWS, VIEW_DRAWS).transpose(1, 0, 2)
        known = GlobalRows(
            uniform=uniform,
            order=torch.from_numpy(rows[:, _ORDER].astype(np.int64)),
            videos=torch.from_numpy(rows[:, _VIDEO].astype(np.int64)),
        )
        return self.step.run(self.device_views.crops(batch), known, self.state.step, lr)

    def _learning_rate(self) -> float:
        return learning_rate(
            self.state.step,
            base_lr=peak_lr(self.config),
            final_lr=self.config.final_lr or 0.0,
            warmup_epochs=self.config.warmup_epochs or 0,
            epochs=self.config.epochs,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _figures(self, result: SeCoOutput) -> dict[str, float]:
        names = ["loss", *result.metrics]
        scalars = torch.stack([result.loss.float(), *(v.float() for v in result.metrics.values())])
        means = self.ranks.mean(torch.cat([scalars, result.moments.float().flatten()]))
        moments = means[len(scalars) :].view_as(result.moments)
        figures = dict(zip(names, means[: len(scalars)].tolist(), strict=True))
        figures["feature_std"] = float(spread(moments))
        if self.model.queue is not None:
            figures["queue_fill"] = self.model.queue.fill
        return figures

    def _status(self, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> str:
        return status(metrics, speed)
