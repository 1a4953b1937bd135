"""DESIGN §12: the commands, options, files and exit codes that people's scripts depend on."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

import cli
from shards import errors
from tests.made_shards import make_set

# Command: its argument or "", and its options with the defaults that are promised (None: no
# promise, () required).
COMMANDS: dict[str, tuple[str, dict[str, object]]] = {
    "prepare": (
        "dataset",
        {
            "--src": (), "--out": None, "--annotations": None, "--split": None, "--frames": None,
            "--fps": None, "--all-frames": False, "--short-edge": None, "--quality": 90,
            "--videos-per-shard": 240, "--workers": None, "--engine": "local",
            "--ray-address": None, "--timeout": 300.0, "--max-failures": None,
            "--retry-failed": False, "--dry-run": False,
        },
    ),
    "verify": ("shards", {}),
    "index": ("shards", {}),
    "inspect": ("shards", {"--html": None}),
    "pretrain": (
        "",
        {
            "--shards": (), "--out": None, "--preset": "paper", "--tasks": "inter,intra,order",
            "--arch": "resnet50", "--init": None, "--epochs": 400, "--batch-size": 512,
            "--lr": None, "--queue-size": 131_072, "--crop-size": 224, "--bn-group": None,
            "--precision": "auto", "--workers": None, "--seed": 0, "--resume": None,
            "--checkpoint-every-steps": 1000, "--keep": 5, "--knn-shards": None,
            "--cache-dir": None,
        },
    ),
    "extract-features": ("", {"--shards": (), "--checkpoint": (), "--out": None, "--frames": None}),
    "probe": (
        "",
        {
            "--features": (), "--train-split": "train", "--test-split": None, "--method": "svm",
            "-C": 1.0,
        },
    ),
    "retrieve build": ("", {"--features": ()}),
    "retrieve query": ("", {"--features": ()}),
    "retrieve evaluate": ("", {"--features": ()}),
    "retrieve duplicates": ("", {"--features": ()}),
    "finetune": ("dataset", {"--shards": None, "--checkpoint": (), "--split": None}),
    "track train": ("", {"--shards": (), "--checkpoint": ()}),
    "track eval": ("", {"--shards": (), "--tracker": ()}),
    "track run": ("", {"--video": (), "--box": (), "--tracker": ()}),
    "import": ("file", {"--out": ()}),
    "export": ("file", {"--format": (), "--out": (), "--size": None}),
    "publish": ("run", {"--out": (), "--results": None, "--push": None, "--private": True}),
    "report": ("runs", {"--out": None}),
    "demo": ("", {}),
    "doctor": ("", {}),
    "bench": ("", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_its_argument_options_and_defaults(name: str) -> None:
    command: click.Command = cli.seco
    for word in name.split():
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None, f"no command {name}"
        command = found
    argument, options = COMMANDS[name]
    arguments = [p.name for p in command.params if isinstance(p, click.Argument)]
    assert arguments == ([argument] if argument else [])
    known = {flag: p for p in command.params for flag in p.opts}
    for flag, default in options.items():
        assert flag in known, f"{name} has no {flag}"
        if default == ():
            assert known[flag].required, f"{name} {flag}"
        elif default is not None:
            assert known[flag].default == default, f"{name} {flag}"


def test_the_choices_and_exit_codes() -> None:
    pretrain = {p.name: p.type for p in cli.pretrain.params}
    assert tuple(pretrain["preset"].choices) == ("paper", "authors")  # type: ignore[attr-defined]
    assert {"bf16", "fp32"} <= set(pretrain["precision"].choices)  # type: ignore[attr-defined]
    assert (errors.EXIT_FAILED, errors.EXIT_TOO_MANY_EXCLUDED, errors.EXIT_STOPPED) == (1, 3, 75)
    assert cli.run(["--help"]) == 0
    assert cli.run(["pretrain", "--no-such-option"]) == 2


def test_the_files_a_run_and_its_features_leave(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "shards", videos=12, frames=4, per_shard=6)
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == [
        "made-000.idx", "made-000.tar", "made-001.idx", "made-001.tar", "made.json",
    ]  # fmt: skip
    run, features = tmp_path / "runs" / "made", tmp_path / "features" / "made"
    arguments = [
        "pretrain",
        "--shards",
        f"{tmp_path}/shards/made-<000..001>.tar",
        "--out",
        str(run),
    ]
    arguments += ["--arch", "resnet10_w16", "--batch-size", "4", "--queue-size", "12"]
    arguments += ["--epochs", "1", "--crop-size", "32", "--log-every", "1", "--device", "cpu"]
    assert cli.run([*arguments, "--workers", "0"]) == 0
    there = {p.name for p in run.iterdir()}
    assert {"last.pt", "config.toml", "metrics.jsonl", "speed.jsonl", "report.html"} <= there
    for line in (run / "metrics.jsonl").read_text().splitlines():
        names = {"step", "epoch", "loss", "loss_inter", "loss_intra", "loss_order", "lr"}
        assert names <= json.loads(line).keys()
    arguments = ["extract-features", "--shards", shards, "--checkpoint", str(run / "last.pt")]
    arguments += ["--out", str(features), "--frames", "3", "--crop-size", "32"]
    assert cli.run([*arguments, "--short-edge", "40", "--workers", "0", "--device", "cpu"]) == 0
    assert cli.run(["probe", "--features", str(features)]) == 0
    assert cli.run(["retrieve", "evaluate", "--features", str(features)]) == 0
    assert {p.name for p in features.iterdir()} >= {
        "features.npy", "halves.npy", "videos.csv", "meta.json", "probe.json",
        "probe-per-class.csv", "probe-confusion.png", "retrieval.json",
    }  # fmt: skip
