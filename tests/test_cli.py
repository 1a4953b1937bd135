"""The command line as people meet it: the whole chain, their mistakes, and Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch

import cli
import seco.features.plan
from pipelines._config import PrepareConfig
from seco.config import (
    EXTRACTION,
    BuildConfig,
    CompareConfig,
    DemoConfig,
    DuplicatesConfig,
    EvaluateConfig,
    ExportConfig,
    ExtractConfig,
    FinetuneConfig,
    FinetuneTestConfig,
    ImportConfig,
    PretrainConfig,
    ProbeConfig,
    PublishConfig,
    QueryConfig,
    TrackEvalConfig,
    TrackRunConfig,
    TrackTrainConfig,
)
from tests import commands
from tests.made_shards import make_set

TINY = shlex.split(
    "--arch resnet18 --epochs 1 --batch-size 4 --bn-group 2 --queue-size 12 --crop-size 32 "
    "--workers 0 --device cpu --log-every 1"
)
SMALL_FEATURES = shlex.split("--frames 3 --short-edge 36 --crop-size 32 --workers 0 --device cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(tmp_path_factory.mktemp("shards"), videos=18, frames=4, per_shard=7)


@pytest.fixture(scope="module")
def run_folder(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "made"
    assert cli.run(["pretrain", "--shards", shards, "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture(scope="module")
def features(shards: str, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "made"
    arguments = ["--shards", shards, "--checkpoint", str(run_folder / "last.pt"), "--out", str(out)]
    assert cli.run(["extract-features", *arguments, *SMALL_FEATURES]) == 0
    return out


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """The one line that a command prints when it fails."""
    capsys.readouterr()
    assert cli.run(arguments) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith(("seco: ", "Error: "))]
    assert len(lines) == 1, error
    return lines[0]


def test_the_chain_ends_in_a_report(
    shards: str,
    run_folder: Path,
    features: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["probe", "--features", str(features)]) == 0
    assert cli.run(["retrieve", "evaluate", "--features", str(features)]) == 0
    assert cli.run(["retrieve", "build", "--features", str(features)]) == 0
    assert cli.run(["retrieve", "duplicates", "--features", str(features)]) == 0
    page = tmp_path / "nearest.html"
    query = ["--features", str(features), "--video", "video_0003", "--html", str(page)]
    assert cli.run(["retrieve", "query", *query]) == 0
    assert "video_0003" in page.read_text()
    assert page.read_text().count("data:image/jpeg") >= 3
    report = tmp_path / "report.html"
    assert cli.run(["report", str(run_folder), str(features), "--out", str(report)]) == 0
    html = report.read_text()
    top1 = json.loads((features / "probe.json").read_text())["top1"]
    assert f"{100 * top1:.1f}" in html
    assert "61.91" in html  # the paper's Table 1 beside it
    assert "<svg" in html
    sheet, sheet_page = tmp_path / "sheet.png", tmp_path / "set.html"
    capsys.readouterr()
    assert cli.run(["inspect", shards, "--png", str(sheet), "--html", str(sheet_page)]) == 0
    shown = capsys.readouterr().out
    assert "18" in shown
    assert "Circle" in shown
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert "video_0000" in sheet_page.read_text()


def test_the_pre_trained_features_are_the_checkpoints(
    shards: str, features: Path, tmp_path: Path
) -> None:
    """Not those of random weights, and the same for any number of loader processes."""
    import numpy as np

    encoder = json.loads((features / "meta.json").read_text())["encoder"]
    assert Path(encoder["checkpoint"]).name == "last.pt"
    assert encoder["tasks"] == "inter,intra,order"
    out = str(tmp_path / "random")
    random = ["--shards", shards, "--checkpoint", "random", "--arch", "resnet18", "--out", out]
    assert cli.run(["extract-features", *random, *SMALL_FEATURES, "--workers", "2"]) == 0
    other = np.load(tmp_path / "random" / "features.npy")
    mine = np.load(features / "features.npy")
    assert other.shape == mine.shape == (18, 512)
    assert not np.allclose(other, mine, atol=1e-3)
    again = str(tmp_path / "again")
    assert cli.run(["extract-features", *random[:-1], again, *SMALL_FEATURES]) == 0
    assert np.array_equal(np.load(tmp_path / "again" / "features.npy"), other)


def test_compare_extracts_what_is_missing_and_uses_it_again(
    shards: str, run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "--shards", shards, "--encoder", f"seco={run_folder}"]
    arguments += ["--encoder", "random", "--out", str(out), "--fractions", "100", "--svm-c", "0.01"]
    assert cli.run([*arguments, *SMALL_FEATURES]) == 0
    shown = capfd.readouterr().out
    assert "seco is better than random at 0 of 5 measures" in shown  # six test videos are too few
    assert len(shown.splitlines()) == 10
    assert shown.count("cannot be told: 6 groups of videos; at least 10 are needed") == 1
    found = json.loads((out / "compare.json").read_text())
    assert found["encoders"]["random"]["arch"] == "resnet18"  # as the run's
    assert found["encoders"]["seco"]["tasks"] == "inter,intra,order"
    assert "groups of videos; at least 10 are needed" in str(found["comparisons"])
    assert "<svg" in (out / "compare.html").read_text()
    written = {path: path.stat().st_mtime_ns for path in out.glob("features/*/*")}
    assert len(written) >= 8
    again = [*arguments, "--encoder", "other=random:resnet18:1", *SMALL_FEATURES]
    assert cli.run(again) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(json.loads((out / "compare.json").read_text())["comparisons"]) == 2


def test_config_of_a_run_repeats_it(shards: str, run_folder: Path, tmp_path: Path) -> None:
    again = ["--config", str(run_folder / "config.toml"), "--shards", shards]
    assert cli.run(["pretrain", *again, "--out", str(tmp_path)]) == 0
    first, second = run_folder / "metrics.jsonl", tmp_path / "metrics.jsonl"
    assert first.read_bytes() == second.read_bytes()


def test_the_benchmarks_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    for asked in (["bench", "step"], ["bench", "--help"]):
        assert cli.run(asked) == 1
        assert "not part of the installed package — clone the repository" in capfd.readouterr().err


MISTAKES = {
    "missing --src": ("prepare ucf101 --src {tmp}/nowhere --out {tmp}/out", 1, "nowhere"),
    "no --src": ("prepare ucf101", 2, "--src"),
    "empty folder": ("prepare folder --src {empty} --out {tmp}/out", 1, "empty"),
    "unknown data set": ("prepare imagenet --src {empty}", 1, "imagenet"),
    "unreadable video": ("prepare folder --src {broken} --out {tmp}/out", 1, "broken"),
    "out is a file": ("prepare folder --src {broken} --out {file}/x", 1, "file"),
    "no shards": ("pretrain --shards {tmp}/none-*.tar", 1, "matches no shards"),
    "missing shard": ("pretrain --shards {tmp}/k-{{000..003}}.tar", 1, "4 of 4 shards"),
    "truncated tar": ("pretrain --shards {cut} --out {tmp}/run", 1, "truncated"),
    "truncated tar, extract": (
        "extract-features --shards {cut} --checkpoint random --out {tmp}/f",
        1,
        "truncated",
    ),
    "truncated tar, inspect": ("inspect {cut}", 1, "truncated"),
    "run not writable": ("pretrain --shards {shards} --out {file}/x", 1, "file"),
    "not a checkpoint": (
        "extract-features --shards {shards} --checkpoint {file} --out {tmp}/f",
        1,
        "is not a checkpoint",
    ),
    "missing checkpoint": (
        "extract-features --shards {shards} --checkpoint {tmp}/no.pt --out {tmp}/f",
        1,
        "no.pt: cannot be read",
    ),
    "features of nothing": ("probe --features {empty}", 1, "empty"),
    "features nowhere": ("retrieve evaluate --features {tmp}/nowhere", 1, "nowhere"),
    "unknown video": ("retrieve query --features {features} --video nobody", 1, "nobody"),
    "nothing to report": ("report {empty}", 1, "empty"),
    "bad option": ("pretrain --shards x --batch-size many", 2, "many"),
    "unknown option": ("probe --features x --colour red", 2, "--colour"),
    "bad config": ("pretrain --config {file} --shards x", 1, "is not TOML"),
    "no config": ("pretrain --config {tmp}/none.toml --shards x", 1, "cannot be read"),
    "binary config": ("pretrain --config {checkpoint} --shards x", 1, "is not TOML"),
    "another preset": (
        "pretrain --config {run}/config.toml --preset authors --shards {shards}",
        1,
        "all options of preset paper",
    ),
    "out is code": ("pretrain --shards {shards} --out {code}", 1, "a folder of Python code"),
    "no classes": ("prepare ucf101 --src {flat} --out {tmp}/out", 1, "flat"),
    "results not writable": ("probe --features {features} --out {file}/x", 1, "file"),
    "unknown setting": ("pretrain --config {toml} --shards x", 1, "unknown option 'colour'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_line(
    name: str,
    shards: str,
    run_folder: Path,
    tmp_path: Path,
    features: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, code, message = MISTAKES[name]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "video.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "file").write_text("{ not toml")
    (tmp_path / "set.toml").write_text('colour = "red"')
    make_set(tmp_path / "cut", videos=6)
    tar = tmp_path / "cut" / "made-000.tar"
    tar.write_bytes(tar.read_bytes()[:-20_000])
    places = {"tmp": tmp_path, "cut": tar, "shards": shards, "features": features}
    places |= {"toml": tmp_path / "set.toml", "run": run_folder, "code": tmp_path / "code"}
    places |= {"checkpoint": run_folder / "last.pt", "flat": tmp_path / "flat"}
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "__init__.py").write_text("")
    (tmp_path / "flat" / "ucfTrainTestlist").mkdir(parents=True)
    (tmp_path / "flat" / "ucfTrainTestlist" / "classInd.txt").write_text("1 Archery\n")
    (tmp_path / "flat" / "ucfTrainTestlist" / "trainlist01.txt").write_text("Archery/a.avi 1\n")
    (tmp_path / "flat" / "ucfTrainTestlist" / "testlist01.txt").write_text("Archery/b.avi\n")
    (tmp_path / "flat" / "a.avi").write_bytes(b"")
    places |= {place: tmp_path / place for place in ("empty", "broken", "file")}
    arguments = [part.format(**places) for part in command.split()]
    assert message in complaint(arguments, capsys, code)


def test_features_of_another_model_are_refused(
    shards: str, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    random = ["--shards", shards, "--checkpoint", "random", "--arch", "resnet18"]
    assert cli.run(["extract-features", *random, "--out", str(other), *SMALL_FEATURES]) == 0
    line = complaint(["probe", "--features", str(features), "--test-features", str(other)], capsys)
    assert "encoder" in line


def test_a_checkpoint_that_would_run_code_is_refused(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"model": Malicious()}, tmp_path / "evil.pt")
    line = complaint(
        ["extract-features", "--shards", shards, "--checkpoint", str(tmp_path / "evil.pt")], capsys
    )
    assert "holds more than tensors" in line
    assert "weights_only=False" not in line
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("damage", ["truncated", "no model", "legacy"])
def test_damaged_checkpoints_are_named(
    damage: str, shards: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.pt"
    if damage == "truncated":
        path.write_bytes((run_folder / "last.pt").read_bytes()[:100_000])
    elif damage == "no model":
        torch.save({"format": "seco-checkpoint", "version": 1}, path)
    else:
        torch.save({"weight": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:400])
    line = complaint(
        ["extract-features", "--shards", shards, "--checkpoint", str(path), "--out", str(tmp_path)],
        capsys,
    )
    assert "damaged.pt: is" in line


def test_extracting_again_removes_the_results_of_the_features_before(
    shards: str, features: Path, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "f")]
    random = ["--shards", shards, "--checkpoint", "random", "--arch", "resnet18"]
    assert cli.run(["extract-features", *random, *out, *SMALL_FEATURES]) == 0
    assert cli.run(["retrieve", "evaluate", "--features", str(tmp_path / "f")]) == 0
    assert (tmp_path / "f" / "retrieval.json").is_file()
    again = ["extract-features", *random, *out, *SMALL_FEATURES, "--seed", "1"]
    assert cli.run(again) == 1
    assert (tmp_path / "f" / "retrieval.json").is_file()
    assert cli.run([*again, "--overwrite"]) == 0
    assert not (tmp_path / "f" / "retrieval.json").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    shards: str, tmp_path: Path
) -> None:
    """A file-size limit stands in for the full disk: writes fail part-way, as they do on one."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    out = tmp_path / "run"
    command = [sys.executable, "-m", "cli", "pretrain", "--shards", shards, "--out", str(out)]
    done = subprocess.run(
        [*command, *TINY], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "last.pt: cannot be written (File too large)" in done.stderr
    assert not list(out.glob("*.pt*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_the_training(
    number: signal.Signals, shards: str, tmp_path: Path
) -> None:
    """As a terminal sends Ctrl-C and a scheduler SIGTERM: to the loader processes as well."""
    out = tmp_path / "out"
    command = ["pretrain", "--shards", shards, "--out", out, *TINY]
    run = commands.start(*command, "--epochs", "4000", "--workers", "2")
    log = out / "metrics.jsonl"
    wait_for(lambda: log.is_file() and log.read_text() != "")
    os.killpg(run.pid, number)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 75, error
    assert "Traceback" not in error
    assert "--resume auto" in error
    assert (out / "last.pt").is_file()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_while_the_data_stalls(tmp_path: Path, workers: int) -> None:
    """What was trained is saved, and neither loader processes nor their commands stay behind."""
    out, seconds = tmp_path / "out", f"{random.randrange(10**5, 10**6)}"
    options = ["--steps-per-epoch", "3", "--workers", workers, "--out", out, *TINY]
    run = commands.start("pretrain", "--shards", f"pipe:sleep {seconds}", *options)

    def sleeping() -> bool:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if process.read_bytes().split(b"\0")[:2] == [b"sleep", seconds.encode()]:
                    return True
        return False

    wait_for(sleeping)
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 75, error
    assert "SIGINT: saved step 0" in error and "Traceback" not in error
    assert (out / "last.pt").is_file()
    wait_for(lambda: not sleeping())


def test_ctrl_c_while_extracting(
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    normalise, batches = seco.features.plan.normalise, 0

    def interrupted(images: torch.Tensor) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if batches == 4:  # the first shard has two
            raise KeyboardInterrupt
        return normalise(images)

    monkeypatch.setattr(seco.features.plan, "normalise", interrupted)
    options = ["--checkpoint", "random", "--arch", "resnet18", "--out", str(tmp_path / "out")]
    command = ["extract-features", "--shards", shards, *options, *SMALL_FEATURES]
    assert "run the same command again" in complaint([*command, "--workers", "1"], capsys, code=75)
    left = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")]
    assert [str(path)[:15] for path in sorted(left)] == ["parts", "parts/made-000-"]
    assert cli.run(command) == 0
    assert "resuming: 1 of 3 shards are done" in capsys.readouterr().err


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_command_has_help_with_an_example() -> None:
    def walk(command: click.Command, path: list[str]) -> list[list[str]]:
        if isinstance(command, click.Group):
            return [p for name, sub in command.commands.items() for p in walk(sub, [*path, name])]
        return [path]

    commands = walk(cli.seco, [])
    assert len(commands) >= 11
    for path in commands:
        context = click.Context(cli.seco, info_name="seco")
        command: click.Command = cli.seco
        for name in path:
            assert isinstance(command, click.Group)
            command = command.commands[name]
        text = command.get_help(context)
        assert f"Example: seco {' '.join(path)}" in text, path


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("prepare", PrepareConfig),
        ("pretrain", PretrainConfig),
        ("extract-features", ExtractConfig),
        ("finetune", FinetuneConfig),
        ("finetune-eval", FinetuneTestConfig),
        ("probe", ProbeConfig),
        ("publish", PublishConfig),
        ("retrieve evaluate", EvaluateConfig),
        ("retrieve build", BuildConfig),
        ("retrieve query", QueryConfig),
        ("retrieve duplicates", DuplicatesConfig),
        ("compare", CompareConfig),
        ("demo", DemoConfig),
        ("import", ImportConfig),
        ("export", ExportConfig),
        ("track train", TrackTrainConfig),
        ("track eval", TrackEvalConfig),
        ("track run", TrackRunConfig),
    ],
)
def test_options_are_the_settings(command: str, config: type) -> None:
    found: click.Command = cli.seco
    for name in command.split():
        assert isinstance(found, click.Group)
        found = found.commands[name]
    options = {p.name: p for p in found.params}
    for field in dataclasses.fields(config):
        if not field.metadata.get("hidden"):
            option = options.pop(field.name)
            if isinstance(option, click.Option):
                assert option.required or option.default == field.default, field.name
    others = EXTRACTION if command == "compare" else ()
    assert set(options) - set(others) <= {"config", "video", "html"}


def test_verify_and_index(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = make_set(tmp_path / "s")
    assert cli.run(["verify", manifest]) == 0
    assert "3 shards, 24 videos, 144 frames: no faults" in capfd.readouterr().out
    (tmp_path / "s" / "made-001.idx").unlink()
    assert cli.run(["verify", manifest]) == 1
    shown = capfd.readouterr()
    assert "made-001.tar: has no index" in shown.out
    assert f"seco: {manifest}: faults found: 1" in shown.err
    assert cli.run(["index", str(tmp_path / "s")]) == 0
    assert cli.run(["verify", manifest]) == 0
    assert cli.run(["verify", str(tmp_path / "none")]) == 1
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("probe", ["--features", "x", "--method", "linear"]),
        ("finetune", ["--checkpoint", "random", "--shards", "x"]),
        ("extract-features", ["--checkpoint", "random", "--shards", "x"]),
        ("pretrain", ["--shards", "x"]),
        ("track train", ["--checkpoint", "random", "--shards", "x"]),
    ],
)
@pytest.mark.parametrize("seed", ["99999999999999999999999", "-1"])
def test_seeds_that_no_generator_takes(
    command: str, options: list[str], seed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*command.split(), *options, "--seed", seed]) == 2
    assert f"Invalid value for '--seed': {seed} is not in the range 0 to" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_none(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", "--checkpoint", "random", "--shards", "x", "--max-unreadable", value]
    assert cli.run(command) == 2
    assert "--max-unreadable" in capsys.readouterr().err


def test_a_report_is_not_written_over_itself(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "r.html")
    command = ["report", str(run_folder), "--out", out, "--markdown", str(tmp_path / "./r.html")]
    assert cli.run(command) == 1
    assert "name the same file" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
