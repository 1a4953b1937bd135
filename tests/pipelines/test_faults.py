"""What may happen to a run at 2 a.m.: afterwards, a rerun gives what an undisturbed run gives."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pipelines._ffmpeg import ffmpeg_binary
from shards.errors import InputError
from shards.index import read_index, sha256_of
from tests.data import ROOT, lacking, shared
from tests.http_server import serving
from tests.pipelines.made_videos import draw_video, link_into
from tests.pipelines.running import (
    driver,
    errors,
    hashes,
    processes_of,
    programs_naming,
    run,
    wait_until,
)

Clips = tuple[Path, dict[str, str]]


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def require_done(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "done\n", done.stderr


def require_whole_shards(out: Path) -> None:
    """Every index there is stands beside the tar it describes."""
    for path in out.glob("*.idx"):
        info = read_index(path).info
        assert sha256_of(path.with_suffix(".tar")) == info.sha256


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.soak)])
def test_a_driver_killed_at_random_moments(clips: Clips, tmp_path: Path, kills: int) -> None:
    raw, whole = clips
    began = time.monotonic()
    require_done(driver(raw, tmp_path / "timed", 2))
    duration = time.monotonic() - began
    moments = random.Random(3)
    unfinished = 0
    for number in range(kills):
        out = tmp_path / f"{number}"
        process = started(driver(raw, out, 2))
        # One moment from each part of the run's time; the first ones come in time on any machine.
        time.sleep((0.1 + 0.9 * (number % 4 + moments.random()) / 4) * duration)
        process.kill()
        process.communicate()
        wait_until(lambda pid=process.pid: not processes_of(pid), 10)  # type: ignore[misc]
        wait_until(lambda: not programs_naming(raw), 10)
        if out.exists():
            unfinished += not (out / "raw.json").exists()
            require_whole_shards(out)
        require_done(driver(raw, out, 2))
        assert hashes(out) == whole, f"after kill {number}"
        shutil.rmtree(out)
    assert unfinished >= kills // 4, "the kills came too late to prove anything"


def test_a_killed_workers_shard_is_built_again(clips: Clips, tmp_path: Path) -> None:
    raw, whole = clips
    out = tmp_path / "out"
    process = started(driver(raw, out, 2))
    wait_until(lambda: len(list(out.glob("*.part"))) == 2 or process.poll() is not None)
    # A worker is the parent of an ffmpeg.
    parents: list[int] = []

    def find_worker() -> bool:
        for pid in programs_naming(raw):
            try:
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[1]) not in (process.pid, 1, os.getpid()):
                parents.append(int(stat[1]))
        return bool(parents)

    wait_until(find_worker)
    os.kill(parents[0], signal.SIGKILL)
    said, complaints = process.communicate(timeout=60)
    assert said == "done\n", complaints
    assert "a worker was killed: its shard is built again" in complaints
    wait_until(lambda: not processes_of(process.pid), 10)
    require_done(driver(raw, out, 2))  # clears away what the killed one left
    assert hashes(out) == whole


def test_workers_killed_again_and_again_end_the_run(
    clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, _ = clips
    killer = script(tmp_path / "ffmpeg", "kill -9 $PPID")
    done = subprocess.run(
        driver(raw, tmp_path / "out", 2, ffmpeg=str(killer)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.stdout.startswith("InputError workers were killed 3 times"), done.stderr


def script(path: Path, does: str) -> Path:
    """An ffmpeg that answers ``-version`` and otherwise does something of its own first."""
    real = shlex.quote(ffmpeg_binary())
    path.write_text(
        f'#!/bin/sh\n[ "$1" = -version ] && exec {real} "$@"\n{does}\nexec {real} "$@"\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_ffmpeg_is_started_again(clips: Clips, tmp_path: Path, workers: int) -> None:
    raw, whole = clips
    marks = tmp_path / "marks"
    marks.mkdir()
    # Dies once for every third video, after it has begun to write.
    does = (
        'for word; do last=$word; case $word in file:*) name=$(basename "$word");; esac; done\n'
        f'mark={marks}/$(echo "$name" | cksum | cut -d" " -f1)\n'
        '[ $(( ${mark##*/} % 3 )) -eq 0 ] && mkdir "$mark" 2>/dev/null && '
        '{ printf "YUV4MPEG2 W64"; kill -9 $$; }\n'
    )
    wrapped = script(tmp_path / "ffmpeg", does)
    require_done(driver(raw, tmp_path / "out", workers, ffmpeg=str(wrapped)))
    assert len(list(marks.iterdir())) > 3
    assert hashes(tmp_path / "out") == whole


def test_an_ffmpeg_that_always_dies_excludes_its_video(clips: Clips, tmp_path: Path) -> None:
    raw, whole = clips
    victim = sorted(path.name for path in (raw / "golf").iterdir())[3]
    wrapped = script(
        tmp_path / "ffmpeg", f'case "$*" in *{shlex.quote(victim)}*) kill -9 $$;; esac'
    )
    out = tmp_path / "out"
    require_done(driver(raw, out, 2, ffmpeg=str(wrapped)))
    assert errors(out / "raw.errors.csv") == [(f"golf/{victim}", "crashed")]
    # Trying again what failed gives what an undisturbed run gives.
    require_done(driver(raw, out, 2, retry_failed=True))
    assert hashes(out) == whole


SMALL_DISK = """
set -e
mount -t tmpfs -o size={size} none {out}
{driver} || true
ls -A {out}
echo ---
mount -o remount,size=64m {out}
{driver}
cp -r {out}/. {kept}
mount -o remount,ro {out}
{driver}
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_and_one_that_cannot_be_written(
    clips: Clips, tmp_path: Path, workers: int
) -> None:
    raw, whole = clips
    out, kept = tmp_path / "out", tmp_path / "kept"
    out.mkdir()
    kept.mkdir()
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"]).returncode != 0:
        lacking("mounting a small disk needs user namespaces")
    words = SMALL_DISK.format(
        size="700k", out=out, kept=kept, driver=shlex.join(driver(raw, out, workers))
    )
    done = subprocess.run([*alone, words], capture_output=True, text=True, cwd=ROOT)
    first, second = done.stdout.split("---\n")
    assert "InputError" in first and "No space left on device" in first, done.stdout + done.stderr
    assert ".part" not in first
    assert second.splitlines()[0] == "done", done.stderr
    assert hashes(kept) == whole
    assert "Read-only file system" in second.splitlines()[1], second
    assert "Traceback" not in done.stderr


