"""Feature folders: what is written is read, and nothing else passes for one."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from seco.data.splits import UNLABELLED
from seco.evaluation.splits import read_train_test
from seco.features import store as feature_writer
from seco.features.store import (
    ERRORS,
    FEATURES,
    FRAMES,
    HALVES,
    META,
    VIDEOS,
    FeaturePart,
    read_features,
    require_same_encoder,
    write_feature_parts,
    write_features,
)
from shards.errors import InputError
from tests.seco import made_features
from tests.seco.made_features import made_rows, write_clusters

HOSTILE = 'a,"b"\nc<script>=1+1'


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3, 4)).astype(np.float32)
    halves = rng.standard_normal((3, 2, 4)).astype(np.float32)
    rows = made_rows([0, None, 2], [{"1": "train", "2": "test"}, {}, {"2": "unused"}])
    rows[0] |= {"source": HOSTILE, "label_name": HOSTILE}
    write_features(tmp_path / "f", features, halves, rows, made_features.META)

    read = read_features(tmp_path / "f")
    np.testing.assert_array_equal(read.features, features)
    np.testing.assert_array_equal(read.halves, halves)
    assert read.keys == ["v000", "v001", "v002"]
    assert read.sources[0] == HOSTILE
    assert read.label_names == [HOSTILE, "", "class2"]
    assert read.labels.tolist() == [0, UNLABELLED, 2]
    assert read.splits == {"1": ["train", "", ""], "2": ["test", "", "unused"]}
    assert read.frames.tolist() == [30, 30, 30]
    assert read.shards == ["made-000.tar"] * 3
    assert read.encoder["dimension"] == 4
    assert read.meta["format_version"] == 1
    assert read.meta["shards"] == ["shards/made.json"]
    assert read.class_names() == {0: HOSTILE, 2: "class2"}
    header = (tmp_path / "f" / VIDEOS).read_text("utf-8").splitlines()[0]
    assert header == "key,source,label,label_name,frames,shard,split.1,split.2"


def test_a_name_that_is_no_unicode_does_not_lose_the_features(tmp_path: Path) -> None:
    rows = made_rows([0], [{}])
    rows[0]["source"] = "odd\udcff.avi"
    one = np.ones((1, 2), np.float32)
    write_features(tmp_path, one, np.ones((1, 2, 2), np.float32), rows, made_features.META)
    assert read_features(tmp_path).sources == ["odd\\udcff.avi"]


def test_a_write_that_is_cut_short_leaves_no_usable_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clusters(tmp_path)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(feature_writer, "_write_csv", fails)
    with pytest.raises(RuntimeError, match="killed"):
        write_clusters(tmp_path, videos=30)
    with pytest.raises(InputError, match="unfinished"):
        read_features(tmp_path)
    monkeypatch.undo()
    write_clusters(tmp_path, videos=30)
    assert len(read_features(tmp_path)) == 30
    assert not list(tmp_path.glob("*.part"))


def test_parts_give_the_bytes_of_the_whole(tmp_path: Path) -> None:
    """Also where a part has no video, and where splits are not those of the part before."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((5, 4)).astype(np.float32)
    halves = rng.standard_normal((5, 2, 4)).astype(np.float32)
    splits = [{"1": "train"}, {}, {"2": "test"}, {"0": "val"}, {}]
    rows = made_rows([0, 1, None, 2, 3], splits)
    for row, count in zip(rows, (2, 1, 3, 1, 1), strict=True):
        row["frames"] = count
    frames = rng.standard_normal((8, 4)).astype(np.float32)
    write_features(tmp_path / "whole", features, halves, rows, made_features.META, frames)

    def part(videos: slice, of: slice) -> FeaturePart:
        arrays = (features[videos], halves[videos], frames[of])
        return FeaturePart(lambda: rows[videos], lambda: arrays)

    nothing = np.empty((0, 0), np.float32)
    empty = FeaturePart(lambda: [], lambda: (nothing, nothing, nothing), [("k", "s", "lost, so")])
    parts = [empty, part(slice(0, 3), slice(0, 6)), empty, part(slice(3, 5), slice(6, 8))]
    write_feature_parts(tmp_path / "parts", parts, made_features.META)
    for name in (FEATURES, HALVES, FRAMES, VIDEOS, META):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with io.BytesIO() as plain:
        np.save(plain, frames)
        assert (tmp_path / "parts" / FRAMES).read_bytes() == plain.getvalue()
    assert (tmp_path / "parts" / ERRORS).read_text() == (
        'key,shard,message\nk,s,"lost, so"\nk,s,"lost, so"\n'
    )
    read = read_features(tmp_path / "parts")
    assert read.frame_offsets.tolist() == [0, 2, 3, 6, 7, 8]
    np.testing.assert_array_equal(read.frames_of(2), frames[3:6])

    # Without frames and errors none of those before are left.
    write_features(tmp_path / "parts", features, halves, rows, made_features.META)
    left = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert left == sorted([FEATURES, HALVES, VIDEOS, META])
    with pytest.raises(InputError, match="--per-frame"):
        read_features(tmp_path / "parts").frames_of(0)
    with pytest.raises(ValueError, match="cannot be appended to"):
        other = FeaturePart(lambda: rows[:1], lambda: (features[:1, :2], halves[:1, :, :2], None))
        write_feature_parts(
            tmp_path / "x", [part(slice(0, 3), slice(0, 6)), other], made_features.META
        )
    with pytest.raises(ValueError, match="no video"):
        write_feature_parts(tmp_path / "x", [empty], made_features.META)
    np.save(tmp_path / "whole" / FRAMES, frames[:-1])
    with pytest.raises(InputError, match=r"frames.npy is \(7, 4\), videos.csv says \(8, 4\)"):
        read_features(tmp_path / "whole")


