"""The demo in its quick form, on the rendered set and on folders people have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cli
from seco.demo.config import DemoConfig
from seco.demo.demo import demo
from shards.errors import InputError, Stopped, TooManyExcluded
from tests.pipelines.made_videos import draw_video


def test_the_rendered_demo_ends_with_table_report_and_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo" / "rendered-quick"
    assert cli.run(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 0
    shown = capsys.readouterr()
    assert "SeCo" in shown.out
    assert "random initialisation" in shown.out
    assert "these figures mean nothing" in shown.out
    commands = [line for line in shown.err.splitlines() if "$ seco" in line]
    steps = ("render-demo", "prepare", "inspect", "pretrain", "extract-features", "probe")
    for step in (*steps, "retrieve", "report"):
        assert any(f"$ seco {step} " in line for line in commands), step
    rows = json.loads((out / "demo.json").read_text())["rows"]
    assert [row["encoder"] for row in rows] == ["SeCo", "random initialisation"]
    assert all(0 <= row["probe_top1"] <= 1 for row in rows)
    assert "random initialisation" in (out / "report.html").read_text()
    assert (out / "nearest.html").is_file()
    assert (out / "shards.html").is_file()
    # Once more: everything is there already, so it goes through without training again.
    (checkpoint,) = out.rglob("last.pt")
    written = checkpoint.stat().st_mtime_ns
    assert cli.run(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 0
    assert checkpoint.stat().st_mtime_ns == written
    assert json.loads((out / "demo.json").read_text())["rows"] == rows


def test_a_folder_without_labels_gets_pages_and_no_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(6):
        draw_video(tmp_path / "mine" / f"{number}.mp4", size="64x48", frames=6)
    out = tmp_path / "demo"
    arguments = ["--src", str(tmp_path / "mine"), "--dataset", "folder", "--out", str(out)]
    assert cli.run(["demo", "--quick", *arguments]) == 0
    shown = capsys.readouterr()
    assert "nothing to probe" in shown.err
    assert "–" in shown.out
    (report,) = out.glob("*/report.html")
    assert "random initialisation" in report.read_text()
    (summary,) = out.rglob("demo.json")
    rows = json.loads(summary.read_text())["rows"]
    assert all(set(row) == {"encoder", "same_video_r_at_1"} for row in rows)


def test_a_step_that_fails_ends_the_demo_in_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    arguments = ["--src", str(tmp_path / "empty"), "--out", str(tmp_path / "demo")]
    assert cli.run(["demo", *arguments]) == 1
    error = capsys.readouterr().err
    assert "empty" in error
    assert "the step 'seco prepare' failed" in error


@pytest.mark.parametrize(("code", "error"), [(75, Stopped), (3, TooManyExcluded), (1, InputError)])
def test_a_step_that_stops_stops_the_demo(
    code: int, error: type[Exception], tmp_path: Path
) -> None:
    config = DemoConfig(out=str(tmp_path), src=str(tmp_path), dataset="folder")
    with pytest.raises(error):
        demo(config, command=lambda arguments: code)
