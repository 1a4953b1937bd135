"""``seco compare``: its measures against the other commands', its verdicts, users' mistakes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from seco.config import CompareConfig, EvaluateConfig, ExtractConfig, ProbeConfig
from seco.evaluation.compare import (
    Classified,
    EncoderSpec,
    compare,
    draw_labelled,
    effective_rank,
    hold_outs,
    mean_over_classes,
    parse_encoders,
    same_video,
)
from seco.evaluation.comparison import CompareResult, place
from seco.evaluation.intervals import BETTER, UNDECIDED
from seco.evaluation.probe import probe
from seco.evaluation.retrieval import evaluate
from seco.evaluation.splits import read_train_test
from seco.features.store import write_features
from seco.models.seco import build_backbone
from shards.errors import InputError
from tests.browser import DESKTOP_PX, PHONE_PX, open_page
from tests.seco.made_features import META

CLASSES, RECORDINGS, CLIPS = 4, 12, 3  # clips of a recording, recordings of a class
CPU = torch.device("cpu")


def made(
    folder: Path,
    noise: float,
    seed: int = 0,
    dimension: int = 12,
    labelled: bool = True,
    splits: bool = True,
    order: NDArray[np.int64] | None = None,
) -> Path:
    """Features in UCF101's names: recordings of classes, the first third of each to test on.

    The same videos in every folder, seen with that much noise of ``seed``.
    """
    videos = np.random.default_rng(5)
    own = np.random.default_rng([6, seed])
    centres = videos.standard_normal((CLASSES, dimension))
    rows: list[dict[str, Any]] = []
    seen = []
    for label in range(CLASSES):
        for recording in range(RECORDINGS):
            part = "test" if recording % 3 == 0 else "train"
            shift = 0.4 * videos.standard_normal(dimension)
            for clip in range(CLIPS):
                key = f"v_Class{label}_g{recording:02d}_c{clip:02d}"
                rows.append(
                    {
                        "key": key,
                        "source": f"Class{label}/{key}.avi",
                        "label": label if labelled else None,
                        "label_name": f"Class{label}" if labelled else None,
                        "frames": 8,
                        "shard": "made-000.tar",
                        "splits": {"1": part} if splits else {},
                    }
                )
                seen.append(centres[label] + shift + 0.3 * videos.standard_normal(dimension))
    halves = np.array(seen)[:, None] + noise * own.standard_normal((len(seen), 2, dimension))
    halves = halves.astype(np.float32)
    order = np.arange(len(rows)) if order is None else order
    encoder = {**META["encoder"], "sha256": f"{seed:064x}", "checkpoint": f"made-{seed}.pt"}
    write_features(
        folder, halves.mean(axis=1)[order], halves[order], [rows[n] for n in order],
        {**META, "encoder": encoder, "dataset": "made"},
    )  # fmt: skip
    return folder


def run(tmp_path: Path, *folders: Path, **settings: Any) -> CompareResult:
    """Of feature folders; nothing is to be extracted."""
    quick = {"repeats": 2, "resamples": 2000, "fractions": "100", "svm_c": "1"}
    given = {**quick, "out": str(tmp_path / "compare"), **settings}
    config = CompareConfig(features=tuple(map(str, folders)), **given)

    def extract(config: ExtractConfig) -> None:
        raise AssertionError(config)

    return compare(config, ExtractConfig(device="cpu"), extract)


def values(result: CompareResult, name: str) -> dict[str, float]:
    return {measure.key: measure.values[name].value for measure in result.measures}


def verdicts(result: CompareResult) -> dict[str, str]:
    (pair,) = result.pairs
    return {difference.key: difference.verdict for difference in pair.differences}


def test_a_good_encoder_is_better_and_a_copy_cannot_be_told(tmp_path: Path) -> None:
    good, bad = made(tmp_path / "good", 0.3), made(tmp_path / "bad", 4.0, seed=1)
    result = run(tmp_path, good, bad, fractions="1,10,100", svm_c="0.01,1")
    found = verdicts(result)
    assert list(found) == [
        *(f"{what}@{percent}" for what in ("svm", "knn", "r1") for percent in (1, 10, 100)),
        "same_video",
        "effective_rank",
    ]
    assert {found[key] for key in ("svm@100", "knn@100", "r1@100", "same_video")} == {BETTER}
    for measure in result.measures:
        assert measure.groups == (RECORDINGS * CLASSES if "@" not in measure.key else 16)
    assert [m.labelled for m in result.measures[:3]] == [4, 8, 96]
    assert "good is better than bad at" in result.sentences()[0]

    again = run(tmp_path, good, Path(f"copy={good}"))
    (pair,) = again.pairs
    assert set(verdicts(again).values()) == {UNDECIDED}
    assert all(d.interval is not None and d.interval.value == 0 for d in pair.differences)
    assert again.sentences()[0].endswith("at 0 of 5 measures; cannot be told: all.")


def test_full_labels_give_what_probe_and_retrieve_give(tmp_path: Path) -> None:
    folder = made(tmp_path / "one", 1.5)
    result = run(tmp_path, folder, neighbours=5)
    assert result.pairs == [] and "add another, such as random" in result.sentences()[0]
    found = values(result, "one")
    for how, interval in result.svm["one"]["100"].items():
        settings = ProbeConfig(features=str(folder), normalise=how, device="cpu")
        assert interval.value == pytest.approx(probe(settings).top1)
    best = max(result.svm["one"]["100"], key=result.encoders["one"]["svm"]["held_out"].get)
    assert found["svm@100"] == result.svm["one"]["100"][best].value
    knn = ProbeConfig(features=str(folder), method="knn", neighbours=5, device="cpu")
    assert found["knn@100"] == pytest.approx(probe(knn).top1)
    recalls = evaluate(EvaluateConfig(features=str(folder), device="cpu"))
    assert found["r1@100"] == pytest.approx(recalls.label[1])
    assert found["same_video"] == pytest.approx(recalls.same_video[1])


def test_the_files_hold_what_was_found(tmp_path: Path) -> None:
    good, bad = made(tmp_path / "good", 0.3), made(tmp_path / "bad", 4.0, seed=1)
    result = run(tmp_path, good, bad)
    content = json.loads((tmp_path / "compare/compare.json").read_text("utf-8"))
    assert content["measures"][0]["values"]["good"]["value"] == values(result, "good")["svm@100"]
    assert content["comparisons"][0]["differences"][0]["verdict"] == BETTER
    assert content["encoders"]["bad"]["sha256"] == f"{1:064x}"
    assert content["settings"]["baseline"] == ["bad"]
    first = (tmp_path / "compare/compare.json").read_bytes()
    page = (tmp_path / "compare/compare.html").read_bytes()
    run(tmp_path, good, bad)
    assert (tmp_path / "compare/compare.json").read_bytes() == first
    assert (tmp_path / "compare/compare.html").read_bytes() == page


@pytest.mark.parametrize(("size_px", "dark"), [(DESKTOP_PX, False), (PHONE_PX, True)])
def test_the_page_opens_without_a_fault(
    tmp_path: Path, size_px: tuple[int, int], dark: bool
) -> None:
    folders = made(tmp_path / "good", 0.3), made(tmp_path / "$<b>", 4.0, seed=1)
    result = run(tmp_path, *folders)
    opened = open_page(tmp_path / "compare/compare.html", size_px=size_px, dark=dark)
    assert opened.faults() == []
    assert result.sentences()[0] in opened.text
    assert len(opened.images) == 1  # the maps
    for words in ("SVM, 100 % of labels", "same-video R@1", "standardised", "$<b>", "0" * 63 + "1"):
        assert words in opened.text


def test_rows_in_another_order_change_nothing(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(CLASSES * RECORDINGS * CLIPS)
    good, bad = made(tmp_path / "good", 0.5), made(tmp_path / "bad", 2.0, seed=1)
    turned = made(tmp_path / "turned/bad", 2.0, seed=1, order=order)
    one, other = (run(tmp_path, good, second, fractions="10") for second in (bad, turned))
    assert one.measures == other.measures
    assert one.pairs == other.pairs


def test_videos_that_are_not_finite_are_left_out_for_all(tmp_path: Path) -> None:
    folders = [made(tmp_path / "a", 0.5), made(tmp_path / "b", 0.5, seed=1)]
    array = np.load(folders[1] / "features.npy")
    array[0, 0], array[7] = np.nan, np.inf
    np.save(folders[1] / "features.npy", array)
    result = run(tmp_path, *folders)
    assert "2 videos with non-finite features are left out for all encoders" in (result.notes)
    assert {m.videos for m in result.measures if "@" not in m.key} == {142}
    assert result.measures[0].labelled == 96 - 1  # row 7 is of recording 2


def test_without_labels_only_what_needs_none_is_measured(tmp_path: Path) -> None:
    folders = [
        made(tmp_path / name, noise, seed=seed, labelled=False)
        for seed, (name, noise) in enumerate({"a": 0.2, "b": 3.0}.items())
    ]
    result = run(tmp_path, *folders)
    assert list(verdicts(result)) == ["same_video", "effective_rank"]
    assert verdicts(result)["same_video"] == BETTER
    assert any("no labels" in note for note in result.notes)
    same = result.measures[0]
    assert same.chance == 1 / 144 and same.values["a"].value > 10 * same.chance


def test_without_splits_a_part_is_drawn_with_recordings_kept_whole(tmp_path: Path) -> None:
    result = run(
        tmp_path, made(tmp_path / "a", 0.3, splits=False), made(tmp_path / "b", 4, 1, splits=False)
    )
    measure = result.measures[0]
    assert measure.videos == CLASSES * CLIPS * 3  # 3 recordings of 12 are at most 30 % of them
    assert measure.groups == CLASSES * 3
    assert any("30% of each class are test videos, drawn by recordings" in n for n in result.notes)
    assert verdicts(result)["svm@100"] == BETTER
    assert not any("too high" in note for note in result.notes)


def test_widths_do_not_compare_in_effective_rank_and_recordings_in_both_parts_are_told(
    tmp_path: Path,
) -> None:
    a, b = made(tmp_path / "a", 0.5), made(tmp_path / "b", 0.5, seed=1, dimension=20)
    for folder in (a, b):
        with open(folder / "videos.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        for row in rows[1:]:  # clips of one recording on both sides
            row[-1] = "test" if row[0].endswith("c00") else "train"
        with open(folder / "videos.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
    result = run(tmp_path, a, b)
    last = result.pairs[0].differences[-1]
    assert (last.key, last.interval, last.verdict) == ("effective_rank", None, UNDECIDED)
    assert "width 12" in last.reason and "20" in last.reason
    assert any("48 groups have training and test videos" in note for note in result.notes)


def test_three_encoders_are_each_compared_with_the_baseline(tmp_path: Path) -> None:
    folders = [made(tmp_path / name, 0.5, seed) for seed, name in enumerate("abc")]
    assert [(p.encoder, p.baseline) for p in run(tmp_path, *folders).pairs] == [
        ("a", "c"),
        ("b", "c"),
    ]
    random = json.loads((folders[1] / "meta.json").read_text())
    random["encoder"]["checkpoint"] = "random"
    (folders[1] / "meta.json").write_text(json.dumps(random))
    assert {p.baseline for p in run(tmp_path, *folders).pairs} == {"b"}
    chosen = run(tmp_path, *folders, baseline=("a",))
    assert [p.encoder for p in chosen.pairs] == ["b", "c"]
    assert chosen.table().count("verdict") == 2
    two = run(tmp_path, *folders, baseline=("a", "b"))
    assert [(p.encoder, p.baseline) for p in two.pairs] == [("c", "a"), ("c", "b")]
    assert two.pairs[0].differences == chosen.pairs[1].differences


@pytest.mark.parametrize(
    "features",
    [np.ones((20, 8)), np.zeros((20, 8)), np.arange(20.0)[:, None], np.eye(2).repeat(10, 0)],
    ids=["equal", "zero", "of one value", "of two kinds"],
)
def test_features_that_hardly_vary_have_a_map_too(features: NDArray[np.float64]) -> None:
    places = place(features.astype(np.float32), seed=0)
    assert places.shape == (20, 2)
    assert np.isfinite(places).all()


def test_draws_of_labels_are_stratified_and_the_same_for_all() -> None:
    labels = np.repeat([3, 5, 9], [100, 40, 2])
    one, ten, full = draw_labelled(labels, [1, 10, 100], 4, seed=0)
    assert [(found.key, found.videos, len(found.draws)) for found in (one, ten, full)] == [
        ("1", 3, 4),
        ("10", 15, 4),
        ("100", 142, 1),
    ]
    for rows in ten.draws:
        assert np.unique(labels[rows], return_counts=True)[1].tolist() == [10, 4, 1]
        assert len(set(rows.tolist())) == len(rows)
    assert len({tuple(rows.tolist()) for rows in ten.draws}) == 4
    again = draw_labelled(labels, [10], 4, seed=0)[0]
    assert all(np.array_equal(a, b) for a, b in zip(ten.draws, again.draws, strict=True))
    assert not np.array_equal(draw_labelled(labels, [10], 4, 1)[0].draws[0], ten.draws[0])
    # 1 and 2 % of 20 are one video; all percentages of classes of one video are all videos.
    assert [found.key for found in draw_labelled(np.repeat([0, 1], 20), [1, 2, 50], 2, 0)] == [
        "2",
        "50",
    ]
    assert [found.key for found in draw_labelled(np.arange(3), [1, 100], 2, 0)] == ["100"]


@pytest.mark.parametrize("videos", [20, 90])
def test_the_effective_rank_is_that_of_its_definition(videos: int) -> None:
    rng = np.random.default_rng(videos)
    x = (rng.standard_normal((videos, 40)) * np.linspace(0.1, 3, 40)).astype(np.float32)
    rows = np.arange(0, videos, 1)
    blocks = np.arange(videos) % 10

    def definition(part: NDArray[np.float32]) -> float:
        values = np.linalg.svd(part.astype(np.float64), compute_uv=False)
        shares = values / values.sum() + 1e-7
        return float(np.exp(-(shares * np.log(shares)).sum()))

    value, influence = effective_rank(x, rows, blocks)
    assert value == pytest.approx(definition(x), rel=1e-3)
    without = np.array([definition(x[blocks != block]) for block in range(10)])
    np.testing.assert_allclose(influence, 9 * (without.mean() - without), rtol=0.01, atol=0.01)
    flat = np.eye(12, dtype=np.float32)
    assert effective_rank(flat, np.arange(12), np.arange(12))[0] == pytest.approx(12, rel=1e-3)
    same = np.ones((12, 5), dtype=np.float32)
    assert effective_rank(same, np.arange(12), np.arange(12))[0] == pytest.approx(1, rel=1e-3)


def test_same_video_finds_the_own_half() -> None:
    first = np.eye(4, dtype=np.float32)
    halves = np.stack([first, first[[0, 2, 1, 3]]], axis=1)
    assert same_video(halves, np.arange(4), CPU).tolist() == [[True, False, False, True]]
    assert same_video(halves, np.array([0, 3]), CPU).tolist() == [[True, True]]


def test_the_choice_weighs_classes_alike() -> None:
    right, labels = np.array([True, True, True, True, False, True]), np.array([4, 4, 4, 4, 7, 7])
    assert mean_over_classes(right, labels) == pytest.approx((1 + 1 / 2) / 2)


def test_scaling_and_c_are_chosen_without_the_test_videos(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", 1.0)
    features = np.load(folder / "features.npy")
    features[:, 0] *= 1000  # which only standardising repairs
    np.save(folder / "features.npy", features)
    rows = read_train_test(str(folder))
    groups = [rows.train.keys[row].rpartition("_")[0] for row in rows.train_rows]
    parts = hold_outs(rows.train_labels, groups)
    assert len(parts) == 5 and all(0.1 < part.mean() <= 0.25 for part in parts)
    for part in parts:
        outside = {groups[n] for n in np.flatnonzero(part)}
        assert not outside & {groups[n] for n in np.flatnonzero(~part)}
    choice = Classified(rows, [0.01, 1], CPU).choose(parts)
    assert choice.scaling == "standard"
    assert choice.held_out["standard"] > choice.held_out["l2"]
    features[rows.test_rows] = 0
    np.save(folder / "features.npy", features)
    blind = Classified(read_train_test(str(folder)), [0.01, 1], CPU).choose(parts)
    assert blind == choice


def test_encoders_are_named_by_run_file_or_seed(tmp_path: Path) -> None:
    for name in ("runs/a/last.pt", "files/b.pth"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        torch.save(build_backbone("resnet18").state_dict(), path)
    run_folder, file = tmp_path / "runs/a", tmp_path / "files/b.pth"
    given = [str(run_folder), str(file), "random", "random:resnet34:3", f"mine={file}"]
    assert parse_encoders(given, None) == [
        EncoderSpec("a", str(run_folder / "last.pt")),
        EncoderSpec("b", str(file)),
        EncoderSpec("random", "random", "resnet18"),
        EncoderSpec("random-resnet34-3", "random", "resnet34", 3),
        EncoderSpec("mine", str(file)),
    ]
    assert parse_encoders(["random", str(file)], "resnet34")[0].arch == "resnet34"
    for wrong, words in (
        ([str(file), str(file)], "two encoders are named 'b'"),
        (["random"], "random weights need an architecture"),
        (["random:nonsense"], "unknown architecture 'nonsense'"),
        (["random:resnet18:x"], "random:ARCH:SEED"),
        ([str(tmp_path / "none.pt")], "run folder or checkpoint not found"),
        ([str(tmp_path / "runs")], "holds no last.pt"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            parse_encoders(wrong, None)


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a", 0.5), made(tmp_path / "b", 0.5, seed=1)
    fewer = made(tmp_path / "fewer", 0.5, order=np.arange(100))
    other = made(tmp_path / "other", 0.5, labelled=False)
    for folders, settings, words in (
        ((a, fewer), {}, "holds 100 videos"),
        ((a, fewer), {}, "144, and 100 are in both"),
        ((a, other), {}, "labels differ from those of"),
        ((a, a), {}, "two encoders are named 'a'"),
        ((a, tmp_path / "none"), {}, "no such feature folder"),
        ((a, b), {"baseline": ("c",)}, "no encoder is named 'c'"),
        ((a, b), {"baseline": ("a", "b")}, "--baseline: names all encoders"),
        ((a, b), {"test_split": "val"}, "has no labelled val rows"),
        ((a, b), {"fractions": "1,x"}, "--fractions"),
        ((a, b), {"fractions": "101"}, "at most 100"),
        ((a, b), {"svm_c": "0"}, "--svm-c"),
        ((a, b), {"repeats": 1}, "--repeats"),
        ((a, b), {"resamples": 100}, "--resamples"),
        ((a, b), {"encoder": ("random",)}, "--encoder"),
        ((a, b), {"test_features": (str(a),)}, "1 given for 2"),
        ((), {}, "--features, --shards"),
        ((), {"shards": ("x",)}, "--encoder"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            run(tmp_path, *folders, **settings)
    assert not (tmp_path / "compare/compare.json").exists()
