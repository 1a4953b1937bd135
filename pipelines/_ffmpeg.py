"""The one place that runs ffmpeg: finding it, plain runs, and killable streaming runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from shards.errors import InputError

# -nostdin: ffmpeg must never take keystrokes from the terminal it was started in.
_ALWAYS = ("-nostdin", "-hide_banner", "-nostats")
_ADVICE = "pip install imageio-ffmpeg, or name a binary with --ffmpeg or SECO_FFMPEG"

# Codecs of the data sets' videos, and of those that the demo and the tracker write; each by the
# names of what can do it. (ffmpeg's own "av1" takes a GPU.)
_DECODERS = {
    "H.264": ("h264", "libopenh264"),
    "HEVC": ("hevc",),
    "VP9": ("vp9", "libvpx-vp9"),
    "AV1": ("libdav1d", "libaom-av1", "libgav1"),
    "MPEG-4": ("mpeg4",),
}
_ENCODERS = ("libx264", "libvpx", "libvpx-vp9", "mpeg4", "mjpeg")

_PIPE_BYTES = 128 << 10

_running: set[int] = set()
_running_lock = threading.Lock()


class FfmpegError(RuntimeError):
    """ffmpeg ended with an error; the message is what it wrote."""


class FfmpegTimeoutError(FfmpegError):
    """ffmpeg was killed at the time limit."""


def ffmpeg_binary(override: str | None = None) -> str:
    """The ffmpeg to use: ``override``, else ``$SECO_FFMPEG``, else imageio-ffmpeg's static one.

    Raises:
        InputError: there is none, or it cannot be run.
    """
    named = override or os.environ.get("SECO_FFMPEG")
    binary = named or _static_binary()
    ffmpeg_version(binary)
    return binary


def _static_binary() -> str:
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise InputError("no ffmpeg was found", fix=_ADVICE) from error


@lru_cache
def ffmpeg_version(binary: str) -> str:
    """What ``binary`` calls itself, for example ``7.0.2-static``.

    Raises:
        InputError: it cannot be run, or is not ffmpeg.
    """
    try:
        shown = subprocess.run(
            [binary, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "no answer"
        raise InputError(f"ffmpeg cannot be run ({reason})", binary, _ADVICE) from error
    words = shown.stdout.decode("utf-8", "replace").split(maxsplit=3)
    if shown.returncode != 0 or words[:2] != ["ffmpeg", "version"] or len(words) < 3:
        raise InputError("is not an ffmpeg", binary, _ADVICE)
    return words[2]


class FfmpegFacts(NamedTuple):
    """The ffmpeg in use."""

    binary: str
    version: str
    source: str  # what named it
    decodes: tuple[str, ...]
    lacks: tuple[str, ...]  # decoders and encoders that are needed


def ffmpeg_facts() -> FfmpegFacts:
    """What ``seco doctor`` reports of the ffmpeg in use.

    Raises:
        InputError: there is none, or it cannot be run.
        FfmpegError: it does not list its codecs.
    """
    binary = ffmpeg_binary()
    decoders, encoders = (_codecs(binary, kind) for kind in ("-decoders", "-encoders"))
    decodes = tuple(codec for codec, by in _DECODERS.items() if not decoders.isdisjoint(by))
    lacks = [f"{codec} decoder" for codec in _DECODERS if codec not in decodes]
    lacks += [f"{name} encoder" for name in _ENCODERS if name not in encoders]
    source = "SECO_FFMPEG" if os.environ.get("SECO_FFMPEG") else "imageio-ffmpeg"
    return FfmpegFacts(binary, ffmpeg_version(binary), source, decodes, tuple(lacks))


def _codecs(binary: str, kind: str) -> set[str]:
    """The names in the second column of ffmpeg's list."""
    listed = run_ffmpeg([kind], binary=binary, timeout_seconds=60).decode("utf-8", "replace")
    return {words[1] for line in listed.splitlines() if len(words := line.split()) > 1}


