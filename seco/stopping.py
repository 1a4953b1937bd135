"""Stopping a run by a signal at a moment when everything can be saved."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

_AGAIN_SECONDS = 1.0
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopRequest:
    """Within the block, the first SIGINT, SIGTERM or SIGUSR1 sets a flag instead of killing.

    A second Ctrl-C interrupts at once: whoever presses it twice does not want to wait. (A terminal
    and a launcher that hands it on make two of one.)
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.signal_name is not None and time.monotonic() - self._since > _AGAIN_SECONDS
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal_name is None:
            self.signal_name, self._since = signal.Signals(number).name, time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def leave_signals_to_parent(worker: int) -> None:
    """For loader processes: signals reach the whole group, but only the parent acts on them.

    A loader that died of the scheduler's SIGTERM would take the trainer with it before it can save.
    It ends when its parent tells it to, or is gone.
    """
    for name in _SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
