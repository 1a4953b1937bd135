"""What people have instead of a dataset: lists of videos, folders of frames, pictures."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines._adapter import Discovery, Video, adapter, keyed, natural
from pipelines._config import PrepareConfig
from pipelines._order import ListedVideo, VideoTable
from pipelines._plan import _rank
from shards.errors import InputError
from shards.opening import open_shards
from shards.verify import verify
from tests import commands
from tests.data import lacking
from tests.pipelines.made_videos import draw_video
from tests.pipelines.running import errors, hashes, run


def find(dataset: str, src: Path, **settings: Any) -> Discovery:
    config = PrepareConfig(dataset=dataset, src=str(src), **settings)
    return adapter(dataset).discover(config)


def picture(path: Path, number: int = 0, size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    rng = np.random.default_rng(number)
    shown = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    data = io.BytesIO()
    kinds = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".tif": "TIFF"}
    shown.save(data, kinds[path.suffix.lower()], **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())
    return data.getvalue()


def listed(folder: Path, text: str, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    for name in ("a.mp4", "b, c.mp4", "d/e.mp4"):
        draw_video(folder / name, frames=50)
    return folder


# Lists


def test_a_list_with_its_traps(videos: Path) -> None:
    text = (
        "\ufeffpath , label,split,group,start,end,camera,site\r\n"
        'a.mp4, run,Train,rec1,,,3,"north, upper"\r\n'
        '"b, c.mp4","walk ""fast""",validation,,0.4,1.2,4,\r\n'
        "\r\n"
        '"b, c.mp4",run,test,,1.2,,4,\r\n'
        "./d/e.mp4,,,,,,,\r\n"
        "a.mp4,run,train,rec1,,,3,\r\n"
        "gone.mp4,run,train,,,,,\r\n"
        "d/../a.mp4,run,train,,,,,\r\n"
    )
    (found,) = find("list", listed(videos, text)).sets
    rows = {video.shown: video for video in found.videos}
    assert set(rows) == {
        "a.mp4",
        "b, c.mp4 [0.4 s, 1.2 s]",
        "b, c.mp4 [1.2 s, end]",
        "d/e.mp4",
    }
    assert found.label_names == ["run", 'walk "fast"']
    first = rows["a.mp4"]
    assert (first.label, first.splits, first.group) == (0, {"official": "train"}, "rec1")
    assert first.metadata == {"camera": "3", "site": "north, upper"}
    assert rows["b, c.mp4 [0.4 s, 1.2 s]"].splits == {"official": "val"}
    assert rows["d/e.mp4"].label is None and rows["d/e.mp4"].metadata is None
    assert sorted((row.kind, row.source) for row in found.excluded) == [
        ("duplicate", "a.mp4"),
        ("missing", "gone.mp4"),
    ]
    assert len({video.key for video in found.videos}) == 4


def test_a_list_is_stored_with_its_spans_and_columns(videos: Path, tmp_path: Path) -> None:
    text = "path,label,start,end,camera\na.mp4,x,0.4,1.2,3\na.mp4,y,1.2,,3\nd/e.mp4,x,,,\n"
    source = listed(tmp_path, text)
    out = tmp_path / "out"
    run(source, out, dataset="list", root=str(videos), all_frames=True, frames=None)
    shards = open_shards(str(out))
    records = {(record.source, record.start): record for record in map(shards.record, range(3))}
    assert set(records) == {("a.mp4", 0.4), ("a.mp4", 1.2), ("d/e.mp4", None)}
    assert records["a.mp4", 0.4].source_frames == 20
    assert records["a.mp4", 1.2].source_frames == 20
    assert records["d/e.mp4", None].source_frames == 50
    assert records["a.mp4", 1.2].metadata == {"camera": "3"}
    assert records["a.mp4", 1.2].label_name == "y"
    run(source, tmp_path / "two", dataset="list", root=str(videos), all_frames=True, frames=None)
    assert hashes(tmp_path / "two") == hashes(out)


