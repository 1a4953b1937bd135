"""The forecast from sample tables: never trusted, never different from decoding everything."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from pipelines import _build
from pipelines._decode import forecast_times
from pipelines._plan import ShardPlan
from tests.data import shared
from tests.pipelines.made_videos import decode, draw_video
from tests.pipelines.running import hashes, run

H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "2", "-g", "12")
KNOWN = [
    *("arm_wrestling_demo.mp4", "hitting_baseball.mp4", "jesse_dance.mp4", "making_cake.mp4"),
    *("mmaction2_test.mp4", "nasa_13013.mp4", "playing_guitar.mp4", "unordered.mov", "yoga.mp4"),
    *("video_0.mov", "video_90.mov"),
]


@pytest.mark.parametrize("clip", KNOWN)
def test_real_clips_show_their_frames_when_forecast(clip: str) -> None:
    forecast = forecast_times(shared(f"clips/{clip}"))
    assert forecast is not None
    decoded = decode(shared(f"clips/{clip}"), short_edge=32)
    np.testing.assert_allclose(forecast - forecast[0], decoded, atol=1e-6)


@pytest.mark.parametrize(
    "clip", ["av1_video.mkv", "h265_video.mp4", "v_biking_01_01.mpg", "flipping_a_pancake.mkv"]
)
def test_other_formats_have_no_forecast(clip: str) -> None:
    assert forecast_times(shared(f"clips/{clip}")) is None


@pytest.mark.parametrize("pixels", ["yuv422p", "yuv444p", "yuv420p10le"])
def test_pictures_that_are_converted_have_no_forecast(tmp_path: Path, pixels: str) -> None:
    options = ("-c:v", "libx264", "-pix_fmt", pixels)
    assert forecast_times(draw_video(tmp_path / "v.mp4", options=options)) is None


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video" * 99)
    os.mkfifo(tmp_path / "fifo.mp4")
    for name in ("empty.mp4", "text.mp4", "fifo.mp4", "none.mp4", "."):
        assert forecast_times(tmp_path / name) is None


def test_damaged_tables_never_raise(tmp_path: Path) -> None:
    original = draw_video(tmp_path / "v.mp4", frames=40, options=H264).read_bytes()
    moov = original.index(b"moov")
    rng = random.Random(5)
    for _ in range(400):
        data = bytearray(original)
        for _ in range(rng.choice((1, 4, 16))):
            data[rng.randrange(moov - 4, len(data))] = rng.randrange(256)
        (tmp_path / "m.mp4").write_bytes(bytes(data))
        forecast_times(tmp_path / "m.mp4")


def all_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "forecast_times", lambda path, inside: None)


@pytest.mark.parametrize("frames", [1, 4, 30, 1000])
def test_the_bytes_are_those_of_decoding_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int
) -> None:
    settings: dict[str, object] = {"frames": frames, "max_failures": 50, "short_edge": 64}
    clips = shared("clips")
    run(clips, tmp_path / "forecast", **settings)
    all_decoded(monkeypatch)
    run(clips, tmp_path / "all", **settings)
    assert hashes(tmp_path / "forecast") == hashes(tmp_path / "all")


def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every decoding, whether only some frames were asked for."""
    made: list[bool] = []
    real = _build._decoded

    def noted(video: object, plan: ShardPlan, only: object) -> object:
        made.append(only is not None)
        return real(video, plan, only)  # type: ignore[arg-type]

    monkeypatch.setattr(_build, "_decoded", noted)
    return made


def test_one_pass_when_the_forecast_holds_and_two_when_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = draw_video(tmp_path / "raw" / "v.mp4", frames=40, options=H264)
    made = passes(monkeypatch)
    run(tmp_path / "raw", tmp_path / "right", frames=5)
    assert made == [True]
    # The table of durations says that the first frame lasts a hundred times as long.
    data = bytearray(video.read_bytes())
    stts = data.index(b"stts")
    assert int.from_bytes(data[stts + 8 : stts + 12], "big") == 1
    made.clear()
    real = forecast_times(video)
    assert real is not None
    wrong = real * np.linspace(0.1, 1, len(real))
    monkeypatch.setattr(_build, "forecast_times", lambda path, inside: wrong)
    run(tmp_path / "raw", tmp_path / "wrong", frames=5)
    assert made == [True, False]
    assert hashes(tmp_path / "right") == hashes(tmp_path / "wrong")
    for count in (39, 41, 400):  # more or fewer frames than there are
        made.clear()
        monkeypatch.setattr(
            _build, "forecast_times", lambda path, inside, n=count: np.arange(n) / 25
        )
        run(tmp_path / "raw", tmp_path / f"{count}", frames=5)
        assert made == [True, False]
        assert hashes(tmp_path / "right") == hashes(tmp_path / f"{count}")


def test_a_variable_rate_and_a_rotated_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uneven = ("-vf", "setpts=N*N/250/TB", "-fps_mode", "vfr", *H264)
    draw_video(tmp_path / "raw" / "uneven.mp4", frames=40, options=uneven)
    anamorphic = ("-vf", "setsar=4/3", *H264, "-color_range", "pc", "-colorspace", "bt709")
    draw_video(tmp_path / "raw" / "anamorphic.mp4", frames=20, options=anamorphic)
    (tmp_path / "raw" / "turned.mov").symlink_to(shared("clips/video_90.mov"))
    made = passes(monkeypatch)
    run(tmp_path / "raw", tmp_path / "forecast", frames=3)
    assert made.count(True) == 3
    all_decoded(monkeypatch)
    run(tmp_path / "raw", tmp_path / "all", frames=3)
    assert hashes(tmp_path / "forecast") == hashes(tmp_path / "all")
