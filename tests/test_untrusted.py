"""Files, names and surroundings that are not what they should be: one line each, and no harm."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cli
from pipelines._adapter import find_videos
from seco.data.crops import BrokenJpeg, decode_jpeg
from shards.dataset import expand_spec
from shards.errors import InputError
from shards.format import VideoRecord, read_manifest
from shards.index import read_index, tar_members
from shards.opening import open_shards
from shards.terminal import printable
from shards.untrusted import max_pixels, open_regular, read_regular
from shards.writer import ShardWriter
from tests import commands
from tests.made_shards import drawn_frame, make_set
from tests.pipelines.made_videos import draw_video
from tests.pipelines.running import wait_until
from tests.seco.made_features import write_clusters

SMALL = ("--arch=resnet10_w16", "--crop-size=32", "--batch-size=4", "--device=cpu", "--workers=0")
TRAINING = (*SMALL, "--bn-group=2", "--epochs=1", "--queue-size=12", "--log-every=1")
FEATURES = ("--frames=3", "--short-edge=36", *SMALL)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(tmp_path_factory.mktemp("shards"), videos=18, frames=4, per_shard=7)


@pytest.fixture(scope="module")
def run(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert cli.run(["pretrain", "--shards", shards, "--out", str(out), *TRAINING]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line in which a command refuses what it is given."""
    capsys.readouterr()
    assert cli.run([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("seco: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


# Names.


def test_a_name_that_is_not_utf8_is_prepared_and_can_be_told(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    draw_video(raw / "plain.mp4")
    for name in (b"caf\xe9.mp4", rb"a\b.mp4"):
        shutil.copy(raw / "plain.mp4", os.fsencode(raw) + b"/" + name)
    for options in (("--dry-run",), ()):
        process = commands.start(
            *("prepare", "folder", "--src", raw, "--out", tmp_path / "set", *options),
            PYTHONIOENCODING="ascii",
        )
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    opened = open_shards(str(tmp_path / "set" / "raw.json"))
    sources = [source for index in opened.indexes for source, _ in index.sources]
    assert sorted(sources) == [r"a\\b.mp4", r"caf\xe9.mp4", "plain.mp4"]
    assert [opened.record(video).source for video in range(3)] == sources
    for source, path in find_videos(raw):
        told = source.encode("utf-8").decode("unicode_escape").encode("latin-1")
        assert told == os.fsencode(path.name)
    process = commands.start("verify", tmp_path / "set" / "raw.json")
    said, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "no faults" in said, error


def test_control_characters_are_escaped_wherever_names_are_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\u202e\r\x9b2J"
    with ShardWriter(tmp_path / "evil-000.tar") as writer:
        for video in range(6):
            record = VideoRecord(
                key=f"k{video}{evil}",
                dataset=evil,
                source=evil,
                label=video % 2,
                label_name=evil,
                splits={evil: evil, "1": ("train", "test")[video % 3 == 0]},
                frame_times=[0.0] * 3,
                width=64,
                height=48,
            )
            writer.add(record, [drawn_frame(video, n) for n in range(3)])
    tar = str(tmp_path / "evil-000.tar")
    features = tmp_path / f"features{evil}"
    calls: list[list[object]] = [
        ["inspect", tar],
        ["verify", tar],
        ["extract-features", "--shards", tar, "--checkpoint=random", "--out", features, *FEATURES],
        ["probe", "--features", features],
        ["probe", "--features", features, "--split", evil],
        ["retrieve", "evaluate", "--features", features],
        ["retrieve", "query", "--features", features, "--video", evil],
        ["pretrain", "--shards", tar, "--out", tmp_path / "run", *TRAINING, "--split", evil],
        ["export", tmp_path / evil, "--format=moco", "--out", tmp_path / "x"],
    ]
    for arguments in calls:
        cli.run([str(a) for a in arguments])
        shown = capfd.readouterr()
        for text in (shown.out, shown.err):
            assert not set("\x1b\x07\x9b\u202e") & set(text), arguments
            assert "Traceback" not in text
    assert printable("a\x1b[31m\u202e\udce9\u3000é") == "a\\x1b[31m\\u202e\\udce9\u3000é"


# Pictures.


def claiming(jpeg: bytes, width: int, height: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def test_a_picture_that_claims_a_huge_size_takes_no_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = claiming(drawn_frame(0, 0), 65_500, 65_500)
    with pytest.raises(BrokenJpeg, match="65500x65500 px are more than 64 megapixels"):
        decode_jpeg(bomb)
    with ShardWriter(tmp_path / "bomb-000.tar") as writer:
        for video in range(8):
            record = VideoRecord(key=f"v{video}", dataset="", source="", frame_times=[0.0] * 3)
            frames = [bomb if video == 3 else drawn_frame(video, n) for n in range(3)]
            writer.add(record, frames)
    tar = str(tmp_path / "bomb-000.tar")
    out = tmp_path / "features"
    arguments = ["--shards", tar, "--checkpoint=random", "--out", str(out), "--max-failures=20"]
    assert cli.run(["extract-features", *arguments, *FEATURES]) == 0
    assert "left out: v3: " in capsys.readouterr().err
    arguments = ["--shards", tar, "--out", str(tmp_path / "run"), "--max-unreadable=50"]
    assert cli.run(["pretrain", *arguments, *TRAINING]) == 0
    assert "v3: broken JPEG" in capsys.readouterr().err
    monkeypatch.setenv("SECO_MAX_PIXELS", "4000")  # so that it is as before after the test
    assert cli.run(["--max-pixels", "3000", "verify", tar]) == 1
    assert "64x48 px are more than 0 megapixels" in capsys.readouterr().out
    monkeypatch.setenv("SECO_MAX_PIXELS", "many")
    max_pixels.cache_clear()
    assert "SECO_MAX_PIXELS: is not a whole number" in refused(
        capsys, "extract-features", "--shards", tar, "--checkpoint=random", "--out", out, *FEATURES,
        "--overwrite", "--seed=1",
    )  # fmt: skip
    monkeypatch.undo()
    max_pixels.cache_clear()


@pytest.mark.parametrize(
    ("shape", "fault"),
    [
        ((1000, 1), "unreadable,pictures of 64000x48 cannot be stored"),
        ((10**6, 1), "zero-frames,"),
    ],
)
def test_pixels_of_an_extreme_shape_are_one_excluded_video(
    tmp_path: Path, shape: tuple[int, int], fault: str
) -> None:
    draw_video(tmp_path / "raw" / "good.mp4")
    odd = draw_video(tmp_path / "raw" / "odd.mp4", options=("-c:v", "libx264", "-aspect", "2:1"))
    data = odd.read_bytes()
    at = data.index(b"pasp") + 4
    odd.write_bytes(data[:at] + struct.pack(">II", *shape) + data[at + 8 :])
    arguments = ["prepare", "folder", "--src", str(tmp_path / "raw"), "--out", str(tmp_path / "s")]
    assert cli.run([*arguments, "--max-failures=50", "--workers=1"]) == 0
    table = (tmp_path / "s" / "raw.errors.csv").read_text()
    assert f"odd.mp4,{fault}" in table


# Metadata.


def damaged_manifest(change: Callable[[dict[str, Any]], object], shards: str, out: Path) -> Path:
    content = json.loads(Path(shards).read_text())
    change(content)
    (out / "made.json").write_text(json.dumps(content))
    return out / "made.json"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: c["shards"][0].update(file=""), "shards[0].file"),
        (lambda c: c["shards"][0].update(file=".."), "shards[0].file"),
        (lambda c: c["shards"][1].update(file="../made-001.tar"), "shards[1].file"),
        (lambda c: c["shards"][1].update(videos=-1), "shards[1].videos"),
        (lambda c: c["shards"][1].update(bytes=1.5), "shards[1].bytes"),
        (lambda c: c["shards"][1].update(frames=True), "shards[1].frames"),
        (lambda c: c.update(shards=7), "shards"),
        (lambda c: c.update(label_names=[1]), "label_names[0]"),
        (lambda c: c.update(excluded=10**400), "excluded"),
    ],
)
def test_a_manifest_with_a_wrong_field(
    change: Callable[[dict[str, Any]], object], field: str, shards: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is not a shard manifest") as caught:
        read_manifest(damaged_manifest(change, shards, tmp_path))
    assert f"({field}: " in str(caught.value)


def test_a_manifest_without_a_field(shards: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing required field `name`"):
        read_manifest(damaged_manifest(lambda c: c.pop("name"), shards, tmp_path))


def test_json_that_is_deep_huge_or_not_finite(tmp_path: Path) -> None:
    for text in ("[" * 100_000, '{"format_version": NaN}', '{"format_version": 1e999}', "\ud800"):
        (tmp_path / "made.json").write_text(text, errors="surrogatepass")
        with pytest.raises(InputError, match="is not a shard manifest"):
            read_manifest(tmp_path / "made.json")


@pytest.mark.parametrize("field", ["videos", "frames", "bytes", "key_text"])
@pytest.mark.parametrize("value", [-1, 0, 2**62, None, "1", [1]])
def test_an_index_with_a_wrong_count(
    field: str, value: object, shards: str, tmp_path: Path
) -> None:
    data = Path(shards).with_name("made-000.idx").read_bytes()
    length = int.from_bytes(data[8:16], "little")
    header = json.loads(data[16 : 16 + length])
    header["text_bytes" if field == "key_text" else "info"][field] = value
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "made-000.idx"
    path.write_bytes(data[:8] + len(text).to_bytes(8, "little") + text + data[16 + length :])
    with pytest.raises(InputError, match="is not a complete index"):
        read_index(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"frame_times": [float("nan")]},
        {"frame_times": [float("inf")]},
        {"width": -5},
        {"width": 10**9},
        {"label": -3},
        {"label": "one"},
        {"splits": {"1": 2}},
        {"boxes": [[1, 2, 3]]},
        {"source": 7},
    ],
)
def test_a_record_with_a_wrong_field(fields: dict[str, Any]) -> None:
    content = {"format_version": 1, "key": "k", "dataset": "", "source": "", **fields}
    with pytest.raises(InputError, match="is not a video record"):
        VideoRecord.from_json(json.dumps(content).encode(), "k.json")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m.update(shards=7), "shards: expected"),
        (lambda m: m.update(frames="x"), "frames: expected"),
        (lambda m: m["encoder"].update(dimension=0), "encoder.dimension: expected"),
        (lambda m: m["encoder"].update(sha256=None), "encoder.sha256: expected"),
        (lambda m: m.update(encoder=[]), "encoder: expected"),
    ],
)
def test_features_with_a_wrong_field(
    change: Callable[[dict[str, Any]], object],
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_clusters(tmp_path / "f")
    meta = json.loads((tmp_path / "f" / "meta.json").read_text())
    change(meta)
    (tmp_path / "f" / "meta.json").write_text(json.dumps(meta))
    assert what in refused(capsys, "probe", "--features", tmp_path / "f")


@pytest.mark.parametrize("shape", [(0, 8), (24, 0), (24,), ()])
def test_features_of_no_dimension(
    shape: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clusters(tmp_path / "f")
    np.save(tmp_path / "f" / "features.npy", np.zeros(shape, np.float32))
    assert "features.npy: holds float32 " in refused(capsys, "probe", "--features", tmp_path / "f")


# Checkpoints.


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(step=torch.tensor(3)),
        lambda c: c.update(unreadable=-1),
        lambda c: c.update(videos=7),
        lambda c: c.update(torch_rng=torch.zeros(3)),
        lambda c: c.update(torch_rng=5),
        lambda c: c.update(config=[]),
        lambda c: c["config"].update(arch=torch.zeros(2)),
        lambda c: c["config"].update(bn_group="two"),
        lambda c: c["config"].update(lr=torch.ones(1)),
        lambda c: c["model"].update({"queue.next_slot": 5}),
        lambda c: c["model"].update({"queue.rows": torch.zeros(1).expand(12, 128)}),
        lambda c: c["model"].update({"queue.rows": torch.zeros(12, 128).to_sparse()}),
        lambda c: c["model"].update({"queue.rows": torch.zeros(12, 128, dtype=torch.complex64)}),
        lambda c: c.update(more=deep(40)),
        lambda c: c.update(more=2**80),
        lambda c: c.update(optimizer=7),
        lambda c: c.update(optimizer={"state": [], "param_groups": 3}),
        lambda c: c["optimizer"]["state"].update({10**6: {}}),
        lambda c: c["optimizer"]["state"].update({0: {"momentum_buffer": torch.zeros(1)}}),
        lambda c: c["optimizer"]["state"].update({0: {"momentum_buffer": torch.zeros(10**6)}}),
        lambda c: c["optimizer"]["state"].update({0: 5}),
    ],
)
def test_a_run_is_not_resumed_from_a_damaged_checkpoint(
    change: Callable[[dict[str, Any]], object],
    run: Path,
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = torch.load(run / "last.pt", weights_only=True)
    content["step"] = 2
    change(content)
    torch.save(content, tmp_path / "last.pt")
    arguments = ("--shards", shards, "--out", tmp_path, *TRAINING, "--resume=auto")
    assert "last.pt: " in refused(capsys, "pretrain", *arguments)


def test_what_a_checkpoint_says_of_its_optimizer_does_not_matter(
    run: Path, shards: str, tmp_path: Path
) -> None:
    """The settings say it, and they are compared."""
    content = torch.load(run / "last.pt", weights_only=True)
    content["optimizer"]["param_groups"] = [{"params": [0], "lr": "fast", "momentum": None}]
    torch.save(content, tmp_path / "last.pt")
    arguments = ["--shards", shards, "--out", str(tmp_path), *TRAINING, "--resume=auto"]
    assert cli.run(["pretrain", *arguments]) == 0


def test_a_compressed_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import zipfile

    torch.save({"x": torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for row in plain.infolist():
            bomb.writestr(row.filename, plain.read(row))
    line = refused(capsys, "export", tmp_path / "bomb.pt", "--format=moco", "--out", tmp_path / "x")
    assert "bomb.pt: is not a checkpoint, or is damaged" in line


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("epochs = [1]", "epochs is not a plain value"),
        ("epochs = inf", "epochs is inf, not a whole number"),
        ("epochs = 1.5", "epochs is 1.5, not a whole number"),
        ("lr = {a = 1}", "lr is not a plain value"),
        ("shards = [[1]]", "shards is not a plain value"),
        ("tasks = 1979-05-27", "tasks is not a plain value"),
        ("nothing = 1", "unknown option 'nothing'"),
    ],
)
def test_a_config_file_with_a_wrong_value(
    line: str, what: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text(line)
    arguments = ("--shards", shards, "--config", tmp_path / "config.toml", *TRAINING[:-3])
    assert what in refused(capsys, "pretrain", "--out", tmp_path / "out", *arguments)


class Sized:
    """Pickled as a bytearray of a length that only the file says."""

    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return bytearray, (10**11,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_names_its_own_size_is_refused(
    zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"x": Sized()}, tmp_path / "sized.pt", _use_new_zipfile_serialization=zipped)
    line = refused(
        capsys, "export", tmp_path / "sized.pt", "--format=moco", "--out", tmp_path / "x"
    )
    assert "sized.pt: is not a checkpoint, or is damaged" in line


def test_features_that_cannot_be_read_are_not_replaced_unasked(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("extract-features", "--shards", shards, "--checkpoint=random", "--out", tmp_path)
    assert cli.run([str(a) for a in (*arguments, *FEATURES)]) == 0
    meta = (tmp_path / "meta.json").read_text()
    (tmp_path / "meta.json").write_text(meta.replace('"format_version": 1', '"format_version": 2'))
    line = refused(capsys, *arguments, *FEATURES, "--seed=1")
    assert "already holds features that cannot be read" in line


# What is not a file.


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_files_are_read(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clusters(tmp_path / "f")
    path = tmp_path / "odd"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="is not a file"):
        open_regular(path)
    for arguments in (
        ("export", path, "--format=moco", "--out", tmp_path / "x"),
        ("probe", "--features", path),
        ("verify", path),
        ("track", "run", "--video", path, "--box=1,1,9,9", "--tracker", path),
    ):
        assert str(path) in refused(capsys, *arguments)
    for name in ("features.npy", "videos.csv", "meta.json"):
        kept = tmp_path / "f" / f"{name}.kept"
        (tmp_path / "f" / name).rename(kept)
        path.rename(tmp_path / "f" / name)
        assert name in refused(capsys, "probe", "--features", tmp_path / "f") or name == "meta.json"
        (tmp_path / "f" / name).rename(path)
        kept.rename(tmp_path / "f" / name)
    with pytest.raises(InputError, match="is larger than 0 MiB"):
        read_regular(tmp_path / "f" / "videos.csv", most=10)


# Patterns and headers.


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..99999999999}",
        "{0..5}{0..9999}{0..9999}",
        "<0..99999999999999999999999999>",
        "{0..-99999999..1}",
        "{a,b}" * 40,
        "{" * 50 + "a,b" + "}" * 50 + "{0..999999999}",
    ],
)
def test_a_pattern_of_too_many_names_is_refused_at_once(pattern: str) -> None:
    with pytest.raises(InputError, match="names more than 1000000 shards"):
        expand_spec(f"s3://bucket/x-{pattern}.tar")
    assert len(expand_spec("s3://bucket/x-{000..999}.tar")) == 1000
    assert expand_spec("s3://b/{x,y-{1..2}}.tar") == [
        "s3://b/x.tar", "s3://b/y-1.tar", "s3://b/y-2.tar",
    ]  # fmt: skip


