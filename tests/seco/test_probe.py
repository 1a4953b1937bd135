"""``seco probe``: accuracies, what it writes, and what it says of odd sets."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli import run
from seco.config import ProbeConfig
from seco.data.splits import held_out
from seco.evaluation.probe import accuracies, fit_linear, probe
from seco.features.matrix import FeatureMatrix, fit_scaling
from seco.features.store import write_features
from seco.report.results import find_results, parse_probe
from shards.errors import InputError
from tests.seco.made_features import META, clusters, made_rows, write_clusters


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


@pytest.mark.parametrize("method", ["svm", "knn", "linear"])
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
    for name in ("probe.json", "probe-confusion.png", "probe-per-class.csv"):
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
        "1 classes have no training video (class0); their 20 test videos are counted as wrong",
    ]
    assert result.top1 == pytest.approx(1 - 20 / result.n_test)
    assert result.per_class[0].accuracy == 0
    assert result.mean_class == pytest.approx(2 / 3)
    assert "note: 2 videos" in result.table()


def test_the_sweep_chooses_c_on_training_videos_alone(tmp_path: Path) -> None:
    write_clusters(tmp_path, videos=240, spread=3.0)
    result = probe(ProbeConfig(features=str(tmp_path), sweep="1000,0.00000001,0.001"))
    assert [row.c for row in result.sweep] == [1e-8, 1e-3, 1000.0]
    best = max(row.top1 for row in result.sweep)
    chosen = result.settings["C"]
    assert next(row.top1 for row in result.sweep if row.top1 == best) == best
    assert chosen == next(row.c for row in result.sweep if row.top1 == best)
    assert "C was chosen on" in result.table() and "C 0.001: top-1" in result.table()
    written = json.loads((tmp_path / "probe.json").read_text())
    assert written["C"] == chosen
    share = written["validation"]["videos"] / result.n_train
    assert 0.15 < share < 0.3

    # What is tested is a fit of all training videos with that C.
    plain = probe(ProbeConfig(features=str(tmp_path), c=chosen))
    np.testing.assert_array_equal(result.confusion, plain.confusion)

    for bad in ("one", "0", "-1", "nan"):
        with pytest.raises(InputError, match="sweep"):
            probe(ProbeConfig(features=str(tmp_path), sweep=bad))
    with pytest.raises(InputError, match="only the SVM"):
        probe(ProbeConfig(features=str(tmp_path), sweep="1", method="knn"))


def test_the_result_says_how_the_svm_was_solved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clusters(tmp_path, spread=2.0)
    exact = probe(ProbeConfig(features=str(tmp_path)))
    written = json.loads((tmp_path / "probe.json").read_text())
    assert written["tolerance"] is None
    assert written["solution"].startswith("exact, proven")
    assert parse_probe(written).tolerance is None
    assert "SVM: exact, proven" in exact.table()
    assert run(["probe", "--features", str(tmp_path), "--tolerance", "0.01"]) == 0
    written = json.loads((tmp_path / "probe.json").read_text())
    assert (written["tolerance"], written["solution"]) == (
        0.01,
        "stopped at tolerance 0.01 as LIBLINEAR",
    )
    assert parse_probe(written).tolerance == 0.01
    assert "SVM: stopped at tolerance 0.01 as LIBLINEAR" in capsys.readouterr().out
    knn = probe(ProbeConfig(features=str(tmp_path), method="knn"))
    assert "solution" not in knn.to_json() and "SVM" not in knn.table()
    with pytest.raises(InputError, match="--tolerance: is for the SVM"):
        probe(ProbeConfig(features=str(tmp_path), tolerance=0.01, method="linear"))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="--tolerance: must be above 0"):
            probe(ProbeConfig(features=str(tmp_path), tolerance=bad))


def test_no_test_video_has_a_say_in_the_choice_of_c(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        labels: list[int | None] = [n % 3 for n in range(240)]
        rng = np.random.default_rng(seed)
        for n in range(0, 240, 4):  # test rows: other labels in the second folder
            labels[n] = int(rng.integers(3))
        splits = [{"1": "test" if n % 4 == 0 else "train"} for n in range(240)]
        write_clusters(tmp_path / name, videos=240, spread=3.0, rows=made_rows(labels, splits))
    found = [
        probe(ProbeConfig(features=str(tmp_path / name), sweep="0.0001,0.01,1")) for name in "ab"
    ]
    assert found[0].sweep == found[1].sweep
    assert found[0].settings == found[1].settings
    assert found[0].top1 != found[1].top1


def test_too_few_videos_to_choose_c_on(tmp_path: Path) -> None:
    labels: list[int | None] = [0, 1, 2, 0, 1, 2]
    splits = [{"1": "train"}] * 3 + [{"1": "test"}] * 3
    write_clusters(tmp_path, videos=6, rows=made_rows(labels, splits))
    with pytest.raises(InputError, match="held out"):
        probe(ProbeConfig(features=str(tmp_path), sweep="1,10"))


def test_scaling_is_of_the_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    array = (1e4 + rng.standard_normal((50, 5))).astype(np.float32)
    array[:, 2], array[7] = 0.1, 0.0  # a constant that no sum of it is exact for
    array[7, 2] = 0.1
    train = FeatureMatrix(array, np.arange(0, 50, 3))
    monkeypatch.setattr("seco.features.matrix.BLOCK_BYTES", 4 * 5 * 4)
    chosen = array[::3].astype(np.float64)
    scaling = fit_scaling(train, "standard")
    np.testing.assert_allclose(scaling.mean, chosen.mean(0), rtol=1e-12)
    deviation = chosen.std(0)
    deviation[2] = 1
    np.testing.assert_allclose(scaling.deviation, deviation, rtol=1e-6)
    test = FeatureMatrix(array, np.array([1, 7])).scaled(scaling)
    expected = (array[[1, 7]] - chosen.mean(0)) / deviation
    np.testing.assert_allclose(test.block(0, 2), expected, rtol=1e-5, atol=1e-5)
    unit = FeatureMatrix(array * 0 + np.float32([3, 4, 0, 0, 0])).scaled(fit_scaling(train, "l2"))
    np.testing.assert_allclose(unit.take(np.array([4])), [[0.6, 0.8, 0, 0, 0]])
    assert FeatureMatrix(array).scaled(fit_scaling(train, "none")).block(0, 50).tobytes() == (
        array.tobytes()
    )


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_linear_classifier_learns_whatever_the_scale(tmp_path: Path, scale: float) -> None:
    x, labels = clusters(200, 20, 4, 0.7)
    fitted = fit_linear(FeatureMatrix(scale * x[:100]), labels[:100], epochs=20, batch_size=32)
    right = fitted.classes[fitted.scores(scale * x[100:]).argmax(1)] == labels[100:]
    assert right.mean() > 0.95
    again = fit_linear(FeatureMatrix(scale * x[:100]), labels[:100], epochs=20, batch_size=32)
    assert again.weights.tobytes() == fitted.weights.tobytes()
    other = fit_linear(
        FeatureMatrix(scale * x[:100]), labels[:100], epochs=20, batch_size=32, seed=1
    )
    assert other.weights.tobytes() != fitted.weights.tobytes()


def test_linear_sgd_against_a_loop() -> None:
    x, labels = clusters(12, 5, 3, 1.0)
    fitted = fit_linear(
        FeatureMatrix(x), labels, lr=2.0, epochs=3, batch_size=5, weight_decay=0.01, seed=4
    )
    square = float((x.astype(np.float64) ** 2).sum(1).mean())
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(3, 5, generator=generator).double().numpy() * 0.01 / math.sqrt(square)
    b, vw, vb = np.zeros(3), np.zeros((3, 5)), np.zeros(3)
    for epoch in range(3):
        order = torch.randperm(12, generator=generator).tolist()
        for step, start in enumerate(range(0, 12, 5)):
            rate = 2.0 * (1 + math.cos(math.pi * (3 * epoch + step) / 9)) / 2
            rows = order[start : start + 5]
            logits = x[rows] @ w.T + b
            share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            share[np.arange(len(rows)), labels[rows]] -= 1
            vw = 0.9 * vw + share.T @ x[rows] / len(rows) + 0.01 * w
            vb = 0.9 * vb + share.mean(0) + 0.01 * b
            w, b = w - rate / square * vw, b - rate * vb
    np.testing.assert_allclose(fitted.weights, w, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(fitted.biases, b, rtol=1e-3, atol=1e-6)


def test_what_is_held_out() -> None:
    labels = np.repeat([0, 1, 2, 3], [50, 20, 1, 2])
    groups = [f"{label}-{n // 5}" for n, label in enumerate(labels)]
    out = held_out(labels, groups)
    for group in set(groups):  # whole or not at all
        assert len({bool(out[n]) for n in range(len(labels)) if groups[n] == group}) == 1
    # A fifth of 50 is two groups; a fifth of 20 is less than one, of 1 and 2 nothing can be spared.
    assert [int(out[labels == k].sum()) for k in range(4)] == [10, 0, 0, 0]
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = held_out(labels[order], [groups[n] for n in order])
    np.testing.assert_array_equal(shuffled, out[order])
    single = held_out(labels, [str(n) for n in range(len(labels))])
    assert [int(single[labels == k].sum()) for k in range(4)] == [10, 4, 0, 1]


def test_the_table_of_classes_equals_a_count_by_hand(tmp_path: Path) -> None:
    write_clusters(tmp_path, videos=300, classes=4, spread=4.0)
    result = probe(ProbeConfig(features=str(tmp_path)))
    with open(tmp_path / "probe-per-class.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label_name"] for row in rows] == [f"class{k}" for k in range(4)]
    for k, row in enumerate(rows):
        counts = result.confusion[k].tolist()
        assert int(row["videos"]) == sum(counts)
        assert int(row["right"]) == counts[k]
        assert float(row["accuracy"]) == pytest.approx(counts[k] / sum(counts))
        wrong = [n if m != k else 0 for m, n in enumerate(counts)]
        assert (row["mistaken_for"], int(row["times"])) == (
            f"class{wrong.index(max(wrong))}",
            max(wrong),
        )


def test_activitynet_of_other_than_50_frames_is_noted(tmp_path: Path) -> None:
    write_clusters(tmp_path)
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())
    for frames, noted in ((30, True), (50, False)):
        path.write_text(json.dumps({**meta, "dataset": "activitynet", "frames": frames}))
        notes = probe(ProbeConfig(features=str(tmp_path))).notes
        assert any("50" in note for note in notes) == noted


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: str) -> str:
        assert run(["probe", *arguments]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    one: list[int | None] = [7] * 60
    splits = [{"1": "train" if n % 2 else "test"} for n in range(60)]
    write_clusters(tmp_path / "one", rows=made_rows(one, splits))
    assert "one class (class7)" in complaint("--features", str(tmp_path / "one"))

    write_clusters(tmp_path / "nan")
    array = np.load(tmp_path / "nan" / "features.npy")
    array[41, 3] = np.nan
    np.save(tmp_path / "nan" / "features.npy", array)
    assert "v041 are not finite" in complaint("--features", str(tmp_path / "nan"))

    write_clusters(tmp_path / "train")
    write_clusters(tmp_path / "test", dimension=12)
    both = ("--features", str(tmp_path / "train"), "--test-features", str(tmp_path / "test"))
    assert "has 12 values per video, " in complaint(*both)

    folder = ("--features", str(tmp_path / "train"))
    assert "--lr" in complaint(*folder, "--lr", "0")
    assert "--weight-decay" in complaint(*folder, "--weight-decay", "-1")
    assert "--sweep: is empty" in complaint(*folder, "--sweep", ",")
    (tmp_path / "file").write_text("")
    assert "file" in complaint(*folder, "--out", str(tmp_path / "file" / "x"))


def test_nothing_is_tested_that_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clusters(tmp_path / "a")
    folder = ["probe", "--features", str(tmp_path / "a")]
    for same in (["--train-split", "test"], ["--test-features", str(tmp_path / "a"),
                 "--test-split", "train"]):  # fmt: skip
        assert run([*folder, *same]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "videos are in both train and test (v00" in line
    assert not (tmp_path / "a" / "probe.json").exists()


def test_methods_and_splits_do_not_replace_each_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    splits = [{n: str(rng.choice(["train", "test"])) for n in ("1", "2")} for _ in range(60)]
    write_clusters(tmp_path, rows=made_rows([n % 3 for n in range(60)], splits))
    folder = str(tmp_path)
    first = probe(ProbeConfig(features=folder, split="1"))
    before = (tmp_path / "probe.json").read_bytes()
    probe(ProbeConfig(features=folder, split="2"))
    knn = probe(ProbeConfig(features=folder, method="knn"))
    assert (tmp_path / "probe.json").read_bytes() == before
    written = {path.parent.name for path in tmp_path.glob("*/probe.json")}
    assert written == {"probe-svm-2-train-2-test", "probe-knn-1-train-1-test"}
    assert str(tmp_path / "probe-knn-1-train-1-test") in knn.table()
    found = find_results([folder])
    assert [item.probe.method for item in found.features if item.probe] == ["svm", "knn", "svm"]
    assert first.n_test == found.features[0].probe.n_test  # type: ignore[union-attr]
    # New features take all of them away.
    write_clusters(tmp_path)
    assert not list(tmp_path.rglob("probe*"))


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_values_of_any_size_are_classified_or_refused(tmp_path: Path, scale: float) -> None:
    features, labels = clusters(60, 16, 3, 0.3)
    splits = [{"1": "test" if n // 3 % 3 == 0 else "train"} for n in range(60)]
    rows = made_rows(labels.tolist(), splits)
    scaled = (features * scale).astype(np.float32)
    write_features(tmp_path, scaled, np.stack([scaled] * 2, 1), rows, META)
    for settings in ({"normalise": "l2"}, {"normalise": "standard"}, {"method": "knn"}):
        config = ProbeConfig(features=str(tmp_path), **settings)  # type: ignore[arg-type]
        assert probe(config).top1 == 1, settings
    if scale > 1:
        for method in ("svm", "linear"):
            with pytest.raises(InputError, match="too large for float32 — use --normalise"):
                probe(ProbeConfig(features=str(tmp_path), method=method))


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
    assert run(["probe", "--features", folder, "--method", "linear", "--epochs", "2"]) == 0
    assert "linear (lr 30" in capsys.readouterr().out
    assert run(["probe", "--features", folder, "-C", "0.5"]) == 0
    assert "svm (C 0.5" in capsys.readouterr().out
    assert run(["probe", "--features", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert run(["probe", "--features", folder, "-C", "-1"]) == 1
