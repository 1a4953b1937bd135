"""``seco bench prepare``: what preparing costs, beside its limit and the plain ways."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import prepare_reference as reference
from benchmarks.measuring import cpu_milliseconds, in_turns, machine
from benchmarks.prepare_runs import planning_cost, scaling_rates
from pipelines._adapter import Video, is_video
from pipelines._build import build_shard
from pipelines._ffmpeg import ffmpeg_binary, ffmpeg_version
from pipelines._plan import FrameChoice, ShardPlan
from shards.errors import InputError
from shards.opening import open_shards
from shards.progress import progress

ALL, THIRTY = FrameChoice(), FrameChoice(count=30)
_SHORT_EDGE, _QUALITY = 256, 90
_SHORT_SECONDS = 2.0
_MOST_SHORT = 40


@dataclass(frozen=True)
class ClipCost:
    """Median CPU milliseconds of one clip."""

    clip: str
    frames: int
    ours: float
    limit: float
    jpeg_files: float  # (a)
    encoded_again: float  # (b)
    ours_thirty: float
    limit_thirty: float
    bytes_a_frame: float  # ours
    bytes_a_frame_jpeg_files: float


@dataclass
class Bench:
    """All figures of a run."""

    machine: dict[str, Any]
    repeats: int
    clips: list[ClipCost] = field(default_factory=list)
    short: dict[str, float] = field(default_factory=dict)
    scaling: dict[str, float] = field(default_factory=dict)
    planning: dict[str, float] = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        """Medians over the clips; above 1 is cheaper than what is compared with."""

        def median(of: Callable[[ClipCost], float]) -> float:
            return round(statistics.median(map(of, self.clips)), 3)

        return {
            "all frames, of the limit": median(lambda c: c.limit / c.ours),
            "all frames, times (a)": median(lambda c: c.jpeg_files / c.ours),
            "all frames, times (b)": median(lambda c: c.encoded_again / c.ours),
            "30 frames, of the limit": median(lambda c: c.limit_thirty / c.ours_thirty),
        }

    def to_json(self) -> str:
        """One object."""
        content = asdict(self) | {"ratios": self.ratios() if self.clips else {}}
        return json.dumps(content, indent=1)


def bench_prepare(
    sources: list[str], repeats: int, *, scaling: bool = True, planning: bool = True
) -> Bench:
    """Measure on the videos of ``sources`` (files and folders).

    Those of two seconds and less are measured as short clips, the others against the limit.

    Raises:
        InputError: they hold no video that decodes.
    """
    binary = ffmpeg_binary()
    found = {"ffmpeg": ffmpeg_version(binary), **machine("numpy", "simplejpeg")}
    bench = Bench(machine=found, repeats=repeats)
    with tempfile.TemporaryDirectory(prefix="seco-bench-") as scratch:
        folder = Path(scratch)
        long, short = _by_length(_videos(sources), binary)
        steps = len(long) * repeats + bool(short) + scaling + planning
        with progress("bench prepare", steps, "steps") as bar:
            for path in long:
                bench.clips.append(_clip_cost(path, binary, folder, repeats, bar.advance))
            if short:
                bench.short = _short_cost(short[:_MOST_SHORT], binary, folder, repeats)
                bar.advance()
            if scaling:
                bench.scaling = scaling_rates(long or short, folder)
                bar.advance()
            if planning:
                bench.planning = planning_cost(folder)
                bar.advance()
    return bench


def _videos(sources: list[str]) -> list[Path]:
    found: list[Path] = []
    for source in map(Path, sources):
        if not source.exists():
            raise InputError("there is no such file or folder", source, "see --src")
        inside = sorted(path for path in source.rglob("*") if is_video(path.name))
        found += inside if source.is_dir() else [source]
    if not found:
        raise InputError("holds no videos", " ".join(sources), "see --src")
    return found


def _by_length(paths: list[Path], binary: str) -> tuple[list[Path], list[Path]]:
    long: list[Path] = []
    short: list[Path] = []
    for path in paths:
        if len(short) == _MOST_SHORT and len(paths) > 2 * _MOST_SHORT:
            break
        with tempfile.TemporaryDirectory(prefix="seco-bench-") as folder:
            result = build_shard(_plan([path], Path(folder), FrameChoice(count=2), binary))
            if not result.info.videos:
                continue
            times = open_shards(str(Path(folder, "bench-000.tar"))).record(0).frame_times
        (short if times[-1] - times[0] <= _SHORT_SECONDS else long).append(path)
    if not long and not short:
        raise InputError("none of the videos decodes", paths[0], "see --src")
    return long, short


def _plan(paths: list[Path], folder: Path, choice: FrameChoice, binary: str) -> ShardPlan:
    videos = [
        Video(source=path.name, path=path.absolute(), key=f"v{number:06d}")
        for number, path in enumerate(paths)
    ]
    return ShardPlan(
        folder=str(folder),
        name="bench-000",
        digest="",
        dataset="folder",
        videos=tuple(videos),
        choice=choice,
        short_edge=_SHORT_EDGE,
        quality=_QUALITY,
        min_frames=1,
        keep_damaged=True,
        timeout_seconds=600,
        src=str(folder),
        binary=binary,
        ffmpeg_version=ffmpeg_version(binary),
    )


def _clip_cost(
    path: Path, binary: str, folder: Path, repeats: int, advance: Callable[[], None]
) -> ClipCost:
    planes = reference.stored_planes(path, _SHORT_EDGE, ALL, binary)
    thirty = reference.stored_planes(path, _SHORT_EDGE, THIRTY, binary)
    sizes: dict[str, int] = {}

    def ours(choice: FrameChoice) -> None:
        sizes["ours"] = build_shard(_plan([path], folder, choice, binary)).info.bytes

    def plain(way: Callable[[Path, int, str, Path], Path]) -> None:
        sizes[way.__name__] = way(path, _SHORT_EDGE, binary, folder).stat().st_size

    ways: dict[str, Callable[[], object]] = {
        "ours_thirty": lambda: ours(THIRTY),
        "ours": lambda: ours(ALL),
        "null": lambda: reference.decode_to_null(path, _SHORT_EDGE, binary),
        "encode": lambda: reference.encode_all(planes, _QUALITY),
        "encode_thirty": lambda: reference.encode_all(thirty, _QUALITY),
        "jpeg_files": lambda: plain(reference.jpeg_files_in_tar),
        "encoded_again": lambda: plain(reference.encode_again_first),
    }
    median = in_turns(ways, repeats, after_each=advance)
    ours(ALL)
    return ClipCost(
        clip=path.name,
        frames=len(planes),
        ours=round(median["ours"], 2),
        limit=round(median["null"] + median["encode"], 2),
        jpeg_files=round(median["jpeg_files"], 2),
        encoded_again=round(median["encoded_again"], 2),
        ours_thirty=round(median["ours_thirty"], 2),
        limit_thirty=round(median["null"] + median["encode_thirty"], 2),
        bytes_a_frame=round(sizes["ours"] / len(planes)),
        bytes_a_frame_jpeg_files=round(sizes["jpeg_files_in_tar"] / len(planes)),
    )


def _short_cost(paths: list[Path], binary: str, folder: Path, repeats: int) -> dict[str, float]:
    ours: list[float] = []
    null: list[float] = []
    encode: list[float] = []
    start: list[float] = []
    for path in paths:
        planes = reference.stored_planes(path, _SHORT_EDGE, ALL, binary)
        plan = _plan([path], folder, ALL, binary)
        rounds = [
            (
                cpu_milliseconds(lambda plan=plan: build_shard(plan)),  # type: ignore[misc]
                cpu_milliseconds(lambda p=path: reference.decode_to_null(p, _SHORT_EDGE, binary)),  # type: ignore[misc]
                cpu_milliseconds(lambda p=planes: reference.encode_all(p, _QUALITY)),  # type: ignore[misc]
                cpu_milliseconds(lambda: reference.start_ffmpeg(binary)),
            )
            for _ in range(repeats)
        ]
        for values, column in zip(
            (ours, null, encode, start), zip(*rounds, strict=True), strict=True
        ):
            values.append(statistics.median(column))
    whole, nothing, pictures, begin = map(statistics.median, (ours, null, encode, start))
    # What is left of our cost when the work on the pictures, which ffmpeg does in the null run
    # beyond its start, and the encoding are taken away.
    return {
        "clips": len(paths),
        "cpu_ms_a_video": round(whole, 2),
        "of_the_limit": round((nothing + pictures) / whole, 3),
        "fixed_cpu_ms_a_video": round(whole - (nothing - begin) - pictures, 2),
        "ffmpeg_start_cpu_ms": round(begin, 2),
    }
