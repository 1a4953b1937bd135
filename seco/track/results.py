"""What an evaluation leaves behind: OTB result files, ``track.json``, what is shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seco.track.config import OTB, OTB_SEQUENCES
from seco.track.otb_metrics import Curves, mean_curves
from shards.atomic import json_text, write_json, write_text
from shards.errors import InputError

RESULT = "track.json"
_TOOLKIT_FOLDER = "OTB2015"  # what the GOT-10k toolkit calls OTB-100
_TARGET = re.compile(r"(Jogging|Skating2)-([12])")
_FILE_NAME = re.compile(r"\w[\w.-]*")
_ROUNDING = 1e-3  # of three decimals
_IDENTITY = "tracking.json"  # whose results lie in a folder

MOST_NAMED = 10  # sequences that are left out; track.json names all

Floats = NDArray[np.float64]


def is_file_name(text: str) -> bool:
    """Whether this may name a file: shards of others could hold paths that lead elsewhere."""
    return bool(_FILE_NAME.fullmatch(text))


def sequence_name(key: str, dataset: str) -> str:
    """The sequence's name in the GOT-10k toolkit, whose files these are: ``Jogging.1``."""
    if dataset != OTB:
        return key
    # Of Human4 the toolkit finds one target: the other's file is empty.
    return _TARGET.sub(r"\1.\2", "Human4" if key == "Human4-2" else key)


@dataclass(frozen=True)
class Tracked:
    """One sequence as it was tracked."""

    name: str
    boxes: Floats  # (F, 4) x, y, w, h, px, as written
    seconds: Floats  # (F,) of the tracker, without reading and decoding; 0 where it did nothing

    @property
    def rated(self) -> tuple[int, float]:
        """Frames that were searched, and their seconds: all but the first."""
        searched = self.seconds[1:][self.seconds[1:] > 0]
        return len(searched), float(searched.sum())


