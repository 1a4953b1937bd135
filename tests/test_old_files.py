"""Files written by an old version are read: shards, features and a checkpoint of commit 25e9a38.

A script in ``written_by_25e9a38`` made them, in a worktree of that commit.
"""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest

import cli
from seco.features.store import read_features

OLD = Path(__file__).parent / "written_by_25e9a38"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "run"
    shutil.copytree(OLD / "run", folder)
    with lzma.open(folder / "last.pt.xz") as packed, open(folder / "last.pt", "wb") as to:
        shutil.copyfileobj(packed, to)
    return folder


def test_old_shards_verify_and_an_old_checkpoint_gives_the_old_features(
    run: Path, tmp_path: Path
) -> None:
    shards = str(OLD / "shards" / "old.json")
    assert cli.run(["verify", shards]) == 0
    options = ["--frames", "4", "--short-edge", "36", "--crop-size", "32", "--workers", "0"]
    source = ["--shards", shards, "--checkpoint", str(run / "last.pt")]
    out = tmp_path / "features"
    assert cli.run(["extract-features", *source, *options, "--out", str(out)]) == 0
    new, old = read_features(out), read_features(OLD / "features")
    assert (new.keys, new.splits) == (old.keys, old.splits)
    np.testing.assert_array_equal(new.labels, old.labels)
    np.testing.assert_allclose(new.features, old.features, rtol=1e-4, atol=1e-6)


def test_old_features_give_the_old_probe(tmp_path: Path) -> None:
    assert cli.run(["probe", "--features", str(OLD / "features"), "--out", str(tmp_path)]) == 0
    new = json.loads((tmp_path / "probe.json").read_text())
    old = json.loads((OLD / "probe.json").read_text())
    for key in ("top1", "mean_class", "n_train", "n_test", "split", "encoder", "per_class"):
        assert new[key] == old[key]


def test_an_old_checkpoint_begins_a_new_run_and_is_exported(run: Path, tmp_path: Path) -> None:
    options = ["--arch", "resnet18", "--epochs", "1", "--batch-size", "4", "--crop-size", "32"]
    options += ["--queue-size", "8", "--embedding-dim", "8", "--workers", "0", "--lr", "0.01"]
    options += ["--shards", str(OLD / "shards" / "old.json"), "--init", str(run / "last.pt")]
    assert cli.run(["pretrain", *options, "--out", str(tmp_path / "new")]) == 0
    to = tmp_path / "resnet18.pth"
    assert (
        cli.run(["export", str(run / "last.pt"), "--format", "torchvision", "--out", str(to)]) == 0
    )
    assert cli.run(["import", str(to), "--out", str(tmp_path / "again.pt")]) == 0


def test_an_old_finished_run_is_known_as_finished(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.toml and checkpoint are those that ``--resume`` compares."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    log = (folder / "metrics.jsonl").read_text()
    options = ["--config", str(folder / "config.toml"), "--out", str(folder), "--workers", "0"]
    options += ["--shards", str(OLD / "shards" / "old.json"), "--device", "cpu"]
    assert cli.run(["pretrain", *options, "--resume", "auto"]) == 0
    assert (folder / "metrics.jsonl").read_text() == log
