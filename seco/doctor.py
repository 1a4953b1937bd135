"""``seco doctor``: what this machine has, what each missing part costs, and how to get it.

Each library is imported and used in a process of its own, since a broken one may crash. Nothing
else is imported here, so that the command works where little else does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import fcntl
import functools
import importlib.util
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import IO, NamedTuple, NoReturn, Protocol

from shards.errors import InputError
from shards.progress import size_text
from shards.settings import usable_cpus
from shards.terminal import printable

DISTRIBUTION = "seco-video"
OK, MISSING, BROKEN, NOT_USED = "ok", "missing", "broken", "not used"
_PACKAGE = re.compile(r"^(\w+)/__init__\.py,", re.MULTILINE)  # in a RECORD


class Found(NamedTuple):
    """The result of one check."""

    state: str  # OK, MISSING, BROKEN or NOT_USED
    version: str | None = None
    detail: str = ""
    fix: str | None = None  # replaces the usual advice


class Installed(NamedTuple):
    """An installed distribution."""

    name: str  # normalised
    version: str
    folder: str
    packages: frozenset[str]  # import names


@functools.cache
def _installed() -> list[Installed]:
    """All installed distributions, in path order."""
    found = []
    for one in metadata.distributions():
        # Leftovers of an interrupted pip have no name.
        with contextlib.suppress(Exception):
            name = re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower()
            packages = (one.read_text("top_level.txt") or "").split()
            packages += _PACKAGE.findall(one.read_text("RECORD") or "")
            folder = os.path.realpath(str(one.locate_file("")))
            found.append(Installed(name, one.version, folder, frozenset(packages)))
    return found


def owners_of(package: str) -> list[Installed]:
    """Distributions that provide the import name, in path order."""
    return [one for one in _installed() if package in one.packages]


def names_of(package: str) -> str:
    """Names of the distributions that provide ``package``, for display."""
    return " and ".join(sorted({one.name for one in owners_of(package)})) or package


def files_at_fault(package: str, owners: list[Installed]) -> Found | None:
    """Report a package that is missing, incomplete, or a mixture of several distributions."""
    spec = importlib.util.find_spec(package)
    origin = os.path.realpath(os.path.dirname(os.path.dirname(spec.origin or ""))) if spec else ""
    if owners and owners[0].folder == origin:  # distributions later on the path do no harm
        owners = [one for one in owners if one.folder == origin]
    versions = {one.name: one.version for one in owners}
    if len(versions) > 1:
        names = sorted(versions)
        named = " and ".join(f"{name} {versions[name]}" for name in names)
        return Found(
            BROKEN,
            detail=f"{named} are installed together and overwrite each other's {package}",
            fix=f"pip uninstall --yes {' '.join(names)}, then pip install exactly one of them",
        )
    if spec is not None and spec.origin is not None:
        return None
    if not owners:  # there may be a folder of that name, but it is not a package
        return Found(MISSING)
    return Found(BROKEN, owners[0].version, "installed, but its files are missing", repair(owners))


def repair(owners: list[Installed]) -> str | None:
    """Command that restores the files of a distribution."""
    return f"pip install --force-reinstall --no-deps {owners[0].name}" if owners else None


def too_old(owners: list[Installed]) -> Found | None:
    """Report a version older than the toolkit requires."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a checkout
        return None
    floors = (
        re.match(r"([\w.-]+)(?:\[.*?\])?>=([\d.]+)", text.replace(" ", "")) for text in requirements
    )
    least = {floor[1]: floor[2] for floor in floors if floor}
    for one in owners[:1]:
        if one.name in least and _numbers(one.version) < _numbers(least[one.name]):
            fix = f"pip install --upgrade {one.name}"
            return Found(BROKEN, one.version, f"{least[one.name]} or newer is required", fix)
    return None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


_TINY_PX = 16
_TORCH_PAGE = "https://pytorch.org/get-started/locally"
# Import names of the other requirements in setup.py that this toolkit imports.
OTHER_PACKAGES = (
    *("numpy", "fsspec", "webdataset", "matplotlib", "jinja2", "rich", "braceexpand", "tenacity"),
    *("tomli_w", "msgspec", *(("tomli",) if sys.version_info < (3, 11) else ())),
)


