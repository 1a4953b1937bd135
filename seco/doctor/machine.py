"""What the machine itself has: processors, memory, limits, compiler."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

from seco.doctor.distributions import BROKEN, MISSING, NOT_USED, OK, Found
from seco.doctor.libraries import one_line
from shards.cpus import usable_cpus
from shards.progress import size_text

_LEAST_OPEN_FILES = 1024  # a reader holds up to 256 shards (shards/access.py); workers add pipes
_LEAST_SHARED_BYTES = 1e9
_COMPILER_SECONDS = 180.0


def _python() -> Found:
    where = "in a virtual environment" if sys.prefix != sys.base_prefix else "of the whole system"
    system = f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}"
    return Found(OK, platform.python_version(), f"{where}; {system.strip()}")


def _cpus() -> Found:
    usable, all_of_them = usable_cpus(), os.cpu_count()
    detail = f"{usable} of {all_of_them} can be used"
    quota = _first_line("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        detail += f"; the container may use the time of {int(quota[0]) / int(quota[1]):g}"
    return Found(OK, detail=detail)


def _memory() -> Found:
    detail = size_text(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = _first_line("/sys/fs/cgroup/memory.max")
    if limit.isdigit():
        detail += f"; the container may use {size_text(int(limit))}"
    return Found(OK, detail=detail)


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().partition("\n")[0]
    except OSError:
        return ""


def _shared_memory() -> Found:
    if not os.path.isdir("/dev/shm"):
        return Found(NOT_USED)
    disk = shutil.disk_usage("/dev/shm")
    state = OK if disk.free >= _LEAST_SHARED_BYTES else BROKEN
    return Found(state, detail=f"{size_text(disk.free)} of {size_text(disk.total)} free")


def _open_files() -> Found:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Found(OK, detail="no limit")
    state = OK if soft >= _LEAST_OPEN_FILES else BROKEN
    most = "without limit" if hard == resource.RLIM_INFINITY else f"up to {hard}"
    return Found(state, detail=f"{soft} per process; can be raised {most}")


def _file_locks() -> Found:
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError:
        return Found(NOT_USED, detail="this folder cannot be written to")
    except OSError as error:
        return Found(MISSING, detail=f"not in this folder ({error.strerror})")
    return Found(OK, detail="in this folder")


def _compiler() -> Found:
    # As Triton and torch's inductor look for them.
    c = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not c or not cxx:
        return Found(MISSING, detail=f"no {'C++' if c else 'C'} compiler was found")
    include = sysconfig.get_config_var("INCLUDEPY")
    for command, language in ((c, "c"), (cxx, "c++")):
        done = subprocess.run(
            [*command.split(), "-x", language, "-fsyntax-only", f"-I{include}", "-"],
            input=b"#include <Python.h>\n",
            capture_output=True,
            timeout=_COMPILER_SECONDS,
            check=False,
        )
        if done.returncode:
            said = one_line(done.stderr.decode("utf-8", "replace"))
            return Found(BROKEN, detail=f"{command} cannot compile against Python.h: {said}")
    shown = subprocess.run(
        [*c.split(), "--version"], capture_output=True, timeout=_COMPILER_SECONDS
    )
    version = one_line(shown.stdout.decode("utf-8", "replace").partition("\n")[0])
    return Found(OK, version, "C and C++, with Python's headers")


MACHINE: dict[str, Callable[[], Found]] = {
    "Python": _python,
    "CPUs": _cpus,
    "memory": _memory,
    "/dev/shm": _shared_memory,
    "open files": _open_files,
    "file locks": _file_locks,
    "C compiler": _compiler,
}