def _meta(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        meta = json.loads((folder / META).read_text())
        (folder / META).write_text(json.dumps({**meta, **changes}))

    return change


def _without_a_row(folder: Path) -> None:
    lines = (folder / VIDEOS).read_text().splitlines(keepends=True)
    (folder / VIDEOS).write_text("".join(lines[:-1]))


def _replace_in_table(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / VIDEOS).read_text()
        assert old in text
        (folder / VIDEOS).write_text(text.replace(old, new, 1))

    return change


def _features(value: object) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / FEATURES, value)  # type: ignore[call-overload]


def _not_finite(folder: Path) -> None:
    halves = np.load(folder / HALVES)
    halves[7, 1, 3] = np.nan
    np.save(folder / HALVES, halves)


def _cut(folder: Path) -> None:
    data = (folder / FEATURES).read_bytes()
    (folder / FEATURES).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / META).unlink(), "unfinished"),
        (lambda f: (f / META).write_text("{"), "meta.json: does not describe features"),
        (lambda f: (f / META).write_text("[]"), "does not describe features"),
        (_meta(format_version=2), "format version 2"),
        (_meta(encoder={"sha256": "x", "dimension": 8}), "says 8 values"),
        (_meta(encoder={"dimension": 16}), "sha256"),
        (lambda f: (f / FEATURES).unlink(), "features.npy: is missing or damaged"),
        (_cut, "features.npy: is missing or damaged"),
        (_features(np.zeros((60, 16))), "float64"),
        (_features(np.zeros((60, 2, 8), np.float32)), "2-dimensional"),
        (_features(np.zeros((59, 16), np.float32)), "videos.csv has 60 rows, features.npy 59"),
        (_features(np.zeros((60, 15), np.float32)), "16 values per video"),
        (_not_finite, "v007 are not finite"),
        (_without_a_row, "videos.csv has 59 rows"),
        (_replace_in_table("v001,", "v000,"), "names a video twice"),
        (_replace_in_table("avi,1,", "avi,one,"), "row 2: label is 'one'"),
        (_replace_in_table("avi,1,", "avi,-1,"), "row 2: label is '-1'"),
        (_replace_in_table(",frames,", ",pictures,"), "no column frames"),
        (_replace_in_table("v001,", ""), "row 2 has 6 of 7 fields"),
        (lambda f: (f / VIDEOS).write_bytes(b"\xff\xfe"), "videos.csv: cannot be read"),
        (lambda f: (f / VIDEOS).write_bytes(b""), "no column key"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_clusters(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        read_features(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "—" in str(caught.value)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "exploded"),))  # type: ignore[return-value]

    write_clusters(tmp_path / "f")
    (tmp_path / "f" / FEATURES).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="damaged"):
        read_features(tmp_path / "f")
    assert not (tmp_path / "exploded").exists()


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such feature folder"):
        read_features(tmp_path / "absent")
    with pytest.raises(InputError, match="is not a feature folder"):
        read_features(tmp_path)
    (tmp_path / "parts").mkdir()  # what a stopped extraction leaves
    with pytest.raises(InputError, match=r"unfinished.*run `seco extract-features` again"):
        read_features(tmp_path)


