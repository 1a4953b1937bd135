"""The panel, its warnings, the online kNN and checkpoints written in the background."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import seco.checkpoints.io
from seco.checkpoints.io import CheckpointWriter, load_checkpoint
from seco.config import PretrainConfig, resolve_pretrain
from seco.models.seco import spread
from seco.training.pretrain import Health, chance_levels, pretrain, status
from shards.errors import InputError
from tests.made_shards import make_set
from tests.seco.test_trainer import SMALL

METRICS: dict[str, Any] = {
    "epoch": 0,
    "loss": 3.0,
    "loss_inter": 2.0,
    "acc_inter": 0.25,
    "loss_order": 0.69,
    "acc_order": 0.5,
    "feature_std": 0.9,
    "queue_fill": 0.5,
}
SPEED = {"images_per_s": 1234.5, "data_wait": 0.01}


def looked_at(rows: list[tuple[int, dict[str, Any], dict[str, float]]]) -> list[str]:
    said: list[str] = []
    health = Health(resolve_pretrain(PretrainConfig(queue_size=99)), said.append)
    for step, metrics, speed in rows:
        health.look(step, {**METRICS, **metrics}, {**SPEED, **speed})
    return said[1:]


def test_chance_levels_are_those_of_guessing() -> None:
    levels = chance_levels(resolve_pretrain(PretrainConfig(queue_size=99)))
    assert levels == pytest.approx({"inter": 4.60517, "intra": 1.098612, "order": 0.693147})
    pairs = chance_levels(resolve_pretrain(PretrainConfig(preset="authors")))
    assert pairs["intra"] == pytest.approx(0.693147)
    said: list[str] = []
    Health(resolve_pretrain(PretrainConfig(queue_size=99, negatives="other-groups")), said.append)
    assert said == ["loss at chance: inter at most 4.605, intra 1.099, order 0.693"]


def test_the_status_shows_the_panel() -> None:
    line = status(METRICS, SPEED)
    for part in ("loss 3.000", "inter 2.000", "order 0.690", "accuracy 25%/50%", "queue 50%"):
        assert part in line
    assert "feature std 0.90" in line and "1234 images/s, 1% waiting" in line


def test_a_sound_run_is_not_warned_of() -> None:
    sound = {"acc_order": 0.7, "feature_std": 0.8}
    assert (
        looked_at([(step, {**sound, "epoch": step // 10}, {}) for step in range(0, 900, 10)]) == []
    )


def test_each_trouble_is_said_once() -> None:
    guessed = [(s, {"epoch": s // 10, "acc_order": 0.5 + 0.1 * (-1) ** s}, {}) for s in range(300)]
    (said,) = looked_at(guessed)
    assert "still at chance after 20 epochs" in said and "--tasks inter,intra" in said
    (said,) = looked_at([(s, {"feature_std": 0.02}, {}) for s in range(9)])
    assert "collapse" in said and "--lr" in said
    slow = [(s, {}, {"data_wait": 0.5}) for s in range(0, 200, 10)]
    (said,) = looked_at(slow)
    assert "50% of the time is spent waiting for data: raise --workers" in said
    assert looked_at(slow[:5]) == []  # the loader fills its buffers first


def test_spread_is_one_on_the_sphere_and_nothing_when_collapsed() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(20_000, 32))
    assert float(spread(torch.stack([vectors.mean(0), vectors.square().mean(0)]))) == pytest.approx(
        1, abs=0.01
    )
    same = vectors[:1]
    assert float(spread(torch.cat([same, same.square()]))) == pytest.approx(0, abs=1e-3)


def test_the_online_knn_is_logged_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_set(tmp_path / "shards", videos=18, frames=5)
    rows = {}
    for name, more in (("with", {"knn_shards": (shards,), "knn_every_epochs": 2}), ("without", {})):
        out = tmp_path / name
        pretrain(PretrainConfig(shards=(shards,), out=str(out), **SMALL, **more))  # type: ignore[arg-type]
        rows[name] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row.pop("knn_top1") for row in rows["with"] if "knn_top1" in row}
    assert set(found) == {0, 8, 12}  # untrained, and after epochs 2 and 3, the last
    assert all(0 <= accuracy <= 1 for accuracy in found.values())
    assert rows["with"].pop(0) == {"step": 0}
    assert rows["with"] == rows["without"]
    said = capsys.readouterr().err
    assert f"kNN, untrained: accuracy {found[0]:.1%} on 6 videos" in said
    assert f"kNN, step 8: accuracy {found[8]:.1%}; untrained {found[0]:.1%}" in said


def test_a_knn_needs_labels(tmp_path: Path) -> None:
    from tests.shards.test_sequential import foreign_tar

    shards = make_set(tmp_path / "shards", videos=18, frames=5)
    foreign_tar(tmp_path / "f.tar", range(4), labels=False)
    settings = {**SMALL, "knn_shards": (str(tmp_path / "f.tar"),)}
    with pytest.raises(InputError, match="--knn-shards: hold no labelled training or test videos"):
        pretrain(PretrainConfig(shards=(shards,), out=str(tmp_path / "out"), **settings))


def test_a_checkpoint_is_what_was_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, save = threading.Event(), seco.checkpoints.io.save_checkpoint

    def slowly(path: Path, content: dict[str, Any]) -> None:
        assert may_write.wait(30)
        save(path, content)

    monkeypatch.setattr(seco.checkpoints.io, "save_checkpoint", slowly)
    writer, weight = CheckpointWriter(), torch.zeros(3)
    nested = {
        "config": {"arch": "a", "tasks": "b"},
        "model": {"w": weight},
        "more": [{"w": weight}],
    }
    writer.save(tmp_path / "last.pt", nested)
    done: list[bool] = []
    writer.then(lambda: done.append((tmp_path / "last.pt").is_file()))
    weight += 1  # training goes on
    assert not (tmp_path / "last.pt").exists()
    may_write.set()
    writer.finish()
    assert done == [True]
    content = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(content["model"]["w"], torch.zeros(3))
    assert torch.equal(content["more"][0]["w"], torch.zeros(3))


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter()
    writer.save(tmp_path / "file" / "last.pt", {"config": {}, "model": {}})
    done: list[bool] = []
    writer.then(lambda: done.append(True))
    with pytest.raises(InputError, match="cannot be written"):
        writer.finish()
    assert not done
