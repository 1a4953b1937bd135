"""``seco`` commands in forks of one process that has imported everything.

Importing torch and torchvision takes seconds, a fork takes milliseconds. Apart from that, the
process is what ``python -m cli`` starts: same arguments, exit code, signals and children.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import os
import pkgutil
import runpy
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NoReturn

import pipelines
import seco
import shards
from tests.data import ROOT

_STATUS = struct.Struct("i")
_LONGEST = 1 << 20  # bytes of a request


class Command:
    """A running command, with the part of ``subprocess.Popen`` that tests use.

    Its output goes to files, so that whoever inherits them cannot keep a reader waiting.
    """

    def __init__(self, arguments: list[str], environment: Mapping[str, str], cwd: Path) -> None:
        self.returncode: int | None = None
        self._outputs = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
        self._status, ended = os.pipe()
        names = [f"{name}={value}" for name, value in environment.items()]
        parts = [str(len(arguments)), *arguments, str(cwd), *names]
        server = _server()
        files = [output.fileno() for output in self._outputs]
        socket.send_fds(server, ["\0".join(parts).encode()], [*files, ended])
        os.close(ended)
        self.pid = _STATUS.unpack(server.recv(_STATUS.size))[0]

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises ``subprocess.TimeoutExpired``."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("seco", timeout or 0)
            self.returncode = _STATUS.unpack(os.read(self._status, _STATUS.size))[0]
            os.close(self._status)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; returns standard output and error."""
        self.wait(timeout)
        said = []
        for output in self._outputs:
            output.seek(0)
            said.append(output.read().decode())
            output.close()
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start(*arguments: object, cwd: Path = ROOT, **environment: str) -> Command:
    """Start ``seco`` with these arguments, or ``-c CODE``, in a session of its own."""
    return Command([str(a) for a in arguments], {**os.environ, **environment}, cwd)


@cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen(
        [sys.executable, "-m", "tests.commands", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        cwd=ROOT,
        start_new_session=True,
    )
    theirs.close()
    return ours


def import_everything() -> None:
    """Import what any command may need, and let forks share its memory."""
    for package in (seco, pipelines, shards):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in ("cli", "seco.__main__", "matplotlib.pyplot", "torch.utils.tensorboard"):
        importlib.import_module(name)
    gc.freeze()


def _serve(requests: socket.socket) -> None:
    """Fork a command per request until the tests are over; report how each ended."""
    import_everything()
    # A fork that is interrupted before it has become a command ends silently.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    running: dict[int, int] = {}
    awake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker)
    ready = selectors.DefaultSelector()
    ready.register(requests, selectors.EVENT_READ)
    ready.register(awake, selectors.EVENT_READ)
    while True:
        for key, _ in ready.select():
            if key.fd == awake:
                os.read(awake, 512)
                _report(running)
                continue
            message, files, _, _ = socket.recv_fds(requests, _LONGEST, 3)
            if not message:
                return
            *outputs, ended = files
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                ready.close()
                requests.close()
                for number in (awake, waker, ended, *running.values()):
                    os.close(number)
                _become(message.decode().split("\0"), outputs)
            running[pid] = ended
            for number in outputs:
                os.close(number)
            requests.send(_STATUS.pack(pid))


def _report(running: dict[int, int]) -> None:
    """Tell each starter how its command ended."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            pid, status = ended
            with contextlib.suppress(BrokenPipeError):
                os.write(running[pid], _STATUS.pack(os.waitstatus_to_exitcode(status)))
            os.close(running.pop(pid))


def _become(parts: list[str], outputs: list[int]) -> NoReturn:
    """Run the command in this process, as ``python -m cli`` would, and exit."""
    os.setsid()
    count = int(parts[0])
    arguments, cwd, environment = parts[1 : count + 1], parts[count + 1], parts[count + 2 :]
    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
        os.close(output)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(pair.split("=", 1) for pair in environment)
    if os.environ.get("PYTHONFAULTHANDLER"):  # read when the interpreter started
        faulthandler.enable()
    if "OMP_NUM_THREADS" in os.environ:  # read when torch was imported
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: object = 0
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        else:
            sys.argv = ["seco", *arguments]
            runpy.run_module("cli", run_name="__main__", alter_sys=True)
    except SystemExit as done:
        code = done.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # All of the interpreter's end but taking apart every module, which would copy their memory.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
