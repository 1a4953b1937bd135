"""Recordings: divided into clips, which are decoded in one pass and cross no scene cut."""

from __future__ import annotations

import json
import random
import re
import subprocess
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import _clips
from pipelines._adapter import Video
from pipelines._clips import CutDetector, clip_spans, duration_of, packets_of
from pipelines._decode import decoding
from pipelines._ffmpeg import ffmpeg_binary, local_url, run_ffmpeg
from pipelines._plan import FrameChoice
from shards.errors import InputError, TooManyExcluded
from shards.opening import open_shards
from tests import commands
from tests.data import shared
from tests.pipelines.made_videos import draw_video
from tests.pipelines.running import (
    driver,
    errors,
    hashes,
    processes_of,
    programs_naming,
    run,
    wait_until,
)
from tests.pipelines.test_faults import require_done, started

# Real clips of one shot each, by how many seconds are taken, at 25 frames a second.
SHOTS = {
    "arm_wrestling_demo.mp4": 5,
    "jesse_dance.mp4": 7,
    "making_cake.mp4": 4,
    "mmaction2_test.mp4": 6,
    "playing_guitar.mp4": 3,
    "yoga.mp4": 5,
    "hitting_baseball.mp4": 6,
}
CUTS = [float(sum(list(SHOTS.values())[:n])) for n in range(1, len(SHOTS))]
LENGTH = float(sum(SHOTS.values()))
SETTINGS: dict[str, Any] = {"clip_seconds": 4, "frames": 6, "short_edge": 90}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of seven known shots, with a key frame every two seconds."""
    folder = tmp_path_factory.mktemp("recordings")
    fitted = "scale=320:180:force_original_aspect_ratio=decrease,pad=320:180:(ow-iw)/2:(oh-ih)/2"
    inputs, graph = [], ""
    for number, (name, seconds) in enumerate(SHOTS.items()):
        inputs += ["-t", str(seconds), "-i", local_url(shared(f"clips/{name}"))]
        padded = f"tpad=stop=-1:stop_mode=clone,trim=duration={seconds}"
        graph += f"[{number}:v:0]{fitted},setsar=1,fps=25,{padded}[v{number}];"
    graph += "".join(f"[v{n}]" for n in range(len(SHOTS))) + f"concat=n={len(SHOTS)}[out]"
    encoded = ("-c:v", "libx264", "-preset", "ultrafast", "-g", "50", "-threads", "1")
    path = folder / "raw" / "recording.mp4"
    path.parent.mkdir()
    run_ffmpeg([*inputs, "-filter_complex", graph, "-map", "[out]", *encoded, local_url(path)])
    return path.parent


@pytest.fixture(scope="module")
def divided(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("divided")
    run(raw, out, cut_scenes=True, videos_per_shard=3, **SETTINGS)
    return out


def records(out: Path) -> list[Any]:
    shards = open_shards(str(out))
    return sorted(
        (shards.record(video) for video in range(len(shards))),
        key=lambda record: record.start,
    )


def luma(path: Path) -> tuple[list[float], list[Any]]:
    times, pictures = [], []
    with decoding(path, short_edge=90, timeout_seconds=60, binary=ffmpeg_binary()) as decoded:
        for frame in decoded:
            times.append(frame.time)
            size = decoded.width * decoded.height
            pictures.append(frame.planes[:size].copy())
    return times, pictures


def test_known_cuts_are_found(raw: Path) -> None:
    times, pictures = luma(raw / "recording.mp4")
    detector = CutDetector()
    found = [time for time, one in zip(times, pictures, strict=True) if detector.is_cut(one)]
    near = [cut for cut in CUTS if any(abs(cut - time) <= 2 / 25 for time in found)]
    assert len(near) >= 0.95 * len(CUTS)
    assert len(found) <= len(CUTS) + 1  # and hardly any others


def test_cuts_are_those_of_ffmpegs_scdet(raw: Path) -> None:
    path = raw / "recording.mp4"
    _, pictures = luma(path)
    detector = CutDetector()
    ours = [n for n, picture in enumerate(pictures) if detector.is_cut(picture)]
    graph = "scale=w=160:h=90:flags=bicubic+accurate_rnd+bitexact,format=yuv420p,scdet=t=10"
    said = subprocess.run(
        [ffmpeg_binary(), "-i", local_url(path), "-vf", graph, "-f", "null", "-"],
        capture_output=True,
    ).stderr.decode()
    theirs = [round(float(time) * 25) for time in re.findall(r"lavfi.scd.time: ([\d.]+)", said)]
    assert ours == theirs
    assert len(ours) > 3


def test_no_clip_crosses_a_cut(raw: Path, divided: Path) -> None:
    times, pictures = luma(raw / "recording.mp4")
    detector = CutDetector()
    found = [time for time, one in zip(times, pictures, strict=True) if detector.is_cut(one)]
    stored = records(divided)
    assert len(stored) == len(clip_spans(0.0, LENGTH, 4, 4)) == 9
    for record in stored:
        end = record.start + record.duration
        assert not [cut for cut in found if record.start < cut <= end], record
        assert record.group == "recording.mp4" and record.source == "recording.mp4"
        assert record.frame_times[0] == 0.0 and record.frame_times[-1] == record.duration
        assert len(record.frame_times) == 6


def test_frames_are_those_of_the_moment(raw: Path, divided: Path) -> None:
    """Whatever was sought: a clip's pictures lie at its times in the recording."""
    import simplejpeg

    times, pictures = luma(raw / "recording.mp4")
    shards = open_shards(str(divided))
    for video in range(len(shards)):
        record = shards.record(video)
        assert record.start is not None
        for number, time_ in enumerate(record.frame_times):
            jpeg = shards.read_frame(video, number)
            grey = simplejpeg.decode_jpeg(jpeg, "GRAY")[:, :, 0].astype(float)
            at = [np.abs(p.reshape(grey.shape).astype(float) - grey).mean() for p in pictures]
            exact = times.index(pytest.approx(record.start + time_, abs=1e-4))
            assert at[exact] <= min(at) + 1.0, (record.key, number)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    raw: Path, divided: Path, tmp_path: Path, workers: int
) -> None:
    run(raw, tmp_path, cut_scenes=True, videos_per_shard=3, workers=workers, **SETTINGS)
    assert hashes(tmp_path) == hashes(divided)


