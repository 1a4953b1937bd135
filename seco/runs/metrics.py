"""The log of a run: ``metrics.jsonl``, ``speed.jsonl`` and TensorBoard events.

``metrics.jsonl`` holds only what the computation determines, so that a resumed run's file equals
an undisturbed one's; clock readings go to ``speed.jsonl``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from shards.atomic import write_text

METRICS = "metrics.jsonl"
SPEED = "speed.jsonl"


class RunLog:
    """Appends a line a logged step; lines after ``start_step`` of an earlier try are dropped.

    A run that begins anew drops the line of step 0, too: its ``start_step`` is -1.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._files: dict[str, TextIO] = {}
        for name in (METRICS, SPEED):
            _drop_after(folder / name, start_step)
            self._files[name] = open(folder / name, "a", encoding="utf-8")  # noqa: SIM115
        # Half a second of imports, which only the first of many processes needs.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, metrics: dict[str, Any], speed: dict[str, Any]) -> None:
        """One line in each file, and the same figures for TensorBoard."""
        for name, values in ((METRICS, metrics), (SPEED, speed)):
            self._files[name].write(json.dumps({"step": step, **values}) + "\n")
            self._files[name].flush()
        for name, value in {**metrics, **speed}.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        for file in self._files.values():
            file.close()
        self._board.close()


def _drop_after(path: Path, step: int) -> None:
    if path.is_file():
        kept = [line for line in path.read_text("utf-8").splitlines() if _step(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut by a kill
