"""Which frames are kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines._decode import Frame
from pipelines._plan import AtRate, Chooser, Evenly, Every, FrameChoice, nearest_distinct


def times_kept(chooser: Chooser, times: list[float], size: int = 1) -> list[float]:
    frames = [Frame(time, bytes(size)) for time in times]
    kept = list(itertools.chain.from_iterable(chooser.offer(frame) for frame in frames))
    return [frame.time for frame in kept + chooser.finish()]


def test_the_choice_makes_its_chooser() -> None:
    assert isinstance(FrameChoice(count=3).chooser(), Evenly)
    assert isinstance(FrameChoice(fps=3.0).chooser(), AtRate)
    assert isinstance(FrameChoice().chooser(), Every)


def test_even_frames_are_the_nearest_to_even_times() -> None:
    times = [number / 25 for number in range(251)]
    kept = times_kept(Evenly(30), times)
    targets = np.linspace(0, 10, 30)
    assert [round(time * 25) for time in kept] == [round(target * 25) for target in targets]


def test_even_times_not_even_numbers() -> None:
    # 100 frames in the first second, one a second after: numbers would stay in the first.
    times = [number / 100 for number in range(100)] + [float(second) for second in range(1, 10)]
    assert times_kept(Evenly(10), times) == [float(second) for second in range(10)]


@pytest.mark.parametrize("decoded", [0, 1, 2, 29, 30])
def test_short_videos_give_each_frame_once(decoded: int) -> None:
    times = [number / 25 for number in range(decoded)]
    assert times_kept(Evenly(30), times) == times


@given(
    steps=st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=80),
    count=st.integers(1, 40),
)
def test_even_frames_are_distinct_and_in_order(steps: list[float], count: int) -> None:
    times = [float(time) for time in np.cumsum(steps)]
    chosen = nearest_distinct(times, count)
    assert len(chosen) == min(count, len(times))
    assert chosen == sorted(set(chosen))
    assert 0 <= chosen[0] <= chosen[-1] < len(times)
    if count > 1:
        assert times[chosen[0]] == times[0]
        assert times[chosen[-1]] == times[-1]


@pytest.mark.parametrize("decoded", [1000, 1601, 4096, 10_001])
def test_memory_is_bounded_and_so_is_the_error(decoded: int) -> None:
    count = 10
    chooser = Evenly(count, budget_bytes=0)
    most = 0
    for number in range(decoded):
        chooser.offer(Frame(float(number), b"x"))
        most = max(most, len(chooser._kept))
    kept = [frame.time for frame in chooser.finish()]
    assert most <= 16 * count
    assert len(set(kept)) == count
    assert (kept[0], kept[-1]) == (0.0, decoded - 1.0)
    spacing = (decoded - 1) / (count - 1)
    targets = np.arange(count) * spacing
    assert np.abs(np.array(kept) - targets).max() <= spacing / 16


def test_the_budget_counts_bytes() -> None:
    times = [float(number) for number in range(200)]
    small, large = Evenly(2, budget_bytes=1000), Evenly(2, budget_bytes=1000)
    times_kept(small, times, size=1)
    times_kept(large, times, size=100)
    assert small._stride == 1
    assert large._stride > 1


@pytest.mark.parametrize("fps", [1.0, 3.0, 12.5, 25.0, 60.0])
def test_a_rate_keeps_the_nearest_frame_of_each_step(fps: float) -> None:
    times = [number / 25 for number in range(101)]
    expected = sorted(
        {min(times, key=lambda time: (abs(time - k / fps), -time)) for k in range(int(4 * fps) + 1)}
    )
    kept = times_kept(AtRate(fps), times)
    assert len(kept) == len(expected) == len(set(kept))
    np.testing.assert_allclose(kept, expected, atol=1 / 25 + 1e-9)


def test_a_rate_on_a_variable_rate_never_repeats_a_frame() -> None:
    times = [0.0, 0.1, 5.0, 5.01, 5.02, 9.0]
    kept = times_kept(AtRate(1.0), times)
    assert kept == sorted(set(kept))
    # 0.1 is nearest to 1 s and 2 s, 5.02 to 6 s and 7 s; 5.01 to none.
    assert kept == [0.0, 0.1, 5.0, 5.02, 9.0]


def test_all_frames() -> None:
    assert times_kept(Every(), [0.0, 0.5, 0.7]) == [0.0, 0.5, 0.7]
