"""What each dataset's file finds in trees laid out as people have them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipelines._adapter import (
    Discovery,
    Video,
    adapter,
    coverage_csv,
    coverage_lines,
    dataset_names,
)
from pipelines._config import PrepareConfig
from pipelines.kinetics import ADAPTER as KINETICS
from shards.errors import InputError
from shards.format import Exclusion
from tests.data import shared
from tests.pipelines.made_videos import link_into


def find(dataset: str, src: Path, **settings: object) -> Discovery:
    config = PrepareConfig(dataset=dataset, src=str(src), **settings)  # type: ignore[arg-type]
    return adapter(dataset).discover(config)


def touch(root: Path, *files: str) -> None:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")


def by_name(videos: list[Video]) -> dict[str, Video]:
    return {Path(video.source).name: video for video in videos}


def kinds(excluded: list[Exclusion]) -> list[tuple[str, str]]:
    return sorted((row.kind, row.source) for row in excluded)


DATASETS = [
    *("activitynet", "folder", "frames", "got10k", "hmdb51", "images", "kinetics", "list"),
    *("otb100", "ucf101", "wds"),
]


def test_datasets_are_the_files_of_the_room() -> None:
    assert dataset_names() == DATASETS
    assert not [name for name in dataset_names() if name.startswith("_")]
    with pytest.raises(InputError, match="unknown dataset 'ucf'"):
        adapter("ucf")


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_source_that_is_not_there(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such (folder|file|shard)"):
        find(dataset, tmp_path / "none")


# UCF101


@pytest.mark.parametrize("inside", ["", "UCF-101"])
def test_ucf101_as_published(inside: str) -> None:
    (found,) = find("ucf101", shared("ucf101") / inside).sets
    videos = by_name(found.videos)
    assert found.name == "ucf101"
    assert len(videos) == 16
    assert not found.excluded
    assert found.label_names[:1] + found.label_names[6:7] == ["ApplyEyeMakeup", "BaseballPitch"]
    assert all(found.label_names[video.label or 0] == video.label_name for video in found.videos)
    assert videos["v_Diving_g01_c01.avi"].label == 25
    assert videos["v_Diving_g01_c01.avi"].splits == {"1": "train"}
    assert videos["v_Diving_g01_c04.avi"].splits == {"1": "test"}


def test_ucf101_with_its_traps(tmp_path: Path) -> None:
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes(b"1 Archery\r\n2 HandstandPushups\r\n")
    listed = "HandstandPushups/v_HandStandPushups_g01_c01.avi"
    (lists / "trainlist01.txt").write_bytes(f"{listed} 2\r\n".encode())
    (lists / "testlist02.txt").write_bytes(f"{listed}\r\n".encode())
    (lists / "trainlist03.txt").write_bytes(b"Archery/v_Archery_g01_c01.avi 1\r\n")
    touch(tmp_path / "UCF-101", listed, "Other/v_Other_g01_c01.avi", "Archery/._v_x.avi")
    (found,) = find("ucf101", tmp_path).sets
    (video,) = found.videos
    assert (video.label, video.label_name) == (1, "HandstandPushups")
    assert video.splits == {"1": "train", "2": "test"}
    assert kinds(found.excluded) == [
        ("missing", "Archery/v_Archery_g01_c01.avi"),
        ("not-in-annotations", "UCF-101/Other/v_Other_g01_c01.avi"),
    ]


def test_ucf101_without_lists(tmp_path: Path) -> None:
    touch(tmp_path / "raw", "Archery/v_Archery_g01_c01.avi")
    with pytest.raises(InputError, match=r"no ucfTrainTestlist.*--annotations"):
        find("ucf101", tmp_path / "raw")


def test_ucf101_has_no_split_to_choose() -> None:
    with pytest.raises(InputError, match="--split"):
        find("ucf101", shared("ucf101"), split="1")


# HMDB51


@pytest.mark.parametrize("inside", ["", "videos"])
def test_hmdb51_as_published(inside: str) -> None:
    (found,) = find("hmdb51", shared("hmdb51") / inside).sets
    parts = [video.splits["1"] for video in found.videos]
    assert {part: parts.count(part) for part in set(parts)} == {
        "train": 243,
        "test": 96,
        "unused": 1,
    }
    assert found.label_names == sorted(found.label_names)
    assert len(found.label_names) == 8
    assert {video.label for video in found.videos} == set(range(8))
    assert len({video.key for video in found.videos}) == 340
    assert not found.excluded


def test_hmdb51_with_its_traps(tmp_path: Path) -> None:
    splits = tmp_path / "testTrainMulti_7030_splits"
    splits.mkdir()
    names = ["#20 Rhythm (1)!;[x]&.avi", "b.avi", "gone.avi"]
    (splits / "ride_horse_test_split1.txt").write_text(
        "".join(f"{name} {code} \r\n" for name, code in zip(names, "120", strict=True))
    )
    (splits / "ride_horse_test_split2.txt").write_text(f"{names[0]} 0 \n")
    # Unpacking each class's archive in its folder gives the name twice.
    nested = "ride_horse/ride_horse"
    touch(tmp_path, f"{nested}/{names[0]}", f"{nested}/b.avi", "ride_horse/b.avi")
    touch(tmp_path, "ride_horse/extra.avi", "wave/c.avi")
    (found,) = find("hmdb51", tmp_path).sets
    videos = by_name(found.videos)
    assert videos[names[0]].splits == {"1": "train", "2": "unused"}
    assert videos["b.avi"].source == "ride_horse/b.avi"
    assert kinds(found.excluded) == [
        ("duplicate", f"{nested}/b.avi"),
        ("missing", "ride_horse/gone.avi"),
        ("not-in-annotations", "ride_horse/extra.avi"),
        ("not-in-annotations", "wave/c.avi"),
    ]


def test_hmdb51_with_a_line_that_says_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "wave/a.avi")
    (tmp_path / "wave_test_split1.txt").write_text("a.avi 7\n")
    with pytest.raises(InputError, match=r"a\.avi 7"):
        find("hmdb51", tmp_path)


# Kinetics

HEADER = "label,youtube_id,time_start,time_end,split,is_cc\r\n"


def kinetics_tree(root: Path) -> Path:
    """Two splits, ids with ``_`` and ``-``, and each kind of litter."""
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / "train.csv").write_bytes(
        b"\xef\xbb\xbf"
        + (
            HEADER
            + '"shaking hands, ""firmly""",-a_b_c_d-e_,10,20,train,0\r\n'
            + "abseiling,aaaaaaaaaaa,0,10,train,0\r\n"
            + "abseiling,bbbbbbbbbbb,5,15,train,0\r\n"
            + "abseiling,ccccccccccc,5,15,train,0\r\n"
        ).encode()
    )
    (root / "annotations" / "validate.csv").write_text(
        HEADER + "zumba,ddddddddddd,1,11,validate,0\n"
    )
    (root / "annotations" / "test.csv").write_text(
        "youtube_id,time_start,time_end,split\neeeeeeeeeee,1,11,test\n"
    )
    touch(
        root,
        "train/-a_b_c_d-e__000010_000020.mp4",
        "train/aaaaaaaaaaa_000000_000010.mp4",
        "train/._aaaaaaaaaaa_000000_000010.mp4",
        "train/abseiling/bbbbbbbbbbb.mkv",
        "replacement/replacement_for_corrupted_k400/aaaaaaaaaaa_000000_000010.mp4",
        "val/zumba/ddddddddddd_000001_000011.mp4",
        "train/unlisted_id_000001_000011.mp4",
    )
    return root


