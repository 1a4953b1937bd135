"""Batches of views: the same for any number of ranks and processes, exact, and robust."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import seco.data.loader
from seco.data.crops import crop_resize, decode_jpeg
from seco.data.loader import Batch, DeviceViews, TripletLoader
from seco.data.transforms import VIEW_DRAWS, ViewConfig, apply_views, draw_views
from seco.data.triplets import FRAME_OF_VIEW
from shards.errors import InputError
from shards.opening import CacheSettings, open_shards, open_stream
from shards.stream import Stream, TripletFrames
from tests.made_shards import make_set
from tests.s3_server import bad_line, s3_bucket
from tests.shards.test_sequential import foreign_tar

SIZE = 24
VIEWS = ViewConfig()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(tmp_path_factory.mktemp("shards"), videos=60, frames=4, per_shard=13)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a batch has several, of unequal sizes."""
    monkeypatch.setattr(seco.data.loader, "_CHUNK_ROWS", 5)


def stream_of(spec: str, rank: int = 0, world_size: int = 1, **options: Any) -> Stream:
    return open_stream(spec, 28, "uniform", 9, rank=rank, world_size=world_size, **options)


def load(stream: Stream, first: int, last: int, workers: int = 0, **options: Any) -> list[Batch]:
    """Copies, because a batch's memory is used again."""
    loader = TripletLoader(
        stream, SIZE, VIEWS, workers=workers, first_step=first, last_step=last, **options
    )
    with loader:
        return [copied(batch) for batch in loader]


