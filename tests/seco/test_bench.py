"""``seco bench``, of each stage: that what they compare is what they say."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cli
from benchmarks import extract as bench_extract
from benchmarks import loader_reference as reference
from benchmarks import measuring
from benchmarks.step import _loss_memory, peak_bytes
from benchmarks.step_ways import time_alone
from seco.config import ExtractConfig, PretrainConfig
from seco.data.frames import VideoFrames
from seco.data.transforms import ViewConfig, normalise
from shards.opening import open_shards
from tests.made_shards import drawn_frame, make_set
from tests.pipelines.test_bench import figures
from tests.seco.made_features import write_clusters


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(tmp_path_factory.mktemp("bench"), videos=16, frames=5, per_shard=8)


def printed(command: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert cli.run(["bench", *command]) == 0
    return capfd.readouterr().out


def test_loader(spec: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wide = make_set(tmp_path, videos=8, size=(30, 90), name="wide", first=16)
    command = ["loader", "--shards", spec, "--shards", wide, "--triplets", "8", "--repeats", "1"]
    command += ["--workers", "1"]
    found = json.loads(printed([*command, "--only-costs", "--json"], capfd))
    assert set(found["costs"]) > {"ours", "limit", "plain chain"}
    assert len(found["ratios"]) == 6
    assert found["frames"]["bytes_read_beyond_its_frames"] < 4096
    assert found["order"]["videos"] == 10**9
    numbers = figures([found[part] for part in ("costs", "ratios", "scaling", "order")])
    assert len(numbers) > 15
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    text = printed([*command, "--only-costs"], capfd)
    assert "| of the limit |" in text and "Limit: decode by libjpeg-turbo" in text


def test_views(spec: str, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["views", "--shards", spec, "--repeats", "1", "--device", "cpu", "--batch", "4"]
    found = json.loads(printed([*command, "--json"], capfd))
    assert set(found["decode"]) == set(reference.decoders())
    assert set(found["resize"]) == set(reference.resizers())
    assert found["device"]["images"] == 4
    numbers = figures([found[part] for part in ("decode", "resize", "plain", "device")])
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert "| torch, uint8 |" in printed(command, capfd)


def test_step(spec: str, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = ["--arch", "resnet18", "--crop-size", "32", "--batch-size", "8", "--queue-size", "4096"]
    sizes += ["--bn-group", "8"]  # one forward
    command = ["step", *sizes, "--device", "cpu", "--repeats", "1", "--workers", "0"]
    found = json.loads(printed([*command, "--only-step", "--shards", spec, "--json"], capfd))
    assert set(found["milliseconds"]) == {
        "ours",
        "ours, from crops",
        "bare cost, contiguous",
        "bare cost, channels_last",
        "end to end, real loader",
        "end to end, one batch of crops",
    }
    assert set(found["ratios"]) == {"ours, of the bare cost", "end to end, of synthetic"}
    assert found["checkpoint"]["megabytes"] > 100  # both encoders, momentum, queue
    numbers = figures([found[part] for part in ("milliseconds", "ratios", "loss_memory")])
    assert all(math.isfinite(number) and number > 0 for number in numbers)


def test_extract(spec: str, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = ["--arch", "resnet18", "--crop-size", "32", "--short-edge", "36", "--frames", "4"]
    command = ["extract", "--shards", spec, *sizes, "--device", "cpu", "--workers", "1"]
    found = json.loads(printed([*command, "--repeats", "1", "--json"], capfd))
    ways = {"ours", "bare forwards", "bare forwards, side by side", "the plain way"}
    assert set(found["videos_s"]) == set(found["cpu_ms"]) == ways
    assert found["settings"]["frames"] == 64
    assert found["ratios"]["times the plain way"] == pytest.approx(
        found["videos_s"]["ours"] / found["videos_s"]["the plain way"]
    )
    numbers = figures([found[part] for part in ("videos_s", "ratios", "cpu_ms", "decode_cpu_ms")])
    assert len(numbers) == 16
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert "| of bare forwards |" in printed([*command, "--repeats", "1"], capfd)


def test_track(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["track", "--arch", "resnet18", "--feature-layer", "layer2", "--batch-size", "2"]
    command += ["--device", "cpu", "--repeats", "1"]
    found = json.loads(printed([*command, "--json"], capfd))
    assert set(found["tracking"]) == set(found["training"]) == {"ours", "bare cost", "plain"}
    assert found["training_ratios"]["bare cost, of ours"] == pytest.approx(
        found["training"]["bare cost"] / found["training"]["ours"]
    )
    assert found["fps"]["ours"] == pytest.approx(1e3 / found["tracking"]["ours"])
    parts = ("tracking", "tracking_ratios", "training", "training_ratios", "fps", "pairs_s")
    numbers = figures([found[part] for part in parts])
    assert len(numbers) == 16
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert "| a frame tracked | ms |" in printed(command, capfd)


def test_the_plain_way_gives_the_crops_of_ours(spec: str) -> None:
    """Resized and cut alike, so that what is compared is the same work."""
    config = ExtractConfig(frames=2, short_edge=40, crop_size=32, batch_size=4, arch="resnet18")
    config = dataclasses.replace(config, checkpoint="random")
    shards = open_shards([spec])
    frames = VideoFrames(shards, 2, 40, 32)
    ways = bench_extract._Ways(config, torch.device("cpu"), shards, frames, 32)
    plain = list(ways._plain_images())
    assert len(plain) == 16
    for video, images in enumerate(plain):
        crops, reason = frames.video(video)
        assert not reason
        # The set is enlarged to 40 px; libjpeg-turbo and PIL's own libjpeg differ by rounding.
        assert (normalise(crops) - images).abs().mean() < 0.02


def test_the_loss_needs_no_matrix_of_all_logits() -> None:
    assert peak_bytes(lambda: torch.ones(1000, 1000) + 1) == pytest.approx(8e6, rel=0.01)
    needed = _loss_memory(PretrainConfig(batch_size=64, queue_size=131_072))
    assert needed["ratio"] < 1.6


def test_a_way_that_is_measured_alone_is_built_once_and_dropped() -> None:
    alive: list[weakref.ref[Any]] = []
    calls = []

    class Work:
        def __call__(self) -> None:
            calls.append(time.sleep(0.002))

    def build() -> Work:
        assert not alive
        work = Work()
        alive.append(weakref.ref(work))
        return work

    ms, peak = time_alone(build, 3, torch.device("cpu"))
    assert ms >= 2 and peak is None  # the CPU's memory is not measured
    assert len(calls) == 5 and alive[0]() is None


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["step", "--shards", "{spec}", "--batch-size", "512"], "do not fill a batch of 512"),
        (["loader", "--shards", "none.json"], "none.json: cannot be read"),
        (["loader", "--shards", "{spec}", "--triplets", "99"], "do not fill a batch of 99"),
        (["loader", "--shards", "{spec}", "--workers", "two"], "--workers: 'two' is no list"),
        (["loader", "--shards", "{spec}", "--workers", "0"], "--workers: must be 1 or more"),
        (["views", "--shards", "{spec}", "--device", "tpu"], "unknown device"),
    ],
)
def test_mistakes_are_one_line(
    spec: str, capfd: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    assert cli.run(["bench", *(part.format(spec=spec) for part in command)]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("seco: ")]
    assert len(lines) == 1 and message in lines[0]


def test_all_decoders_and_resizers_give_the_same_picture() -> None:
    data = drawn_frame(3, 0, (96, 128))
    pictures = {name: decode(data).copy() for name, decode in reference.decoders().items()}
    whole = pictures.pop("libjpeg-turbo")
    assert pictures.pop("libjpeg-turbo, half the size").shape == (48, 64, 3)
    for name, picture in pictures.items():
        assert np.abs(picture.astype(int) - whole).mean() < 2, name
    box, results = (13, 7, 90, 60), {}
    for name, resize in reference.resizers().items():
        out = np.zeros((40, 40, 3), dtype=np.uint8)
        resize(whole, box, 40, out)
        results[name] = out.astype(int)
    for name, result in results.items():
        assert np.abs(result - results["PIL"]).mean() < 1, name


def test_the_limit_and_the_plain_ways_do_all_of_the_work(spec: str) -> None:
    calls: list[Any] = []

    def decode(data: bytes) -> np.ndarray:
        calls.append(len(data))
        return np.zeros((48, 64, 3), dtype=np.uint8)

    def resize(image: Any, box: Any, size: int, out: np.ndarray) -> None:
        calls.append(tuple(box))
        out[:] = 1

    samples = [tuple(drawn_frame(v, f) for f in range(3)) for v in range(4)]
    boxes = np.arange(64).reshape(4, 4, 4)
    out = np.zeros((4, 2, 8, 8, 3), dtype=np.uint8)
    reference.limit(samples, boxes, 8, out, decode, resize)
    assert sum(isinstance(call, int) for call in calls) == 12
    boxes_used = {call for call in calls if isinstance(call, tuple)}
    assert boxes_used == {tuple(box) for box in boxes.reshape(-1, 4).tolist()}
    assert out.all()
    seen: list[Any] = []

    def transform(picture: Any) -> Any:
        seen.append(picture.size)
        return reference.plain_transform(8, ViewConfig())(picture)

    reference.plain_chain(samples, transform)
    assert seen == [(64, 48)] * 16
    tars = sorted(str(tar) for tar in Path(spec).parent.glob("*.tar"))
    for decode_all in (True, False):
        seen.clear()
        reference.streamed_by_webdataset(tars, 20, transform, decode_all=decode_all)
        assert seen == [(64, 48)] * 80  # 16 videos: it went on from the beginning


def test_medians_are_taken_in_turns() -> None:
    order: list[str] = []
    costs = iter([1.0, 5.0, 6.0, 2.0, 3.0, 7.0])
    found = measuring.in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        3,
        lambda work: (work(), next(costs))[1],  # type: ignore[func-returns-value]
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": 2.0, "b": 6.0}


def test_probe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "240", "--classes", "4", "--dimension", "24"]
    command = ["probe", *sizes, "--repeats", "1", "--device", "cpu"]
    found = json.loads(printed([*command, "--json"], capfd))
    assert found["size"] == {"rows": 240, "test_rows": 60, "dimension": 24, "classes": 4}
    assert found["agreement"]["objective_difference"] < 1e-3
    assert found["agreement"]["equal_predictions"] > 0.98
    assert found["agreement"]["classes_not_converged"] == 0
    assert set(found["liblinear"]) == {"primal_seconds_a_class", "dual_seconds_a_class"}
    spread, whole = (name for name in found["seconds"] if name != "ours")
    assert set(found["ratios"]) == {
        "of the limit, CPU seconds",
        *(f"times {way}{end}" for way in (spread, whole) for end in ("", ", CPU seconds")),
    }
    numbers = figures([found[part] for part in ("seconds", "cpu_seconds", "ratios", "solver")])
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    write_clusters(tmp_path / "f")
    command = ["probe", "--features", str(tmp_path / "f"), "--repeats", "1", "--device", "cpu"]
    text = printed([*command, "--only-ours"], capfd)
    assert "rows 39, test rows 21" in text.replace("_", " ")
    assert cli.run(["bench", "probe", "--rows", "5"]) == 1
    assert "--rows, --classes" in capfd.readouterr().err
