"""Running ffmpeg: finding it, feeding it, ending it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipelines._ffmpeg import (
    FfmpegError,
    FfmpegStream,
    FfmpegTimeoutError,
    ffmpeg_binary,
    ffmpeg_version,
    kill_running,
    run_ffmpeg,
)
from shards.errors import InputError

ENDLESS = ("-nostdin", "-re", "-f", "lavfi", "-i", "testsrc2", "-f", "null", "-")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_option_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECO_FFMPEG", "/no/such/ffmpeg")
    with pytest.raises(InputError, match="/no/such/ffmpeg"):
        ffmpeg_binary()
    monkeypatch.delenv("SECO_FFMPEG")
    binary = ffmpeg_binary()
    monkeypatch.setenv("SECO_FFMPEG", "/no/such/ffmpeg")
    assert ffmpeg_binary(binary) == binary
    assert ffmpeg_version(binary)[:1].isalnum()


def test_a_program_that_is_not_ffmpeg_is_refused() -> None:
    with pytest.raises(InputError, match="is not an ffmpeg"):
        ffmpeg_binary("/bin/echo")


def test_input_in_pieces_comes_out_whole() -> None:
    pieces = [bytes([value]) * 256 for value in range(5)]
    raw = ("-f", "rawvideo", "-pix_fmt", "gray", "-s", "16x16")
    written = run_ffmpeg([*raw, "-i", "pipe:0", *raw, "pipe:1"], stdin=iter(pieces))
    assert written == b"".join(pieces)


def test_an_error_carries_what_ffmpeg_wrote(tmp_path: Path) -> None:
    with pytest.raises(FfmpegError, match="No such file"):
        run_ffmpeg(["-i", f"file:{tmp_path}/none", "-f", "null", "-"])


def test_a_plain_run_ends_at_its_limit() -> None:
    began = time.monotonic()
    with pytest.raises(FfmpegTimeoutError):
        run_ffmpeg(ENDLESS, timeout_seconds=0.3)
    assert time.monotonic() - began < 10


def test_a_stream_never_outlives_its_block() -> None:
    with (
        pytest.raises(RuntimeError, match="owner"),
        FfmpegStream([ffmpeg_binary(), *ENDLESS]) as stream,
    ):
        pid = stream._process.pid
        assert is_alive(pid)
        raise RuntimeError("owner")
    assert not is_alive(pid)


def test_kill_running_ends_all() -> None:
    with FfmpegStream([ffmpeg_binary(), *ENDLESS]) as stream:
        kill_running()
        assert stream.wait() < 0
        assert not stream.timed_out
