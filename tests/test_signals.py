"""Signals at random moments: quiet, prompt, the right exit code, and resumed to the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from seco.checkpoints.io import load_checkpoint
from shards.errors import EXIT_STOPPED
from tests import commands
from tests.data import ROOT
from tests.made_sequences import make_sequences
from tests.made_shards import make_set
from tests.pipelines.made_videos import draw_video

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PAUSES = (0.0, 0.001, 0.02, 0.2, 1.1)  # of the second signal
TELLING_OF_TIMES = ("speed.jsonl", "report.html", "config.toml")
LONGEST = 300.0  # seconds until a stopped command counts as hanging, on a machine that is busy
CONSOLE = "from seco.__main__ import main; main()"
SMALL = ("--crop-size=32", "--device=cpu", "--log-every=1")
TRAINING = ("--arch=resnet10_w16", "--batch-size=4", "--bn-group=2", "--queue-size=12", *SMALL)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, sets and a checkpoint for all commands to read."""
    folder = tmp_path_factory.mktemp("inputs")
    make_set(folder / "set", videos=24, frames=3, per_shard=3)
    make_sequences(folder / "tracks", sequences=4, frames=6)
    draw_video(folder / "0.mp4", frames=60, size="320x240")
    (folder / "raw").mkdir()
    for number in range(24):
        (folder / "raw" / f"{number}.mp4").symlink_to(folder / "0.mp4")
    shards = f"--shards={folder}/set/made.json"
    _finish(["pretrain", shards, f"--out={folder}/run", "--epochs=1", "--workers=0", *TRAINING])
    return folder


def arguments(command: str, inputs: Path) -> list[str]:
    """A command that takes a second or two, without its output folder."""
    shards, weights = f"--shards={inputs}/set/made.json", f"--checkpoint={inputs}/run/last.pt"
    return {
        "prepare": ["prepare", "folder", f"--src={inputs}/raw", "--workers=2", "--frames=8",
                    "--videos-per-shard=2"],
        "pretrain": ["pretrain", shards, "--epochs=6", "--workers=2", "--resume=auto", *TRAINING],
        "pretrain on 2": ["pretrain", shards, "--epochs=6", "--workers=0", "--resume=auto",
                          "--processes=2", *TRAINING],
        "extract-features": ["extract-features", shards, weights, "--workers=1", "--frames=3",
                             "--short-edge=36", "--batch-size=4", *SMALL[:2]],
        "finetune": ["finetune", shards, weights, "--epochs=3", "--workers=1", "--resume=auto",
                     "--segments=2", "--clips=2", "--clip-frames=2", "--test-size=36",
                     "--batch-size=4", "--bn-group=2", *SMALL],
        "track train": ["track", "train", f"--shards={inputs}/tracks/patches.json", weights,
                        "--feature-layer=layer3", "--channels=8", "--epochs=6", "--batch-size=2",
                        "--workers=1", "--device=cpu", "--log-every=1", "--resume=auto"],
    }[command]  # fmt: skip


class Program:
    """The console command: in a fork that has imported everything, or in a new interpreter."""

    def __init__(self, given: list[str], fork: bool, scratch: Path) -> None:
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONFAULTHANDLER"] = "1"
        self._said = scratch / "said"
        self._run: commands.Command | subprocess.Popen[bytes]
        if fork:
            self._run = commands.start("-c", CONSOLE, *given, **environment)
        else:
            self._run = subprocess.Popen(
                [sys.executable, "-m", "seco", *given],
                stdout=subprocess.DEVNULL,
                stderr=self._said.open("wb"),
                cwd=ROOT,
                env={**os.environ, **environment},
                start_new_session=True,
                preexec_fn=_hear_ctrl_c,
            )
        self.pid = self._run.pid

    def ended(self) -> bool:
        return self._run.poll() is not None

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and what was said.

        One that hangs is made to say where, and ends with SIGABRT.
        """
        try:
            code = self._run.wait(LONGEST)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGABRT)
            code = self._run.wait(LONGEST)
        if isinstance(self._run, commands.Command):
            return code, self._run.communicate()[1]
        return code, self._said.read_text("utf-8", "replace")


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _finish(given: list[str]) -> float:
    began = time.monotonic()
    process = commands.start("-c", CONSOLE, *given, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return time.monotonic() - began


def results(out: Path) -> dict[str, str]:
    """Digests of what a command wrote, apart from what tells of times."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".pt":
            for key, value in load_checkpoint(path)["model"].items():
                found[f"{name} {key}"] = _digest(value.numpy().tobytes())
        elif path.is_file() and "tensorboard" not in name and not name.endswith(".log.jsonl"):
            found[name] = _digest(path.read_bytes())
    for name in TELLING_OF_TIMES:
        found.pop(name, None)
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Trial(NamedTuple):
    """What is sent, when, and to whom."""

    numbers: tuple[int, ...]
    moment: float
    pause: float
    to_group: bool
    fork: bool


