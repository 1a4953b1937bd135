"""The training loop of ``seco pretrain``, on one process or many."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from seco.runs.training_run import TrainingRun, Waiting, one_voice
from seco.views.chunks import VIEWS
from seco.views.view_parameters import VIEW_DRAWS, view_config
from shards.atomic import require_writable
from shards.errors import InputError
from shards.opening import CacheSettings, open_stream
from shards.progress import Progress

REPORT = "report.html"
_DRAWN = 4 * VIEW_DRAWS  # columns of what ranks tell each other of a row; then:
_ORDER, _VIDEO, _STOP, _UNREADABLE, _COLUMNS = range(_DRAWN, _DRAWN + 5)


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


class Trainer(TrainingRun):
    """Everything of one process of a run: data, model, optimizer, log, position."""

    command = "pretrain"

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
        self.total_steps = config.epochs * self.steps_per_epoch
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
        with self._under_way("Pre-training") as (log, stop, shown):
            self._loop(log, stop, shown)
        if self.ranks.first:
            self._report()
        return self.state.last

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

    def _loop(self, log: RunLog | None, stop: StopRequest, shown: Progress) -> None:
        loader = TripletLoader(
            self.stream,
            self.config.crop_size,
            self.view_config,
            workers=loader_workers(self.config.workers, self.device),
            first_step=self.state.step,
            last_step=self.total_steps,
            decode=self.config.decode,
            views_on=self.config.views_on,
            pin=self.device.type == "cuda",
        )
        try:
            with loader, contextlib.closing(iter(loader)) as batches:
                self._steps(batches, log, stop, shown)
        finally:
            self.state.finish()

    def _steps(
        self, batches: Iterator[Batch], log: RunLog | None, stop: StopRequest, shown: Progress
    ) -> None:
        config, state = self.config, self.state
        if self.knn is not None and state.step == 0:
            self._vote(self.knn, log)  # what the untrained network is worth
        waiting, logged_step = Waiting(), state.step
        while state.step < self.total_steps:
            batch = waiting.next(batches, stop)
            crops = None if batch is None else self.device_views.crops(batch)
            known, stopping = self._known_to_all(batch)
            if stopping or crops is None:
                raise self._saved_and_stopped(stop)
            lr = self._learning_rate()
            result = self._train_step(crops, known, lr)
            state.step += 1
            state.check()
            epoch, rest = divmod(state.step, self.steps_per_epoch)
            last = state.step == self.total_steps
            due = state.step % config.checkpoint_every_steps == 0 or last
            voting = rest == 0 and self.knn is not None and self.knn.due(epoch, last)
            logged = state.step % config.log_every == 0 or last or voting
            if due or logged:
                metrics = self._metrics(result, lr)  # which refuse what is not worth saving
            if logged:
                speed = waiting.speed((state.step - logged_step) * config.batch_size * VIEWS)
                self.health.look(state.step, metrics, speed)
                if voting and self.knn is not None:
                    self._vote(self.knn, log, metrics, speed)
                elif log is not None:
                    log.log(state.step, metrics, speed)
                waiting.restart()
                logged_step = state.step
                shown.advance(0, status(metrics, speed))
            if due:
                state.save()  # after the line: a run that goes on from here does not write it again
            shown.advance()
            if rest == 0 and epoch % config.keep_every_epochs == 0:
                state.keep_epoch(epoch)

    def _vote(
        self,
        knn: OnlineKnn,
        log: RunLog | None,
        metrics: dict[str, Any] | None = None,
        speed: dict[str, float] | None = None,
    ) -> None:
        """Log the kNN's accuracy with the step's figures, and say it."""
        found = knn.figures(self.model)
        if log is not None:
            log.log(self.state.step, {**(metrics or {}), **found}, speed or {})
        self._say(knn.sentence(self.state.step, found))

    def _train_step(self, crops: torch.Tensor, known: GlobalRows, lr: float) -> StepResult:
        return self.step.run(crops, known, self.state.step, lr)

    def _known_to_all(self, batch: Batch | None) -> tuple[GlobalRows, bool]:
        """Rows of all ranks, and whether any of them has none because it was told to stop.

        One exchange of the hosts a step carries everything that they must agree on.
        """
        n = self.stream.rows
        mine = np.zeros((n, _COLUMNS))
        mine[0, _STOP] = batch is None
        if batch is not None:
            mine[:, :_DRAWN] = batch.uniform.transpose(1, 0, 2).reshape(n, _DRAWN)
            mine[:, _ORDER], mine[:, _VIDEO] = batch.order.numpy(), batch.videos.numpy()
            mine[0, _UNREADABLE] = len(batch.unreadable)
            self._tell_of(batch.unreadable)
        rows = self.ranks.gather_host(mine)
        stopping = bool(rows[:, _STOP].any())
        if not stopping:  # else the batch comes again
            self._note_unreadable(int(rows[:, _UNREADABLE].sum()))
        uniform = rows[:, :_DRAWN].reshape(-1, 4, VIEW_DRAWS).transpose(1, 0, 2)
        known = GlobalRows(
            uniform=uniform,
            order=torch.from_numpy(rows[:, _ORDER].astype(np.int64)),
            videos=torch.from_numpy(rows[:, _VIDEO].astype(np.int64)),
        )
        return known, stopping

    def _learning_rate(self) -> float:
        return learning_rate(
            self.state.step,
            base_lr=peak_lr(self.config),
            final_lr=self.config.final_lr or 0.0,
            warmup_epochs=self.config.warmup_epochs or 0,
            epochs=self.config.epochs,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _metrics(self, result: StepResult, lr: float) -> dict[str, Any]:
        """The step's figures as numbers, of all ranks; refuses to go on when the loss is none."""
        names = list(result.figures)
        scalars = torch.stack([result.loss.float(), *(result.figures[n].float() for n in names)])
        means = self.ranks.mean(torch.cat([scalars, result.moments.float().flatten()]))
        loss, *figures = means[: len(scalars)].tolist()
        moments = means[len(scalars) :].view_as(result.moments)
        if not math.isfinite(loss):
            raise self._told_once(self.state.not_finite(f"the loss ({loss})"))
        epoch = (self.state.step - 1) // self.steps_per_epoch
        more = {
            "feature_std": float(spread(moments)),
            "queue_fill": self.model.queue.fill,
            "unreadable": self.state.unreadable,
        }
        named = dict(zip(names, figures, strict=True))
        return {"epoch": epoch, "loss": loss, "lr": lr, **named, **more}
