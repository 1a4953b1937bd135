"""The public API: what a notebook user writes, which is what the commands stand on."""

from __future__ import annotations

import json
import pydoc
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import cli
import seco
import seco.api
from pipelines._config import PrepareConfig
from seco.config import PretrainConfig, resolve_pretrain
from seco.data.loader import DeviceViews, TripletLoader
from seco.data.transforms import draw_views, view_config
from shards.opening import open_shards, open_stream
from shards.stream import NothingToRead, TripletStream
from tests.data import lacking
from tests.made_shards import make_set
from tests.seco.made_features import made_rows, write_clusters

SIZES: dict[str, Any] = {"short_edge": 40, "crop_size": 32, "device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(tmp_path_factory.mktemp("shards"), videos=27, frames=5, per_shard=9)


def test_help_shows_the_functions() -> None:
    text = pydoc.plain(pydoc.render_doc(seco))
    assert all(f"\n    {name}(" in text for name in ("prepare", "pretrain", "extract", "probe"))


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, seco; assert 'SeCo' in dir(seco); print('torch' in sys.modules)\n"
        "seco.SeCo; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(seco.__all__) == sorted(seco.api.__all__)
    for name in seco.api.__all__:
        assert (getattr(seco, name).__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="no attribute 'SeCO'"):
        seco.SeCO  # noqa: B018


def test_a_loop_of_ones_own_trains_as_the_readme_says(shards: str) -> None:
    loader = seco.triplet_loader(shards, batch_size=8, crop_size=32, workers=2)
    torch.manual_seed(0)
    model = seco.SeCo("resnet10_w16", queue_size=48, embedding_dim=16)
    before = [p.clone() for p in model.key_encoder.parameters()]
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.05, momentum=0.9)
    losses = []
    for batch in loader:
        batch = batch.to("cpu")
        assert batch.views.shape == (4, 8, 3, 32, 32)
        assert batch.views.dtype == torch.float32
        assert set(batch.order.tolist()) <= {0, 1}
        out = model(batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out)
        losses.append(float(out.loss.detach()))
        assert out.metrics.keys() == {
            f"{kind}_{task}" for kind in ("loss", "acc") for task in ("inter", "intra", "order")
        }
    assert len(losses) == len(loader) == 3
    assert np.isfinite(losses).all()
    assert model.queue is not None
    assert int(model.queue.seen) == 3 * 3 * 8
    after = model.key_encoder.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_loaders_batches_are_the_trainers(shards: str) -> None:
    config = resolve_pretrain(PretrainConfig(batch_size=8, crop_size=32, seed=3))
    stream = open_stream((shards,), 8, "uniform", 3)
    views = view_config(config)
    finish = DeviceViews(torch.device("cpu"), 32, views)
    with TripletLoader(stream, 32, views, workers=0, first_step=0, last_step=6) as trainers:
        expected = []
        for batch in trainers:
            crops = finish.crops(batch).flatten(0, 1)
            drawn = draw_views(batch.uniform.reshape(-1, batch.uniform.shape[-1]), views)
            expected.append((finish.finished(crops, drawn), batch.order, batch.videos))
    loader = seco.triplet_loader(shards, 8, 32, workers=2, seed=3)
    found = [*loader, *loader]
    assert len(found) == len(expected) == 6
    for ours, (images, order, videos) in zip(found, expected, strict=True):
        assert torch.equal(ours.views.flatten(0, 1), images)
        assert torch.equal(ours.order, order)
        assert torch.equal(ours.video, videos)
    loader.set_epoch(1)
    assert torch.equal(next(iter(loader)).crops, found[3].crops)


def test_ranks_share_a_batch(shards: str) -> None:
    whole = next(iter(seco.triplet_loader(shards, 8, 32, workers=0)))
    parts = [
        next(iter(seco.triplet_loader(shards, 8, 32, workers=0, rank=r, world_size=2)))
        for r in range(2)
    ]
    assert torch.equal(torch.cat([part.video for part in parts]), whole.video)
    assert torch.equal(torch.cat([part.crops for part in parts], dim=1), whole.crops)


def test_a_plain_dataloader_feeds_the_model(shards: str) -> None:
    transform = v2.Compose(
        [v2.RandomResizedCrop(32, antialias=True), v2.ToDtype(torch.float32, scale=True)]
    )
    dataset = seco.TripletDataset(shards, transform)
    loader = DataLoader(dataset, batch_size=9, shuffle=True, num_workers=2)
    model = seco.SeCo("resnet10_w16", queue_size=0, embedding_dim=16, bn_group=3)
    seen: list[int] = []
    for batch in loader:
        assert [tuple(view.shape) for view in batch.views] == [(9, 3, 32, 32)] * 4
        out = model(batch)
        out.loss.backward()
        model.update(out)
        seen += batch.video.tolist()
    assert sorted(seen) == list(range(27))