class Check(NamedTuple):
    """How to check a part."""

    run: Callable[[], Found]
    owns: str | None = None  # import name; MISSING if no distribution provides it
    needs: tuple[str, ...] = ()  # parts without which there is nothing to check


def _torch() -> Found:
    import numpy as np
    import torch

    # Fails if torch was built for another NumPy.
    torch.from_numpy(np.ones(2, np.float32)).sum().item()
    simd = torch.backends.cpu.get_cpu_capability()
    return Found(OK, torch.__version__, f"{_build()}; CPU kernels for {simd}")


def _build() -> str:
    import torch

    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _torchvision() -> Found:
    import torch
    import torchvision
    from torchvision.ops import nms

    # The compiled part is registered only with the torch it was built for.
    nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    return Found(OK, torchvision.__version__, f"fits torch {torch.__version__}")


def _gpu() -> Found:
    import torch

    number, newest = _nvidia_driver()
    driver = number and f"driver {number}"
    if torch.cuda.is_available():
        kinds = Counter(_gpu_in_words(number) for number in range(torch.cuda.device_count()))
        gpus = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
        return Found(OK, driver, gpus + (f"; driver supports CUDA {newest}" if newest else ""))
    reason = f"torch is {_build()}"
    if torch.version.cuda:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition(". ")[0]
    if driver is None or "No CUDA GPUs" in reason:
        return Found(MISSING, driver, reason)
    if torch.version.cuda:
        fix = f"update the NVIDIA driver, or install a torch for CUDA {newest}: {_TORCH_PAGE}"
    else:
        fix = f"install torch and torchvision for CUDA {newest} or older: {_TORCH_PAGE}"
    return Found(BROKEN, driver, reason, fix)


def _gpu_in_words(number: int) -> str:
    import torch

    try:  # fails if this torch has no kernels for the GPU, or another process uses it exclusively
        (torch.ones(2, device=f"cuda:{number}") + 1).sum().item()
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise RuntimeError(f"GPU {number}: {first}") from error
    gpu = torch.cuda.get_device_properties(number)
    memory = f"{gpu.total_memory / 2**30:.0f} GiB"
    return f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"


def _nvidia_driver() -> tuple[str | None, str | None]:
    """Versions of NVIDIA's driver and of the newest CUDA it supports; None if unknown."""
    import ctypes

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None, None
    text, number = ctypes.create_string_buffer(96), ctypes.c_int()
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, 96):
        return None, None
    nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(number))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"  # 13000 is 13.0
    return text.value.decode("ascii", "replace"), cuda


def _nccl() -> Found:
    import torch

    if not torch.distributed.is_nccl_available():
        return Found(MISSING, detail=f"torch is {_build()} and without NCCL")
    return Found(OK, ".".join(map(str, torch.cuda.nccl.version())), "part of torch")


def _nvjpeg() -> Found:
    import torch
    from torchvision.io import decode_jpeg, encode_jpeg

    gray = torch.zeros(3, _TINY_PX, _TINY_PX, dtype=torch.uint8)
    decode_jpeg(encode_jpeg(gray), device="cuda")
    return Found(OK, detail="part of torchvision")


def _simplejpeg() -> Found:
    import numpy as np
    import simplejpeg

    gray = np.zeros((_TINY_PX, _TINY_PX, 1), np.uint8)
    simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(gray, colorspace="GRAY"), "GRAY")
    # It does not report its library, but libjpeg-turbo leaves its name in the binary.
    binary = Path(simplejpeg._jpeg.__file__).read_bytes()
    linked = re.search(rb"libjpeg-turbo version ([\d.]+)", binary)
    library = linked[1].decode() if linked else "of unknown version"
    return Found(OK, simplejpeg.__version__, f"libjpeg-turbo {library}")


