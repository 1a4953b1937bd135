"""What this machine has, what each missing part costs, and how to get it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import seco
from seco.doctor.distributions import BROKEN, DISTRIBUTION, MISSING, NOT_USED, OK, Found
from seco.doctor.libraries import CHECKS, blocked, one_line
from seco.pages.text import printable
from shards.cpus import usable_cpus
from shards.errors import InputError
from shards.progress import size_text


class Known(NamedTuple):
    """What is known of a part without looking."""

    cost: str  # of not having it
    fix: str
    serves: tuple[str, ...] = ()  # what does not work without it
    core: bool = False  # every user needs it


_PREPARE, _TRAIN = "prepare", "pretrain, finetune, extract-features, probe, track"
_ALL_COMMANDS = (_PREPARE, _TRAIN, "retrieve")
_COMPILE = "torch.compile"
_NO_TORCH = "training, features and evaluation do not work"
_TORCH_PAIR = "pip install --upgrade --force-reinstall torch torchvision"


def _extra(name: str) -> str:
    return f'pip install "{DISTRIBUTION}[{name}]"'


# In the order in which they are shown.
KNOWN: dict[str, Known] = {
    "Python": Known("nothing works", "install Python 3.10 or newer", _ALL_COMMANDS, core=True),
    "CPUs": Known("", ""),
    "memory": Known("", ""),
    "/dev/shm": Known(
        "finetune and track train with workers, NCCL and Ray may fail (pretrain and "
        "extract-features do not use it)",
        "in a container: docker run --shm-size=8g; or --workers 0",
    ),
    "open files": Known("datasets of many shards may fail: too many open files", "ulimit -n 65536"),
    "file locks": Known(
        "--cache-dir fails in this folder; two `seco prepare` here do not notice each other",
        "give --cache-dir and --out a folder on a local disk",
    ),
    "ffmpeg": Known(
        "videos cannot be decoded: prepare, demo, track run, retrieve query --file",
        "pip install --force-reinstall imageio-ffmpeg, or name a binary with SECO_FFMPEG",
        (_PREPARE,),
        core=True,
    ),
    "video codecs": Known(
        "videos that need these decoders are excluded; the demo and track run need the encoders",
        "unset SECO_FFMPEG to use the ffmpeg of imageio-ffmpeg, which has all of them",
    ),
    "torch": Known(_NO_TORCH, _TORCH_PAIR, _ALL_COMMANDS[1:], core=True),
    "torchvision": Known(_NO_TORCH, _TORCH_PAIR, _ALL_COMMANDS[1:], core=True),
    "simplejpeg": Known(
        "frames can be neither encoded nor decoded",
        "pip install simplejpeg",
        _ALL_COMMANDS,
        core=True,
    ),
    "Pillow": Known("frames cannot be resized", "pip install pillow", _ALL_COMMANDS, core=True),
    "tensorboard": Known(
        "training does not start", "pip install tensorboard", (_TRAIN,), core=True
    ),
    "safetensors": Known(
        "checkpoints cannot be read", "pip install safetensors", _ALL_COMMANDS[1:], core=True
    ),
    "other packages": Known(
        "most commands do not start", f"pip install {DISTRIBUTION}", _ALL_COMMANDS, core=True
    ),
    "pillow-simd": Known(
        "extract-features resizes frames more slowly",
        'make install-simd, or: pip uninstall --yes pillow && CC="cc -mavx2" '
        "pip install --no-binary pillow-simd pillow-simd",
    ),
    "faiss": Known(
        "retrieve and demo do not work",
        f"{_extra('cpu')}, or, on a machine with a GPU, {_extra('gpu')}",
        ("retrieve",),
    ),
    "GPU": Known(
        "everything runs on the CPU",
        "install NVIDIA's driver until nvidia-smi lists the GPU; in a container: "
        "docker run --gpus all",
        ("computing on GPUs",),
    ),
    "NCCL": Known(
        "training cannot use several GPUs",
        "install a torch built for CUDA: https://pytorch.org/get-started/locally",
        ("training on several GPUs",),
    ),
    "nvJPEG": Known("--decode nvjpeg does not work", _TORCH_PAIR, ("--decode nvjpeg",)),
    "faiss on GPUs": Known(
        "retrieve searches on the CPU",
        f"pip uninstall --yes faiss-cpu && {_extra('gpu')}",
        ("retrieve on GPUs",),
    ),
    "C compiler": Known(
        "training and its views are not compiled, and slower on a GPU; --compile has no effect",
        "install compilers of C and C++ and Python's headers (Debian: apt-get install g++ "
        "python3-dev), or name compilers with CC and CXX",
        (_COMPILE,),
    ),
    "Triton": Known(
        "training and its views are not compiled, and slower",
        f"{_TORCH_PAIR} triton",
        (_COMPILE,),
    ),
    "Ray": Known("--engine ray does not work", _extra("ray"), ("--engine ray",)),
    "s3fs": Known("s3:// addresses do not work", _extra("s3"), ("s3://",)),
    "aiohttp": Known("https:// addresses do not work", "pip install aiohttp", ("https://",)),
    "gcsfs": Known("gs:// addresses do not work", "pip install gcsfs", ("gs://",)),
    "adlfs": Known("az:// addresses do not work", "pip install adlfs", ("az://",)),
}


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


LIMIT_SECONDS = 180.0  # of one library: torch from a slow network disk takes a minute
# Takes no module from the current folder, and this package from where it is, whatever else is
# on the path.
_CHILD = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import importlib.util
package = importlib.util.spec_from_file_location("seco", sys.argv[1])
sys.modules["seco"] = importlib.util.module_from_spec(package)
from seco.doctor.libraries import main
main(sys.argv[3:], float(sys.argv[2]))
"""
_WIDTHS = (15, 9)  # of the first columns of the table


