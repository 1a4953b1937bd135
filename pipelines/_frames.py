"""Which of a video's decoded frames are kept.

A chooser is offered every frame in time order and hands back those to store, as early as it can:
:meth:`offer` what is certain now, :meth:`finish` the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines._decode import Frame

_BUDGET_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class FrameChoice:
    """``count`` frames a video, or ``fps`` frames a second, or (neither) all of them."""

    count: int | None = None
    fps: float | None = None

    def chooser(self) -> Chooser:
        """A fresh chooser, for one video."""
        if self.count is not None:
            return Evenly(self.count)
        return AtRate(self.fps) if self.fps is not None else Every()


class Chooser(Protocol):
    """See the module's docstring."""

    def offer(self, frame: Frame) -> list[Frame]: ...

    def finish(self) -> list[Frame]: ...


class Every:
    """All frames."""

    def offer(self, frame: Frame) -> list[Frame]:
        return [frame]

    def finish(self) -> list[Frame]:
        return []


class Evenly:
    """The ``count`` frames nearest to evenly spaced times from the first frame to the last.

    How many frames there are is known only at the end (a container's count is often wrong), so
    frames wait in memory. Past ``budget_bytes``, but never below 16 x ``count`` frames, every
    second one is dropped. At least 8 x ``count`` are left then, so that with a constant frame
    rate a stored frame is at most 1/16 of the spacing from its place; without dropping it is the
    nearest there is. The first and the last decoded frame are always kept.
    """

    def __init__(self, count: int, budget_bytes: int = _BUDGET_BYTES) -> None:
        self._count = count
        self._budget_bytes = budget_bytes
        self._kept: list[Frame] = []
        self._stride = 1
        self._offered = 0
        self._last: Frame | None = None

    def offer(self, frame: Frame) -> list[Frame]:
        if self._offered % self._stride == 0:
            self._kept.append(frame)
        self._last = frame
        self._offered += 1
        most = max(16 * self._count, self._budget_bytes // max(1, len(frame.planes)))
        if len(self._kept) > most:
            self._kept = self._kept[::2]
            self._stride *= 2
        return []

    def finish(self) -> list[Frame]:
        if self._last is not None and self._kept[-1] is not self._last:
            self._kept.append(self._last)
        chosen = nearest_distinct([frame.time for frame in self._kept], self._count)
        return [self._kept[index] for index in chosen]


def nearest_distinct(times: list[float], count: int) -> list[int]:
    """Indices of the ``count`` of ``times`` nearest to evenly spaced ones; all if there are fewer.

    Args:
        times: seconds, not decreasing.

    Returns:
        Increasing indices, each once: where two targets have the same nearest time, the later
        takes the next free one.
    """
    if len(times) <= count:
        return list(range(len(times)))
    if count == 1:
        targets = np.array([(times[0] + times[-1]) / 2])
    else:
        targets = np.linspace(times[0], times[-1], count)
    at = np.asarray(times)
    right = np.clip(np.searchsorted(at, targets), 1, len(at) - 1)
    nearest = np.where(targets - at[right - 1] <= at[right] - targets, right - 1, right)
    steps = np.arange(count)
    distinct = np.maximum.accumulate(nearest - steps) + steps
    distinct = np.minimum(distinct, len(at) - count + steps)
    return [int(index) for index in distinct]


class AtRate:
    """The frame nearest to each of first, first + 1/R, first + 2/R, …; none twice."""

    def __init__(self, fps: float) -> None:
        self._fps = fps
        self._start = 0.0
        self._next = 0  # the lowest target without a frame
        self._previous: Frame | None = None
        self._previous_given = False

    def offer(self, frame: Frame) -> list[Frame]:
        given: list[Frame] = []
        take = False
        if self._previous is None:
            self._start = frame.time
        reached = math.floor((frame.time - self._start) * self._fps + 1e-6)
        if self._next <= reached:
            if not self._previous_given and self._nearer_before(self._next, frame):
                given += [self._previous] if self._previous is not None else []
            take = not self._nearer_before(reached, frame)
            given += [frame] if take else []
            self._next = reached + 1
        self._previous, self._previous_given = frame, take
        return given

    def _nearer_before(self, target: int, frame: Frame) -> bool:
        if self._previous is None:
            return False
        time = self._start + target / self._fps
        return time - self._previous.time < frame.time - time

    def finish(self) -> list[Frame]:
        return []