def _pillow() -> Found:
    import PIL
    from PIL import Image, features

    # Uses the compiled part, which refuses to work with Python files of another version.
    Image.new("RGB", (_TINY_PX, _TINY_PX)).resize((2, 2), Image.Resampling.BILINEAR)
    turbo = features.version("libjpeg_turbo")
    library = f"libjpeg-turbo {turbo}" if turbo else "without libjpeg-turbo"
    return Found(OK, PIL.__version__, f"{names_of('PIL')}; {library}")


def _pillow_simd() -> Found:
    if "simd" in names_of("PIL"):
        import PIL

        return Found(OK, PIL.__version__)
    return Found(MISSING, detail=f"{names_of('PIL')} is installed")


def _faiss() -> Found:
    import faiss
    import numpy as np

    index = faiss.IndexFlatIP(4)
    index.add(np.eye(4, dtype=np.float32))
    index.search(np.eye(4, dtype=np.float32), 1)
    options = " ".join(faiss.get_compile_options().split())
    return Found(OK, faiss.__version__, f"{names_of('faiss')}; built with {options}")


def _faiss_gpu() -> Found:
    import faiss

    # The same test as in seco/evaluation/nearest.py.
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if gpus:
        return Found(OK, faiss.__version__, f"uses {gpus} GPUs")
    return Found(MISSING, detail=f"{names_of('faiss')} uses no GPU")


def _other_packages() -> Found:
    found = {name: run_check(Check(_import_alone(name), name)) for name in OTHER_PACKAGES}
    faults = {name: one for name, one in found.items() if one.state != OK}
    if not faults:
        return Found(OK, detail=", ".join(OTHER_PACKAGES))
    state = BROKEN if any(one.state == BROKEN for one in faults.values()) else MISSING
    detail = "; ".join(f"{name}: {one.detail or one.state}" for name, one in faults.items())
    return Found(state, None, detail, f"pip install --force-reinstall {' '.join(faults)}")


def _import_alone(module: str) -> Callable[[], Found]:
    def check() -> Found:
        import_module(module)
        owners = owners_of(module.partition(".")[0])
        return Found(OK, owners[0].version if owners else None)

    return check


def _tensorboard() -> Found:
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    return Found(OK, metadata.version("tensorboard"))


def _onnx() -> Found:
    import onnx
    import onnxscript  # noqa: F401

    return Found(OK, onnx.__version__)


# A check comes after those it needs.
CHECKS: dict[str, Check] = {
    "torch": Check(_torch, "torch"),
    "torchvision": Check(_torchvision, "torchvision", ("torch",)),
    "simplejpeg": Check(_simplejpeg, "simplejpeg"),
    "Pillow": Check(_pillow, "PIL"),
    "tensorboard": Check(_tensorboard, "tensorboard", ("torch",)),
    "safetensors": Check(_import_alone("safetensors.torch"), "safetensors", ("torch",)),
    "other packages": Check(_other_packages),
    "pillow-simd": Check(_pillow_simd, needs=("Pillow",)),
    "faiss": Check(_faiss, "faiss"),
    "GPU": Check(_gpu, needs=("torch",)),
    "NCCL": Check(_nccl, needs=("GPU",)),
    "nvJPEG": Check(_nvjpeg, needs=("GPU", "torchvision")),
    "faiss on GPUs": Check(_faiss_gpu, needs=("GPU", "faiss")),
    "Triton": Check(_import_alone("triton"), "triton", ("GPU",)),
    "Ray": Check(_import_alone("ray"), "ray"),
    "s3fs": Check(_import_alone("s3fs"), "s3fs"),
    "aiohttp": Check(_import_alone("aiohttp"), "aiohttp"),
    "gcsfs": Check(_import_alone("gcsfs"), "gcsfs"),
    "adlfs": Check(_import_alone("adlfs"), "adlfs"),
    "pyarrow": Check(_import_alone("pyarrow.parquet"), "pyarrow"),
    "timm": Check(_import_alone("timm"), "timm", ("torch", "torchvision")),
    "ONNX": Check(_onnx, "onnx", ("torch",)),
    "Hugging Face": Check(_import_alone("huggingface_hub"), "huggingface_hub"),
}


def blocked(name: str, found: Mapping[str, Found]) -> Found | None:
    """Return the result of a check that cannot run because another part does not work."""
    for need in CHECKS[name].needs:
        if need in found and found[need].state != OK:
            return Found(NOT_USED, detail=f"needs {'a GPU' if need == 'GPU' else need}")
    return None


