"""Files of ``torch.save``: read without running anything in them, written whole or not at all."""

from __future__ import annotations

import io
import pickle
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
