"""What differs from the paper's protocol, as recorded; and proxy tasks side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from seco.config import FinetuneConfig, PretrainConfig
from seco.report.report import ReportContent, report_content
from seco.report.results import find_results, short_name
from seco.report.tables import DIFFERS, FINETUNING, PRETRAINING, SAME, UNKNOWN, Compared, Reference
from tests.seco.made_results import write_evaluation, write_features, write_paper_run

TASKS = "inter,intra,order"
META = {"frames": 30, "short_edge": 256, "crop_size": 224, "unreadable": 0}


def content_of(folder: Path) -> ReportContent:
    return report_content(find_results([folder]))


def protocol(folder: Path, table: int = 1) -> dict[str, Compared]:
    """The settings of the one result in a table."""
    ((result, *_),) = content_of(folder).tables[table - 1].results
    found = {f"{setting.stage}: {setting.what}": setting for setting in result.protocol}
    assert len(found) == len(result.protocol)
    return found


def write_probe(tmp_path: Path, checkpoint: str, **changes: Any) -> None:
    values = {"meta": META, "normalise": "none", **changes}
    arch = values.pop("arch", "resnet50")
    encoder = {"arch": arch, "checkpoint": checkpoint, "tasks": TASKS}
    write_features(tmp_path / "features", "kinetics400", encoder=encoder, **values)


def test_the_papers_own_settings_differ_in_nothing_but_the_start(tmp_path: Path) -> None:
    run = write_paper_run(tmp_path / "run", TASKS, init="moco.pt")
    write_probe(tmp_path, str(run / "last.pt"), tolerance=0.01)
    found = protocol(tmp_path)
    assert len(found) == 36
    unknown = {name: s.here for name, s in found.items() if s.state != SAME}
    assert unknown == {"pre-training: start from": "moco.pt, by its name"}


@pytest.mark.parametrize(
    ("changes", "what", "here"),
    [
        ({"epochs": 200}, "epochs", "200"),
        ({"batch_size": 256}, "batch size", "256"),
        ({"batch_size": 256}, "videos", "about 119,808, by its steps"),
        ({"queue_size": 65_536}, "queue size", "65536"),
        ({"shards": ["shards/k400-val-{000..009}.tar"]}, "data", "k400-val"),
        ({"shards": ["a/ucf101.json", "b/k400.json"]}, "data", "ucf101, k400"),
        ({"intra": "pairwise"}, "intra", "pairwise"),
        ({"lr": 0.1}, "lr", "0.1"),
    ],
)
def test_each_changed_setting_is_named(
    tmp_path: Path, changes: dict[str, Any], what: str, here: str
) -> None:
    run = write_paper_run(tmp_path / "run", TASKS, points=100, **changes)
    write_probe(tmp_path, str(run / "last.pt"))
    setting = protocol(tmp_path)[f"pre-training: {what}"]
    assert (setting.here, setting.state) == (here, DIFFERS)


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("s3://bucket/k400.json", True),
        ("shards/k400-{000..999}.tar", True),
        ("shards/k400-<000..999>.tar", True),
        ("shards/k400-*.tar", True),
        ("shards/kinetics400-017.tar", True),
        ("shards/k600.json", False),
    ],
)
def test_sets_are_known_by_their_shards(tmp_path: Path, spec: str, same: bool) -> None:
    run = write_paper_run(tmp_path / "run", TASKS, points=50, shards=[spec])
    write_probe(tmp_path, str(run / "last.pt"))
    assert (protocol(tmp_path)["pre-training: data"].state == SAME) == same


def test_features_and_probe_are_compared(tmp_path: Path) -> None:
    meta = {**META, "frames": 8, "unreadable": 3}
    write_probe(tmp_path, "random", meta=meta, C=0.5, normalise="l2", n_train=1_000, n_test=None)
    found = protocol(tmp_path)
    differing = {name: s.here for name, s in found.items() if s.state == DIFFERS}
    assert differing == {
        "pre-training: training": "none: random weights",
        "features: frames per video": "8",
        "features: videos left out": "3 unreadable",
        "linear SVM: C": "0.5",
        "linear SVM: tolerance": "exact",
        "linear SVM: normalise": "l2",
        "linear SVM: training videos": "1,000",
    }
    assert found["linear SVM: test videos"].state == UNKNOWN


def test_activitynet_takes_fifty_frames(tmp_path: Path) -> None:
    for frames, state in ((30, DIFFERS), (50, SAME)):
        folder = tmp_path / str(frames)
        meta = {**META, "frames": frames}
        sizes = {"n_train": 10_024, "n_test": 4_926}
        write_features(folder, "activitynet", split="official val", meta=meta, **sizes)
        assert protocol(folder)["features: frames per video"].state == state


def test_a_run_that_is_not_in_the_report_is_not_guessed(tmp_path: Path) -> None:
    elsewhere = write_paper_run(tmp_path / "elsewhere" / "run", TASKS, points=50)
    write_probe(tmp_path / "here", str(elsewhere / "last.pt"))
    setting = protocol(tmp_path / "here")["pre-training: training"]
    assert setting.state == UNKNOWN
    assert "not in the report" in setting.here


def test_run_is_found_by_a_relative_name_unless_two_have_it(tmp_path: Path) -> None:
    write_paper_run(tmp_path / "a" / "runs" / "x", TASKS, points=50)
    write_probe(tmp_path, "runs/x/last.pt")
    assert protocol(tmp_path)["pre-training: epochs"].here == "400"
    write_paper_run(tmp_path / "b" / "runs" / "x", TASKS, points=50)
    assert "pre-training: epochs" not in protocol(tmp_path)


def test_an_unfinished_run_and_a_kept_epoch_are_told(tmp_path: Path) -> None:
    run = write_paper_run(tmp_path / "run", TASKS, points=100)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:50]))
    write_probe(tmp_path / "last", str(run / "last.pt"))
    write_probe(tmp_path / "kept", str(run / "epoch-0100.pt"))
    results = content_of(tmp_path).tables[0].results
    epochs = [s.here for r, *_ in results for s in r.protocol if s.what == "epochs"]
    assert epochs == ["100 of 400 planned", "its log ends in epoch 200 of 400"]


def test_table_2_is_resnet18s(tmp_path: Path) -> None:
    run = write_paper_run(tmp_path / "run", TASKS, points=50, arch="resnet18")
    write_probe(tmp_path, str(run / "last.pt"), arch="resnet18")
    assert protocol(tmp_path, table=2)["pre-training: backbone"].state == SAME
    assert content_of(tmp_path).tables[0].results == []


def test_fine_tuning_takes_settings_of_result_and_of_its_run(tmp_path: Path) -> None:
    pretrained = write_paper_run(tmp_path / "runs" / "k400", TASKS, points=50)
    tuned = write_tuning(tmp_path / "runs" / "ucf101-finetune-2", "segments = 7\ndropout = 0.5\n")
    encoder = {"arch": "resnet50", "checkpoint": str(pretrained / "last.pt"), "tasks": TASKS}
    protocol_of = {"clips": 20, "crops": 1, "size": 256, "training": {"epochs": 20, "lr": 1e-3}}
    write_evaluation(
        tuned,
        "finetune",
        dataset="ucf101",
        split=2,
        top1=0.8,
        n_train=300,
        n_test=3_734,
        encoder=encoder,
        protocol=protocol_of,
    )
    found = protocol(tmp_path, table=3)
    differing = {name: s.here for name, s in found.items() if s.state == DIFFERS}
    assert differing == {
        "pre-training: start from": "random weights",
        "fine-tuning: training videos": "300",
        "fine-tuning: crops": "1",
        "fine-tuning: epochs": "20",
        "fine-tuning: dropout": "0.5",
    }
    assert found["fine-tuning: split"].here == "2"
    whose = {
        name: found[f"fine-tuning: {name}"].whose for name in ("epochs", "split", "batch size")
    }
    assert whose == {"epochs": "authors' code", "split": "paper", "batch size": "authors' code"}
    assert found["fine-tuning: batch size"].state == UNKNOWN
    assert found["fine-tuning: test size"].state == SAME


def write_tuning(folder: Path, config: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 4.6}\n')
    return folder


def test_features_of_a_fine_tuned_network_are_no_method_of_the_paper(tmp_path: Path) -> None:
    tuned = write_tuning(tmp_path / "runs" / "tuned", 'checkpoint = "k400/last.pt"\n')
    encoder = {"arch": "resnet50", "checkpoint": str(tuned / "last.pt"), "tasks": None}
    write_features(tmp_path / "features", "kinetics400", encoder=encoder, meta=META)
    rows = [row for row in content_of(tmp_path).tables[0].rows if any(row.ours)]
    assert [row.kind for row in rows] == ["ours"]
    setting = protocol(tmp_path)["pre-training: training"]
    assert (setting.state, "not a pre-training run" in setting.here) == (DIFFERS, True)


def test_splits_have_a_mean(tmp_path: Path) -> None:
    encoder = {"arch": "resnet50", "checkpoint": "a/last.pt", "tasks": TASKS}
    for split, top1 in ((1, 0.8), (2, 0.9), (3, 0.7)):
        folder = tmp_path / str(split)
        write_evaluation(folder, "finetune", dataset="hmdb51", split=split, top1=top1)
        write_evaluation(
            folder, "finetune", dataset="hmdb51", split=split, top1=top1, encoder=encoder
        )
    (cell,) = (row.ours[1] for row in content_of(tmp_path).tables[2].rows if row.method == "SeCo")
    assert [round(figure.percent) for figure in cell] == [80, 90, 70, 80]
    assert cell[-1].note == "mean of splits 1, 2, 3, number of videos unknown"
    assert cell[-1].results == (1, 2, 3)


def test_a_mean_over_splits_says_what_it_lacks_and_mixes_nothing(tmp_path: Path) -> None:
    def written(name: str, split: int, top1: float, epochs: int, sha256: str) -> None:
        encoder = {"arch": "resnet50", "checkpoint": "a.pt", "tasks": TASKS, "sha256": sha256}
        training = {"epochs": epochs, "seed": split}
        write_evaluation(
            *(tmp_path / name, "finetune"), dataset="ucf101", split=split, top1=top1,
            encoder=encoder, protocol={"training": training}, n_test=300, classes=101,
        )  # fmt: skip

    written("1", 1, 0.8, 150, "aa")
    written("2", 2, 0.9, 150, "aa")
    written("3", 3, 0.1, 12, "aa")
    written("other", 3, 0.2, 150, "bb")
    (cell,) = (row.ours[0] for row in content_of(tmp_path).tables[2].rows if row.method == "SeCo")
    means = [figure for figure in cell if "mean of splits" in figure.note]
    assert [round(figure.percent) for figure in means] == [85]
    assert means[0].note.startswith("mean of splits 1, 2, 2 of 3 splits, partial set: 300 of ")


@pytest.mark.parametrize(
    ("config", "compared", "apart"),
    [
        (
            PretrainConfig,
            PRETRAINING,
            {"shards", "split", "epochs", "init", "tasks", "arch"},  # compared on their own
        ),
        (FinetuneConfig, FINETUNING, {"split", "arch", "checkpoint", "dataset", "shards"}),
    ],
)
def test_every_setting_is_compared_or_of_no_consequence(
    config: type, compared: Sequence[Reference], apart: set[str]
) -> None:
    """A new setting of the method has to be compared with the paper's."""
    of_no_consequence = {
        *("out", "preset", "seed", "device", "processes", "workers", "decode", "views_on", "keep"),
        *("channels_last", "compile", "precision", "accumulate", "resume", "log_every", "cache_gb"),
        *("window_shards", "cache_dir", "steps_per_epoch", "knn_shards", "knn_every_epochs"),
        *(
            "max_unreadable",
            "max_failures",
            "loggers",
            "checkpoint_every_steps",
            "keep_every_epochs",
        ),
        *("validate_every_epochs", "skip_test", "test_frames"),
    }
    names = {name for reference in compared for name in reference.names}
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields - names - of_no_consequence == apart


