"""Naming shards on the command line: brace patterns, globs, manifests, lists."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

import braceexpand

from shards.errors import InputError
from shards.format import read_manifest

_ANGLE = re.compile(r"<(\d+\.\.\d+(?:\.\.\d+)?)>")


def expand_spec(spec: str | Iterable[str]) -> list[Path]:
    """The tar files a specification names, in its order, without repeats.

    Accepts ``k400-{000..999}.tar``, the same with ``<000..999>`` (which shells leave alone),
    globs, a manifest (``NAME.json``: all its shards), a folder (every tar in it), or a list of
    these, also separated by commas.

    Raises:
        InputError: nothing matches, or a named file does not exist.
    """
    parts = [spec] if isinstance(spec, str) else list(spec)
    files: dict[Path, None] = {}
    for part in parts:
        for path in _expand_one(part):
            files.setdefault(path)
    if not files:
        raise InputError("names no shards", " ".join(parts) or "--shards", _ADVICE)
    return list(files)


_ADVICE = 'give a pattern such as "shards/k400-{000..999}.tar", a glob, a folder or a manifest'


def _expand_one(part: str) -> list[Path]:
    if "://" in part or part.startswith("pipe:"):
        raise InputError("remote shards cannot be read yet", part, "copy them to a local folder")
    whole = Path(part)
    if whole.is_dir():
        return _some(sorted(whole.glob("*.tar")), part)
    if whole.suffix == ".json":
        manifest = read_manifest(whole)
        return _existing([whole.parent / row.file for row in manifest.shards], part)
    if whole.is_file():
        return [whole]
    try:
        patterns = list(braceexpand.braceexpand(_ANGLE.sub(r"{\1}", part))) if part else []
    except ValueError as error:
        raise InputError("has unbalanced braces", part, _ADVICE) from error
    found: list[Path] = []
    missing: list[Path] = []
    for pattern in (piece for text in patterns for piece in _commas(text)):
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


def _some(paths: list[Path], part: str) -> list[Path]:
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
