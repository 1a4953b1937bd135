"""WebDataset tars of video files, such as those of video2dataset: KEY.mp4, KEY.json, KEY.txt.

Nothing is unpacked: ffmpeg reads each video where it lies in its tar. Plain values of the JSON and
the text are kept in the records, as ``metadata``; a whole number in KEY.cls is the label.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby, repeat, takewhile
from pathlib import Path
from typing import BinaryIO

from pipelines._adapter import (
    Adapter,
    Discovery,
    Video,
    VideoSet,
    is_video,
    keyed,
    refuse_splits_of_folders,
    shown_name,
    slug,
)
from pipelines._config import PrepareConfig
from pipelines._decode import DecodeError
from pipelines._engine import stoppable
from pipelines._remote import RemoteFile, Unreachable
from shards.dataset import PIPE, expand_spec, set_name
from shards.errors import InputError
from shards.format import Exclusion
from shards.index import label_of, members_of
from shards.storage import is_remote
from shards.untrusted import open_regular

_TEXTS = ("json", "txt")
_READERS = 16  # tars whose headers are read at a time


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset in tars: a folder of them, a pattern or a single one.

    Raises:
        InputError: there are none, or they hold no videos.
    """
    refuse_splits_of_folders(config)
    src = config.src
    if is_remote(src) and "." not in posixpath.basename(src):
        src = f"{src.rstrip('/')}/"  # which says that it is a folder
    tars = expand_spec(src)
    if any(tar.startswith(PIPE) for tar in tars):
        raise InputError("a command is no file of videos", "--src", "give the tars it reads")
    absolute = [tar if is_remote(tar) else os.path.abspath(tar) for tar in tars]
    root = _common_folder(absolute)
    videos: list[Video] = []
    excluded: list[Exclusion] = []
    with _stoppable(absolute), ThreadPoolExecutor(_READERS) as pool:
        for tar, inside in zip(absolute, pool.map(_found, absolute, repeat(root)), strict=True):
            if isinstance(inside, InputError):
                name = os.path.basename(tar)
                excluded.append(Exclusion(source=name, kind="unreadable", message=inside.what))
            else:
                videos += inside
    if not videos:
        what = f"; {excluded[0].source} {excluded[0].message}" if excluded else ""
        raise InputError(
            f"its {len(tars)} tars hold no videos{what}",
            config.src,
            "expected members such as KEY.mp4 or KEY.webm",
        )
    labels = sorted({video.label for video in videos if video.label is not None})
    found = VideoSet(
        name=config.name or slug(set_name(os.path.basename(tars[0]))),
        videos=keyed(videos),
        label_names=[],
        excluded=excluded,
        notes=[f"labels: {len(labels)}, from KEY.cls"] if labels else [],
    )
    return Discovery(sets=[found], root=root or "/")


def _stoppable(tars: list[str]) -> AbstractContextManager[object]:
    """Let a signal stop the reading of remote headers, which may take long."""
    return stoppable() if any(map(is_remote, tars)) else nullcontext()


def _common_folder(tars: list[str]) -> str:
    """Return the deepest folder or address that holds all tars."""
    folders = [tar.split("/")[:-1] for tar in tars]
    pairs = zip(min(folders), max(folders), strict=False)  # all others lie between them
    common = "/".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    # Of tars on several servers there is none; and the one of all local files is /.
    return "/".join(folders[0]) if is_remote(tars[0]) and not is_remote(common) else common


def _found(tar: str, root: str) -> list[Video] | InputError:
    try:
        if is_remote(tar):
            return list(_videos(tar, root, RemoteFile(tar)))
        with open_regular(tar) as file:
            return list(_videos(tar, root, file))
    except Unreachable:
        raise  # which says nothing about the tar
    except DecodeError as error:
        return InputError(error.message, tar)
    except InputError as error:
        return error
    except OSError as error:
        return InputError(f"cannot be read ({error.strerror or error})", tar)


def _videos(tar: str, root: str, file: BinaryIO | RemoteFile) -> Iterator[Video]:
    shown = shown_name(tar.removeprefix(f"{root}/"))
    for _, group in groupby(members_of(file, tar), key=lambda member: member.key):
        members = list(group)
        texts = {m.extension: (m.offset, m.size) for m in members if m.extension in _TEXTS}
        classes = [m for m in members if m.extension == "cls"]
        label = label_of(classes[0], file) if classes else None
        for member in members:
            hidden = member.name.rpartition("/")[2].startswith(".")
            if is_video(member.name) and not hidden:
                yield Video(
                    source=f"{shown}/{shown_name(member.name)}",
                    path=Path(tar),
                    address=tar if is_remote(tar) else None,
                    label=label,
                    inside=(member.offset, member.size),
                    texts=texts,
                )


# As for a plain folder.
ADAPTER = Adapter(discover=discover, default_frames=30, recordings=True, reads_addresses=True)