def test_a_limit_on_file_sizes(clips: Clips, tmp_path: Path) -> None:
    raw, _ = clips
    before = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
    )
    command = driver(raw, tmp_path / "out", 2, before)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "InputError" in done.stdout and "cannot be written" in done.stdout, done.stderr
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_video_that_hangs_and_is_replaced(clips: Clips, tmp_path: Path) -> None:
    raw, whole = clips
    for folder in ("pick", "golf"):
        link_into(tmp_path / "raw" / folder, sorted((raw / folder).iterdir()))
    victim = sorted((tmp_path / "raw" / "pick").iterdir())[5]
    content = victim.read_bytes()
    # A FIFO appears in the place of a file when the plan is made: nothing ever comes out of it.
    before = (
        "import os; from pipelines import _prepare; real = _prepare.plan_set\n"
        "def swap(*a, **k):\n"
        f"    made = real(*a, **k); os.unlink({str(victim)!r}); os.mkfifo({str(victim)!r})\n"
        "    return made\n"
        "_prepare.plan_set = swap\n"
    )
    out = tmp_path / "out"
    require_done(driver(tmp_path / "raw", out, 2, before, timeout=6))
    assert errors(out / "raw.errors.csv") == [(f"pick/{victim.name}", "timeout")]
    victim.unlink()
    victim.write_bytes(content)
    require_done(driver(tmp_path / "raw", out, 2, retry_failed=True))
    assert hashes(out) == whole


