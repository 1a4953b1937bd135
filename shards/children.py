"""Child processes import nothing from the current folder."""

from __future__ import annotations

import sys
from multiprocessing import util

# multiprocessing starts children as `python -c`, for which Python searches the current folder
# first. Python 3.10 knows only -I, which also ignores PYTHON* variables; children get the parent's
# sys.path a moment later in any case.
_SAFE_PATH = "-P" if sys.version_info >= (3, 11) else "-I"


def protect_children() -> None:
    """Keep processes started by multiprocessing from running files of the current folder.

    A ``signal.py`` or ``numpy.py`` there, unpacked with a dataset, would be imported in place of
    the real module. To be called before the first process is started.
    """
    flags = util._args_from_interpreter_flags  # type: ignore[attr-defined]
    if _SAFE_PATH not in flags():
        util._args_from_interpreter_flags = lambda: [*flags(), _SAFE_PATH]  # type: ignore[attr-defined]
