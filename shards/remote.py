"""Places behind fsspec (``s3://``, ``gs://``, ``https://``): opening them, and trying again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tenacity

from shards.errors import InputError

_EXTRAS = {"s3": "s3", "s3a": "s3"}
_ATTEMPTS = 5
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.25, 30.0
# Asking again would give the same answer.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, InputError)
_LASTING_ELSEWHERE = ("NoCredentialsError", "PartialCredentialsError")  # botocore's
_Result = TypeVar("_Result")


def is_remote(address: str) -> bool:
    """Whether fsspec has to fetch it."""
    return "://" in address and not address.startswith("file://")


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for ``url``, and the address without its protocol.

    To be asked for anew in every process: what is open does not survive a fork.

    Raises:
        InputError: no such kind of address, or its package is not installed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        advice = f'pip install "seco-video[{extra}]"' if extra else "install what it names"
        raise InputError(f"cannot be opened ({error})", url, advice) from error
    except ValueError as error:
        raise InputError(f"cannot be opened ({error})", url, "is the address right?") from error
    return system, path


def is_transient(error: BaseException) -> bool:
    """Whether another try may succeed: a server that is busy, a connection that was cut."""
    lasting = isinstance(error, _LASTING) or type(error).__name__ in _LASTING_ELSEWHERE
    return isinstance(error, Exception) and not lasting


def try_again(fetch: Callable[[], _Result]) -> _Result:
    """What ``fetch`` returns; tried five times when faults are transient, then the last is raised.

    The waits grow and are jittered, so that many processes do not return at once.
    """
    patient = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=tenacity.wait_exponential_jitter(
            _FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS, jitter=_FIRST_WAIT_SECONDS
        ),
        retry=tenacity.retry_if_exception(is_transient),
        before_sleep=_tell,
        reraise=True,
    )
    return patient(fetch)


def _tell(state: tenacity.RetryCallState) -> None:
    """After the second failure: what is being waited for."""
    fault = state.outcome.exception() if state.outcome else None
    if state.attempt_number == 2 and fault is not None:
        print(f"seco: trying again: {in_words(fault)}", file=sys.stderr, flush=True)


def fetch_parts(
    parts: Sequence[tuple[str, int | None, int | None]],
) -> list[bytes | Exception]:
    """Parts of files of one kind of place, many at a time; in the place of one why it failed.

    Args:
        parts: (address, first byte, the byte after the last); None stands for the file's ends.
    """
    found: list[Any] = [None] * len(parts)
    left = list(range(len(parts)))

    def fetch() -> None:
        nonlocal left
        system, _ = open_filesystem(parts[left[0]][0])
        addresses, starts, ends = zip(*(parts[i] for i in left), strict=True)
        answers = system.cat_ranges(list(addresses), list(starts), list(ends), on_error="return")
        for i, answer in zip(left, answers, strict=True):
            found[i] = answer
        left = [i for i in left if isinstance(found[i], Exception) and is_transient(found[i])]
        if left:
            raise found[left[0]]

    if parts:
        try:
            try_again(fetch)
        except InputError:
            raise
        except Exception as error:
            for i in left:
                found[i] = found[i] or error
    return found


def told_of(content: bytes | Exception, address: str) -> bytes:
    """What :func:`fetch_parts` fetched.

    Raises:
        InputError: it could not be.
    """
    if isinstance(content, Exception):
        raise InputError(
            f"cannot be read ({in_words(content)})", address, "check address and credentials"
        ) from content
    return content


def in_words(error: BaseException) -> str:
    """A fault of whichever library stands behind an address, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