def run_check(check: Check) -> Found:
    """Run a check; any exception of the library becomes one line."""
    owners = owners_of(check.owns) if check.owns else []
    version = owners[0].version if owners else None
    try:
        if check.owns and (fault := files_at_fault(check.owns, owners)):
            return fault
        found = check.run()
        return too_old(owners) or found
    except ModuleNotFoundError as error:
        fix = f"pip install {owners[0].name}" if owners else None  # also installs requirements
        return Found(BROKEN, version, one_line(f"needs {error.name}, which is not installed"), fix)
    except (Exception, SystemExit) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        return Found(BROKEN, version, reason, _repair(check))


def _repair(check: Check) -> str | None:
    if check.owns in (None, "torch", "torchvision"):  # these two are reinstalled as a pair
        return None
    return repair(owners_of(check.owns))


def one_line(text: str) -> str:
    """The beginning of a message, without line breaks."""
    return " ".join(text.split())[:300]


def main(names: Sequence[str], limit_seconds: float) -> NoReturn:
    """Run checks and end the process.

    Writes JSON lines to standard output: when a check begins, its name and how to fix a crash; when
    it ends, its name and :class:`Found`. Standard error has to be a file; if the process ends
    early, it contains what the last library wrote, or "Timeout" if it took longer than
    ``limit_seconds``.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # keep the libraries' output out of the answers
    found: dict[str, Found] = {}
    for name in names:
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        begun = {"name": name, "repair": _repair(CHECKS[name])}
        print(json.dumps(begun), file=answers, flush=True)
        faulthandler.dump_traceback_later(limit_seconds, exit=True)
        found[name] = blocked(name, found) or run_check(CHECKS[name])
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"name": name, "found": found[name]}), file=answers, flush=True)
    os._exit(0)  # skip the libraries' cleanup, which may crash


class Known(NamedTuple):
    """Facts about a part that do not depend on the machine."""

    cost: str  # of not having it
    fix: str
    serves: tuple[str, ...] = ()  # what does not work without it
    core: bool = False  # whether every user needs it


_PREPARE, _TRAIN = "prepare", "pretrain, finetune, extract-features, probe, track"
_ALL_COMMANDS = (_PREPARE, _TRAIN, "retrieve")
_COMPILE = "torch.compile"
_NO_TORCH = "training, features and evaluation do not work"
_TORCH_PAIR = "pip install --upgrade --force-reinstall torch torchvision"


def _extra(name: str) -> str:
    return f'pip install "{DISTRIBUTION}[{name}]"'


# In display order.
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
        "--cache-dir fails in this folder; two `seco prepare` here are not kept apart",
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
        "training and its views are not compiled, so slower on a GPU; --compile has no effect",
        "install C and C++ compilers and Python's headers (Debian: apt-get install g++ "
        "python3-dev), or name compilers with CC and CXX",
        (_COMPILE,),
    ),
    "Triton": Known(
        "training and its views are not compiled, so slower",
        f"{_TORCH_PAIR} triton",
        (_COMPILE,),
    ),
    "Ray": Known("--engine ray does not work", _extra("ray"), ("--engine ray",)),
    "s3fs": Known("s3:// addresses do not work", _extra("s3"), ("s3://",)),
    "aiohttp": Known("https:// addresses do not work", "pip install aiohttp", ("https://",)),
    "gcsfs": Known("gs:// addresses do not work", "pip install gcsfs", ("gs://",)),
    "adlfs": Known("az:// addresses do not work", "pip install adlfs", ("az://",)),
    "pyarrow": Known("lists in Parquet cannot be read", _extra("parquet"), ("Parquet",)),
    "timm": Known(
        "timm:NAME and export --format huggingface do not work", _extra("timm"), ("timm:NAME",)
    ),
    "ONNX": Known("export --format onnx does not work", _extra("onnx"), ("export to ONNX",)),
    "Hugging Face": Known("publish --push does not work", _extra("hub"), ("publish --push",)),
}


_LEAST_OPEN_FILES = 1024  # a reader holds up to 256 shards (shards/storage.py); workers add pipes
_LEAST_SHARED_BYTES = 1e9
_COMPILER_SECONDS = 180.0


def _python() -> Found:
    where = "in a virtual environment" if sys.prefix != sys.base_prefix else "system-wide"
    system = f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}"
    return Found(OK, platform.python_version(), f"{where}; {system.strip()}")


def _cpus() -> Found:
    usable, all_of_them = usable_cpus(), os.cpu_count()
    detail = f"{usable} of {all_of_them} usable"
    quota = _first_line("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        detail += f"; the container is limited to the time of {int(quota[0]) / int(quota[1]):g}"
    return Found(OK, detail=detail)


def _memory() -> Found:
    detail = size_text(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = _first_line("/sys/fs/cgroup/memory.max")
    if limit.isdigit():
        detail += f"; the container is limited to {size_text(int(limit))}"
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
    # Searched for as Triton and torch's inductor do.
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


LIMIT_SECONDS = 180.0  # per library: importing torch from a slow network disk takes a minute
# Imports no module from the current folder, and this very package, whatever else is on the path.
_CHILD = """
import sys
sys.path[:] = sys.argv[1].split("\\n")  # not the current folder, which -c puts first
from seco.doctor import main
main(sys.argv[3:], float(sys.argv[2]))
"""
_WIDTHS = (15, 9)  # of the first columns of the table


class FfmpegFacts(Protocol):
    """Facts about the ffmpeg in use."""

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
    """One row of the report. ``cost`` and ``fix`` are None if nothing is missing."""

    name: str
    state: str  # "ok", "missing", "broken" or "not used"
    version: str | None
    detail: str
    cost: str | None
    fix: str | None


@dataclass(frozen=True)
class Examination:
    """The results of ``seco doctor``."""

    parts: tuple[Part, ...]

    @property
    def faults(self) -> list[Part]:
        """Core parts that are missing or broken."""
        return [
            one for one in self.parts if KNOWN[one.name].core and one.state in (MISSING, BROKEN)
        ]

    def to_json(self) -> str:
        """Format as one JSON object."""
        parts = [dataclasses.asdict(one) for one in self.parts]
        return json.dumps({"ok": not self.faults, "parts": parts}, indent=1)

    def table(self) -> str:
        """Format as a plain-text table."""
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
        """Raise InputError if a core part is missing or broken."""
        if self.faults:
            named = ", ".join(f"{one.name} ({one.state})" for one in self.faults)
            raise InputError(f"cannot work without {named}", fix="the report says how to get it")


def examine(ffmpeg: Callable[[], FfmpegFacts]) -> Examination:
    """Check everything in ``KNOWN``. Takes as long as importing all libraries once.

    Args:
        ffmpeg: returns facts about the ffmpeg in use; raises InputError if it cannot be used.
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
    except Exception as error:  # a check that fails must not hide the others
        return Found(BROKEN, detail=_in_words(error))


def _in_words(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")


def check_libraries(names: Sequence[str], limit_seconds: float = LIMIT_SECONDS) -> dict[str, Found]:
    """Import and try libraries in a subprocess; after a crash, a new one continues.

    Args:
        names: keys of ``CHECKS``.
        limit_seconds: time after which a library counts as broken.
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
    """Return the results of one subprocess; the check at which it ended early is BROKEN."""
    path = "\n".join(entry for entry in sys.path if entry)
    script = [sys.executable, "-c", _CHILD, path, str(limit_seconds), *names]
    # Files, not pipes, which a process left behind by a library could hold open.
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
    except Exception as error:  # from a broken imageio-ffmpeg
        found = Found(BROKEN, detail=_in_words(error))
    else:
        found = Found(OK, facts.version, f"from {facts.source}: {facts.binary}")
        state = MISSING if facts.lacks else OK
        codecs = Found(state, detail=", ".join(facts.lacks or facts.decodes))
        return {"ffmpeg": found, "video codecs": codecs}
    return {"ffmpeg": found, "video codecs": Found(NOT_USED, detail="needs ffmpeg")}
