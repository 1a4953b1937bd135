"""What a dataset's file provides: an :class:`Adapter` named ``ADAPTER``, found by its file name."""

from __future__ import annotations

import errno
import importlib
import math
import os
import pkgutil
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pipelines
from pipelines._config import PrepareConfig
from shards.atomic import csv_text
from shards.errors import InputError
from shards.format import Exclusion, make_keys
from shards.untrusted import decode_json, open_regular, read_regular, real_path

_MOST_NAMED = 5
_MOST_TEXT = 1 << 20  # bytes of the text next to a video


@dataclass(frozen=True)
class CoverageRow:
    """One class of one split."""

    split: str
    label: str  # empty where videos have none
    listed: int
    present: int

    @property
    def missing(self) -> int:
        """Videos that are listed but were not found."""
        return self.listed - self.present


def coverage_rows(listed: Iterable[tuple[str, str, bool]]) -> list[CoverageRow]:
    """Count listed and present videos, given (split, label, present) of every listed video."""
    counts: defaultdict[tuple[str, str], Counter[bool]] = defaultdict(Counter)
    for split, label, present in listed:
        counts[split, label][present] += 1
    return [
        CoverageRow(split, label, count[True] + count[False], count[True])
        for (split, label), count in sorted(counts.items())
    ]


def coverage_lines(name: str, rows: Iterable[CoverageRow]) -> list[str]:
    """Return lines for people: one per split, and one more where videos are missing."""
    splits: defaultdict[str, list[CoverageRow]] = defaultdict(list)
    for row in rows:
        splits[row.split].append(row)
    lines = []
    for split, classes in splits.items():
        listed, present = (sum(getattr(row, part) for row in classes) for part in _PARTS)
        lines.append(f"{name}: {present} of {listed} listed {split} videos found")
        lacking = [row for row in classes if row.missing]
        if not lacking or not any(row.label for row in classes):
            continue
        if all(row.listed == 1 for row in classes):  # sequences: one per label
            names = [row.label for row in lacking]
            more = f" and {len(names) - _MOST_NAMED} more" if names[_MOST_NAMED:] else ""
            lines.append(f"{name}: missing: {', '.join(names[:_MOST_NAMED])}{more}")
            continue
        absent = sum(row.present == 0 for row in lacking)
        worst = sorted(lacking, key=lambda row: (-row.missing, row.label))[:_MOST_NAMED]
        named = ", ".join(f"{row.label or '(no label)'} {row.missing}" for row in worst)
        lines.append(
            f"{name}: of {len(classes)} classes, {len(classes) - len(lacking)} are complete and "
            f"{absent} have no videos; most missing: {named}"
        )
    return lines


_PARTS = ("listed", "present")


def coverage_csv(rows: Iterable[CoverageRow]) -> str:
    """Return ``NAME.coverage.csv``: every class of every split."""
    figures = ((row.split, row.label, row.listed, row.present, row.missing) for row in rows)
    return csv_text([("split", "label", "listed", "present", "missing"), *figures])


VIDEO_SUFFIXES = frozenset(
    (
        *(".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts"),
        *(".mts", ".vob", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".ogm"),
        *(".rm", ".rmvb", ".dv", ".divx", ".mxf"),
    )
)


PICTURE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
PICTURE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
_ANNOTATION_SUFFIXES = frozenset((".txt", ".csv", ".json", ".parquet", ".ini", ".label", ".tsv"))


@dataclass(frozen=True, kw_only=True)
class FrameFolder:
    """The layout of a video that is a folder of pictures.

    A tracking sequence has a box per frame, and frames named by their numbers. Any other folder has
    pictures of any name and format, ordered as people would order them.
    """

    ground_truth: str | None = None  # file in the folder: one box per line
    images: str = ""  # subfolder of the frames
    range: tuple[int, int] | None = None  # first and last annotated frame, from 1; None: all
    flags: bool = False  # whether absence.label, cover.label etc. may exist
    only: str | None = None  # the one picture that is the video; None: all in the folder
    rate: float | None = None  # frames per second, if the user tells


