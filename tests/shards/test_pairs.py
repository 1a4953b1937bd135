"""Pairs of tracking sequences: which frames may be taken, and which are."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import InputError
from shards.format import VideoRecord
from shards.opening import open_shards
from shards.pairs import NoPair, PairFrames, PairStream, draw_pair, usable_frames
from shards.storage import ByteRange, RangeAccess, UnreadableFrame
from tests.made_sequences import make_sequences


def record(boxes: Any, **fields: Any) -> VideoRecord:
    sizes = {"width": 400, "height": 200} | fields
    return VideoRecord(key="k", dataset="d", source="s", boxes=boxes, **sizes)


@pytest.mark.parametrize(
    ("side", "fits"),
    [
        ((40, 40), True),
        ((20, 20), True),
        ((19, 30), False),  # a side below 20 px
        ((30, 19), False),
        ((201, 60), False),  # above half of the image's width
        ((200, 60), True),
        ((60, 101), False),  # above half of its height
        ((160, 40), True),  # 4 : 1
        ((161, 40), False),
        ((20, 80), True),
        ((20, 81), False),
    ],
)
def test_the_boxes_that_are_trained_on(side: tuple[float, float], fits: bool) -> None:
    assert usable_frames(record([[1, 1, *side]])).tolist() == [0] * fits


def test_a_box_of_more_than_500_px_and_one_below_a_hundredth_of_the_image() -> None:
    large = record([[1, 1, 501, 300], [1, 1, 500, 300]], width=4000, height=3000)
    assert usable_frames(large).tolist() == [1]
    small = record([[1, 1, 39, 40], [1, 1, 40, 40]], width=4000, height=3000)
    assert usable_frames(small).tolist() == [1]


def test_hidden_and_absent_frames_are_left_out() -> None:
    boxes = [[1, 1, 40, 40]] * 5
    # 30 % of the best cover, 8, is 2.4.
    assert usable_frames(record(boxes, cover=[8, 2, 3, 0, 5])).tolist() == [0, 2, 4]
    # And above 1 in any case.
    assert usable_frames(record(boxes, cover=[1, 2, 3, 0, 1])).tolist() == [1, 2]
    assert usable_frames(record(boxes, cover=[1, 1, 1, 1, 1])).tolist() == []
    assert usable_frames(record(boxes, cover=[0, 0, 0, 0, 0])).tolist() == []
    assert usable_frames(record(boxes, absence=[0, 1, 0, 0, 1])).tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    "broken",
    [
        {"boxes": [[1, 2, 3]]},
        {"boxes": [[1, 2, 3, "w"]]},
        {"boxes": [[1, 2, 3, float("nan")]]},
        {"boxes": [[1, 1, 40, 40]], "cover": [8, 8]},
        {"boxes": [[1, 1, 40, 40]], "absence": "no"},
    ],
)
def test_damaged_annotations_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"boxes|cover|absence"):
        usable_frames(record(**broken))


def test_a_record_without_boxes_has_no_usable_frames() -> None:
    assert usable_frames(record(None)).tolist() == []


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 4, 19, 20, 45, 100, 201]), st.integers(1, 120))
        | st.tuples(st.integers(20, 210), st.integers(20, 110)),
        min_size=1,
        max_size=8,
    ),
    st.data(),
)
def test_the_frames_are_siamfcs(sides: list[tuple[int, int]], data: st.DataObject) -> None:
    """Its conditions, frame by frame (siamfc-pytorch, ``Pair._filter``)."""
    cover = data.draw(st.lists(st.integers(0, 8), min_size=len(sides), max_size=len(sides)))
    expected = [
        number
        for number, (w, h) in enumerate(sides)
        if w * h >= 20
        and min(w, h) >= 20
        and max(w, h) <= 500
        and min(w / 400, h / 200) >= 0.01
        and max(w / 400, h / 200) <= 0.5
        and 0.25 <= w / max(1, h) <= 4
        and cover[number] > max(1, 0.3 * max(cover))
    ]
    found = usable_frames(record([[1, 1, *side] for side in sides], cover=cover))
    assert found.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 60), max_size=12, unique=True).map(sorted),
    st.integers(1, 40),
)
def test_every_allowed_pair_is_drawn_equally_often(frames: list[int], max_gap: int) -> None:
    allowed = [
        (one, other) for one, other in itertools.combinations(frames, 2) if other - one <= max_gap
    ]
    numbers = np.array(frames, dtype=np.int64)
    if not allowed:
        assert draw_pair(0.5, numbers, max_gap) is None
        return
    each = [(place + 0.5) / len(allowed) for place in range(len(allowed))]
    assert sorted(draw_pair(u, numbers, max_gap) for u in each) == sorted(allowed)  # type: ignore[type-var]
    assert draw_pair(np.nextafter(1.0, 0), numbers, max_gap) in allowed


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_sequences(tmp_path_factory.mktemp("pairs"), sequences=9, frames=12)


def stream(spec: str, **options: Any) -> PairStream:
    return PairStream(open_shards(spec), options.pop("batch_size", 4), 5, 7, **options)


def drawn(given: Any) -> dict[str, PairFrames]:
    samples = list(given)
    assert all(isinstance(sample, PairFrames) for sample in samples)
    return {sample.key: sample for sample in samples}


def test_a_pair_depends_on_seed_epoch_and_sequence_alone(spec: str) -> None:
    four, three = stream(spec), stream(spec, batch_size=3)
    for epoch in (0, 1):
        one = drawn(s for step in range(2) for s in four.read(epoch, step, range(4)))
        other = drawn(s for step in range(3) for s in three.read(epoch, step, range(3)))
        assert len(one) == 8
        assert len(other) == 9
        assert all(sample == other[key] for key, sample in one.items())
    again = drawn(three.read(0, 0, range(3)))
    later = [drawn(three.read(epoch, step, range(3))) for epoch in (1, 2) for step in range(3)]
    assert any(
        rows[key].boxes != again[key].boxes for rows in later for key in rows if key in again
    )


def test_ranks_share_a_batch(spec: str) -> None:
    whole = stream(spec).read(3, 1, range(4))
    parts = [stream(spec, rank=rank, world_size=2).read(3, 1, range(2)) for rank in (0, 1)]
    assert [*parts[0], *parts[1]] == whole


def test_frames_and_boxes_belong_together(spec: str) -> None:
    shards = open_shards(spec)
    for sample in drawn(stream(spec).read(0, 0, range(4))).values():
        boxes = [tuple(box) for box in shards.record(sample.video).boxes or []]
        for jpeg, box in zip(sample.jpegs, sample.boxes, strict=True):
            assert jpeg in [
                shards.read_frame(sample.video, n) for n, b in enumerate(boxes) if b == box
            ]


def test_a_remote_batch_is_two_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = make_sequences(tmp_path / "set", sequences=9, frames=12)
    fsspec.filesystem("memory").put(f"{tmp_path / 'set'}/", "/pairs/", recursive=True)
    far, near = stream("memory://pairs/patches.json"), stream(local)
    read, calls = RangeAccess.read, []

    def counted(self: RangeAccess, ranges: Sequence[ByteRange]) -> Any:
        calls.append(len(ranges))
        return read(self, ranges)

    monkeypatch.setattr(RangeAccess, "read", counted)
    for epoch, step in ((0, 0), (0, 1), (1, 0)):
        calls.clear()
        assert far.read(epoch, step, range(4)) == near.read(epoch, step, range(4))
        assert calls == [4, 8]  # records, then two frames of each


def test_records_are_read_together_and_each_for_itself(tmp_path: Path) -> None:
    shards = open_shards(make_sequences(tmp_path, sequences=4, per_shard=2))
    wanted = [3, 0, 2, 3]
    assert shards.records(wanted) == [shards.record(video) for video in wanted]
    assert shards.records([]) == []
    tar = tmp_path / "patches-000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"format_version"', b"\"format_version'", 1))
    damaged, *others = shards.records([0, 1, 2])
    assert isinstance(damaged, UnreadableFrame)
    assert "patch_000.json: " in str(damaged)
    assert [one.key for one in others if isinstance(one, VideoRecord)] == ["patch_001", "patch_002"]
    with pytest.raises(UnreadableFrame, match=re.escape(str(damaged))):
        shards.record(0)
    found = {s.key: s for s in stream(str(tmp_path / "patches.json")).read(0, 0, range(4))}
    assert found["patch_000"] == NoPair("patch_000", str(damaged), unreadable=True)


def test_what_cannot_be_paired_says_why(tmp_path: Path) -> None:
    def change(number: int, fields: dict[str, Any]) -> None:
        if number == 0:
            fields["boxes"] = [[1, 1, 5, 5]] * 6
        if number == 1:
            fields["boxes"] = fields["boxes"][:1]  # GOT-10k's test sequences
        if number == 2:
            fields["boxes"] = [*fields["boxes"], [1, 1, 30, 30]]
        if number == 3:
            fields["cover"] = [8]

    spec = make_sequences(tmp_path, sequences=4, change=change)
    found = {s.key: s for s in stream(spec).read(0, 0, range(4)) if isinstance(s, NoPair)}
    assert {key: (sample.reason, sample.unreadable) for key, sample in found.items()} == {
        "patch_000": ("no two frames within 7 have boxes that can be trained on", False),
        "patch_001": ("no two frames within 7 have boxes that can be trained on", False),
        "patch_002": ("more boxes than frames", True),
        "patch_003": ("cover of 1 frames for 6 boxes", True),
    }


def test_single_frames_are_left_out(tmp_path: Path) -> None:
    spec = make_sequences(tmp_path, sequences=4, frames=1)
    with pytest.raises(InputError, match="0 videos of 2 frames or more do not fill a batch of 4"):
        stream(spec)
