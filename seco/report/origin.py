"""Where an encoder of the report comes from: its name, its proxy tasks, the run that trained it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seco.config import TASKS
from seco.report.records import words
from seco.report.sources import Run


def encoder_name(encoder: Mapping[str, Any]) -> str:
    """An encoder in words: its backbone and where its weights are from."""
    weights = words(encoder.get("checkpoint") or encoder.get("source"))
    if weights == "random":
        weights = "random initialisation"
    return ", ".join(part for part in (words(encoder.get("arch")), weights) if part) or "unknown"


def short_name(name: str) -> str:
    """An encoder's name with no more of its path than the run's folder and the file."""
    arch, comma, path = name.rpartition(", ")
    parts = path.split("/")
    if len(parts) <= 2:
        return name
    return f"{arch}{comma}\N{HORIZONTAL ELLIPSIS}/{'/'.join(parts[-2:])}"


def is_random(encoder: Mapping[str, Any]) -> bool:
    """Whether its weights were never trained."""
    return encoder.get("checkpoint") == "random"


def encoder_tasks(encoder: Mapping[str, Any], runs: Sequence[Run]) -> tuple[str, ...] | None:
    """The proxy tasks it was trained with: as it says itself, or as the run of its checkpoint does.

    Only a run that is part of the report counts: a path in a result is not followed.
    """
    stated = tasks_of(encoder)
    if stated:
        return stated
    run = run_of(encoder, runs)
    return None if run is None else tasks_of(run.config)


def tasks_of(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The proxy tasks of a run in the order of Eq. 5; None when its settings do not say."""
    named = config.get("tasks")
    if isinstance(named, str):
        named = named.split(",")
    if not isinstance(named, (list, tuple)):
        return None
    wanted = {str(task).strip() for task in named}
    return tuple(task for task in TASKS if task in wanted) or None


def run_of(encoder: Mapping[str, Any], runs: Sequence[Run]) -> Run | None:
    """The run of the report that trained it, by the folder of its checkpoint."""
    checkpoint = encoder.get("checkpoint")
    if not isinstance(checkpoint, str) or not checkpoint:
        return None
    folder = Path(checkpoint).parent
    for run in runs:
        if run.folder.absolute() == folder.absolute():
            return run
    # As named from the folder where the command ran, which need not be this one.
    named = folder.parts
    if folder.is_absolute() or not named or ".." in named:
        return None
    alike = [run for run in runs if run.folder.absolute().parts[-len(named) :] == named]
    return alike[0] if len(alike) == 1 else None