def test_pieces_do_not_change_the_bytes(
    raw: Path, divided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines._build.pieces", lambda videos: [(video,) for video in videos])
    run(raw, tmp_path, cut_scenes=True, videos_per_shard=3, **SETTINGS)
    assert hashes(tmp_path) == hashes(divided)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_at_random_moments(raw: Path, divided: Path, tmp_path: Path, kills: int) -> None:
    settings = {**SETTINGS, "cut_scenes": True, "videos_per_shard": 3}
    began = time.monotonic()
    require_done(driver(raw, tmp_path / "timed", 2, **settings))
    duration = time.monotonic() - began
    moments = random.Random(5)
    for number in range(kills):
        out = tmp_path / str(number)
        process = started(driver(raw, out, 2, **settings))
        time.sleep((0.2 + 0.8 * moments.random()) * duration)  # any moment will do
        process.kill()
        process.communicate()
        wait_until(lambda pid=process.pid: not processes_of(pid), 30)  # type: ignore[misc]
        wait_until(lambda: not programs_naming(raw), 30)
        require_done(driver(raw, out, 2, **settings))
        assert hashes(out) == hashes(divided), f"after kill {number}"


def test_damage_excludes_only_its_clips_and_can_be_repaired(raw: Path, tmp_path: Path) -> None:
    here = tmp_path / "raw" / "recording.mp4"
    here.parent.mkdir()
    whole = (raw / "recording.mp4").read_bytes()
    damaged = bytearray(whole)
    middle = len(damaged) // 2
    damaged[middle : middle + 3000] = bytes(3000)
    here.write_bytes(damaged)
    out = tmp_path / "out"
    run(here.parent, out, max_failures=60, **SETTINGS)
    left_out = errors(out / "raw.errors.csv")
    assert 1 <= len(left_out) <= 3
    assert all(source.startswith("recording.mp4 [") for source, _ in left_out)
    here.write_bytes(whole)
    run(here.parent, out, retry_failed=True, **SETTINGS)
    run(raw, tmp_path / "anew", **SETTINGS)
    assert hashes(out) == hashes(tmp_path / "anew")


def live(whole: Path, path: Path) -> Path:
    """The same video without a length in its header, as recordings of live streams are."""
    piped = subprocess.run(
        [
            *(ffmpeg_binary(), "-v", "error", "-i", str(whole)),
            *("-c", "copy", "-f", "matroska", "-live", "1", "pipe:1"),
        ],
        capture_output=True,
        check=True,
    ).stdout
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(piped)
    return path


def test_lengths_that_the_header_does_not_have(tmp_path: Path) -> None:
    whole = draw_video(tmp_path / "whole.mkv", frames=100)
    binary = ffmpeg_binary()
    assert duration_of(whole, binary) == pytest.approx(4.0, abs=0.05)
    assert duration_of(live(whole, tmp_path / "live.mkv"), binary) == pytest.approx(4.0, abs=0.05)


def ffmpeg_that(does: str, word: str, folder: Path) -> str:
    """An ffmpeg that does something else where ``word`` is among its options."""
    path = folder / "other-ffmpeg"
    real = ffmpeg_binary()
    path.write_text(
        f'#!/bin/bash\nreal={real}\nif [[ "$*" == *{word}* ]]; then {does}; fi\nexec "$real" "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


PROGRESS, PACKETS = "-progress", "framecrc"  # how lengths and packets are read
DIES = "kill -9 $$"


def test_a_reading_that_is_killed_does_not_tell_the_length(tmp_path: Path) -> None:
    here = tmp_path / "raw"
    live(draw_video(tmp_path / "whole.mkv", frames=300), here / "live.mkv")
    dies = ffmpeg_that(f'"$real" "$@" | head -n 12; {DIES}', PROGRESS, tmp_path)
    with pytest.raises(InputError, match=r"divided into clips, for example live.mkv: crashed, len"):
        run(here, tmp_path / "none", ffmpeg=dies, **SETTINGS)
    draw_video(here / "other.mp4", frames=300)
    with pytest.raises(TooManyExcluded, match="1 of 2 recordings"):
        run(here, tmp_path / "some", ffmpeg=dies, **SETTINGS)
    assert errors(tmp_path / "some/raw.errors.csv") == [("live.mkv", "crashed")]
    once = f"if mkdir {tmp_path}/died 2>/dev/null; then {DIES}; fi"
    run(here, tmp_path / "once", ffmpeg=ffmpeg_that(once, PROGRESS, tmp_path), **SETTINGS)
    assert (tmp_path / "died").is_dir()
    assert len(records(tmp_path / "once")) == 6


@pytest.fixture
def far_apart(tmp_path: Path) -> Path:
    """Rows of a recording whose key frames are 40 s apart, which is found out by its packets."""
    options = ["-c:v", "libx264", "-g", "100000", "-force_key_frames", "0,40"]
    draw_video(tmp_path / "rows/0.ts", frames=500, size="32x32", rate=10, options=options)
    (tmp_path / "rows/rows.csv").write_text("path,start,end\n0.ts,39,39.8\n")
    return tmp_path / "rows/rows.csv"


def test_a_reading_that_is_killed_does_not_tell_the_end(far_apart: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dataset": "list", "frames": 3}
    run(far_apart, tmp_path / "whole", **settings)
    assert [record.start for record in records(tmp_path / "whole")] == [39.0]
    some = f'"$real" "$@" | head -n 60; {DIES}'
    with pytest.raises(InputError, match="crashed, ffmpeg was killed by signal 9"):
        run(far_apart, tmp_path / "out", ffmpeg=ffmpeg_that(some, PACKETS, tmp_path), **settings)
    once = f"if mkdir {tmp_path}/died 2>/dev/null; then {some}; fi"
    run(far_apart, tmp_path / "once", ffmpeg=ffmpeg_that(once, PACKETS, tmp_path), **settings)
    assert (tmp_path / "died").is_dir()
    assert hashes(tmp_path / "once") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("word", [PROGRESS, PACKETS])
def test_a_stop_while_reading_loses_nothing(word: str, far_apart: Path, tmp_path: Path) -> None:
    src, settings = far_apart, dict[str, Any](dataset="list", frames=3)
    if word == PROGRESS:
        src, settings = tmp_path / "raw", {**SETTINGS}
        live(draw_video(tmp_path / "whole.mkv", frames=300), src / "live.mkv")
    run(src, tmp_path / "whole", **settings)
    waits = f'"$real" "$@" | head -n 60; mkdir {tmp_path}/waits; sleep 600'
    other = ffmpeg_that(waits, word, tmp_path)
    process = started(driver(src, tmp_path / "out", 1, **settings, ffmpeg=other))
    wait_until((tmp_path / "waits").is_dir, seconds=600)
    process.terminate()
    told, said = process.communicate(timeout=600)
    assert told.startswith("Stopped stopped: "), said
    run(src, tmp_path / "out", **settings)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_reading_that_takes_too_long_is_replaced_by_decoding(
    far_apart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"dataset": "list", "frames": 3}
    run(far_apart, tmp_path / "whole", **settings)
    monkeypatch.setattr(_clips, "_READING_SECONDS", 0.0)
    made = _clips.packets_of
    monkeypatch.setattr(_clips, "packets_of", lambda video, binary, _: made(video, binary, 0.05))
    waits = ffmpeg_that("sleep 600", PACKETS, tmp_path)
    run(far_apart, tmp_path / "out", ffmpeg=waits, **settings)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_damage_before_a_clip_is_not_its_own(tmp_path: Path) -> None:
    """Of key frames alone: a clip that begins between two needs no more than the second."""
    path = tmp_path / "raw" / "0.mp4"
    options = ("-c:v", "libx264", "-g", "30", "-bf", "0", "-sc_threshold", "0")
    draw_video(path, frames=2000, size="64x64", rate=10, options=options)
    settings: dict[str, Any] = {"clip_seconds": 10, "frames": None, "keyframes": True}
    settings |= {"min_frames": 1, "max_failures": 90}
    run(path.parent, tmp_path / "whole", **settings)
    told = run_ffmpeg(["-i", local_url(path), "-c", "copy", "-f", "framecrc", "pipe:1"]).decode()
    sizes = [int(line.split(",")[4]) for line in told.splitlines() if line[0] != "#"]
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4 + sum(sizes[:990])  # the key frame at 99 s
    data[at + 8 : at + sizes[990]] = bytes(sizes[990] - 8)
    path.write_bytes(data)
    run(path.parent, tmp_path / "out", **settings)
    left_out = {record.start for record in records(tmp_path / "whole")}
    left_out -= {record.start for record in records(tmp_path / "out")}
    assert left_out and all(90 <= start < 110 for start in left_out)


@pytest.mark.parametrize("keep_damaged", [False, True])
def test_what_does_not_decode_costs_little(
    tmp_path: Path, begins: list[float], keep_damaged: bool
) -> None:
    """An interrupted download into a file of the right size: the rest of it is zeros."""
    path = tmp_path / "raw" / "0.mp4"
    options = ("-c:v", "mpeg4", "-g", "50", "-movflags", "+faststart")
    draw_video(path, frames=6000, size="32x32", rate=10, options=options)
    data = bytearray(path.read_bytes())
    part = len(data) * 2 // 5
    data[part:] = bytes(len(data) - part)
    path.write_bytes(data)
    settings = {"clip_seconds": 30, "frames": 3, "max_failures": 90}
    run(path.parent, tmp_path / "out", keep_damaged=keep_damaged, **settings)
    # The first piece and its first clip begin there anyway; of the second, one pass does.
    assert begins.count(0.0) <= 3
    assert len(records(tmp_path / "out")) >= 3


def test_a_clock_that_begins_anew(tmp_path: Path) -> None:
    """Two parts of a broadcast in one file: what has no second of its own goes into no clip."""
    path = tmp_path / "raw" / "0.ts"
    options = ("-c:v", "libx264", "-g", "50")
    draw_video(path, frames=500, size="32x32", options=options)
    path.write_bytes(path.read_bytes() * 2)
    run(path.parent, tmp_path / "out", clip_seconds=10, frames=3, keep_damaged=True)
    assert [record.source_frames for record in records(tmp_path / "out")] == [250, 250]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_rows_may_name_any_end(tmp_path: Path, limits: list[float]) -> None:
    draw_video(tmp_path / "0.mp4", frames=100)
    (tmp_path / "rows.csv").write_text("path,start,end\n0.mp4,1,1e9\n")
    run(tmp_path / "rows.csv", tmp_path / "out", dataset="list", frames=3, timeout=1e9)
    assert limits == [24 * 60 * 1e9]  # more than a timer takes
    assert [record.frame_times[-1] for record in records(tmp_path / "out")] == [2.96]


def test_a_recording_that_cannot_be_read_is_excluded(raw: Path, tmp_path: Path) -> None:
    here = tmp_path / "raw"
    here.mkdir()
    (here / "recording.mp4").symlink_to(raw / "recording.mp4")
    (here / "broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(TooManyExcluded, match=r"1 of 10 videos"):
        run(here, tmp_path / "out", **SETTINGS)
    assert errors(tmp_path / "out" / "raw.errors.csv") == [
        ("broken.mp4 [0 s, end]", "unreadable"),
    ]


def test_a_header_may_claim_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_video(tmp_path / "raw" / "0.mp4", frames=50)
    monkeypatch.setattr("pipelines._clips.duration_of", lambda *given: 1e12)
    run(tmp_path / "raw", tmp_path / "out", **SETTINGS)
    assert [record.start for record in records(tmp_path / "out")] == [0.0]


@pytest.mark.parametrize("suffix", ["ts", "mpg", "mkv", "avi", "mp4"])
def test_clips_begin_where_they_should_in_every_container(tmp_path: Path, suffix: str) -> None:
    """MPEG streams are sought to the next key frame, here three seconds apart."""
    encoder = ("-c:v", "mpeg2video" if suffix in ("ts", "mpg") else "mpeg4")
    path = tmp_path / "raw" / f"0.{suffix}"
    draw_video(path, frames=300, options=(*encoder, "-g", "75", "-bf", "0", "-qscale:v", "4"))
    rows = [(0, 1), (4, 6), (4.5, 5.5), (11, 12)]
    text = "path,start,end\n" + "".join(f"0.{suffix},{start},{end}\n" for start, end in rows)
    (tmp_path / "list.csv").write_text(text)
    for name, given in (("together", rows), ("alone", rows[2:3])):
        rows_of = [f"0.{suffix},{start},{end}\n" for start, end in given]
        (tmp_path / f"{name}.csv").write_text("path,start,end\n" + "".join(rows_of))
        settings: dict[str, Any] = {"dataset": "list", "root": str(path.parent)}
        run(tmp_path / f"{name}.csv", tmp_path / name, **settings, frames=None, all_frames=True)
    found = {(r.start, r.source_frames): r for r in records(tmp_path / "together")}
    assert sorted(found) == [(0.0, 25), (4.0, 50), (4.52, 25), (11.0, 25)]
    (alone,) = records(tmp_path / "alone")
    assert alone == found[4.52, 25]


@pytest.mark.parametrize("suffix", ["ts", "mpg", "mkv", "avi", "mp4"])
@pytest.mark.parametrize("keyframes", [False, True])
def test_times_without_decoding_are_those_of_decoding(
    tmp_path: Path, suffix: str, keyframes: bool
) -> None:
    encoder = ("-c:v", "mpeg2video" if suffix in ("ts", "mpg") else "mpeg4")
    path = tmp_path / f"0.{suffix}"
    draw_video(path, frames=60, options=(*encoder, "-g", "12", "-bf", "0", "-qscale:v", "4"))
    binary = ffmpeg_binary()
    settings: dict[str, Any] = {"timeout_seconds": 60, "binary": binary, "span": (0.0, 60.0)}
    with decoding(path, short_edge=16, keyframes=keyframes, **settings) as decoded:
        times = [frame.time for frame in decoded]
    assert len(times) == (5 if keyframes else 60)
    video = Video(key="", source=path.name, path=path)
    # MPEG-PS tells the times of some frames only.
    near = 0.5 if suffix == "mpg" else 0.01
    found = packets_of(video, binary, 60.0)
    assert found is not None
    np.testing.assert_allclose(found.keys if keyframes else found.times, times, atol=near)


@pytest.fixture
def begins(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Where passes have begun to decode, in seconds."""
    found: list[float] = []
    made = _clips._pass

    def watched(*given: Any, begin: float, **more: Any) -> Any:
        found.append(begin)
        return made(*given, begin=begin, **more)

    monkeypatch.setattr(_clips, "_pass", watched)
    return found


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time limits of passes, in seconds."""
    found: list[float] = []
    made = _clips.decoding

    def watched(*given: Any, timeout_seconds: float, **more: Any) -> Any:
        found.append(timeout_seconds)
        return made(*given, timeout_seconds=timeout_seconds, **more)

    monkeypatch.setattr(_clips, "decoding", watched)
    return found


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_what_a_recording_lacks_costs_little(
    tmp_path: Path, begins: list[float], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted copy: its header tells of ten minutes, and some of them are there."""
    path = tmp_path / "raw" / f"0.{suffix}"
    options = ("-movflags", "+faststart") if suffix == "mp4" else ()
    draw_video(path, frames=6000, size="32x32", rate=10, options=("-g", "50", *options))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 5])
    settings = {"clip_seconds": 10, "frames": 3, "keep_damaged": True, "max_failures": 90}
    run(tmp_path / "raw", tmp_path / "out", **settings)
    assert begins == [0.0, 300.0, 270.0]
    left_out = errors(tmp_path / "out" / "raw.errors.csv")
    assert 30 <= len(left_out) <= 50
    assert {kind for _, kind in left_out} == {"zero-frames"}
    assert "the last frame of the recording is at " in (
        tmp_path / "out" / "raw.errors.csv"
    ).read_text("utf-8")


def test_the_time_limit_is_granted_for_every_minute(tmp_path: Path, limits: list[float]) -> None:
    draw_video(tmp_path / "raw" / "0.mp4", frames=150, size="32x32", rate=1)
    run(tmp_path / "raw", tmp_path / "out", clip_seconds=10, frames=3, timeout=50)
    assert limits == [150.0]


def test_rows_beyond_the_end_are_named(tmp_path: Path, begins: list[float]) -> None:
    draw_video(tmp_path / "0.mp4", frames=100)
    (tmp_path / "rows.csv").write_text("path,start,end\n0.mp4,1,3\n0.mp4,12500,20000\n")
    run(tmp_path / "rows.csv", tmp_path / "out", dataset="list", frames=3, max_failures=60)
    assert begins == [1.0, 12500.0, 12470.0]
    told = (tmp_path / "out" / "rows.errors.csv").read_text("utf-8")
    assert "zero-frames,the last frame of the recording is at 4.0 s" in told


@pytest.mark.parametrize("keyframes", [False, True])
def test_long_times_without_a_frame_are_not_decoded_again(
    tmp_path: Path, begins: list[float], keyframes: bool
) -> None:
    """Of a camera that records where something moves, or with key frames that are far apart."""
    options = ["-g", "100000", "-force_key_frames", "0,190,380,570,700,760"]
    if not keyframes:  # nothing is shown from 250 to 340 s and from 560 to 650 s
        options += ["-vf", "select='not(between(t,250,340)+between(t,560,650))'"]
        options += ["-fps_mode", "passthrough"]
    draw_video(tmp_path / "raw" / "0.mp4", frames=4500, size="32x32", rate=5, options=options)
    settings: dict[str, Any] = {"clip_seconds": 20, "frames": None, "max_failures": 90}
    settings |= {"min_frames": 1, "keyframes": keyframes, "all_frames": not keyframes}
    run(tmp_path / "raw", tmp_path / "out", **settings)
    assert begins.count(0.0) == 1
    stored = {record.start: record.source_frames for record in records(tmp_path / "out")}
    if keyframes:
        assert stored == {0.0: 1, 190.0: 1, 380.0: 1, 570.0: 1, 700.0: 1, 760.0: 1}
    else:
        assert {start for start in stored if 240 <= start < 360} == {240.0, 340.2}
        assert stored[340.2] == 99 and stored[600.2 + 50] == 49


def test_a_clip_that_fails_again_is_named_itself(raw: Path, tmp_path: Path) -> None:
    here = tmp_path / "raw" / "recording.mp4"
    here.parent.mkdir()
    damaged = bytearray((raw / "recording.mp4").read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 3000] = bytes(3000)
    here.write_bytes(damaged)
    out = tmp_path / "out"
    run(here.parent, out, max_failures=60, **SETTINGS)
    before = hashes(out)
    run(here.parent, out, max_failures=60, retry_failed=True, **SETTINGS)
    assert hashes(out) == before


def test_memory_does_not_grow_with_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that wait for the end of their clip are let go with it."""
    draw_video(tmp_path / "raw" / "0.mp4", frames=1500)
    waiting: list[weakref.ref[Any]] = []
    most = 0
    chooser = FrameChoice.chooser

    def watched(self: FrameChoice, budget_bytes: int = 0) -> Any:
        nonlocal most
        made = chooser(self, budget_bytes)
        waiting.append(weakref.ref(made))
        most = max(most, sum(one() is not None for one in waiting))
        return made

    monkeypatch.setattr(FrameChoice, "chooser", watched)
    run(tmp_path / "raw", tmp_path / "out", clip_seconds=2, frames=3)
    assert len(waiting) == 30 and most <= 2


@pytest.mark.parametrize(
    ("length", "stride", "spans"),
    [
        (25.0, 10.0, [(0, 10), (10, 20), (20, 25)]),
        (24.0, 10.0, [(0, 10), (10, 20)]),
        (3.0, 10.0, [(0, 3)]),
        (20.0, 10.0, [(0, 10), (10, 20)]),
        (21.0, 5.0, [(0, 10), (5, 15), (10, 20), (15, 21)]),
        (20.0, 20.0, [(0, 10)]),
    ],
)
def test_spans(length: float, stride: float, spans: list[tuple[float, float]]) -> None:
    assert clip_spans(0.0, length, 10.0, stride) == spans


def test_overlapping_clips_and_key_frames(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "overlapping", **{**SETTINGS, "clip_stride": 2, "frames": 3})
    starts = [record.start for record in records(tmp_path / "overlapping")]
    assert starts == [2.0 * n for n in range(17)]
    run(raw, tmp_path / "keys", **{**SETTINGS, "clip_seconds": 8, "frames": None}, keyframes=True)
    for record in records(tmp_path / "keys"):
        # Every two seconds, and where the encoder saw a cut.
        assert 2 <= record.source_frames <= 7
        assert record.source_frames == len(record.frame_times)


def test_a_long_video_without_clips_gets_one_warning(tmp_path: Path) -> None:
    draw_video(tmp_path / "raw" / "0.mp4", frames=61 * 25, size="16x16")
    (tmp_path / "raw" / "1.mp4").symlink_to("0.mp4")
    given = ["prepare", "folder", "--src", tmp_path / "raw", "--out", tmp_path / "out"]
    process = commands.start(*given, "--frames=3", "--workers=2")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    (line,) = [line for line in error.splitlines() if "--clip-seconds" in line]
    assert line.startswith("raw: 2 videos are longer than 60 s")
    # Parts count by their own length; clips as long as was asked for do not.
    (tmp_path / "raw" / "list.csv").write_text("path,start,end\n0.mp4,0,60.5\n1.mp4,0,9\n")
    given = ["prepare", "list", "--src", tmp_path / "raw" / "list.csv", "--frames=3"]
    for more, said in (
        (["--out", tmp_path / "parts"], ["list: 1 videos are longer than 60 s"]),
        (["--out", tmp_path / "clips", "--clip-seconds=100"], []),
    ):
        process = commands.start(*given, *more)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        lines = [line for line in error.splitlines() if "longer than" in line]
        assert [line.partition(". ")[0] for line in lines] == said


def test_clips_of_datasets_with_short_videos_are_refused(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the videos of frames are not divided into clips"):
        run(raw, tmp_path, dataset="frames", clip_seconds=5)
    with pytest.raises(InputError, match="--cut-scenes: needs --clip-seconds"):
        run(raw, tmp_path, cut_scenes=True)


def test_a_plan_without_clips_is_that_of_earlier_versions(tmp_path: Path) -> None:
    draw_video(tmp_path / "raw" / "0.mp4")
    run(tmp_path / "raw", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "raw.json").read_text())["settings"]
    assert "cut_scenes" not in settings and "keyframes" not in settings
