"""Settings dataclasses: each default is written once, with its help text and its source.

Each command has a frozen dataclass whose fields are made with :func:`setting`. ``cli.py`` generates
the command's options from them, and a run writes them to its ``config.toml``.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Sequence
from typing import Any

from shards.errors import InputError


def setting(
    default: Any,
    help: str,
    *,
    source: str | None = None,
    choices: Sequence[str] | None = None,
    flag: str | None = None,
    hidden: bool = False,
    resumable: bool = False,
) -> Any:
    """Return a dataclass field with the metadata that the command line needs.

    Args:
        default: the value if the option is not given.
        help: text for ``--help``, without a final full stop.
        source: where the default comes from, for example ``"paper §5.2"``.
        choices: the allowed values; None for any.
        flag: an additional option name, for example ``"-C"``.
        hidden: do not make an option of it.
        resumable: a run may be resumed with another value.
    """
    metadata = {
        "help": help,
        "source": source,
        "choices": tuple(choices) if choices else None,
        "flag": flag,
        "hidden": hidden,
        "resumable": resumable,
    }
    return dataclasses.field(default=default, metadata=metadata)


def own_first(config: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields of a settings dataclass; those only declared in a base class come last."""
    own = list(inspect.get_annotations(config if isinstance(config, type) else type(config)))
    place = {name: number for number, name in enumerate(own)}
    return sorted(dataclasses.fields(config), key=lambda field: place.get(field.name, len(own)))


def resumable_settings(config: Any) -> frozenset[str]:
    """Return the names of the settings that may change when a run is resumed."""
    return frozenset(f.name for f in dataclasses.fields(config) if f.metadata["resumable"])


def as_settings(config: Any) -> dict[str, Any]:
    """Return the fields as plain values, without those that are None (TOML has no null)."""
    return {
        field.name: _plain(getattr(config, field.name))
        for field in own_first(config)
        if getattr(config, field.name) is not None
    }


def default_settings(config: Any) -> dict[str, Any]:
    """Return the defaults as plain values, like :func:`as_settings`."""
    return {
        field.name: _plain(field.default)
        for field in own_first(config)
        if field.default is not None and field.default is not dataclasses.MISSING
    }


def require(holds: bool, name: str, message: str) -> None:
    """Check a condition on the value of setting ``name``.

    Raises:
        InputError: ``holds`` is false; the message names the option.
    """
    if not holds:
        raise InputError(message, f"--{name.replace('_', '-')}")


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def usable_cpus() -> int:
    """Return the number of CPUs this process may use, which schedulers and containers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
