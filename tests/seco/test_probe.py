"""``seco probe``: accuracies, what it writes, and what it says of odd sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli import run
from seco.eval_config import ProbeConfig
from seco.probe import accuracies, normalised, probe
from seco.report_records import parse_probe
from shards.errors import InputError
from tests.seco.made_features import made_rows, write_clusters


def test_separated_clusters_are_found(tmp_path: Path) -> None:
    write_clusters(tmp_path)
    result = probe(ProbeConfig(features=str(tmp_path)))
    assert (result.top1, result.top5, result.mean_class) == (1.0, 1.0, 1.0)
    assert (result.n_train, result.n_test) == (39, 21)
    np.testing.assert_array_equal(result.confusion, np.diag([7, 7, 7]))
    assert [(row.label_name, row.count) for row in result.per_class] == [
        ("class0", 7),
        ("class1", 7),
        ("class2", 7),
    ]

    written = json.loads((tmp_path / "probe.json").read_text())
    assert written["C"] == 1.0
    assert written["method"] == "svm"
    assert written["split"] == "1 test"
    assert written["train_split"] == "1 train"
    assert written["encoder"]["sha256"] == "ab" * 32
    parsed = parse_probe(written)  # as `seco report` reads it
    assert (parsed.top1, parsed.c, parsed.n_test, len(parsed.per_class)) == (1.0, 1.0, 21, 3)
    with Image.open(tmp_path / "probe-confusion.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("method", ["svm", "knn"])
def test_features_without_information_score_about_chance(tmp_path: Path, method: str) -> None:
    labels: list[int | None] = list(np.random.default_rng(3).integers(0, 10, 600).tolist())
    splits = [{"1": "train" if n % 2 else "test"} for n in range(600)]
    write_clusters(tmp_path, videos=600, classes=1, rows=made_rows(labels, splits))
    result = probe(ProbeConfig(features=str(tmp_path), method=method))
    assert 0.03 < result.top1 < 0.2
    assert result.top1 < result.top5 < 0.7


def test_the_same_input_gives_the_same_bytes_elsewhere_too(tmp_path: Path) -> None:
    write_clusters(tmp_path / "f", spread=2.0)
    config = ProbeConfig(features=str(tmp_path / "f"))
    probe(config)
    probe(ProbeConfig(features=str(tmp_path / "f"), out=str(tmp_path / "elsewhere")))
    for name in ("probe.json", "probe-confusion.png"):
        first = (tmp_path / "f" / name).read_bytes()
        assert first == (tmp_path / "elsewhere" / name).read_bytes()


def test_accuracies_by_hand() -> None:
    classes = np.array([2, 4, 6, 8, 10, 12])
    scores = np.array(
        [
            [6.0, 5, 4, 3, 2, 1],  # true 2: first
            [6.0, 5, 4, 3, 2, 1],  # true 10: fifth
            [6.0, 5, 4, 3, 2, 1],  # true 12: sixth
            [6.0, 5, 4, 3, 2, 1],  # true 5: no such class
            [1.0, 1, 1, 1, 1, 1],  # true 12: all alike
        ]
    )
    labels = np.array([2, 10, 12, 5, 12])
    top1, top5, mean_class = accuracies(classes, scores, labels)
    assert top1 == pytest.approx(1 / 5)
    assert top5 == pytest.approx(2 / 5)
    assert mean_class == pytest.approx((1 + 0 + 0 + 0) / 4)


def test_a_class_without_training_videos_is_wrong_and_told(tmp_path: Path) -> None:
    labels: list[int | None] = [n % 3 for n in range(60)]
    splits = [{"1": "train" if n % 2 and n % 3 else "test"} for n in range(60)]
    labels[1] = labels[2] = None
    write_clusters(tmp_path, rows=made_rows(labels, splits))
    result = probe(ProbeConfig(features=str(tmp_path)))
    assert result.notes == [
        "2 videos without a label are left out",
        "1 classes have no training video; their 20 test videos are counted as wrong",
    ]
    assert result.top1 == pytest.approx(1 - 20 / result.n_test)
    assert result.per_class[0].accuracy == 0
    assert result.mean_class == pytest.approx(2 / 3)
    assert "note: 2 videos" in result.table()


def test_the_sweep_reports_every_c(tmp_path: Path) -> None:
    write_clusters(tmp_path, spread=3.0)
    result = probe(ProbeConfig(features=str(tmp_path), sweep="0.001,1"))
    assert [row.c for row in result.sweep] == [0.001, 1.0]
    assert result.sweep[1].top1 == result.top1
    assert "C 0.001: top-1" in result.table()
    for bad in ("one", "0", "-1", "nan"):
        with pytest.raises(InputError, match="sweep"):
            probe(ProbeConfig(features=str(tmp_path), sweep=bad))
    with pytest.raises(InputError, match="only the SVM"):
        probe(ProbeConfig(features=str(tmp_path), sweep="1", method="knn"))


def test_scaling_is_of_the_training_rows() -> None:
    train = np.array([[3.0, 4, 7], [0, 0, 7]], np.float32)
    test = np.array([[6.0, 0, 8]], np.float32)
    assert normalised(train, test, "none") == (train, test)
    l2_train, l2_test = normalised(train[:, :2], test, "l2")
    np.testing.assert_allclose(l2_train, [[0.6, 0.8], [0, 0]])
    np.testing.assert_allclose(l2_test, [[0.6, 0, 0.8]])
    standard_train, standard_test = normalised(train, test, "standard")
    np.testing.assert_allclose(standard_train, [[1, 1, 0], [-1, -1, 0]])
    np.testing.assert_allclose(standard_test, [[3, -1, 1]])


def test_names_cannot_redraw_the_terminal_or_break_the_picture(tmp_path: Path) -> None:
    rows = made_rows(
        [n % 3 for n in range(60)], [{"1": "train" if n % 2 else "test"} for n in range(60)]
    )
    for row in rows:
        row["label_name"] = f"$\\frac{{ \x1b[2J {row['label']}"
    write_clusters(tmp_path, rows=rows)
    assert "\x1b" not in probe(ProbeConfig(features=str(tmp_path))).table()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clusters(tmp_path)
    folder = str(tmp_path)
    assert run(["probe", "--features", folder, "--method", "knn", "--neighbours", "3"]) == 0
    assert "knn (neighbours 3" in capsys.readouterr().out
    assert run(["probe", "--features", folder, "-C", "0.5"]) == 0
    assert "svm (C 0.5" in capsys.readouterr().out
    assert run(["probe", "--features", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert run(["probe", "--features", folder, "-C", "-1"]) == 1