def run_ffmpeg(
    argv_tail: Sequence[str],
    *,
    binary: str | None = None,
    stdin: bytes | Iterable[bytes] | None = None,
    timeout_seconds: float | None = None,
) -> bytes:
    """Run ffmpeg to its end with ``argv_tail`` behind the usual options; returns its stdout.

    Args:
        stdin: what to write to its standard input (``-i pipe:0``), whole or in pieces.

    Raises:
        FfmpegError: it ended with an error, or (FfmpegTimeoutError) ran past the limit.
        InputError: there is no ffmpeg.
    """
    argv = [binary or ffmpeg_binary(), *_ALWAYS, *argv_tail]
    pieces = [stdin] if isinstance(stdin, bytes) else stdin
    with tempfile.TemporaryFile() as output:
        with FfmpegStream(argv, timeout_seconds, stdout=output, feed=pieces is not None) as stream:
            if pieces is not None:
                stream.feed(pieces)
            code = stream.wait()
            log = stream.read_log().decode("utf-8", "replace")
        if stream.timed_out:
            raise FfmpegTimeoutError(f"ffmpeg ran past {timeout_seconds:g} s and was killed")
        if code != 0:
            raise FfmpegError(log.strip() or f"ffmpeg ended with code {code}")
        output.seek(0)
        return output.read()


class FfmpegStream:
    """A running ffmpeg whose stdout is read as it comes; it never outlives the ``with`` block.

    It gets a session of its own, so that a Ctrl-C in the terminal does not reach it before its
    owner has decided what to do, and so that killing its group takes all it started.

    Args:
        argv: the whole command.
        timeout_seconds: it is killed after this time; ``timed_out`` tells.
        stdout: a file for its standard output; else it is read with :meth:`read_into`.
        feed: open a pipe to its standard input, for :meth:`feed`.
    """

    def __init__(
        self,
        argv: Sequence[str],
        timeout_seconds: float | None = None,
        *,
        stdout: IO[bytes] | None = None,
        feed: bool = False,
    ) -> None:
        self.timed_out = False
        # A file, not a pipe: nobody has to empty it while stdout is read. It has no name, so
        # nothing is left behind whatever ends this process.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._log_position = 0
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
                stdout=stdout if stdout is not None else subprocess.PIPE,
                stderr=self._log,
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            self._log.close()
            raise
        with _running_lock:
            _running.add(self._process.pid)
        if self._process.stdout is not None:
            # Room for a frame or two: fewer turns between writer and reader.
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(self._process.stdout.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._timer: threading.Timer | None = None
        if timeout_seconds is not None:
            self._timer = threading.Timer(timeout_seconds, self._on_timeout)
            self._timer.daemon = True
            self._timer.start()

    def read_line(self, most: int) -> bytes:
        """A line of its standard output with its end, or as much of it as there is, or ``most``."""
        return self._pipe().readline(most)

    def read_into(self, buffer: memoryview) -> int:
        """Fill ``buffer`` from its standard output; fewer bytes only at the end."""
        # Without a buffer of Python's in between, which would mean copying everything twice.
        descriptor = self._pipe().fileno()
        received = 0
        while received < len(buffer):
            count = os.readv(descriptor, [buffer[received:]])
            if count == 0:
                break
            received += count
        return received

    def _pipe(self) -> IO[bytes]:
        assert self._process.stdout is not None, "stdout goes to a file"
        return self._process.stdout

    def feed(self, pieces: Iterable[bytes]) -> None:
        """Write ``pieces`` to its standard input and close it; stops early when ffmpeg has."""
        assert self._process.stdin is not None, "started without feed=True"
        # Ending early is told by the exit code and the log, better than by a broken pipe.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            for piece in pieces:
                pipe.write(piece)

    def read_log(self) -> bytes:
        """What it has written to stderr since the last call."""
        pieces = []
        while piece := os.pread(self._log.fileno(), 1 << 20, self._log_position):
            self._log_position += len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def wait(self) -> int:
        """Its exit code, when it has ended; negative after a signal."""
        return self._process.wait()

    def kill(self) -> None:
        """End it and all it started, now."""
        # Between its end and wait() the number is still its own: a process that has not been
        # waited for keeps it.
        if self._process.returncode is None:
            _kill_group(self._process.pid)

    def _on_timeout(self) -> None:
        if self._process.returncode is None:
            self.timed_out = True
            self.kill()

    def __enter__(self) -> FfmpegStream:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()
        with _running_lock:
            _running.discard(self._process.pid)
        self._log.close()


def kill_running() -> None:
    """Kill every ffmpeg this process has running; their owners see them end."""
    with _running_lock:
        pids = list(_running)
    for pid in pids:
        _kill_group(pid)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def local_url(path: Path) -> str:
    """``path`` as ffmpeg's own address of a local file.

    Bare names are not safe to pass: one may begin with ``-`` or hold a ``:`` that ffmpeg would
    read as a protocol.
    """
    return f"file:{path.absolute()}"
