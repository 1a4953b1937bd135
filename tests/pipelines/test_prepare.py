"""``prepare`` from videos to sets: what is written, and that nothing but the input decides it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simplejpeg
import webdataset

from pipelines import _build, _engine, _prepare
from pipelines._adapter import Video
from pipelines._build import ShardResult, StoredVideo, Tally, build_shard
from pipelines._plan import ShardPlan
from shards.errors import InputError, Stopped, TooManyExcluded
from shards.format import read_manifest
from shards.index import build_index, read_index
from shards.storage import open_storage
from tests.data import ROOT, shared
from tests.pipelines.made_videos import draw_video, link_into
from tests.pipelines.running import (
    driver,
    errors,
    hashes,
    hear_ctrl_c,
    processes_of,
    programs_naming,
    run,
    wait_until,
)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine drawn videos of two labels, one of them broken."""
    root = tmp_path_factory.mktemp("made") / "raw"
    for number in range(4):
        draw_video(root / "a" / f"v{number}.mp4", frames=5 + number)
        draw_video(root / "b" / f"w{number}.avi", frames=3 + number)
    (root / "b" / "broken.mp4").write_bytes(b"not a video at all")
    return root


def test_more_threads_may_work_on_a_shard_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the other shards are finished: each of two videos waits for the other here."""
    for number in range(2):
        draw_video(tmp_path / "raw" / f"{number}.mp4")
    allowed, together, store = 1, threading.Barrier(2), _build.store_video

    def stored(video: Video, plan: ShardPlan) -> StoredVideo:
        nonlocal allowed
        allowed = 2
        together.wait(120)
        return store(video, plan)

    def build(plan: ShardPlan, threads: object, tell: Callable[[Tally], None]) -> ShardResult:
        return build_shard(plan, lambda: allowed, tell)

    monkeypatch.setattr(_build, "store_video", stored)
    monkeypatch.setattr(_engine, "build_shard", build)
    assert run(tmp_path / "raw", tmp_path / "out").sets[0].videos == 2


def test_a_set_is_what_the_format_says(raw: Path, tmp_path: Path) -> None:
    report = run(raw, tmp_path, videos_per_shard=5, max_failures=50)
    manifest = read_manifest(tmp_path / "raw.json")
    assert [row.file for row in manifest.shards] == ["raw-000.tar", "raw-001.tar"]
    assert (manifest.label_names, manifest.excluded) == (["a", "b"], 1)
    assert manifest.settings["frames"] == 4
    assert sum(row.videos for row in manifest.shards) == 8
    assert errors(tmp_path / "raw.errors.csv") == [("b/broken.mp4", "unreadable")]
    assert (report.sets[0].failed, report.sets[0].videos) == (1, 9)
    for row in manifest.shards:
        tar = tmp_path / row.file
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == row.sha256
        assert build_index(tar).info == read_index(tar.with_suffix(".idx")).info == row
    text = "".join(path.read_text("latin-1") for path in tmp_path.iterdir())
    assert str(raw.parent) not in text


def test_webdataset_reads_it(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path, max_failures=50)
    stock = webdataset.WebDataset(str(tmp_path / "raw-000.tar"), shardshuffle=False).decode("pil")
    samples = {sample["__key__"]: sample for sample in stock}
    assert len(samples) == 8
    sample = samples["v0"]
    record = sample["json"]
    assert [name for name in sample if name.endswith("jpg")] == [f"{n:04d}.jpg" for n in range(4)]
    assert sample["0000.jpg"].size == (record["width"], record["height"]) == (64, 48)
    assert (record["label"], record["label_name"], record["source"]) == (0, "a", "a/v0.mp4")
    assert (record["source_fps"], record["source_frames"]) == (25.0, 5)
    assert record["frame_times"] == pytest.approx([0.0, 0.04, 0.12, 0.16])


@pytest.mark.parametrize(
    ("settings", "frames"),
    [
        ({"frames": 3}, 3),
        ({"frames": None, "fps": 5.0}, 2),
        ({"frames": None, "all_frames": True}, 8),
        ({"frames": 30}, 8),  # no more than there are, each once
        ({"frames": None}, 8),
    ],
)
def test_how_many_frames(tmp_path: Path, settings: dict[str, object], frames: int) -> None:
    draw_video(tmp_path / "raw" / "v.mp4")
    (made,) = run(tmp_path / "raw", tmp_path / "out", **settings).sets
    assert made.shards[0].frames == frames


def test_real_ucf101_keeps_every_frame(tmp_path: Path) -> None:
    clip = shared("ucf101/UCF-101/Diving/v_Diving_g01_c01.avi")
    link_into(tmp_path / "raw" / "UCF-101" / "Diving", [clip])
    link_into(tmp_path / "raw", [shared("ucf101/ucfTrainTestlist")])
    (made,) = run(tmp_path / "raw", tmp_path / "out", dataset="ucf101", frames=None).sets
    with webdataset.WebDataset(str(tmp_path / "out/ucf101-000.tar"), shardshuffle=False) as tar:
        (sample,) = tar
    record = json.loads(sample["json"])
    assert record["source_frames"] == len(record["frame_times"]) == made.shards[0].frames > 50
    assert (record["label"], record["splits"]) == (25, {"1": "train"})
    assert simplejpeg.decode_jpeg(sample["0000.jpg"]).shape == (240, 320, 3)
    assert {row.kind for row in made.excluded} == {"missing"}


def test_workers_never_change_a_byte(raw: Path, tmp_path: Path) -> None:
    for name, workers, shard in (("1", 1, 3), ("2", 2, 3), ("5", 5, 3)):
        run(raw, tmp_path / name, workers=workers, videos_per_shard=shard, max_failures=50)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2") == hashes(tmp_path / "5")
    assert len(hashes(tmp_path / "1")) == 3 + 3 + 2


def test_a_finished_run_does_nothing_again(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path, videos_per_shard=3, max_failures=50)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    (tmp_path / "raw-001.idx").unlink()
    kept = hashes(tmp_path)
    run(raw, tmp_path, videos_per_shard=3, max_failures=50)
    again = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert [path.name for path in before if before[path] != again[path]] == ["raw-001.tar"]
    assert kept.items() <= hashes(tmp_path).items()


@pytest.mark.parametrize("change", [{"quality": 80}, {"frames": 5}, {"videos_per_shard": 9}])
def test_another_plan_of_the_same_name_is_refused(
    raw: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    run(raw, tmp_path, videos_per_shard=3, max_failures=50)
    before = hashes(tmp_path)
    with pytest.raises(InputError, match="choose another --out or --name"):
        run(raw, tmp_path, **({"videos_per_shard": 3, "max_failures": 50} | change))
    assert hashes(tmp_path) == before


def test_too_many_failures_come_after_everything_is_written(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(TooManyExcluded, match=r"1 of 9 videos \(11\.1 %\)"):
        run(raw, tmp_path, max_failures=11)
    assert {"raw.json", "raw.errors.csv", "raw-000.tar"} <= set(hashes(tmp_path))
    run(raw, tmp_path, max_failures=12)


def test_no_readable_video_at_all(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.mp4").write_bytes(b"nothing")
    with pytest.raises(InputError, match="none of the 1 videos") as caught:
        run(tmp_path / "raw", tmp_path / "out", max_failures=100)
    assert not isinstance(caught.value, TooManyExcluded)
    assert list(hashes(tmp_path / "out")) == ["raw.errors.csv"]


def test_an_errors_file_of_an_earlier_run_goes(tmp_path: Path) -> None:
    draw_video(tmp_path / "raw" / "x.mp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "raw.errors.csv").write_text("old")
    run(tmp_path / "raw", tmp_path / "out")
    assert "raw.errors.csv" not in hashes(tmp_path / "out")


def test_a_stuck_video_is_excluded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = draw_video(tmp_path / "raw" / "good.mp4")
    stuck = tmp_path / "raw" / "stuck.mp4"
    stuck.write_bytes(good.read_bytes())
    real = _prepare.plan_set

    def swap(*arguments: object, **named: object) -> object:
        plan = real(*arguments, **named)  # type: ignore[arg-type]
        stuck.unlink()
        os.mkfifo(stuck)
        return plan

    monkeypatch.setattr(_prepare, "plan_set", swap)
    (made,) = run(tmp_path / "raw", tmp_path / "out", timeout=5.0, max_failures=50).sets
    assert [(row.source, row.kind) for row in made.excluded] == [("stuck.mp4", "timeout")]
    assert made.shards[0].videos == 1


def test_what_ended_workers_have_left_is_cleared_away(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    other = tmp_path / "raw2-000.tar.0123abcd.part"  # of another set, which may be under way
    with pytest.raises(InputError, match="full"), storage.writer_lock("raw"):
        for path in (other, tmp_path / "raw-000.idx.0123abcd.part", tmp_path / "raw-000.idx"):
            path.write_bytes(b"half")
        raise InputError("is full")
    assert {path.name for path in tmp_path.iterdir()} == {other.name, "raw-000.idx"}


def test_short_videos_are_kept_unless_refused(tmp_path: Path) -> None:
    draw_video(tmp_path / "raw" / "one.mp4", frames=1)
    draw_video(tmp_path / "raw" / "more.mp4", frames=5)
    (made,) = run(tmp_path / "raw", tmp_path / "out").sets
    assert made.shards[0].frames == 1 + 4
    (made,) = run(tmp_path / "raw", tmp_path / "three", min_frames=3, max_failures=50).sets
    assert [(row.source, row.kind) for row in made.excluded] == [("one.mp4", "too-short")]


def test_a_dry_run_writes_nothing(
    raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(raw, tmp_path / "out", dry_run=True, videos_per_shard=4)
    assert "raw: 9 videos, 2 labels, 4 frames per video" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "list.csv").write_text("path,start,end\na/v0.mp4,900,901\n")  # after its end
    given: dict[str, Any] = {"dataset": "list", "root": str(raw), "dry_run": True}
    run(tmp_path / "list.csv", tmp_path / "out", **given)
    assert "list: about 0 frames, 0 kB and 1 seconds" in capfd.readouterr().err


def test_by_default_shards_go_where_no_code_is(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a clone of this repository ``shards/`` is a package."""
    monkeypatch.chdir(tmp_path)
    run(raw, "", max_failures=50)
    assert (tmp_path / "shards" / "raw.json").is_file()
    (tmp_path / "shards" / "__init__.py").touch()
    run(raw, "", max_failures=50)
    assert (tmp_path / "data" / "shards" / "raw.json").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "nope"}, "unknown dataset"),
        ({"fps": 2.0}, "cannot be combined"),
        ({"short_edge": 255}, "must be even"),
        ({"quality": 0}, "--quality"),
        ({"workers": 0}, "--workers"),
        ({"name": "a/b"}, "--name"),
        ({"ffmpeg": "/no/such/ffmpeg"}, "/no/such/ffmpeg"),
        ({"split": "train"}, "--split"),
    ],
)
def test_mistakes_are_one_line(
    raw: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run(raw, tmp_path, **settings)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="cannot be written"):
        run(raw, tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGKILL, False)]
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    clips: tuple[Path, dict[str, str]],
    tmp_path: Path,
    workers: int,
    number: signal.Signals,
    told: bool,
) -> None:
    raw, whole = clips
    out = tmp_path / "out"
    started = subprocess.Popen(
        driver(raw, out, workers),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    wait_until(lambda: any(out.glob("*.idx")) or started.poll() is not None)
    if number == signal.SIGINT:
        os.killpg(started.pid, number)  # a terminal sends it to all of the group
    else:
        started.send_signal(number)
    began = time.monotonic()
    said, complaints = started.communicate(timeout=30)
    assert time.monotonic() - began < 10
    wait_until(lambda: not processes_of(started.pid) and not programs_naming(raw), 10)
    finished = len(list(out.glob("*.idx")))
    assert 1 <= finished < 28, "the signal came too late to prove anything"
    assert not (out / "raw.json").exists()
    if told:
        assert said.startswith("Stopped stopped: "), said + complaints
        assert "run the same command again" in said
        assert "Traceback" not in complaints
        assert not list(out.glob("*.part"))
    again = subprocess.run(driver(raw, out, workers), capture_output=True, text=True, cwd=ROOT)
    assert again.stdout == "done\n", again.stderr
    assert f"{finished} of 28 shards already exist" in again.stderr
    assert hashes(out) == whole


def test_ctrl_c_in_one_process(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_prepare, "build_shards", interrupt)
    with pytest.raises(Stopped, match="0 of 1 shards"):
        run(raw, tmp_path)


def test_shards_on_a_disk_of_another_machine_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_video(tmp_path / "raw" / "a.mp4")
    real = _engine.build_shard

    def elsewhere(plan: ShardPlan, *arguments: object) -> ShardResult:
        (tmp_path / "elsewhere").mkdir()
        return real(replace(plan, folder=str(tmp_path / "elsewhere")), *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_engine, "build_shard", elsewhere)
    monkeypatch.setattr(_prepare, "_WAITS_SECONDS", (0.01,))
    with pytest.raises(
        InputError, match=r"1 finished shards were not found, .*raw-000\.tar.*share"
    ):
        run(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out" / "raw.json").exists()