def test_kinetics_splits_labels_and_litter(tmp_path: Path) -> None:
    found = find("kinetics", kinetics_tree(tmp_path / "k"))
    train, val = found.sets
    assert (train.name, val.name) == ("kinetics", "kinetics-val")
    assert train.label_names == ["abseiling", 'shaking hands, "firmly"', "zumba"]
    assert val.label_names == train.label_names
    videos = by_name(train.videos)
    assert set(videos) == {
        "-a_b_c_d-e__000010_000020.mp4",
        "aaaaaaaaaaa_000000_000010.mp4",
        "bbbbbbbbbbb.mkv",
    }
    assert videos["-a_b_c_d-e__000010_000020.mp4"].label == 1
    assert videos["-a_b_c_d-e__000010_000020.mp4"].splits == {"official": "train"}
    assert videos["aaaaaaaaaaa_000000_000010.mp4"].source.startswith("replacement/")
    assert [(video.label, video.splits) for video in val.videos] == [(2, {"official": "val"})]
    assert kinds(train.excluded) == [
        ("duplicate", "train/aaaaaaaaaaa_000000_000010.mp4"),
        ("missing", "ccccccccccc_000005_000015"),
        ("not-in-annotations", "train/unlisted_id_000001_000011.mp4"),
    ]
    assert any("test: none of the 1" in note for note in found.notes)
    assert coverage_lines(train.name, train.coverage) == [
        "kinetics: 3 of 4 listed train videos found",
        "kinetics: of 2 classes, 1 are complete and 0 have no videos; most missing: abseiling 1",
    ]
    assert coverage_csv(train.coverage).splitlines()[1:] == [
        "train,abseiling,3,2,1",
        'train,"shaking hands, ""firmly""",1,1,0',
    ]


