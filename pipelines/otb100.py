"""OTB-100: ``SEQ/img/0001.jpg`` and ``SEQ/groundtruth_rect.txt``, in the copies people have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipelines._adapter import (
    Adapter,
    Discovery,
    FrameFolder,
    Video,
    VideoSet,
    coverage_rows,
    keyed,
    refuse_split,
    relative_source,
    source_folder,
    subfolders,
)
from pipelines._config import PrepareConfig
from shards.errors import InputError
from shards.format import Exclusion

_GROUND_TRUTH = re.compile(r"groundtruth_rect(?:\.(\d+))?\.txt")
_PLAIN = "groundtruth_rect.txt"
_DEEPEST = 3
_MOST_NAMED = 10
# First and last annotated frame, from 1, of the sequences that are annotated only in part.
_RANGES = {
    "david": (300, 770),
    "blurcar1": (247, 988),
    "blurcar3": (3, 359),
    "blurcar4": (18, 397),
    "football1": (1, 74),
    "freeman3": (1, 460),
    "freeman4": (1, 283),
    "diving": (1, 215),
}
# fmt: off
TARGETS = (
    "Basketball", "Biker", "Bird1", "Bird2", "BlurBody", "BlurCar1", "BlurCar2", "BlurCar3",
    "BlurCar4", "BlurFace", "BlurOwl", "Board", "Bolt", "Bolt2", "Box", "Boy", "Car1", "Car2",
    "Car24", "Car4", "CarDark", "CarScale", "ClifBar", "Coke", "Couple", "Coupon", "Crossing",
    "Crowds", "Dancer", "Dancer2", "David", "David2", "David3", "Deer", "Diving", "Dog", "Dog1",
    "Doll", "DragonBaby", "Dudek", "FaceOcc1", "FaceOcc2", "Fish", "FleetFace", "Football",
    "Football1", "Freeman1", "Freeman3", "Freeman4", "Girl", "Girl2", "Gym", "Human2", "Human3",
    "Human4.2", "Human5", "Human6", "Human7", "Human8", "Human9", "Ironman", "Jogging.1",
    "Jogging.2", "Jump", "Jumping", "KiteSurf", "Lemming", "Liquor", "Man", "Matrix", "Mhyang",
    "MotorRolling", "MountainBike", "Panda", "RedTeam", "Rubik", "Shaking", "Singer1",
    "Singer2", "Skater", "Skater2", "Skating1", "Skating2.1", "Skating2.2", "Skiing", "Soccer",
    "Subway", "Surfer", "Suv", "Sylvester", "Tiger1", "Tiger2", "Toy", "Trans", "Trellis",
    "Twinnings", "Vase", "Walking", "Walking2", "Woman",
)
# fmt: on
_OFFICIAL = {target.lower(): target for target in TARGETS}
_OFFICIAL["human4"] = "Human4.2"  # in copies without the empty file
_PART = re.compile(r"(.+)[-_.](\d)")


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset of all targets: ``Jogging`` has two, ``Jogging-1`` and ``Jogging-2``.

    Raises:
        InputError: no sequences.
    """
    refuse_split(config)
    src = source_folder(config)
    found: dict[str, Video] = {}
    doubles: list[Exclusion] = []
    for folder in _folders(src, _DEEPEST):
        for target, ground_truth in _targets(folder):
            source = relative_source(folder, src)
            if ground_truth != _PLAIN:
                source = f"{source}/{ground_truth}"
            if target.lower() in found:
                message = f"the same target as {found[target.lower()].source}"
                doubles.append(Exclusion(source=source, kind="duplicate", message=message))
                continue
            found[target.lower()] = Video(
                source=source,
                path=folder,
                key=target.replace(".", "-"),
                splits={"official": "test"} if target.lower() in _OFFICIAL else {},
                frames=FrameFolder(
                    ground_truth=ground_truth,
                    images="img" if (folder / "img").is_dir() else "",
                    range=_RANGES.get(folder.name.lower()),
                ),
            )
    if not found:
        raise InputError(
            "holds no sequences of OTB", src, "expected SEQUENCE/groundtruth_rect.txt and /img"
        )
    name = config.name or "otb100"
    others = [video.source for video in found.values() if not video.splits]
    notes = [f"{name}: not in OTB-100, stored without a split: {other}" for other in others]
    return Discovery(
        sets=[
            VideoSet(
                name=name,
                videos=keyed(list(found.values())),
                label_names=[],
                excluded=doubles,
                # A partial copy is deliberate: missing sequences are not failures.
                coverage=coverage_rows(
                    ("OTB-100", target, target.lower() in found) for target in TARGETS
                ),
                notes=notes[:_MOST_NAMED],
            )
        ]
    )


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    if any(_GROUND_TRUTH.fullmatch(path.name) for path in folder.glob("groundtruth_rect*")):
        yield folder
    elif depth > 0:
        for path in subfolders(folder):
            yield from _folders(path, depth - 1)


def _targets(folder: Path) -> list[tuple[str, str]]:
    """Return (target, ground truth file) of a sequence; numbered files are of several targets."""
    files = sorted(
        path.name
        for path in folder.glob("groundtruth_rect*.txt")
        if _GROUND_TRUTH.fullmatch(path.name)
    )
    if _PLAIN in files:
        return [(_target(folder.name, None), _PLAIN)]
    # Human4's first file is empty.
    filled = [file for file in files if not _is_blank(folder / file)]
    return [(_target(folder.name, file.split(".")[1]), file) for file in filled or files[:1]]


def _is_blank(path: Path) -> bool:
    try:
        return not path.read_bytes().strip()
    except OSError:
        return False  # reported when it is stored


def _target(folder: str, part: str | None) -> str:
    """Return the official name for any spelling; a folder may be one target, as Jogging-1."""
    if (found := _PART.fullmatch(folder)) and (
        name := _OFFICIAL.get(f"{found[1]}.{part or found[2]}".lower())
    ):
        return name
    name = folder if part is None else f"{folder}.{part}"
    return _OFFICIAL.get(name.lower(), name)


# Tracking needs every frame, unchanged since annotation.
ADAPTER = Adapter(
    discover=discover,
    default_frames=None,
    default_short_edge=None,
    stored_whole="OTB-100 is evaluated on all frames at their own size",
)
