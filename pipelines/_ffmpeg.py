"""The one place that runs ffmpeg: finding it, plain runs, and killable streaming runs."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from shards.errors import InputError
from shards.untrusted import SANDBOX_VARIABLE

# -nostdin: ffmpeg must never take keystrokes from the terminal it was started in.
_ALWAYS = ("-nostdin", "-hide_banner", "-nostats")
_ADVICE = "pip install imageio-ffmpeg, or name a binary with --ffmpeg or SECO_FFMPEG"

# Codecs of the datasets' videos and the decoders for each (ffmpeg's own "av1" needs a GPU), then
# the encoders that the demo dataset and the tracker need.
_DECODERS = {
    "H.264": ("h264", "libopenh264"),
    "HEVC": ("hevc",),
    "VP9": ("vp9", "libvpx-vp9"),
    "AV1": ("libdav1d", "libaom-av1", "libgav1"),
    "MPEG-4": ("mpeg4",),
}
_ENCODERS = ("libx264", "libvpx", "libvpx-vp9", "mpeg4", "mjpeg")

_PIPE_BYTES = 128 << 10
# Of a decoding ffmpeg. The most it needs of memory is for a few pictures of the largest size.
_LIMITS = {
    "as": 8 << 30,
    "fsize": 256 << 20,  # its log
    "nofile": 64,
    "core": 0,
}
# What a program needs to start, where it is there.
_SYSTEM = (
    *("/usr", "/bin", "/lib", "/lib64", "/nix/store", "/gnu/store"),
    *("/etc/ld.so.cache", "/etc/alternatives"),
)
# bubblewrap's exit codes for a program that a signal has ended. (ffmpeg's own go up to 255.)
_DIED = {
    128 + number: -number
    for number in (
        *(signal.SIGILL, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGKILL),
        *(signal.SIGSEGV, signal.SIGXCPU, signal.SIGXFSZ, signal.SIGSYS),
    )
}

_running: set[int] = set()
_stopping = threading.Event()


class Interrupted(KeyboardInterrupt):
    """The run is to stop; raised where nothing is half-done."""


class FfmpegError(RuntimeError):
    """ffmpeg failed; the message is what it wrote."""


class FfmpegTimeoutError(FfmpegError):
    """ffmpeg was killed at the time limit."""


def ffmpeg_binary(override: str | None = None) -> str:
    """Return the ffmpeg to use: ``override``, else ``$SECO_FFMPEG``, else imageio-ffmpeg's.

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
    """Return the version that ``binary`` reports, for example ``7.0.2-static``.

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
    """The ffmpeg in use and its codecs."""

    binary: str
    version: str
    source: str  # where it comes from
    decodes: tuple[str, ...]
    lacks: tuple[str, ...]  # needed decoders and encoders


def ffmpeg_facts() -> FfmpegFacts:
    """Return what ``seco doctor`` reports about the ffmpeg in use.

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
    """Return the names in the second column of ffmpeg's list."""
    listed = run_ffmpeg([kind], binary=binary, timeout_seconds=60).decode("utf-8", "replace")
    return {words[1] for line in listed.splitlines() if len(words := line.split()) > 1}


