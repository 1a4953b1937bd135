"""``seco bench prepare``: that what it compares is what it says. Nothing here depends on time."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path

import pytest

import cli
from benchmarks import prepare_reference as reference
from benchmarks.prepare import ALL, THIRTY, bench_prepare
from benchmarks.prepare_table import table
from pipelines._decode import decode_argv, output_argv, pictures, scaled
from pipelines._ffmpeg import ffmpeg_binary
from tests.pipelines.made_videos import draw_video

LONG = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "25")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    draw_video(root / "long.mp4", frames=75, size="96x64", options=LONG)
    draw_video(root / "short.avi", frames=20)
    (root / "broken.mp4").write_text("no video")
    return root


def figures(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in figures(part)]
    if isinstance(value, list):
        return [number for part in value for number in figures(part)]
    return [float(value)] if isinstance(value, (int, float)) else []


def test_every_figure_is_there(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "prepare", "--src", str(clips), "--repeats", "1", "--only-clips", "--json"]
    assert cli.run(command) == 0
    found = json.loads(capfd.readouterr().out)
    (clip,) = found["clips"]
    assert (clip["clip"], clip["frames"]) == ("long.mp4", 75)
    assert found["short"]["clips"] == 1
    assert len(found["ratios"]) == 4
    numbers = figures([found["clips"], found["ratios"], found["short"]])
    assert len(numbers) > 12
    assert all(math.isfinite(number) and number > 0 for number in numbers)


def test_the_table_names_what_was_measured(clips: Path) -> None:
    found = bench_prepare([str(clips / "long.mp4")], 1, scaling=False, planning=False)
    text = table(found)
    assert "| long.mp4 | 75 |" in text
    assert "ffmpeg" in text and "30 frames, of the limit" in text


def test_the_limit_filters_as_ours_does(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    stream = scaled(pictures(), 256).output("-", format="null")
    filters = output_argv(stream, "ffmpeg", path)
    ours = decode_argv(path, 256, "ffmpeg")
    null = filters[filters.index("-filter_complex") + 1].rpartition("[")[0]
    assert "scale=" in null
    assert ours[ours.index("-filter_complex") + 1].startswith(null)


def test_the_plain_ways_store_every_frame(clips: Path, tmp_path: Path) -> None:
    for number, way in enumerate((reference.jpeg_files_in_tar, reference.encode_again_first)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with tarfile.open(way(clips / "long.mp4", 256, ffmpeg_binary(), folder)) as tar:
            assert len(tar.getnames()) == 75
        assert [path.name for path in folder.iterdir()] == ["images.tar"]


def test_the_limit_encodes_what_is_stored(clips: Path) -> None:
    binary = ffmpeg_binary()
    assert len(reference.stored_planes(clips / "long.mp4", 256, ALL, binary)) == 75
    assert len(reference.stored_planes(clips / "long.mp4", 256, THIRTY, binary)) == 30


@pytest.mark.parametrize("name", ["none", "broken.mp4"])
def test_mistakes_are_one_line(clips: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "prepare", "--src", str(clips / name)]) == 1
    (line,) = [row for row in capfd.readouterr().err.splitlines() if row.startswith("seco: ")]
    assert name in line
