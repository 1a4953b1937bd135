"""Checkpoint files: tensors and plain values, written completely or not, loaded without code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shards.atomic import atomic_path
from shards.errors import InputError


class _IgnoredSettings:
    """What an ``argparse.Namespace`` in a file (the authors' ``opt``) is read as: it keeps nothing.

    A real Namespace would take any attribute that the file names, ``__class__`` among them.
    """

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


def save_torch_file(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values under ``path`` atomically."""
    # Through memory: torch's own writer hides a full disk behind an error about positions.
    whole = io.BytesIO()
    torch.save(content, whole)
    with atomic_path(path) as temporary:
        temporary.write_bytes(whole.getbuffer())


def load_torch_file(path: Path) -> Any:
    """Unpickle a file of tensors and plain values; anything that could run code is refused.

    Raises:
        InputError: no such file, not a torch file, or one that holds more than tensors.
    """
    settings = torch.serialization.safe_globals([(_IgnoredSettings, "argparse.Namespace")])
    try:
        with settings:
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror or error})", path, "check the path"
        ) from error
    except pickle.UnpicklingError as error:
        # torch's text goes on to recommend weights_only=False, which runs whatever is in the file.
        reason = str(error).split("Please file an issue")[0].strip().splitlines()
        raise InputError(
            "is not a checkpoint, or holds more than tensors and plain values",
            path,
            f"it was not opened further ({reason[-1][:160] if reason else 'unpickling refused'})",
        ) from error
    except Exception as error:  # a parser of damaged bytes fails in every way there is
        raise InputError("is not a checkpoint, or is damaged", path) from error


FORMAT = "seco-checkpoint"
LAST = "last.pt"  # the newest checkpoint of a run
VERSION = 1
FINETUNED = "finetuned"  # where a checkpoint of `seco finetune` says what it tells apart
_NEEDED = {"arch"}  # settings that every reader relies on


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` under ``path`` atomically."""
    save_torch_file(path, {"format": FORMAT, "version": VERSION, **content})


class CheckpointWriter:
    """Writes checkpoints in the background, one after the other, while training goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, path: Path, content: dict[str, Any]) -> None:
        """Copy the tensors now and write them soon.

        Raises:
            InputError: the checkpoint before could not be written.
        """
        self.finish()  # two copies in memory would be too many
        self._pending = self._thread.submit(save_checkpoint, path, _copied(content))

    def then(self, action: Callable[[], None]) -> None:
        """Do this when what was saved is on disk, and only if it is."""
        written = self._pending

        def when_written() -> None:
            if written is not None:
                written.result()
            action()

        self._pending = self._thread.submit(when_written)

    def check(self) -> None:
        """Raises what went wrong with the last one, if that is known yet."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the last one; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _copied(value: Any) -> Any:
    """Tensors as copies on the CPU, so that training may change its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(part) for part in value)
    return value


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this toolkit.

    Raises:
        InputError: it is not one, or of another version.
    """
    return checked_checkpoint(load_torch_file(path), path)


def checked_checkpoint(content: Any, path: Path) -> dict[str, Any]:
    """The content of a checkpoint of this toolkit, with the parts that every reader relies on.

    Raises:
        InputError: it is something else, of another version, or a part is missing.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError("is not a checkpoint of this toolkit", path, "give a last.pt of a run")
    if content.get("version") != VERSION:
        raise InputError(f"has checkpoint version {content.get('version')}, not {VERSION}", path)
    config, model = content.get("config"), content.get("model")
    if not isinstance(model, dict) or not isinstance(config, dict) or not set(config) >= _NEEDED:
        raise InputError("is a checkpoint with parts missing", path)
    return content


def epochs_reached(checkpoint: Mapping[str, Any]) -> float | None:
    """How many epochs, in hundredths, a checkpoint was trained for; None if it does not say."""
    steps, steps_per_epoch = checkpoint.get("step"), checkpoint.get("steps_per_epoch")
    if not isinstance(steps, int) or not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
        return None
    epochs = round(steps / steps_per_epoch, 2)
    return int(epochs) if epochs.is_integer() else epochs
