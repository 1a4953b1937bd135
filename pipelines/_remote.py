"""Raw videos behind fsspec (``s3://`` etc.): listed before the plan, fetched while decoding.

The list becomes a local folder of empty files with the names and the sizes of the remote ones, in
which a dataset finds its videos as usual; only annotations are fetched for it. A video is fetched
whole, shortly before it is decoded, to the spool: a folder with a limit on its size.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, TypeVar

from pipelines._adapter import (
    Discovery,
    Video,
    VideoSet,
    is_annotation,
    is_picture,
    is_video,
    shown_name,
    tar_metadata,
)
from pipelines._config import PrepareConfig
from pipelines._decode import DecodeError
from pipelines._ffmpeg import require_going
from shards.atomic import unwritable
from shards.errors import InputError
from shards.format import Exclusion
from shards.opening import ShardCache
from shards.storage import (
    fetch_parts,
    in_words,
    is_remote,
    open_filesystem,
    try_again,
)
from shards.terminal import say
from shards.untrusted import MAX_TEXT_BYTES

_PIECE_BYTES = 16 << 20  # fetched at a time
_AHEAD_BYTES = 64 << 10  # read with every header of a tar
_TEXTS_BYTES = 64 << 20  # of annotations or pictures fetched at a time
_END_BYTES = 8 << 20  # of a recording, at either end: what ffmpeg reads before it decodes
_MOST_BOXES = 1000  # of an MP4 file, before the one that describes it
_ROOM_SECONDS = 0.1  # between looks for room in the spool

_OF_A_NAME = (
    *(errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EILSEQ),
)
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")  # of MP4 and MOV files
_MOST_MOOV_BYTES = 64 << 20
_LOCK = ".lock"
_ADVICE = "check address and credentials"
_Answer = TypeVar("_Answer")


class Unreachable(InputError):
    """What is behind an address cannot be told, for reasons that are not its own."""


@contextmanager
def brought_here(
    config: PrepareConfig, *, whole: bool
) -> Iterator[tuple[PrepareConfig, Callable[[Discovery], Discovery]]]:
    """Let the block find videos as if they were here.

    Args:
        config: settings, of which ``src`` or ``annotations`` may be addresses.
        whole: ``src`` is a folder with everything in it; otherwise the dataset reads addresses.

    Yields:
        The settings with local paths, and what gives the videos found there their addresses.

    Raises:
        InputError: an address cannot be read; errors of the block name addresses, not local paths.
    """
    with tempfile.TemporaryDirectory(prefix="seco-") as scratch:
        places: dict[str, str] = {}  # local path to address
        odd: list[str] = []

        def mirrored(address: str, name: str) -> str:
            here = Path(scratch, name, PurePosixPath(address.rstrip("/")).name or "src")
            here.parent.mkdir()
            places[str(here)] = address.rstrip("/")
            odd.extend(mirror(address, here))
            return str(here)

        local = config
        if whole and is_web(config.src):
            raise InputError(
                "folders of a web server cannot be listed",
                config.src,
                "give a list, as dataset list",
            )
        if whole and is_remote(config.src):
            local = replace(local, src=mirrored(config.src, "src"))
        if config.annotations is not None and is_remote(config.annotations):
            local = replace(local, annotations=mirrored(config.annotations, "annotations"))

        def addressed(found: Discovery) -> Discovery:
            sets = [_addressed(part, places) for part in found.sets]
            message = "no file here can have this name"
            rows = [
                Exclusion(source=shown_name(name), kind="unreadable", message=message)
                for name in odd
                if is_video(name) or is_picture(name)
            ]
            if rows:
                sets[0] = replace(sets[0], excluded=[*sets[0].excluded, *rows])
            return replace(found, sets=sets)

        try:
            yield local, addressed
        except InputError as error:
            if not places:
                raise
            told = [None if text is None else str(text) for text in (error.where, error.fix)]
            where, fix = (text and _renamed(text, places) for text in told)
            raise type(error)(_renamed(error.what, places), where, fix) from error


def _renamed(text: str, places: dict[str, str]) -> str:
    for local, address in places.items():
        text = text.replace(local, address)
    return text


def _addressed(found: VideoSet, places: dict[str, str]) -> VideoSet:
    def address(video: Video) -> Video:
        for local, url in places.items():
            inside = os.path.relpath(video.path, local)
            if video.address is None and inside.partition("/")[0] != "..":
                return replace(video, address=f"{url}/{inside}")
        return video

    if not places:
        return found
    return replace(found, videos=[address(video) for video in found.videos])


def mirror(address: str, here: Path) -> list[str]:
    """Make ``here`` a folder like the remote one, or a file.

    Returns:
        Names that are left out: a folder has them, too, they lead elsewhere, or no file may have
        them.
    """
    say(f"listing {address}")
    with _as_input_error(address):
        found = _files_below(address)
    if not found:
        raise InputError("there is no such folder", address, _ADVICE)
    odd: list[str] = []
    texts: list[tuple[str, Path, int]] = []
    for inside, url, size in found:
        path = here / inside
        try:
            if inside and not _plain(inside):
                raise ValueError("leads elsewhere")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                file.truncate(size)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in _OF_A_NAME:
                raise unwritable(path, error) from error
            odd.append(inside)
            continue
        if is_annotation(path.name) and size <= MAX_TEXT_BYTES:
            texts.append((url, path, size))
    for path, _ in _fetch_small(texts):
        path.unlink()  # whoever needs it misses it
    return odd


@contextmanager
def _as_input_error(address: str) -> Iterator[None]:
    try:
        yield
    except DecodeError as error:
        raise InputError(error.message, address, _ADVICE) from error


def _plain(name: str) -> bool:
    """Whether a name from elsewhere stays below the folder it is joined to."""
    return not any(sign in name for sign in ("\0", "::")) and all(
        part not in ("", ".", "..") for part in name.split("/")
    )


def _fetch_small(files: Iterable[tuple[str, Path, int]]) -> Iterator[tuple[Path, DecodeError]]:
    """Fetch many files; yield those that are not there or may not be read."""
    waiting: list[tuple[str, Path]] = []
    total = 0
    for address, path, size in files:
        waiting.append((address, path))
        total += size
        if total >= _TEXTS_BYTES:
            yield from _fetch_at_once(waiting)
            waiting, total = [], 0
    yield from _fetch_at_once(waiting)


def _fetch_at_once(wanted: list[tuple[str, Path]]) -> Iterator[tuple[Path, DecodeError]]:
    contents = fetch_parts([(address, None, None) for address, _ in wanted])
    for (address, path), content in zip(wanted, contents, strict=True):
        if not isinstance(content, Exception):
            path.write_bytes(content)
            continue
        fault = _fault(content, address)
        if not isinstance(fault, DecodeError):
            raise fault
        yield path, fault


def fetch_file(address: str, path: Path) -> None:
    """Fetch a file of at most 256 MiB, such as a list.

    Raises:
        InputError: it cannot be read or is larger.
    """

    def read() -> bytes:
        system, remote = open_filesystem(address)
        with system.open(remote, "rb") as file:
            found: bytes = file.read(MAX_TEXT_BYTES + 1)  # whose size a web server may not tell
            return found

    with _as_input_error(address):
        content = _asked(read, address)
    if len(content) > MAX_TEXT_BYTES:
        raise InputError(f"is larger than {MAX_TEXT_BYTES >> 20} MiB", address, "copy it first")
    path.write_bytes(content)


class RemoteFile:
    """A remote file as far as ``tarfile`` needs one; what follows a header comes with it.

    Args:
        address: of the file.

    Raises:
        InputError: it cannot be read.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        with _as_input_error(address):
            self.size = _known_size(address)
        self._at = 0
        self._first, self._held = 0, b""

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """Set the position of the next read."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = max(0, start + position)
        return self._at

    def tell(self) -> int:
        """Return the position of the next read."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; fewer at the end."""
        end = self.size if size < 0 else min(self._at + size, self.size)
        if not (self._first <= self._at and end <= self._first + len(self._held)):
            ahead = min(max(end, self._at + _AHEAD_BYTES), self.size)
            require_going()
            self._first, self._held = self._at, _part(self._address, self._at, ahead)
        data = self._held[self._at - self._first : max(self._at, end) - self._first]
        self._at += len(data)
        return data


