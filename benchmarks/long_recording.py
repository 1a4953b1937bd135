"""Clips of a long 1080p recording: seconds, CPU seconds and memory beside what decoding takes.

    python benchmarks/long_recording.py --work /tmp/long --hours 2 --src CLIPS    # 2 GB of disk

The recording is made of clips, each fitted into 1920x1080 and encoded as H.264, one after the
other, and all of that again until it is long enough. The limits are two ffmpeg processes of one
thread with half of it each: decoding, and decoding and scaling with the filters of `seco prepare`.
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

from benchmarks.measuring import cpu_seconds
from pipelines._clips import duration_of
from pipelines._decode import pictures, scaled
from pipelines._ffmpeg import ffmpeg_binary, local_url, run_ffmpeg

FITTED = (
    "scale=1920:1080:force_original_aspect_ratio=decrease,pad=1920:1080:(ow-iw)/2:(oh-ih)/2,"
    "setsar=1,fps=25,format=yuv420p"
)
ENCODED = ("-an", "-c:v", "libx264", "-preset", "veryfast", "-crf", "23", "-g", "250")
WORKERS = 2
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


def decode(path: Path, scale: bool) -> None:
    """Decode halves with two processes; the frames go nowhere."""
    binary = ffmpeg_binary()
    half = duration_of(path, binary) / WORKERS
    running = []
    for number in range(WORKERS):
        # Not the option -t, see pipelines/_decode.py.
        stream = pictures(ss=f"{number * half:.3f}").filter("trim", end=f"{half:.3f}")
        stream = scaled(stream, 256) if scale else stream
        words = stream.output("-", format="null", fps_mode="passthrough").compile(cmd=binary)
        words = [local_url(path) if word == "file:" else word for word in words]
        running.append(
            subprocess.Popen([*words, "-nostdin", "-v", "error", "-filter_threads", "1"])
        )
    assert not any(process.wait() for process in running)


def prepare(path: Path, out: Path, *options: str) -> int:
    """Run `seco prepare`; return the most MiB that a worker and its ffmpeg took."""
    shutil.rmtree(out, ignore_errors=True)
    command = [*(sys.executable, "-m", "cli", "prepare", "folder"), "--src", str(path.parent)]
    command += ["--out", str(out), "--workers", str(WORKERS), "--frames", "30", *options]
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


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    """Return seconds by the clock, CPU seconds of all processes, and what ``work`` returns."""
    cpu, began = cpu_seconds(), time.monotonic()
    result = work()
    return time.monotonic() - began, cpu_seconds() - cpu, result


def main() -> None:
    """Parse, make the recording, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--src", type=Path, required=True, help="folder of clips")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    path = given.work / f"raw-{given.hours:g}h" / "recording.mp4"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        suffixes = (".mp4", ".mkv", ".webm", ".mov", ".avi")
        clips = sorted(clip for clip in given.src.iterdir() if clip.suffix in suffixes)
        make(clips, given.hours, path)
    out = given.work / "out"
    clips_of = ("--clip-seconds", "10")
    ways: dict[str, Callable[[], object]] = {
        "decode": lambda: decode(path, scale=False),
        "decode and scale": lambda: decode(path, scale=True),
        "clips, --cut-scenes": lambda: prepare(path, out, *clips_of, "--cut-scenes"),
        "clips, --keyframes": lambda: prepare(path, out, "--clip-seconds", "60", "--keyframes"),
    }
    for _ in range(given.repeats):
        for name, work in ways.items():
            seconds, cpu, memory = timed(work)
            peak = f", a worker and its ffmpeg {memory} MiB" if memory is not None else ""
            print(f"{name}: {seconds:.1f} s, {cpu:.1f} s of CPU{peak}", flush=True)


if __name__ == "__main__":
    main()
