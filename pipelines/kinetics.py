"""Kinetics-400/600/700: videos named by id and seconds, splits from the annotation CSVs.

The layouts people have: ``train/*.mp4`` (CVDF, with ``replacement/…/*.mp4`` for corrupted files),
``train/<label>/*.mp4``, ``videos_train/<label>/*.mp4``. Only file names count: folders spell
labels in many ways.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from pipelines._adapter import (
    SPLITS,
    Adapter,
    Discovery,
    Video,
    VideoSet,
    coverage_rows,
    is_video,
    keyed,
    missing_rows,
    official_splits,
    read_text,
    source_folder,
    split_named,
    walk,
)
from pipelines._config import PrepareConfig
from shards.errors import InputError
from shards.format import Exclusion

_FILE = re.compile(r"(?:.*[_-])?(train|validate|validation|val|test)\.csv", re.I)
_CLIP = re.compile(r"(.+)_(\d{6})_(\d{6})")


class Clip(NamedTuple):
    """A row: seconds ``start`` to ``end`` of a YouTube video."""

    youtube_id: str
    start: int | None
    end: int | None
    label: str | None

    @property
    def file_stem(self) -> str:
        """The usual name of its file, without the suffix."""
        if self.start is None or self.end is None:
            return self.youtube_id
        return f"{self.youtube_id}_{self.start:06d}_{self.end:06d}"


@dataclass(frozen=True)
class Annotations:
    """The rows of each split found; ``notes`` are lines for people."""

    clips: dict[str, list[Clip]]
    notes: list[str]


def clip_of_file(stem: str) -> tuple[str, int | None, int | None]:
    """Parse ``<id>_%06d_%06d`` or ``<id>``; ids may contain ``_`` and begin with ``-``."""
    if found := _CLIP.fullmatch(stem):
        return found[1], int(found[2]), int(found[3])
    return stem, None, None


def find_annotations(config: PrepareConfig, files: list[tuple[str, Path]]) -> Annotations:
    """Return the rows of ``--annotations``, or of the CSVs among ``files``, by split.

    If there are several files for a split, the one nearest to the top is read.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    if config.annotations is not None:
        given = Path(config.annotations)
        if given.is_file():
            return Annotations(_by_split([given]), [])
        if not given.is_dir():
            raise InputError("there is no such file or folder", given, "see --annotations")
        files = list(walk(given))
    candidates = sorted(
        ((source, path) for source, path in files if _FILE.fullmatch(path.name)),
        key=lambda pair: (pair[0].count("/"), pair[0]),
    )
    chosen: dict[str, tuple[str, Path]] = {}
    notes = []
    for source, path in candidates:
        split = split_of_file(path)
        assert split is not None
        if split in chosen:
            notes.append(f"{source} is ignored: {chosen[split][0]} comes first")
        else:
            chosen[split] = (source, path)
    if not chosen:
        raise InputError(
            "no train.csv, val.csv or test.csv was found",
            config.annotations or config.src,
            "give the file or its folder with --annotations, or prepare the videos without "
            "labels as dataset 'folder'",
        )
    return Annotations(_by_split([path for _, path in chosen.values()]), notes)


def split_of_file(path: Path) -> str | None:
    """Return the split in a file's name, or None."""
    found = _FILE.fullmatch(path.name)
    return split_named(found[1]) if found else None


def _by_split(paths: list[Path]) -> dict[str, list[Clip]]:
    clips: dict[str, dict[Clip, None]] = {}
    for path in paths:
        for split, clip in _read(path):
            clips.setdefault(split, {})[clip] = None
    return {split: list(rows) for split, rows in clips.items()}


def _read(path: Path) -> list[tuple[str, Clip]]:
    """Return (split, clip) of every row; columns are found by the header, because files differ."""
    text = io.StringIO(read_text(path), newline="")
    rows = csv.DictReader(text, skipinitialspace=True, strict=True)
    try:
        return _clips(rows, path)
    except csv.Error as error:  # for example, a stray quote that swallows the rest
        raise InputError(f"line {rows.line_num + 1} is not CSV ({error})", path) from error


def _clips(rows: csv.DictReader[str], path: Path) -> list[tuple[str, Clip]]:
    header = [name.strip() for name in rows.fieldnames or ()]
    if "youtube_id" not in header:
        raise InputError(
            "has no column youtube_id",
            path,
            "the first line should be label,youtube_id,time_start,time_end,split",
        )
    rows.fieldnames = header
    of_file = split_of_file(path)
    found = []
    for row in rows:
        youtube_id = (row["youtube_id"] or "").strip()
        split = of_file or split_named((row.get("split") or "").strip())
        if split not in SPLITS or not youtube_id:
            raise InputError(
                f"line {rows.line_num} has no {'id' if not youtube_id else 'known split'}",
                path,
                "name the file train.csv, val.csv or test.csv, or fill its columns",
            )
        start, end = (_seconds(row.get(name)) for name in ("time_start", "time_end"))
        label = (row.get("label") or "").strip() or None
        found.append((split, Clip(youtube_id, start, end, label)))
    return found


