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
    """Stands in for an ``argparse.Namespace`` in a file (the authors' ``opt``), and stays empty.

    A real Namespace would accept any attribute that the file names, including ``__class__``.
    """

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


def save_torch_file(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to ``path`` atomically."""
    # Through memory: torch's own writer reports a full disk as an error about positions.
    whole = io.BytesIO()
    torch.save(content, whole)
    with atomic_path(path) as temporary:
        temporary.write_bytes(whole.getbuffer())


def load_torch_file(path: Path) -> Any:
    """Load a file of tensors and plain values; refuse anything that could run code.

    Raises:
        InputError: no such file, not a torch file, or it contains other objects.
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
        # torch's message also recommends weights_only=False, which runs any code in the file.
        reason = str(error).split("Please file an issue")[0].strip().splitlines()
        raise InputError(
            "is not a checkpoint, or holds more than tensors and plain values",
            path,
            f"it was not loaded ({reason[-1][:160] if reason else 'unpickling refused'})",
        ) from error
    except Exception as error:  # parsing damaged bytes can raise anything
        raise InputError("is not a checkpoint, or is damaged", path) from error


FORMAT = "seco-checkpoint"
LAST = "last.pt"  # newest checkpoint of a run
VERSION = 1
FINETUNED = "finetuned"  # key of a `seco finetune` checkpoint that describes the classifier
_NEEDED = {"arch"}  # settings that every reader needs


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint of this toolkit to ``path`` atomically."""
    save_torch_file(path, {"format": FORMAT, "version": VERSION, **content})


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, while training continues."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, path: Path, content: dict[str, Any]) -> None:
        """Copy the tensors now and write them in the background.

        Raises:
            InputError: the previous checkpoint could not be written.
        """
        self.finish()  # keep at most one copy in memory
        self._pending = self._thread.submit(save_checkpoint, path, _copied(content))

    def then(self, action: Callable[[], None]) -> None:
        """Run ``action`` once the last checkpoint is on disk, and only if it was written."""
        written = self._pending

        def when_written() -> None:
            if written is not None:
                written.result()
            action()

        self._pending = self._thread.submit(when_written)

    def check(self) -> None:
        """Raise the last write's error, if it has failed already."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the last write and raise its error, if any."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _copied(value: Any) -> Any:
    """Copy all tensors to the CPU, so that training can change the originals."""
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
        InputError: it is not one, or has another version.
    """
    return checked_checkpoint(load_torch_file(path), path)


def checked_checkpoint(content: Any, path: Path) -> dict[str, Any]:
    """Check that ``content`` is a checkpoint of this toolkit with all required parts; return it.

    Raises:
        InputError: it is not one, has another version, or a part is missing.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError("is not a checkpoint of this toolkit", path, "give a last.pt of a run")
    if content.get("version") != VERSION:
        raise InputError(f"has checkpoint version {content.get('version')}, not {VERSION}", path)
    config, model = content.get("config"), content.get("model")
    if not isinstance(model, dict) or not isinstance(config, dict) or not set(config) >= _NEEDED:
        raise InputError("is an incomplete checkpoint", path)
    return content


def epochs_reached(checkpoint: Mapping[str, Any]) -> float | None:
    """Epochs a checkpoint was trained for, to two decimals; None if unknown."""
    steps, steps_per_epoch = checkpoint.get("step"), checkpoint.get("steps_per_epoch")
    if not isinstance(steps, int) or not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
        return None
    epochs = round(steps / steps_per_epoch, 2)
    return int(epochs) if epochs.is_integer() else epochs
