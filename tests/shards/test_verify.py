"""``verify`` finds each fault that is planted, names its file, and finds nothing else."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from shards.errors import InputError
from shards.index import TarMember, build_index, read_index, tar_members, write_index
from shards.verify import reindex, verify
from tests.made_shards import drawn_frame, make_set


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_set(tmp_path / "set", videos=7, frames=4, per_shard=3)
    return tmp_path / "set"


def faults(folder: Path) -> list[str]:
    """Without the folder's name."""
    return [line.replace(f"{folder}/", "") for line in verify(str(folder / "made.json")).faults]


def member(folder: Path, name: str, tar: str = "made-001.tar") -> TarMember:
    (found,) = [row for row in tar_members(folder / tar) if row.name == name]
    return found


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewritten(tar: Path, change: Callable[[list[tuple[str, bytes]]], object]) -> None:
    """The tar with other members, and an index and a manifest row that fit it."""
    with tarfile.open(tar) as old:
        rows = [(info.name, old.extractfile(info).read()) for info in old]  # type: ignore[union-attr]
    change(rows)
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as new:
        for name, data in rows:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    index = build_index(tar)
    write_index(tar.with_suffix(".idx"), index)

    def fit(manifest: dict) -> None:  # type: ignore[type-arg]
        row = next(row for row in manifest["shards"] if row["file"] == tar.name)
        row |= {"bytes": index.info.bytes, "sha256": index.info.sha256}
        row |= {"videos": index.info.videos, "frames": index.info.frames}

    edit_json(tar.parent / "made.json", fit)


def test_a_good_set_has_no_faults(made: Path) -> None:
    found = verify(str(made / "made.json"))
    assert (found.faults, found.shards, found.videos, found.frames) == ([], 3, 7, 28)
    assert found == verify(str(made)) == verify(str(made / "made-*.tar"), workers=3)
    assert "no faults" in found.table()


def test_it_writes_nothing(made: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in made.iterdir()}
    verify(str(made))
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in made.iterdir()}


def test_a_flipped_bit_in_a_picture(made: Path) -> None:
    tar = made / "made-001.tar"
    frame = member(made, "video_0004.0002.jpg")
    at = frame.offset + frame.size // 2
    overwrite(tar, at, bytes([tar.read_bytes()[at] ^ 4]))
    first, *rest = faults(made)
    assert first == "made-001.tar: its sha256 differs from the manifest's: it has been altered"
    # The index has the tar's old sha256; whether the picture still decodes is up to the bit.
    assert all(line.startswith("made-001.tar: ") for line in rest)
    assert any("differs from the tar in info" in line for line in rest)


def test_a_flipped_bit_in_a_header(made: Path) -> None:
    frame = member(made, "video_0004.0002.jpg")
    overwrite(made / "made-001.tar", frame.offset - 400, b"\xff")
    (line,) = faults(made)
    assert line.startswith("made-001.tar: is truncated or not a tar")


def test_a_flipped_bit_in_a_record(made: Path) -> None:
    record = member(made, "video_0004.json")
    overwrite(made / "made-001.tar", record.offset, b"[")
    lines = faults(made)
    assert any("video_0004.json: is not a video record" in line for line in lines)
    assert any("has been altered" in line for line in lines)
    assert all(line.startswith("made-001.tar: ") for line in lines)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_tar(made: Path, share: float) -> None:
    tar = made / "made-002.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: int(len(whole) * share)])
    lines = faults(made)
    assert all(line.startswith("made-002.tar: ") for line in lines)
    assert "truncated" in lines[0] or "bytes, the manifest says" in lines[0]


def test_a_lost_tar_and_one_too_many(made: Path) -> None:
    (made / "made-001.tar").rename(made / "made-009.tar")
    assert faults(made) == [
        "made-001.tar: is missing, listed in made.json",
        "made-009.tar: is not listed in made.json",
    ]


def test_a_lost_index_and_one_of_another_tar(made: Path) -> None:
    (made / "made-001.idx").unlink()
    assert faults(made) == ["made-001.tar: has no index; run `seco index`"]
    shutil.copy(made / "made-000.idx", made / "made-001.idx")
    lines = faults(made)
    assert lines and all(
        line.startswith("made-001.tar: its index differs from the tar") for line in lines
    )
    assert any("in keys" in line for line in lines)
    (made / "made-001.idx").write_bytes(b"SECOIDX2 and nothing")
    (line,) = faults(made)
    assert "its index is not a complete index" in line
    reindex(str(made / "made-001.tar"))
    assert not faults(made)


@pytest.mark.parametrize("part", ["label", "frame_offset", "frame_crc", "record_size", "splits"])
def test_an_altered_index(made: Path, part: str) -> None:
    path = made / "made-000.idx"
    index = read_index(path)
    if part == "splits":
        details = index.details.tobytes().replace(b'"test"', b'"tent"', 1)
        changed = replace(index, details=np.frombuffer(details, dtype=np.uint8))
    else:
        value = getattr(index, part)
        changed = replace(index, **{part: value - (value > 0)})
    write_index(path, changed)
    (line,) = faults(made)
    assert f"made-000.tar: its index differs from the tar in {part}" in line


def test_altered_manifests(made: Path) -> None:
    edit_json(made / "made.json", lambda m: m["shards"][1].update(frames=99))
    assert faults(made) == ["made-001.tar: holds 12 frames, the manifest says 99"]
    edit_json(made / "made.json", lambda m: m["shards"][1].update(frames=12))
    edit_json(made / "made.json", lambda m: m.update(excluded=2))
    (line,) = faults(made)
    assert line == "made.errors.csv: 0 rows, but made.json says 2 videos are excluded"
    (made / "made.errors.csv").write_text("source,kind,message\na,missing,x\nb,missing,x\n")
    assert not faults(made)
    edit_json(made / "made.json", lambda m: m.update(label_names=["Circle", "Square"]))
    assert faults(made) == ["made.json: names 2 labels, but label 2 occurs"]
    edit_json(made / "made.json", lambda m: m.update(label_names=[]))  # as of tars with KEY.cls
    assert not faults(made)