def _part(address: str, first: int, last: int) -> bytes:
    """Return the bytes from ``first`` to before ``last``.

    Raises:
        DecodeError: it is not there, not for us, or shorter.
        Unreachable: it cannot be fetched for other reasons.
    """
    if last <= first:
        return b""
    content = _asked(lambda: _fetched(address, first, last), address)
    if len(content) > last - first:
        raise Unreachable("its server ignores ranges", address, "copy it first")
    if len(content) < last - first:
        raise DecodeError("unreadable", f"ends before byte {last}")
    return content


def _fetched(address: str, first: int, last: int) -> bytes:
    system, remote = open_filesystem(address)
    found: bytes = system.cat_file(remote, start=first, end=last)
    return found


def is_web(address: str) -> bool:
    """Whether an address is one of a web server."""
    return address.startswith(("http://", "https://"))


def _fault(error: Exception, address: str) -> Exception:
    """Return what is wrong with one file, or that nothing can be told."""
    if isinstance(error, InputError):
        return error
    # fsspec calls everything that a web server refuses missing, and an outage, too.
    cause = error.__cause__ if is_web(address) else None
    status = getattr(cause or error, "status", None) if is_web(address) else None
    if isinstance(error, PermissionError) or status in (401, 403):
        return DecodeError("unreadable", f"may not be read ({in_words(cause or error)})")
    if status in (404, 410) or (isinstance(error, FileNotFoundError) and cause is None):
        return DecodeError("missing", "is not at its address")
    if isinstance(status, int) and 400 <= status < 500 and status not in _WAIT:
        return DecodeError("unreadable", f"is refused ({in_words(cause or error)})")
    return Unreachable(f"cannot be reached ({in_words(cause or error)})", address, _ADVICE)


