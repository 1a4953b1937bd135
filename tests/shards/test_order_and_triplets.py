"""The epoch order and the triplets: properties that training relies on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import InputError
from shards.opening import open_shards
from shards.order import EpochOrder
from shards.stream import TripletStream
from shards.triplets import ANCHOR_FIRST, sample_generator, sample_triplet
from tests.made_shards import make_set


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_an_epoch_visits_every_video_once(count: int, seed: int, epoch: int) -> None:
    order = EpochOrder(count, seed, epoch)
    assert sorted(order[p] for p in range(count)) == list(range(count))


def test_orders_differ_between_epochs_and_seeds_and_from_the_identity() -> None:
    count = 500
    orders = [
        tuple(EpochOrder(count, seed, epoch)[p] for p in range(count))
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert len(set(orders)) == 3
    for order in orders:
        # A random permutation has one fixed point on average; 10 would be a chance of 1e-7.
        assert sum(position == video for position, video in enumerate(order)) < 10
        steps = np.abs(np.diff(order))
        assert steps.mean() == pytest.approx(count / 3, rel=0.15)


def test_a_billion_videos_need_no_list() -> None:
    order = EpochOrder(10**9, 3, 7)
    videos = {order[p] for p in range(0, 10**9, 10**7)}
    assert len(videos) == 100
    assert all(0 <= v < 10**9 for v in videos)


@pytest.mark.parametrize("sampling", ["uniform", "halves"])
@pytest.mark.parametrize("frames", [3, 4, 7, 30])
def test_triplets_satisfy_their_label(sampling: str, frames: int) -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_triplet(rng, frames, sampling) for _ in range(2000)]
    for t in drawn:
        assert all(0 <= f < frames for f in t.frames)
        assert t.second <= t.third
        if t.order == ANCHOR_FIRST:
            assert t.anchor < t.second
        else:
            assert t.anchor > t.third
        if sampling == "uniform":
            assert len(set(t.frames)) == 3
        else:
            assert (t.anchor < frames // 2) != (t.second < frames // 2)
    assert np.mean([t.order for t in drawn]) == pytest.approx(0.5, abs=0.05)
    seen = {f for t in drawn for f in t.frames}
    assert seen == set(range(frames))


def test_uniform_draws_every_triplet_equally_often() -> None:
    rng = np.random.default_rng(1)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(8000):
        t = sample_triplet(rng, 4, "uniform")
        counts[t.frames] = counts.get(t.frames, 0) + 1
    assert len(counts) == 8  # 4 sets of frames, either end the anchor
    assert min(counts.values()) > 850
    assert max(counts.values()) < 1150


def test_draws_depend_on_run_epoch_video_and_purpose_alone() -> None:
    def draw(*args: object) -> float:
        return float(sample_generator(*args).random())  # type: ignore[arg-type]

    assert draw(0, 1, "a", "triplet") == draw(0, 1, "a", "triplet")
    others = {draw(1, 1, "a", "triplet"), draw(0, 2, "a", "triplet")}
    others |= {draw(0, 1, "b", "triplet"), draw(0, 1, "a", "views")}
    assert len(others | {draw(0, 1, "a", "triplet")}) == 5


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    shards = open_shards(make_set(tmp_path, videos=30, frames=4))
    whole = TripletStream(shards, 8, "uniform", seed=5)
    assert whole.steps_per_epoch == 3
    for epoch in range(3):
        seen: list[int] = []
        for step in range(3):
            joined = [
                video
                for rank in range(world_size)
                for video in TripletStream(shards, 8, "uniform", 5, rank, world_size).batch_videos(
                    epoch, step
                )
            ]
            assert joined == whole.batch_videos(epoch, step)
            seen += joined
        assert len(set(seen)) == 24


def test_short_videos_are_left_out_and_counted(tmp_path: Path) -> None:
    long = make_set(tmp_path / "a", videos=6, frames=3, name="long")
    short = make_set(tmp_path / "b", videos=3, frames=2, name="short")
    # Keys must differ between the sets.
    both = open_shards([long])
    assert TripletStream(both, 4, "uniform", 0).too_short == 0
    with pytest.raises(InputError, match="occur twice"):
        open_shards([long, short])
    only_short = open_shards(short)
    with pytest.raises(InputError, match="do not fill a batch"):
        TripletStream(only_short, 2, "uniform", 0)
