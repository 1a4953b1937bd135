"""Settings dataclasses: every default is written once, with its help text and its source.

A stage has one frozen dataclass whose fields are made with :func:`setting`. The command line's
options are generated from these (``cli.py``), and a run writes them back as TOML.
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
    """A dataclass field that carries what the command line needs to know of it.

    Args:
        default: the value when the user says nothing.
        help: one line for ``--help``.
        source: where the default comes from, for example ``"paper §5.2"``.
        choices: the values allowed, if few.
        flag: the option's name when it is not the field's, for example ``"-C"``.
        hidden: leave it off the command line.
        resumable: a run may go on from its checkpoint with another value.
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
    """The fields of a settings dataclass, those that a base class alone declares at the end."""
    own = list(inspect.get_annotations(config if isinstance(config, type) else type(config)))
    place = {name: number for number, name in enumerate(own)}
    return sorted(dataclasses.fields(config), key=lambda field: place.get(field.name, len(own)))


def resumable_settings(config: Any) -> frozenset[str]:
    """The settings in which two runs may differ for one to go on from the other's checkpoint."""
    return frozenset(f.name for f in dataclasses.fields(config) if f.metadata["resumable"])


def as_settings(config: Any) -> dict[str, Any]:
    """The fields of a settings dataclass as plain values; ``None`` is left out (TOML has none)."""
    return {
        field.name: _plain(getattr(config, field.name))
        for field in own_first(config)
        if getattr(config, field.name) is not None
    }


def require(holds: bool, name: str, message: str) -> None:
    """Refuse a setting's value.

    Raises:
        InputError: it does not hold; named by its option.
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
    """Fewer than the machine has, under a scheduler or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