def test_tracking_stands_in_table_1_with_how_many_sequences(tmp_path: Path) -> None:
    encoder = {"arch": "resnet50", "checkpoint": "x.pt", "tasks": TASKS}
    figures = {"precision_20": 0.7, "precision_auc": 0.6, "success_auc": 0.5}
    sizes = {"sequences": 4, "of_sequences": 100, "frames": 2_000, "fps": 31.5}
    run = write_tuning(tmp_path / "run", "batch_size = 16\nlr = 0.01\nraw_features = false\n")
    write_evaluation(run / "eval", "track", dataset="otb100", encoder=encoder, **figures, **sizes)
    content = content_of(tmp_path)
    row = next(r for r in content.tables[0].rows if r.method == "SeCo-Inter+Intra+Order")
    assert [figure.percent for figure in row.ours[2]] == [70, 60]
    assert [figure.percent for figure in row.ours[3]] == [50]
    assert "partial set: 4 of 100 sequences" in row.ours[3][0].note
    found = protocol(tmp_path)
    assert (found["tracking: sequences"].here, found["tracking: sequences"].state) == (
        "4 of 100",
        DIFFERS,
    )
    differing = [name for name, setting in found.items() if setting.state == DIFFERS]
    assert differing == [
        "tracking: sequences",
        "tracking: raw features",
        "tracking: batch size",
    ]
    assert found["tracking: lr"].state == SAME
    for name in ("training set", "epochs", "momentum", "max gap"):
        setting = found[f"tracking: {name}"]
        assert (setting.here, setting.state) == ("not recorded", UNKNOWN)
    assert content.evaluations[0].facts == ["4 of 100 sequences", "2,000 frames", "31.5 frames/s"]