def test_features_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    bad = np.full((1, 2), np.inf, np.float32)
    rows = made_rows([0], [{}])
    with pytest.raises(InputError, match="v000 are not finite"):
        write_features(tmp_path, bad, np.ones((1, 2, 2), np.float32), rows, made_features.META)
    with pytest.raises(ValueError, match="do not match"):
        write_features(tmp_path, bad, np.ones((2, 2, 2), np.float32), rows, made_features.META)


def test_features_of_two_encoders_do_not_mix(tmp_path: Path) -> None:
    write_clusters(tmp_path / "a")
    write_clusters(tmp_path / "b")
    write_clusters(tmp_path / "c", sha256="cd" * 32)
    a, b, c = (read_features(tmp_path / name) for name in "abc")
    require_same_encoder(a, b)
    with pytest.raises(InputError, match=r"another encoder .*cdcdcdcd.*abababab"):
        require_same_encoder(a, c)


def test_which_split_is_taken(tmp_path: Path) -> None:
    def split(*names: str, **wanted: str) -> tuple[str, str]:
        splits = [dict.fromkeys(names, "train" if n % 2 else "test") for n in range(60)]
        rows = made_rows([n % 3 for n in range(60)], splits)
        write_clusters(tmp_path, rows=rows)
        chosen = read_train_test(str(tmp_path), **wanted)  # type: ignore[arg-type]
        return chosen.train_split, chosen.test_split

    assert split("1", "2", "official") == ("1 train", "1 test")
    assert split("2", "official") == ("official train", "official test")
    assert split("mine") == ("mine train", "mine test")
    assert split("1", "2", split="2") == ("2 train", "2 test")
    assert split("1", train_value="test", test_value="train") == ("1 test", "1 train")
    with pytest.raises(InputError, match=r"several splits.*2, 3"):
        split("2", "3")
    with pytest.raises(InputError, match=r"no split '4'.*it has: 1"):
        split("1", split="4")
    with pytest.raises(InputError, match=r"no labelled trian rows.*split 1: test 30, train 30"):
        split("1", train_value="trian")
    with pytest.raises(InputError, match=r"has no splits.*--test-features"):
        split()


def test_val_stands_in_for_a_test_set_without_labels(tmp_path: Path) -> None:
    values = ["train", "val", "test"] * 20
    labels: list[int | None] = [None if v == "test" else n % 5 for n, v in enumerate(values)]
    labels[0] = None
    write_clusters(tmp_path, rows=made_rows(labels, [{"official": v} for v in values]))
    chosen = read_train_test(str(tmp_path))
    assert chosen.test_split == "official val"
    assert (len(chosen.train_rows), len(chosen.test_rows)) == (19, 20)
    assert chosen.notes() == ["1 videos without a label are left out"]


def test_train_and_test_in_two_folders(tmp_path: Path) -> None:
    labels: list[int | None] = [n % 3 for n in range(60)]
    rows = made_rows(labels, [{"official": "val"}] * 60)
    write_clusters(tmp_path / "train", rows=made_rows(labels, [{"official": "train"}] * 60))
    write_clusters(tmp_path / "val", rows=rows, shift=0.1)
    folders = (str(tmp_path / "train"), str(tmp_path / "val"))
    chosen = read_train_test(*folders)
    assert (chosen.train_split, chosen.test_split) == ("official train", "official val")
    assert len(chosen.train_rows) == len(chosen.test_rows) == 60

    for row in rows[1::3]:
        row["label_name"] = "another"
    write_clusters(tmp_path / "val", rows=rows)
    with pytest.raises(InputError, match=r"label 1 is 'another' here and 'class1' in"):
        read_train_test(*folders)
    write_clusters(tmp_path / "val", sha256="cd" * 32)
    with pytest.raises(InputError, match="another encoder"):
        read_train_test(*folders)
