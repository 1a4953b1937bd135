"""The triplet stream: batches that no division of the work changes, and the golden order."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards.errors import InputError
from shards.opening import open_shards, open_stream
from shards.storage import LocalAccess
from shards.stream import Sample, TripletFrames, TripletStream, UnreadableTriplet
from tests.made_shards import drawn_frame, make_set

# The first 64 triplets of this set with seed 7, 32 of each of two epochs: two digits of the video,
# anchor, second, third frame, order. To change them is to change what every seed means, and nobody
# can resume or repeat a run any more: say so in CHANGELOG.md.
GOLDEN = """
017011 173021 067251 474021 043011 137451 483470 291450 281450 412370 511360 253470
350130 460560 392670 022570 075241 050670 186131 536031 217011 267361 540130 451350
495011 330670 120140 341250 316141 226051 243470 376241 554560 221350 211370 447561
240230 467031 296051 180130 583450 571670 311560 472340 010670 260160 061370 383021
083570 425341 177011 151460 404570 166251 137451 107141 306131 360370 237011 203011
287461 112360 036451 344031
"""
GOLDEN_WINDOWS = (
    "19 8 2 6 1 39 25 38 24 36 22 20 7 41 26 42 0 23 37 3 40 44 43 4 18 21 5 48 47 17 13 49"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def spec(folder: Path) -> str:
    return make_set(folder, videos=60, frames=8, per_shard=9, size=(16, 16))


def frames_of(sample: Sample) -> tuple[bytes, ...]:
    assert isinstance(sample, TripletFrames)
    return sample.jpegs


def described(stream: TripletStream, epoch: int, steps: range) -> list[tuple[str, int, bytes]]:
    rows = range(stream.rows)
    samples = [s for step in steps for s in stream.read(epoch, step, rows)]
    return [(s.key, s.order, b"".join(frames_of(s))) for s in samples]  # type: ignore[union-attr]


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_batches_do_not_depend_on_the_number_of_ranks(
    spec: str, world_size: int, window: int
) -> None:
    shards = open_shards(spec)
    whole = TripletStream(shards, 28, "uniform", 5, window_shards=window)
    assert whole.steps_per_epoch == 2
    ranks = [
        TripletStream(shards, 28, "uniform", 5, rank, world_size, window)
        for rank in range(world_size)
    ]
    for epoch in range(3):
        for step in range(2):
            steps = range(step, step + 1)
            joined = [row for rank in ranks for row in described(rank, epoch, steps)]
            assert joined == described(whole, epoch, steps)
        seen = [key for key, _, _ in described(whole, epoch, range(2))]
        assert len(set(seen)) == 56
    assert described(whole, 0, range(2)) != described(whole, 1, range(2))


def test_a_sample_is_the_frames_that_were_drawn(spec: str) -> None:
    shards = open_shards(spec)
    stream = TripletStream(shards, 20, "uniform", seed=3)
    picture = {(v, f): drawn_frame(v, f, (16, 16)) for v in range(60) for f in range(8)}
    of_bytes = {jpeg: place for place, jpeg in picture.items()}
    assert len(of_bytes) == len(picture)
    orders = []
    for step in range(3):
        for sample in stream.read(2, step, range(20)):
            assert isinstance(sample, TripletFrames)
            places = [of_bytes[jpeg] for jpeg in sample.jpegs]
            assert {video for video, _ in places} == {sample.video}
            assert sample.key == f"video_{sample.video:04d}" == shards.key(sample.video)
            anchor, second, third = (frame for _, frame in places)
            assert second < third
            assert (anchor < second) if sample.order == 0 else (anchor > third)
            orders.append(sample.order)
    assert 15 < sum(orders) < 45


def test_draws_do_not_change_when_shards_are_added(folder: Path, spec: str) -> None:
    part = open_shards(f"{folder}/made-{{001..003}}.tar")
    few = TripletStream(part, 27, "uniform", seed=3)
    all_of_them = TripletStream(open_shards(spec), 60, "uniform", seed=3)
    whole = {key: rest for key, *rest in described(all_of_them, 4, range(1))}
    assert all(whole[key] == rest for key, *rest in described(few, 4, range(1)))


def test_golden_order(spec: str) -> None:
    stream = TripletStream(open_shards(spec), 32, "uniform", seed=7)
    of_bytes = {drawn_frame(v, f, (16, 16)): f for v in range(60) for f in range(8)}
    rows = []
    for epoch in (0, 1):
        for sample in stream.read(epoch, 0, range(32)):
            one, two, three = (of_bytes[jpeg] for jpeg in frames_of(sample))
            assert isinstance(sample, TripletFrames)
            rows.append(f"{sample.video:02d}{one}{two}{three}{sample.order}")
    assert rows == GOLDEN.split()
    windows = TripletStream(open_shards(spec), 32, "uniform", seed=7, window_shards=3)
    assert " ".join(map(str, windows.videos(0, range(32)))) == GOLDEN_WINDOWS


def test_videos_of_fewer_than_three_frames_are_left_out_and_counted(tmp_path: Path) -> None:
    make_set(tmp_path, videos=6, frames=3, per_shard=4, name="long")
    make_set(tmp_path, videos=5, frames=2, per_shard=2, name="short", first=6)
    stream = open_stream(str(tmp_path), 6, "uniform", 0)
    assert (stream.left_out, stream.steps_per_epoch) == (5, 1)
    keys = {s.key for s in stream.read(0, 0, range(6))}
    assert keys == {f"video_{v:04d}" for v in range(6)}
    with pytest.raises(InputError, match="none of the 5 videos has 3 stored frames"):
        open_stream(f"{tmp_path}/short.json", 2, "uniform", 0)
    with pytest.raises(InputError, match="--batch-size: 4 is not divisible by 3 ranks"):
        open_stream(f"{tmp_path}/long.json", 4, "uniform", 0, world_size=3)


def test_short_videos_among_others_leave_no_gap(tmp_path: Path) -> None:
    make_set(tmp_path, videos=24, frames=lambda video: 2 if video % 5 == 0 else 4, per_shard=7)
    stream = open_stream(str(tmp_path), 19, "uniform", 0, window_shards=2)
    assert stream.left_out == 5
    for epoch in range(3):
        keys = {s.key for s in stream.read(epoch, 0, range(19))}
        assert keys == {f"video_{v:04d}" for v in range(24) if v % 5}


def test_of_a_split_its_training_videos_alone_are_read(tmp_path: Path) -> None:
    # Made sets have three test videos, then six training videos, and so on.
    spec = make_set(tmp_path, videos=24, frames=lambda video: 2 if video == 5 else 4, per_shard=7)
    stream = open_stream(spec, 14, "uniform", 0, split="1")
    assert (stream.steps_per_epoch, stream.left_out) == (1, 1)
    keys = {s.key for epoch in range(3) for s in stream.read(epoch, 0, range(14))}
    assert keys == {f"video_{v:04d}" for v in range(24) if v // 3 % 3 and v != 5}
    assert stream.digest() != open_stream(spec, 14, "uniform", 0).digest()
    with pytest.raises(InputError, match="split '7' — the splits are 1"):
        open_stream(spec, 14, "uniform", 0, split="7")


def test_only_the_frames_of_the_triplets_are_read(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(spec, 30, "halves", 0)
    read: list[int] = []
    pread = os.pread

    def counting(descriptor: int, size: int, offset: int) -> bytes:
        read.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counting)
    samples = stream.read(0, 0, range(30))
    assert sum(read) == sum(len(jpeg) for s in samples for jpeg in frames_of(s))
    assert len(read) == 90


def test_a_stream_may_be_sent_to_another_process(spec: str) -> None:
    stream = open_stream(spec, 12, "uniform", 0)
    before = stream.read(0, 1, range(12))
    again = pickle.loads(pickle.dumps(stream))
    assert again.read(0, 1, range(12)) == before
    assert again.digest() == stream.digest()


def test_digest_tells_other_videos(folder: Path, spec: str, tmp_path: Path) -> None:
    make_set(tmp_path, videos=60, frames=8, per_shard=30, size=(16, 16))
    digests = [
        open_stream(s, 4, "uniform", 0).digest()
        for s in (spec, f"{folder}/made-00[0-6].tar", f"{folder}/made-000.tar", str(tmp_path))
    ]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    assert digests[0] == digests[3]  # the same videos in other shards, and in the same order
    windows = [open_stream(s, 4, "uniform", 0, window_shards=2) for s in (spec, str(tmp_path))]
    assert windows[0].digest() != windows[1].digest()


def test_more_shards_than_files_may_be_open(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.storage._MOST_OPEN", 2)
    shards = open_shards(spec)
    frames = shards.read_frames([(video, 0) for video in range(60)])
    assert frames == [drawn_frame(v, 0, (16, 16)) for v in range(60)]
    assert isinstance(shards.access, LocalAccess)
    assert len(shards.access._descriptors) == 2


@pytest.mark.parametrize("fault", ["flipped", "cut", "deleted"])
def test_damage_is_named_and_takes_its_own_sample_only(tmp_path: Path, fault: str) -> None:
    spec = make_set(tmp_path, videos=20, frames=3, per_shard=5, size=(16, 16))
    stream = open_stream(spec, 20, "uniform", 0)
    tar = tmp_path / "made-001.tar"
    data = bytearray(tar.read_bytes())
    at = stream.shards.indexes[1].frame_at(2, 1)  # type: ignore[attr-defined]
    if fault == "flipped":
        data[at.offset + at.size // 2] ^= 0x10
        tar.write_bytes(data)
        lost, reason = {"video_0007"}, "have changed"
    elif fault == "cut":
        tar.write_bytes(data[: at.offset + 5])
        lost, reason = {f"video_000{v}" for v in (7, 8, 9)}, "ends before byte"
    else:
        tar.unlink()
        lost, reason = {f"video_000{v}" for v in range(5, 10)}, "No such file"
    samples: list[Any] = stream.read(0, 0, range(20))
    broken = {s.key: s.reason for s in samples if not isinstance(s, TripletFrames)}
    assert set(broken) == lost
    assert all(reason in why and "made-001.tar" in why for why in broken.values())


def test_a_file_that_comes_back_is_opened_anew(tmp_path: Path) -> None:
    spec = make_set(tmp_path, videos=4, frames=3)
    shards = open_shards(spec)
    tar = tmp_path / "made-000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:600])
    assert not isinstance(shards.read_frames([(3, 2)])[0], bytes)
    tar.unlink()
    tar.write_bytes(whole)
    assert shards.read_frames([(3, 2)]) == [drawn_frame(3, 2)]
    tar.unlink()  # open files outlive their names
    assert shards.read_frames([(3, 1)]) == [drawn_frame(3, 1)]


@pytest.mark.parametrize("batch_size", [7, 20, 30, 31, 45, 59])
@pytest.mark.parametrize("window", [0, 2])
def test_what_replaces_a_sample_is_not_of_its_batch(
    spec: str, batch_size: int, window: int
) -> None:
    stream = TripletStream(open_shards(spec), batch_size, "uniform", 3, window_shards=window)
    for step in range(stream.steps_per_epoch):
        batch = {s.key for s in stream.read(1, step, range(batch_size))}
        for row in range(batch_size):
            tried = [stream.substitute(1, step, row, attempt).key for attempt in range(1, 10)]
            assert not batch & set(tried)
            assert len(set(tried)) >= min(5, 60 - batch_size)


def test_where_there_is_no_other_batch_the_next_of_this_one_comes(spec: str) -> None:
    stream = TripletStream(open_shards(spec), 60, "uniform", 3)
    batch = [s.key for s in stream.read(0, 0, range(60))]
    assert [stream.substitute(0, 0, 58, attempt).key for attempt in (1, 2, 3)] == [
        batch[59],
        batch[0],
        batch[1],
    ]


@pytest.mark.parametrize("sampling", ["uniform", "halves"])
def test_no_triplet_spans_more_than_the_gap(spec: str, sampling: str) -> None:
    """Frames are 0.04 s apart."""
    stream = TripletStream(open_shards(spec), 60, sampling, 3, max_gap_seconds=0.13)
    numbers = {
        drawn_frame(video, frame, (16, 16)): (video, frame)
        for video in range(60)
        for frame in range(8)
    }
    spans = set()
    for epoch in range(3):
        for sample in stream.read(epoch, 0, range(60)):
            found = [numbers[jpeg] for jpeg in frames_of(sample)]
            assert len({video for video, _ in found}) == 1
            frames = [frame for _, frame in found]
            spans.add(max(frames) - min(frames))
    assert max(spans) == 3


def test_videos_without_three_frames_so_near_are_named(spec: str) -> None:
    stream = TripletStream(open_shards(spec), 60, "uniform", 3, max_gap_seconds=0.05)
    (sample,) = stream.read(0, 0, [0])
    assert isinstance(sample, UnreadableTriplet)
    assert sample.reason == "no three frames within 0.05 s (--max-gap-seconds)"


def test_times_out_of_order_are_named(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_shards(spec)
    records = shards.records

    def turned(videos: Any) -> Any:
        found = records(videos)
        return [replace(one, frame_times=one.frame_times[::-1]) for one in found]

    monkeypatch.setattr(shards, "records", turned)
    stream = TripletStream(shards, 60, "uniform", 3, max_gap_seconds=1.0)
    (sample,) = stream.read(0, 0, [0])
    assert isinstance(sample, UnreadableTriplet) and "no times in order" in sample.reason


def test_samples_are_numbered_by_group(tmp_path: Path) -> None:
    spec = make_set(
        tmp_path, videos=20, per_shard=6, group=lambda v: f"g{v % 3}" if v < 15 else None
    )
    plain = TripletStream(open_shards(spec), 20, "uniform", 3)
    grouped = TripletStream(open_shards(spec), 20, "uniform", 3, by_group=True)
    assert plain.digest() == grouped.digest()
    owners: dict[str, set[int]] = {}
    for one, other in zip(plain.read(0, 0, range(20)), grouped.read(0, 0, range(20)), strict=True):
        assert isinstance(one, TripletFrames) and isinstance(other, TripletFrames)
        assert (one.key, one.jpegs) == (other.key, other.jpegs)
        video = int(one.key[-4:])
        owners.setdefault(f"g{video % 3}" if video < 15 else one.key, set()).add(other.video)
    assert len(owners) == 8 and all(len(numbers) == 1 for numbers in owners.values())
    assert len(set.union(*owners.values())) == 8


def test_one_group_alone_has_no_negatives(tmp_path: Path) -> None:
    spec = make_set(tmp_path, videos=20, per_shard=6, group=lambda v: f"g{v < 15}")
    TripletStream(open_shards(spec), 20, "uniform", 3, by_group=True)
    spec = make_set(tmp_path / "one", videos=20, per_shard=6, group=lambda _: "g")
    with pytest.raises(InputError, match=r"--negatives other-groups: all videos are of one group"):
        TripletStream(open_shards(spec), 20, "uniform", 3, by_group=True)


def test_gaps_and_groups_need_an_index(tmp_path: Path) -> None:
    spec = f"pipe:cat {make_set(tmp_path).replace('.json', '-000.tar')}"
    for option, given in (
        ("--max-gap-seconds", {"max_gap_seconds": 1.0}),
        ("--negatives other-groups", {"by_group": True}),
    ):
        with pytest.raises(InputError, match=f"{option}: needs shards with an index"):
            open_stream(spec, 4, "uniform", 3, steps_per_epoch=2, **given)  # type: ignore[arg-type]
