"""Decoding: sizes, times, and what is refused."""

from __future__ import annotations

import os
import time
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines._decode import DecodeError, decoding
from pipelines._ffmpeg import ffmpeg_binary, run_ffmpeg
from tests.data import shared
from tests.pipelines.made_videos import decode, draw_video, stored_pictures


def size_of(path: Path, short_edge: int = 256) -> tuple[int, int]:
    return stored_pictures(path, short_edge=short_edge, most=1).shape[2:0:-1]


@pytest.mark.parametrize(
    ("clip", "size"),
    [
        ("jesse_dance.mp4", (456, 256)),  # 1280x720
        ("making_cake.mp4", (256, 342)),  # portrait
        ("arm_wrestling_demo.mp4", (426, 256)),  # 340x256 with pixels of 64:51
        ("flipping_a_pancake.mkv", (426, 240)),  # smaller than asked for: stays
        ("unordered.mov", (50, 50)),
        ("video_90.mov", (256, 454)),  # 568x320 turned upright
        ("av1_video.mkv", (456, 256)),
        ("h265_video.mp4", (128, 128)),
        ("v_biking_01_01.mpg", (320, 240)),
    ],
)
def test_sizes(clip: str, size: tuple[int, int]) -> None:
    assert size_of(shared(f"clips/{clip}")) == size


@pytest.mark.parametrize(("size", "stored"), [("51x37", "50x36"), ("601x303", "508x256")])
def test_odd_sides_become_even_and_never_larger(tmp_path: Path, size: str, stored: str) -> None:
    video = draw_video(tmp_path / "odd.mkv", size=size, frames=2, options=("-c:v", "ffv1"))
    assert "{}x{}".format(*size_of(video)) == stored


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_applied(degrees: int) -> None:
    path = shared(f"clips/video_{degrees}.mov")
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    ours = stored_pictures(path, short_edge=2000, most=1)[0]
    assert ours.shape == upright.shape
    assert np.abs(ours.astype(float) - upright).mean() < 4  # any other turn: 44 and more


@pytest.mark.parametrize("clip", ["unordered.mov", "v_biking_01_01.mpg", "nasa_13013.mp4"])
def test_times_are_those_of_another_decoder(clip: str) -> None:
    path = shared(f"clips/{clip}")
    with av.open(str(path)) as container:
        expected = [float(frame.time) for frame in container.decode(video=0)]
    ours = decode(path)
    assert len(ours) == len(expected)
    assert ours[0] == 0.0
    np.testing.assert_allclose(ours, np.array(expected) - expected[0], atol=2e-3)


def test_times_of_a_variable_rate(tmp_path: Path) -> None:
    uneven = ("-vf", "setpts=N*N/25/TB", "-fps_mode", "vfr", "-c:v", "ffv1")
    video = draw_video(tmp_path / "uneven.mkv", frames=6, options=uneven)
    assert decode(video) == pytest.approx([n * n / 25 for n in range(6)], abs=2e-3)


def test_what_the_container_says_is_kept() -> None:
    path = shared("clips/v_biking_01_01.mpg")
    with decoding(path, short_edge=256, timeout_seconds=60, binary=ffmpeg_binary()) as decoded:
        count = sum(1 for _ in decoded)
    assert (decoded.source_fps, decoded.source_duration) == (29.97, 5.02)
    assert len(decoded.times) == count == 151


@pytest.mark.parametrize("name", ["-i.avi", "a:b.avi", "http:x.avi", "%03d.avi", "a'b,[c];d.avi"])
def test_names_that_look_like_something_else(tmp_path: Path, name: str) -> None:
    assert len(decode(draw_video(tmp_path / name))) == 8


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{path}'\n",
    "dash": '<?xml version="1.0"?><MPD profiles="urn:mpeg:dash:profile:isoff-main:2011"><BaseURL>'
    "{url}</BaseURL></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".avi"])
def test_a_playlist_dressed_as_a_video_is_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    target = draw_video(tmp_path / "target.ts", options=("-c:v", "mpeg2video"))
    path = tmp_path / f"clip{suffix}"
    path.write_text(PLAYLISTS[kind].format(url=f"file://{target}", path=target))
    with pytest.raises(DecodeError) as caught:
        decode(path)
    assert caught.value.kind == "unreadable"
    assert str(tmp_path) not in caught.value.message


def test_kinds_of_failure(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    whole = draw_video(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    sound = ("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac")
    run_ffmpeg([*sound, f"file:{tmp_path}/sound.mp4"])
    found = {}
    for name in ("none.mp4", "empty.mp4", "text.mp4", "cut.mp4", "sound.mp4"):
        with pytest.raises(DecodeError) as caught:
            decode(tmp_path / name)
        found[name] = caught.value.kind
        assert "0x" not in caught.value.message
        assert str(tmp_path) not in caught.value.message
    assert found == {
        "none.mp4": "missing",
        "empty.mp4": "unreadable",
        "text.mp4": "unreadable",
        "cut.mp4": "unreadable",
        "sound.mp4": "no-video-stream",
    }


def test_a_video_without_one_whole_frame(tmp_path: Path) -> None:
    video = draw_video(tmp_path / "a.mp4", frames=2, options=("-c:v", "mpeg4"))
    data = bytearray(video.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - start)
    video.write_bytes(data)
    with pytest.raises(DecodeError) as caught:
        decode(video)
    assert caught.value.kind == "zero-frames"


def test_a_damaged_video_gives_the_frames_that_decode() -> None:
    # One of its 50 packets cannot be decoded at all; ffmpeg ends without an error.
    times = decode(shared("clips/corrupted.mp4"))
    assert len(times) == 49
    assert times == sorted(times)


def test_a_picture_that_changes_size_is_refused(tmp_path: Path) -> None:
    stream = ("-c:v", "mpeg2video")
    parts = [
        draw_video(tmp_path / f"{size}.ts", size=size, options=stream).read_bytes()
        for size in ("64x48", "32x24")
    ]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.raises(DecodeError, match="changes from 64x48 to 32x24"):
        decode(tmp_path / "both.ts")


def test_a_stuck_video_ends_at_the_time_limit(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stuck.mp4")
    began = time.monotonic()
    with pytest.raises(DecodeError) as caught:
        decode(tmp_path / "stuck.mp4", timeout_seconds=0.5)
    assert caught.value.kind == "timeout"
    assert time.monotonic() - began < 10