def copied(batch: Batch) -> Batch:
    images = None if batch.images is None else batch.images.clone()
    return Batch(**{**batch.__dict__, "images": images})


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.images is not None and other.images is not None
    assert torch.equal(one.images, other.images)
    for name in ("order", "videos", "boxes"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    np.testing.assert_array_equal(one.uniform, other.uniform)
    assert one.unreadable == other.unreadable


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("views_on", ["device", "workers"])
def test_batches_do_not_depend_on_loader_processes(spec: str, workers: int, views_on: str) -> None:
    alone = load(stream_of(spec), 0, 6, views_on=views_on)  # three epochs of two steps
    shared = load(stream_of(spec), 0, 6, workers, views_on=views_on)
    assert len(alone) == len(shared) == 6
    for one, other in zip(alone, shared, strict=True):
        assert_equal(one, other)
    videos = [tuple(batch.videos.tolist()) for batch in alone]
    assert len(set(videos)) == 6
    for epoch in range(3):
        assert len(set(videos[2 * epoch] + videos[2 * epoch + 1])) == 56


@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_ranks_share_a_batch_in_its_order(spec: str, world_size: int) -> None:
    (whole,) = load(stream_of(spec), 1, 2)
    assert whole.images is not None
    parts = [load(stream_of(spec, rank, world_size), 1, 2)[0] for rank in range(world_size)]
    images = torch.cat([part.images for part in parts if part.images is not None], dim=1)
    assert torch.equal(images, whole.images)
    for name, dim in (("order", 0), ("videos", 0), ("boxes", 1)):
        joined = torch.cat([getattr(part, name) for part in parts], dim=dim)
        assert torch.equal(joined, getattr(whole, name))
    uniform = np.concatenate([part.uniform for part in parts], axis=1)
    np.testing.assert_array_equal(uniform, whole.uniform)


@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_equals_never_stopping(spec: str, step: int, workers: int) -> None:
    whole = load(stream_of(spec), 0, 6)
    resumed = load(stream_of(spec), step, 6, workers)
    for one, other in zip(whole[step:], resumed, strict=True):
        assert_equal(one, other)


def test_a_view_is_the_crop_of_its_frame(spec: str) -> None:
    stream = stream_of(spec)
    (batch,) = load(stream, 0, 1)
    samples = stream.read(0, 0, range(28))
    assert batch.images is not None
    for row, sample in enumerate(samples):
        assert isinstance(sample, TripletFrames)
        for view, frame in enumerate(FRAME_OF_VIEW):
            image = decode_jpeg(sample.jpegs[frame])
            box = batch.boxes[view, row].tolist()
            expected = crop_resize(image, box, SIZE)
            found = batch.images[view, row].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(found, expected)
    left, top, width, height = batch.boxes.reshape(-1, 4).T
    assert (left + width <= 64).all() and (top + height <= 48).all()
    assert len({tuple(box) for box in batch.boxes.reshape(-1, 4).tolist()}) > 100
    assert (batch.boxes[0] != batch.boxes[1]).any(1).all()  # query and k1 are drawn apart
    assert len(np.unique(batch.uniform)) == batch.uniform.size


def test_views_made_by_workers_are_those_of_the_device(spec: str) -> None:
    (crops,) = load(stream_of(spec), 0, 1)
    (views,) = load(stream_of(spec), 0, 1, workers=2, views_on="workers")
    assert crops.images is not None and views.images is not None
    parameters = draw_views(crops.uniform.reshape(-1, VIEW_DRAWS), VIEWS)
    expected = apply_views(crops.images.flatten(0, 1), parameters, VIEWS)
    assert views.images.dtype == torch.float32
    torch.testing.assert_close(views.images.flatten(0, 1), expected, atol=1e-5, rtol=0)
    here = DeviceViews(CPU, SIZE, VIEWS)
    assert torch.equal(here.finished(here.crops(crops).flatten(0, 1), parameters), expected)
    finished = views.images.flatten(0, 1)
    assert here.finished(finished, parameters) is finished


def test_frames_decoded_by_the_device_give_the_same_crops(spec: str) -> None:
    (on_cpu,) = load(stream_of(spec), 0, 1)
    (raw,) = load(stream_of(spec), 0, 1, workers=2, decode="nvjpeg")
    assert raw.images is None and len(raw.jpegs) == 28
    assert torch.equal(raw.boxes, on_cpu.boxes)
    assert on_cpu.images is not None
    crops = DeviceViews(CPU, SIZE, VIEWS).crops(raw)
    apart = (crops.float() - on_cpu.images.float()).abs()
    assert apart.mean() < 1.0
    assert raw.unreadable == []


def test_a_frame_the_device_cannot_decode_is_replaced_and_named(spec: str) -> None:
    (raw,) = load(stream_of(spec), 0, 1, decode="nvjpeg")
    whole = DeviceViews(CPU, SIZE, VIEWS).crops(raw)
    broken = list(raw.jpegs)
    broken[3] = (broken[3][0], b"\xff\xd8 no picture", broken[3][2])
    raw.jpegs, name = broken, int(raw.videos[3])
    crops = DeviceViews(CPU, SIZE, VIEWS).crops(raw)
    assert len(raw.unreadable) == 1 and f"video {name}" in raw.unreadable[0]
    assert raw.videos[3] == raw.videos[4] and raw.order[3] == raw.order[4]
    others = [row for row in range(28) if row != 3]
    assert torch.equal(crops[:, others], whole[:, others])
    assert not torch.equal(crops[:, 3], whole[:, 3])
    raw.jpegs = [(b"x", b"y", b"z")] * 28
    with pytest.raises(InputError, match="no frame of a batch can be decoded"):
        DeviceViews(CPU, SIZE, VIEWS).crops(raw)


def test_a_batch_stays_while_the_next_is_read(spec: str) -> None:
    loader = TripletLoader(stream_of(spec), SIZE, VIEWS, workers=3, first_step=0, last_step=12)
    before: tuple[torch.Tensor, torch.Tensor] | None = None
    with loader:
        for batch in loader:
            assert batch.images is not None
            if before is not None:
                assert torch.equal(*before)  # valid until the next batch but one is asked for
            before = (batch.images, batch.images.clone())


def test_memory_is_never_written_while_it_is_read(spec: str) -> None:
    loader = TripletLoader(stream_of(spec), SIZE, VIEWS, workers=3, first_step=0, last_step=90)
    slots = loader._ring.slots if loader._ring is not None else 0
    loader._read = 4  # the batch of step 4 is being read, in slot 4 mod slots
    handed_out = []
    with pytest.raises(RuntimeError, match="would be overwritten"):
        for task in loader.tasks():
            handed_out.append(task)
    assert handed_out[-1].step == 4 + slots - 1
    assert {task.slot for task in handed_out if task.step > 4} == set(range(slots)) - {4 % slots}


def damage(spec: str, how: str) -> str:
    """Spoil one shard of five; returns what is said of it."""
    tar = Path(spec).parent / "made-002.tar"
    index = open_shards(spec).indexes[2]
    # In place: loaders read meanwhile, and must never see a file that is being written anew.
    if how == "flipped bit":
        data = tar.read_bytes()
        with open(tar, "r+b") as file:
            for row in range(13):
                at = index.frame_at(row, row % 4)
                middle = at.offset + at.size // 2
                file.seek(middle)
                file.write(bytes([data[middle] ^ 4]))
        return "have changed"
    if how == "truncated tar":
        os.truncate(tar, index.frame_at(2, 0).offset)
        return "ends before byte"
    tar.unlink()
    return "No such file"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["flipped bit", "truncated tar", "deleted shard"])
