"""Stored colour against another decoder, and against the formulas.

The reference is PyAV's RGB with ACCURATE_RND and FULL_CHR_H_INT: within 0.06 levels of the
formulas in the mean, where its default rounds every channel down by about one.

A JPEG of 4:2:0 has half the chroma resolution of that reference, whatever wrote it: the reference
itself, put through exact 4:2:0 and back, is 27.3 dB from its former self on the worst clip here.
So pictures are compared with the reference at 4:2:0, and the bias with the untouched one too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import simplejpeg
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from pipelines._colour import full_range_chroma, full_range_luma, jpeg_planes
from pipelines._config import PrepareConfig
from pipelines._decode import decoding
from pipelines._ffmpeg import ffmpeg_binary, local_url, run_ffmpeg
from pipelines._prepare import prepare
from shards.opening import open_shards
from tests.data import shared
from tests.pipelines.made_videos import draw_video, link_into, stored_pictures
from tests.pipelines.running import run

EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def reference(path: Path, most: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    pictures = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            width, height = size or (frame.width, frame.height)
            small = frame.reformat(width, height, format="rgb24", interpolation=EXACT)
            pictures.append(small.to_ndarray())
            if len(pictures) == most:
                break
    return np.stack(pictures)


def at_half_chroma(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """``rgb`` (N, H, W, 3) with the chroma of each 2x2 pixels averaged, then spread as JPEG does.

    BT.601 by its formulas; libjpeg's "fancy" upsampling is the triangle filter 3/4, 1/4.
    """
    matrix = np.array(
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    )
    yuv = rgb @ matrix.T
    count, height, width, _ = yuv.shape
    chroma = yuv[..., 1:].reshape(count, height // 2, 2, width // 2, 2, 2).mean((2, 4))
    for axis in (1, 2):
        size = chroma.shape[axis]
        near = np.repeat(np.arange(size), 2)
        far = np.clip(near + np.tile([-1, 1], size), 0, size - 1)
        chroma = 0.75 * chroma.take(near, axis) + 0.25 * chroma.take(far, axis)
    spread = np.concatenate([yuv[..., :1], chroma], axis=-1) @ np.linalg.inv(matrix).T
    return np.clip(spread, 0, 255)


def require_same_colour(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> None:
    """PSNR of 35 dB and more; each channel's mean within 0.3 levels; mean absolute below 2."""
    assert ours.shape == theirs.shape
    difference = ours.astype(float) - at_half_chroma(theirs)
    psnr = 10 * np.log10(255**2 / (difference**2).mean())
    bias = (ours.astype(float) - theirs).mean((0, 1, 2))
    absolute = np.abs(difference).mean((0, 1, 2))
    shown = f"PSNR {psnr:.2f} dB, mean {bias.round(3)}, mean absolute {absolute.round(3)}"
    print(shown)
    assert psnr >= 35, shown
    assert (np.abs(bias) < 0.3).all(), shown
    assert (np.abs(difference.mean((0, 1, 2))) < 0.3).all(), shown
    assert (absolute < 2.0).all(), shown


CLIPS = [
    "playing_guitar.mp4",  # no matrix named: BT.601, limited
    "v_biking_01_01.mpg",  # MPEG-1: BT.601, limited
    "jesse_dance.mp4",  # BT.709, limited
    "bt709_full_range.mp4",  # BT.709, full
]


@pytest.mark.parametrize("clip", CLIPS)
def test_colour_at_the_videos_own_size(clip: str) -> None:
    path = shared(f"clips/{clip}")
    require_same_colour(stored_pictures(path, short_edge=4000), reference(path, 3))


@pytest.mark.parametrize("clip", CLIPS)
def test_colour_when_scaled(clip: str) -> None:
    path = shared(f"clips/{clip}")
    # Small pictures are all detail: quality 90 would add its own 1 to 3 levels of noise.
    ours = stored_pictures(path, short_edge=128, quality=98)
    require_same_colour(ours, reference(path, 3, (ours.shape[2], ours.shape[1])))


