"""The one progress display: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from shards.terminal import printable, say

_LINE_EVERY_SECONDS = 10.0


class Progress:
    """Counts ``done`` of ``total`` units; :meth:`advance` shows rate, ETA and a status text."""

    def __init__(self, title: str, total: int, unit: str, start: int = 0) -> None:
        self.title = printable(title)
        self.total = total
        self.unit = unit
        self.done = start
        self._start = start
        self._began = time.monotonic()
        self._last_line = self._began
        self._status = ""

    @property
    def seconds(self) -> float:
        """Seconds since the display was opened."""
        return time.monotonic() - self._began

    def advance(self, count: int = 1, status: str = "") -> None:
        """Count ``count`` more units; ``status`` replaces the text at the line's end."""
        self.done = min(self.done + count, self.total)  # work done twice counts once
        self._status = printable(status) or self._status
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = now
            self._print_line()

    def _print_line(self) -> None:
        say(self._line())

    def _line(self) -> str:
        elapsed = self.seconds
        rate = (self.done - self._start) / elapsed if elapsed > 0 else 0.0
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        eta = f", {_clock(left)} left" if self.done < self.total and left < float("inf") else ""
        status = f" | {self._status}" if self._status else ""
        return (
            f"{self.title}: {self.done}/{self.total} {self.unit}, "
            f"{rate:.1f}/s, {_clock(elapsed)}{eta}{status}"
        )

    def finish(self) -> None:
        """Show the final count, even before the first timed line."""
        self._print_line()


class _TerminalProgress(Progress):
    """Progress drawn by rich on a terminal."""

    def __init__(self, title: str, total: int, unit: str, start: int = 0) -> None:
        super().__init__(title, total, unit, start)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit} {{task.fields[rate]}}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._bars.add_task(
            self.title, total=total, completed=start, rate="", status=""
        )
        self._bars.start()

    def _show(self) -> None:
        elapsed = self.seconds
        rate = (self.done - self._start) / elapsed if elapsed > 0 else 0.0
        self._bars.update(
            self._task, completed=self.done, rate=f"{rate:.1f}/s", status=self._status
        )

    def finish(self) -> None:
        self._show()
        self._bars.stop()


class _QuietProgress(Progress):
    """Counts without a display, because another process of the same job has one."""

    def _show(self) -> None:
        pass

    def finish(self) -> None:
        pass


@contextmanager
def progress(
    title: str, total: int, unit: str, start: int = 0, *, quiet: bool = False
) -> Iterator[Progress]:
    """Show the progress of the block on standard error."""
    loud = _TerminalProgress if sys.stderr.isatty() else Progress
    shown = (_QuietProgress if quiet else loud)(title, total, unit, start)
    try:
        yield shown
    finally:
        shown.finish()


def size_text(size: float) -> str:
    """Format a number of bytes for people, for example ``"93.1 GB"``."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