@pytest.mark.parametrize(
    ("shards", "here", "state"),
    [
        (["shards/got10k.json"], "got10k", SAME),
        (["s3://b/got10k-{000..038}.tar"], "got10k", SAME),
        ("shards/got10k.json", "got10k", SAME),
        (["shards/got10k.json", "shards/got10k-val.json"], "got10k, got10k-val", DIFFERS),
        (["shards/otb100.json"], "otb100", DIFFERS),
        ([], "not recorded", UNKNOWN),
        ({"a": 1}, "not recorded", UNKNOWN),
    ],
)
def test_what_a_tracker_was_trained_on_is_compared(
    tmp_path: Path, shards: Any, here: str, state: str
) -> None:
    settings = {"train_shards": shards, "epochs": 20, "epochs_planned": 50, "max_gap": 99}
    run = write_tuning(tmp_path / "run", "epochs = 50\n")
    encoder = {"arch": "resnet50", "checkpoint": "x.pt", "tasks": TASKS}
    figures = {"success_auc": 0.5, "encoder": encoder, "settings": settings}
    write_evaluation(run / "eval", "track", dataset="otb100", **figures)
    found = protocol(tmp_path)
    setting = found["tracking: training set"]
    assert (setting.paper, setting.here, setting.state) == ("GOT-10k", here, state)
    reached = found["tracking: epochs"]
    assert (reached.paper, reached.here, reached.state) == ("50", "20", DIFFERS)
    assert found["tracking: max gap"].state == SAME


