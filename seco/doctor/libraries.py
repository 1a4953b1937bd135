"""Import and try each library, in a process of its own, which a library may crash."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import resource
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple, NoReturn

from seco.doctor.distributions import (
    BROKEN,
    MISSING,
    NOT_USED,
    OK,
    Found,
    files_at_fault,
    names_of,
    owners_of,
    repair,
    too_old,
)

_TINY_PX = 16
_TORCH_PAGE = "https://pytorch.org/get-started/locally"
# The rest of what setup.py requires and this toolkit imports, by import name.
OTHER_PACKAGES = (
    *("numpy", "fsspec", "webdataset", "matplotlib", "jinja2", "rich", "braceexpand", "tenacity"),
    *("tomli_w", *(("tomli",) if sys.version_info < (3, 11) else ())),
)


class Check(NamedTuple):
    """How a part is checked."""

    run: Callable[[], Found]
    owns: str | None = None  # the import name; MISSING if no distribution provides it
    needs: tuple[str, ...] = ()  # other parts, without which there is nothing to check


def _torch() -> Found:
    import numpy as np
    import torch

    # Fails where torch was built for another numpy.
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

    # Its compiled part is registered with the torch that it was built for, or not at all.
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

    try:  # fails where this torch has no code for the GPU, or another process has it to itself
        (torch.ones(2, device=f"cuda:{number}") + 1).sum().item()
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise RuntimeError(f"GPU {number}: {first}") from error
    gpu = torch.cuda.get_device_properties(number)
    memory = f"{gpu.total_memory / 2**30:.0f} GiB"
    return f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"


def _nvidia_driver() -> tuple[str | None, str | None]:
    """Version of NVIDIA's driver and of the newest CUDA that it supports; None if not known."""
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
    # It does not say what it was linked with, but libjpeg-turbo leaves its name in the binary.
    binary = Path(simplejpeg._jpeg.__file__).read_bytes()
    linked = re.search(rb"libjpeg-turbo version ([\d.]+)", binary)
    library = linked[1].decode() if linked else "of unknown version"
    return Found(OK, simplejpeg.__version__, f"libjpeg-turbo {library}")


def _pillow() -> Found:
    import PIL
    from PIL import Image, features

    # The compiled part; it refuses to work for the Python files of another version.
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

    # As seco/retrieve/nearest.py asks.
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


# What a check needs comes before it.
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
}


def blocked(name: str, found: Mapping[str, Found]) -> Found | None:
    """The result of a check that cannot be run because another part does not work."""
    for need in CHECKS[name].needs:
        if need in found and found[need].state != OK:
            return Found(NOT_USED, detail=f"needs {'a GPU' if need == 'GPU' else need}")
    return None


def run_check(check: Check) -> Found:
    """Run it; whatever the library raises is one line."""
    owners = owners_of(check.owns) if check.owns else []
    version = owners[0].version if owners else None
    try:
        if check.owns and (fault := files_at_fault(check.owns, owners)):
            return fault
        found = check.run()
        return too_old(owners) or found
    except ModuleNotFoundError as error:
        fix = f"pip install {owners[0].name}" if owners else None  # and all that it requires
        return Found(BROKEN, version, one_line(f"needs {error.name}, which is not installed"), fix)
    except (Exception, SystemExit) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        return Found(BROKEN, version, reason, _repair(check))


def _repair(check: Check) -> str | None:
    if check.owns in (None, "torch", "torchvision"):  # these two come together
        return None
    return repair(owners_of(check.owns))


def one_line(text: str) -> str:
    """The beginning of a message, without line breaks."""
    return " ".join(text.split())[:300]


def main(names: Sequence[str], limit_seconds: float) -> NoReturn:
    """Run checks and end the process.

    Writes JSON lines to standard output: when a check begins its name and how to get rid of a
    crash, and when it ends its name and :class:`Found`. Standard error has to be a file; when the
    process ends early it holds what the last library wrote, or "Timeout" of one that took longer
    than ``limit_seconds``.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is not an answer
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
    os._exit(0)  # without the libraries' own clearing up, which may crash
