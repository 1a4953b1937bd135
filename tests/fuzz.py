"""Feed commands with damaged files of every format they read: ``make fuzz``.

Each attack copies a small tree of good files, damages one of them, and runs a command that reads it
in a fork of this process. It must end in time, in memory, with a documented exit code and without a
traceback; print no control characters; and change no file but those it is to write. What does not
is kept in ``--keep``; with the repair it goes to ``tests/corpus``, which is tried first.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from PIL import Image

import cli
from shards.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_TOO_MANY_EXCLUDED, EXIT_USAGE
from shards.index import read_index
from shards.videos import VideoList, write_videos
from tests.commands import import_everything
from tests.made_sequences import make_sequences
from tests.made_shards import make_set
from tests.pipelines.made_videos import draw_video

CORPUS = Path(__file__).with_name(
    "corpus"
)  # files that were found, in folders named as in the tree
CODES = (0, EXIT_FAILED, EXIT_USAGE, EXIT_TOO_MANY_EXCLUDED, EXIT_STOPPED)
CPU_SECONDS = 60  # for one command; most take a tenth of a second
KILLED_SECONDS = 180  # by the clock, on a machine that is busy
MEMORY_KB = 1_500_000  # above what a good file takes
SMALL = ("--arch=resnet10_w16", "--crop-size=32", "--batch-size=4", "--device=cpu", "--workers=0")
TRAINING = (*SMALL, "--bn-group=2", "--epochs=1", "--queue-size=12", "--log-every=1")
FEATURES = ("--frames=3", "--short-edge=36", *SMALL[1:])
NUMBERS = (b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"1.5", b'"7"', b"null", b"[]")
NUMBERS += (b"{}", b"true", b'"\\u001b[31m"', b'"\\ud800"', b'"../x"', b'""', b"[[[[[[1]]]]]]")
VALUE = re.compile(rb'-?\d+(?:\.\d+)?|"(?:[^"\\]|\\.)*"|null|true|false')


class Attack(NamedTuple):
    """A file of the tree, and a command that reads it."""

    file: str
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{Path(self.file).name} {' '.join(self.command[:2])}"


def attacks(tree: Path) -> list[Attack]:
    """Make the good files; return every way in which they are read."""
    shards = make_set(tree / "set", videos=9, frames=3, per_shard=5)
    make_sequences(tree / "tracks", sequences=3, frames=6)
    for number in range(4):
        draw_video(tree / "raw" / "ab"[number % 2] / f"{number}.mp4", frames=4)
    _annotate(tree)
    run, features = tree / "run", tree / "features"
    good = [
        ("pretrain", "--shards", shards, "--out", str(run), *TRAINING),
        ("extract-features", "--shards", shards, "--checkpoint", str(run / "last.pt"), "--out",
         str(features), *FEATURES),
        ("probe", "--features", str(features)),
        ("retrieve", "evaluate", "--features", str(features)),
        ("retrieve", "build", "--features", str(features)),
        ("finetune", "--shards", shards, "--checkpoint", str(run / "last.pt"), "--out",
         str(tree / "tuned"), *TRAINING[1:-2], "--segments=2", "--clips=2", "--clip-frames=2",
         "--test-size=36"),
        ("track", "train", "--shards", str(tree / "tracks/patches.json"), "--checkpoint",
         str(run / "last.pt"), "--out", str(tree / "tracker"), "--feature-layer=layer3",
         "--channels=8", "--epochs=1", "--batch-size=2", "--workers=0", "--device=cpu"),
        ("export", str(run / "last.pt"), "--format=torchvision", "--out", str(tree / "r.pth")),
        ("export", str(run / "last.pt"), "--format=safetensors", "--out",
         str(tree / "r.safetensors")),
    ]  # fmt: skip
    folder = Path(shards).parent
    indexes = (read_index(path) for path in sorted(folder.glob("*.idx")))
    write_videos(folder / "made.videos", VideoList.of(indexes))
    torch.save(timm.create_model("test_vit").state_dict(), tree / "timm.pth")
    # Not in this process: its threads would not survive the forks.
    for arguments in good:
        ending = run_in_fork(arguments, tree)
        assert ending.code == 0, ending.said.decode()
    extract = ("extract-features", "--shards", "set/made.json", "--out", "out", *FEATURES)
    random_features = (*extract, "--checkpoint=random", SMALL[0])
    pretrain = ("pretrain", "--shards", "set/made.json", "--out", "out", *TRAINING)
    found: dict[str, list[tuple[str, ...]]] = {
        "set/made.json": [random_features, ("verify", "set/made.json"), ("inspect", "set")],
        "set/made-000.idx": [random_features, pretrain, ("verify", "set"), ("index", "set")],
        "set/made.videos": [random_features, pretrain],
        "set/made-001.tar": [random_features, pretrain, ("verify", "set"), ("inspect", "set"),
                             ("index", "--force", "set")],
        "features/meta.json": [("probe", "--features", "features"), random_features],
        "features/videos.csv": [("probe", "--features", "features"),
                                ("retrieve", "evaluate", "--features", "features")],
        "features/features.npy": [("probe", "--features", "features"),
                                  ("compare", "--features", "features", "--features", "b=features",
                                   "--out", "out")],
        "features/halves.npy": [("retrieve", "evaluate", "--features", "features")],
        "features/retrieval.faiss.json": [("retrieve", "query", "--features", "features",
                                           "--video", "video_0003", "--html", "out/q.html")],
        "features/probe.json": [("report", "features", "--out", "out/r.html"),
                                ("publish", "run", "--results", "features", "--out", "out/p")],
        "features/retrieval.json": [("report", "features", "--out", "out/r.html")],
        "run/metrics.jsonl": [("report", "run", "--out", "out/r.html")],
        "run/config.toml": [("report", "run", "--out", "out/r.html"),
                            ("pretrain", "--config", "run/config.toml", "--out", "out"),
                            ("publish", "run", "--out", "out/p")],
        "run/last.pt": [(*extract, "--checkpoint", "run/last.pt"), (*pretrain, "--init",
                        "run/last.pt"), ("pretrain", "--shards", "set/made.json", "--out", "run",
                        *TRAINING, "--resume=auto")],
        "r.pth": [("import", "r.pth", "--out", "out/i.pt")],
        "r.safetensors": [("import", "r.safetensors", "--out", "out/i.pt")],
        "timm.pth": [(*extract, "--checkpoint", "timm.pth", "--arch=timm:test_vit")],
        "tuned/last.pt": [("finetune-eval", "--shards", "set/made.json", "--checkpoint",
                           "tuned/last.pt", "--device=cpu", "--workers=0", "--out", "out")],
        "tuned/finetune.json": [("report", "tuned", "--out", "out/r.html")],
        "tracker/last.pt": [("track", "run", "--video", "raw/a/0.mp4", "--box=4,4,20,20",
                             "--tracker", "tracker/last.pt", "--device=cpu", "--out", "out/b.csv",
                             "--out-video", "out/b.mp4")],
        "tracks/patches-000.tar": [("track", "eval", "--shards", "tracks/patches.json", "--tracker",
                                    "tracker/last.pt", "--device=cpu", "--out", "out")],
        "raw/a/0.mp4": [("prepare", "folder", "--src", "raw", "--out", "out", "--workers=1",
                         "--max-failures=100"),
                        ("retrieve", "query", "--features", "features", "--file", "raw/a/0.mp4",
                         "--html", "out/q.html")],
        "anet/activity_net.v1-3.min.json": [("prepare", "activitynet", "--src", "anet", "--out",
                                             "out", "--dry-run")],
        "kinetics/train.csv": [("prepare", "kinetics", "--src", "kinetics", "--out", "out",
                                "--dry-run")],
        "list.csv": [("prepare", "list", "--src", "list.csv", "--root", "raw", "--out", "out",
                      "--workers=1", "--max-failures=100")],
        "web/0.tar": [("prepare", "wds", "--src", "web", "--out", "out", "--workers=1",
                       "--max-failures=100"), ("index", "web")],
        "pictures/a/1.png": [("prepare", "frames", "--src", "pictures", "--out", "out",
                              "--workers=1", "--max-failures=100")],
    }  # fmt: skip
    return [Attack(file, command) for file, commands in found.items() for command in commands]


def _annotate(tree: Path) -> None:
    """Annotation lists of two datasets, beside links to the videos."""
    rows = {
        f"id{n}": {"subset": ("training", "validation")[n % 2],
                   "annotations": [{"label": "x", "segment": [0, 1.5]}]}
        for n in range(4)
    }  # fmt: skip
    for dataset in ("anet", "kinetics"):
        (tree / dataset).mkdir()
    for number, video in enumerate(sorted((tree / "raw").rglob("*.mp4"))):
        shutil.copy(video, tree / "anet" / f"v_id{number}.mp4")
        shutil.copy(video, tree / "kinetics" / f"abcdefghij{number}_000000_000010.mp4")
    (tree / "anet/activity_net.v1-3.min.json").write_text(json.dumps({"database": rows}))
    lines = [f"x,abcdefghij{n},0,10,train" for n in range(4)]
    header = "label,youtube_id,time_start,time_end,split"
    (tree / "kinetics/train.csv").write_text("\n".join([header, *lines, ""]))
    rows = ["path,label,split,group,start,end,note", "a/0.mp4,x,train,g,0,0.1,n", "b/1.mp4,y,,,,,"]
    (tree / "list.csv").write_text("\n".join([*rows, ""]))
    (tree / "web").mkdir()
    with tarfile.open(tree / "web/0.tar", "w") as tar:
        for name, data in {
            "0.json": b'{"caption": "a", "n": 1}',
            "0.txt": b"b",
            "0.cls": b"2",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        tar.add(tree / "anet/v_id0.mp4", "0.mp4")
    for number in range(3):
        picture = tree / "pictures/a" / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), (number * 80, 9, 200)).save(picture)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Change, cut, repeat or exchange a few parts of a file."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 2, 4, 8, 64, 512))
        how = rng.randrange(8)
        if how == 0 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif how == 1:
            changed[at : at + length] = rng.randbytes(length)
        elif how == 2:
            del changed[at : at + length]
        elif how == 3:
            changed[at:at] = changed[max(0, at - length) : at] * rng.choice((1, 2, 100))
        elif how == 4:
            del changed[at:]
        elif how == 5:
            changed[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
        else:
            _exchange_value(changed, at, rng)
    return bytes(changed)


def _exchange_value(changed: bytearray, at: int, rng: random.Random) -> None:
    """Put an odd value in the place of one that is written as text."""
    value = VALUE.search(changed, at) or VALUE.search(changed)
    if value is not None:
        changed[value.start() : value.end()] = rng.choice(NUMBERS)


def contents(tree: Path) -> dict[str, str]:
    """Digests of all files, by path."""
    return {
        str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(tree.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


class Ending(NamedTuple):
    """How a command ended."""

    code: int
    said: bytes
    memory_kb: int
    seconds: float  # of the CPU


def run_in_fork(command: tuple[str, ...], folder: Path) -> Ending:
    """Run a command in a fork of this process, with a time limit."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            _child(command, folder, output.fileno())
        ended, status, used = os.wait4(pid, os.WNOHANG)
        while not ended:
            if time.monotonic() - began > KILLED_SECONDS:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.002)
            ended, status, used = os.wait4(pid, os.WNOHANG)
        output.seek(0)
        code = os.waitstatus_to_exitcode(status)
        cpu = used.ru_utime + used.ru_stime
        return Ending(code, output.read(), used.ru_maxrss, cpu)


