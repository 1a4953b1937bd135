"""The training loop of ``seco pretrain``, on one process or many."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seco.config import PretrainConfig, peak_lr, resolve
from seco.loading.device_views import DeviceViews
from seco.loading.loader import Batch, TripletLoader
from seco.model.method import SeCo, StepResult, spread
from seco.pretrain.health import Health, status
from seco.pretrain.initialise import initialise
from seco.pretrain.online_knn import OnlineKnn
from seco.pretrain.step import GlobalRows, TrainingStep, for_device
from seco.processes.device import loader_workers, resolve_device
from seco.processes.ranks import Ranks, joined
from seco.processes.stopping import StopRequest
from seco.runs.metrics import RunLog
from seco.runs.run_state import RunState, checkpoint_to_resume, resumed_settings
from seco.runs.schedule import learning_rate
from seco.runs.training_run import TrainingRun, one_voice
from seco.views.chunks import VIEWS
from seco.views.view_parameters import VIEW_DRAWS, view_config
from shards.atomic import require_writable
from shards.errors import InputError
from shards.opening import CacheSettings, open_stream

REPORT = "report.html"
_DRAWN = VIEWS * VIEW_DRAWS  # columns of what ranks tell each other of a row; then:
_ORDER, _VIDEO, _COLUMNS = range(_DRAWN, _DRAWN + 3)


def pretrain(config: PretrainConfig) -> Path:
    """Run or resume a pre-training on the processes there are; returns its last checkpoint.

    Raises:
        InputError: settings, shards, checkpoint or output folder cannot be used; the loss is no
            longer finite; too many samples cannot be read.
        Stopped: a signal came; everything is saved.
        PeerLost: another process ended, and has said why.
    """
    device = resolve_device(config.device)
    with joined(device) as ranks:
        with one_voice():
            trainer = Trainer(_adopted(resolve(config, ranks.size), config), ranks, device)
        return trainer.run()


def _adopted(resolved: PretrainConfig, given: PretrainConfig) -> PretrainConfig:
    """Take BatchNorm's groups and the learning rate of the resumed run unless they are given.

    The default of the groups depends on the number of processes, which may be another now; that of
    the learning rate was 0.2 for every batch size in runs of earlier versions.
    """
    left_open = [name for name in ("bn_group", "lr") if getattr(given, name) is None]
    run = resumed_settings(given.out, given.resume) if left_open else {}
    kept = {name: run[name] for name in left_open if name in run}
    return dataclasses.replace(resolved, **kept)


class Trainer(TrainingRun[Batch, StepResult]):
    """Everything of one process of a run: data, model, optimizer, log, position."""

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
            require_writable(Path(config.out))  # before anything that takes long
        self.stream = open_stream(
            config.shards,
            config.batch_size,
            config.sampling or "uniform",
            config.seed,
            cache=CacheSettings(config.cache_dir, config.cache_gb) if config.cache_dir else None,
            window_shards=config.window_shards,
            steps_per_epoch=config.steps_per_epoch,
            split=config.split,
            rank=ranks.rank,
            world_size=ranks.size,
        )
        self.out = Path(config.out or f"runs/{self.stream.name}")
        # The window that was chosen is written down: another one would be another order.
        window = self.stream.window_shards if config.steps_per_epoch is None else None
        self.config = config = dataclasses.replace(config, out=str(self.out), window_shards=window)
        if ranks.first:
            require_writable(self.out)
        checkpoint = checkpoint_to_resume(self.out, config.resume)
        if config.decode == "nvjpeg" and device.type != "cuda":
            raise InputError("nvjpeg needs a GPU", "--decode", "leave it out")
        if self.stream.left_out:
            self._say(f"{self.stream.left_out} videos have fewer than 3 frames and are left out")
        self.steps_per_epoch = self.stream.steps_per_epoch
        self.images_per_step = config.batch_size * VIEWS
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
        )
        if checkpoint is not None:
            self.state.restore(checkpoint)
            self._say(f"going on from step {self.state.step} of {self.total_steps} ({checkpoint})")
        self.health = Health(config, self._say)
        self._require_agreement()  # and nobody writes before all have looked whether there is a run

    def run(self) -> Path:
        """Train to the end; see :func:`pretrain`."""
        last = super().run()
        if self.ranks.first:
            self._report()
        return last

    def _report(self) -> None:
        """The run's curves as a page in its folder; a page that fails costs no run."""
        from seco.report.report import write_report  # a second of imports that other ranks lack

        try:
            found = write_report([self.out], self.out / REPORT)
        except InputError as error:
            self._say(f"no report was written: {error}")
            return
        for item in found.unread:
            self._say(f"could not be read for the report: {item.path}: {item.reason}")

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
        """What the untrained network is worth."""
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
        """Draws, order and video of each row: the shuffle hands its views to another rank."""
        n = self.stream.rows
        told = np.zeros((n, _COLUMNS))
        if batch is not None:
            told[:, :_DRAWN] = batch.uniform.transpose(1, 0, 2).reshape(n, _DRAWN)
            told[:, _ORDER], told[:, _VIDEO] = batch.order.numpy(), batch.videos.numpy()
        return told

    def _train_step(self, batch: Batch, lr: float) -> StepResult:
        rows = self._everyone
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

    def _figures(self, result: StepResult) -> dict[str, float]:
        names = ["loss", *result.figures]
        scalars = torch.stack([result.loss.float(), *(v.float() for v in result.figures.values())])
        means = self.ranks.mean(torch.cat([scalars, result.moments.float().flatten()]))
        moments = means[len(scalars) :].view_as(result.moments)
        figures = dict(zip(names, means[: len(scalars)].tolist(), strict=True))
        figures["feature_std"] = float(spread(moments))
        if self.config.queue_size:
            figures["queue_fill"] = self.model.queue.fill
        return figures

    def _status(self, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> str:
        return status(metrics, speed)