@pytest.mark.parametrize("pixels", ["rgb24", "gray", "yuv444p", "yuv420p10le", "yuvj422p"])
def test_colour_of_other_pixel_formats(tmp_path: Path, pixels: str) -> None:
    codec = "mjpeg" if pixels.startswith("yuvj") else "ffv1"
    options = ("-vf", f"gblur=4,format={pixels}", "-c:v", codec, "-qscale:v", "1")
    video = draw_video(tmp_path / "v.mkv", size="128x96", frames=3, options=options)
    require_same_colour(stored_pictures(video, quality=98), reference(video, 3))


def test_shards_of_default_settings_match_pyav(tmp_path: Path) -> None:
    """From raw clips through ``prepare`` as it comes (short edge 256, quality 90) and back.

    PyAV scales the way the decoder does, in the video's own 4:2:0 planes, and only then gives RGB.
    """
    link_into(tmp_path / "raw", [shared(f"clips/{clip}") for clip in CLIPS])
    prepare(PrepareConfig(dataset="folder", src=str(tmp_path / "raw"), out=str(tmp_path), frames=5))
    shards = open_shards(str(tmp_path / "raw.json"))
    assert len(shards) == len(CLIPS)
    for video in range(len(shards)):
        record = shards.record(video)
        with av.open(str(tmp_path / "raw" / record.source)) as container:
            decoded = [
                (float(frame.pts * frame.time_base), frame) for frame in container.decode(video=0)
            ]
        start = decoded[0][0] - record.frame_times[0]  # containers need not start at 0
        for number, time in enumerate(record.frame_times):
            at, frame = min(decoded, key=lambda pair: abs(pair[0] - start - time))
            assert abs(at - start - time) < 0.002
            small = frame.reformat(
                record.width,
                record.height,
                format="yuv420p",
                interpolation=EXACT,
                src_color_range=frame.color_range,
                dst_color_range=frame.color_range,
            )
            theirs = small.reformat(
                format="rgb24",
                interpolation=EXACT,
                src_colorspace=frame.colorspace,
                src_color_range=frame.color_range,
            ).to_ndarray()
            ours = simplejpeg.decode_jpeg(shards.read_frame(video, number))
            difference = ours.astype(float) - theirs
            psnr = 10 * np.log10(255**2 / (difference**2).mean())
            shown = f"{record.source} frame {number}: {psnr:.2f} dB, {difference.mean((0, 1))}"
            print(shown)
            assert psnr >= 35, shown
            assert (np.abs(difference.mean((0, 1))) < 1.0).all(), shown


GREYS = [(16, 0), (126, 128), (235, 255)]


@pytest.mark.parametrize("matrix", ["unknown", "bt709", "bt2020nc", "smpte240m"])
@pytest.mark.parametrize(("limited", "full"), GREYS)
def test_grey_stays_grey(matrix: str, limited: int, full: int) -> None:
    flat = bytes([limited]) * 64 + bytes([128]) * 32
    y, u, v = jpeg_planes(flat, 8, 8, matrix, full_range=False)
    assert (y == full).all()
    assert (u == 128).all()
    assert (v == 128).all()


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(
    ("matrix", "kr", "kb"),
    [("bt709", 0.2126, 0.0722), ("bt470bg", 0.299, 0.114), ("bt2020nc", 0.2627, 0.0593)],
)
def test_planes_of_known_colours(matrix: str, kr: float, kb: float, full_range: bool) -> None:
    def planes_of(rgb: NDArray[np.float64], kr: float, kb: float, full: bool) -> list[float]:
        y = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
        u, v = (rgb[2] - y) / (2 - 2 * kb), (rgb[0] - y) / (2 - 2 * kr)
        if full:
            return [y, u + 128, v + 128]
        return [y * 219 / 255 + 16, u * 224 / 255 + 128, v * 224 / 255 + 128]

    for rgb in np.random.default_rng(0).uniform(20, 235, (50, 3)):
        sent = [round(value) for value in planes_of(rgb, kr, kb, full_range)]
        flat = bytes([sent[0]]) * 4 + bytes(sent[1:])
        got = [float(plane.mean()) for plane in jpeg_planes(flat, 2, 2, matrix, full_range)]
        # Half a level for each rounding, the first one stretched by the change of range.
        np.testing.assert_allclose(got, planes_of(rgb, 0.299, 0.114, True), atol=1.4)