def _seconds(text: str | None) -> int | None:
    try:
        return int(float(text)) if text and text.strip() else None
    except (ValueError, OverflowError):
        return None


_VERSIONS = {400: "k400", 600: "k600", 700: "k700"}


def discover(config: PrepareConfig) -> Discovery:
    """Find one dataset per split: ``k400``, ``k400-val``, ``k400-test``, or ``kinetics``, ….

    ``kinetics`` is used for other numbers of labels. Labels are numbered by the sorted names in all
    annotation files found.

    Raises:
        InputError: no videos, no annotations, or an unknown split.
    """
    src = source_folder(config)
    files = list(walk(src))
    annotations = find_annotations(config, files)
    wanted = official_splits(config, set(annotations.clips))
    label_names = sorted(
        {clip.label for clips in annotations.clips.values() for clip in clips if clip.label}
    )
    index = {name: number for number, name in enumerate(label_names)}
    base = config.name or _VERSIONS.get(len(label_names), "kinetics")

    matches = _Matches(annotations.clips)
    for source, path in files:
        if is_video(source):
            matches.add(Video(source=source, path=path))
    if not matches.seen:
        raise InputError("holds no videos", src, f"expected *.mp4 files below {src.name}/")

    sets = []
    notes = list(annotations.notes)
    for split in wanted:
        clips = annotations.clips[split]
        found = matches.videos[split]
        if not found:
            notes.append(f"{split}: none of the {len(clips)} listed videos found; left out")
            continue
        videos = [
            replace(
                video,
                label=index[clip.label] if clip.label else None,
                label_name=clip.label,
                splits={"official": split},
            )
            for clip, video in sorted(found.items(), key=lambda pair: pair[1].source)
        ]
        name = base if split == "train" else f"{base}-{split}"
        absent = [clip for clip in clips if clip not in found]
        sets.append(
            VideoSet(
                name=name,
                videos=keyed(videos),
                label_names=label_names,
                excluded=missing_rows(clip.file_stem for clip in absent) + matches.doubles[split],
                coverage=coverage_rows((split, clip.label or "", clip in found) for clip in clips),
            )
        )
    if not sets:
        raise InputError(
            "none of the videos is in the annotations",
            src,
            "files are named <youtube id>_<start>_<end>.mp4; see --annotations",
        )
    # Files in no annotation belong to no split; they are reported once.
    sets[0] = replace(sets[0], excluded=sets[0].excluded + matches.unknown)
    return Discovery(sets=sets, notes=notes)


@dataclass
class _Matches:
    """Assigns files to annotated clips."""

    clips: dict[str, list[Clip]]
    videos: dict[str, dict[Clip, Video]] = field(default_factory=lambda: defaultdict(dict))
    doubles: dict[str, list[Exclusion]] = field(default_factory=lambda: defaultdict(list))
    unknown: list[Exclusion] = field(default_factory=list)
    seen: int = 0

    def __post_init__(self) -> None:
        self._by_id: dict[str, list[tuple[str, Clip]]] = defaultdict(list)
        for split, clips in self.clips.items():
            for clip in clips:
                self._by_id[clip.youtube_id].append((split, clip))

    def add(self, video: Video) -> None:
        self.seen += 1
        found = self._find(video.source)
        if found is None:
            message = "its id is in no annotation file"
            self.unknown.append(
                Exclusion(source=video.source, kind="not-in-annotations", message=message)
            )
            return
        split, clip = found
        present = self.videos[split].get(clip)
        if present is None:
            self.videos[split][clip] = video
            return
        better = _rank(video, clip) > _rank(present, clip)
        kept, other = (video, present) if better else (present, video)
        self.videos[split][clip] = kept
        message = f"the same clip as {kept.source}"
        self.doubles[split].append(
            Exclusion(source=other.source, kind="duplicate", message=message)
        )

    def _find(self, source: str) -> tuple[str, Clip] | None:
        youtube_id, start, end = clip_of_file(posixpath.splitext(posixpath.basename(source))[0])
        rows = self._by_id.get(youtube_id, [])
        exact = [row for row in rows if (row[1].start, row[1].end) == (start, end)]
        # A video trimmed by others may have other seconds, or none, in its name.
        rows = exact or rows
        if len(rows) > 1:
            here = source.lower()
            rows = [row for row in rows if row[0] in here] or rows
        return rows[0] if rows else None


def _rank(video: Video, clip: Clip) -> tuple[bool, bool]:
    """Rank the files of one clip; the highest is stored.

    CVDF's replacements rank above the corrupted files of the same name; a file with the clip's own
    seconds ranks above one of the same video with others.
    """
    *folders, name = video.source.split("/")
    replacement = any(folder.startswith("replacement") for folder in folders)
    return replacement, posixpath.splitext(name)[0] == clip.file_stem


# As in the authors' stored frames: 30 per video, for pre-training and for features.
ADAPTER = Adapter(discover=discover, default_frames=30)