def trials(seed: int, duration: float) -> Iterator[Trial]:
    """Moments all over a run, every fifth in its first tenth."""
    rng = random.Random(seed)
    while True:
        numbers = tuple(rng.choice(SIGNALS) for _ in range(rng.choice((1, 2))))
        fork = rng.random() < 0.9
        moment = rng.random() * duration * (0.1 if rng.random() < 0.2 else 1.0)
        if not fork:
            moment = rng.random() * 8.0  # it imports for seconds
        yield Trial(numbers, moment, rng.choice(PAUSES), rng.random() < 0.5, fork)


def send(trial: Trial, process: Program) -> bool:
    """Send a trial's signals; whether the first one came before the end."""
    time.sleep(trial.moment)
    if process.ended():
        return False
    for at, number in enumerate(trial.numbers):
        if at:
            time.sleep(trial.pause)
        try:
            (os.killpg if trial.to_group else os.kill)(process.pid, number)
        except ProcessLookupError:
            break
    return True


def _outcome_of(
    module: str, text: str, folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run text as ``python -m module`` in a folder."""
    (folder / f"{module}.py").write_text(text)
    path = f"{ROOT}{os.pathsep}{folder}"
    return subprocess.run(
        [sys.executable, "-m", module],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **variables},
        preexec_fn=_hear_ctrl_c,
        timeout=LONGEST,
    )


def test_a_signal_does_not_disturb_the_building_of_a_network_without_values(
    tmp_path: Path,
) -> None:
    # In the middle of torch's own handling of modes, an exception would leave these unbalanced.
    text = """
import os, signal, threading, time, torch
from seco.models.backbones import without_values
from shards.signals import interrupt

signal.signal(signal.SIGINT, interrupt)
end = threading.Event()
threading.Thread(target=end.wait, daemon=True).start()  # receives what this thread does not
try:
    with without_values():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10_000):
            made = torch.zeros(3)
    while True:
        time.sleep(0.01)
except KeyboardInterrupt:
    print(made.device, torch.zeros(1).device)
"""
    found = _outcome_of("stops", text, tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (0, "meta cpu\n", "")


def test_a_signal_does_not_disturb_an_import(tmp_path: Path) -> None:
    # As torch does for NumPy: whatever happens, it is not there.
    (tmp_path / "greedy.py").write_text(
        "import os, signal\nmissing = False\n"
        "try: os.kill(os.getpid(), signal.SIGTERM)\nexcept BaseException: missing = True\n"
    )
    done = _outcome_of(
        "waits",
        "import signal\nfrom shards.signals import interrupt\n"
        "signal.signal(signal.SIGTERM, interrupt)\n"
        "try:\n    import greedy\n    while True: signal.pause()\n"
        "except KeyboardInterrupt: print(greedy.missing)\n",
        tmp_path,
    )
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


@pytest.mark.parametrize("waiting", [False, True])
def test_a_signal_within_a_destructor_is_not_lost(tmp_path: Path, waiting: bool) -> None:
    text = (
        "import os, signal, sys\n"
        "from shards.signals import interrupt, not_lost, StopRequest, StopWaiting\n"
        "sys.unraisablehook = not_lost\n"
        "class Last:\n    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    if waiting:
        text += (
            "try:\n    with StopRequest() as stop, stop.while_waiting():\n"
            "        Last()\n        while True: signal.pause()\n"
            "except StopWaiting: print('stopped')\n"
        )
    else:
        text += (
            "signal.signal(signal.SIGTERM, interrupt)\n"
            "try:\n    Last()\n    while True: signal.pause()\n"
            "except KeyboardInterrupt: print('stopped')\n"
        )
    done = _outcome_of("ends", text, tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("stopped\n", "", 0)


def test_a_lost_signal_is_not_raised_where_nobody_waits(tmp_path: Path) -> None:
    text = (
        "import os, signal, sys, time\n"
        "from shards.signals import not_lost, StopRequest\n"
        "sys.unraisablehook = not_lost\n"
        "class Last:\n    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\n"
        "with StopRequest() as stop:\n    with stop.while_waiting(): Last()\n"
        "    signal.sigtimedwait([], 0.3)\n    print(bool(stop))\n"
    )
    done = _outcome_of("goes_on", text, tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


def test_the_exit_code_of_an_interrupted_command_under_m(tmp_path: Path) -> None:
    # Python remembers an interrupt within the exec of a text, and would end with SIGINT.
    text = "import cli\ncli.run = lambda given: exec('raise KeyboardInterrupt')\ncli.main([])\n"
    assert _outcome_of("stops", text, tmp_path).returncode == EXIT_STOPPED


def test_a_process_ends_although_its_launcher_no_longer_reads_its_result(tmp_path: Path) -> None:
    # The signal and the launcher's own come just before the end, too late to stop anything.
    text = """