def test_ranges_are_widened_to_the_nearest_level() -> None:
    samples = np.arange(256, dtype=np.uint8)
    luma = np.clip(np.rint((samples.astype(float) - 16) * 255 / 219), 0, 255)
    chroma = np.clip(np.rint((samples.astype(float) - 128) * 255 / 224 + 128), 0, 255)
    np.testing.assert_array_equal(full_range_luma(samples), luma)
    np.testing.assert_array_equal(full_range_chroma(samples), chroma)


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(("matrix", "kr", "kb"), [("bt709", 0.2126, 0.0722), ("fcc", 0.3, 0.11)])
def test_matrices_against_floats(matrix: str, kr: float, kb: float, full_range: bool) -> None:
    """Fixed point is off by a level where the exact value is all but half-way, and has no bias."""
    height, width = 128, 96
    planes = np.random.default_rng(0).integers(16, 236, height * width * 3 // 2, dtype=np.uint8)
    luma = planes[: height * width].reshape(height, width).astype(float)
    u, v = planes[height * width :].reshape(2, height // 2, width // 2).astype(float) - 128
    if not full_range:
        luma, u, v = (luma - 16) * 255 / 219, u * 255 / 224, v * 255 / 224
    u, v = (np.kron(plane, np.ones((2, 2))) for plane in (u, v))
    red, blue = luma + 2 * (1 - kr) * v, luma + 2 * (1 - kb) * u
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    y601 = 0.299 * red + 0.587 * green + 0.114 * blue
    expected = (y601, (blue - y601) / 1.772 + 128, (red - y601) / 1.402 + 128)
    for index, got in enumerate(jpeg_planes(planes, width, height, matrix, full_range)):
        exact = expected[index] if index == 0 else expected[index][::2, ::2]
        difference = got - np.clip(np.rint(exact), 0, 255)
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 0.02
        assert abs(difference.mean()) < 0.005


@pytest.fixture(scope="module")
def two_colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose first 100 frames are BT.709, and the next 100 full-range BT.601."""
    folder = tmp_path_factory.mktemp("colours")
    for name, given in (("a", ("bt709", "tv")), ("b", ("smpte170m", "pc"))):
        tagged = ("-colorspace", given[0], "-color_range", given[1])
        encoded = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "25", *tagged)
        draw_video(folder / f"{name}.mp4", frames=100, options=encoded)
    (folder / "both.txt").write_text("file a.mp4\nfile b.mp4\n")
    path = folder / "raw" / "both.mp4"
    path.parent.mkdir()
    both = ("-f", "concat", "-i", str(folder / "both.txt"), "-c", "copy")
    run_ffmpeg([*both, local_url(path)])
    return path


@pytest.mark.parametrize(
    "settings", [{"frames": 8}, {"frames": None, "fps": 5.0}, {"clip_seconds": 3, "frames": 9}]
)
def test_every_frame_has_its_own_colour(
    two_colours: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Also if the frames to store were forecast: a change of colour makes ffmpeg count anew."""
    run(two_colours.parent, tmp_path, **settings)
    shards = open_shards(str(tmp_path))
    expected = np.concatenate(
        [stored_pictures(two_colours.parent.parent / f"{name}.mp4", most=100) for name in "ab"]
    )
    numbers = []
    for video in range(len(shards)):
        record = shards.record(video)
        for place, time in enumerate(record.frame_times):
            numbers.append(round(25 * (time + (record.start or 0.0))))
            stored = simplejpeg.decode_jpeg(shards.read_frame(video, place), "RGB")
            assert np.array_equal(stored, expected[numbers[-1]]), numbers[-1]
    assert min(numbers) < 50 and max(numbers) > 150 and len(set(numbers)) == len(numbers) >= 8


@pytest.mark.parametrize(("span", "frames"), [((0.0, 2.0), 50), ((1.0, 5.0), 100)])
def test_a_part_ends_where_it_should_after_a_change_of_colour(
    two_colours: Path, span: tuple[float, float], frames: int
) -> None:
    """ffmpeg's option -t would count again from the change, or decode to the end of the file."""
    with decoding(
        two_colours, short_edge=48, timeout_seconds=60, binary=ffmpeg_binary(), span=span
    ) as decoded:
        times = [frame.time for frame in decoded]
    assert len(times) == frames
    assert times == pytest.approx([span[0] + number / 25 for number in range(frames)])
