"""A part's table, printed row by row: what a part has measured before it is stopped is kept."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Table:
    """Prints ``| what | predicted | measured |`` and, in a line that starts with ``>``, notes.

    Predictions are for one H100; on the CPU they are left out.

    Args:
        device: what is measured.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._on_gpu = str(device).startswith("cuda")
        self.failed: list[str] = []
        print("\n| what | predicted | measured |\n|---|---|---|", flush=True)

    def row(self, what: str, measured: str, predicted: str = "", why: str = "") -> None:
        """Print a figure; ``why`` is where the prediction comes from."""
        shown = predicted if self._on_gpu else ""
        print(f"| {what} | {shown} | {measured} |", flush=True)
        if shown and why:
            self.note(f"{what}: {shown}, as {why}")

    def check(self, what: str, measured: float, most: float) -> None:
        """A figure that must not exceed ``most``; a part with one that does has failed."""
        passed = measured <= most  # NaN is not
        verdict = "" if passed else " **FAILED**"
        print(f"| {what} | at most {most:g} | {measured:.2g}{verdict} |", flush=True)
        if not passed:
            self.failed.append(what)

    def note(self, text: str) -> None:
        """A line under the table; the summary leaves it out."""
        print(f"> {text}", flush=True)

    def exit_code(self) -> int:
        """1 when a check failed."""
        return 1 if self.failed else 0


def arguments(description: str | None, *more: str, resolved: bool = True) -> argparse.Namespace:
    """Parse a part's command line: ``--device``, ``--work`` and what ``more`` names.

    ``given.device`` is a ``torch.device`` where it is to be ``resolved``, else its name.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is written")
    for name in more:
        parser.add_argument(name)
    given = parser.parse_args()
    if resolved:
        from seco.processes.device import resolve_device  # loads torch

        given.device = resolve_device(given.device)
    return given
