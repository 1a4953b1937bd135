"""The checkpoints of a run: what they hold, when they are kept, how a run resumes from one."""

from __future__ import annotations

import errno
import fcntl
import os
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from seco.checkpoints.io import LAST, CheckpointWriter, load_checkpoint
from shards.atomic import unwritable
from shards.errors import InputError, PeerLost
from shards.settings import as_settings, default_settings, resumable_settings


class TrainedModel(Protocol):
    """A module that knows which of its parameters are trained."""

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters for the optimizer."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Load tensors by name."""


class RunState:
    """Model, optimizer and position of a run, saved into its folder.

    Args:
        folder: the run's folder.
        config: resolved settings, a settings dataclass.
        model: the model to save.
        optimizer: its optimizer.
        videos: digest of the training videos.
        writes: whether this process writes checkpoints.
        about: plain values and tensors to add to every checkpoint.

    Raises:
        InputError: another process writes to the folder.

    Attributes:
        step: steps done, over all epochs.
        unreadable: samples replaced so far, on all ranks.
        written: queue of checkpoints that are complete on disk and not announced yet.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        model: TrainedModel,
        optimizer: torch.optim.Optimizer,
        videos: str,
        *,
        writes: bool,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.step = 0
        self.unreadable = 0
        self.written: deque[Path] = deque()
        self._folder = folder
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._videos = videos
        self._may_differ = resumable_settings(config)
        self._about = dict(about or {})
        self._lock = _locked(folder) if writes else None
        self._writer = CheckpointWriter() if writes else None

    @property
    def network(self) -> nn.Module:
        """The model."""
        assert isinstance(self._model, nn.Module)
        return self._model

    @property
    def last(self) -> Path:
        """Path of the newest checkpoint."""
        return self._folder / LAST

    def save(self, path: Path | None = None) -> None:
        """Snapshot everything and write it in the background, by default to ``last.pt``.

        Raises:
            InputError: a weight is not finite, or an earlier checkpoint could not be written.
        """
        self._require_finite_weights()
        if self._writer is not None:
            path = path or self.last
            self._writer.save(path, self._content())
            self._writer.then(lambda: self.written.append(path))

    def keep_epoch(self, epoch: int) -> None:
        """Save ``epoch-0100.pt`` and delete the oldest such checkpoints."""
        self.save(self._folder / f"epoch-{epoch:04d}.pt")
        if self._writer is not None:
            self._writer.then(self._drop_oldest)

    def check(self) -> None:
        """Raise InputError if a checkpoint could not be written."""
        if self._writer is not None:
            self._writer.check()

    def finish(self) -> None:
        """Wait until checkpoints are on disk; raise InputError if one could not be written."""
        if self._writer is not None:
            self._writer.finish()

    def restore(self, path: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            InputError: its settings, videos or tensors do not match.
        """
        content = load_checkpoint(path)
        if not {"optimizer", "videos", "step", "unreadable", "torch_rng"} <= set(content):
            raise InputError("is not a resumable checkpoint", path, "start from it with --init")
        # A version of the toolkit that lacked a setting did what is now its default.
        made_with = default_settings(self._config) | content["config"]
        differing = {
            name: value
            for name, value in as_settings(self._config).items()
            if name not in self._may_differ and made_with.get(name) != value
        }
        if differing:
            name = next(iter(differing))
            raise InputError(
                f"was made with {name} = {made_with.get(name)}, not {differing[name]}",
                path,
                "resume with the run's own settings (its config.toml)",
            )
        if content["videos"] != self._videos:
            raise InputError("was made on other videos", path, "resume on the same --shards")
        try:
            momenta = _momenta(content["optimizer"], self._optimizer)
            self._model.load_state_dict(content["model"], strict=True)
            self._optimizer.load_state_dict(momenta)
            torch.set_rng_state(content["torch_rng"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InputError("does not fit this run", path, "give the run's own last.pt") from error
        self.step = content["step"]
        self.unreadable = content["unreadable"]

    def not_finite(self, what: str) -> InputError:
        """The error for a run that diverged."""
        with suppress(InputError):
            self.finish()
        kept = f"the last good checkpoint is {self.last}"
        return InputError(
            f"{what} is not finite at step {self.step}; "
            + (kept if self.last.is_file() else "none was saved yet"),
            "--lr",
            "lower the learning rate",
        )

    def plan(self) -> object:
        """Step, settings and videos, which must be equal on all ranks."""
        settings = as_settings(self._config).items()
        same = sorted((name, value) for name, value in settings if name not in self._may_differ)
        return (self.step, same, self._videos)

    def _content(self) -> dict[str, Any]:
        return {
            **self._about,
            "config": as_settings(self._config),
            "step": self.step,
            "unreadable": self.unreadable,
            "videos": self._videos,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }

    def _require_finite_weights(self) -> None:
        """Raise if a weight is not finite, which can happen in a step with finite loss."""
        sums = torch.stack([p.detach().sum() for p in self._model.trained_parameters()])
        if not bool(torch.isfinite(sums).all()):
            raise self.not_finite("a weight") if self._writer is not None else PeerLost()

    def _drop_oldest(self) -> None:
        kept = sorted(self._folder.glob("epoch-*.pt"), key=lambda path: (len(path.name), path.name))
        for old in kept[: -self._config.keep]:
            old.unlink()


def _locked(folder: Path) -> FileIO:
    """Lock a run's folder until the file that is returned is closed, or the process has ended.

    Raises:
        InputError: another process has locked it.
    """
    path = folder / ".lock"
    try:
        # Neither a link nor a pipe that somebody has put there.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = open(os.open(path, flags, 0o666), "wb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        # Not flock: the workers that are forked later would hold it, too.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            lock.close()
            raise InputError(
                "another process is training here", folder, "wait for it, or choose another --out"
            ) from None
        # Else a file system without locks.
    return lock


_PARTS = {  # of the state of a parameter
    "SGD": {"momentum_buffer"},
    "LARS": {"momentum_buffer"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
}


def _momenta(saved: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer with the saved momenta; all else is as the settings say.

    The fused optimizer does not look at their shapes, and would write beyond their memory.

    Raises:
        ValueError: they are not those of these parameters.
        KeyError, TypeError: it is not the state of an optimizer.
    """
    own = optimizer.state_dict()
    state = saved["state"]
    if not isinstance(state, dict) or not all(isinstance(row, dict) for row in state.values()):
        raise TypeError("not the state of an optimizer")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not set(state) <= set(range(len(parameters))):
        raise ValueError("other parameters")
    for number, values in state.items():
        if values.keys() != _PARTS[type(optimizer).__name__]:
            raise ValueError("other parts")
        for name, value in values.items():
            # AdamW counts its steps, by a number of float32 for each parameter.
            like = torch.empty(()) if name == "step" else parameters[number]
            # SGD's is None before the first step.
            if (value is not None or name != "momentum_buffer") and (
                not isinstance(value, Tensor)
                or value.shape != like.shape
                or value.dtype != like.dtype
            ):
                raise ValueError("a momentum of another shape or type")
    return {**own, "state": state}


def resumed_settings(folder: str | None, resume: str | None) -> dict[str, Any]:
    """The settings of the run being resumed; none for a new run."""
    if resume is None or folder is None:
        return {}
    checkpoint = checkpoint_to_resume(Path(folder), resume)
    return {} if checkpoint is None else dict(load_checkpoint(checkpoint)["config"])


def checkpoint_to_resume(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint selected by ``--resume``; None for a new run.

    Raises:
        InputError: the folder holds a run and ``--resume`` is not given.
    """
    last = folder / LAST
    if resume == "auto":
        return last if last.is_file() else None
    if resume is not None:
        return Path(resume)
    if last.is_file():
        raise InputError(
            "holds a run already", folder, "resume it with --resume auto, or choose another --out"
        )
    return None
