"""Opens a page in headless Chromium and tells what a reader would notice.

    opened = open_page(path, dark=True)
    assert opened.faults() == []

Chromium is Debian's package ``chromium``, found through PATH, and driven over a pipe (the DevTools
protocol): no port is opened and nothing but the page is loaded. Where there is none the test is
skipped, or fails when ``SECO_REQUIRE_DATA=1``.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.data import lacking

DESKTOP_PX = (1280, 900)
PHONE_PX = (390, 844)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 60.0
_BYTES_AT_ONCE = 1 << 20

# Pictures that are loaded late count as well, once they are asked for.
_PICTURES = """
(async () => {
  const pictures = [...document.images];
  pictures.forEach(picture => { picture.loading = "eager"; });
  await Promise.all(pictures.map(picture => picture.decode().catch(() => null)));
  return pictures.map(p => [p.currentSrc || p.src, p.complete && p.naturalWidth > 0]);
})()
"""


@dataclass
class OpenedPage:
    """What was seen of a page."""

    errors: list[str] = field(default_factory=list)  # console errors and uncaught exceptions
    requests: list[str] = field(default_factory=list)  # what was asked of disk or network
    images: list[tuple[str, bool]] = field(default_factory=list)  # (source, whether it loaded)
    text: str = ""  # as shown
    width_px: int = 0  # of the window
    content_px: int = 0  # more than the window's width: one has to scroll sideways
    background: str = ""  # of the page, as CSS gives it
    answer: Any = None  # what ``script`` returned

    def faults(self) -> list[str]:
        """A line for each thing wrong with a page that should be whole in itself."""
        broken = [source[:60] for source, loaded in self.images if not loaded]
        return [
            *(f"console: {error}" for error in self.errors),
            *(f"asks for {url[:100]}" for url in self.requests),
            *(f"picture does not load: {source}" for source in broken),
            *(
                [f"{self.content_px} px of content in {self.width_px} px"]
                if self.content_px > self.width_px
                else []
            ),
        ]


def open_page(
    path: Path,
    *,
    size_px: tuple[int, int] = DESKTOP_PX,
    dark: bool = False,
    screenshot: Path | None = None,
    script: str | None = None,
) -> OpenedPage:
    """Open the file as a reader would.

    Args:
        size_px: of the window; ``PHONE_PX`` is taken as a phone with touch.
        dark: whether the reader prefers dark pages.
        screenshot: where a PNG of the whole page is written, if given.
        script: JavaScript expression whose value (a promise's, too) becomes ``answer``; it runs
            before the pictures are looked at.
    """
    with _chromium() as browser:
        session = browser.new_page()
        width, height = size_px
        phone = width < 600
        session.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        session.send("Emulation.setEmulatedMedia", features=[scheme])
        for domain in ("Page", "Runtime", "Log", "Network"):
            session.send(f"{domain}.enable")
        url = path.resolve().as_uri()
        session.send("Page.navigate", url=url)
        session.wait_for("Page.loadEventFired")
        opened = OpenedPage(width_px=width)
        if script is not None:
            opened.answer = session.evaluate(script)
        opened.images = [(source, loaded) for source, loaded in session.evaluate(_PICTURES)]
        opened.text = session.evaluate("document.body.innerText")
        opened.content_px = session.evaluate("document.documentElement.scrollWidth")
        opened.background = session.evaluate("getComputedStyle(document.body).backgroundColor")
        if screenshot is not None:
            taken = session.send("Page.captureScreenshot", captureBeyondViewport=True)
            screenshot.write_bytes(base64.b64decode(taken["data"]))
        opened.errors, asked = _read_events(session.events)
        opened.requests = [one for one in asked if one != url and not one.startswith("data:")]
        return opened


def _read_events(events: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    errors, requests = [], []
    for event in events:
        told = event["params"]
        match event["method"]:
            case "Runtime.exceptionThrown":
                thrown = told["exceptionDetails"]
                errors.append(thrown.get("exception", {}).get("description", thrown["text"]))
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "assert"):
                errors.append(" ".join(str(a.get("value", a)) for a in told["args"]))
            case "Log.entryAdded" if told["entry"]["level"] == "error":
                errors.append(told["entry"]["text"])
            case "Network.requestWillBeSent":
                requests.append(told["request"]["url"])
    return errors, requests


class _Browser:
    """The two ends of the pipe: JSON messages, each ended by a zero byte."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._unread = b""
        self._number = 0
        self._deadline = time.monotonic() + _SECONDS

    def new_page(self) -> _Session:
        target = self.call("Target.createTarget", {"url": "about:blank"}, None, [])["targetId"]
        attach = {"targetId": target, "flatten": True}
        return _Session(self, self.call("Target.attachToTarget", attach, None, [])["sessionId"])

    def call(
        self,
        method: str,
        params: dict[str, Any],
        session: str | None,
        events: list[dict[str, Any]],
    ) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        sent = memoryview(json.dumps(message).encode() + b"\0")
        while sent:
            sent = sent[os.write(self._write, sent) :]
        while True:
            answer = self.next_message()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            events.append(answer)

    def next_message(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            left = self._deadline - time.monotonic()
            if not select.select([self._read], [], [], max(0.0, left))[0]:
                raise TimeoutError(f"Chromium has not answered within {_SECONDS:g} s")
            block = os.read(self._read, _BYTES_AT_ONCE)
            if not block:
                raise RuntimeError("Chromium has ended by itself")
            self._unread += block
        message, _, self._unread = self._unread.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


class _Session:
    """One page of the browser, and all it has told so far."""

    def __init__(self, browser: _Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, params, self._session, self.events)

    def wait_for(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._browser.next_message())

    def evaluate(self, script: str) -> Any:
        told = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in told:
            raise RuntimeError(f"{script!r}: {told['exceptionDetails']}")
        return told["result"].get("value")


@contextmanager
def _chromium() -> Iterator[_Browser]:
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        lacking("no chromium in PATH: install Debian's package chromium")
    their_read, our_write = os.pipe()
    our_read, their_write = os.pipe()

    def to_3_and_4() -> None:  # where Chromium expects the pipe; first out of each other's way
        aside = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_read, their_write)]
        for place, end in zip((3, 4), aside, strict=True):
            os.dup2(end, place)

    with tempfile.TemporaryDirectory(
        prefix="seco-chromium-",
        ignore_cleanup_errors=True,  # a helper of the browser may still write
    ) as profile:
        process = subprocess.Popen(
            [
                program,
                "--headless=new",
                "--no-sandbox",  # does not work as root, which CI containers often are
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--disable-component-update",
                "--no-first-run",
                "--host-resolver-rules=MAP * ~NOTFOUND",  # no page of ours needs a network
                f"--user-data-dir={profile}",
                "--remote-debugging-pipe",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=to_3_and_4,
            start_new_session=True,
        )
        os.close(their_read)
        os.close(their_write)
        try:
            yield _Browser(our_read, our_write)
        finally:
            os.close(our_write)
            os.close(our_read)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
