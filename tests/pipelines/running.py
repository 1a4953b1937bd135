"""Running ``prepare``: in this process, and as a driver that tests send signals to."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipelines._config import PrepareConfig
from pipelines._prepare import PrepareReport, prepare


def run(src: Path | str, out: Path | str, **settings: object) -> PrepareReport:
    given = {"dataset": "folder", "workers": 1, "frames": 4} | settings
    return prepare(PrepareConfig(src=str(src), out=str(out), **given))  # type: ignore[arg-type]


def hashes(folder: Path) -> dict[str, str]:
    """All files but the log, which tells of times and machines."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not path.name.endswith(".log.jsonl")
    }


def errors(path: Path) -> list[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(path.read_text()))
    return [(row["source"], row["kind"]) for row in rows]


def driver(
    src: Path | str, out: Path | str, workers: int, before: str = "", **settings: object
) -> list[str]:
    """A Python that prepares ``src`` and prints how that ended."""
    config = {"dataset": "folder", "src": str(src), "out": str(out), "workers": workers}
    config |= {"videos_per_shard": 1, "frames": 8, "max_failures": 50, **settings}
    script = (
        f"{before}from pipelines._config import PrepareConfig\n"
        "from pipelines._prepare import prepare\n"
        "from shards.errors import InputError, Stopped\n"
        f"try: prepare(PrepareConfig(**{config!r})); print('done')\n"
        "except InputError as error: print('InputError', error)\n"
        "except Stopped as stop: print('Stopped', stop)\n"
    )
    return [sys.executable, "-c", script]


def processes_of(session: int) -> list[int]:
    """All living processes of a session; ffmpeg has its own, found by the folder in its words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z" and int(fields[3]) == session:
                found.append(int(entry.name))
    return found


def programs_naming(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in words:
                found.append(entry.name)
    return found


def hear_ctrl_c() -> None:
    """Whatever a shell starts in the background ignores SIGINT, children too: not this one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.01)
