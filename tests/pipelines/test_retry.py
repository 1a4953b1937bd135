"""``--retry-failed``, and what a rerun does when the raw videos have changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import _build
from pipelines._adapter import Video
from pipelines._build import StoredVideo
from pipelines._plan import ShardPlan
from shards.errors import InputError
from tests.pipelines.made_videos import draw_video
from tests.pipelines.running import errors, hashes, run


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Six drawn videos; two more are broken, in different shards of three."""
    root = tmp_path / "raw"
    for number in range(6):
        draw_video(root / f"v{number}.mp4", frames=4 + number)
    (root / "broken.mp4").write_bytes(b"not a video")
    (root / "empty.mp4").touch()
    return root


SETTINGS: dict[str, object] = {"videos_per_shard": 3, "max_failures": 50}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources of all videos that are decoded, as they are."""
    sources: list[str] = []
    real = _build.store_video

    def noted(video: Video, plan: ShardPlan) -> StoredVideo:
        sources.append(video.source)
        return real(video, plan)

    monkeypatch.setattr(_build, "store_video", noted)
    return sources


def mend(raw: Path) -> None:
    draw_video(raw / "broken.mp4", frames=9)
    (raw / "empty.mp4").write_bytes((raw / "v0.mp4").read_bytes())


def test_only_what_failed_is_decoded_and_the_bytes_are_those_of_a_fresh_run(
    raw: Path, tmp_path: Path, decoded: list[str]
) -> None:
    run(raw, tmp_path / "out", **SETTINGS)
    assert len(decoded) == 8
    assert {source for source, _ in errors(tmp_path / "out" / "raw.errors.csv")} == {
        "broken.mp4",
        "empty.mp4",
    }
    mend(raw)
    decoded.clear()
    (made,) = run(raw, tmp_path / "out", retry_failed=True, **SETTINGS).sets
    assert sorted(decoded) == ["broken.mp4", "empty.mp4"]
    assert (made.failed, made.excluded) == (0, [])
    run(raw, tmp_path / "fresh", **SETTINGS)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_without_the_option_nothing_is_decoded_again(
    raw: Path, tmp_path: Path, decoded: list[str]
) -> None:
    run(raw, tmp_path / "out", **SETTINGS)
    before = hashes(tmp_path / "out")
    mend(raw)
    decoded.clear()
    run(raw, tmp_path / "out", **SETTINGS)
    assert not decoded
    assert hashes(tmp_path / "out") == before


def test_what_fails_again_changes_no_file(raw: Path, tmp_path: Path, decoded: list[str]) -> None:
    out = tmp_path / "out"
    run(raw, out, **SETTINGS)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("raw-*")}
    decoded.clear()
    run(raw, out, retry_failed=True, **SETTINGS)
    assert sorted(decoded) == ["broken.mp4", "empty.mp4"]
    assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("raw-*")}


def test_another_complaint_is_written_down(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(raw, out, **SETTINGS)
    (raw / "broken.mp4").unlink()
    (raw / "broken.mp4").touch()
    run(raw, out, retry_failed=True, **SETTINGS)
    run(raw, tmp_path / "fresh", **SETTINGS)
    assert hashes(out) == hashes(tmp_path / "fresh")
    assert "the file is empty" in (out / "raw.errors.csv").read_text()


def test_a_replacement_elsewhere_counts(tmp_path: Path) -> None:
    """CVDF gives good copies of corrupted Kinetics files in a folder of their own."""
    raw, out = tmp_path / "k", tmp_path / "out"
    raw.mkdir()
    (raw / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "yoga,aaaaaaaaaaa,0,10,train\nyoga,bbbbbbbbbbb,0,10,train\n"
    )
    draw_video(raw / "train" / "aaaaaaaaaaa_000000_000010.mp4")
    corrupted = raw / "train" / "bbbbbbbbbbb_000000_000010.mp4"
    corrupted.write_bytes(b"corrupted")
    settings: dict[str, object] = {"dataset": "kinetics", "max_failures": 50}
    run(raw, out, **settings)
    draw_video(raw / "replacement" / corrupted.name)
    (made,) = run(raw, out, retry_failed=True, **settings).sets
    assert (made.failed, made.shards[0].videos) == (0, 2)
    assert errors(out / "kinetics.errors.csv") == [(f"train/{corrupted.name}", "duplicate")]


def test_other_files_of_the_same_names_are_refused(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(raw, out, **SETTINGS)
    before = hashes(out)
    draw_video(raw / "v3.mp4", frames=25)
    with pytest.raises(InputError, match=r"made from other files than those now in --src: v3\.mp4"):
        run(raw, out, **SETTINGS)
    assert hashes(out) == before
    # The advice it gives works.
    for index in out.glob("*.idx"):
        if "v3" in index.read_text("latin-1"):
            index.unlink()
    run(raw, out, **SETTINGS)
    run(raw, tmp_path / "fresh", **SETTINGS)
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_the_log_has_a_line_a_shard(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "out", workers=2, **SETTINGS)
    lines = (tmp_path / "out" / "raw.log.jsonl").read_text().splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda row: str(row["shard"]))
    assert [row["shard"] for row in rows] == [f"raw-{n:03d}.tar" for n in range(3)]
    assert sum(row["videos"] for row in rows) == 6
    assert all(row["seconds"] > 0 and row["host"] for row in rows)
    kinds: dict[str, int] = {}
    for row in rows:
        for kind, count in row["failed"].items():
            kinds[kind] = kinds.get(kind, 0) + count
    assert kinds == {"unreadable": 2}
