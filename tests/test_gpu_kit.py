"""``benchmarks/gpu.sh`` and its parts: what is kept of a part that fails, hangs or has no time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import smoke
from benchmarks.gpu.data import cut_set
from benchmarks.gpu.joined_step import joined_step
from benchmarks.gpu.kit import PACKAGES
from benchmarks.gpu.table import Table
from benchmarks.step_ways import StepWays
from seco.config import PretrainConfig, resolve_pretrain
from shards.opening import open_shards
from tests.data import ROOT
from tests.made_shards import make_set

# Stands for Python: each part does what the test says.
STUB = """#!/usr/bin/env bash
case "$*" in {cases} *) echo "| a figure | 1 |" ;; esac
"""


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


class Script:
    """gpu.sh with a stub for Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"

    def start(self, *arguments: str, cases: str = "", **environment: str) -> subprocess.Popen[str]:
        stub = self.folder / "python"
        stub.write_text(STUB.format(cases=cases))
        stub.chmod(0o755)
        given = {"PYTHON": str(stub), "OUT": str(self.out), "SECO_GPU_KIT": str(self.folder)}
        return subprocess.Popen(
            [str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **given, **environment},
        )

    def run(self, *arguments: str, cases: str = "", **environment: str) -> tuple[int, list[str]]:
        process = self.start(*arguments, cases=cases, **environment)
        printed, _ = process.communicate(timeout=120)
        return process.returncode, printed.splitlines()

    def results(self) -> str:
        return (self.out / "results.md").read_text()


def test_all_parts_run_and_pass(script: Script) -> None:
    for mode, parts in (("check", 7), ("measure", 8)):
        code, lines = script.run(mode)
        assert code == 0 and lines[-1] == "all passed"
        assert sum(": exit code 0 after" in line for line in lines[-parts - 1 :]) == parts
        assert script.results().count("| a figure | 1 |") == parts - (mode == "check")
    assert sorted(file.name for file in script.out.iterdir()) == ["results.md"]


def test_a_part_that_fails_leaves_its_last_lines_and_the_others_run(script: Script) -> None:
    broken = '*"gpu.smoke"*" smoke") echo "| half | 2 |"; seq -f "line %g" 99 >&2; exit 3 ;;'
    code, lines = script.run("check", cases=broken)
    assert code == 1 and lines[-1] == "not all passed: smoke failed"
    assert any(line.startswith("smoke: exit code 3 after") for line in lines)
    assert "| half | 2 |" in script.results()
    assert "compile: exit code 0" in script.results()
    kept = (script.out / "failures.md").read_text().splitlines()
    assert "line 70" in kept and "line 99" in kept and "line 69" not in kept
    assert len(list(script.out.iterdir())) <= 3


def test_parts_without_time_are_skipped_and_said_so(script: Script) -> None:
    code, lines = script.run("check", TOTAL="49")  # the tests take 60 and more, compiling 50
    assert code == 1
    assert lines[-1] == "not all passed: tests skipped;compile skipped"
    assert "## step" in script.results() and "## tests" not in script.results()


def test_a_part_that_hangs_is_stopped_at_its_limit(script: Script) -> None:
    hangs = '*"gpu.data"*) echo "| before | 3 |"; sleep 1000 ;;'
    code, lines = script.run("check", "cpu", cases=hangs, TOTAL="2", ONLY="card")
    assert code == 1
    assert "sets failed" in lines[-1]
    assert "| before | 3 |" in script.results() and "sets: exit code 124" in script.results()


def test_a_stopped_script_still_prints_what_was_measured(script: Script, tmp_path: Path) -> None:
    hangs = f'*"gpu.card"*) echo "| before | 4 |"; echo $$ > {tmp_path}/pid; sleep 1000 ;;'
    process = script.start("check", cases=hangs)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").is_file() and "before" in script.results()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "| before | 4 |" in printed
    assert printed.splitlines()[-1] == "not all passed: the script was stopped"
    part = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{part}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_only_the_named_parts_run(script: Script) -> None:
    code, lines = script.run("measure", ONLY="bare,after")
    assert code == 0 and lines[-1] == "all passed"
    assert [line.partition(":")[0] for line in lines[-4:-1]] == ["sets", "bare", "after"]