def test_pictures_cut_short_swapped_or_of_another_size(made: Path) -> None:
    tar = made / "made-000.tar"

    def spoil(rows: list[tuple[str, bytes]]) -> None:
        names = [name for name, _ in rows]
        cut = names.index("video_0001.0001.jpg")
        rows[cut] = (rows[cut][0], rows[cut][1][:-20])
        other = names.index("video_0002.0000.jpg")
        rows[other] = (rows[other][0], drawn_frame(1, 1, (40, 64)))

    rewritten(tar, spoil)
    assert faults(made) == [
        "made-000.tar: video_0001.0001.jpg: does not decode (Premature end of JPEG file)",
        "made-000.tar: video_0002.0000.jpg: is 64x40, its record says 64x48",
    ]


def test_frames_out_of_order_or_lacking(made: Path) -> None:
    def spoil(rows: list[tuple[str, bytes]]) -> None:
        rows[2], rows[3] = rows[3], rows[2]
        del rows[8]

    rewritten(made / "made-000.tar", spoil)
    lines = faults(made)
    assert [line.split(": ")[1] for line in lines] == [
        "video_0000",
        "video_0001",
        "video_0001.json",
    ]
    assert "3 frame times" not in lines[2] and "4 frame times for 3 frames" in lines[2]


def test_a_key_that_occurs_twice(made: Path) -> None:
    with tarfile.open(made / "made-000.tar") as first:
        rows = [(i.name, first.extractfile(i).read()) for i in first]  # type: ignore[union-attr]
    rewritten(made / "made-001.tar", lambda other: other.extend(rows[:5]))
    lines = faults(made)
    assert lines == [f"made-00{n}.tar: the key video_0000 occurs 2 times" for n in (0, 1)]


def test_a_header_that_claims_a_huge_picture(made: Path) -> None:
    def spoil(rows: list[tuple[str, bytes]]) -> None:
        name, data = rows[1]
        at = data.index(b"\xff\xc0") + 5
        rows[1] = (name, data[:at] + struct.pack(">HH", 65500, 65500) + data[at + 4 :])

    rewritten(made / "made-000.tar", spoil)
    (line,) = faults(made)
    assert line.startswith("made-000.tar: video_0000.0000.jpg: does not decode (65500x65500 px are")


def test_many_faults_of_one_shard_are_counted(made: Path) -> None:
    rewritten(
        made / "made-000.tar",
        lambda rows: rows.__setitem__(
            slice(None), [(n, d[:-9] if n.endswith("jpg") else d) for n, d in rows]
        ),
    )
    lines = faults(made)
    assert len(lines) == 11
    assert lines[-1] == "made-000.tar: 2 more faults"


def foreign(folder: Path, frames: int = 2) -> Path:
    """As WebDataset writes them: long names, folders, ``.cls`` labels, no records of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "foreign-000000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(5):
            key = f"class{number % 2}/{'long' * 40}{number}"
            pictures = {f"{n}.jpg": drawn_frame(number, n) for n in range(frames)}
            writer.write({"__key__": key, "cls": number % 2, **pictures})
    return path


def test_foreign_tars(tmp_path: Path) -> None:
    tar = foreign(tmp_path)
    found = verify(str(tar))
    assert found.faults == [f"{tar}: has no index; run `seco index`"]
    assert (found.videos, found.frames) == (5, 10)
    assert "no manifest lists it" in found.table()
    assert reindex(str(tar)) == "1 indexes written, 0 already existed"
    assert not verify(str(tar)).faults
    index = read_index(tar.with_suffix(".idx"))
    assert index.label.tolist() == [0, 1, 0, 1, 0]
    assert index.keys[3] == f"class1/{'long' * 40}3"
    assert reindex(str(tar)) == "0 indexes written, 1 already existed"


def test_an_index_made_again_is_the_one_that_was(made: Path) -> None:
    paths = sorted(made.glob("*.idx"))
    before = [path.read_bytes() for path in paths]
    assert reindex(str(made), force=True) == "3 indexes written, 0 already existed"
    assert [path.read_bytes() for path in paths] == before


def test_an_index_of_another_tar_hands_nothing_on(made: Path) -> None:
    rewritten(made / "made-000.tar", lambda rows: rows.pop())
    shutil.copy(made / "made-001.idx", made / "made-000.idx")
    reindex(str(made / "made-000.tar"))
    assert read_index(made / "made-000.idx").plan_digest == ""
    assert not [line for line in faults(made) if "index" in line]


def test_tars_that_cannot_be_indexed_are_named_and_the_rest_is_done(made: Path) -> None:
    for path in made.glob("*.idx"):
        path.unlink()
    (made / "made-001.tar").write_bytes((made / "made-001.tar").read_bytes()[:3000])
    with pytest.raises(InputError, match=r"1 of 3 shards could not be indexed: .*made-001\.tar"):
        reindex(str(made))
    assert sorted(path.name for path in made.glob("*.idx")) == ["made-000.idx", "made-002.idx"]


@pytest.mark.parametrize("spec", ["none.json", "none-*.tar", "none"])
def test_sets_that_are_not_there(tmp_path: Path, spec: str) -> None:
    with pytest.raises(InputError):
        verify(str(tmp_path / spec))