@pytest.mark.parametrize(
    "layout",
    [
        "train/{stem}.mp4",
        "train/shaking_hands_firmly/{stem}.avi",
        "videos_train/shaking hands firmly/{stem}.webm",
        "replacement/replacement_for_corrupted_k400/{stem}.mp4",
        "train/{id}.mkv",
        "compress/train_256/{stem}.MP4",
    ],
)
def test_kinetics_layouts(tmp_path: Path, layout: str) -> None:
    youtube_id = "-a_b_c_d-e_"
    (tmp_path / "kinetics400").mkdir()
    (tmp_path / "kinetics400" / "val.csv").write_text(
        HEADER + f'"shaking hands, ""firmly""",{youtube_id},10,20,val,0\r\n'
    )
    stem = f"{youtube_id}_000010_000020"
    touch(tmp_path, layout.format(stem=stem, id=youtube_id))
    touch(tmp_path, "__MACOSX/train/._" + stem + ".mp4", "__MACOSX/train/" + stem + ".mp4")
    (found,) = find("kinetics", tmp_path).sets
    (video,) = found.videos
    assert (video.label, video.label_name) == (0, 'shaking hands, "firmly"')
    assert video.splits == {"official": "val"}
    assert not found.excluded


def test_a_stray_quote_does_not_swallow_the_rest_of_kinetics(tmp_path: Path) -> None:
    tree = kinetics_tree(tmp_path / "k")
    (path, *_) = sorted(tree.rglob("*.csv"))
    path.write_text(path.read_text() + '"shaking hands,abcdefghijk,1,2,val,0\r\n')
    lines = len(path.read_text().splitlines())
    with pytest.raises(InputError, match=f"line {lines} is not CSV"):
        find("kinetics", tree)
    path.write_text('"label",youtube_id,"time_start\n')
    with pytest.raises(InputError, match="line 1 is not CSV"):
        find("kinetics", tree)


def test_kinetics_one_split(tmp_path: Path) -> None:
    tree = kinetics_tree(tmp_path / "k")
    (only,) = find("kinetics", tree, split="val").sets
    assert only.name == "kinetics-val"
    assert only.videos[0].label == 2  # counted over all splits, as when all are prepared
    with pytest.raises(InputError, match=r"unknown split 'dev'.*train, val, test"):
        find("kinetics", tree, split="dev")


@pytest.mark.parametrize(("labels", "name"), [(400, "k400"), (600, "k600"), (700, "k700")])
def test_kinetics_is_named_by_its_labels(tmp_path: Path, labels: int, name: str) -> None:
    rows = "".join(f"label {n:03d},id{n:09d},0,10,train,0\n" for n in range(labels))
    (tmp_path / "train.csv").write_text(HEADER + rows)
    touch(tmp_path, f"train/id{7:09d}_000000_000010.mp4")
    (found,) = find("kinetics", tmp_path).sets
    assert (found.name, found.videos[0].label) == (name, 7)
    assert len(found.excluded) == labels - 1


def test_kinetics_annotations_elsewhere(tmp_path: Path) -> None:
    tree = kinetics_tree(tmp_path / "k")
    (tree / "annotations").rename(tmp_path / "csv")
    with pytest.raises(InputError, match=r"no train\.csv.*--annotations"):
        find("kinetics", tree)
    assert len(find("kinetics", tree, annotations=str(tmp_path / "csv")).sets) == 2
    given = str(tmp_path / "csv" / "train.csv")
    assert [row.name for row in find("kinetics", tree, annotations=given).sets] == ["kinetics"]


