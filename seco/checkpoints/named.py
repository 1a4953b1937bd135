"""Weights by name, such as ``moco-v2``: their address, licence, and checked copy in the cache.

The table is also in ``docs/checkpoints.md``. torchvision's addresses come from torchvision itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision.models import get_model_weights

from seco.checkpoints.download import download, forget
from seco.checkpoints.io import LAST
from seco.models.backbones import TIMM_PREFIX, backbone_spec, known_archs
from shards.atomic import atomic_path, unwritable, write_text
from shards.errors import InputError
from shards.index import sha256_of
from shards.progress import size_text
from shards.terminal import say
from shards.untrusted import open_regular, read_regular

CACHE_VARIABLE = "SECO_CACHE"
DEFAULT_ARCH = "resnet50"
_MOST_BYTES = 4 << 30  # torchvision's largest file has 2.4 GiB
_TORCH_FILES = (b"PK\3\4", b"\x80")  # how files of torch.save begin: a zip, a pickle
_RECORD = re.compile(r"([0-9a-f]{64})  ")  # a line of sha256sum


@dataclass(frozen=True, kw_only=True)
class NamedWeights:
    """Published weights.

    Args:
        name: as users give it.
        arch: name of the backbone.
        url: https address of the file.
        published: the start of the file's digest according to its publisher, as ``("md5", "a04…")``
            or ``("sha256", "f370…")``; None if none is published.
        licence: as stated by the publisher.
        citation: whom to cite.
    """

    name: str
    arch: str
    url: str
    published: tuple[str, str] | None
    licence: str
    citation: str

    @property
    def file(self) -> Path:
        """The file's place in the cache, whether it is there or not."""
        return cache_folder() / "weights" / self.url.rpartition("/")[2]

    def record(self) -> dict[str, str]:
        """Describe the origin, for what is computed with these weights."""
        return {"url": self.url, "licence": self.licence}


# torchvision's README: "may have their own licenses or terms and conditions derived from the
# dataset used for training". V2 is trained by a newer recipe than V1.
_IMAGENET = {"imagenet-v1": "IMAGENET1K_V1", "imagenet-v2": "IMAGENET1K_V2"}
_IMAGENET_LICENCE = "not stated; torchvision is BSD-3-Clause, the data is ImageNet"
_IMAGENET_CITATION = "TorchVision maintainers and contributors, 2016, github.com/pytorch/vision"
_DIGEST_IN_URL = re.compile(r"-([0-9a-f]{8,})\.pth$")  # torch.hub's convention: of the SHA-256

_OTHERS = (
    NamedWeights(
        name="moco-v2",  # 800 epochs
        arch="resnet50",
        url="https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/"
        "moco_v2_800ep_pretrain.pth.tar",
        published=("md5", "a04e12f8"),
        licence="CC BY-NC 4.0 by its README; the code is MIT since 2023",
        citation="Chen et al., Improved Baselines with Momentum Contrastive Learning, 2020, "
        "arXiv:2003.04297",
    ),
    NamedWeights(
        name="vclr",  # Kinetics-400, 400 epochs
        arch="resnet50",
        url="https://haofeik-data.s3.amazonaws.com/VCLR/pretrained/vclr_k400.pth",
        published=None,
        licence="Apache-2.0",
        citation="Kuang et al., Video Contrastive Learning with Global Context, 2021, "
        "arXiv:2108.02722",
    ),
)
NAMES = (*_IMAGENET, *(weights.name for weights in _OTHERS))


def named_weights(source: str, arch: str | None = None) -> NamedWeights | None:
    """Look up ``NAME`` or ``NAME:ARCH``; None if it is not in the table, and so is a file's path.

    Args:
        source: as given by the user. A name in the table is never a file: that is ``./NAME``.
        arch: the architecture in use; by default resnet50, if there are weights for several.

    Raises:
        InputError: there are no such weights for the architecture.
    """
    if not is_named(source):
        return None
    name, _, own = source.partition(":")
    if own and arch not in (None, own):
        raise InputError(f"are weights of a {own}, not of a {arch}", source, f"give --arch {own}")
    arch = own or arch
    if name in _IMAGENET:
        return _imagenet(name, arch or DEFAULT_ARCH)
    (weights,) = (weights for weights in _OTHERS if weights.name == name)
    if arch not in (None, weights.arch):
        raise InputError(
            f"are weights of a {weights.arch}, not of a {arch}",
            source,
            f"give --arch {weights.arch}",
        )
    return weights


def _imagenet(name: str, arch: str) -> NamedWeights:
    backbone_spec(arch)  # raises for an unknown name
    weights = _torchvisions(name, arch)
    if weights is None:
        there = [one for one in known_archs() if _torchvisions(name, one)]
        raise InputError(
            f"torchvision has no such weights for {arch}", name, f"there are for {', '.join(there)}"
        )
    digits = _DIGEST_IN_URL.search(weights.url)
    return NamedWeights(
        name=name,
        arch=arch,
        url=weights.url,
        published=("sha256", digits[1]) if digits else None,
        licence=_IMAGENET_LICENCE,
        citation=_IMAGENET_CITATION,
    )


def _torchvisions(name: str, arch: str) -> Any:
    """torchvision's entry for these weights; None if it has none."""
    try:
        return get_model_weights(arch).__members__.get(_IMAGENET[name])
    except ValueError:  # not a model of torchvision
        return None


