"""The encoders to compare: what the user named, and their features, extracted where missing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seco.checkpoints.checkpoint import LAST
from seco.checkpoints.foreign_checkpoints import read_weights
from seco.checkpoints.weights import RANDOM
from seco.compare.config import CompareConfig
from seco.extract.config import ExtractConfig
from seco.features.store import Features, read_features
from seco.model.backbones import feature_dim
from shards.errors import InputError

FEATURES = "features"  # the folder in --out of what is extracted
_NAME = re.compile(r"[\w.+-]+")
_SETTINGS = ("frames", "short_edge", "crop_size")
_NONE = np.empty(0, dtype=np.int64)

Extract = Callable[[ExtractConfig], object]


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder that the user named: ``source`` is a file or ``random``."""

    name: str
    source: str
    arch: str | None = None  # of random weights
    seed: int = 0


class NamedFolders(NamedTuple):
    """The feature folders of an encoder."""

    name: str
    train: Path
    test: Path | None


@dataclass(frozen=True)
class Compared:
    """One encoder's features of the videos that are compared.

    Args:
        name: of the encoder.
        train: its folder; the rows of all encoders are in the order of the first one's.
        test: of the test videos; the same where they are not apart.
        train_order: (V,) the row of ``train`` that holds each video of the first encoder.
        test_order: the same for ``test``.
    """

    name: str
    train: Features
    test: Features
    train_order: NDArray[np.int64]
    test_order: NDArray[np.int64]


def parse_encoders(given: Sequence[str], arch: str | None) -> list[EncoderSpec]:
    """What ``--encoder`` names.

    A file is read, so that one that cannot be used is known before anything takes long.

    Args:
        given: ``[NAME=]SOURCE`` each.
        arch: of ``random`` where it says none; by default that of the first file.

    Raises:
        InputError: no such file, a file that is no encoder, no architecture for random weights, or
            two of one name.
    """
    specs = []
    for text in given:
        name, source = _named(text)
        if source.split(":")[0] == RANDOM:
            specs.append(_random(name, source))
        else:
            path = _checkpoint(Path(source))
            usual = path.parent.resolve().name if path.name == LAST else path.stem
            specs.append(EncoderSpec(name or _as_name(usual), str(path)))
    _require_different([spec.name for spec in specs], "--encoder")
    archs = [read_weights(Path(spec.source)).arch for spec in specs if spec.source != RANDOM]
    usual_arch = arch or next(iter(archs), None)
    return [_with_arch(spec, usual_arch) if spec.source == RANDOM else spec for spec in specs]


def extract_missing(
    config: CompareConfig, extraction: ExtractConfig, extract: Extract
) -> list[NamedFolders]:
    """Extract the features of ``--shards`` that are not in ``--out`` yet; returns where all are.

    Features there of another checkpoint or of other settings are replaced.

    Args:
        extraction: its settings; shards, checkpoint and out are filled in here.
        extract: extracts, or finds that all is there.
    """
    below = Path(config.out, FEATURES)
    found = []
    for spec in parse_encoders(config.encoder, extraction.arch):
        test = below / f"{spec.name}.test" if config.test_shards else None
        found.append(NamedFolders(spec.name, below / spec.name, test))
        for shards, folder in ((config.shards, found[-1].train), (config.test_shards, test)):
            if folder is not None:
                extract(
                    dataclasses.replace(
                        extraction, shards=shards, checkpoint=spec.source, out=str(folder),
                        arch=spec.arch, seed=spec.seed, overwrite=True,
                    )
                )  # fmt: skip
    return found


def given_folders(config: CompareConfig) -> list[NamedFolders]:
    """What ``--features`` and ``--test-features`` name.

    Raises:
        InputError: two of one name.
    """
    tests = config.test_features or (None,) * len(config.features)
    found = []
    for text, test in zip(config.features, tests, strict=True):
        name, folder = _named(text)
        usual = _as_name(Path(folder).resolve().name)
        found.append(NamedFolders(name or usual, Path(folder), Path(test) if test else None))
    _require_different([one.name for one in found], "--features")
    return found


def open_encoders(folders: Sequence[NamedFolders]) -> list[Compared]:
    """The features of all encoders, of the same videos each.

    Raises:
        InputError: a folder cannot be read, or they differ in their videos or labels.
    """
    opened: list[Compared] = []
    for name, folder, test_folder in folders:
        train = read_features(folder, finite=False)
        test = train if test_folder is None else read_features(test_folder, finite=False)
        first = opened[0] if opened else Compared(name, train, test, _NONE, _NONE)
        orders = _order(first.train, train), _order(first.test, test)
        opened.append(Compared(name, train, test, *orders))
    return opened


def differing_settings(encoders: Sequence[Compared]) -> list[str]:
    """A note for each setting of the extraction in which the folders differ."""
    notes = []
    for name in _SETTINGS:
        values = {encoder.name: encoder.train.meta.get(name) for encoder in encoders}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{value} for {key}" for key, value in values.items())
            notes.append(f"the features differ in {name}: {said}; encoders are compared with that")
    return notes


def _named(text: str) -> tuple[str | None, str]:
    """The name that was given, and the rest."""
    name, equals, rest = text.partition("=")
    if equals and _NAME.fullmatch(name) and not Path(text).exists():
        return name, rest
    return None, text


def _as_name(text: str) -> str:
    return "-".join(_NAME.findall(text)) or "encoder"


def _random(name: str | None, source: str) -> EncoderSpec:
    arch, seed, *more = [*source.split(":")[1:], "", ""]
    if any(more) or (seed and not (seed.isascii() and seed.isdigit() and len(seed) < 19)):
        raise InputError(
            f"{source!r} is not understood", "--encoder", "random, random:ARCH or random:ARCH:SEED"
        )
    return EncoderSpec(name or _as_name(source), RANDOM, arch or None, int(seed or 0))


def _with_arch(spec: EncoderSpec, usual: str | None) -> EncoderSpec:
    arch = spec.arch or usual
    if not arch:
        raise InputError(
            "random weights need an architecture", "--encoder", "for example random:resnet50"
        )
    feature_dim(arch)  # raises where there is no such network
    return dataclasses.replace(spec, arch=arch)


def _checkpoint(path: Path) -> Path:
    if not path.exists():
        raise InputError("no such run folder or checkpoint", path)
    if not path.is_dir():
        return path
    if not (path / LAST).is_file():
        raise InputError(f"holds no {LAST}", path, "give a run folder or a checkpoint file")
    return path / LAST


def _require_different(names: Sequence[str], option: str) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(
                f"two are named {name!r}", option, f"name them, for example {option} other=…"
            )


def _order(first: Features, other: Features) -> NDArray[np.int64]:
    """(V,) the rows of ``other`` in the order of ``first``'s videos.

    Raises:
        InputError: they are not of the same videos, or of other labels.
    """
    places = {key: row for row, key in enumerate(other.keys)}
    common = sum(key in places for key in first.keys)
    if not len(first) == len(other) == common:
        raise InputError(
            f"holds {len(other)} videos, {first.folder} {len(first)}, and {common} are in both",
            other.folder,
            "extract all encoders from the same shards",
        )
    order = np.array([places[key] for key in first.keys], dtype=np.int64)
    if not np.array_equal(other.labels[order], first.labels):
        raise InputError(
            f"has other labels than {first.folder}",
            other.folder,
            "extract all encoders from the same shards",
        )
    return order
