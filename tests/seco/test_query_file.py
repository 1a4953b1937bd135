"""A video file as the query: its feature is that of the same video in the set."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cli import run
from pipelines._files import decode_file
from seco.evaluation.query import encode_frames, frames_of_file
from seco.features.store import read_features
from shards.errors import InputError
from shards.opening import open_shards
from tests.browser import open_page
from tests.pipelines.made_videos import draw_video


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/, shards/ and features/ of four drawn videos."""
    folder = tmp_path_factory.mktemp("query")
    for number in range(4):
        draw_video(folder / f"raw/v{number}.mp4", size=f"{64 + 16 * number}x48", frames=9)
    prepare = ["prepare", "folder", "--src", str(folder / "raw"), "--frames", "5"]
    assert run([*prepare, "--out", str(folder / "shards"), "--workers", "1"]) == 0
    size = ["--frames", "8", "--short-edge", "32", "--crop-size", "32", "--workers", "0"]
    shards = ["--shards", str(folder / "shards/raw.json"), "--out", str(folder / "features")]
    random = ["--checkpoint", "random", "--arch", "resnet18", "--seed", "3"]
    assert run(["extract-features", *shards, *random, *size]) == 0
    return folder


def test_its_feature_is_the_sets(prepared: Path) -> None:
    features = read_features(prepared / "features")
    shards = open_shards(str(prepared / "shards/raw.json"))
    for number in range(4):
        file = prepared / f"raw/v{number}.mp4"
        frames = frames_of_file(file, features, shards, decode_file, 60)
        row = features.find(f"v{number}")
        stored = [shards.read_frame(shards.find(f"v{number}"), n) for n in range(5)]
        assert frames == stored  # same frames, size and quality as prepared
        np.testing.assert_allclose(
            encode_frames(frames, features, None), features.features[row], atol=1e-5
        )


def test_the_page_of_a_file(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "mine <b>.mp4", tmp_path / "near.html"
    shutil.copy(prepared / "raw/v2.mp4", file)
    command = ["retrieve", "query", "--features", str(prepared / "features")]
    command += ["--file", str(file), "--html", str(page), "--neighbours", "3"]
    assert run(command) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:3] == ["1", "1.000", "v2"]
    assert [line.split()[0] for line in shown] == ["1", "2", "3", str(page)]
    opened = open_page(page)
    assert opened.faults() == []
    assert len(opened.images) == 5 + 3 * 3
    assert "Nearest to mine <b>.mp4" in opened.text
    nearest = opened.text.partition("The nearest 3")[2]
    assert nearest.split()[nearest.split().index("1.000") :].index("v2") < 8  # the first


def test_what_is_refused(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, file = str(prepared / "features"), str(prepared / "raw/v0.mp4")
    page = tmp_path / "near.html"
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 50)
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{file}\n#EXT-X-ENDLIST\n")
    for arguments, words in (
        ([], "--video KEY, --file PATH"),
        (["--video", "v0", "--file", file], "--video KEY, --file PATH"),
        (["--video", "v0", "--checkpoint", "random"], "needs --file"),
        (["--video", "v0", "--probes", "3"], "index not found"),
        (["--file", str(tmp_path / "nowhere.mp4")], "cannot be read (No such file"),
        (["--file", str(tmp_path / "broken.mp4")], "cannot be decoded"),
        (["--file", str(playlist)], "cannot be decoded"),
        (["--file", file, "--timeout", "0"], "--timeout"),
        (["--file", file, "--checkpoint", str(tmp_path / "no.pt")], "no.pt"),
    ):
        capsys.readouterr()
        given = ["retrieve", "query", "--features", features, "--html", str(page), *arguments]
        assert run(given) == 1, arguments
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not page.exists()


def test_another_encoder_is_refused(prepared: Path, tmp_path: Path) -> None:
    features = read_features(prepared / "features")
    other = {**features.encoder, "seed": 4}
    changed = read_features(prepared / "features")
    changed.meta["encoder"] = other
    frames = decode_file(
        prepared / "raw/v0.mp4", frames=3, short_edge=32, quality=90, timeout_seconds=60
    )
    assert len(frames) == 3
    with pytest.raises(InputError, match="another encoder"):
        encode_frames(frames, changed, None)
    changed.meta["encoder"] = {**features.encoder, "checkpoint": str(tmp_path / "gone.pt")}
    with pytest.raises(InputError, match=r"gone\.pt: not found"):
        encode_frames(frames, changed, None)
