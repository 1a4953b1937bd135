"""``seco --sandbox``: the same shards, from an ffmpeg that sees nothing but its video."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from pipelines._ffmpeg import FfmpegStream, ffmpeg_binary, sandbox
from shards.errors import InputError
from shards.untrusted import SANDBOX_VARIABLE
from tests import commands
from tests.data import lacking
from tests.http_server import serving
from tests.pipelines.made_videos import draw_video
from tests.pipelines.running import errors, hashes


@pytest.fixture
def sandboxed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if shutil.which("bwrap") is None:
        lacking("bubblewrap is not installed")
    monkeypatch.setenv(SANDBOX_VARIABLE, "1")
    sandbox.cache_clear()
    yield
    monkeypatch.delenv(SANDBOX_VARIABLE)
    sandbox.cache_clear()


@pytest.mark.usefixtures("sandboxed")
def test_the_same_shards(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for name in ("0.mp4", "-i.avi", "café: a 'b'.mkv"):
        draw_video(raw / name, frames=6)
    (raw / "bad.mp4").write_bytes(b"not a video")
    options = ("--max-failures=50", "--frames=4", "--workers=2")
    for name, group in (("with", ["--sandbox"]), ("without", [])):
        given = ["prepare", "folder", "--src", str(raw), "--out", str(tmp_path / name), *options]
        process = commands.start(*group, *given, **{SANDBOX_VARIABLE: ""})
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    assert hashes(tmp_path / "with") == hashes(tmp_path / "without")
    assert len(errors(tmp_path / "with" / "raw.errors.csv")) == 1


SPY = """#!/bin/bash
[ "$1" = -version ] && echo ffmpeg version 0 && exit
exec 2>&1
cat {secret} && echo "read a file"
cat {video} >/dev/null || echo "cannot read the video"
echo x > {folder}/written && echo "wrote beside the video"
echo x > {video} && echo "wrote to the video"
exec 3<>/dev/tcp/127.0.0.1/{port} && echo "reached the network"
kill -9 {pid} && echo "reached a process"
[ -n "$SECRET" ] && echo "saw the environment"
ulimit -n
"""


@pytest.mark.usefixtures("sandboxed")
def test_it_reaches_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    (tmp_path / "bin").mkdir()
    (tmp_path / "secret").write_text("secret")
    video = tmp_path / "raw" / "0.mp4"
    draw_video(video, frames=2)
    before = video.read_bytes()
    sleeper = subprocess.Popen(["sleep", "600"])
    spy = tmp_path / "bin" / "ffmpeg"
    try:
        with serving(BaseHTTPRequestHandler) as url:
            text = SPY.format(
                secret=tmp_path / "secret",
                video=video,
                folder=video.parent,
                port=url.rpartition(":")[2],
                pid=sleeper.pid,
            )
            spy.write_text(text)
            spy.chmod(0o755)
            assert reached(spy, video) == ["64"]
            assert sleeper.poll() is None
            monkeypatch.setenv(SANDBOX_VARIABLE, "0")
            sandbox.cache_clear()
            # Without it, the spy reaches all of them: it looks in the right places.
            assert len(reached(spy, video)) == 7
            assert sleeper.wait(10) == -signal.SIGKILL
    finally:
        sleeper.kill()
        sleeper.wait()
    assert before != video.read_bytes()


def reached(spy: Path, video: Path) -> list[str]:
    with FfmpegStream([str(spy)], 60.0, reads=video) as stream:
        found = stream.read_line(100_000)
        while line := stream.read_line(100_000):
            found += line
    lines = found.decode().splitlines()
    return [line for line in lines if not line.startswith((str(spy), "cat:", "/bin/bash"))]


@pytest.mark.usefixtures("sandboxed")
def test_a_crash_is_seen_as_one(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    draw_video(tmp_path / "raw" / "0.mp4", frames=2)
    crashing = tmp_path / "bin" / "ffmpeg"
    crashing.write_text(
        '#!/bin/bash\n[ "$1" = -version ] && echo ffmpeg version 0 && exit\nkill -SEGV $$\n'
    )
    crashing.chmod(0o755)
    with FfmpegStream([str(crashing)], 60.0, reads=tmp_path / "raw" / "0.mp4") as stream:
        assert stream.wait() == -signal.SIGSEGV


def test_no_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SANDBOX_VARIABLE, "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    binary = ffmpeg_binary()
    sandbox.cache_clear()
    try:
        with pytest.raises(InputError, match="--sandbox: needs bwrap — install bubblewrap"):
            sandbox(binary)
        for name, code in (("bwrap", "echo no user namespaces >&2; exit 1"), ("prlimit", "")):
            (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
            (tmp_path / name).chmod(0o755)
        with pytest.raises(InputError, match=r"in bubblewrap \(no user namespaces\)"):
            sandbox(binary)
    finally:
        sandbox.cache_clear()