def _child(command: tuple[str, ...], folder: Path, output: int) -> None:
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = cli.run(list(command))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def faults_of(ending: Ending, before: dict[str, str], folder: Path, usual_kb: int) -> list[str]:
    """What an ending must not be."""
    faults = []
    if b"Traceback" in ending.said:
        faults.append("traceback")
    if ending.seconds > CPU_SECONDS or ending.code == -signal.SIGKILL:
        faults.append("hang")
    elif ending.code not in CODES:
        faults.append(f"exit code {ending.code}")
    if ending.memory_kb > usual_kb + MEMORY_KB:
        faults.append(f"{ending.memory_kb >> 10} MiB of memory")
    text = ending.said.decode("utf-8", "replace").replace("\n", "")
    if any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in text):
        faults.append("control characters")
    after = contents(folder)
    own = ("out/", "run/", "features/probe", "features/retrieval", "set/made-")  # its results
    changed = [n for n in after | before if after.get(n) != before.get(n)]
    if wrong := [name for name in changed if not name.startswith(own)]:
        faults.append(f"changed {', '.join(wrong)}")
    return faults


class Fuzzer:
    """Good files, the ways in which they are read, and what has come of damaging them."""

    def __init__(self, scratch: Path, keep: Path, say: Callable[[str], None]) -> None:
        self._tree, self._work = scratch / "good", scratch / "work"
        self.ways = attacks(self._tree)
        self._usual_kb: dict[Attack, int] = {}
        self._keep, self._say = keep, say
        self.counts: Counter[str] = Counter()

    def good(self, attack: Attack) -> bytes:
        """Return the undamaged file."""
        return (self._tree / attack.file).read_bytes()

    def try_out(self, attack: Attack, bad: bytes) -> None:
        """Run a command on a damaged file; keep the file if the command ends as it must not."""
        if attack not in self._usual_kb:
            self._usual_kb[attack] = self._run(attack, self.good(attack))[0].memory_kb
        ending, faults = self._run(attack, bad)
        self.counts["refused" if ending.code else "taken"] += 1
        if faults:
            self.counts["faults"] += 1
            self._keep.mkdir(parents=True, exist_ok=True)
            name = f"{hashlib.sha256(bad).hexdigest()[:12]}-{Path(attack.file).name}"
            (self._keep / name).write_bytes(bad)
            said = ending.said.decode("utf-8", "backslashreplace")[-2000:]
            (self._keep / f"{name}.txt").write_text(f"{attack}\n{faults}\n{said}")
            self._say(f"{attack.name}: {'; '.join(faults)} ({name})")

    def _run(self, attack: Attack, data: bytes) -> tuple[Ending, list[str]]:
        shutil.copytree(self._tree, self._work)
        try:
            (self._work / attack.file).write_bytes(data)
            before = contents(self._work)
            ending = run_in_fork(attack.command, self._work)
            usual = self._usual_kb.get(attack, ending.memory_kb)
            return ending, faults_of(ending, before, self._work, usual)
        finally:
            shutil.rmtree(self._work)