def test_an_older_result_names_the_epochs_that_were_planned(tmp_path: Path) -> None:
    encoder = {"arch": "resnet50", "checkpoint": "x.pt", "tasks": TASKS}
    figures = {"success_auc": 0.5, "encoder": encoder, "settings": {"epochs": 50}}
    write_evaluation(tmp_path / "eval", "track", dataset="otb100", **figures)
    assert protocol(tmp_path)["tracking: epochs"].state == UNKNOWN


def test_ablation_compares_like_with_like(tmp_path: Path) -> None:
    def probed(name: str, tasks: str | None, top1: float, **changes: Any) -> None:
        encoder: dict[str, Any] = {"arch": "resnet50", "checkpoint": "random"}
        if tasks:
            run = write_paper_run(
                tmp_path / name, tasks, points=50, **{"seed": len(name), **changes.pop("run", {})}
            )
            encoder |= {"checkpoint": str(run / "last.pt"), "tasks": tasks}
        values = {"meta": META, "n_test": 96, "split": "1 test", **changes}
        write_features(tmp_path / f"f-{name}", "hmdb51", top1=top1, encoder=encoder, **values)

    probed("r", None, 0.2)
    probed("a", "inter", 0.3)
    probed("bb", "inter", 0.4)
    probed("ccc", "inter,intra", 0.5)
    probed("d", "inter,intra,order", 0.9, meta={**META, "frames": 8})
    (ablation,) = content_of(tmp_path).ablations
    assert (ablation.dataset, ablation.figure, ablation.arch) == (
        "hmdb51",
        "svm, top-1",
        "resnet50",
    )
    assert "30 frames per video" in ablation.conditions
    rows = [(row.tasks, row.results, round(row.percent, 6)) for row in ablation.rows]
    assert rows == [("random initialisation", 1, 20), ("inter", 2, 35), ("inter + intra", 1, 50)]
    assert [row.gain for row in ablation.rows] == [None, pytest.approx(15), pytest.approx(15)]
    assert (ablation.rows[1].lowest, ablation.rows[1].highest) == (30, 40)
    assert ablation.varying == []
    assert {row.paper for row in ablation.rows} == {""}
    probed("eeee", "inter,intra", 0.5, run={"epochs": 100, "lr": 0.1})
    (ablation,) = content_of(tmp_path).ablations
    assert ablation.varying == ["epochs (400 / 100)", "lr (0.2 / 0.1)"]


