"""Every dataset prepared whole, from a tree in its true format that is built of real clips."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import simplejpeg
import webdataset

from pipelines._prepare import PreparedSet
from shards.dataset import ShardSet
from shards.errors import InputError
from shards.format import VideoRecord
from shards.opening import open_shards
from shards.verify import verify
from tests.data import shared
from tests.pipelines.running import errors, run

CLIPS = ["playing_guitar.mp4", "yoga.mp4", "flipping_a_pancake.mkv", "hitting_baseball.mp4"]


def place(clip: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(shared(f"clips/{clip}"))


def records(shards: ShardSet) -> dict[str, VideoRecord]:
    return {shards.record(number).key: shards.record(number) for number in range(len(shards))}


def by_source(manifest: Path) -> dict[str, VideoRecord]:
    return {row.source: row for row in records(open_shards(str(manifest))).values()}


def prepared(src: Path, out: Path, dataset: str, **settings: Any) -> tuple[PreparedSet, ...]:
    return tuple(run(src, out, dataset=dataset, **settings).sets)


def coverage(out: Path, name: str) -> list[tuple[str, ...]]:
    with open(out / f"{name}.coverage.csv", newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


# Kinetics


def test_kinetics(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "annotations").mkdir(parents=True)
    (raw / "annotations" / "train.csv").write_bytes(
        b"label,youtube_id,time_start,time_end,split,is_cc\r\n"
        b"playing guitar,-_gUitar_-a1,0,10,train,0\r\n"
        b"yoga,y_o_g_a-0001,5,15,train,0\r\n"
        b"yoga,goneGONE001,5,15,train,0\r\n"
    )
    (raw / "annotations" / "test.csv").write_text(
        "youtube_id,time_start,time_end,split\npanc4ke_-_a,3,13,test\n"
    )
    place(CLIPS[0], raw / "train" / "playing_guitar" / "-_gUitar_-a1_000000_000010.mp4")
    (raw / "train" / "y_o_g_a-0001_000005_000015.mp4").write_bytes(b"corrupted")
    (raw / "train" / "._y_o_g_a-0001_000005_000015.mp4").write_bytes(b"litter")
    fixed = raw / "replacement" / "replacement_for_corrupted_k400"
    place(CLIPS[1], fixed / "y_o_g_a-0001_000005_000015.mp4")
    place(CLIPS[2], raw / "test" / "panc4ke_-_a_000003_000013.mkv")
    train, test = prepared(raw, out, "kinetics", frames=3)
    assert (train.videos, train.failed, test.videos, test.failed) == (2, 0, 1, 0)
    found = records(open_shards(str(out / "kinetics.json")))
    guitar, yoga = (found[key] for key in sorted(found))
    assert (guitar.label, guitar.label_name) == (0, "playing guitar")
    assert (yoga.label, yoga.splits, len(yoga.frame_times)) == (1, {"official": "train"}, 3)
    assert yoga.source.startswith("replacement/")
    (unlabelled,) = records(open_shards(str(out / "kinetics-test.json"))).values()
    assert (unlabelled.label, unlabelled.splits) == (None, {"official": "test"})
    assert coverage(out, "kinetics") == [
        ("train", "playing guitar", "1", "1", "0"),
        ("train", "yoga", "2", "1", "1"),
    ]
    assert errors(out / "kinetics.errors.csv") == [
        ("goneGONE001_000005_000015", "missing"),
        ("train/y_o_g_a-0001_000005_000015.mp4", "duplicate"),
    ]


# ActivityNet


def activitynet_tree(raw: Path, annotations: str = "activity_net.v1-3.min.json") -> Path:
    database = {
        "-v_s1AbCd_e": ("training", [("Yoga", 0, 4), ("Ballet", 4, 7), ("Yoga", 7, 8)]),
        "v_guitarAbC": ("validation", [("Playing guitar", 1, 3)]),
        "GONE_aBcDeF": ("validation", [("Yoga", 1, 3)]),
        "testABCDEFG": ("testing", []),
        "ballBALLbal": ("training", [("Ballet", 0, 5), ("Yoga", 5, 10)]),
    }
    rows = {
        key: {
            "subset": subset,
            "duration": 10.0,
            "resolution": "320x240",
            "url": f"https://www.youtube.com/watch?v={key}",
            "annotations": [{"label": name, "segment": [a, b]} for name, a, b in annotated],
        }
        for key, (subset, annotated) in database.items()
    }
    path = raw / annotations
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "VERSION 1.3", "taxonomy": [], "database": rows}))
    place("yoga.mp4", raw / "train" / "v_-v_s1AbCd_e.mp4")
    place("hitting_baseball.mp4", raw / "train" / "ballBALLbal.webm")
    place("playing_guitar.mp4", raw / "val" / "v_guitarAbC.mkv")
    place("flipping_a_pancake.mkv", raw / "test" / "v_testABCDEFG.mkv")
    place("flipping_a_pancake.mkv", raw / "test" / "v_unknownUNKN.mkv")
    return raw


@pytest.mark.parametrize("where", ["activity_net.v1-3.min.json", "anno/ActivityNet1.3.json"])
def test_activitynet(tmp_path: Path, where: str) -> None:
    raw, out = activitynet_tree(tmp_path / "raw", where), tmp_path / "out"
    train, val, test = prepared(raw, out, "activitynet", frames=3)
    assert (train.videos, val.videos, test.videos) == (2, 1, 1)
    found = {
        row.source: row for row in records(open_shards(str(out / "activitynet.json"))).values()
    }
    yoga, ball = found["train/v_-v_s1AbCd_e.mp4"], found["train/ballBALLbal.webm"]
    assert (yoga.label, yoga.label_name) == (2, "Yoga")  # 5 of 8 seconds
    assert (ball.label, ball.label_name) == (0, "Ballet")  # a tie: the first by name
    shards = open_shards(str(out / "activitynet-val.json"))
    assert shards.label_names == ["Ballet", "Playing guitar", "Yoga"]
    (guitar,) = records(shards).values()
    assert (guitar.label, guitar.splits) == (1, {"official": "val"})  # its id begins with v_
    (hidden,) = records(open_shards(str(out / "activitynet-test.json"))).values()
    assert (hidden.label, hidden.splits) == (None, {"official": "test"})
    assert errors(out / "activitynet.errors.csv") == [
        ("test/v_unknownUNKN.mkv", "not-in-annotations")
    ]
    assert errors(out / "activitynet-val.errors.csv") == [("v_GONE_aBcDeF", "missing")]
    assert coverage(out, "activitynet-val") == [
        ("val", "Playing guitar", "1", "1", "0"),
        ("val", "Yoga", "1", "0", "1"),
    ]


def test_activitynet_one_split_and_its_spelling(tmp_path: Path) -> None:
    raw = activitynet_tree(tmp_path / "raw")
    (only,) = prepared(raw, tmp_path / "out", "activitynet", split="validation", frames=1)
    assert only.manifest.endswith("activitynet-val.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not ActivityNet's annotation file"),
        ('{"database": {"a": {"subset": "other"}}}', "a: unknown subset 'other'"),
        (
            '{"database": {"a": {"subset": "training", "annotations": [{}]}}}',
            "is not ActivityNet's",
        ),
        ("{", "is not ActivityNet's"),
    ],
)
def test_activitynet_annotations_that_are_not(tmp_path: Path, text: str, message: str) -> None:
    raw = activitynet_tree(tmp_path / "raw")
    (raw / "activity_net.v1-3.min.json").write_text(text)
    with pytest.raises(InputError, match=message):
        prepared(raw, tmp_path / "out", "activitynet")


# HMDB51 and UCF101


def test_hmdb51_with_the_punctuation_of_its_names(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    clips = sorted(shared("hmdb51/videos/pick").iterdir())[:3]
    names = ["#1 (Don't) [be] & afraid!;_pick_f_cm_np1_ba_med_0.avi", "@b.avi", "c{1..2}%03d.avi"]
    splits = raw / "testTrainMulti_7030_splits"
    splits.mkdir(parents=True)
    for name, clip in zip(names, clips, strict=True):
        (raw / "pick").mkdir(exist_ok=True)
        (raw / "pick" / name).symlink_to(clip)
    for number, codes in enumerate(("120", "211", "012"), start=1):
        lines = [f"{name} {code} \r\n" for name, code in zip(names, codes, strict=True)]
        (splits / f"pick_test_split{number}.txt").write_bytes("".join(lines).encode())
    (made,) = prepared(raw, out, "hmdb51", frames=2)
    assert (made.videos, made.failed, made.excluded) == (3, 0, [])
    found = by_source(out / "hmdb51.json")
    assert found[f"pick/{names[0]}"].splits == {"1": "train", "2": "test", "3": "unused"}
    assert found[f"pick/{names[1]}"].splits == {"1": "test", "2": "train", "3": "train"}
    assert {row.label_name for row in found.values()} == {"pick"}


def test_ucf101_as_published(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    clip = sorted(shared("ucf101/UCF-101/Diving").iterdir())[0]
    folder = raw / "UCF-101" / "HandstandPushups"
    folder.mkdir(parents=True)
    (folder / "v_HandStandPushups_g01_c01.avi").symlink_to(clip)
    lists = raw / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes(b"1 Archery\r\n2 HandstandPushups\r\n")
    member = b"HandstandPushups/v_HandStandPushups_g01_c01.avi"
    for number in (1, 2, 3):
        (lists / f"trainlist0{number}.txt").write_bytes(member + b" 2\r\n" if number != 2 else b"")
        (lists / f"testlist0{number}.txt").write_bytes(member + b"\r\n" if number == 2 else b"")
    prepared(raw, out, "ucf101", frames=2)
    (record,) = records(open_shards(str(out / "ucf101.json"))).values()
    assert (record.label, record.label_name) == (1, "HandstandPushups")
    assert record.splits == {"1": "train", "2": "test", "3": "train"}


# All of the real data


@pytest.mark.parametrize(
    ("dataset", "folder", "videos", "excluded"),
    [
        ("hmdb51", "hmdb51", 340, []),
        ("ucf101", "ucf101", 16, []),
        ("otb100", "otb", 4, []),
        ("folder", "clips", 19, [("corrupted.mp4", "damaged")]),
    ],
)
def test_all_real_data_prepares_but_the_corrupt_file(
    tmp_path: Path, dataset: str, folder: str, videos: int, excluded: list[tuple[str, str]]
) -> None:
    frames = None if dataset == "otb100" else 2
    settings: dict[str, Any] = {"frames": frames, "workers": 2, "max_failures": 10}
    (made,) = prepared(shared(folder), tmp_path, dataset, **settings)
    assert made.videos == videos
    assert [(row.source, row.kind) for row in made.excluded] == excluded
    assert sum(shard.videos for shard in made.shards) == videos - len(excluded)
    tars = [str(tmp_path / shard.file) for shard in made.shards]
    stock = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert len(stock) == videos - len(excluded)
    for sample in stock:
        pictures = [value for name, value in sample.items() if name.endswith(".jpg")]
        assert len(pictures) == len(sample["json"]["frame_times"]) > 0
        sizes = {picture.size for picture in pictures}
        assert sizes == {(sample["json"]["width"], sample["json"]["height"])}
    assert not verify(made.manifest).faults


def test_damaged_videos_can_be_kept(tmp_path: Path) -> None:
    place("corrupted.mp4", tmp_path / "raw" / "corrupted.mp4")
    made = run(tmp_path / "raw", tmp_path / "out", frames=None, all_frames=True, keep_damaged=True)
    assert made.sets[0].shards[0].frames == 49  # of 50: one packet cannot be decoded at all


# OTB-100


def otb_sequence(raw: Path, real: str, name: str, frames: range | None = None) -> Path:
    """A sequence of real frames under another name, numbered from 1 or as in ``frames``."""
    source = shared(f"otb/{real}")
    folder = raw / name
    (folder / "img").mkdir(parents=True)
    images = sorted((source / "img").iterdir())
    for number, image in zip(frames or range(1, 11), images, strict=False):
        (folder / "img" / f"{number:04d}.jpg").symlink_to(image)
    return folder


def test_otb100_bytes_pass_through(tmp_path: Path) -> None:
    (made,) = prepared(shared("otb"), tmp_path, "otb100", frames=None)
    shards = open_shards(str(tmp_path / "otb100.json"))
    assert [shards.record(n).key for n in range(4)] == shards.keys
    assert set(shards.keys) == {"Crossing", "Jumping", "MotorRolling", "Skiing"}
    for number, key in enumerate(shards.keys):
        images = sorted(shared(f"otb/{key}/img").glob("*.jpg"))
        record = shards.record(number)
        assert shards.frame_count(number) == len(images) == len(record.boxes or ())
        assert len(record.frame_times) == record.source_frames == len(images)
        for frame, image in enumerate(images):
            assert shards.read_frame(number, frame) == image.read_bytes()
        height, width, colours, *_ = simplejpeg.decode_jpeg_header(images[0].read_bytes())
        assert (record.width, record.height) == (width, height)
        assert (colours == "Gray") == (key == "Jumping")
    crossing = shards.record(shards.find("Crossing"))  # with tabs
    jumping = shards.record(shards.find("Jumping"))  # with commas
    assert crossing.boxes is not None and crossing.boxes[0] == [205, 151, 17, 50]
    assert jumping.boxes is not None and jumping.boxes[0] == [147, 110, 34, 33]
    assert made.failed == 0
    rows = coverage(tmp_path, "otb100")
    assert len(rows) == 100
    assert sum(int(row[3]) for row in rows) == 4


def test_otb100_with_its_traps(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    boxes = [f"{n},{n}\t10 20\n" for n in range(1, 11)]
    jogging = otb_sequence(raw, "Crossing", "Jogging/Jogging")  # unpacked into its own folder
    (jogging / "groundtruth_rect.1.txt").write_text("".join(boxes))
    (jogging / "groundtruth_rect.2.txt").write_text("".join(reversed(boxes)))
    human = otb_sequence(raw, "Skiing", "Human4")
    (human / "groundtruth_rect.1.txt").write_text("\n")
    (human / "groundtruth_rect.2.txt").write_text("".join(boxes).replace("\n", "\r\n"))
    # Diving's annotated range is 1-215: of 220 frames, and of a copy that is cut already.
    whole = otb_sequence(raw, "Jumping", "Diving", range(1, 221))
    (whole / "groundtruth_rect.txt").write_text("5 6 7 8\n" * 215)
    cut = otb_sequence(raw, "Jumping", "BlurCar1", range(1, 11))
    (cut / "groundtruth_rect.txt").write_text("5 6 7 8\n" * 10)
    board = otb_sequence(raw, "Jumping", "Board", range(9998, 10003))
    (board / "groundtruth_rect.txt").write_text("1.5 2.25 7 8\n" * 5)
    for litter in ("__MACOSX/Board/img/._0001.jpg", "Board/img/Thumbs.db", "Board/img/._9998.jpg"):
        (raw / litter).parent.mkdir(parents=True, exist_ok=True)
        (raw / litter).write_bytes(b"litter")
    bad = otb_sequence(raw, "Jumping", "Woman")
    (bad / "groundtruth_rect.txt").write_text("1 2 3 4\n1 2 x 4\n" * 5)
    short = otb_sequence(raw, "Jumping", "Vase")
    (short / "groundtruth_rect.txt").write_text("1 2 3 4\n" * 9)
    empty = otb_sequence(raw, "Jumping", "Trans", range(0))
    shutil.rmtree(empty / "img")
    (empty / "img").mkdir()
    (empty / "groundtruth_rect.txt").write_text("1 2 3 4\n")
    spoiled = otb_sequence(raw, "Jumping", "Toy")
    (spoiled / "groundtruth_rect.txt").write_text("1 2 3 4\n" * 10)
    (spoiled / "img" / "0004.jpg").unlink()
    (spoiled / "img" / "0004.jpg").write_bytes(b"no picture")
    (made,) = prepared(raw, out, "otb100", frames=None, max_failures=60)
    found = records(open_shards(str(out / "otb100.json")))
    assert set(found) == {"Jogging-1", "Jogging-2", "Human4-2", "Diving", "BlurCar1", "Board"}
    assert found["Jogging-1"].boxes == [[n, n, 10, 20] for n in range(1, 11)]
    assert found["Jogging-2"].boxes == [[n, n, 10, 20] for n in range(10, 0, -1)]
    assert found["Diving"].source_frames == 215
    assert found["BlurCar1"].source_frames == 10
    assert found["Board"].boxes == [[1.5, 2.25, 7, 8]] * 5
    shards = open_shards(str(out / "otb100.json"))
    first = shared("otb/Jumping/img/0001.jpg").read_bytes()
    assert shards.read_frame(shards.find("Board"), 0) == first  # 9998 before 10000
    told = {row.source: (row.kind, row.message) for row in made.excluded}
    assert told == {
        "Woman": ("bad-annotation", "groundtruth_rect.txt line 2: '1 2 x 4' is not x,y,w,h"),
        "Vase": ("bad-annotation", "groundtruth_rect.txt: 9 boxes for 10 frames"),
        "Trans": ("zero-frames", "img contains no frames such as 0001.jpg"),
        "Toy": ("unreadable", told["Toy"][1]),
    }
    assert told["Toy"][1].startswith("0004.jpg is not a JPEG")


# GOT-10k


def got10k_sequence(folder: Path, real: str, frames: int, boxes: int | None = None) -> Path:
    source = shared(f"otb/{real}")
    folder.mkdir(parents=True)
    for number, image in enumerate(sorted((source / "img").iterdir())[:frames], start=1):
        (folder / f"{number:08d}.jpg").symlink_to(image)
    rows = [f"{n:.4f},{n + 1:.4f},30.0000,40.0000\n" for n in range(1, (boxes or frames) + 1)]
    (folder / "groundtruth.txt").write_text("".join(rows))
    (folder / "absence.label").write_text("".join(f"{n % 2}\n" for n in range(frames)))
    (folder / "cover.label").write_text("".join(f"{n % 9}\n" for n in range(frames)))
    (folder / "cut_by_image.label").write_text("0\n" * frames)
    (folder / "meta_info.ini").write_text(
        "[METAINFO]\nurl: https://youtu.be/x%20y\nbegin: 00:00:25\nanno_fps: 10Hz\n"
        "object_class: dog\nmotion_class: running\n"
    )
    return folder


@pytest.mark.parametrize("nested", ["", "full_data/"])
def test_got10k(tmp_path: Path, nested: str) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    base = raw / nested if nested else raw
    train = base / ("train_data" if nested else "train")
    got10k_sequence(train / "GOT-10k_Train_000001", "Crossing", 12)
    # The training set comes in parts, each in a folder of its own.
    got10k_sequence(train / "GOT-10k_Train_split_01" / "GOT-10k_Train_000002", "Skiing", 7)
    names = [f"GOT-10k_Train_{n:06d}" for n in (1, 2, 3)]
    (train / "list.txt").write_bytes("".join(f"{name}\r\n" for name in names).encode())
    got10k_sequence(base / "val" / "GOT-10k_Val_000001", "Jumping", 5)  # without a list
    got10k_sequence(base / "test" / "GOT-10k_Test_000001", "MotorRolling", 6, boxes=1)
    (base / "test" / "list.txt").write_text("GOT-10k_Test_000001\n")
    sets = prepared(raw, out, "got10k", frames=None)
    assert [Path(made.manifest).stem for made in sets] == ["got10k", "got10k-val", "got10k-test"]
    shards = open_shards(str(out / "got10k.json"))
    first = shards.record(shards.find("GOT-10k_Train_000001"))
    assert first.boxes == [[n, n + 1, 30.0, 40.0] for n in range(1, 13)]
    assert first.absence == [n % 2 for n in range(12)]
    assert first.cover == [n % 9 for n in range(12)]
    assert (first.source_fps, first.frame_times[:3]) == (10.0, [0.0, 0.1, 0.2])
    assert first.splits == {"official": "train"}
    image = sorted(shared("otb/Crossing/img").iterdir())[4].read_bytes()
    assert shards.read_frame(shards.find("GOT-10k_Train_000001"), 4) == image
    assert errors(out / "got10k.errors.csv") == [("GOT-10k_Train_000003", "missing")]
    (hidden,) = records(open_shards(str(out / "got10k-test.json"))).values()
    assert (hidden.boxes, len(hidden.frame_times)) == ([[1.0, 2.0, 30.0, 40.0]], 6)
    assert coverage(out, "got10k") == [("train", "", "3", "2", "1")]


def test_got10k_resized_when_asked(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    got10k_sequence(raw / "GOT-10k_Train_000001", "Crossing", 9)  # 360x240
    got10k_sequence(raw / "GOT-10k_Train_000002", "Jumping", 9)
    prepared(raw, out, "got10k", frames=3, short_edge=100)
    shards = open_shards(str(out / "got10k.json"))
    record = shards.record(0)
    assert (record.width, record.height, len(record.frame_times)) == (150, 100, 3)
    assert simplejpeg.decode_jpeg_header(shards.read_frame(0, 2))[:2] == (100, 150)
    scale = 100 / 240
    assert record.boxes is not None
    expected = [(1 - 1) * scale + 1, (2 - 1) * scale + 1, 30 * scale, 40 * scale]
    assert record.boxes[0] == pytest.approx(expected)
    assert simplejpeg.decode_jpeg_header(shards.read_frame(1, 0))[2] == "Gray"


def test_got10k_damaged_annotations_are_named(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    got10k_sequence(raw / "train" / "GOT-10k_Train_000001", "Crossing", 4)
    flags = got10k_sequence(raw / "train" / "GOT-10k_Train_000002", "Crossing", 4)
    (flags / "absence.label").write_text("0\n1\n")
    number = got10k_sequence(raw / "train" / "GOT-10k_Train_000003", "Crossing", 4)
    (number / "groundtruth.txt").write_text("1,2,3,4\nnan,1,2,3\n1,2,3,4\n1,2,3,4\n")
    fewer = got10k_sequence(raw / "train" / "GOT-10k_Train_000004", "Crossing", 4, boxes=3)
    assert fewer.is_dir()
    (made,) = prepared(raw, out, "got10k", frames=None, max_failures=80)
    told = {row.source[-6:]: (row.kind, row.message) for row in made.excluded}
    assert told == {
        "000002": ("bad-annotation", "absence.label: 2 lines for 4 frames"),
        "000003": ("bad-annotation", "groundtruth.txt line 2: 'nan,1,2,3' is not x,y,w,h"),
        "000004": ("bad-annotation", "groundtruth.txt: 3 boxes for 4 frames"),
    }
    # Mended, they are tried again; the others are taken over.
    (flags / "absence.label").write_text("0\n1\n0\n1\n")
    (made,) = prepared(raw, out, "got10k", frames=None, max_failures=80, retry_failed=True)
    assert sorted(row.source[-6:] for row in made.excluded) == ["000003", "000004"]


@pytest.mark.parametrize("dataset", ["got10k", "otb100"])
def test_a_folder_without_sequences(tmp_path: Path, dataset: str) -> None:
    (tmp_path / "raw" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no sequences"):
        prepared(tmp_path / "raw", tmp_path / "out", dataset, frames=None)