def fuzz(seconds: float, most: int, seed: int, keep: Path, say: Callable[[str], None]) -> int:
    """Try the corpus, then attack until the time or number is reached; return how many faults."""
    rng = random.Random(seed)
    import_everything()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="seco-fuzz-") as scratch:
        fuzzer = Fuzzer(Path(scratch), keep, say)
        counts, began = fuzzer.counts, time.monotonic()
        for attack in fuzzer.ways:
            for path in sorted((CORPUS / attack.file).glob("*")):
                fuzzer.try_out(attack, path.read_bytes())
        say(f"{counts['refused'] + counts['taken']} attacks of the corpus")
        number = 0
        while number < most and time.monotonic() - began < seconds:
            attack = fuzzer.ways[number % len(fuzzer.ways)]
            fuzzer.try_out(attack, damaged(fuzzer.good(attack), rng))
            number += 1
    say(
        f"{number} attacks in {time.monotonic() - began:.0f} s with seed {seed}; in all "
        f"{counts['refused']} refused, {counts['taken']} taken, {counts['faults']} faults"
    )
    return counts["faults"]


def main() -> None:
    """Parse the arguments and attack."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"))
    given = parser.parse_args()
    found = fuzz(given.seconds, given.most, given.seed, given.keep, lambda line: print(line))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
