"""The sets of frames that the parts read: cut from the kit's, or drawn where there is no kit.

The kit (``.gpu/``, made by ``make gpu-kit``) holds real frames. Its sets are too small for batches
of 512, so a larger one is cut from them: other runs of the same frames, the same bytes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.table import Table, arguments
from shards.atomic import write_json
from shards.format import Manifest
from shards.opening import open_shards
from shards.writer import ShardWriter
from tests.made_shards import make_set

if TYPE_CHECKING:
    import torch

KIT = Path(os.environ.get("SECO_GPU_KIT") or Path(__file__).resolve().parents[2] / ".gpu")
CLIPS, LABELLED = KIT / "clips" / "clips.json", KIT / "hmdb51" / "hmdb51.json"
_LEAST_SHORT_EDGE = 200  # of frames that are to stand for those of a set prepared at 256 px


def clips(work: Path, size: tuple[int, int]) -> str:
    """The manifest of the kit's clips, or of drawn ones of this (height, width)."""
    if CLIPS.is_file():
        return str(CLIPS)
    drawn = work / "drawn.json"
    if not drawn.is_file():
        make_set(work, videos=12, frames=8, name="drawn", size=size)
    return str(drawn)


def labelled(work: Path) -> str:
    """The manifest of the kit's labelled clips, with a train and a test split, or of drawn ones."""
    if LABELLED.is_file():
        return str(LABELLED)
    drawn = work / "labelled.json"
    if not drawn.is_file():
        make_set(work, videos=24, frames=4, name="labelled")
    return str(drawn)


def cut_set(source: str, folder: Path, name: str, videos: int, frames: int, per_shard: int) -> str:
    """Write a set of runs of ``frames`` frames of the videos of ``source``, again and again.

    Returns:
        the manifest's path; a set that is there already is kept.
    """
    manifest = folder / f"{name}.json"
    if manifest.is_file():
        return str(manifest)
    given = open_shards([source])
    records = [given.record(video) for video in range(len(given))]
    large = [v for v, r in enumerate(records) if min(r.width, r.height) >= _LEAST_SHORT_EDGE]
    taken = large or list(range(len(given)))
    counts = [given.frame_count(video) for video in taken]
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for number, begin in enumerate(range(0, videos, per_shard)):
        with ShardWriter(folder / f"{name}-{number:03d}.tar", "digest") as writer:
            for video in range(begin, min(begin + per_shard, videos)):
                turn, place = divmod(video, len(taken))
                first = turn * frames
                jpegs = [
                    given.read_frame(taken[place], (first + f) % counts[place])
                    for f in range(frames)
                ]
                record = dataclasses.replace(
                    records[taken[place]],
                    key=f"video_{video:05d}",
                    frame_times=[f / 25 for f in range(frames)],
                )
                writer.add(record, jpegs)
        assert writer.info is not None
        infos.append(writer.info)
    made = Manifest(
        name=name,
        dataset="folder",
        settings={},
        ffmpeg_version="none",
        label_names=[],
        shards=infos,
        excluded=0,
    )
    write_json(manifest, made.to_dict())
    return str(manifest)


def large_set(work: Path, device: torch.device) -> str:
    """1,024 videos of 8 frames, for batches of 512; on the CPU 32 videos of 3 frames."""
    on_gpu = device.type == "cuda"
    videos, frames = (1024, 8) if on_gpu else (32, 3)
    source = clips(work, (256, 340) if on_gpu else (48, 64))
    return cut_set(source, work, "large", videos, frames, videos // 8)


def main() -> int:
    """Make the sets, and load all code that later parts use: a missing package shows up here."""
    given = arguments(__doc__)
    import cli  # noqa: F401
    import seco.evaluation.probe
    import seco.features.extract
    import seco.training.pretrain
    import seco.training.track  # noqa: F401

    table = Table(given.device)
    table.row("frames", f"real ({KIT})" if CLIPS.is_file() else "drawn: no kit")
    began = time.perf_counter()
    made = open_shards([large_set(given.work, given.device)])
    table.row("set for batches", f"{len(made)} videos, {made.total_bytes / 1e6:.0f} MB")
    table.row("made in", f"{time.perf_counter() - began:.1f} s")
    return table.exit_code()


if __name__ == "__main__":
    sys.exit(main())
