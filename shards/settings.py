"""Settings dataclasses: every default is written once, with its help text and its source.

A stage has one frozen dataclass whose fields are made with :func:`setting`. The command line's
options are generated from these (``cli.py``), and a run writes them back as TOML.
"""

from __future__ import annotations

import dataclasses
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
) -> Any:
    """A dataclass field that carries what the command line needs to know of it.

    Args:
        default: the value when the user says nothing.
        help: one line for ``--help``.
        source: where the default comes from, for example ``"paper §5.2"``.
        choices: the values allowed, if few.
        flag: the option's name when it is not the field's, for example ``"-C"``.
        hidden: leave it off the command line.
    """
    metadata = {
        "help": help,
        "source": source,
        "choices": tuple(choices) if choices else None,
        "flag": flag,
        "hidden": hidden,
    }
    return dataclasses.field(default=default, metadata=metadata)


def as_settings(config: Any) -> dict[str, Any]:
    """The fields of a settings dataclass as plain values; ``None`` is left out (TOML has none)."""
    return {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
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
