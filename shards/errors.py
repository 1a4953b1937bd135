"""The one error type for users' mistakes."""

from __future__ import annotations

from shards.terminal import printable

# Exit codes of all commands.
EXIT_FAILED, EXIT_USAGE, EXIT_TOO_MANY_EXCLUDED, EXIT_STOPPED = 1, 2, 3, 75
EXIT_PEER_LOST = 4  # from a rank to its launcher only; users see EXIT_FAILED


class InputError(ValueError):
    """Invalid user input; shown as one line, never as a traceback.

    Args:
        what: what is wrong, in the user's words.
        where: the file, folder or option concerned.
        fix: what to do about it.
    """

    def __init__(self, what: str, where: object = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        place = f"{where}: " if where is not None else ""
        advice = f" — {fix}" if fix else ""
        super().__init__(printable(" ".join(f"{place}{what}{advice}".split())))


class TooManyExcluded(InputError):
    """More inputs were excluded than ``--max-failures`` allows (exit code 3)."""


class PeerLost(Exception):
    """Another rank of the same run has ended and has reported why."""


class Stopped(Exception):
    """A signal or Ctrl-C ended the run with everything saved; the message says how to resume."""
