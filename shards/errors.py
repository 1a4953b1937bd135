"""The one error type for users' mistakes."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; shown as one line, never as a traceback.

    Args:
        what: what is wrong, in the user's words.
        where: the file, folder or option it is wrong in.
        fix: what to do about it.
    """

    def __init__(self, what: str, where: object = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        place = f"{where}: " if where is not None else ""
        advice = f" — {fix}" if fix else ""
        super().__init__(" ".join(f"{place}{what}{advice}".split()))


class TooManyExcluded(InputError):
    """More inputs were excluded than ``--max-failures`` allows (exit code 3)."""


class Stopped(Exception):
    """A signal or Ctrl-C ended the run with everything saved.

    Args:
        message: what was kept and how to go on.
        exit_code: 75 after SIGTERM/SIGUSR1 (the scheduler may start it again), 130 after Ctrl-C.
    """

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code