def test_a_list_is_divided_within_its_spans(videos: Path, tmp_path: Path) -> None:
    source = listed(tmp_path, "path,start,end,group\na.mp4,0.4,1.6,g\nd/e.mp4,,,\n")
    out = tmp_path / "out"
    run(source, out, dataset="list", root=str(videos), clip_seconds=0.5)
    shards = open_shards(str(out))
    records = [shards.record(video) for video in range(len(shards))]
    starts = sorted((record.group, record.start) for record in records)
    # Of the first frames from 0, 0.5, 1, 1.5 and from 0.4, 0.9 on.
    assert starts == [("d/e.mp4", t) for t in (0.0, 0.52, 1.0, 1.52)] + [("g", 0.4), ("g", 0.92)]
    numbers = shards.groups
    assert len(set(numbers.tolist())) == 2
    of_group = {record.group: number for record, number in zip(records, numbers, strict=True)}
    assert all(of_group[r.group] == number for r, number in zip(records, numbers, strict=True))


def test_clips_of_rows_that_overlap_are_there_once(videos: Path, tmp_path: Path) -> None:
    source = listed(tmp_path, "path,label,start,end\na.mp4,x,0,1\na.mp4,y,0.5,1.5\na.mp4,z,,\n")
    out = tmp_path / "out"
    run(source, out, dataset="list", root=str(videos), clip_seconds=0.5)
    shards = open_shards(str(out))
    records = [shards.record(video) for video in range(len(shards))]
    assert sorted((r.start, r.label_name) for r in records) == [
        (0.0, "x"), (0.52, "x"), (1.0, "y"), (1.52, "z")
    ]  # fmt: skip
    parts = ["[0 s, 0.5 s]", "[0.5 s, 1 s]", "[0.5 s, 1 s]", "[1 s, 1.5 s]"]
    excluded = errors(out / "list.errors.csv")
    assert sorted(excluded) == [(f"a.mp4 {part}", "duplicate") for part in parts]
    told = "a clip of another row has these seconds, and another label"
    assert (out / "list.errors.csv").read_text().count(told) == 4


def test_splits_of_a_list(videos: Path) -> None:
    source = listed(videos, "path,split\na.mp4,train\nd/e.mp4,val\n")
    (found,) = find("list", source, split="validation").sets
    assert [video.source for video in found.videos] == ["d/e.mp4"]
    with pytest.raises(InputError, match=r"no rows of split test; it has train, val"):
        find("list", source, split="test")
    (both,) = find("list", source, split="train, val").sets
    assert len(both.videos) == 2


def test_labels_do_not_depend_on_the_split(videos: Path) -> None:
    source = listed(videos, "path,split,label\na.mp4,train,a\nd/e.mp4,val,b\n")
    (found,) = find("list", source, split="val").sets
    assert found.label_names == ["a", "b"] and found.videos[0].label == 1


