"""The parts of a machine that matter: what it costs to lack one, and how to get it."""

from __future__ import annotations

from typing import NamedTuple

from seco.doctor.distributions import DISTRIBUTION


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
