"""Output behind fsspec: an S3 server on this machine, and what happens when it is not there."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards import storage
from shards.errors import InputError
from tests.data import ROOT
from tests.pipelines.made_videos import draw_video
from tests.pipelines.running import driver, hashes, run, wait_until
from tests.s3_server import bad_line, s3_bucket

Clips = tuple[Path, dict[str, str]]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_bucket(monkeypatch) as address:
        yield address


def fetched(address: str, into: Path) -> dict[str, str]:
    import s3fs

    system = s3fs.S3FileSystem(skip_instance_cache=True)
    into.mkdir()
    for name in system.ls(address.removeprefix("s3://"), refresh=True):
        system.get_file(name, str(into / name.rpartition("/")[2]))
    return hashes(into)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bytes_as_in_a_folder(
    clips: Clips, tmp_path: Path, bucket: str, workers: int
) -> None:
    raw, whole = clips
    done = subprocess.run(driver(raw, bucket, workers), capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "done\n", done.stderr
    assert fetched(bucket, tmp_path / "first") == whole
    assert len((tmp_path / "first" / "raw.log.jsonl").read_text().splitlines()) == 28


def test_a_killed_run_goes_on(clips: Clips, tmp_path: Path, bucket: str) -> None:
    import s3fs

    raw, whole = clips
    process = subprocess.Popen(
        driver(raw, bucket, 2),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )

    def some() -> bool:
        system = s3fs.S3FileSystem(skip_instance_cache=True)
        try:
            names = system.ls(bucket.removeprefix("s3://"), refresh=True)
        except FileNotFoundError:
            return process.poll() is not None
        return any(name.endswith(".idx") for name in names) or process.poll() is not None

    wait_until(some)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = subprocess.run(driver(raw, bucket, 2), capture_output=True, text=True, cwd=ROOT)
    assert again.stdout == "done\n", again.stderr
    assert "shards already exist" in again.stderr
    assert fetched(bucket, tmp_path / "fetched") == whole


@pytest.mark.parametrize("fault", ["drop", "error"])
def test_the_same_bytes_over_a_bad_line(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(storage, "_FIRST_WAIT_SECONDS", 0.01)
    for number in range(6):
        draw_video(tmp_path / "raw" / f"{number}.mp4", frames=4)
    run(tmp_path / "raw", tmp_path / "out", videos_per_shard=1)
    with bad_line(monkeypatch, fault) as line:
        line.every = 5
        run(tmp_path / "raw", bucket, videos_per_shard=1)
        assert line.spoilt
    assert fetched(bucket, tmp_path / "fetched") == hashes(tmp_path / "out")


def test_failures_are_tried_again(tmp_path: Path, bucket: str) -> None:
    raw = tmp_path / "raw"
    good = draw_video(raw / "good.mp4")
    (raw / "bad.mp4").write_text("not yet")
    run(raw, bucket, max_failures=100)
    (raw / "bad.mp4").write_bytes(good.read_bytes())
    made = run(raw, bucket, retry_failed=True)
    assert (made.sets[0].failed, made.sets[0].shards[0].videos) == (0, 2)
    run(raw, tmp_path / "fresh")
    assert fetched(bucket, tmp_path / "fetched") == hashes(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://no-such-bucket/x", "s3://no-such-bucket/x.*cannot be reached or written"),
        ("nothing://x/y", "cannot be opened"),
    ],
)
def test_places_that_are_not_there(tmp_path: Path, bucket: str, address: str, message: str) -> None:
    draw_video(tmp_path / "raw" / "a.mp4")
    with pytest.raises(InputError, match=message) as caught:
        run(tmp_path / "raw", address)
    assert "\n" not in str(caught.value)


def test_a_store_without_whole_puts(tmp_path: Path) -> None:
    draw_video(tmp_path / "raw" / "a.mp4")
    run(tmp_path / "raw", "memory://set/of")
    import fsspec

    names = [Path(name).name for name in fsspec.filesystem("memory").ls("/set/of", detail=False)]
    assert sorted(names) == ["raw-000.idx", "raw-000.tar", "raw.json", "raw.log.jsonl"]
