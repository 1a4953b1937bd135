"""Naming shards on the command line: brace patterns, globs, manifests, lists, local or remote."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import braceexpand

from shards.errors import InputError
from shards.format import Manifest, parse_manifest, read_manifest
from shards.remote import fetch_parts, in_words, is_remote, open_filesystem, told_of, try_again

_ANGLE = re.compile(r"<(\d+\.\.\d+(?:\.\.\d+)?)>")
_COMMA_BEFORE_URL = re.compile(r",(?=[A-Za-z][A-Za-z0-9+.-]*://)")
_ADVICE = 'give a pattern such as "shards/k400-{000..999}.tar", a glob, a folder or a manifest'
PIPE = "pipe:"  # WebDataset's: what follows is a command whose output is a tar


def expand_spec(spec: str | Iterable[str]) -> list[str]:
    """The addresses of the tars a specification names, in its order, without repeats.

    Accepts ``k400-{000..999}.tar``, the same with ``<000..999>`` (which shells leave alone),
    globs, a manifest (``NAME.json``: all its shards), a folder (every tar in it), or a list of
    these, also separated by commas. All of them may be addresses fsspec knows (``s3://…``; a folder
    then ends with a slash); ``pipe:COMMAND`` stands for itself, braces expanded.

    Local addresses are paths; that the remote ones exist is not checked here.

    Raises:
        InputError: nothing matches, or a named local file does not exist.
    """
    parts = [spec] if isinstance(spec, str) else list(spec)
    addresses: dict[str, None] = {}
    for part in parts:
        if part.startswith(PIPE):
            found = _braces(part)
        elif is_remote(part):
            found = [address for url in _COMMA_BEFORE_URL.split(part) for address in _remote(url)]
        else:
            found = [str(path) for path in _local(part.removeprefix("file://"))]
        addresses.update(dict.fromkeys(found))
    if not addresses:
        raise InputError("names no shards", " ".join(parts) or "--shards", _ADVICE)
    return list(addresses)


def local_tars(spec: str | Iterable[str]) -> list[Path]:
    """As :func:`expand_spec`, for what works on files of this machine alone.

    Raises:
        InputError: also for remote shards.
    """
    addresses = expand_spec(spec)
    for address in addresses:
        if address.startswith(PIPE) or is_remote(address):
            raise InputError("is not on this machine", address, "copy it to a local folder")
    return [Path(address) for address in addresses]


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(_ANGLE.sub(r"{\1}", pattern))) if pattern else []
    except ValueError as error:
        raise InputError("has unbalanced braces", pattern, _ADVICE) from error


def _local(part: str) -> list[Path]:
    whole = Path(part)
    if whole.is_dir():
        return _some(sorted(whole.glob("*.tar")), part)
    if whole.suffix == ".json":
        manifest = read_manifest(whole)
        return _existing([whole.parent / row.file for row in manifest.shards], part)
    if whole.is_file():
        return [whole]
    found: list[Path] = []
    missing: list[Path] = []
    for pattern in (piece for text in _braces(part) for piece in _commas(text)):
        if glob.has_magic(pattern) and not Path(pattern).exists():
            found += map(Path, sorted(glob.glob(pattern)))
        else:
            (found if Path(pattern).is_file() else missing).append(Path(pattern))
    if missing:
        several = len(missing) + len(found) > 1
        count = (
            f"{len(missing)} of {len(missing) + len(found)} shards do not exist" if several else ""
        )
        raise InputError(count or "no such shard", missing[0] if several else part, _ADVICE)
    return _some([path for path in found if path.suffix == ".tar"], part)


def _commas(text: str) -> list[str]:
    return [piece for piece in text.split(",") if piece] if not Path(text).exists() else [text]


def _some(paths: list[Any], part: str) -> list[Any]:
    if not paths:
        raise InputError("matches no shards", part, _ADVICE)
    return paths


def _existing(paths: list[Path], part: str) -> list[Path]:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of its {len(paths)} shards are missing, first {missing[0].name}",
            part,
            "copy them beside the manifest or prepare them again",
        )
    return _some(paths, part)


def _remote(url: str) -> list[str]:
    if url.endswith(".json"):
        folder = url.rpartition("/")[0]
        try:
            manifest = read_remote_manifest(url)
        except FileNotFoundError as error:
            raise InputError("is not there", url, "is the address right?") from error
        return _some([f"{folder}/{row.file}" for row in manifest.shards], url)
    if url.endswith("/"):
        url += "*.tar"
    found: list[str] = []
    for pattern in _braces(url):
        found += _remote_glob(pattern) if _has_magic(pattern) else [pattern]
    return _some(found, url)


def _has_magic(url: str) -> bool:
    """In a web address a question mark begins the query."""
    web = url.startswith(("http://", "https://"))
    return any(sign in url for sign in "*[") if web else glob.has_magic(url)


def beside(tar: str, ending: str) -> str:
    """The address of the file beside a tar that has another ending."""
    path, mark, query = tar.partition("?") if is_remote(tar) else (tar, "", "")
    return path.removesuffix(".tar") + ending + mark + query


def _remote_glob(pattern: str) -> list[str]:
    system, path = open_filesystem(pattern)
    try:
        names = try_again(lambda: system.glob(path))
    except Exception as error:
        raise InputError(
            f"cannot be listed ({in_words(error)})", pattern, "check address and credentials"
        ) from error
    return sorted(system.unstrip_protocol(name) for name in names if name.endswith(".tar"))


def read_remote_manifest(url: str) -> Manifest:
    """``NAME.json`` behind fsspec.

    Raises:
        FileNotFoundError: there is none.
        InputError: it cannot be read, or is no manifest of this version.
    """
    (content,) = fetch_parts([(url, None, None)])
    if isinstance(content, FileNotFoundError):
        raise content
    return parse_manifest(told_of(content, url), url)