def test_the_datasets_triplets_are_the_streams(shards: str) -> None:
    dataset = seco.TripletDataset(shards, seed=5)
    stream = TripletStream(open_shards(shards), 1, "uniform", 5)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        for index in (0, 13, 26):
            (sample,) = stream.samples(epoch, np.array([index]))
            item = dataset[index]
            assert (item.order, item.video) == (sample.order, index)
            assert torch.equal(item.views[0], item.views[1])
            assert item.views[2].shape == (3, 48, 64)
    assert torch.equal(dataset[-1].views[3], dataset[26].views[3])
    with pytest.raises(IndexError):
        dataset[27]
    train = seco.TripletDataset(shards, split="1")
    assert len(train) == 18


def test_what_cannot_be_read_is_replaced_and_said(tmp_path: Path) -> None:
    path = make_set(tmp_path, videos=9, frames=4, per_shard=9)
    (tar,) = tmp_path.glob("*.tar")
    data = bytearray(tar.read_bytes())
    place = data.index(b"\xff\xd8\xff")  # video 0's first frame
    data[place : place + 3] = b"\0\0\0"
    tar.write_bytes(data)
    dataset = seco.TripletDataset(path, seed=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for epoch in range(6):
            dataset.set_epoch(epoch)
            found = dataset[0].video
            assert found == (1 if said else 0)
            if said:
                break
    assert "video_0000" in str(said[0].message)
    loader = seco.triplet_loader(path, 8, 32, workers=0)
    with pytest.warns(UserWarning, match="replaced by another: video_0000"):
        batches = [batch for _ in range(6) for batch in loader]
    assert sum(len(batch.unreadable) for batch in batches) >= 1


def test_features_in_memory_equal_those_of_the_command(shards: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    backbone = seco.load_backbone("random", "resnet10_w16", seed=4)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    found = seco.extract(backbone, shards, frames=3, **SIZES)
    arguments = ["extract-features", "--shards", shards, "--checkpoint", "random", "--seed", "4"]
    arguments += ["--arch", "resnet10_w16", "--frames", "3", "--out", str(tmp_path / "f")]
    arguments += ["--short-edge", "40", "--crop-size", "32", "--device", "cpu", "--workers", "0"]
    assert cli.run(arguments) == 0
    theirs = seco.read_features(tmp_path / "f")
    assert np.array_equal(found.features, theirs.features)
    assert np.array_equal(found.halves, theirs.halves)
    assert found.keys == theirs.keys
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(before[name], tensor)
    written = seco.extract(backbone, shards, tmp_path / "g", frames=3, **SIZES)
    assert np.array_equal(written.features, theirs.features)
    # Probe and recall say what the commands write.
    assert cli.run(["probe", "--features", str(tmp_path / "f"), "--method", "knn"]) == 0
    assert cli.run(["retrieve", "evaluate", "--features", str(tmp_path / "f")]) == 0
    of_knn = json.loads(next((tmp_path / "f").glob("probe-knn*/probe.json")).read_text())
    of_retrieval = json.loads((tmp_path / "f" / "retrieval.json").read_text())
    assert seco.probe(found, method="knn").top1 == of_knn["top1"]
    assert seco.recall_at_k(found, k=1) == of_retrieval["label"]["1"]
    assert seco.recall_at_k(tmp_path / "f", k=5) == of_retrieval["label"]["5"]
    result = seco.probe(found, out=str(tmp_path / "written"))
    assert json.loads((tmp_path / "written" / "probe.json").read_text())["top1"] == result.top1
    assert not (tmp_path / "f" / "probe.json").exists()
    with pytest.raises(seco.InputError, match="k: must be 1 or more"):
        seco.recall_at_k(found, k=0)


def test_without_splits_a_part_of_the_videos_is_held_out(tmp_path: Path) -> None:
    write_clusters(tmp_path / "f", rows=made_rows([n % 3 for n in range(60)], [{}] * 60))
    features = seco.read_features(tmp_path / "f")
    with pytest.raises(seco.InputError, match="--split held-out"):
        seco.probe(features)
    result = seco.probe(features, split="held-out")
    assert (result.n_train, result.n_test) == (42, 18)
    assert result.test_split == "held-out test"
    assert result.top1 > 0.9
    assert seco.recall_at_k(features, split="held-out") > 0.9
    arguments = ["retrieve", "evaluate", "--features", str(tmp_path / "f"), "--split", "held-out"]
    assert cli.run(arguments) == 0
    found = json.loads((tmp_path / "f" / "retrieval.json").read_text())
    assert found["label"]["1"] == seco.recall_at_k(features, split="held-out")
    write_clusters(tmp_path / "few", videos=3, rows=made_rows([0, 1, 2], [{}] * 3))
    with pytest.raises(seco.InputError, match="no labelled video can be held out"):
        seco.probe(tmp_path / "few", split="held-out")
    write_clusters(tmp_path / "none", videos=3, rows=made_rows([None] * 3, [{}] * 3))
    with pytest.raises(seco.InputError, match="none: the videos have no labels"):
        seco.probe(tmp_path / "none", split="held-out")


def test_any_module_makes_features(shards: str) -> None:
    class Colour(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    found = seco.extract(Colour(), shards, frames=3, **SIZES)
    assert found.features.shape == (27, 3)
    assert found.encoder["arch"] == "Colour"


def test_a_backbone_takes_pictures_through_its_transform() -> None:
    backbone = seco.load_backbone("random", "resnet18")
    picture = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = backbone.transform(picture)
    assert image.shape == (3, 224, 224)
    assert not backbone.training
    assert backbone(image[None]).shape == (1, 512)


class Recorder(seco.Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []

    def on_start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self.said.append(("start", (folder, config["arch"], step)))

    def on_step(self, step: int, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        self.said.append(("step", (step, metrics["loss"])))
        assert speed["images_per_s"] > 0

    def on_epoch(self, epoch: int, model: nn.Module) -> None:
        assert isinstance(model, seco.SeCo)
        self.said.append(("epoch", epoch))

    def on_checkpoint(self, path: Path) -> None:
        assert path.is_file()
        self.said.append(("checkpoint", path.name))

    def on_end(self) -> None:
        self.said.append(("end", None))

    def of(self, kind: str) -> list[Any]:
        return [value for name, value in self.said if name == kind]


RUN: dict[str, Any] = {
    "arch": "resnet10_w16", "epochs": 2, "batch_size": 8, "queue_size": 24, "crop_size": 32,
    "workers": 0, "log_every": 1, "device": "cpu", "keep_every_epochs": 1, "loggers": "none",
}  # fmt: skip


def test_callbacks_are_told_of_steps_epochs_and_checkpoints(shards: str, tmp_path: Path) -> None:
    told = Recorder()
    run = seco.pretrain(shards=shards, out=tmp_path / "run", callbacks=[told], **RUN)
    assert run.checkpoint == tmp_path / "run" / "last.pt"
    assert told.of("start") == [(run.folder, "resnet10_w16", 0)]
    assert told.of("step") == [(line["step"], line["loss"]) for line in run.metrics()]
    assert len(run.metrics()) == 6
    assert told.of("epoch") == [1, 2]
    assert told.of("checkpoint") == ["epoch-0001.pt", "last.pt", "epoch-0002.pt"]
    assert told.said[-1] == ("end", None)
    assert not (run.folder / "tensorboard").exists()
    assert (run.folder / "report.html").is_file()
    features = seco.extract(seco.load_backbone(run.checkpoint), shards, frames=3, **SIZES)
    assert 0 <= seco.probe(features, split="1").top1 <= 1


def test_a_callback_that_fails_ends_the_run_and_the_others_hear_of_it(
    shards: str, tmp_path: Path
) -> None:
    class Failing(seco.Callback):
        def on_epoch(self, epoch: int, model: nn.Module) -> None:
            raise ZeroDivisionError

    told = Recorder()
    settings = {**RUN, "checkpoint_every_steps": 3}
    with pytest.raises(ZeroDivisionError):
        seco.pretrain(shards=shards, out=tmp_path, callbacks=[told, Failing()], **settings)
    assert told.said[-1] == ("end", None)
    assert told.of("epoch") == [1]
    told = Recorder()
    seco.pretrain(shards=shards, out=tmp_path, callbacks=[told], resume="auto", **settings)
    assert told.of("start")[0][2] == 3
    assert told.of("epoch") == [2]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_loggers_write_offline_and_go_on_in_the_same_run(
    name: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if __import__("importlib.util").util.find_spec(name) is None:
        lacking(f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    out = tmp_path / "run"
    seco.pretrain(shards=shards, out=out, **{**RUN, "loggers": name})
    number = (out / f"{name}-run.txt").read_text().strip()
    assert number
    if name == "mlflow":
        import mlflow

        client = mlflow.MlflowClient()
        assert client.get_run(number).data.params["arch"] == "resnet10_w16"
        history = client.get_metric_history(number, "loss")
        expected = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [(m.step, m.value) for m in history] == [(e["step"], e["loss"]) for e in expected]
    else:
        assert list(out.glob(f"wandb/offline-run-*-{number}/*.wandb"))
    again = {**RUN, "loggers": name, "resume": "auto", "shards": shards, "out": out}
    seco.pretrain(**again)  # nothing is left to do
    assert (out / f"{name}-run.txt").read_text().strip() == number


@pytest.mark.parametrize(("name", "start"), [("wandb", "init"), ("mlflow", "start_run")])
def test_a_logger_that_does_not_start_is_one_line(
    name: str, start: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**given: object) -> None:
        raise RuntimeError("no key\n  was found")

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{start: refuse}))
    told = rf"--loggers: {name} does not start \(RuntimeError: no key was found\) — "
    with pytest.raises(seco.InputError, match=told):
        seco.pretrain(shards=shards, out=tmp_path / "run", **{**RUN, "loggers": name})


def test_an_unknown_logger_is_one_line(shards: str, tmp_path: Path) -> None:
    with pytest.raises(seco.InputError, match="--loggers: unknown logger 'tensorbord'"):
        seco.pretrain(shards=shards, out=tmp_path, **{**RUN, "loggers": "tensorbord"})


def test_mistyped_settings_are_one_line(shards: str, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    write_clusters(folder)
    for call, said in (
        (lambda: seco.pretrain(shard=shards), "shard: there is no such setting — did you mean sh"),
        (lambda: seco.pretrain(out=tmp_path, sampling="halfs"), "sampling: 'halfs' is not one of"),
        (lambda: seco.probe(folder, method="knnn"), "method: 'knnn' is not one of svm, knn"),
        (lambda: seco.extract("random", shards, short_edeg=3, arch="resnet10_w16"), "did you mean"),
        (lambda: seco.prepare("folder", "raw", fpz=3), "fpz: there is no such setting"),
        (lambda: seco.prepare("folder", "raw", fps="3"), "fps: Expected `float | None`, got `str`"),
        (lambda: seco.prepare("folder", "raw", cut_scenes=1), "cut_scenes: Expected `bool`, got"),
        (lambda: seco.pretrain(shards=shards, epochs=1.5), "epochs: Expected `int`, got `float`"),
        (lambda: seco.pretrain(PretrainConfig(), epoch=1), "epoch: there is no such setting"),
        (lambda: seco.triplet_loader(shards, 8.0), "batch_size: Expected `int`"),  # type: ignore[arg-type]
    ):
        with pytest.raises(seco.InputError, match=said):
            call()


def test_whole_numbers_keep_the_digests_of_sets(tmp_path: Path) -> None:
    config = seco.api._given(PrepareConfig, dataset="folder", src="raw", fps=3, clip_seconds=10)
    assert [repr(value) for value in (config.fps, config.clip_seconds)] == ["3", "10"]
    config = seco.api._given(PrepareConfig, dataset="folder", src="raw", frames=np.int64(3))
    assert type(config.frames) is int


def test_a_config_takes_shards_like_a_setting(shards: str, tmp_path: Path) -> None:
    config = PretrainConfig(shards=shards, out=str(tmp_path / "run"))  # type: ignore[arg-type]
    run = seco.pretrain(config, **RUN)
    assert run.checkpoint.is_file()


def test_loaders_take_near_frames_and_groups(tmp_path: Path) -> None:
    spec = make_set(tmp_path, videos=16, frames=20, group=lambda video: f"g{video // 4}")
    given: dict[str, Any] = {"max_gap_seconds": 1.0, "negatives": "other-groups"}
    batch = next(iter(seco.triplet_loader(spec, 16, 32, workers=0, **given)))
    assert len(set(batch.video.tolist())) == 4
    dataset = seco.TripletDataset(spec, max_gap_seconds=0.01)
    with pytest.raises(NothingToRead, match=r"no three frames within 0\.01 s"):
        dataset[0]


def test_the_models_mistakes_are_one_line(shards: str) -> None:
    with pytest.raises(seco.InputError, match="unknown architecture"):
        seco.SeCo("resnet51")
    with pytest.raises(seco.InputError, match="unknown task"):
        seco.SeCo("resnet10_w16", tasks="inter,outer")
    with pytest.raises(TypeError, match="queue_length"):
        seco.SeCo("resnet10_w16", queue_length=3)
    batch = next(iter(seco.triplet_loader(shards, 8, 32, workers=0)))
    with pytest.raises(seco.InputError, match="3 does not divide the batch of 8"):
        seco.SeCo("resnet10_w16", queue_size=24, bn_group=3)(batch)
    with pytest.raises(seco.InputError, match="do not fill a batch of 64"):
        seco.triplet_loader(shards, 64)


def test_prepare_is_the_command(tmp_path: Path) -> None:
    with pytest.raises(seco.InputError, match="no such folder"):
        seco.prepare("folder", src=tmp_path / "absent", out=tmp_path / "out")