def test_damage_mid_epoch_is_counted_named_and_ranks_stay_in_step(
    tmp_path: Path, how: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_set(tmp_path, videos=60, frames=4, per_shard=13)
    streams = [stream_of(spec, rank, 2) for rank in range(2)]
    # Files that are open outlive their names: with one open at a time, each is opened anew.
    monkeypatch.setattr("shards.storage._MOST_OPEN", 1)
    steps = 12
    sound = [load(stream, 0, steps) for stream in streams]
    loaders = [
        TripletLoader(
            stream_of(spec, rank, 2), SIZE, VIEWS, workers=workers, first_step=0, last_step=steps
        )
        for rank in range(2)
    ]
    iterators: list[Iterator[Batch]] = [iter(loader) for loader in loaders]
    first = [copied(next(iterator)) for iterator in iterators]
    said = damage(spec, how)
    rest = [[copied(batch) for batch in iterator] for iterator in iterators]
    assert [len(batches) for batches in rest] == [steps - 1, steps - 1]
    named = [reason for batches in rest for batch in batches for reason in batch.unreadable]
    assert named and all("made-002.tar" in reason and said in reason for reason in named)
    lost = {f"video_{v:04d}" for v in range(26, 39)}
    assert {reason.partition(":")[0] for reason in named} <= lost
    for rank in range(2):
        assert_equal(first[rank], sound[rank][0])
        for found, before in zip(rest[rank], sound[rank][1:], strict=True):
            assert found.images is not None and before.images is not None
            same = found.videos == before.videos
            assert torch.equal(found.images[:, same], before.images[:, same])
            assert (~same).sum() <= len(found.unreadable)
    # What replaces a sample is the same for whoever makes the batch.
    settled = range(6, steps)  # made after the damage
    again = load(stream_of_damaged(spec, 0), settled.start, steps, 2 - workers)
    for one, other in zip(rest[0][settled.start - 1 :], again, strict=True):
        assert_equal(one, other)


def stream_of_damaged(spec: str, rank: int) -> Stream:
    """Opened before the damage, as far as it can tell."""
    tar = Path(spec).parent / "made-002.tar"
    damaged = tar.read_bytes() if tar.exists() else None
    size = open_index(tar).info.bytes
    tar.write_bytes(bytes(size))
    stream = stream_of(spec, rank, 2)
    if damaged is None:
        tar.unlink()
    else:
        tar.write_bytes(damaged)
    return stream


def open_index(tar: Path) -> Any:
    from shards.index import read_index

    return read_index(tar.with_suffix(".idx"))


def test_a_gap_that_no_video_keeps_is_no_fault_of_the_shards(tmp_path: Path) -> None:
    stream = stream_of(make_set(tmp_path, videos=60, frames=4), max_gap_seconds=0.01)
    with pytest.raises(InputError, match=r"no three frames within .* raise --max-gap-seconds or"):
        load(stream, 0, 1)


def test_a_set_that_is_gone_ends_in_one_line(tmp_path: Path) -> None:
    spec = make_set(tmp_path, videos=60, frames=4, per_shard=13)
    for workers in (0, 2):
        stream = stream_of(spec)
        files = {tar: tar.read_bytes() for tar in tmp_path.glob("*.tar")}
        for tar in files:
            tar.unlink()
        with pytest.raises(
            InputError, match=r"21 videos in a row cannot be read.*seco verify"
        ) as e:
            load(stream, 0, 2, workers)
        assert "\n" not in str(e.value)
        for tar, content in files.items():
            tar.write_bytes(content)


def test_a_frame_that_is_no_jpeg_is_replaced(tmp_path: Path) -> None:
    """As stored: its CRC is right, but it does not decode."""
    import io
    import tarfile

    foreign_tar(tmp_path / "f-0.tar", range(20))
    with tarfile.open(tmp_path / "f-1.tar", "w") as tar:
        for frame, data in enumerate([b"no picture", b"\xff\xd8\xff", b"x" * 99]):
            info = tarfile.TarInfo(f"bad.{frame}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    stream = open_stream(f"{tmp_path}/f-*.tar", 21, "uniform", 0)
    for decode in ("cpu", "nvjpeg"):
        (batch,) = load(stream, 0, 1, decode=decode)
        assert len(batch.unreadable) == 1
        assert "bad: broken JPEG" in batch.unreadable[0]
        assert 20 not in batch.videos


@pytest.mark.parametrize("fault", ["drop", "slow"])
def test_over_a_bad_line_the_batches_are_the_same(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    import fsspec

    expected = load(stream_of(spec, window_shards=2), 0, 4)
    with s3_bucket(monkeypatch) as bucket:
        fsspec.filesystem("s3").put(f"{Path(spec).parent}/", f"{bucket}/", recursive=True)
        with bad_line(monkeypatch, fault) as line:
            cache = CacheSettings(str(tmp_path / "cache"))
            remote = f"{bucket}/made.json"
            for options in ({"cache": cache}, {}):
                stream = stream_of(remote, window_shards=2, **options)
                for one, other in zip(load(stream, 0, 4, workers=2), expected, strict=True):
                    assert_equal(one, other)
            assert line.spoilt > 4


def test_streamed_shards_load_in_several_processes(tmp_path: Path) -> None:
    for shard in range(2):
        foreign_tar(tmp_path / f"f-{shard}.tar", range(shard * 10, shard * 10 + 10))
    spec = f"pipe:cat {tmp_path}/f-{{0..1}}.tar"
    counts = []
    for rank in range(2):
        stream = open_stream(spec, 12, "uniform", 0, steps_per_epoch=3, rank=rank, world_size=2)
        batches = load(stream, 0, 7, workers=2)
        counts.append(len(batches))
        for batch in batches:
            assert batch.images is not None and batch.images.shape == (4, 6, 3, SIZE, SIZE)
            assert batch.images.float().std() > 10
            assert not batch.unreadable
        assert len({int(v) for batch in batches for v in batch.videos}) > 8
    assert counts == [7, 7]


def test_streams_with_nothing_to_read_end_in_one_line(tmp_path: Path) -> None:
    for workers in (0, 2):
        stream = open_stream(
            f"pipe:cat {tmp_path}/none.tar 2>/dev/null", 4, "uniform", 0, steps_per_epoch=3
        )
        with pytest.raises(InputError, match="no video can be read") as caught:
            load(stream, 0, 2, workers)
        assert "\n" not in str(caught.value)


def test_loader_processes_leave_no_descriptors_behind(spec: str) -> None:
    opened: Callable[[], int] = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    load(stream_of(spec), 0, 2, workers=2)
    before = opened()
    for _ in range(3):
        load(stream_of(spec), 0, 2, workers=2)
    assert opened() <= before + 8


RAISING = """
import sys
from shards.opening import open_stream
from shards.stream import TripletStream
from seco.data.loader import TripletLoader
from seco.data.transforms import ViewConfig
if __name__ == "__main__":
    read = TripletStream.read
    def broken(self, epoch, step, rows):
        return read(self, epoch, step, rows) if step == 0 else {}["nothing"]
    TripletStream.read = broken
    stream = open_stream(sys.argv[1], 28, "uniform", 0)
    loader = TripletLoader(stream, 24, ViewConfig(), workers=2, first_step=0, last_step=2)
    with loader:
        for batch in loader:
            print("a batch", flush=True)
"""


def test_a_fault_in_a_loader_process_ends_the_run(spec: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RAISING, spec], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert done.stdout == "a batch\n"
    assert "KeyError: 'nothing'" in done.stderr


def test_a_stream_of_several_chunks_with_nothing_to_read(tmp_path: Path) -> None:
    for workers in (0, 1):
        stream = open_stream("pipe:false", 24, "uniform", 0, steps_per_epoch=3)
        with pytest.raises(InputError, match="no video can be read"):
            load(stream, 0, 2, workers)
