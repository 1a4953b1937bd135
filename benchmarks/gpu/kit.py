"""Packs ``.gpu/``, which ``benchmarks/gpu.sh`` reads on a machine with a GPU, and rehearses it.

    python -m benchmarks.gpu.kit [--no-rehearsal]

Wheels of packages that images for deep learning lack, for Python 3.12 on x86-64 Linux; real frames,
from the data of the tests; and the losses that a CPU finds. It is never committed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.data import CLIPS, KIT, LABELLED

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("webdataset", "simplejpeg", "braceexpand", "tenacity", "tomli-w")
_MOST_BYTES = 45 * 2**20
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
# Options of `seco prepare`: short edges for views of 112 and of 224 px.
_SETS = {
    LABELLED: ("hmdb51", "hmdb51", ("--short-edge", "112", "--frames", "12")),
    CLIPS: ("folder", "clips", ("--short-edge", "256", "--frames", "30", "--max-failures", "20")),
}


def run(*command: str, **environment: str) -> None:
    """Run in the checkout; a failure ends this, and has said why."""
    done = subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"gpu-kit: exit code {done.returncode} of {' '.join(command[:6])} …")


def download_wheels() -> None:
    """Those that are not there yet."""
    folder = KIT / "wheels"
    there = {file.name.partition("-")[0] for file in folder.glob("*.whl")}
    missing = [name for name in PACKAGES if name.replace("-", "_") not in there]
    if missing:
        platforms = [f"--platform={platform}" for platform in _PLATFORMS]
        python = ("--python-version=3.12", "--implementation=cp", "--abi=cp312", "--abi=none")
        run(
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", *python, *platforms),
            *("--dest", str(folder), *missing),
        )


def prepare_sets() -> None:
    """Those that are not there yet; without the tests' data none."""
    data = Path(os.environ.get("SECO_TEST_DATA") or ROOT.parent / "shared") / "data"
    for manifest, (dataset, folder, options) in _SETS.items():
        if manifest.is_file():
            continue
        if not (data / folder).is_dir():
            print(f"gpu-kit: {data / folder} not found (set SECO_TEST_DATA): drawn frames instead")
            continue
        run(
            *(sys.executable, "-m", "cli", "prepare", dataset, "--src", str(data / folder)),
            *("--out", str(manifest.parent), "--name", manifest.stem, *options),
        )


def make_reference() -> None:
    """The losses of a CPU, anew where the code has changed."""
    from benchmarks.gpu.smoke import REFERENCE

    digest = hashlib.sha256()
    code = (*(ROOT / "seco").rglob("*.py"), *(ROOT / "shards").rglob("*.py"))
    for file in sorted((*code, *KIT.rglob("*.idx"))):
        digest.update(file.read_bytes())
    stamp = KIT / "reference.sha256"
    if REFERENCE.is_file() and stamp.is_file() and stamp.read_text("utf-8") == digest.hexdigest():
        return
    with tempfile.TemporaryDirectory(prefix="seco-gpu-kit-") as work:
        smoke = (sys.executable, "-m", "benchmarks.gpu.smoke", "reference", "--device", "cpu")
        run(*smoke, "--work", work)
    stamp.write_text(digest.hexdigest(), "utf-8")


def rehearse() -> None:
    """Both calls on the CPU, with the packages of the kit in place of this Python's own."""
    blocked = str(ROOT / "benchmarks" / "gpu" / "absent")
    path = os.pathsep.join(filter(None, (blocked, os.environ.get("PYTHONPATH"))))
    for mode in ("check", "measure"):
        began = time.perf_counter()
        run("benchmarks/gpu.sh", mode, "cpu", PYTHON=sys.executable, PYTHONPATH=path)
        print(f"gpu-kit: rehearsed {mode} in {time.perf_counter() - began:.0f} s")
    if sys.version_info[:2] != (3, 12):
        print("gpu-kit: the wheels are for Python 3.12: simplejpeg was this Python's own")


def main() -> None:
    """Pack and rehearse."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-rehearsal", action="store_true")
    given = parser.parse_args()
    (KIT / "wheels").mkdir(parents=True, exist_ok=True)
    download_wheels()
    prepare_sets()
    make_reference()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    (KIT / "commit").write_text(commit.stdout, "utf-8")
    size = sum(file.stat().st_size for file in KIT.rglob("*") if file.is_file())
    print(f"gpu-kit: {KIT}: {size / 2**20:.1f} MiB")
    if size > _MOST_BYTES:
        raise SystemExit(f"gpu-kit: more than {_MOST_BYTES / 2**20:.0f} MiB, too much to copy")
    if not given.no_rehearsal:
        rehearse()


if __name__ == "__main__":
    main()