def run_ffmpeg(
    argv_tail: Sequence[str],
    *,
    binary: str | None = None,
    stdin: bytes | Iterable[bytes] | None = None,
    timeout_seconds: float | None = None,
) -> bytes:
    """Run ffmpeg to its end with ``argv_tail`` after the usual options; return its stdout.

    Args:
        stdin: what to write to its standard input (``-i pipe:0``), whole or in pieces.

    Raises:
        FfmpegError: it failed, or (FfmpegTimeoutError) ran past the limit.
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
    """A running ffmpeg whose stdout is read as it is written; it never outlives the ``with`` block.

    It has its own session, so that a Ctrl-C in the terminal does not reach it before its owner has
    decided what to do, and so that killing its group kills everything it started.

    Args:
        argv: the whole command.
        timeout_seconds: it is killed after this time, and ``timed_out`` is set.
        stdout: a file for its standard output; otherwise it is read with :meth:`read_into`.
        feed: open a pipe to its standard input, for :meth:`feed`.
        reads: the file of others that it decodes: memory, CPU time, open files and written bytes
            are limited, and with ``seco --sandbox`` it sees no other file.

    Raises:
        InputError: the sandbox does not work here.
    """

    def __init__(
        self,
        argv: Sequence[str],
        timeout_seconds: float | None = None,
        *,
        stdout: IO[bytes] | None = None,
        feed: bool = False,
        reads: Path | None = None,
    ) -> None:
        require_going()
        self.timed_out = False
        limits = {} if reads is None else _limits(timeout_seconds)
        self._sandboxed = reads is not None and sandbox(argv[0])
        if reads is not None and self._sandboxed:
            argv = _within_sandbox(argv, limits, reads)
        # A file, not a pipe, which would have to be drained while stdout is read. It has no name,
        # so nothing is left behind however this process ends.
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
        if not self._sandboxed:
            _limit(self._process.pid, limits)
        _running.add(self._process.pid)
        if _stopping.is_set():  # meanwhile: stop_running() may have missed it
            self.kill()
        if self._process.stdout is not None:
            # Space for a frame or two: fewer switches between writer and reader.
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(self._process.stdout.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._timer: threading.Timer | None = None
        if timeout_seconds is not None:
            patience = min(timeout_seconds, threading.TIMEOUT_MAX)
            self._timer = threading.Timer(patience, self._on_timeout)
            self._timer.daemon = True
            self._timer.start()

    def read_line(self, most: int) -> bytes:
        """Return a line of its stdout with its end, or as much as there is, or ``most`` bytes."""
        return self._pipe().readline(most)

    def read_into(self, buffer: memoryview) -> int:
        """Fill ``buffer`` from its stdout; return the bytes read, fewer only at the end."""
        # Without Python's buffering, which would copy everything twice.
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
        """Write ``pieces`` to its standard input and close it; stop early if ffmpeg has exited."""
        assert self._process.stdin is not None, "started without feed=True"
        # If it exits early, exit code and log say more than a broken pipe.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            for piece in pieces:
                pipe.write(piece)

    def read_log(self) -> bytes:
        """Return what it has written to stderr since the last call."""
        pieces = []
        while piece := os.pread(self._log.fileno(), 1 << 20, self._log_position):
            self._log_position += len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def wait(self) -> int:
        """Wait for it to exit; return its exit code, negative after a signal."""
        code = self._process.wait()
        return _DIED.get(code, code) if self._sandboxed else code

    def kill(self) -> None:
        """Kill it and everything it started, now."""
        # After it exits, its process id is not reused before wait().
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
        _running.discard(self._process.pid)
        self._log.close()


def _limits(timeout_seconds: float | None) -> dict[str, int]:
    """What a process that decodes the files of others can take of this machine."""
    if timeout_seconds is None:
        return _LIMITS
    # It is killed at the time limit; this one holds when nobody is left to kill it.
    return {**_LIMITS, "cpu": math.ceil(timeout_seconds) * (os.cpu_count() or 1)}


def _limit(pid: int, limits: dict[str, int]) -> None:
    if hasattr(resource, "prlimit"):  # Linux
        for name, most in limits.items():
            with contextlib.suppress(OSError, ValueError):  # lower already, or it has exited
                kind = getattr(resource, f"RLIMIT_{name.upper()}")
                resource.prlimit(pid, kind, (most, most))


@lru_cache
def sandbox(binary: str) -> bool:
    """Whether ``binary`` decodes within bubblewrap: with ``seco --sandbox`` or ``SECO_SANDBOX=1``.

    Raises:
        InputError: it is to, and does not start there.
    """
    if os.environ.get(SANDBOX_VARIABLE, "") in ("", "0"):
        return False
    argv = _within_sandbox([binary, "-version"], _limits(1e4), Path(binary))
    try:
        tried = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        fault = tried.stderr.decode("utf-8", "replace").strip() if tried.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        fault = str(error)
    if fault is not None:
        raise InputError(
            f"ffmpeg does not start in bubblewrap ({fault or 'it says nothing'})",
            "--sandbox",
            "allow user namespaces, or leave the option out",
        )
    return True


def _within_sandbox(argv: Sequence[str], limits: dict[str, int], reads: Path) -> list[str]:
    """Return a command that runs ``argv`` without network, and with no file but ``reads``."""
    bubblewrap, limiter = _program("bwrap", "bubblewrap"), _program("prlimit", "util-linux")
    binary = Path(shutil.which(argv[0]) or argv[0]).absolute()
    # Its own libraries may lie beside it, as Conda's do.
    seen = [*_SYSTEM, binary.parent.parent / "lib"]
    visible = [part for place in seen for part in ("--ro-bind-try", str(place), str(place))]
    visible += ["--ro-bind", os.path.realpath(binary), str(binary)]
    video = ["--ro-bind", os.path.realpath(reads), str(reads.absolute())]
    # The video comes last: it may lie in /dev/shm.
    places = [*visible, "--dev", "/dev", *video, "--remount-ro", "/dev", "--remount-ro", "/"]
    options = ["--unshare-all", "--cap-drop", "ALL", "--clearenv", "--chdir", "/"]
    bounds = [f"--{name}={_at_most(name, most)}" for name, most in limits.items()]
    return [bubblewrap, *places, *options, limiter, *bounds, str(binary), *argv[1:]]


def _at_most(name: str, wanted: int) -> int:
    """Return a limit that this process may set: not above its own."""
    _, own = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))
    return wanted if own == resource.RLIM_INFINITY else min(wanted, own)


def _program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise InputError(f"needs {name}", "--sandbox", f"install {package}")
    return found


def kill_running() -> None:
    """Kill every ffmpeg this process is running; their owners see them exit."""
    for pid in _running.copy():
        _kill_group(pid)


def stop_running() -> None:
    """Kill every ffmpeg of this process and start no other; may be called by a signal handler."""
    _stopping.set()
    kill_running()


def go_on() -> None:
    """Start ffmpeg again after :func:`stop_running`."""
    _stopping.clear()


def require_going() -> None:
    """Raise :class:`Interrupted` after :func:`stop_running`."""
    if _stopping.is_set():
        raise Interrupted


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def local_url(path: Path, inside: tuple[int, int] | None = None) -> str:
    """Return ``path`` as ffmpeg's own address of a local file, or of a part of one.

    Bare names are not safe to pass: one may begin with ``-`` or contain a ``:`` that ffmpeg would
    read as a protocol.

    Args:
        inside: first byte and size of the part, for example of a member of a tar.
    """
    whole = f"file:{path.absolute()}"
    if inside is None:
        return whole
    first, size = inside
    return f"subfile,,start,{first},end,{first + size},,:{whole}"
