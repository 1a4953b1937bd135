"""Many processes: the same batches, losses and weights as one; they stop and go on together."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seco.checkpoints.io import load_checkpoint
from seco.config import PretrainConfig, resolve_pretrain
from seco.models.seco import KEYS, KeyShuffle, SeCo
from seco.processes.device import resolve_device
from shards.errors import InputError
from tests import commands
from tests.data import ROOT
from tests.made_shards import make_set

# Larger views and groups than elsewhere: BatchNorm over a few tiny pictures turns the last bits of
# a sum into other signs within steps, and no two orders of summing would agree.
EQUAL: dict[str, Any] = {
    "arch": "resnet10_w16",
    "batch_size": 32,
    "bn_group": 8,
    "queue_size": 70,
    "crop_size": 64,
    "temperature": 1.0,
    "intra_temperature": 1.0,
    "lr": 1e-5,
    "epochs": 10,
    "workers": 0,
    "log_every": 1,
    "device": "cpu",
}
SMALL: dict[str, Any] = {
    **EQUAL,
    "batch_size": 8,
    "bn_group": 2,
    "crop_size": 32,
    "epochs": 4,
    "checkpoint_every_steps": 1,
}


def start(shards: str, out: Path, **settings: Any) -> commands.Command:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    # Processes on the CPU, also where the machine has GPUs.
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return commands.start("pretrain", "--shards", shards, "--out", out, *arguments, **environment)


def run(shards: str, out: Path, **settings: Any) -> str:
    process = start(shards, out, **settings)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return error


def lines(run_folder: Path) -> list[dict[str, Any]]:
    text = (run_folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(
        tmp_path_factory.mktemp("textures"), videos=64, frames=4, per_shard=20, size=(72, 96)
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(tmp_path_factory.mktemp("small"), videos=26, frames=4, per_shard=7)


@pytest.fixture(scope="module")
def with_knn(small: str) -> dict[str, Any]:
    knn = {"knn_shards": small, "knn_every_epochs": 1, "log_every": 2}
    return {**SMALL, **knn, "processes": 2}


@pytest.fixture(scope="module")
def undisturbed(
    small: str, with_knn: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("two")
    run(small, out, **with_knn)
    return out


def assert_equal_bits(one: Path, other: Path) -> None:
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    ours, theirs = (load_checkpoint(folder / "last.pt")["model"] for folder in (one, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_same_run(one: Path, other: Path) -> None:
    """Losses and weights within 1e-5, relative, after 20 steps."""
    ours, theirs = lines(one), lines(other)
    assert len(ours) == len(theirs) == 20
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "loss_inter", "loss_intra", "loss_order"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)
    weights, others = trained(one), trained(other)
    apart = (weights - others).norm()
    assert apart <= 1e-5 * others.norm()
    assert (others - untrained()).norm() > 20 * apart  # they have moved by far more than that


def trained(folder: Path) -> torch.Tensor:
    """All weights of a run as one vector, in float64."""
    return as_vector(load_checkpoint(folder / "last.pt")["model"])


def untrained() -> torch.Tensor:
    torch.manual_seed(0)
    return as_vector(SeCo(resolve_pretrain(PretrainConfig(**EQUAL))).state_dict())


def as_vector(state: dict[str, torch.Tensor]) -> torch.Tensor:
    names = [n for n in state if n.startswith(("query_encoder", "order")) and "running" not in n]
    return torch.cat([state[name].double().flatten() for name in names])


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_many_processes_are_one(textures: str, tmp_path: Path, processes: int) -> None:
    run(textures, tmp_path / "one", **EQUAL)
    run(textures, tmp_path / "many", **EQUAL, processes=processes)
    assert_same_run(tmp_path / "many", tmp_path / "one")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_key_image_is_encoded_once_in_the_same_groups(size: int) -> None:
    batch, group = 24, 3
    plans = [
        KeyShuffle(batch, rank, size, torch.Generator().manual_seed(4)) for rank in range(size)
    ]
    wanted = np.concatenate([plan.wanted for plan in plans])
    assert sorted(wanted) == list(range(KEYS * batch))
    alone = KeyShuffle(batch, 0, 1, torch.Generator().manual_seed(4)).wanted
    assert set(map(frozenset, wanted.reshape(-1, group).tolist())) == set(
        map(frozenset, alone.reshape(-1, group).tolist())
    )
    # What is sent and what arrives, without processes: each rank holds its rows' images.
    share, images = batch // size, torch.arange(KEYS * batch).view(KEYS, batch)
    for rank, plan in enumerate(plans):
        came = []
        for sender, other in enumerate(plans):
            own = images[:, sender * share : (sender + 1) * share].reshape(-1)[other.sent]
            begin = sum(other.sent_counts[:rank])
            came.append(own[begin : begin + other.sent_counts[rank]])
            assert len(came[-1]) == plan.received_counts[sender]
        stacked = torch.cat(came)[plan.arrived]
        assert stacked.tolist() == plan.wanted.tolist()
        assert len(stacked) == KEYS * share  # no rank gets more than it normalises


def kill_at(process: commands.Command, log: Path, lines_: int, number: int) -> str:
    """Send the signal once so many steps are logged; returns what was said."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if len(log.read_text().splitlines()) >= lines_:
                break
        time.sleep(0.005)
    if number == signal.SIGKILL:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return process.communicate(timeout=150)[1]


