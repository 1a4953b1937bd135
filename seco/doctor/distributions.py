"""Which installed distributions provide a package, and whether they get into each other's way."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from importlib import metadata
from typing import NamedTuple

DISTRIBUTION = "seco-video"
OK, MISSING, BROKEN, NOT_USED = "ok", "missing", "broken", "not used"
_PACKAGE = re.compile(r"^(\w+)/__init__\.py,", re.MULTILINE)  # in a RECORD


class Found(NamedTuple):
    """The result of one check."""

    state: str  # OK, MISSING, BROKEN or NOT_USED
    version: str | None = None
    detail: str = ""
    fix: str | None = None  # where the usual advice does not fit what was found


class Installed(NamedTuple):
    """An installed distribution."""

    name: str  # normalised
    version: str
    folder: str
    packages: frozenset[str]  # import names


@functools.cache
def _installed() -> list[Installed]:
    """All of them, first on the path first."""
    found = []
    for one in metadata.distributions():
        # What an interrupted pip leaves behind has no name.
        with contextlib.suppress(Exception):
            name = re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower()
            packages = (one.read_text("top_level.txt") or "").split()
            packages += _PACKAGE.findall(one.read_text("RECORD") or "")
            folder = os.path.realpath(str(one.locate_file("")))
            found.append(Installed(name, one.version, folder, frozenset(packages)))
    return found


def owners_of(package: str) -> list[Installed]:
    """The distributions that provide the import name, first on the path first."""
    return [one for one in _installed() if package in one.packages]


def names_of(package: str) -> str:
    """Their names, to be shown."""
    return " and ".join(sorted({one.name for one in owners_of(package)})) or package


def files_at_fault(package: str, owners: list[Installed]) -> Found | None:
    """A package that is missing, incomplete, or a mixture of several distributions."""
    spec = importlib.util.find_spec(package)
    origin = os.path.realpath(os.path.dirname(os.path.dirname(spec.origin or ""))) if spec else ""
    if owners and owners[0].folder == origin:  # those later on the path do no harm
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
    if not owners:  # a folder of that name may be there; it is not a package
        return Found(MISSING)
    return Found(BROKEN, owners[0].version, "installed, but its files have gone", repair(owners))


def repair(owners: list[Installed]) -> str | None:
    """How to get the files of a distribution again."""
    return f"pip install --force-reinstall --no-deps {owners[0].name}" if owners else None


def too_old(owners: list[Installed]) -> Found | None:
    """Whether the toolkit's own requirements ask for a newer version."""
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