class FfmpegFacts(Protocol):
    """What is known of the ffmpeg in use."""

    @property
    def binary(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def decodes(self) -> Sequence[str]: ...
    @property
    def lacks(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Part:
    """One row. ``cost`` and ``fix`` are None where nothing is missing."""

    name: str
    state: str  # "ok", "missing", "broken" or "not used"
    version: str | None
    detail: str
    cost: str | None
    fix: str | None


@dataclass(frozen=True)
class Examination:
    """What ``seco doctor`` found."""

    parts: tuple[Part, ...]

    @property
    def faults(self) -> list[Part]:
        """The parts of the core that are missing or broken."""
        return [
            one for one in self.parts if KNOWN[one.name].core and one.state in (MISSING, BROKEN)
        ]

    def to_json(self) -> str:
        """One object."""
        parts = [dataclasses.asdict(one) for one in self.parts]
        return json.dumps({"ok": not self.faults, "parts": parts}, indent=1)

    def table(self) -> str:
        """Plain text."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        indent = " " * sum(_WIDTHS)
        for one in self.parts:
            known = ", ".join(text for text in (one.version, one.detail) if text)
            yield printable(f"{one.name:<{_WIDTHS[0]}}{one.state:<{_WIDTHS[1]}}{known}").rstrip()
            if one.cost:
                yield f"{indent}cost: {printable(one.cost)}"
            if one.fix:
                yield f"{indent}get it: {printable(one.fix)}"
        yield ""
        yield self._summary()

    def _summary(self) -> str:
        serving: dict[str, list[Part]] = {}
        for one in self.parts:
            for ability in KNOWN[one.name].serves:
                serving.setdefault(ability, []).append(one)
        ready, lacking = [], []
        for ability, parts in serving.items():
            faults = [one.name for one in parts if one.state in (MISSING, BROKEN)]
            if faults:
                lacking.append(f"{ability} ({', '.join(faults)})")
            elif any(one.state == OK for one in parts):
                ready.append(ability)
        text = f"Ready: {'; '.join(ready) or 'nothing'}."
        return f"{text} Not ready: {'; '.join(lacking)}." if lacking else text

    def require_core(self) -> None:
        """Raises InputError where a part of the core is missing or broken."""
        if self.faults:
            named = ", ".join(f"{one.name} ({one.state})" for one in self.faults)
            raise InputError(f"cannot work without {named}", fix="the report says how to get it")


def examine(ffmpeg: Callable[[], FfmpegFacts]) -> Examination:
    """Look for everything in ``KNOWN``. Takes as long as importing all libraries once.

    Args:
        ffmpeg: finds the ffmpeg in use; raises InputError if it cannot be used.
    """
    found = {name: _tried(look) for name, look in MACHINE.items()}
    found |= _ffmpeg(ffmpeg)
    found |= check_libraries(tuple(CHECKS))
    return Examination(tuple(_part(name, found[name]) for name in KNOWN))


def _part(name: str, found: Found) -> Part:
    known = KNOWN[name]
    lacking = found.state in (MISSING, BROKEN)
    return Part(
        name=name,
        state=found.state,
        version=found.version,
        detail=found.detail,
        cost=known.cost if lacking else None,
        fix=(found.fix or known.fix) if lacking else None,
    )


def _tried(look: Callable[[], Found]) -> Found:
    try:
        return look()
    except Exception as error:  # one part that cannot be looked at hides no other
        return Found(BROKEN, detail=_in_words(error))


def _in_words(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")


def check_libraries(names: Sequence[str], limit_seconds: float = LIMIT_SECONDS) -> dict[str, Found]:
    """Import and try libraries in a process of its own; after a crash another one does the rest.

    Args:
        names: keys of ``CHECKS``.
        limit_seconds: after which a library counts as broken.
    """
    found: dict[str, Found] = {}
    left = list(names)
    while left:
        found |= _check_until_crash(left, limit_seconds)
        left = [name for name in left if name not in found]
        for name in left:
            if obstacle := blocked(name, found):
                found[name] = obstacle
        left = [name for name in left if name not in found]
    return found


def _check_until_crash(names: Sequence[str], limit_seconds: float) -> dict[str, Found]:
    """The results of one process; the one at which it ended is BROKEN."""
    script = [sys.executable, "-c", _CHILD, seco.__file__, str(limit_seconds), *names]
    # Files, not pipes, which a process that a library has left behind could hold open.
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as errors:
        done = subprocess.run(
            script, stdin=subprocess.DEVNULL, stdout=answers, stderr=errors, check=False
        )
        lines = [json.loads(line) for line in _content(answers).splitlines()]
        said = _content(errors)
    found = {line["name"]: Found(*line["found"]) for line in lines if "found" in line}
    last = lines[-1] if lines else {"name": names[0]}
    if last["name"] not in found:
        ending = _ending(done.returncode, said, limit_seconds)
        found[last["name"]] = Found(BROKEN, None, ending, last.get("repair"))
    return found


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _ending(code: int, said: str, limit_seconds: float) -> str:
    if code == 1 and re.search(r"^Timeout \(", said, re.MULTILINE):  # faulthandler's
        return f"no answer within {limit_seconds:g} s"
    how = f"crashes ({signal.Signals(-code).name})" if code < 0 else f"exits with code {code}"
    return one_line(f"{how}: {said}" if said.strip() else how)


def _ffmpeg(look: Callable[[], FfmpegFacts]) -> dict[str, Found]:
    try:
        facts = look()
    except InputError as error:
        state, place = (BROKEN, f"{error.where}: ") if error.where else (MISSING, "")
        found = Found(state, None, f"{place}{error.what}", error.fix)
    except Exception as error:  # of a broken imageio-ffmpeg
        found = Found(BROKEN, detail=_in_words(error))
    else:
        found = Found(OK, facts.version, f"from {facts.source}: {facts.binary}")
        state = MISSING if facts.lacks else OK
        codecs = Found(state, detail=", ".join(facts.lacks or facts.decodes))
        return {"ffmpeg": found, "video codecs": codecs}
    return {"ffmpeg": found, "video codecs": Found(NOT_USED, detail="needs ffmpeg")}
