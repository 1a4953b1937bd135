"""An S3 server on this machine, and a bad line to it."""

from __future__ import annotations

import http.client
import itertools
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.data import lacking


@contextmanager
def s3_bucket(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket; this process and its children find its server."""
    try:
        import s3fs
        from moto.server import ThreadedMotoServer
    except ImportError:
        lacking("s3fs and moto[server] are not installed")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # botocore's own tries would hide what ours are worth
    }.items():
        patch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"shards-{uuid.uuid4()}"  # the servers of one process share their buckets
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/set"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


class BadLine:
    """A proxy before the S3 server that spoils every tenth request.

    Attributes:
        fault: ``drop`` closes the connection without an answer, ``error`` answers 503, ``slow``
            waits first, ``gone`` answers nothing at all any more.
        requests: how many came.
        spoilt: how many of them were spoilt.
    """

    def __init__(self, fault: str, every: int = 10) -> None:
        self.fault = fault
        self.requests = 0
        self.spoilt = 0
        self.every = every
        self.paths: list[str] = []
        self.whole_reads: list[str] = []  # paths of GETs without a range


@contextmanager
def bad_line(patch: pytest.MonkeyPatch, fault: str) -> Iterator[BadLine]:
    """Within the block the environment's S3 endpoint is a bad line to the present one."""
    import os

    import s3fs

    target = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    line, count = BadLine(fault), itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            number = next(count)
            line.requests = number
            line.paths.append(self.path)
            if self.command == "GET" and "Range" not in self.headers:
                line.whole_reads.append(self.path)
            if "Expect" in self.headers:  # the body comes only when it is asked for
                del self.headers["Expect"]
                self.send_response_only(100)
                self.end_headers()
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if number % line.every == 0 or line.fault == "gone":
                line.spoilt += 1
                if line.fault == "slow":
                    time.sleep(0.3)
                elif line.fault == "error":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                else:
                    self.close_connection = True
                    self.connection.close()
                    return
            connection = http.client.HTTPConnection(target, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            size = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(content)
            connection.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

        def log_message(self, *given: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError, ValueError):  # the connection was closed on purpose
                super().handle()

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    with patch.context() as inner:
        inner.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        yield line
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.shutdown()
    proxy.server_close()
