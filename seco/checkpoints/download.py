"""Fetch one file from a web server: resumed where it was cut off, bounded, over https only."""

from __future__ import annotations

import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from seco import __version__
from shards.atomic import unwritable, write_text
from shards.errors import InputError
from shards.progress import progress, size_text
from shards.storage import in_words, try_again

_CHUNK_BYTES = 1 << 20
_SILENCE_SECONDS = 30.0  # after which a connection counts as lost
_BUSY = (408, 425, 429)  # HTTP codes of the client's class that a retry can mend
_LOCAL = ("localhost", "127.0.0.1", "::1")
_MB = 1_000_000


def download(url: str, part: Path, *, most: int, title: str, fix: str) -> None:
    """Fetch ``url`` into ``part``; what an earlier call left there is continued, not repeated.

    ``PART.etag`` says which version of the server's file ``part`` is the beginning of: if the
    server has another one by now, or does not answer ranges, the file is fetched from its start.
    Cut connections and busy servers are tried again (:func:`shards.storage.try_again`).

    Args:
        url: https; http is for a server on this machine.
        part: complete after this call, and kept when it fails.
        most: the largest size in bytes.
        title: of the progress display.
        fix: advice to the user if it fails.

    Raises:
        InputError: no connection, an HTTP error, a redirect to another kind of address, a file that
            is too large, or a full disk.
    """
    _require_web(url, url)
    opener = urllib.request.build_opener(_WebRedirects)
    try:
        try_again(lambda: _fetch(opener, url, part, most, title))
    except InputError as error:
        raise InputError(error.what, error.where or url, error.fix or fix) from error
    except Exception as error:  # urllib, http.client and ssl have no common class
        raise InputError(f"cannot be fetched ({in_words(error)})", url, fix) from error


def forget(part: Path) -> None:
    """Delete a part, so that the next :func:`download` begins at the start."""
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only; urllib's own also follows them to http and ftp."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        _require_web(newurl, req.full_url)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _require_web(url: str, before: str) -> None:
    """Check a URL that ``before`` leads to; only a server on this machine may be without TLS."""
    if urlsplit(url).scheme != "https" and not (_is_local(url) and _is_local(before)):
        raise InputError("is not an https address", url)


def _is_local(url: str) -> bool:
    return urlsplit(url).scheme == "http" and urlsplit(url).hostname in _LOCAL


def _fetch(
    opener: urllib.request.OpenerDirector, url: str, part: Path, most: int, title: str
) -> None:
    """Fetch what ``part`` lacks, in one request."""
    have = part.stat().st_size if part.is_file() else 0
    tag = _tag_file(part).read_text("utf-8") if have and _tag_file(part).is_file() else ""
    headers = {"User-Agent": f"seco/{__version__}", "Accept-Encoding": "identity"}
    if tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=_SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
                return  # complete already: an earlier process was killed right after the last byte
            if error.code == 416:
                forget(part)
            elif error.code < 500 and error.code not in _BUSY:
                raise InputError(f"cannot be fetched (HTTP {error.code} {error.reason})") from error
            raise
    except urllib.error.URLError as error:  # a wrapper that says nothing more
        raise (error.reason if isinstance(error.reason, Exception) else error) from None
    with answer:
        if answer.status == 206:
            if not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                forget(part)
                raise ConnectionError("the server sent another range than was asked for")
        else:
            have = 0
            forget(part)  # before the new tag is kept: the two must never be of different versions
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        if (total or 0) > most:
            raise _too_large(total or 0, most)
        if not have:
            _keep_tag(part, answer.headers)
        got = _received(answer, part, have, total, most, title)
    if total is not None and got != total:
        raise ConnectionError(f"the connection ended after {got} of {total} bytes")


def _received(answer: Any, part: Path, have: int, total: int | None, most: int, title: str) -> int:
    """Append the answer to ``part``, which has ``have`` bytes; return its size in bytes."""
    megabytes = -(-(total or 0) // _MB)
    with (
        progress(title, megabytes, "MB", have // _MB, quiet=total is None) as shown,
        _opened(part) as file,
    ):
        while chunk := answer.read1(_CHUNK_BYTES):
            if have + len(chunk) > most:
                forget(part)
                raise _too_large(have + len(chunk), most)
            _write(file, chunk, part)
            shown.advance((have + len(chunk)) // _MB - have // _MB)
            have += len(chunk)
    return have


def _opened(part: Path) -> IO[bytes]:
    try:
        return open(part, "ab", buffering=0)
    except OSError as error:
        raise unwritable(part, error) from error


def _write(file: IO[bytes], chunk: bytes, part: Path) -> None:
    left = memoryview(chunk)
    try:
        while left:  # an unbuffered file may take less at a time
            left = left[file.write(left) :]
    except OSError as error:
        raise unwritable(part, error) from error


def _keep_tag(part: Path, headers: Message) -> None:
    """Note the version of the server's file. A weak tag cannot be asked for (RFC 9110, 13.1.5)."""
    tag = headers.get("ETag") or headers.get("Last-Modified") or ""
    if tag and not tag.startswith("W/"):
        write_text(_tag_file(part), tag)
    else:
        _tag_file(part).unlink(missing_ok=True)


def _tag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _too_large(size: int, most: int) -> InputError:
    return InputError(f"has {size_text(size)} or more, the limit is {size_text(most)}")
