"""torch.compile where it works; without a compiler, one line and eager execution."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from shards.errors import InputError

_Made = TypeVar("_Made")
_failures: list[str] = []  # not tried again: each try costs seconds


def if_it_compiles(work: Callable[[], _Made]) -> _Made | None:
    """What ``work``, which uses torch.compile, returns; None where compiling fails.

    The first failure is printed in one line, and nothing is tried after it.
    """
    if _failures:
        return None
    try:
        return work()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ImportError, OSError) as error:  # dynamo's, inductor's: RuntimeErrors
        _failures.append(_reason(error))
        print(
            f"seco: slower, as torch.compile failed ({_failures[0]})", file=sys.stderr, flush=True
        )
        return None


@functools.cache
def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile can build anything for ``device``; takes a second or two."""
    return if_it_compiles(lambda: torch.compile(_twice)(torch.ones(8, device=device))) is not None


def _twice(x: Tensor) -> Tensor:
    return x * 2


@contextmanager
def compile_faults() -> Iterator[None]:
    """Turn torch.compile's own faults within the block into one line.

    Raises:
        InputError: it failed.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise InputError(
            f"torch.compile failed on the encoders ({_reason(error)})",
            "--compile",
            "give --no-compile",
        ) from error


def _reason(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {line}"