class ResultFolder:
    """``OUT/OTB2015/NAME/SEQUENCE.txt`` and ``times/SEQUENCE_time.txt``, as the toolkit reads them.

    Args:
        out: of the evaluation.
        dataset: of the set.
        tracker: its name.
        identity: what the results depend on; files of another tracker are refused.

    Raises:
        InputError: the folder holds results of another tracker or of other settings.
    """

    def __init__(self, out: Path, dataset: str, tracker: str, identity: dict[str, Any]) -> None:
        self.folder = out / (_TOOLKIT_FOLDER if dataset == OTB else dataset) / tracker
        mark = self.folder / _IDENTITY
        text = json_text(identity)
        if mark.is_file():
            if mark.read_text("utf-8") != text:
                raise InputError(
                    "holds results of another tracker or with other settings",
                    self.folder,
                    "give another --name or --out, or delete it",
                )
        elif any(self.folder.glob("*.txt")):
            raise InputError(
                "holds results of another program", self.folder, "give another --name or --out"
            )
        else:
            write_text(mark, text)

    def finished(self, name: str, truth: Floats) -> Tracked | None:
        """A sequence that an earlier, interrupted evaluation has done; (F, 4) are its boxes.

        One with unreadable frames is not: they are named again, or have been mended.
        """
        found = self._written(name, truth)
        return None if found is not None and (found.seconds[1:] == 0).any() else found

    def _written(self, name: str, truth: Floats) -> Tracked | None:
        frames = len(truth)
        try:
            boxes = np.loadtxt(self._boxes(name), delimiter=",", ndmin=2)
            seconds = np.loadtxt(self._times(name), ndmin=1)
        except (OSError, ValueError):
            return None
        if boxes.shape != (frames, 4) or seconds.shape != (frames,):
            return None
        if np.abs(boxes[0] - truth[0]).max() > _ROUNDING:
            return None  # of frames of another size
        return Tracked(name, boxes, seconds)

    def write(self, name: str, boxes: Floats, seconds: Floats) -> Tracked:
        """Write a sequence; its boxes are rounded to the three decimals of the format."""
        write_text(self._times(name), "".join(f"{value:.8f}\n" for value in seconds))
        write_text(
            self._boxes(name),
            "".join(",".join(f"{value:.3f}" for value in box) + "\n" for box in boxes),
        )
        found = self._written(name, boxes)
        assert found is not None
        return found

    def _boxes(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def _times(self, name: str) -> Path:
        return self.folder / "times" / f"{name}_time.txt"


@dataclass
class Evaluation:
    """The figures of a tracker on a set."""

    dataset: str
    tracker: str  # its name
    encoder: dict[str, Any]
    settings: dict[str, Any]
    in_set: int  # sequences
    names: list[str] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # that count
    rates: list[tuple[int, float]] = field(default_factory=list)  # frames, seconds
    left_out: dict[str, str] = field(default_factory=dict)  # sequence: why
    notes: list[str] = field(default_factory=list)

    def add(self, tracked: Tracked, curves: Curves, frames: int) -> None:
        """One more sequence."""
        self.names.append(tracked.name)
        self.curves.append(curves)
        self.frames.append(frames)
        self.rates.append(tracked.rated)

    @property
    def mean(self) -> Curves:
        """Means over the sequences."""
        return mean_curves(self.curves)

    @property
    def of_sequences(self) -> int:
        """How many there are in the whole data set."""
        return OTB_SEQUENCES if self.dataset == OTB else self.in_set

    def write(self, out: Path) -> None:
        """``track.json``."""
        rows = [
            {
                "sequence": name,
                "frames": frames,
                **_figures(curves),
                "fps": _rate([rate]),
                "success_curve": _rounded(curves.success),
                "precision_curve": _rounded(curves.precision),
            }
            for name, curves, frames, rate in zip(
                self.names, self.curves, self.frames, self.rates, strict=True
            )
        ]
        content = {
            "dataset": self.dataset,
            "tracker": self.tracker,
            **_figures(self.mean),
            "success_curve": _rounded(self.mean.success),
            "precision_curve": _rounded(self.mean.precision),
            "fps": _rate(self.rates),
            "sequences": len(self.names),
            "of_sequences": self.of_sequences,
            "frames": sum(self.frames),
            "encoder": self.encoder,
            "settings": self.settings,
            "notes": [*self.notes, *self.lines_of_left_out()],
            "per_sequence": rows,
        }
        write_json(out / RESULT, content)

    def lines_of_left_out(self, most: int | None = None) -> list[str]:
        """One a sequence; of more than ``most`` their number at the end."""
        lines = [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        rest = len(lines[most:]) if most is not None else 0
        return [*lines[:most], f"left out: {rest} more"] if rest else lines

    def table(self) -> str:
        """What is shown."""
        width = max(len(name) for name in [*self.names, "mean"])
        lines = [f"{'':{width}}  success  precision@20  precision AUC   frames/s"]
        rows = zip([*self.names, "mean"], [*self.curves, self.mean], strict=True)
        for (name, curves), rate in zip(rows, [*self.rates, None], strict=True):
            fps = _rate(self.rates if rate is None else [rate])
            lines.append(
                f"{name:{width}}  {curves.success_auc:7.3f}  {curves.precision_20:12.3f}  "
                f"{curves.precision_auc:13.3f}  {fps if fps is not None else '-':>9}"
            )
        whole = f"{len(self.names)} of {self.of_sequences} sequences, {sum(self.frames)} frames"
        lines.append(f"{self.dataset}: {whole}, one pass, means over sequences")
        lines += self.notes
        lines += self.lines_of_left_out(MOST_NAMED)
        return "\n".join(lines)


def _figures(curves: Curves) -> dict[str, float]:
    return {
        "precision_20": curves.precision_20,
        "precision_auc": curves.precision_auc,
        "success_auc": curves.success_auc,
    }


def _rounded(curve: Floats) -> list[float]:
    return [round(value, 6) for value in curve.tolist()]


def _rate(rates: list[tuple[int, float]]) -> float | None:
    """Frames a second; None where none was searched."""
    frames, seconds = sum(rate[0] for rate in rates), sum(rate[1] for rate in rates)
    return round(frames / seconds, 2) if seconds > 0 else None
