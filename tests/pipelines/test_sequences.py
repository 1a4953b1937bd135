"""Tracking sequences: copies people have of GOT-10k and OTB-100, and damage in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines._adapter import VideoSet, adapter, coverage_lines
from pipelines._config import PrepareConfig
from shards.errors import InputError
from shards.opening import open_shards
from tests.data import shared
from tests.pipelines.running import errors, run


def find(dataset: str, src: Path, **settings: object) -> list[VideoSet]:
    config = PrepareConfig(dataset=dataset, src=str(src), **settings)  # type: ignore[arg-type]
    return adapter(dataset).discover(config).sets


def sequence(folder: Path, frames: int = 4, images: str = "img", start: int = 1) -> Path:
    """Real frames of a sequence, copied, and a box for each."""
    (folder / images).mkdir(parents=True)
    for number, image in enumerate(sorted(shared("otb/Crossing/img").iterdir())[:frames], start):
        shutil.copy(image, folder / images / f"{number:04d}.jpg")
    ground_truth = "groundtruth_rect.txt" if images else "groundtruth.txt"
    (folder / ground_truth).write_text("1,2,30,40\n" * frames)
    return folder


# OTB-100


def test_otb100_targets_have_their_official_names(tmp_path: Path) -> None:
    for name in ("jogging-1", "Jogging-2", "HUMAN4", "Skating2", "crossing", "Crossing_old"):
        sequence(tmp_path / name)
    skating = tmp_path / "Skating2"
    (skating / "groundtruth_rect.1.txt").write_text("1 2 3 4\n" * 4)
    (skating / "groundtruth_rect.txt").rename(skating / "groundtruth_rect.2.txt")
    (found,) = find("otb100", tmp_path)
    assert {video.key: video.splits for video in found.videos} == {
        "Jogging-1": {"official": "test"},
        "Jogging-2": {"official": "test"},
        "Human4-2": {"official": "test"},
        "Skating2-1": {"official": "test"},
        "Skating2-2": {"official": "test"},
        "Crossing": {"official": "test"},
        "Crossing_old": {},
    }
    assert found.notes == ["otb100: not in OTB-100, stored without a split: Crossing_old"]
    (present, missing) = coverage_lines(found.name, found.coverage)
    assert present == "otb100: 6 of 100 listed OTB-100 videos found"
    assert missing == "otb100: missing: Basketball, Biker, Bird1, Bird2, BlurBody and 89 more"


def test_otb100_the_same_sequence_twice(tmp_path: Path) -> None:
    sequence(tmp_path / "OTB50" / "Crossing")
    sequence(tmp_path / "OTB100" / "Crossing")
    (found,) = find("otb100", tmp_path)
    assert [video.source for video in found.videos] == ["OTB100/Crossing"]
    assert [(row.source, row.kind) for row in found.excluded] == [("OTB50/Crossing", "duplicate")]


@pytest.mark.parametrize(("start", "frames"), [(1, 12), (298, 12), (300, 10)])
def test_otb100_range_is_cut_once(tmp_path: Path, start: int, frames: int) -> None:
    # David's annotations begin at frame 300: of a whole copy the rest goes, whatever its length;
    # a cut copy keeps its numbers or counts from 1.
    david = sequence(tmp_path / "raw" / "David", frames, start=start)
    expected = [n for n in range(start, start + frames) if n >= 300] or [*range(1, frames + 1)]
    (david / "groundtruth_rect.txt").write_text("".join(f"{n} 2 3 4\n" for n in expected))
    run(tmp_path / "raw", tmp_path / "out", dataset="otb100", frames=None)
    shards = open_shards(str(tmp_path / "out" / "otb100.json"))
    boxes = shards.record(0).boxes
    assert boxes is not None and [box[0] for box in boxes] == expected
    first = (david / "img" / f"{expected[0]:04d}.jpg").read_bytes()
    assert shards.read_frame(0, 0) == first


@pytest.mark.parametrize("option", ["frames", "fps", "short_edge"])
def test_otb100_is_stored_whole(tmp_path: Path, option: str) -> None:
    sequence(tmp_path / "raw" / "Crossing")
    name = option.replace("_", "-")
    with pytest.raises(InputError, match=f"^--{name}: OTB-100 is evaluated on all frames at their"):
        run(tmp_path / "raw", tmp_path / "out", dataset="otb100", **{"frames": None, option: 64})
    assert not (tmp_path / "out").exists()
    run(tmp_path / "raw", tmp_path / "out", dataset="otb100", frames=None, all_frames=True)
    assert open_shards(str(tmp_path / "out" / "otb100.json")).frame_count(0) == 4


def test_boxes_go_with_the_frames_that_are_picked(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "raw" / "GOT-10k_Train_000001", frames=9, images="")
    (folder / "groundtruth.txt").write_text("".join(f"{n} 2 3 4\n" for n in range(9)))
    run(tmp_path / "raw", tmp_path / "out", dataset="got10k", frames=3)
    shards = open_shards(str(tmp_path / "out" / "got10k.json"))
    assert shards.record(0).boxes == [[0, 2, 3, 4], [4, 2, 3, 4], [8, 2, 3, 4]]
    assert shards.record(0).frame_times == pytest.approx([0, 4 / 30, 8 / 30], abs=1e-6)
    for stored, number in enumerate((1, 5, 9)):
        source = folder / f"{number:04d}.jpg"
        assert shards.read_frame(0, stored) == source.read_bytes()


@pytest.mark.parametrize(("dataset", "short_edge"), [("otb100", None), ("got10k", 100)])
def test_damaged_frames_are_named_and_the_rest_goes_on(
    tmp_path: Path, dataset: str, short_edge: int | None
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    images = "img" if dataset == "otb100" else ""
    names = ["Crossing", "Toy", "Vase", "Trans", "Woman"]
    if dataset == "got10k":
        names = [f"GOT-10k_Train_{number:06d}" for number in range(1, 6)]
    made_of = [sequence(raw / name, images=images) for name in names]
    cut = made_of[1] / images / "0002.jpg"
    cut.write_bytes(cut.read_bytes()[:3000])
    zeros = made_of[2] / images / "0003.jpg"  # as a disk leaves it that was full
    zeros.write_bytes(zeros.read_bytes()[:3000] + bytes(3000))
    shutil.copy(shared("otb/Jumping/img/0001.jpg"), made_of[3] / images / "0004.jpg")
    (blank,) = made_of[4].glob("groundtruth*.txt")
    blank.write_text("1,2,3,4\n\n1,2,3,4\n1,2,3\n1,2,3,4\n")
    settings = {"frames": None, "short_edge": short_edge, "max_failures": 80}
    (made,) = run(raw, out, dataset=dataset, **settings).sets
    assert {row.source: (row.kind, row.message) for row in made.excluded} == {
        names[1]: ("unreadable", "0002.jpg is cut short"),
        names[2]: ("unreadable", "0003.jpg is cut short"),
        names[3]: ("unreadable", "0004.jpg is 352x288, unlike the first"),
        names[4]: ("bad-annotation", f"{blank.name} line 4: '1,2,3' is not x,y,w,h"),
    }
    assert open_shards(str(out / f"{dataset}.json")).keys == [names[0]]


def test_a_frame_that_only_its_decoder_refuses(tmp_path: Path) -> None:
    sequence(tmp_path / "raw" / "GOT-10k_Train_000001", images="")
    spoiled = sequence(tmp_path / "raw" / "GOT-10k_Train_000002", images="") / "0002.jpg"
    whole = spoiled.read_bytes()
    half = len(whole) // 2
    spoiled.write_bytes(whole[:half] + b"\xff\xd8" + whole[half:])  # a picture in the picture
    settings = {"frames": None, "short_edge": 100, "max_failures": 80}
    (made,) = run(tmp_path / "raw", tmp_path / "out", dataset="got10k", **settings).sets
    ((kind, message),) = [(row.kind, row.message) for row in made.excluded]
    assert kind == "unreadable"
    assert message.startswith("0002.jpg cannot be decoded")


def test_something_behind_a_picture_is_no_damage(tmp_path: Path) -> None:
    image = sequence(tmp_path / "raw" / "Crossing") / "img" / "0002.jpg"
    image.write_bytes(image.read_bytes() + b"\r\n\0\0camera's own words")
    run(tmp_path / "raw", tmp_path / "out", dataset="otb100", frames=None)
    assert open_shards(str(tmp_path / "out" / "otb100.json")).read_frame(0, 1) == image.read_bytes()


# GOT-10k


def test_got10k_one_box_is_enough_for_test_sequences_alone(tmp_path: Path) -> None:
    for split in ("Train", "Test"):
        folder = sequence(tmp_path / "raw" / f"GOT-10k_{split}_000001", images="")
        (folder / "groundtruth.txt").write_text("1,2,30,40\n")
    sequence(tmp_path / "raw" / "GOT-10k_Train_000002", images="")
    train, test = run(
        tmp_path / "raw", tmp_path / "out", dataset="got10k", frames=None, max_failures=80
    ).sets
    assert [(row.source, row.kind) for row in train.excluded] == [
        ("GOT-10k_Train_000001", "bad-annotation")
    ]
    assert test.failed == 0


def test_got10k_without_labels_and_rate(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "raw" / "train" / "GOT-10k_Train_000001", images="")
    (folder / "meta_info.ini").write_text("[METAINFO]\nanno_fps: nanHz\n")
    run(tmp_path / "raw", tmp_path / "out", dataset="got10k", frames=None)
    record = open_shards(str(tmp_path / "out" / "got10k.json")).record(0)
    assert (record.absence, record.cover, record.source_fps) == (None, None, None)
    assert record.frame_times[1] == pytest.approx(1 / 30, abs=1e-6)


def test_got10k_flags_that_are_no_numbers(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "raw" / "train" / "GOT-10k_Train_000001", images="")
    sequence(tmp_path / "raw" / "train" / "GOT-10k_Train_000002", images="")
    (folder / "cover.label").write_text("8\n8\n²\n8\n")
    run(tmp_path / "raw", tmp_path / "out", dataset="got10k", frames=None, max_failures=80)
    assert errors(tmp_path / "out" / "got10k.errors.csv") == [
        ("train/GOT-10k_Train_000001", "bad-annotation")
    ]


def test_got10k_lists_and_folders_that_differ(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "list.txt").write_text("GOT-10k_Train_000001\nGOT-10k_Train_000003\n")
    for number in (1, 2):
        sequence(tmp_path / "train" / f"GOT-10k_Train_{number:06d}", images="")
    sequence(tmp_path / "copy" / "GOT-10k_Train_000001", images="")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "list.txt").write_text("GOT-10k_Val_000001\n")
    config = PrepareConfig(dataset="got10k", src=str(tmp_path))
    found = adapter("got10k").discover(config)
    (train,) = found.sets
    assert found.notes == ["val: none of the 1 listed sequences found; left out"]
    assert train.notes == ["got10k: 1 sequences are not in list.txt; stored anyway"]
    assert len(train.videos) == 2
    assert sorted((row.kind, row.source) for row in train.excluded) == [
        ("duplicate", "train/GOT-10k_Train_000001"),
        ("missing", "GOT-10k_Train_000003"),
    ]


def test_got10k_one_split(tmp_path: Path) -> None:
    sequence(tmp_path / "train" / "GOT-10k_Train_000001", images="")
    sequence(tmp_path / "val" / "GOT-10k_Val_000001", images="")
    (only,) = find("got10k", tmp_path, split="validation")
    assert (only.name, len(only.videos)) == ("got10k-val", 1)
    with pytest.raises(InputError, match=r"unknown split 'test'.*train, val"):
        find("got10k", tmp_path, split="test")
