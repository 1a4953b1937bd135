"""The demo, shortened, on the rendered set and on folders people have. CI runs ``--quick`` itself.

Does the shortened one learn? 300 steps on 64 training clips are too few to recognise classes, but
the halves of a video find each other. Same-video R@1 in % for seeds 0 to 5 (one thread of an Intel
Xeon, torch 2.14): 57.3, 68.8, 42.7, 74.0, 54.2, 61.5. With keys left in the order of BatchNorm's
shuffle, which pairs queries with other videos: 31.2, 27.1, 33.3, 20.8, 16.7, 39.6. With a learning
rate of nothing, seed 0: 9.4. Untrained: 10.4 to 29.2. Order labels that are exchanged are noticed
by ``tests/seco/test_learning.py``: most of these clips have no direction.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import cli
from seco import demo as demo_module
from seco.config import DemoConfig
from seco.demo import FULL, SECO, UNTRAINED, demo
from shards.errors import InputError, Stopped, TooManyExcluded
from tests.pipelines.made_videos import draw_video


def test_the_rendered_demo_learns_and_ends_with_table_maps_and_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "FULL", replace(FULL, clips_per_class=12, votes=1))
    out = tmp_path / "demo" / "rendered"
    command = ["demo", "--steps", "300", "--out", str(tmp_path / "demo")]
    assert cli.run(command) == 0
    shown = capsys.readouterr()
    for words in ("SVM, 100 % of labels", "SeCo is ", "untrained-ResNet-18", "took "):
        assert words in shown.out
    assert "Conclusion: " in shown.out
    assert "kNN, untrained: " in shown.err
    commands = [line for line in shown.err.splitlines() if "$ seco" in line]
    steps = ("render-demo", "prepare", "inspect", "pretrain", "compare", "retrieve", "report")
    for step in steps:
        assert any(f"$ seco {step} " in line for line in commands), step
    result = json.loads((out / "compare" / "compare.json").read_text())
    assert list(result["encoders"]) == ["SeCo", "untrained", "untrained-ResNet-18"]
    assert [pair["encoder"] for pair in result["comparisons"]] == ["SeCo", "SeCo"]
    assert "untrained-ResNet-18" in (out / "report.html").read_text()
    assert (out / "nearest.html").read_text().count("<section>") == 8  # a query of each class
    assert (out / "compare" / "maps.png").is_file()
    assert (out / "shards.html").is_file()
    (same_video,) = (one for one in result["measures"] if one["key"] == "same_video")
    found = {name: one["value"] for name, one in same_video["values"].items()}
    assert found[SECO] > 0.41
    assert found[SECO] > found[UNTRAINED] + 0.12
    (checkpoint,) = out.rglob("last.pt")
    assert "queue_fill" not in (checkpoint.parent / "metrics.jsonl").read_text()  # there is none
    # Once more: everything is there already, so it goes through without training again.
    written = checkpoint.stat().st_mtime_ns
    assert cli.run(command) == 0
    assert checkpoint.stat().st_mtime_ns == written
    assert json.loads((out / "compare" / "compare.json").read_text()) == result


def test_a_folder_without_labels_gets_pages_and_what_needs_no_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(6):
        draw_video(tmp_path / "mine" / f"{number}.mp4", size="64x48", frames=6)
    out = tmp_path / "demo"
    arguments = ["--src", str(tmp_path / "mine"), "--dataset", "folder", "--out", str(out)]
    assert cli.run(["demo", "--steps", "3", *arguments]) == 0
    shown = capsys.readouterr()
    assert "the videos have no labels" in shown.out
    assert "the results do not show whether pre-training helps on these videos" in shown.out
    assert "kNN" not in shown.err
    (report,) = out.glob("*/report.html")
    assert "same-video R@1" in report.read_text()


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
