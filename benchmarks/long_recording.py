"""Clips of a long 1080p recording: seconds and memory beside what decoding takes.

    python benchmarks/long_recording.py --work /tmp/long --hours 2 --src CLIPS    # 2 GB of disk

The recording is made of clips, each fitted into 1920x1080 and encoded as H.264, one after the
other, and all of that again until it is long enough. The limits are ffmpeg processes of one
thread, one for each worker, with equal parts of it: decoding, and decoding and scaling with the
filters of `seco prepare`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines._clips import duration_of
from pipelines._decode import pictures, scaled
from pipelines._ffmpeg import ffmpeg_binary, local_url, run_ffmpeg

FITTED = (
    "scale=1920:1080:force_original_aspect_ratio=decrease,pad=1920:1080:(ow-iw)/2:(oh-ih)/2,"
    "setsar=1,fps=25,format=yuv420p"
)
ENCODED = ("-an", "-c:v", "libx264", "-preset", "veryfast", "-crf", "23", "-g", "250")
_HIGH_WATER = re.compile(r"VmHWM:\s+(\d+) kB")


def make(clips: Sequence[Path], hours: float, path: Path) -> None:
    """Write the recording."""
    parts = []
    for number, clip in enumerate(clips):
        parts.append(path.with_name(f"part{number}.mp4"))
        run_ffmpeg(["-i", local_url(clip), "-vf", FITTED, *ENCODED, "-y", local_url(parts[-1])])
    binary = ffmpeg_binary()
    once = sum(duration_of(part, binary) for part in parts)
    listed = path.with_name("parts.txt")
    names = [f"file {part.name}\n" for part in parts]
    listed.write_text("".join(names * max(1, round(3600 * hours / once))))
    run_ffmpeg(["-f", "concat", "-i", str(listed), "-c", "copy", "-y", local_url(path)])
    for part in parts:
        part.unlink()


def decode(path: Path, workers: int, scale: bool) -> None:
    """Decode equal parts with as many processes; the frames go nowhere."""
    binary = ffmpeg_binary()
    part = duration_of(path, binary) / workers
    running = []
    for number in range(workers):
        # Not the option -t, see pipelines/_decode.py.
        stream = pictures(ss=f"{number * part:.3f}").filter("trim", end=f"{part:.3f}")
        stream = scaled(stream, 256) if scale else stream
        words = stream.output("-", format="null", fps_mode="passthrough").compile(cmd=binary)
        words = [local_url(path) if word == "file:" else word for word in words]
        running.append(
            subprocess.Popen([*words, "-nostdin", "-v", "error", "-filter_threads", "1"])
        )
    assert not any(process.wait() for process in running)


def prepare(path: Path, out: Path, workers: int, *options: str) -> int:
    """Run `seco prepare`; return the most MiB that a worker and its ffmpeg took."""
    shutil.rmtree(out, ignore_errors=True)
    command = [*(sys.executable, "-m", "cli", "prepare", "folder"), "--src", str(path.parent)]
    command += ["--out", str(out), "--workers", str(workers), "--frames", "30", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most: dict[str, int] = {}
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, most, ended))
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    assert code == 0
    return (most["worker"] + most["ffmpeg"]) >> 10


def _watch(root: int, most: dict[str, int], ended: threading.Event) -> None:
    """Keep the largest resident memory, in KiB, of Python processes and of ffmpeg below one."""
    while not ended.wait(0.5):
        parents = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit():
                    stat = (entry / "stat").read_text()
                    parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            except OSError:
                continue
        below = {root}
        while new := {pid for pid, parent in parents.items() if parent in below} - below:
            below |= new
        for pid in below:
            try:
                name = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
                peak = _HIGH_WATER.search(Path(f"/proc/{pid}/status").read_text())
            except OSError:
                continue
            kind = "ffmpeg" if "ffmpeg" in name else "worker"
            most[kind] = max(most.get(kind, 0), int(peak[1]) if peak else 0)


def main() -> None:
    """Parse, make the recording, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--src", type=Path, required=True, help="folder of clips")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    path = given.work / f"raw-{given.hours:g}h" / "recording.mp4"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        suffixes = (".mp4", ".mkv", ".webm", ".mov", ".avi")
        clips = sorted(clip for clip in given.src.iterdir() if clip.suffix in suffixes)
        make(clips, given.hours, path)
    out, workers = given.work / "out", given.workers
    cut = ("--clip-seconds", "10", "--cut-scenes")
    keyframes = ("--clip-seconds", "60", "--keyframes")
    ways: dict[str, Callable[[], object]] = {
        "decode": lambda: decode(path, workers, scale=False),
        "decode and scale": lambda: decode(path, workers, scale=True),
        "clips, --cut-scenes": lambda: prepare(path, out, workers, *cut),
        "clips, --keyframes": lambda: prepare(path, out, workers, *keyframes),
    }
    for _ in range(given.repeats):
        for name, work in ways.items():
            began = time.monotonic()
            memory = work()
            peak = f", a worker and its ffmpeg {memory} MiB" if memory is not None else ""
            print(f"{name}: {time.monotonic() - began:.1f} s{peak}", flush=True)


if __name__ == "__main__":
    main()