def test_kinetics_with_another_csv(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("video,class\na.mp4,3\n")
    touch(tmp_path, "train/a.mp4")
    with pytest.raises(InputError, match="no column youtube_id"):
        find("kinetics", tmp_path)
    assert KINETICS.default_frames == 30


def test_kinetics_the_files_own_seconds_come_first(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(HEADER + "zumba,ddddddddddd,10,20,train,0\n")
    other, exact = (f"train/ddddddddddd_0000{s}.mp4" for s in ("05_000015", "10_000020"))
    touch(tmp_path, other, exact)
    (found,) = find("kinetics", tmp_path).sets
    assert [video.source for video in found.videos] == [exact]
    assert kinds(found.excluded) == [("duplicate", other)]


# ActivityNet


def activitynet_json(path: Path, label: str) -> None:
    row = {"subset": "training", "annotations": [{"label": label, "segment": [0, 1]}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"taxonomy": [], "database": {"aaaaaaaaaaa": row}}))


@pytest.mark.parametrize(
    "file", ["raw/activity_net.v1-3.min.json", "raw/anno/anet_1.3.json", "raw/gt.json", "gt.json"]
)
def test_activitynet_annotations_by_name_or_content(tmp_path: Path, file: str) -> None:
    touch(tmp_path / "raw", "videos/deep/v_aaaaaaaaaaa.mp4")
    activitynet_json(tmp_path / file, "Yoga")
    folder = (tmp_path / file).parent
    (folder / "activitynet_captions.txt").write_text("")
    (folder / "another.json").write_text('{"v_aaaaaaaaaaa": {"sentences": []}}')
    (found,) = find("activitynet", tmp_path / "raw").sets
    assert found.label_names == ["Yoga"]


def test_activitynet_the_right_one_of_several(tmp_path: Path) -> None:
    touch(tmp_path, "v_aaaaaaaaaaa.mp4")
    activitynet_json(tmp_path / "activity_net.v1-2.min.json", "Old")
    activitynet_json(tmp_path / "activity_net.v1-3.min.json", "Yoga")
    (tmp_path / "activity_net.v1-3.captions.json").write_text('{"v_aaaaaaaaaaa": {}}')
    found = find("activitynet", tmp_path)
    assert found.sets[0].label_names == ["Yoga"]
    assert found.notes == ["annotations: activity_net.v1-3.min.json, 1 videos, 1 labels"]
    given = str(tmp_path / "activity_net.v1-2.min.json")
    assert find("activitynet", tmp_path, annotations=given).sets[0].label_names == ["Old"]


@pytest.mark.parametrize("dataset", ["activitynet", "hmdb51", "kinetics", "ucf101"])
def test_annotations_that_are_not_there(dataset: str, tmp_path: Path) -> None:
    touch(tmp_path, "a/x.mp4")
    activitynet_json(tmp_path / "activity_net.v1-3.min.json", "Yoga")
    with pytest.raises(InputError, match=r"typo\.json: there is no such file or folder"):
        find(dataset, tmp_path, annotations=str(tmp_path / "typo.json"))


# Folder


def test_folder_with_labels(tmp_path: Path) -> None:
    touch(tmp_path / "My Videos", "b/x.mp4", "a/deep/y.MOV", "a/notes.txt")
    (found,) = find("folder", tmp_path / "My Videos").sets
    assert found.name == "my-videos"
    assert found.label_names == ["a", "b"]
    assert [(video.source, video.label) for video in found.videos] == [
        ("a/deep/y.MOV", 0),
        ("b/x.mp4", 1),
    ]


def test_folder_without_labels(tmp_path: Path) -> None:
    touch(tmp_path, "b/x.mp4", "top.mp4")
    (found,) = find("folder", tmp_path, name="mine").sets
    assert (found.name, found.label_names) == ("mine", [])
    assert [video.label for video in found.videos] == [None, None]


def test_folder_without_videos(tmp_path: Path) -> None:
    touch(tmp_path, "readme.txt", ".hidden.mp4")
    with pytest.raises(InputError, match="holds no videos"):
        find("folder", tmp_path)


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "disk", "x.mp4")
    link_into(tmp_path / "raw", [tmp_path / "disk"])
    (tmp_path / "disk" / "again").symlink_to(tmp_path / "raw")
    (found,) = find("folder", tmp_path / "raw").sets
    assert [video.source for video in found.videos] == ["disk/x.mp4"]


def test_the_same_name_in_two_folders_gives_two_keys(tmp_path: Path) -> None:
    touch(tmp_path, "a/clip.mp4", "b/clip.mp4", "b/CLIP.mp4")
    (found,) = find("folder", tmp_path).sets
    assert len({video.key.lower() for video in found.videos}) == 3


def test_litter_pipes_and_broken_links_are_no_videos(tmp_path: Path) -> None:
    touch(tmp_path, "b/z.mp4", "a.mp4", "b.mp4", "._a.mp4", "__MACOSX/a.mp4", ".git/x.mp4")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "self.mp4").symlink_to(tmp_path / "self.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    touch(tmp_path, "folder.mp4/inner.mp4")
    (found,) = find("folder", tmp_path).sets
    sources = [video.source for video in found.videos]
    assert sources == ["a.mp4", "b.mp4", "b/z.mp4", "folder.mp4/inner.mp4"]
    assert {(row.source, row.kind) for row in found.excluded} == {
        ("gone.mp4", "missing"),
        ("self.mp4", "missing"),
    }


@pytest.mark.parametrize(
    ("dataset", "name"), [("folder", "x.mp4"), ("frames", "x.jpg"), ("images", "x.png")]
)
def test_links_to_a_disk_that_is_not_there_are_named(
    dataset: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "raw" / "a").mkdir(parents=True)
    (tmp_path / "raw" / "a" / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "raw" / "a" / "notes.txt").symlink_to(tmp_path / "disk" / "notes.txt")
    with pytest.raises(InputError, match=f"1 links that lead to no file, such as a/{name}"):
        find(dataset, tmp_path / "raw")
    touch(tmp_path / "raw", f"b/{name}")
    (found,) = find(dataset, tmp_path / "raw").sets
    assert [row.source for row in found.excluded] == [f"a/{name}"]
