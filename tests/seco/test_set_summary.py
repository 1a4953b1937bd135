"""``seco inspect``: the figures of a set, its contact sheet and its page."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seco.report.inspect import (
    TILE_PX,
    compose,
    contact_sheet,
    draw_strips,
    human_bytes,
    lines,
    render_set_page,
    summarise,
    write_contact_sheet,
    write_set_page,
)
from shards.dataset import ShardSet
from shards.format import VideoRecord
from shards.opening import open_shards
from shards.writer import ShardWriter

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m[bold]"


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, format="JPEG", quality=95)
    return out.getvalue()


def make_set(
    folder: Path, frames: list[list[bytes]], names: tuple[str, ...] = ("run", "jump")
) -> ShardSet:
    """Video i has label i mod 2, the last none; two shards."""
    half = len(frames) // 2
    for shard, videos in enumerate((range(half), range(half, len(frames)))):
        with ShardWriter(folder / f"set-{shard:03d}.tar") as writer:
            for number in videos:
                labelled = number < len(frames) - 1
                record = VideoRecord(
                    key=f"video{number}",
                    dataset="made-up",
                    source=f"{number}.mp4",
                    label=number % 2 if labelled else None,
                    label_name=names[number % 2] if labelled else None,
                    splits={"1": "train" if number % 3 else "test"},
                    width=64 if number else 48,
                    height=48 if number else 64,
                    source_duration=float(number + 1) if number != 1 else None,
                )
                writer.add(record, frames[number])
    return open_shards(str(folder / "set-*.tar"))


@pytest.fixture
def small(tmp_path: Path) -> ShardSet:
    counts = [3, 4, 5, 6, 9]
    return make_set(
        tmp_path, [[jpeg((40 * v, 20 * f, 90)) for f in range(n)] for v, n in enumerate(counts)]
    )


def test_summary_counts_everything(small: ShardSet) -> None:
    summary = summarise(small)
    assert summary.datasets == ["made-up"]
    assert (summary.videos, summary.frames, summary.shards) == (5, 27, 2)
    assert summary.bytes == sum(Path(file).stat().st_size for file in small.addresses)
    assert summary.labels == [("jump", 2), ("run", 2)]
    assert summary.unlabelled == 1
    assert summary.splits == {"1": [("train", 3), ("test", 2)]}
    spread = summary.frames_spread
    assert (spread.smallest, spread.median, spread.largest) == (3, 5, 9)
    assert summary.sizes == [((64, 48), 4), ((48, 64), 1)]
    assert sorted(summary.durations_seconds) == [1, 3, 4, 5]
    assert summary.unreadable_records == 0


def test_lines_hold_the_figures_and_no_control_characters(tmp_path: Path) -> None:
    shard_set = make_set(tmp_path, [[jpeg((9, 9, 9))] * 3] * 4, names=(HOSTILE, "b"))
    text = lines(summarise(shard_set), width=60)
    assert "made-up" in text
    assert "[bold]" in text  # as it stands, not as markup
    assert "\x1b" not in text
    assert all(len(line) <= 60 for line in text.splitlines())
    assert re.search(r"videos\s+4", text)
    assert re.search(r"frames\s+12", text)


def test_set_without_records_has_no_sizes_or_durations(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "foreign-000.tar", "w") as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"v.{number:04d}.jpg")
            data = jpeg((1, 2, 3))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    summary = summarise(open_shards(str(tmp_path / "foreign-000.tar")))
    assert (summary.videos, summary.frames) == (1, 3)
    assert summary.duration_spread is None
    assert "unknown" in lines(summary)


def test_unreadable_records_are_counted(small: ShardSet) -> None:
    with Path(small.addresses[1]).open("r+b") as tar:
        tar.truncate(600)
    summary = summarise(small)
    assert summary.unreadable_records == 3
    assert "unreadable records" in lines(summary)


def test_contact_sheet_shows_the_frames_asked_for(small: ShardSet) -> None:
    (strip,) = [s for s in draw_strips(small, frames_per_video=3) if s.key == "video4"]
    pixels = np.asarray(strip.image)[TILE_PX[1] // 2]
    colours = pixels[[n * (TILE_PX[0] + 4) + TILE_PX[0] // 2 for n in range(3)]]
    wanted = [(160, 0, 90), (160, 80, 90), (160, 160, 90)]  # frames 0, 4, 8 of 9
    np.testing.assert_allclose(colours, wanted, atol=4)
    assert strip.frames == 9
    assert strip.broken == 0


def test_contact_sheet_is_the_same_for_a_seed_and_draws_no_video_twice(small: ShardSet) -> None:
    first = contact_sheet(small, videos=3, seed=1)
    assert first.tobytes() == contact_sheet(small, videos=3, seed=1).tobytes()
    chosen = {tuple(s.key for s in draw_strips(small, videos=3, seed=n)) for n in range(8)}
    assert len(chosen) > 1
    assert all(len(set(keys)) == 3 for keys in chosen)
    assert len(draw_strips(small, videos=99)) == 5


def test_broken_frames_are_crossed_and_counted(tmp_path: Path) -> None:
    good = jpeg((10, 200, 10))
    broken = [good[: len(good) // 2], b"not a picture", b"", b"GIF89a" + bytes(40)]
    shard_set = make_set(tmp_path, [[good, *broken, good], [good] * 3])
    sheet = contact_sheet(shard_set)
    assert sheet.info["broken"] == 4
    strip = draw_strips(shard_set)[0]
    red = [
        np.asarray(strip.image)[TILE_PX[1] // 2, n * (TILE_PX[0] + 4) + TILE_PX[0] // 2, 0]
        for n in range(6)
    ]
    assert [value > 150 for value in red] == [False, True, True, True, True, False]


def test_shard_deleted_since_it_was_opened_gives_crossed_tiles(small: ShardSet) -> None:
    Path(small.addresses[0]).unlink()
    strips = draw_strips(small)
    assert [strip.broken for strip in strips][:2] == [3, 4]
    assert sum(strip.broken for strip in strips[2:]) == 0


def test_long_captions_stay_within_the_sheet(tmp_path: Path) -> None:
    shard_set = make_set(tmp_path, [[jpeg((0, 0, 0))] * 3] * 2, names=("x" * 500, "y"))
    sheet = compose(draw_strips(shard_set, frames_per_video=1))
    assert sheet.width < 2 * TILE_PX[0]
    write_contact_sheet(sheet, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as read:
        assert read.size == sheet.size


def test_page_escapes_names_and_loads_nothing(tmp_path: Path) -> None:
    shard_set = make_set(tmp_path, [[jpeg((9, 9, 9))] * n for n in (3, 4, 5, 3)], (HOSTILE, "b"))
    summary, strips = summarise(shard_set), draw_strips(shard_set)
    write_set_page(summary, strips, tmp_path / "set.html", title=HOSTILE)
    text = (tmp_path / "set.html").read_text("utf-8")
    assert text == render_set_page(summary, strips, title=HOSTILE)
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text
    assert "\x1b" not in text
    assert "://" not in text
    assert text.count("<svg ") == 3  # classes, frames a video, durations
    sources = re.findall(r'<img src="([^"]*)"', text)
    assert len(sources) == 4
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.height == TILE_PX[1]


def test_page_tells_of_broken_frames(tmp_path: Path) -> None:
    shard_set = make_set(tmp_path, [[b"x", b"y", b"z"], [jpeg((1, 1, 1))] * 3])
    text = render_set_page(summarise(shard_set), draw_strips(shard_set))
    assert "3 of these frames cannot be decoded" in text


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")],
)
def test_human_bytes(count: int, words: str) -> None:
    assert human_bytes(count) == words
