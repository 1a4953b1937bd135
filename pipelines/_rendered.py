"""A small labelled set of real encoded videos, drawn where no data set is at hand.

The set has UCF101's layout, so that it takes the way any UCF101 copy takes::

    OUT/UCF-101/<Class>/v_<Class>_gNN_cNN.(avi|mp4|webm|mkv|mov)
    OUT/ucfTrainTestlist/classInd.txt, trainlist01.txt, testlist01.txt

It is no benchmark: its numbers compare features with one another on this set only. What the eight
classes show, and what is kept equal among them, is told in ``_rendered_scenes.py``. As in UCF101,
the clips of a group share their surroundings; here group NN of every class has the same background
pattern, and the first third of the groups is the test list.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from pipelines._ffmpeg import FfmpegError, ffmpeg_binary, kill_running, local_url, run_ffmpeg
from pipelines._rendered_scenes import CLASSES, render_clip
from shards.atomic import atomic_path, write_text
from shards.errors import InputError
from shards.progress import progress

CLIPS_PER_GROUP = 3
TEST_SHARE = 1 / 3  # of the groups, the first ones, as in UCF101
# Sets of colours, taken by the groups in turn whatever the class. Few, so that colour does not tell
# the videos apart in pre-training either and the network has to look at what is shown.
PALETTES = 3
FRAMES_PER_SECOND = (25, 30, 24, 15)

# Width and height; most clips have the first.
FRAME_SIZES = ((160, 120), (160, 120), (160, 120), (176, 144), (192, 108), (120, 160), (128, 128))

# Suffix, ffmpeg's name of the container, options of the encoder. All write the same bytes for the
# same pixels on one thread (in real-time mode VP8's bytes would depend on how busy the machine is).
ENCODINGS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (".avi", "avi", ("-c:v", "mpeg4", "-q:v", "3")),
    (".mp4", "mp4", ("-c:v", "libx264", "-preset", "veryfast", "-crf", "20")),
    (".webm", "webm", ("-c:v", "libvpx", "-deadline", "good", "-cpu-used", "5", "-b:v", "1M")),
    (".mkv", "matroska", ("-c:v", "mjpeg", "-q:v", "3")),
    (".mov", "mov", ("-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-g", "8")),
    (
        ".webm",
        "webm",
        ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "1M"),
    ),
)


@dataclass(frozen=True)
class _Clip:
    """One video of the plan; everything about it but its pixels."""

    class_name: str
    class_index: int
    group: int
    take: int
    width: int
    height: int
    rate: int
    suffix: str
    container: str
    encoder: tuple[str, ...]

    @property
    def listed(self) -> str:
        """Its name in the list files: the path below ``UCF-101/``."""
        stem = f"v_{self.class_name}_g{self.group:02d}_c{self.take:02d}"
        return f"{self.class_name}/{stem}{self.suffix}"


def render_demo_set(
    out: Path, *, clips_per_class: int = 36, seed: int = 0, workers: int | None = None
) -> None:
    """Render and encode the demo set below ``out``; the list files are written last.

    The same arguments give the same files, byte for byte, with the same ffmpeg and numpy.

    Args:
        out: gets ``UCF-101/`` and ``ucfTrainTestlist/``; clips of an earlier call are replaced.
        clips_per_class: videos of each of the eight classes, in groups of three.
        seed: another number gives other videos.
        workers: processes; by default one for each CPU that may be used.

    Raises:
        InputError: fewer than two groups a class (then one list would be empty), ``out`` already
            holds other videos or cannot be written to, or the ffmpeg in use lacks an encoder.
    """
    if seed < 0:
        raise InputError(f"{seed} is negative", "--seed")
    if clips_per_class <= CLIPS_PER_GROUP:
        raise InputError(
            f"{clips_per_class} clips a class leave no group for the test list",
            "clips_per_class",
            f"ask for at least {CLIPS_PER_GROUP + 1}",
        )
    videos = out / "UCF-101"
    clips = list(_plan(clips_per_class))
    _refuse_other_files(videos, clips)
    workers = workers or _usable_cpus()
    with progress("rendering the demo set", len(clips), "videos") as shown:
        if workers == 1:
            for clip in clips:
                _write_clip(clip, videos, seed)
                shown.advance()
        else:
            # Not fork: the caller may have started threads (torch does).
            with ProcessPoolExecutor(
                workers, mp_context=get_context("spawn"), initializer=_start_worker
            ) as pool:
                jobs = [pool.submit(_write_clip, clip, videos, seed) for clip in clips]
                try:
                    for job in as_completed(jobs):
                        job.result()
                        shown.advance()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    _write_lists(out / "ucfTrainTestlist", clips)


def _plan(clips_per_class: int) -> Iterator[_Clip]:
    for class_index, class_name in enumerate(CLASSES):
        for number in range(clips_per_class):
            # By number alone: sizes, rates and codecs are the same in every class.
            suffix, container, encoder = ENCODINGS[number % len(ENCODINGS)]
            width, height = FRAME_SIZES[number % len(FRAME_SIZES)]
            yield _Clip(
                class_name=class_name,
                class_index=class_index,
                group=number // CLIPS_PER_GROUP + 1,
                take=number % CLIPS_PER_GROUP + 1,
                width=width,
                height=height,
                rate=FRAMES_PER_SECOND[number % len(FRAMES_PER_SECOND)],
                suffix=suffix,
                container=container,
                encoder=encoder,
            )


def _refuse_other_files(videos: Path, clips: list[_Clip]) -> None:
    expected = {videos / clip.listed for clip in clips}
    for found in sorted(videos.glob("*/*")):
        if found not in expected and found.suffix != ".part":
            raise InputError(
                "the folder already holds videos that are not of this demo set",
                found,
                "choose another folder, or remove this one",
            )


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent must not leave workers behind: their queue alone would keep them waiting."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        kill_running()
        os._exit(1)


def _write_clip(clip: _Clip, videos: Path, seed: int) -> None:
    frames = render_clip(
        clip.class_name,
        width=clip.width,
        height=clip.height,
        scene=np.random.default_rng((seed, 0, clip.group)),
        palette=np.random.default_rng((seed, 2, clip.group % PALETTES)),
        take=np.random.default_rng((seed, 1, clip.class_index, clip.group, clip.take)),
    )
    # Motion JPEG is full range by custom; the others are read as limited range.
    pixels = "yuvj420p" if "mjpeg" in clip.encoder else "yuv420p"
    with atomic_path(videos / clip.listed) as temporary:
        arguments = [
            *("-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"),
            *("-s", f"{clip.width}x{clip.height}", "-r", str(clip.rate), "-i", "pipe:0"),
            *("-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact"),
            *("-map_metadata", "-1", "-pix_fmt", pixels, *clip.encoder),
            *("-f", clip.container, "-y", local_url(temporary)),
        ]
        try:
            run_ffmpeg(arguments, stdin=frames.tobytes())
        except FfmpegError as error:
            raise InputError(
                f"this ffmpeg could not write {clip.suffix} with {clip.encoder[1]} ({error})",
                ffmpeg_binary(),
                "unset SECO_FFMPEG to use imageio-ffmpeg's, which can",
            ) from error


def _write_lists(folder: Path, clips: list[_Clip]) -> None:
    groups = max(clip.group for clip in clips)
    last_test_group = max(1, round(groups * TEST_SHARE))
    names = [f"{index} {name}" for index, name in enumerate(CLASSES, start=1)]
    test = [clip.listed for clip in clips if clip.group <= last_test_group]
    train = [
        f"{clip.listed} {clip.class_index + 1}" for clip in clips if clip.group > last_test_group
    ]
    for name, lines in (("classInd", names), ("trainlist01", train), ("testlist01", test)):
        write_text(folder / f"{name}.txt", "\n".join(lines) + "\n")


def _usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