_WAIT = (407, 408, 425, 429)  # statuses: ask a proxy first, too slow, too early, too often


class _Busy(Exception):
    """A web server's answer that may be another one in a second."""


def _asked(question: Callable[[], _Answer], address: str) -> _Answer:
    """Return what a server answers.

    Raises:
        DecodeError, Unreachable: as for :func:`_part`.
    """

    def ask() -> _Answer:
        try:
            return question()
        except FileNotFoundError as error:
            if isinstance(_fault(error, address), Unreachable):
                raise _Busy(in_words(error.__cause__ or error)) from error
            raise

    try:
        return try_again(ask)
    except Exception as error:
        raise _fault(error, address) from error


def _fetch_range(address: str, first: int, size: int, file: BinaryIO) -> None:
    for at in range(first, first + size, _PIECE_BYTES):
        require_going()
        file.write(_part(address, at, min(at + _PIECE_BYTES, first + size)))


class _Size(NamedTuple):
    """What a :class:`ShardCache` wants to know of a file."""

    bytes: int
    sha256: str = ""


class _Cache(ShardCache):
    """Fetches files in pieces, so that a stopped run need not wait for a whole one."""

    def _download(self, address: str) -> None:
        path = self.path(address)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            with open(temporary, "wb") as file:
                _fetch_range(address, 0, self._infos[address].bytes, file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _file_name(video: Video) -> str:
    """Return the name of a video's file, which messages have; or one that is short enough."""
    name = video.path.name
    return name if len(os.fsencode(name)) < 200 else f"video{video.path.suffix[:8]}"


@dataclass(frozen=True)
class Spool:
    """Remote videos as local files, for as long as each is needed.

    Args:
        folder: shared by the processes of this machine.
        limit_bytes: of the videos in it. What has to be unpacked, pictures in a folder or a video
            in a tar, comes on top: one for each video that is decoded at the time.
    """

    folder: str = ""
    limit_bytes: int = 0

    @contextmanager
    def at_hand(self, video: Video) -> Iterator[Video]:
        """Yield the video as one that is here; one that is stays as it is.

        Raises:
            DecodeError: it is not there, or may not be read.
            InputError: it cannot be fetched for reasons that are not its own.
        """
        if video.address is None:
            yield video
            return
        with ExitStack() as stack:
            try:
                here = self._fetched(video, video.address, stack)
            except OSError as error:
                raise unwritable(Path(self.folder), error) from error
            yield here

    def _fetched(self, video: Video, address: str, stack: ExitStack) -> Video:
        os.makedirs(self.folder, exist_ok=True)
        own = stack.enter_context(tempfile.TemporaryDirectory(prefix="use-", dir=self.folder))
        stack.enter_context(_held(Path(own)))
        path = Path(own, _file_name(video))
        if video.frames is not None and video.frames.only is not None:
            path.mkdir()
            picture = path / video.frames.only
            with open(picture, "wb") as file:
                url = f"{address}/{picture.name}"
                _fetch_range(url, 0, _known_size(url), file)
        elif video.frames is not None:
            _fetch_folder(address, path)
        elif video.inside is not None:
            return _out_of_tar(video, address, path)
        else:
            stack.enter_context(self._linked(video, address, path))
        return replace(video, path=path, address=None)

    @contextmanager
    def _linked(self, video: Video, address: str, path: Path) -> Iterator[None]:
        """Give the cached file another name, under which it stays whatever the cache does."""
        # In the folder of empty files its size is known; of a list, its path is only a name.
        known = video.path.is_absolute() and video.path.is_file()
        size = video.path.stat().st_size if known else _known_size(address)
        cache = _Cache(Path(self.folder), self.limit_bytes, {address: _Size(size)}, "--spool-gb")
        while not path.exists():
            require_going()
            if cache.fetch(address, wait=False) is None:
                self._clear()
                time.sleep(_ROOM_SECONDS)
            else:
                cache.link(address, path)  # unless it was evicted in between
        yield
        if video.span is None:  # nobody else needs it
            cache.drop(address)

    def _clear(self) -> None:
        """Remove what a killed process had in use."""
        for own in Path(self.folder).glob("use-*"):
            if not _in_use(own):
                shutil.rmtree(own, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Show others that a folder is in use, for as long as this process lives."""
    new = folder / f"{_LOCK}.new"
    lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(new, folder / _LOCK)  # nobody sees it before it is locked
        yield
    finally:
        os.close(lock)


def _in_use(folder: Path) -> bool:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:  # just being made, or just removed
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(lock)


NO_SPOOL = Spool()  # where all videos are here


@contextmanager
def spool_folder() -> Iterator[str]:
    """Yield a folder, and remove it; also those of processes that were killed."""
    for left in Path(tempfile.gettempdir()).glob("seco-spool-*"):
        if left.is_dir() and not left.is_symlink() and not _in_use(left):
            shutil.rmtree(left, ignore_errors=True)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="seco-spool-"))
        stack.enter_context(_held(Path(folder)))
        yield folder


@contextmanager
def spooled(config: PrepareConfig) -> Iterator[Spool]:
    """Yield the spool of a run."""
    with spool_folder() as folder:
        yield Spool(folder, int(config.spool_gb * 1e9))


@contextmanager
def outline(video: Video) -> Iterator[Video]:
    """Yield a file that has what ffmpeg reads of the video before it decodes, and else zeros.

    That is its beginning, its end, and the box of an MP4 file that describes it. A fragmented MP4
    file has more of these, all over it: it is fetched whole.

    Raises:
        DecodeError: that cannot be told of this one, or it is not there.
        InputError: it cannot be fetched.
    """
    if video.address is None:
        yield video
        return
    address = video.address
    first, size = video.inside or (0, _known_size(address))
    with tempfile.TemporaryDirectory(prefix="seco-") as scratch:
        path = Path(scratch, _file_name(video))
        with open(path, "w+b") as file:
            file.truncate(size)

            def bring(start: int, end: int) -> None:
                start, end = max(0, start), min(end, size)
                file.seek(start)
                file.write(_part(address, first + start, first + end))

            bring(0, _END_BYTES)
            bring(max(_END_BYTES, size - _END_BYTES), size)
            found = _moov_range(
                lambda at: _part(address, first + at, min(first + at + 16, first + size))
            )
            if found is not None:
                bring(found[0], found[1] + _END_BYTES)
                file.seek(found[0])
                if b"mvex" in file.read(found[1] - found[0]):
                    raise DecodeError("unreadable", "its parts have headers of their own")
        yield replace(video, path=path, address=None, inside=None, texts={})


def _moov_range(read: Callable[[int], bytes]) -> tuple[int, int] | None:
    """Return where the box that describes an MP4 file lies, given 16 bytes at any place of it."""
    at = 0
    for _ in range(_MOST_BOXES):
        header = read(at)
        if at == 0 and header[4:8] not in _FIRST_BOXES:
            return None  # another container
        if len(header) < 16:
            break
        size, kind = struct.unpack_from(">I4s", header)
        if size == 1:
            (size,) = struct.unpack_from(">Q", header, 8)
        if kind == b"moov" and size <= _MOST_MOOV_BYTES:
            return at, at + size
        if size < 8:
            break
        at += size
    raise DecodeError("unreadable", "its header was not found")


def _known_size(address: str) -> int:
    size = _remote_size(address)
    if size is None:
        raise DecodeError("unreadable", "its server does not tell its size")
    return size


def _remote_size(address: str) -> int | None:
    system, remote = open_filesystem(address)
    size = _asked(lambda: system.info(remote), address).get("size")
    return None if size is None else int(size)


def _files_below(address: str) -> list[tuple[str, str, int]]:
    """Return (name below the folder, address, bytes) of every file; the name of a file is ''."""
    system, root = open_filesystem(address)
    system.invalidate_cache()
    found = _asked(lambda: system.find(root, withdirs=False, detail=True), address)
    start = root.rstrip("/")
    return [
        (
            name.removeprefix(start).removeprefix("/"),
            system.unstrip_protocol(name),
            row.get("size") or 0,
        )
        for name, row in found.items()
        if not (name.endswith("/") or row.get("type") == "directory")
    ]


def _out_of_tar(video: Video, address: str, path: Path) -> Video:
    """Fetch a video and the texts beside it."""
    assert video.inside is not None
    metadata = tar_metadata(video, lambda first, size: _part(address, first, first + size))
    with open(path, "wb") as file:
        _fetch_range(address, *video.inside, file)
    here = replace(video, path=path, address=None, inside=None, texts={})
    return replace(here, metadata=metadata or video.metadata)


def _fetch_folder(address: str, here: Path) -> None:
    """Fetch a folder of pictures, with the annotations beside them."""
    here.mkdir()
    wanted = []
    for inside, url, size in _files_below(address):
        name = Path(inside).name
        if (is_picture(name) or is_annotation(name)) and _plain(inside) and inside.count("/") <= 1:
            path = here / inside
            path.parent.mkdir(exist_ok=True)
            wanted.append((url, path, size))
    if not wanted:
        raise DecodeError("missing", "there are no pictures at its address")
    for path, error in _fetch_small(wanted):
        raise DecodeError(error.kind, f"{path.name} {error.message}")