def mutated(original: bytes, number: int) -> bytes:
    """Cut short, bits flipped, a piece zeroed, or a piece moved."""
    rng = random.Random(number)
    data = bytearray(original)
    kind = number % 4
    if kind == 0:
        return bytes(data[: rng.randrange(1, len(data))])
    if kind == 1:
        for _ in range(rng.choice((1, 8, 64))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    start, size = rng.randrange(len(data)), rng.randrange(1, 4096)
    if kind == 2:
        data[start : start + size] = bytes(len(data[start : start + size]))
        return bytes(data)
    piece = data[start : start + size]
    del data[start : start + size]
    place = rng.randrange(len(data) + 1)
    return bytes(data[:place] + piece + data[place:])


@pytest.mark.parametrize("videos", [96, pytest.param(240, marks=pytest.mark.soak)])
def test_damaged_videos_are_stored_or_named(tmp_path: Path, videos: int) -> None:
    names = ["unordered.mov", "video_90.mov", "h265_video.mp4", "av1_video.mkv", "corrupted.mp4"]
    originals = [shared(f"clips/{name}") for name in names]
    originals += [min(shared("hmdb51/videos/pick").iterdir(), key=lambda p: p.stat().st_size)]
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(videos):
        original = originals[number // 4 % len(originals)]
        name = f"{number:03d}{original.suffix}"
        (raw / name).write_bytes(mutated(original.read_bytes(), number))
    settings: dict[str, object] = {"frames": 2, "short_edge": 32, "max_failures": 100}
    settings |= {"timeout": 60.0, "videos_per_shard": videos // 4}
    made = run(raw, tmp_path / "two", workers=2, **settings).sets[0]
    stored = sum(shard.videos for shard in made.shards)
    assert stored + len(made.excluded) == made.videos == videos
    assert stored > videos / 12 and len(made.excluded) > videos * 100 / 240
    kinds = {row.kind for row in made.excluded}
    assert kinds <= {"damaged", "unreadable", "zero-frames", "no-video-stream"}, kinds
    assert all(row.message for row in made.excluded)
    run(raw, tmp_path / "one", workers=1, **settings)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


class _Listener(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - of the one test below

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[str]:
    with serving(_Listener) as url:
        yield url


def test_addresses_dressed_as_videos_connect_nowhere_and_read_nothing(
    listener: str, tmp_path: Path
) -> None:
    url = f"{listener}/secret.mp4"
    raw = tmp_path / "raw"
    secret = draw_video(tmp_path / "secret.ts", options=("-c:v", "mpeg2video"))
    draw_video(raw / "good.mp4")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    texts = {
        "hls_network.mp4": playlist.format(url),
        "hls_file.mp4": playlist.format(secret),
        "hls_relative.avi": playlist.format("../secret.ts"),
        "concat_network.mp4": f"ffconcat version 1.0\nfile '{url}'\n",
        "concat_file.mkv": f"ffconcat version 1.0\nfile '{secret}'\n",
        "address.mp4": url,
        "dash.mp4": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" '
        f'type="static"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1">'
        f"<BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\n"
        f"m=video {urlsplit(url).port} RTP/AVP 96\n",
    }
    for name, text in texts.items():
        (raw / name).write_text(text)
    made = run(raw, tmp_path / "out", max_failures=100).sets[0]
    assert {(row.source, row.kind) for row in made.excluded} == {(n, "unreadable") for n in texts}
    assert made.shards[0].videos == 1
    run(raw, tmp_path / "dry", dry_run=True)  # reads headers, and no more than those
    assert not _Listener.asked


def test_a_raw_folder_that_vanishes_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import _prepare

    draw_video(tmp_path / "raw" / "a.mp4")
    real = _prepare.plan_set

    def vanish(*arguments: object, **named: object) -> object:
        plan = real(*arguments, **named)  # type: ignore[arg-type]
        (tmp_path / "raw").rename(tmp_path / "gone")
        return plan

    monkeypatch.setattr(_prepare, "plan_set", vanish)
    with pytest.raises(InputError, match="not found on"):
        run(tmp_path / "raw", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_two_runs_into_one_set_do_not_meet(clips: Clips, tmp_path: Path) -> None:
    raw, whole = clips
    out = tmp_path / "out"
    process = started(driver(raw, out, 1))
    wait_until(lambda: any(out.glob("*.part")) or process.poll() is not None)
    with pytest.raises(InputError, match="another `seco prepare` is writing raw here"):
        run(raw, out, videos_per_shard=1, frames=8)
    said, complaints = process.communicate(timeout=60)
    assert said == "done\n", complaints
    assert hashes(out) == whole


if sys.platform != "linux":
    pytest.skip("signals and mounts as Linux has them", allow_module_level=True)
