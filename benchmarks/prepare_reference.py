"""What preparing is compared with: its physical limit, and the plain ways to do it.

All decode in one thread, as ours does: what counts is CPU time, and threads only add to it.
"""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

from pipelines._colour import Planes, encode_jpeg, jpeg_planes
from pipelines._decode import decoding, output_argv, pictures, scaled, scaled_size
from pipelines._ffmpeg import local_url
from pipelines._plan import FrameChoice
from shards.errors import InputError


def decode_to_null(path: Path, short_edge: int, binary: str) -> None:
    """The limit's first half: the same ffmpeg with the same filters, whose frames go nowhere."""
    stream = scaled(pictures(), short_edge).output(
        "-", format="null", fps_mode="passthrough", filter_threads=1
    )
    _run(output_argv(stream, binary, path))


def stored_planes(path: Path, short_edge: int, choice: FrameChoice, binary: str) -> list[Planes]:
    """What the limit's second half encodes: the planes of all frames that would be stored."""
    chooser = choice.chooser()
    planes = []
    with decoding(path, short_edge=short_edge, timeout_seconds=600, binary=binary) as decoded:
        frames = [kept for frame in decoded for kept in chooser.offer(frame)] + chooser.finish()
        for frame in frames:
            planes.append(jpeg_planes(frame.planes, decoded.width, decoded.height, *frame.colour))
    return planes


def encode_all(planes: list[Planes], quality: int) -> None:
    """The limit's second half: libjpeg-turbo and nothing else."""
    for picture in planes:
        encode_jpeg(picture, quality)


def jpeg_files_in_tar(path: Path, short_edge: int, binary: str, folder: Path) -> Path:
    """(a): ffmpeg writes JPEG files (``-q:v 2``), which are then put into a tar."""
    width, height = scaled_size(short_edge)
    images = folder / "images"
    images.mkdir()
    _run(
        [
            *(binary, "-nostdin", "-hide_banner", "-nostats", "-loglevel", "error"),
            *("-threads", "1", "-i", local_url(path), "-map", "0:V:0"),
            *("-vf", f"scale=w='{width}':h='{height}',setsar=1", "-filter_threads", "1"),
            *("-fps_mode", "passthrough", "-q:v", "2", "-threads", "1"),
            f"{images}/%06d.jpg",
        ]
    )
    tar = folder / "images.tar"
    with tarfile.open(tar, "w") as out:
        for image in sorted(images.iterdir()):
            out.add(image, image.name)
            image.unlink()
    images.rmdir()
    return tar


def encode_again_first(path: Path, short_edge: int, binary: str, folder: Path) -> Path:
    """(b): a small H.264 video first, as many scripts for Kinetics make it, then (a) on it."""
    width, height = scaled_size(short_edge)
    small = folder / "small.mp4"
    _run(
        [
            *(binary, "-nostdin", "-hide_banner", "-nostats", "-loglevel", "error"),
            *("-threads", "1", "-i", local_url(path), "-map", "0:V:0"),
            *("-vf", f"scale=w='{width}':h='{height}',setsar=1", "-filter_threads", "1"),
            *("-c:v", "libx264", "-crf", "23", "-pix_fmt", "yuv420p", "-threads", "1"),
            *("-fps_mode", "passthrough", "-y", local_url(small)),
        ]
    )
    tar = jpeg_files_in_tar(small, short_edge, binary, folder)
    small.unlink()
    return tar


def start_ffmpeg(binary: str) -> None:
    """A run of ffmpeg that makes one tiny frame: what its start and end cost."""
    source = ("-f", "lavfi", "-i", "nullsrc=size=16x16", "-frames:v", "1")
    _run([binary, "-nostdin", "-hide_banner", "-loglevel", "error", *source, "-f", "null", "-"])


def _run(argv: list[str]) -> None:
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise InputError(
            f"this ffmpeg cannot do what is compared with ({lines[-1] if lines else 'no message'})",
            argv[0],
            "leave out SECO_FFMPEG to use the static one",
        )
