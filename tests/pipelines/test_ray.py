"""The Ray engines: a cluster of two nodes on this machine, one of which is lost at last."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import _engine
from pipelines._config import PrepareConfig
from pipelines._prepare import prepare
from seco.config import ExtractConfig
from seco.features.ray_engine import extract_on_cluster
from shards.errors import InputError
from tests.data import lacking
from tests.made_shards import make_set
from tests.pipelines.made_videos import draw_video
from tests.pipelines.running import hashes, run, wait_until
from tests.seco.test_extract import SMALL, extract, files

Clips = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        lacking("ray is not installed")
    # Ray waits for half a minute, which is little on a busy machine.
    wait = Cluster._wait_for_node
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Cluster, "_wait_for_node", lambda self, node, _=30: wait(self, node, 180))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        made.add_node(num_cpus=2)
        made.wait_for_nodes(timeout=180)
    yield made
    made.shutdown()


def test_features_are_those_of_this_machine(cluster: Any, tmp_path: Path) -> None:
    shards = make_set(tmp_path / "s", videos=36, frames=lambda v: 3 + v % 5, per_shard=4)
    expected = files(extract(shards, tmp_path / "here", per_frame=True))
    out, relative = tmp_path / "out", os.path.relpath(shards)
    settings = {**SMALL, "per_frame": True, "engine": "ray", "ray_address": cluster.address}
    extract_on_cluster(ExtractConfig(shards=(relative,), out=str(out), **settings))
    found = files(out)
    metas = [json.loads(one.pop("meta.json")) for one in (found, expected)]
    assert {**metas[0], "shards": None} == {**metas[1], "shards": None}
    assert found == expected


def test_what_a_node_cannot_do_is_one_line(
    clips: Clips, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, _ = clips
    real = _engine._build_on_node

    def other_version(plan: Any, threads: int) -> Any:
        from dataclasses import replace

        return real(replace(plan, ffmpeg_version="another"), threads)

    monkeypatch.setattr(_engine, "_build_on_node", other_version)
    # One task: Ray may abort this process where others are cancelled while they begin.
    settings: dict[str, Any] = {"ray_address": cluster.address, "videos_per_shard": 1000}
    with pytest.raises(InputError, match=r"this node has ffmpeg .*, the driver another"):
        run(raw, tmp_path / "out", engine="ray", **settings)


def test_the_nodes_have_the_limits_of_the_driver(
    clips: Clips, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes were started before the limit was set."""
    monkeypatch.setenv("SECO_MAX_PIXELS", "100")
    with pytest.raises(InputError, match="none of the 28 videos"):
        run(clips[0], tmp_path / "out", engine="ray", ray_address=cluster.address)


def test_a_node_lost_midway_changes_nothing(clips: Clips, tmp_path: Path, cluster: Any) -> None:
    raw, whole = clips
    out = tmp_path / "out"
    lost = threading.Event()

    def lose() -> None:
        wait_until(lambda: len(list(out.glob("*.idx"))) >= 2, 120)
        (node,) = [node for node in cluster.worker_nodes if node is not cluster.head_node]
        cluster.remove_node(node, allow_graceful=False)
        if len(list(out.glob("*.idx"))) < 28:
            lost.set()

    loser = threading.Thread(target=lose)
    loser.start()
    made = run(
        raw,
        out,
        engine="ray",
        ray_address=cluster.address,
        workers=None,
        videos_per_shard=1,
        frames=8,
    )
    loser.join()
    assert lost.is_set(), "the node was lost too late to prove anything"
    assert made.sets[0].videos == 28
    for left in out.glob("*.part"):  # of the lost node; the next run clears it away
        left.unlink()
    assert hashes(out) == whole
    log = (out / "raw.log.jsonl").read_text().splitlines()
    assert len(log) == 28


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no-such-host.invalid:1"])
def test_no_cluster_at_the_address(tmp_path: Path, address: str) -> None:
    draw_video(tmp_path / "raw" / "a.mp4")
    with pytest.raises(InputError, match="no Ray cluster answers"):
        run(tmp_path / "raw", tmp_path / "out", engine="ray", ray_address=address)


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_video(tmp_path / "raw" / "a.mp4")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "seco-video\[ray\]"'):
        prepare(
            PrepareConfig(
                dataset="folder", src=str(tmp_path / "raw"), out=str(tmp_path / "o"), engine="ray"
            )
        )


@pytest.mark.parametrize(
    ("shards", "workers", "cpus", "expected"),
    [
        (100, None, [16, 16], (1, 64)),  # twice as many as CPUs wait their turn
        (100, 8, [16, 16], (1, 8)),  # a user's limit is one
        (2, None, [16, 16], (16, 4)),  # fewer shards than CPUs: threads share a shard
        (1, None, [16, 4], (4, 10)),  # as many as fit on any node
        (3, 2, [4], (1, 2)),
        (5, None, [0, 2], (1, 4)),  # a head node that does no work
    ],
)
def test_division_of_work(
    shards: int, workers: int | None, cpus: list[int], expected: tuple[int, int]
) -> None:
    class FakeRay:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            dead = {"Resources": {"CPU": 99}, "Alive": False}
            return [dead, *({"Resources": {"CPU": n}, "Alive": True} for n in cpus)]

    assert _engine._division(FakeRay, shards, workers) == expected