def test_the_root_may_be_written_in_any_way(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = listed(videos, "path\nd/e.mp4\n")
    monkeypatch.chdir(videos / "d")
    for root in ("..", str(videos), f"{videos}/d/../"):
        (found,) = find("list", source, root=root).sets
        assert found.videos[0].source == "d/e.mp4"
    (found,) = find("list", listed(videos, f"path\n{videos}/a.mp4\n"), root="/").sets
    assert found.videos[0].source == f"{videos}/a.mp4".lstrip("/")


def test_parts_that_differ_by_little_have_keys_of_their_own(videos: Path) -> None:
    shutil.copy(videos / "a.mp4", videos / "a.avi")
    rows = ["a.mp4,0.1001,1", "a.mp4,0.1002,1", "a.avi,0.1001,1", "a.mp4,0.1001,0.9999"]
    (found,) = find("list", listed(videos, "path,start,end\n" + "\n".join(rows) + "\n")).sets
    assert len({video.key for video in found.videos}) == 4


def test_repeated_rows_are_counted_and_other_labels_told(videos: Path) -> None:
    shutil.copy(videos / "a.mp4", videos / "b.mp4")
    text = "path,label\na.mp4,x\na.mp4,x\n./a.mp4,y\nb.mp4,z\nb.mp4,z\n"
    (found,) = find("list", listed(videos, text)).sets
    assert [(one.source, one.kind, one.message) for one in found.excluded] == [
        (
            "a.mp4",
            "duplicate",
            "line 3 of the list repeats an earlier one (2 lines do), with another label: the first "
            "line's is kept",
        ),
        ("b.mp4", "duplicate", "line 6 of the list repeats an earlier one"),
    ]


def test_names_of_columns_in_any_case(videos: Path) -> None:
    text = "Path,LABEL,Start,End,Camera\na.mp4,x,0,1,3\n"
    (found,) = find("list", listed(videos, text)).sets
    (video,) = found.videos
    assert (video.label_name, video.span, video.metadata) == ("x", (0.0, 1.0), {"Camera": "3"})
    with pytest.raises(InputError, match="two columns of the same name"):
        find("list", listed(videos, "path,Label,label\na.mp4,x,y\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,label\na.mp4,x\n", "has no column path"),
        ("", "has no column path"),
        ("path,label,label\na.mp4,x,y\n", "two columns of the same name"),
        ("path\n", "lists no videos"),
        ("path,label\n,x\n", "line 2 has no path"),
        ("path,start\na.mp4,x\n", "line 2: start 'x' and end '' are not seconds"),
        ("path,start,end\na.mp4,2,1\n", "line 2: start '2' and end '1'"),
        ("path,start,end\na.mp4,nan,1\n", "line 2: start 'nan'"),
        ("path,start,end\na.mp4,-1,1\n", "line 2: start '-1'"),
        ("path\na.mp4,b\n", "line 2 has 2 cells, not 1"),
        ("path\n../secret.mp4\n", "leads out of"),
        ("path\n/etc/hosts\n", "leads out of"),
        ("path\nlink.mp4\n", "leads out of"),
        ("path\npipe:rm -rf .\n", "is an address, not a path"),
        ("path\nsubfile,,start,0,end,9,,:a.mp4\n", "line 2 has 8 cells, not 1"),
        ('path\n"concat:a.mp4|b.mp4"\n', "is an address, not a path"),
        ("path\nhttps://example.org/a.mp4\n", "is an address — give what it begins with"),
        ("path\nnone.mp4\n", "none of its 1 videos was found"),
        ('path\n"a.mp4\n' + "x" * 140_000, "line 2 is not CSV"),
        ('path,label\na.mp4,x\n\nb.mp4,"y\nc.mp4,z\n', "line 4 is not CSV"),
        ('path,label\na.mp4,"x"y"\n', "line 2 is not CSV"),
        ("path\nself.mp4\n", "none of its 1 videos was found"),
        ("path\n" + "x" * 5000 + ".mp4\n", "none of its 1 videos was found"),
        ("path,start,end\na.mp4,1,1e300\n", "line 2: start '1' and end '1e300'"),
        ("path," + "x" * 2_000_000 + "\na.mp4\n", "a line of more than"),
    ],
)
def test_lists_that_are_refused(videos: Path, text: str, said: str) -> None:
    (videos.parent / "secret.mp4").write_bytes(b"x")
    (videos / "link.mp4").symlink_to(videos.parent / "secret.mp4")
    (videos / "self.mp4").symlink_to("self.mp4")
    with pytest.raises(InputError, match=said):
        find("list", listed(videos, text))