@dataclass(frozen=True, kw_only=True)
class Video:
    """One video to store, or one clip of a recording."""

    source: str  # relative to --src, with forward slashes
    path: Path
    key: str = ""  # set by keyed()
    frames: FrameFolder | None = None  # None: ``path`` is a video file
    label: int | None = None
    label_name: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    group: str | None = None
    span: tuple[float, float] | None = None  # first and last second of the clip; None: all
    metadata: dict[str, str] | None = None
    inside: tuple[int, int] | None = None  # first byte and size in ``path``, a tar; None: all of it
    texts: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # the same of json and txt there
    address: str | None = None  # where fsspec finds what is not at ``path``

    @property
    def shown(self) -> str:
        """The source, for people and tables; of a clip, with its seconds."""
        return self.source if self.span is None else f"{self.source} {span_text(self.span)}"


def span_text(span: tuple[float, float]) -> str:
    """Return a span as ``[12.5 s, 20 s]``."""
    start, end = span
    return f"[{start:g} s, {'end' if end == math.inf else f'{end:g} s'}]"


@dataclass(frozen=True, kw_only=True)
class VideoSet:
    """The videos that become one dataset of shards.

    ``excluded`` are rows of ``NAME.errors.csv`` that are known without decoding: kinds
    ``missing``, ``not-in-annotations``, ``duplicate``; of recordings, also ``timeout`` and
    ``crashed``. ``coverage`` counts the videos of the official lists; ``notes`` are lines for
    people.
    """

    name: str
    videos: Sequence[Video]
    label_names: list[str]
    excluded: list[Exclusion] = field(default_factory=list)
    coverage: list[CoverageRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """Everything found below ``--src``; ``notes`` are lines for people.

    ``root`` is the folder or address that must be there while shards are built; None: ``--src``.
    """

    sets: list[VideoSet]
    notes: list[str] = field(default_factory=list)
    root: Path | str | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A dataset.

    Args:
        discover: finds its videos and annotations.
        default_frames: frames per video if the user gives no number; None for all.
        default_short_edge: px if the user gives none; None leaves frames as they are.
        stored_whole: why frames may be neither thinned out nor shrunk; None where they may.
        recordings: whether videos may be hours long, to be divided into clips.
        reads_addresses: whether ``discover`` takes ``--src`` behind fsspec itself.
    """

    discover: Callable[[PrepareConfig], Discovery]
    default_frames: int | None
    default_short_edge: int | None = 256  # the authors' stored frames
    stored_whole: str | None = None
    recordings: bool = False
    reads_addresses: bool = False


def source_bytes(video: Video) -> int:
    """Return the size of the video's files; -1 if they cannot be read."""
    if video.address is not None and not video.path.is_absolute():
        return -1  # of a remote list: its path is a name, not a place
    try:
        if video.inside is not None:
            return video.inside[1] if video.path.is_file() else -1
        if video.frames is None:
            return video.path.stat().st_size
        if video.frames.only is not None:
            return (video.path / video.frames.only).stat().st_size
        tracking = video.frames.ground_truth is not None
        with os.scandir(video.path / video.frames.images) as entries:
            # File managers put files of their own beside pictures, and change them.
            size = sum(
                entry.stat().st_size
                for entry in entries
                if (is_picture(entry.name) or (tracking and is_annotation(entry.name)))
                and entry.is_file()
            )
        if video.frames.ground_truth is not None:
            size += (video.path / video.frames.ground_truth).stat().st_size
        return size
    except OSError:
        return -1


def tar_metadata(video: Video, read: Callable[[int, int], bytes]) -> dict[str, str] | None:
    """Return what a tar holds next to a video: the plain values of its JSON, and its text.

    Args:
        read: given a first byte and a size, returns these bytes of the tar.
    """
    found: dict[str, str] = {}
    for name, (first, size) in video.texts.items():
        try:
            data = read(first, min(size, _MOST_TEXT))
            if name == "json":
                values = decode_json(dict[str, Any], data, video.shown, "is not JSON")
                plain = {k: v for k, v in values.items() if isinstance(v, (str, int, float))}
                found |= {k: v if isinstance(v, str) else str(v) for k, v in plain.items()}
            else:
                found[name] = data.decode("utf-8", "replace").strip()
        except (InputError, OSError):
            continue  # the video is worth having without it
    return found or None


def read_part(path: Path, first: int, size: int) -> bytes:
    """Return some bytes of a local file."""
    with open_regular(path) as file:
        file.seek(first)
        return file.read(size)


def dataset_names() -> list[str]:
    """Return the names of the datasets: the files of ``pipelines/`` without a leading ``_``."""
    found = (module.name for module in pkgutil.iter_modules(pipelines.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def adapter(name: str) -> Adapter:
    """Return the adapter of dataset ``name``.

    Raises:
        InputError: there is none.
    """
    if name not in dataset_names():
        raise InputError(f"unknown dataset {name!r}", fix=f"one of {', '.join(dataset_names())}")
    found = importlib.import_module(f"pipelines.{name}").ADAPTER
    assert isinstance(found, Adapter)
    return found


def source_folder(config: PrepareConfig) -> Path:
    """Return ``--src`` as an absolute path.

    Raises:
        InputError: it is not a folder.
    """
    src = Path(config.src)
    if not src.is_dir():
        what = "is not a folder" if src.exists() else "there is no such folder"
        raise InputError(what, src, "give the folder of the raw videos with --src")
    return src.absolute()


def walk(root: Path, broken: list[str] | None = None) -> Iterator[tuple[str, Path]]:
    """Yield every regular file below ``root`` in a fixed order: its relative path and path.

    Links to files and folders are followed (datasets are often linked together), cycles are not.
    Hidden files and what macOS leaves in archives (``._name.mp4``, ``__MACOSX``) are left out.

    Args:
        root: a folder.
        broken: the relative paths of links that lead to neither file nor folder are added to it.

    Raises:
        InputError: a folder cannot be read.
    """

    seen: set[tuple[int, int]] = set()
    waiting = [(os.fspath(root), "")]
    while waiting:
        folder, prefix = waiting.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                inside = [entry for entry in entries if not _is_litter(entry.name)]
            inside.sort(key=lambda entry: entry.name)
            # The folder listing knows what is a file: no disk access for each of 240,000.
            files: list[os.DirEntry[str]] = []
            folders: list[os.DirEntry[str]] = []
            for entry in inside:
                if _leads(entry.is_file):
                    files.append(entry)
                elif _leads(entry.is_dir):
                    folders.append(entry)
                elif broken is not None and entry.is_symlink():
                    broken.append(shown_name(prefix + entry.name))
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", error.filename) from error
        for entry in files:
            yield shown_name(prefix + entry.name), Path(entry.path)
        waiting += [(entry.path, f"{prefix}{entry.name}/") for entry in reversed(folders)]


def _leads(to_kind: Callable[[], bool]) -> bool:
    try:
        return to_kind()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def shown_name(source: str) -> str:
    r"""Return a file's name as UTF-8, which JSON and CSV need and a name on Linux may not be.

    Each byte that is not UTF-8 becomes ``\xNN``. A backslash is doubled, so that the name's bytes
    can be told from what is stored.
    """
    whole = source.replace("\\", "\\\\").encode("utf-8", "surrogateescape")
    return whole.decode("utf-8", "backslashreplace")


def relative_source(path: Path, root: Path) -> str:
    """Return ``path`` as a :attr:`Video.source`."""
    return shown_name(path.relative_to(root).as_posix()) if path != root else path.name


def is_video(name: str) -> bool:
    """Whether a file name has the suffix of a video."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def refuse_splits_of_folders(config: PrepareConfig) -> None:
    """Refuse ``--split`` for folders without annotations.

    Raises:
        InputError: the user gave ``--split``.
    """
    if config.split is not None:
        raise InputError(
            "a plain folder has no splits", "--split", "prepare each split's folder separately"
        )


def labelled_by_folder(
    videos: Sequence[Video], config: PrepareConfig, broken: Sequence[str]
) -> Discovery:
    """Return one dataset, named after ``--src`` or ``--name``.

    Labels are the first-level folders if every video is in one.

    Args:
        videos: those found.
        config: settings as given.
        broken: links to videos or pictures that lead to no file.
    """
    labelled = all("/" in video.source for video in videos)
    names = sorted({video.source.split("/", 1)[0] for video in videos}) if labelled else []
    index = {name: number for number, name in enumerate(names)}
    if labelled:
        folders = [video.source.split("/", 1)[0] for video in videos]
        videos = [
            replace(video, label=index[folder], label_name=folder)
            for video, folder in zip(videos, folders, strict=True)
        ]
    note = (
        f"labels: the {len(names)} first-level folders"
        if labelled
        else "no labels: not every video is in a first-level folder"
    )
    name = config.name or slug(real_path(source_folder(config)).name)
    excluded = [
        Exclusion(source=source, kind="missing", message="a link that leads to no file")
        for source in broken
    ]
    found = VideoSet(name=name, videos=keyed(videos), label_names=names, excluded=excluded)
    return Discovery(sets=[found], notes=[note])


def slug(text: str) -> str:
    """Return ``text`` as a dataset name: lower case, words joined by ``-``."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-") or "videos"


def is_picture(name: str) -> bool:
    """Whether a file name has the suffix of a picture and is not hidden."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES and not _is_litter(name)


def is_annotation(name: str) -> bool:
    """Whether a file name has the suffix of something that annotations are written in."""
    return os.path.splitext(name)[1].lower() in _ANNOTATION_SUFFIXES and not _is_litter(name)


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a key that sorts ``frame_9`` before ``frame_10``."""
    parts = re.split(r"([0-9]+)", name)
    numbers = (part.isascii() and part.isdigit() for part in parts)
    pairs = zip(parts, numbers, strict=True)
    return [(int(part), "") if number else (-1, part) for part, number in pairs], name


def find_videos(root: Path, broken: list[str] | None = None) -> list[tuple[str, Path]]:
    """Return the videos below ``root`` as relative path and path, in a fixed order.

    Args:
        root: a folder.
        broken: links to videos that lead to no file are added to it.

    Raises:
        InputError: there are none.
    """
    links: list[str] = []
    found = [(source, path) for source, path in walk(root, links) if is_video(source)]
    links = [source for source in links if is_video(source)]
    if not found:
        expected = f"expected files such as *.mp4 or *.avi below {root.name}/"
        raise InputError(f"holds no videos{but_links(links)}", root, expected)
    if broken is not None:
        broken += links
    return found


def but_links(broken: Sequence[str]) -> str:
    """What to add to the message that nothing was found."""
    return f", but {len(broken)} links that lead to no file, such as {broken[0]}" if broken else ""


def keyed(videos: Sequence[Video]) -> list[Video]:
    """Return the videos with distinct keys, made from ``key`` or ``source``."""
    keys = make_keys(
        [video.key or key_source(video.source, video.span, video.inside) for video in videos]
    )
    if len(set(keys)) < len(keys):
        key, _ = Counter(keys).most_common(1)[0]
        two = [video.shown for video, own in zip(videos, keys, strict=True) if own == key][:2]
        raise InputError(f"{two[0]} and {two[1]} cannot be told apart", fix="rename one of them")
    return [replace(video, key=key) for video, key in zip(videos, keys, strict=True)]


def key_source(
    source: str,
    span: tuple[float, float] | None = None,
    inside: tuple[int, int] | None = None,
) -> str:
    """Return the path from which a video's key is made."""
    if span is None and inside is None:
        return source
    # What follows the dot is seen only where keys would be equal.
    folder, name = os.path.split(source)
    stem, suffix = os.path.splitext(name)
    at = "" if inside is None else f"-{inside[0]}"
    if span is not None:
        start, end = (-1 if s == math.inf else round(s * 1e6) for s in span)
        stem += f"-{start // 1000:09d}-{max(0, end) // 1000:09d}ms"
        at += f"-{start}-{end}"
    return f"{folder}/{stem.replace('.', '_')}.{suffix[1:]}{at}"


def read_text(path: Path) -> str:
    """Return the text of an annotation file, without the byte-order mark that spreadsheets add.

    Raises:
        InputError: it cannot be read as text.
    """
    try:
        return read_regular(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("is not a text file", path) from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of an annotation file, stripped, without empty ones.

    Raises:
        InputError: it cannot be read as text.
    """
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def find_annotation_folder(
    config: PrepareConfig, holds: Callable[[Path], bool], expected: str
) -> Path:
    """Return the folder of annotations: ``--annotations``, or the nearest in or next to ``--src``.

    Args:
        holds: recognizes the folder.
        expected: its usual name, for the message.

    Raises:
        InputError: there is none.
    """
    src = source_folder(config)
    if config.annotations is not None:
        given = Path(config.annotations)
        if not given.exists():
            raise InputError("there is no such file or folder", given, "see --annotations")
        candidates = [given, *subfolders(given)] if given.is_dir() else [given.parent]
        where: Path = given
    else:
        candidates = [src, *subfolders(src)]
        candidates += [deeper for folder in subfolders(src) for deeper in subfolders(folder)]
        beside = src.absolute().parent
        candidates += [beside, *subfolders(beside)]
        where = src
    for folder in candidates:
        if holds(folder):
            return folder
    raise InputError(
        f"no {expected} was found",
        where,
        "give its folder with --annotations, or prepare the videos without splits as "
        "dataset 'folder'",
    )


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in ``folder``, sorted; empty if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            found = (entry for entry in entries if not _is_litter(entry.name) and entry.is_dir())
            return sorted(Path(entry.path) for entry in found)
    except OSError:
        return []


SPLITS = ("train", "val", "test")
_SPELLINGS = {"validate": "val", "validation": "val", "training": "train", "testing": "test"}


def split_named(text: str) -> str:
    """Return ``train``, ``val`` or ``test`` for any spelling of them; other names in lower case."""
    return _SPELLINGS.get(text.lower(), text.lower())


def official_splits(config: PrepareConfig, found: set[str]) -> list[str]:
    """Return the splits to prepare: those of ``--split``, or all found.

    Raises:
        InputError: a split of ``--split`` was not found.
    """
    if config.split is None:
        return [split for split in SPLITS if split in found]
    wanted = [split_named(word.strip()) for word in config.split.split(",") if word.strip()]
    unknown = [word for word in wanted if word not in found]
    if unknown or not wanted:
        have = ", ".join(split for split in SPLITS if split in found)
        what = f"unknown split {unknown[0]!r}" if unknown else "names no split"
        raise InputError(what, "--split", f"the annotations have {have}")
    return [split for split in SPLITS if split in wanted]


def missing_rows(sources: Iterable[str]) -> list[Exclusion]:
    """Return rows for videos that are listed in the annotations but not on disk."""
    return [
        Exclusion(source=source, kind="missing", message="listed in the annotations, not found")
        for source in sorted(sources)
    ]


def refuse_split(config: PrepareConfig) -> None:
    """Refuse ``--split`` for datasets whose official splits overlap: each record has all of them.

    Raises:
        InputError: the user gave ``--split``.
    """
    if config.split is not None:
        raise InputError(
            f"{config.dataset} has no --split to prepare: each video is stored once, with its "
            "part in every official split",
            "--split",
            "leave it out; choose the split when evaluating",
        )