def test_a_mistaken_mode_is_explained(script: Script) -> None:
    code, lines = script.run("measures")
    assert code == 2 and "benchmarks/gpu.sh check" in "\n".join(lines)


def test_checks_fail_on_too_large_and_on_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("cpu")
    table.check("small", 0.5, 1)
    assert table.exit_code() == 0
    table.check("large", 1.5, 1)
    table.check("none", float("nan"), 1)
    assert table.failed == ["large", "none"] and table.exit_code() == 1
    assert capsys.readouterr().out.count("FAILED") == 2


def test_predictions_stand_beside_figures_of_a_gpu_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for device in ("cpu", "cuda"):
        Table(device).row("step", "200 ms", "210 ms", "it was counted")
    on_cpu, on_gpu = capsys.readouterr().out.split("| what")[1:]
    assert "| step |  | 200 ms |" in on_cpu and "counted" not in on_cpu
    assert "| step | 210 ms | 200 ms |" in on_gpu
    assert "> step: 210 ms, as it was counted" in on_gpu


def test_a_set_cut_from_a_smaller_one_holds_its_frames(tmp_path: Path) -> None:
    source = open_shards([make_set(tmp_path, videos=3, frames=5, size=(48, 64))])
    made = open_shards([cut_set(source.addresses[0], tmp_path / "cut", "cut", 7, 2, 4)])
    assert len(made) == 7 and made.frame_counts.tolist() == [2] * 7
    for video in range(7):
        turn, place = divmod(video, 3)
        for frame in range(2):
            expected = source.read_frame(place, (2 * turn + frame) % 5)
            assert made.read_frame(video, frame) == expected
    again = cut_set(source.addresses[0], tmp_path / "again", "cut", 7, 2, 4)
    assert Path(again).read_bytes() == (tmp_path / "cut" / "cut.json").read_bytes()


def test_losses_of_the_kit_are_compared_with_where_they_are_of_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = smoke.compared(torch.device("cpu"), small=True)
    shards = make_set(tmp_path, videos=8)
    kept = {**smoke.expected_of(shards, given), "torch": "2.11.0", "seconds": 50, "losses": [[1.0]]}
    made = {**kept, "losses": [[2.0]]}
    monkeypatch.setattr(smoke, "REFERENCE", tmp_path / "reference.json")
    monkeypatch.setattr(smoke, "make_reference", lambda *args, **named: made)
    table = Table("cpu")
    smoke.REFERENCE.write_text(json.dumps(kept))
    on_gpu = smoke.compared(torch.device("cuda", 0), small=True)
    found = smoke.reference_for(tmp_path, shards, on_gpu, table, small=True)
    assert found["losses"] == [[1.0]]
    other = smoke.reference_for(tmp_path, shards, {**on_gpu, "lr": 0.5}, table, small=True)
    assert other["losses"] == [[2.0]]
    printed = capsys.readouterr().out
    assert "the kit's, torch 2.11.0" in printed and "made here" in printed


def test_the_step_as_it_was_gives_todays_loss() -> None:
    sizes = {"arch": "resnet18", "crop_size": 32, "batch_size": 8, "bn_group": 4, "queue_size": 64}
    config = resolve_pretrain(PretrainConfig(**sizes, device="cpu"))  # type: ignore[arg-type]
    ways = StepWays(config, torch.device("cpu"))
    losses, statistics = [], []
    for step in (ways.step(), joined_step(ways)):
        losses.append(float(step.run(ways.views, ways.known, 0, config.lr).loss))
        state = step.model.state_dict()
        statistics.append([v for name, v in state.items() if name.endswith("running_mean")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for ours, theirs in zip(*statistics, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("package", [name.replace("-", "_") for name in PACKAGES] + ["faiss"])
def test_a_rehearsal_imports_packages_from_the_kit_alone(tmp_path: Path, package: str) -> None:
    if package == "simplejpeg" and sys.version_info[:2] != (3, 12):
        pytest.skip("the wheel is for Python 3.12")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "benchmarks" / "gpu" / "absent"),
        "SECO_GPU_PACKAGES": str(tmp_path),
    }
    command = [sys.executable, "-c", f"import {package}; print({package}.__file__)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert f"No module named '{package}' in the kit" in done.stderr
    (tmp_path / f"{package}.py").touch()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / f"{package}.py")