@pytest.mark.parametrize(
    ("processes", "kills"),
    [(1, 2), *(pytest.param(n, 10, marks=pytest.mark.soak) for n in (1, 2))],
)
def test_a_run_killed_again_and_again_logs_what_an_undisturbed_one_does(
    small: str, tmp_path: Path, processes: int, kills: int
) -> None:
    total = 3 * (5 + kills // 2)
    settings = {**SMALL, "epochs": total // 3, "processes": processes}
    run(small, tmp_path / "undisturbed", **settings)
    steps = sorted(random.sample(range(1, total - 5), kills))  # then there is time to be killed
    landed = 0
    out, log = tmp_path / "killed", tmp_path / "killed" / "metrics.jsonl"
    for kill, step in enumerate(steps):
        number = (signal.SIGKILL, signal.SIGTERM)[kill % 2]
        process = start(small, out, resume="auto", **settings)
        error = kill_at(process, log, step, number)
        landed += process.returncode != 0
        if number == signal.SIGTERM and process.returncode and "Pre-training" in error:
            assert process.returncode == 75 and "saved step" in error, error
        assert "Traceback" not in error or number == signal.SIGKILL, error
        for checkpoint in out.glob("*.pt"):
            assert load_checkpoint(checkpoint)["step"] <= total
    assert landed >= kills - 1, f"{landed} kills came in time, at {steps}"
    run(small, out, resume="auto", **settings)
    assert_equal_bits(out, tmp_path / "undisturbed")


FAILING = """
import os, signal, sys
from shards.stream import TripletStream
import cli
from seco.config import PretrainConfig
from seco.processes.launch import launch
from shards.storage import UnreadableFrame
from shards.stream import UnreadableTriplet
read = TripletStream.read
lost = UnreadableTriplet("a video", "its disk is gone")
def failing(self, epoch, step, rows):
    return [lost] * len(rows) if step else read(self, epoch, step, rows)
if sys.argv[3:] == ["1", "hangs"]:
    lost = None
    failing = lambda *given: os.kill(os.getpid(), signal.SIGSTOP)
if sys.argv[4] == "hangs":
    import datetime, seco.processes.ranks
    seco.processes.ranks._SILENCE = datetime.timedelta(seconds=8)
    seco.processes.ranks._GRACE = 2.0
if sys.argv[3] == "1" and sys.argv[4] != "disagrees":
    TripletStream.read = failing
    TripletStream.substitute = lambda self, *given: lost
settings = dict(shards=(sys.argv[1],), out=sys.argv[2], arch="resnet10_w16", batch_size=8,
                bn_group=2, queue_size=70, crop_size=32, workers=0, device="cpu", epochs=4)
if sys.argv[3:] == ["1", "disagrees"]:
    settings["seed"] = 1
sys.exit(launch(PretrainConfig(**settings), cli.pretrain_here))
"""


def two_ranks(shards: str, out: Path, how: str) -> list[commands.Command]:
    """As under a launcher that does not watch; the second one meets with a fault."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        commands.start(
            *("-c", FAILING, shards, out, rank, how),
            OMP_NUM_THREADS="1",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]


def test_one_rank_that_cannot_load_ends_the_others(small: str, tmp_path: Path) -> None:
    ranks = two_ranks(small, tmp_path, "cannot load")
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1], errors
    assert "21 videos in a row cannot be read, the last: a video: its disk is gone" in errors[1]
    assert "Traceback" not in errors[0] + errors[1]


def test_one_rank_that_hangs_ends_the_others(small: str, tmp_path: Path) -> None:
    first, second = two_ranks(small, tmp_path, "hangs")
    try:
        error = first.communicate(timeout=150)[1]
        assert second.poll() is None  # it hangs still
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 1
    assert "process 0 lost its peers" in error and "Traceback" not in error


def test_ranks_that_would_do_different_things_do_not_begin(small: str, tmp_path: Path) -> None:
    errors = [p.communicate(timeout=150)[1] for p in two_ranks(small, tmp_path, "disagrees")]
    said = [line for error in errors for line in error.splitlines() if line.startswith("seco: ")]
    assert len(said) == 1 and "the ranks differ in settings, videos or checkpoints" in said[0]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_resuming_on_another_number_of_processes_continues_with_the_same_batches(
    small: str, tmp_path: Path
) -> None:
    settings = {**SMALL, "bn_group": 4, "lr": 1e-6}
    run(small, tmp_path / "one", **settings)
    # The same run, stopped after two epochs on two processes, goes on alone.
    for epoch, processes in ((2, 2), (4, 1)):
        out = tmp_path / "other"
        process = start(small, out, processes=processes, resume="auto", **settings)
        while epoch == 2 and process.poll() is None:
            with contextlib.suppress(OSError):
                if len((out / "metrics.jsonl").read_text().splitlines()) >= 4:
                    process.send_signal(signal.SIGTERM)
                    break
            time.sleep(0.01)
        process.communicate(timeout=120)
        assert process.returncode == (75 if epoch == 2 else 0)
    found, expected = lines(tmp_path / "other"), lines(tmp_path / "one")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert [row["lr"] for row in found] == [row["lr"] for row in expected]
    videos = [load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("one", "other")]
    assert torch.equal(videos[0]["queue.videos"], videos[1]["queue.videos"])


def test_killed_during_an_online_knn_two_processes_log_what_undisturbed_ones_do(
    small: str, with_knn: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    process = start(small, tmp_path, **with_knn)
    kill_at(process, tmp_path / "metrics.jsonl", 3, signal.SIGKILL)
    run(small, tmp_path, resume="auto", **with_knn)
    assert [row["step"] for row in lines(tmp_path) if "knn_top1" in row] == [0, 3, 6, 9, 12]
    assert_equal_bits(tmp_path, undisturbed)


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(path.parent.name))
    return found


def until_logged(process: commands.Command, out: Path) -> list[int]:
    """Wait for the first step; returns the ranks' process numbers."""
    log = out / "metrics.jsonl"
    while not (log.is_file() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    ranks = [
        pid
        for pid in children(process.pid)
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
    return ranks


def test_one_rank_killed_stops_the_others_and_the_run_goes_on(
    small: str, with_knn: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    process = start(small, tmp_path, **with_knn)
    ranks = until_logged(process, tmp_path)
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 1, error
    assert "process 1 was killed by signal 9" in error and "--resume auto" in error
    assert "Traceback" not in error
    run(small, tmp_path, resume="auto", **with_knn)
    assert_equal_bits(tmp_path, undisturbed)


def test_one_rank_told_to_stop_stops_all_with_everything_saved(small: str, tmp_path: Path) -> None:
    long = {**SMALL, "epochs": 400}
    process = start(small, tmp_path, processes=2, **long)
    os.kill(until_logged(process, tmp_path)[1], signal.SIGTERM)
    _, error = process.communicate(timeout=150)
    assert process.returncode == 75, error
    assert "another process was stopped: saved step" in error
    assert load_checkpoint(tmp_path / "last.pt")["step"] == len(lines(tmp_path))


def test_a_stop_that_cannot_save_is_a_failure(small: str, tmp_path: Path) -> None:
    settings = {**SMALL, "epochs": 400, "checkpoint_every_steps": 100_000}
    process = start(small, tmp_path, processes=2, **settings)
    until_logged(process, tmp_path)
    (tmp_path / "last.pt").mkdir()  # nothing can be renamed to it
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=150)
    assert process.returncode == 1, error
    assert "not everything could be saved" in error and "Traceback" not in error


def test_a_rank_that_fails_says_why_once(small: str, tmp_path: Path) -> None:
    process = start(small, tmp_path, processes=2, **{**SMALL, "lr": 1e12})
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    said = [line for line in error.splitlines() if line.startswith("seco: ")]
    assert len(said) == 1 and "is not finite" in said[0], error
    assert "Traceback" not in error


def test_settings_that_do_not_divide() -> None:
    config = PretrainConfig(batch_size=512)
    assert resolve_pretrain(config).bn_group == 128
    assert resolve_pretrain(config, processes=4).bn_group == 128
    assert resolve_pretrain(config, processes=8).bn_group == 64  # the per-rank batch
    assert resolve_pretrain(PretrainConfig(batch_size=768), processes=3).bn_group == 128  # of 256
    assert resolve_pretrain(PretrainConfig(batch_size=510)).bn_group == 102
    for changes, processes, message in (
        ({}, 3, "--batch-size: 512 is not divisible by 3 ranks"),
        ({"batch_size": 511}, 2, "511 is not divisible by 2 ranks"),
        ({"bn_group": 128}, 8, "must be 2 or more and divide the per-rank batch of 64"),
        ({"accumulate": 0}, 1, "--accumulate: must be 1 or more"),
        ({"processes": 0}, 1, "--processes: must be 1 or more"),
    ):
        with pytest.raises(InputError, match=message):
            resolve_pretrain(PretrainConfig(**{"batch_size": 512, **changes}), processes)  # type: ignore[arg-type]


def test_what_cannot_work_is_said_once_and_before_anything_starts(
    small: str, tmp_path: Path
) -> None:
    for changes, message in (
        ({"processes": 3}, "--batch-size: 8 is not divisible by 3 ranks"),
        ({"processes": 2, "init": "nowhere.pt"}, "nowhere.pt: cannot be read"),
        ({"processes": 2, "device": "cuda"}, "2 processes, but 0 GPUs can be used here"),
    ):
        process = start(small, tmp_path / "out", **{**SMALL, **changes})
        _, error = process.communicate(timeout=150)
        said = [line for line in error.splitlines() if line.startswith("seco: ")]
        assert process.returncode == 1 and len(said) == 1 and message in said[0], error
        assert "Traceback" not in error


def test_a_crash_of_a_process_is_seen(small: str, tmp_path: Path) -> None:
    program = f"""
import seco.processes.launch
from seco.config import PretrainConfig
def crash(config):
    raise AssertionError("a fault of ours")
if __name__ == "__main__":
    config = PretrainConfig(shards=({small!r},), batch_size=8, device="cpu", processes=2)
    raise SystemExit(seco.processes.launch.launch(config, crash))
"""
    path = tmp_path / "crash.py"
    path.write_text(program)
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert "AssertionError: a fault of ours" in done.stderr


@pytest.mark.parametrize(
    ("gpus", "rank", "index"), [(1, None, 0), (4, None, 0), (4, "3", 3), (1, "3", 0)]
)
def test_each_process_takes_its_gpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int, rank: str | None, index: int
) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    if rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", rank)
    for name in ("auto", "cuda"):
        assert resolve_device(name) == torch.device("cuda", index)
    assert taken == [torch.device("cuda", index)] * 2
