"""Checkpoints: tensors and plain values only, written whole or not at all, loaded without code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from shards.atomic import atomic_path
from shards.errors import InputError

FORMAT = "seco-checkpoint"
VERSION = 1
_NEEDED = {"arch", "tasks"}  # settings that every reader relies on


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` under ``path`` atomically."""
    # Through memory: torch's own writer hides a full disk behind an error about positions.
    whole = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **content}, whole)
    with atomic_path(path) as temporary:
        temporary.write_bytes(whole.getbuffer())


def load_torch_file(path: Path) -> Any:
    """Unpickle a file of tensors and plain values; anything that could run code is refused.

    Raises:
        InputError: no such file, not a torch file, or one that holds more than tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", path) from error
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
