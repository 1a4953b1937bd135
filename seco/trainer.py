"""The training loop of ``seco pretrain``: one process, on the CPU or one GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor

from seco.checkpoint import load_checkpoint, save_checkpoint
from seco.config import RESUMABLE_DIFFERENCES, TASKS, PretrainConfig, resolve
from seco.device import resolve_device
from seco.device_views import DeviceViews
from seco.loader import Batch, TripletLoader
from seco.method import SeCo, StepResult
from seco.metrics import RunLog
from seco.schedule import learning_rate
from seco.stopping import StopRequest, StopWaiting
from seco.view_parameters import ViewConfig
from seco.weights import load_backbone
from shards.atomic import require_writable, write_text
from shards.errors import InputError, Stopped
from shards.opening import CacheSettings, open_stream
from shards.progress import Progress, progress
from shards.settings import as_settings

LAST = "last.pt"
CONFIG = "config.toml"
_BLUR_GIVEN_AT_PX = 224  # the authors' sigma is for views of this side


def pretrain(config: PretrainConfig) -> Path:
    """Run or resume a pre-training; returns the path of its last checkpoint.

    Raises:
        InputError: settings, shards, checkpoint or output folder cannot be used; the loss is no
            longer finite; too many samples cannot be read.
        Stopped: a signal came; everything is saved.
    """
    return Trainer(resolve(config)).run()


class Trainer:
    """Everything of one run: data, model, optimizer, log, position."""

    def __init__(self, config: PretrainConfig) -> None:
        if config.out:
            require_writable(Path(config.out))  # before anything that takes long
        self.stream = open_stream(
            config.shards,
            config.batch_size,
            config.sampling or "uniform",
            config.seed,
            cache=CacheSettings(config.cache_dir, config.cache_gb) if config.cache_dir else None,
            window_shards=config.window_shards,
            steps_per_epoch=config.steps_per_epoch,
        )
        self.out = Path(config.out or f"runs/{self.stream.name}")
        # The window that was chosen is written down: another one would be another order.
        window = self.stream.window_shards if config.steps_per_epoch is None else None
        self.config = config = dataclasses.replace(config, out=str(self.out), window_shards=window)
        require_writable(self.out)
        checkpoint = self._checkpoint_to_resume()
        self.device = resolve_device(config.device)
        if config.decode == "nvjpeg" and self.device.type != "cuda":
            raise InputError("nvjpeg needs a GPU", "--decode", "leave it out")
        if self.stream.left_out:
            _say(f"{self.stream.left_out} videos have fewer than 3 frames and are left out")
        self.steps_per_epoch = self.stream.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step = 0
        self.unreadable = 0
        torch.manual_seed(config.seed)
        model = SeCo(config)
        if config.init and checkpoint is None:
            _initialise(model, config)
        self.model = model.to(self.device).train()
        self.optimizer = torch.optim.SGD(
            model.trained_parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.autocast = config.precision == "bf16" or (
            config.precision == "auto" and self.device.type == "cuda"
        )
        self.view_config = view_config(config)
        self.device_views = DeviceViews(self.device, config.crop_size, self.view_config)
        if checkpoint is not None:
            self._restore(checkpoint)

    def run(self) -> Path:
        """Train to the end; see :func:`pretrain`."""
        write_text(self.out / CONFIG, tomli_w.dumps(as_settings(self.config)))
        log = RunLog(self.out, self.step)
        try:
            with (
                StopRequest() as stop,
                progress("Pre-training", self.total_steps, "steps", self.step) as shown,
            ):
                self._loop(log, stop, shown)
        finally:
            log.close()
        return self.out / LAST

    def _loop(self, log: RunLog, stop: StopRequest, shown: Progress) -> None:
        loader = TripletLoader(
            self.stream,
            self.config.crop_size,
            self.view_config,
            workers=self.config.workers,
            first_step=self.step,
            last_step=self.total_steps,
            decode=self.config.decode,
            views_on=self.config.views_on,
            pin=self.device.type == "cuda",
        )
        with loader, contextlib.closing(iter(loader)) as batches:
            self._steps(batches, log, stop, shown)

    def _steps(
        self, loader: Iterator[Batch], log: RunLog, stop: StopRequest, shown: Progress
    ) -> None:
        window_began, waited, logged_step = time.perf_counter(), 0.0, self.step
        while self.step < self.total_steps:
            asked = time.perf_counter()
            try:
                with stop.while_waiting():
                    batch = next(loader)
            except StopWaiting:
                self._save(self.out / LAST)
                raise self._stopped(stop) from None
            waited += time.perf_counter() - asked
            views = self.device_views.of(batch)
            self._note_unreadable(batch)
            lr = self._set_learning_rate()
            result = self._train_step(batch, views)
            self.step += 1
            last = self.step == self.total_steps
            stopping = bool(stop)  # once: a signal during the rest of the step is the next step's
            due = self.step % self.config.checkpoint_every_steps == 0 or last or stopping
            if self.step % self.config.log_every == 0 or last or due:
                metrics = self._metrics(result, lr)
                if self.step % self.config.log_every == 0 or last:
                    elapsed = time.perf_counter() - window_began
                    images = (self.step - logged_step) * self.config.batch_size * 4
                    speed = {"images_per_s": images / elapsed, "data_wait": waited / elapsed}
                    log.log(self.step, metrics, speed)
                    window_began, waited, logged_step = time.perf_counter(), 0.0, self.step
                shown.advance(0, _status(metrics))
            shown.advance()
            if due:
                self._save(self.out / LAST)
            self._keep_epoch_checkpoint()
            if stopping and not last:
                raise self._stopped(stop)

    def _stopped(self, stop: StopRequest) -> Stopped:
        return Stopped(
            f"{stop.signal_name}: saved step {self.step} of {self.total_steps} in "
            f"{self.out / LAST}; go on with the same command and --resume auto"
        )

    def _train_step(self, batch: Batch, views: Tensor) -> StepResult:
        config = self.config
        shuffle = torch.Generator().manual_seed(_mixed_seed(config.seed, self.step))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            result: StepResult = self.model(
                views,
                batch.order.to(self.device),
                batch.videos.to(self.device),
                shuffle,
            )
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        self.optimizer.step()
        self.model.update_key_encoder()
        return result

    def _set_learning_rate(self) -> float:
        lr = learning_rate(
            self.step,
            base_lr=self.config.lr,
            final_lr=self.config.final_lr or 0.0,
            warmup_epochs=self.config.warmup_epochs or 0,
            epochs=self.config.epochs,
            steps_per_epoch=self.steps_per_epoch,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _metrics(self, result: StepResult, lr: float) -> dict[str, Any]:
        """The step's figures as numbers; refuses to go on when the loss is not finite."""
        figures = {name: float(value) for name, value in result.figures.items()}
        loss = float(result.loss.detach())
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss ({loss})")
        epoch = (self.step - 1) // self.steps_per_epoch
        figures |= {"queue_fill": self.model.queue.fill, "unreadable": self.unreadable}
        return {"epoch": epoch, "loss": loss, "lr": lr, **figures}

    def _note_unreadable(self, batch: Batch) -> None:
        for reason in batch.unreadable:
            self.unreadable += 1
            _say(f"unreadable, replaced by another video: {reason}")
        allowed = self.config.max_unreadable / 100 * max(1000, (self.step + 1) * len(batch.order))
        if self.unreadable > allowed:
            raise InputError(
                f"{self.unreadable} samples could not be read by step {self.step + 1}, more than "
                f"--max-unreadable {self.config.max_unreadable} % allows",
                "--shards",
                "prepare or copy the named shards again",
            )

    def _keep_epoch_checkpoint(self) -> None:
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        if rest == 0 and epoch % self.config.keep_every_epochs == 0:
            self._save(self.out / f"epoch-{epoch:04d}.pt")
            for old in sorted(self.out.glob("epoch-*.pt"))[: -self.config.keep]:
                old.unlink()

    def _save(self, path: Path) -> None:
        self._require_finite_weights()
        save_checkpoint(
            path,
            {
                "config": as_settings(self.config),
                "step": self.step,
                "unreadable": self.unreadable,
                "videos": self.stream.digest(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "torch_rng": torch.get_rng_state(),
            },
        )

    def _require_finite_weights(self) -> None:
        """A step can spoil the weights while its own loss was still a number."""
        if not all(bool(torch.isfinite(p).all()) for p in self.model.trained_parameters()):
            raise self._not_finite("a weight")

    def _not_finite(self, what: str) -> InputError:
        last = self.out / LAST
        kept = f"the last good checkpoint is {last}" if last.is_file() else "none was saved yet"
        return InputError(
            f"{what} is not finite at step {self.step}; {kept}", "--lr", "lower the learning rate"
        )

    def _checkpoint_to_resume(self) -> Path | None:
        last = self.out / LAST
        if self.config.resume == "auto":
            return last if last.is_file() else None
        if self.config.resume is not None:
            return Path(self.config.resume)
        if last.is_file():
            raise InputError(
                "holds a run already", self.out, "give --resume auto to go on, or another --out"
            )
        return None

    def _restore(self, path: Path) -> None:
        content = load_checkpoint(path)
        differing = {
            name: value
            for name, value in as_settings(self.config).items()
            if name not in RESUMABLE_DIFFERENCES and content["config"].get(name) != value
        }
        if differing:
            name = next(iter(differing))
            raise InputError(
                f"was made with {name} = {content['config'].get(name)}, not {differing[name]}",
                path,
                "resume with the run's own settings (its config.toml)",
            )
        if content["videos"] != self.stream.digest():
            raise InputError("was made on other videos", path, "resume on the same --shards")
        try:
            self.model.load_state_dict(content["model"], strict=True)
            self.optimizer.load_state_dict(content["optimizer"])
            torch.set_rng_state(content["torch_rng"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InputError("does not fit this run", path, "give the run's own last.pt") from error
        self.step = content["step"]
        self.unreadable = content["unreadable"]
        _say(f"going on from step {self.step} of {self.total_steps} ({path})")


def view_config(config: PretrainConfig) -> ViewConfig:
    """The views of a run. The blur, given in px of a 224 px view, shrinks with smaller views."""
    weakest, strongest = ViewConfig().blur_sigma
    scale = config.crop_size / _BLUR_GIVEN_AT_PX
    return ViewConfig(
        crop_scale=(config.min_crop_area, 1.0), blur_sigma=(weakest * scale, strongest * scale)
    )


def _initialise(model: SeCo, config: PretrainConfig) -> None:
    """Load ``--init`` into both backbones (paper §5.2 starts from MoCo on ImageNet)."""
    state = load_backbone(str(config.init), config.arch).network.state_dict()
    model.query_encoder.backbone.load_state_dict(state, strict=True)
    model.key_encoder.backbone.load_state_dict(state, strict=True)


def _mixed_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step * 7_919 + 12_345) % (1 << 63)


def _status(metrics: dict[str, Any]) -> str:
    parts = [f"{t} {metrics[f'loss_{t}']:.3f}" for t in TASKS if f"loss_{t}" in metrics]
    return f"loss {metrics['loss']:.3f} ({', '.join(parts)})"


def _say(message: str) -> None:
    print(f"seco pretrain: {message}", file=sys.stderr, flush=True)