def test_ablation_on_a_set_of_the_paper_has_its_figures(tmp_path: Path) -> None:
    for tasks, top1 in (("inter", 0.3), (TASKS, 0.4)):
        encoder = {"arch": "resnet50", "checkpoint": tasks, "tasks": tasks}
        write_features(tmp_path / tasks, "kinetics400", top1=top1, encoder=encoder)
    (ablation,) = content_of(tmp_path).ablations
    assert [row.paper for row in ablation.rows] == ["58.97", "61.91"]


def test_fine_tunings_of_other_length_are_not_compared(tmp_path: Path) -> None:
    def tuned(tasks: str, epochs: int) -> None:
        encoder = {"arch": "resnet18", "checkpoint": f"{tasks}/last.pt", "tasks": tasks}
        write_evaluation(
            tmp_path / f"{tasks}-{epochs}",
            "finetune",
            dataset="made",
            top1=0.5,
            encoder=encoder,
            protocol={"training": {"epochs": epochs}},
        )

    tuned("inter", 10)
    tuned(TASKS, 20)
    assert content_of(tmp_path).ablations == []
    tuned(TASKS, 10)
    (ablation,) = content_of(tmp_path).ablations
    assert "epochs 10" in ablation.conditions


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("resnet50, /a/b/runs/x/last.pt", "resnet50, …/x/last.pt"),
        ("resnet50, x/last.pt", "resnet50, x/last.pt"),
        ("resnet50, random initialisation", "resnet50, random initialisation"),
        ("/a/b c, d/e/f.pt", "/a/b c, …/e/f.pt"),
        ("/" * 1_000_000, "…//"),
    ],
)
def test_long_paths_are_shortened(name: str, short: str) -> None:
    assert short_name(name) == short