def test_what_is_not_a_list(videos: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        find("list", videos)
    with pytest.raises(InputError, match="is not a text file"):
        (videos / "list.csv").write_bytes(b"path\n\xff\xfe\n")
        find("list", videos / "list.csv")


def test_paths_outside_are_for_those_who_allow_them(videos: Path, tmp_path: Path) -> None:
    source = listed(tmp_path, f"path\n{videos}/a.mp4\n", "mine.csv")
    (tmp_path / "root").mkdir()
    with pytest.raises(InputError, match="--allow-outside"):
        find("list", source, root=str(tmp_path / "root"))
    (found,) = find("list", source, root=str(tmp_path / "root"), allow_outside=True).sets
    assert found.name == "mine" and len(found.videos) == 1


def test_parquet(videos: Path, tmp_path: Path) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        lacking("pyarrow is not installed")

    columns = {
        "path": ["a.mp4", "d/e.mp4"],
        "label": ["x", None],
        "start": [0.5, None],
        "n": [1, 2],
    }
    parquet.write_table(pa.table(columns), tmp_path / "list.parquet")
    (found,) = find("list", tmp_path / "list.parquet", root=str(videos)).sets
    assert [video.shown for video in found.videos] == ["a.mp4 [0.5 s, end]", "d/e.mp4"]
    assert [video.metadata for video in found.videos] == [{"n": "1"}, {"n": "2"}]
    whole = (tmp_path / "list.parquet").read_bytes()
    for number in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[number] ^= 0xFF
        (tmp_path / "bad.parquet").write_bytes(damaged)
        with contextlib.suppress(InputError):
            find("list", tmp_path / "bad.parquet", root=str(videos))


# Folders of frames


def test_folders_of_frames(tmp_path: Path) -> None:
    src = tmp_path / "raw"
    whole = [picture(src / "run" / "v1" / f"frame_{n}.jpg", n) for n in range(12)]
    for number in range(12):
        picture(src / "walk" / "v2" / "cam 0" / f"{number:03}.png", number)
    picture(src / "walk" / "v2" / "cam 1" / "x.webp")
    (src / "walk" / "v2" / "notes.txt").write_text("no picture")
    picture(src / "walk" / "v2" / "cam 0" / "._000.png")
    out = tmp_path / "out"
    run(src, out, dataset="frames", frames=None, all_frames=True, frame_rate=10.0)
    shards = open_shards(str(out))
    records = {shards.record(video).source: video for video in range(len(shards))}
    assert set(records) == {"run/v1", "walk/v2/cam 0", "walk/v2/cam 1"}
    first = records["run/v1"]
    # In the order of the numbers, byte for byte.
    assert [shards.read_frame(first, n) for n in range(12)] == whole
    record = shards.record(first)
    assert record.frame_times == [n / 10 for n in range(12)] and record.source_fps == 10.0
    assert (record.label_name, record.width, record.height) == ("run", 40, 30)
    assert shards.frame_count(records["walk/v2/cam 0"]) == 12
    run(src, tmp_path / "two", dataset="frames", frames=None, all_frames=True, frame_rate=10.0,
        workers=2)  # fmt: skip
    assert hashes(tmp_path / "two") == hashes(out)
    (src / "run" / "v1" / ".DS_Store").write_bytes(b"of a file manager")
    run(src, tmp_path / "three", dataset="frames", frames=None, all_frames=True, frame_rate=10.0)
    assert hashes(tmp_path / "three") == hashes(out)


@pytest.mark.parametrize(
    ("dataset", "option", "settings"),
    [
        ("frames", "--keyframes", {"keyframes": True}),
        ("folder", "--frame-rate", {"frame_rate": 10.0}),
        ("wds", "--root", {"root": "/data"}),
        ("folder", "--allow-outside", {"allow_outside": True}),
    ],
)
def test_options_that_would_do_nothing(
    tmp_path: Path, dataset: str, option: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=f"^{option}: does nothing for dataset {dataset} — leave"):
        run(tmp_path, tmp_path / "out", dataset=dataset, **settings)


def test_frames_that_cannot_be_stored(tmp_path: Path) -> None:
    src = tmp_path / "raw"
    for number in range(5):
        picture(src / "good" / f"{number}.jpg", number)
        picture(src / "mixed sizes" / f"{number}.jpg", number, (40 + number, 30))
        picture(src / "wrong suffix" / f"{number}.png", number)
        (src / "wrong suffix" / f"{number}.png").rename(src / "wrong suffix" / f"{number}.jpg")
        picture(src / "text" / f"{number}.png", number)
    (src / "text" / "3.png").write_text("not a picture")
    picture(src / "cut" / "0.jpg")
    (src / "cut" / "0.jpg").write_bytes((src / "cut" / "0.jpg").read_bytes()[:-200])
    wide = Image.new("RGB", (66_000, 1))
    for name, shown in (("wide", wide), ("deep", Image.new("I;16", (40, 30)))):
        (src / name).mkdir()
        shown.save(src / name / "0.png")
    picture(src / "good" / "1\u00b22.jpg")
    run(src, tmp_path / "out", dataset="frames", max_failures=100)
    found = errors(tmp_path / "out" / "raw.errors.csv")
    assert sorted(found) == [
        *((name, "unreadable") for name in ("cut", "deep", "mixed sizes", "text", "wide")),
    ]
    assert "3.png is not a picture" in (tmp_path / "out" / "raw.errors.csv").read_text()
    with pytest.raises(InputError, match="holds no pictures"):
        (tmp_path / "empty").mkdir()
        find("frames", tmp_path / "empty")


def test_frames_are_shrunk_on_request(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "raw" / "a" / f"{number}.png", number, (80, 60))
    run(tmp_path / "raw", tmp_path / "out", dataset="frames", short_edge=30)
    record = open_shards(str(tmp_path / "out")).record(0)
    assert (record.width, record.height) == (40, 30)


def test_natural_order() -> None:
    names = ["f10.jpg", "f9.jpg", "f09.jpg", "g1.jpg", "10.jpg", "9.jpg", "f.jpg"]
    assert sorted(names, key=natural) == [
        *("9.jpg", "10.jpg", "f09.jpg", "f9.jpg", "f10.jpg", "f.jpg", "g1.jpg"),
    ]


# Pictures


def test_images_are_videos_of_one_frame(tmp_path: Path) -> None:
    src = tmp_path / "imagenet"
    for label in ("cat", "dog"):
        for number in range(3):
            picture(src / label / f"{number}.jpg", number)
    out = tmp_path / "out"
    run(src, out, dataset="images")
    shards = open_shards(str(out))
    assert len(shards) == 6 and shards.frame_counts.tolist() == [1] * 6
    assert sorted(shards.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    process = commands.start("pretrain", "--shards", out, "--out", tmp_path / "run")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.count("\n") == 1 and "which a triplet needs" in error


# Tars of videos


def tar_of(path: Path, members: dict[str, bytes | Path]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def test_tars_of_videos_as_video2dataset_writes_them(videos: Path, tmp_path: Path) -> None:
    web = tmp_path / "web: it's, here"
    told = {"caption": "a dog", "width": 64, "clips": [[1, 2]], "key": "000000001"}
    tar_of(
        web / "00000.tar",
        {
            "000000000.mp4": videos / "a.mp4",
            "000000000.txt": b"a cat\n",
            "000000001.json": json.dumps(told).encode(),
            "000000001.mp4": videos / "b, c.mp4",
            "000000001.cls": b"1",
            "000000002.json": b"{not json",
            "000000002.mp4": videos / "d/e.mp4",
            "000000003.json": b"{}",  # its download failed
            "000000004.0.mp4": videos / "a.mp4",  # several per key
            "000000004.1.mp4": videos / "b, c.mp4",
            "000000005.mp4": b"not a video",
            "../../escape.mp4": videos / "a.mp4",
            "._000000006.mp4": videos / "a.mp4",  # left by macOS
        },
    )
    tar_of(web / "00001.tar", {"000000000.webm": videos / "d/e.mp4"})  # wrong suffix, used key
    (web / "00002.tar").write_bytes((web / "00000.tar").read_bytes()[:5000])
    out = tmp_path / "out"
    run(web, out, dataset="wds", name="web", max_failures=50)
    shards = open_shards(str(out))
    records = {record.source: record for record in map(shards.record, range(len(shards)))}
    assert set(records) == {
        *(f"00000.tar/{name}.mp4" for name in ("000000000", "000000001", "000000002")),
        *("00000.tar/000000004.0.mp4", "00000.tar/000000004.1.mp4", "00000.tar/../../escape.mp4"),
        "00001.tar/000000000.webm",
    }
    assert not verify(str(out / "web.json")).faults
    assert records["00000.tar/000000000.mp4"].metadata == {"txt": "a cat"}
    assert records["00000.tar/000000001.mp4"].metadata == {
        "caption": "a dog",
        "width": "64",
        "key": "000000001",
    }
    assert records["00000.tar/000000001.mp4"].label == 1
    assert records["00000.tar/000000002.mp4"].metadata is None
    assert errors(out / "web.errors.csv") == [
        ("00000.tar/000000005.mp4", "unreadable"),
        ("00002.tar", "unreadable"),
    ]
    run(web, tmp_path / "two", dataset="wds", name="web", max_failures=50, workers=2)
    assert hashes(tmp_path / "two") == hashes(out)
    # The frames are those of the files.
    run(videos, tmp_path / "files")
    files = open_shards(str(tmp_path / "files"))
    of_file = {files.record(v).source: v for v in range(len(files))}
    of_tar = {shards.record(v).source: v for v in range(len(shards))}
    for tarred, plain in (("000000000", "a.mp4"), ("000000001", "b, c.mp4")):
        video, other = of_tar[f"00000.tar/{tarred}.mp4"], of_file[plain]
        for frame in range(4):
            assert shards.read_frame(video, frame) == files.read_frame(other, frame)


def test_tars_of_videos_are_divided_and_sandboxed(videos: Path, tmp_path: Path) -> None:
    tar_of(tmp_path / "web-000.tar", {"0.mp4": videos / "a.mp4"})
    pattern = f"{tmp_path}/web-{{000..000}}.tar"
    if shutil.which("bwrap") is None:
        lacking("bubblewrap is not installed")
    given = ["--sandbox", "prepare", "wds", "--src", pattern, "--clip-seconds=1", "--workers=1"]
    process = commands.start(*given, "--out", tmp_path / "out")
    assert process.communicate(timeout=60)[1] and process.returncode == 0
    shards = open_shards(str(tmp_path / "out"))
    found = {(shards.record(v).group, shards.record(v).start) for v in range(len(shards))}
    assert found == {("web-000.tar/0.mp4", 0.0), ("web-000.tar/0.mp4", 1.0)}


def test_tars_without_videos_are_refused(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", {"0.jpg": b"x", "0.json": b"{}"})
    with pytest.raises(InputError, match="its 1 tars hold no videos"):
        find("wds", tmp_path / "a.tar")
    with pytest.raises(InputError, match="4 of 4 shards do not exist"):
        find("wds", tmp_path / "none-{0..3}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="tar"):
        find("wds", tmp_path / "empty")


def row_of(line: int, video: Video) -> ListedVideo:
    named = (line, video.source, bytes(video.path), video.address, video.label_name, video.splits)
    return ListedVideo(*named, video.group, video.span, video.metadata)


def test_a_table_of_videos_is_a_sorted_list_of_them() -> None:
    rng = random.Random(5)
    for trial in range(30):
        videos: list[Video] = []
        for _ in range(rng.choice((1, 3, 40, 300))):
            name = f"{rng.choice('abcd')}/{rng.choice(('x', 'X', 'y.1', 'z w'))}.mp4"
            span = rng.choice((None, (0.0, 2.0), (310.0, 311.0), (2.5, math.inf)))
            videos.append(
                Video(
                    source=f"{rng.randrange(5)}/{name}" if trial % 2 else name,
                    path=Path("/root", name),
                    label_name=rng.choice((None, "one", "two")),
                    splits=rng.choice(({}, {"official": "train"})),
                    span=span,
                    metadata=rng.choice((None, {"a": "b"})),
                    address=rng.choice((None, "s3://b/x")),
                )
            )
        table = VideoTable()
        for line, video in enumerate(videos):
            table.add(row_of(line, video))
        repeated = table.finish(["one", "two"])
        first: dict[tuple[str, object], Video] = {}
        again = []
        for line, video in enumerate(videos):
            if first.setdefault((video.source, video.span), video) is not video:
                kept = first[video.source, video.span]
                again.append((line, video.shown, video.label_name != kept.label_name))
        numbered = [
            replace(v, label=None if v.label_name is None else ["one", "two"].index(v.label_name))
            for v in first.values()
        ]
        assert list(table) == sorted(keyed(numbered), key=_rank)
        assert repeated == again
        assert table[-1:] == [table[len(table) - 1]]


def test_many_videos_of_one_name_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # Eight digits of a digest collide among a hundred thousand; here four are enough to show it.
    monkeypatch.setattr("shards.format.KEY_DIGITS", (0, 2, 16))
    monkeypatch.setattr("pipelines._order.KEY_DIGITS", (0, 2, 16))
    videos = [Video(source=f"{n}/video.mp4", path=Path("v.mp4")) for n in range(60)]
    table = VideoTable()
    for line, video in enumerate(videos):
        table.add(row_of(line, video))
    assert table.finish([]) == []
    keys = [video.key for video in table]
    assert len(set(keys)) == 60 and {len(key) for key in keys} == {
        len("video-12"),
        len("video-") + 16,
    }
    assert sorted(keys) == sorted(video.key for video in keyed(videos))
