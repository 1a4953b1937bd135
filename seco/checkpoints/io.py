"""Checkpoint files: tensors and plain values, written completely or not, loaded without code."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from shards.atomic import atomic_path
from shards.errors import InputError
from shards.untrusted import Count, convert, open_regular

_UNSUPPORTED = re.compile(r"unsupported (?:global|operand) \S+", re.I)


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


def save_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to ``path`` atomically; the same tensors and metadata give the same bytes."""
    # The library refuses channels_last, the layout after training on a GPU, and shared memory.
    copied = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    whole = safetensors.torch.save(copied, metadata)
    # The library writes the metadata in random order.
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["__metadata__"] = metadata
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    assert len(text) == size
    with atomic_path(path) as temporary:
        temporary.write_bytes(whole[:8] + text + whole[8 + size :])


def load_torch_file(path: Path) -> Any:
    """Load a file of tensors and plain values; refuse anything that could run code.

    Raises:
        InputError: no such file, not a torch file, or it contains other objects.
    """
    settings = torch.serialization.safe_globals([(_IgnoredSettings, "argparse.Namespace")])
    try:
        with settings, open_regular(path) as file:
            _require_bounded(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror or error})", path, "check the path"
        ) from error
    except pickle.UnpicklingError as error:
        # torch's message also recommends weights_only=False, which runs any code in the file.
        found = _UNSUPPORTED.search(str(error))
        raise InputError(
            "is not a checkpoint, or holds more than tensors and plain values",
            path,
            f"it was not loaded{f' ({found[0][:160]})' if found else ''}",
        ) from error
    except Exception as error:  # parsing damaged bytes can raise anything
        raise InputError("is not a checkpoint, or is damaged", path) from error
    _require_plain(content, path)
    return content


def _require_bounded(file: BinaryIO) -> None:
    """Check that loading takes about as much memory as the file has bytes.

    torch never compresses, and its unpickler makes a ``bytearray`` of any length that is named.

    Raises:
        ValueError: it could take more.
    """
    start = file.read(4)
    file.seek(0)
    pickles: Iterable[bytes] = iter(lambda: file.read(1 << 20), b"")
    if start == b"PK\3\4":
        with zipfile.ZipFile(file) as held:
            rows = held.infolist()
            size = file.seek(0, os.SEEK_END)
            if any(row.compress_type != zipfile.ZIP_STORED for row in rows):
                raise ValueError("compressed")
            # Else other readers would take another directory for the true one.
            if held.start_dir != _stated_directory(file) or sum(r.file_size for r in rows) > size:
                raise ValueError("not a plain zip file")
            pickles = [held.read(row) for row in rows if row.filename.endswith(".pkl")]
    before = b""
    for piece in pickles:
        if b"bytearray" in before + piece:
            raise ValueError("makes a bytearray")
        before = piece[-16:]
    file.seek(0)


def _stated_directory(file: BinaryIO) -> int | None:
    """Where a zip file's end says that its directory begins."""
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    return None if end is None else int(end[6])


def _require_plain(content: Any, path: Path) -> None:
    """Check that everything is a dense tensor of a common type, a plain value, or holds these.

    Raises:
        InputError: something is not; its place is named.
    """
    left: list[tuple[str, int, Any]] = [("", 0, content)]
    for _ in range(_MOST_VALUES):
        if not left:
            return
        name, depth, value = left.pop()
        where = name or "its content"
        if isinstance(value, Tensor):
            if not is_dense(value):
                raise InputError(f"{where} is not a dense tensor of real numbers", path)
        elif isinstance(value, (Mapping, list, tuple)):
            if depth == _DEEPEST:
                raise InputError(f"{where} is nested more than {_DEEPEST} levels deep", path)
            if len(left) + len(value) > _MOST_VALUES:
                break
            rows = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, part in rows:
                if not isinstance(key, (str, int)):
                    raise InputError(f"{where} has a key that is neither text nor a number", path)
                left.append((f"{name}.{key}" if name else str(key), depth + 1, part))
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InputError(f"{where} is not a number of 64 bits", path)
        elif not isinstance(value, _PLAIN):
            raise InputError(f"{where} is neither a tensor nor a plain value", path)
    raise InputError(f"holds more than {_MOST_VALUES} values", path)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is dense, on the CPU, real, and its storage as large as its shape needs."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in _DTYPES
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    )


_PLAIN = (str, bytes, int, float, bool, type(None), _IgnoredSettings)
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
_MOST_VALUES = 1_000_000
_DEEPEST = 20


FORMAT = "seco-checkpoint"
LAST = "last.pt"  # newest checkpoint of a run
VERSION = 1
FINETUNED = "finetuned"  # key of a `seco finetune` checkpoint that describes the classifier


class _Config(msgspec.Struct):
    """Settings that are read from checkpoints."""

    arch: str
    tasks: str | None = None
    bn_group: Annotated[int, msgspec.Meta(ge=1)] | None = None
    lr: Annotated[float, msgspec.Meta(ge=0)] | None = None
    freeze_bn: str | None = None


class _Imported(msgspec.Struct):
    layout: str | None = None
    epoch: int | None = None


class _Finetuned(msgspec.Struct):
    labels: list[Count]
    label_names: list[str]
    dataset: str
    encoder: dict[str, str | int | float | bool | None]


class _Contents(msgspec.Struct):
    """A checkpoint; a run's holds more than an imported one."""

    config: _Config
    model: dict[str, Any]  # tensors
    step: Count | None = None
    steps_per_epoch: Count | None = None
    unreadable: Count | None = None
    videos: str | None = None
    imported: _Imported | None = None
    finetuned: _Finetuned | None = None


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
    found = convert(_Contents, content, path, "is an incomplete checkpoint")
    for name, tensor in found.model.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"is an incomplete checkpoint (model.{name} is not a tensor)", path)
    return content


def epochs_reached(checkpoint: Mapping[str, Any]) -> float | None:
    """Epochs a checkpoint was trained for, to two decimals; None if unknown."""
    steps, steps_per_epoch = checkpoint.get("step"), checkpoint.get("steps_per_epoch")
    if not isinstance(steps, int) or not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
        return None
    epochs = round(steps / steps_per_epoch, 2)
    return int(epochs) if epochs.is_integer() else epochs