import os, signal, threading
from seco.processes import launch
from shards.signals import StopRequest

def run(config):
    with StopRequest():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    return 0

launch._LAUNCHER_LOOKS_WITHIN = 0.1
launch._run_and_exit(None, run)
threading.Event().wait()  # as torch does
"""
    marks = {"SECO_STOPPED": str(tmp_path), "RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    found = _outcome_of("stops", text, tmp_path, **marks)
    assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / "0").read_text() == "at its end"


def test_a_signal_while_processes_are_started_waits_until_all_are(tmp_path: Path) -> None:
    text = """
import os, signal
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import api
from seco.processes.launch import _orderly_signals

def start(agent, group):  # as torch does
    signal.signal(signal.SIGTERM, api._terminate_process_handler)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    print("started", flush=True)

LocalElasticAgent._start_workers = start
with _orderly_signals() as started:
    assert not started
    try:
        LocalElasticAgent._start_workers(None, None)
    except api.SignalException as error:
        print(int(error.sigval), started)
    os.kill(os.getpid(), signal.SIGTERM)  # a second one raises nothing
assert LocalElasticAgent._start_workers is start
"""
    found = _outcome_of("stops", text, tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == "started\n15 ['processes']\n"


def test_a_process_that_cannot_save_yet_ends_although_it_waits_outside_python(
    tmp_path: Path,
) -> None:
    text = """
import hashlib
from shards.signals import StopRequest, quiet_exit

quiet_exit(75, lambda: print("marked", flush=True))
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # many minutes, without a look at signals
"""
    (tmp_path / "waits.py").write_text(text)
    with subprocess.Popen(
        [sys.executable, tmp_path / "waits.py"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=_hear_ctrl_c,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        said, _ = process.communicate(timeout=LONGEST)
    assert (process.returncode, said) == (75, "marked\n")


def test_a_parent_that_leaves_while_a_tensor_is_handed_over(tmp_path: Path) -> None:
    text = """
import os, socket, struct, sys
from multiprocessing import resource_sharer
from seco.processes.stopping import leave_signals_to_parent

leave_signals_to_parent(0)
given = [resource_sharer.DupFd(0) for _ in range(2)]
address = given[0]._id[0]
for _ in range(3):
    with socket.socket(socket.AF_UNIX) as parent:
        parent.connect(address)
        parent.recv(4)
for one in given:  # the thread still serves
    os.close(one.detach())
sys.excepthook(KeyError, KeyError("other faults are shown"), None)
"""
    found = _outcome_of("stops", text, tmp_path)
    assert found.returncode == 0
    assert found.stderr == "KeyError: 'other faults are shown'\n"


@pytest.mark.parametrize(
    ("command", "signals"),
    [
        ("extract-features", 4),
        *(
            # Each command has a time limit of its own.
            pytest.param(command, signals, marks=[pytest.mark.soak, pytest.mark.timeout(0)])
            for command, signals in (
                ("prepare", 250),
                ("pretrain", 250),
                ("pretrain on 2", 50),
                ("extract-features", 150),
                ("finetune", 150),
                ("track train", 150),
            )
        ),
    ],
)
def test_signals_at_random_moments(
    command: str, signals: int, inputs: Path, tmp_path: Path
) -> None:
    given = arguments(command, inputs)
    duration = _finish([*given, f"--out={tmp_path}/undisturbed"])
    undisturbed = results(tmp_path / "undisturbed")
    assert undisturbed
    faults, endings, landed, runs = [], Counter[int](), 0, 0
    planned = trials(7, duration)
    while landed < signals:
        out, code = tmp_path / f"{runs}", EXIT_STOPPED
        runs += 1
        while code and landed < signals:
            trial = next(planned)
            process = Program([*given, f"--out={out}"], trial.fork, tmp_path)
            came = send(trial, process)
            code, said = process.end()
            landed += came
            endings[code] += came
            # Before anything is open, a signal ends the process as the system does.
            usual = {0, EXIT_STOPPED, *(-number for number in trial.numbers)} if came else {0}
            # Of the interpreter that has not begun to run anything.
            unborn = not trial.fork and "init_import_site" in said
            if not unborn and (code not in usual or "Traceback" in said):
                faults.append((trial, code, said[-20_000:]))
                print(*faults[-1], flush=True)  # a soak may be stopped
        if code:
            _finish([*given, f"--out={out}"])
        found = results(out)
        if other := [
            name for name in found | undisturbed if found.get(name) != undisturbed.get(name)
        ]:
            faults.append((trial, code, f"{out}: other {', '.join(other)}"))
    print(f"{command}: {landed} signals, {runs} runs, {duration:.1f} s each, ended {dict(endings)}")
    assert not faults, "\n".join(str(fault) for fault in faults)