def test_a_tar_header_of_any_length_is_refused(tmp_path: Path) -> None:
    for number, kind in enumerate((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)):
        path = tmp_path / f"{number}.tar"
        with open(path, "wb") as out:
            info = tarfile.TarInfo("x")
            info.type, info.size = kind, 1 << 20
            out.write(info.tobuf(tarfile.USTAR_FORMAT) + b"1" * (1 << 20) + bytes(1 << 14))
        with pytest.raises(InputError, match="a header of 1048576 bytes"):
            list(tar_members(path))
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("d" * 300 + ".jpg"))
    (tmp_path / "long.tar").write_bytes(whole.getvalue())
    assert [len(member.name) for member in tar_members(tmp_path / "long.tar")] == [304]


# Surroundings.


def test_an_out_that_leads_to_itself(
    shards: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for arguments in (
        ("pretrain", "--shards", shards, "--out", loop, *TRAINING),
        ("extract-features", "--shards", shards, "--checkpoint=random", "--out", loop, *FEATURES),
        ("report", "--out", loop / "r.html", run),
        ("prepare", "folder", "--src", loop, "--out", loop),
    ):
        assert "loop" in refused(capsys, *arguments)


def test_a_disk_of_a_few_bytes_is_one_line(shards: str, tmp_path: Path) -> None:
    """Of TensorBoard's thread as well."""
    code = (
        "import resource, signal, sys, cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "sys.exit(cli.run(sys.argv[1:]))"
    )
    for number in range(3):
        out = tmp_path / str(number)
        process = commands.start(
            "-c", code, "pretrain", "--shards", shards, "--out", out, *TRAINING
        )
        _, error = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in error, error
        assert not list(out.rglob("*.pt*"))


def test_a_closed_terminal_stops_preparing_as_ctrl_c_does(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    draw_video(raw / "0.mp4", frames=40, size="320x240")
    for number in range(1, 60):
        shutil.copy(raw / "0.mp4", raw / f"{number}.mp4")
    out = tmp_path / "set"
    options = ("--out", out, "--workers=2", "--videos-per-shard=2")
    process = commands.start("prepare", "folder", "--src", raw, *options)
    wait_until(lambda: any(out.glob("*.idx")) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGHUP)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in error, error
    assert "run the same command again" in error
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("pause", [0.0, 0.002, 0.02])
def test_ctrl_c_twice_is_quiet(tmp_path: Path, pause: float) -> None:
    import time

    draw_video(tmp_path / "raw" / "0.mp4", frames=300, size="320x240")
    for number in range(1, 9):
        shutil.copy(tmp_path / "raw" / "0.mp4", tmp_path / "raw" / f"{number}.mp4")
    out = tmp_path / "set"
    options = ("--out", out, "--workers=2", "--videos-per-shard=1")
    process = commands.start("prepare", "folder", "--src", tmp_path / "raw", *options)
    wait_until(lambda: out.is_dir() or process.poll() is not None)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(pause)  # of any length: the second signal may come at any moment
    _, error = process.communicate(timeout=60)
    assert process.returncode in (75, -2) and "Traceback" not in error, error
    assert not list(out.glob("*.part"))