def is_named(source: str) -> bool:
    """Whether the user means weights of the table, and not a file."""
    return source.partition(":")[0] in NAMES


def has_architectures(source: str) -> bool:
    """Whether ``source`` is a name with weights for several architectures, and names none."""
    return source in _IMAGENET


def weights_file(source: str | Path, arch: str | None = None) -> tuple[Path, NamedWeights | None]:
    """Return the file that the user means: a path, or that of a name, fetched and checked.

    Args:
        source: a string may be a name; a ``Path`` is always a path.
        arch: the architecture in use, for names with weights for several.

    Raises:
        InputError: as for :func:`named_weights` and :func:`fetch_weights`; or ``source`` looks like
            a name, and is neither in the table nor a file.
    """
    weights = named_weights(source, arch) if isinstance(source, str) else None
    if weights is not None:
        return fetch_weights(weights), weights
    path = Path(source)
    if str(source).startswith(TIMM_PREFIX) and not path.exists():
        raise InputError("is a name of timm, where a file is needed", source, "name the file")
    if (path / LAST).is_file():
        raise InputError("is a folder", path, f"give {path / LAST}")
    if not path.exists() and not path.suffix and not {os.sep, ":"} & set(str(source)):
        raise InputError("no such file", path, f"give a path, or a name: {', '.join(NAMES)}")
    return path, None


def fetch_weights(weights: NamedWeights) -> Path:
    """Return the file of these weights in the cache, checked; fetch it if it is not there.

    One process fetches at a time; the others wait, and find the file. A file that somebody has put
    there is checked as a fetched one is: against the published digest, and against ``FILE.sha256``,
    which is written at the first check.

    Raises:
        InputError: it cannot be fetched, or its digest is wrong: then it has been deleted.
    """
    path = weights.file
    if path.is_file() and _record_of(path).is_file():
        _check(weights, path)
        return path
    with _alone(path.with_name(f"{path.name}.lock")):
        if not path.is_file():
            part = path.with_name(f"{path.name}.part")
            download(
                weights.url,
                part,
                most=_MOST_BYTES,
                title=f"Fetching {weights.name}",
                fix=f"check the network, or put the file at {path}",
            )
            _check(weights, part)
            with atomic_path(path) as temporary:
                os.replace(part, temporary)
            forget(part)
        else:
            _check(weights, path)
    return path


def _check(weights: NamedWeights, found: Path) -> None:
    """Check the digests of a file; delete it if one is wrong, and record the SHA-256 if none is.

    Raises:
        InputError: it is another file than the published or the recorded one.
    """
    record = _record_of(weights.file)
    there = record.is_file()
    try:
        sha256 = sha256_of(found)
        algorithm, start = weights.published or ("sha256", "")
        digest = sha256 if algorithm == "sha256" else _digest(found, algorithm)
        with open_regular(found) as file:
            begins = file.read(4)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", found) from error
    if not digest.startswith(start):
        raise _refused(
            f"is not the published file: {algorithm} {digest} does not begin with {start}",
            found,
            f"try again, or get it from {weights.url} yourself",
        )
    if not begins.startswith(_TORCH_FILES):  # a login page must not become what is compared with
        raise _refused("is not a file of torch", found, f"get it from {weights.url} yourself")
    recorded = _RECORD.match(read_regular(record).decode("ascii", "replace")) if there else None
    if recorded is not None:
        if recorded[1] != sha256:
            raise _refused(
                f"is not the file of the first download: sha256 {sha256}, recorded {recorded[1]}",
                found,
                f"try again; if its publisher has replaced the file, delete {record}",
            )
        return
    write_text(record, f"{sha256}  {weights.file.name}\n")
    known = f"{algorithm} {start} as published" if start else "no digest is published"
    say(
        f"seco: {weights.name}: {weights.file} ({size_text(found.stat().st_size)}; {known}; sha256 "
        f"{sha256}, recorded); licence: {weights.licence}; cite {weights.citation}"
    )


def _refused(what: str, found: Path, fix: str) -> InputError:
    """Delete a wrong file, and return the error."""
    with suppress(OSError):  # a folder that cannot be written to
        forget(found)
    return InputError(what if found.exists() else f"{what}; it was deleted", found, fix)


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def cache_folder() -> Path:
    """Return ``SECO_CACHE``, else ``XDG_CACHE_HOME/seco``, else ``~/.cache/seco``.

    Raises:
        InputError: there is no home folder.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # its specification: others are to be ignored
        return Path(shared, "seco")
    try:
        return Path.home() / ".cache" / "seco"
    except RuntimeError as error:
        raise InputError(
            "no home folder to keep weights in", None, f"set {CACHE_VARIABLE}"
        ) from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the lock file, which stays; other processes wait."""
    descriptor = _locked(lock)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(lock: Path) -> int:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise unwritable(lock, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if "RANK" not in os.environ:  # the ranks of a run all ask at once
                say(f"seco: waiting for the process that is fetching {lock.stem}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:  # a file system without locks
        os.close(descriptor)
        fix = f"set {CACHE_VARIABLE} to another folder"
        raise InputError(f"cannot be locked ({error.strerror or error})", lock, fix) from error
    return descriptor
