"""Nearest vectors: against a loop, in blocks, approximately with a stated recall, on fake GPUs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from seco.config import BuildConfig, IndexSettings
from seco.evaluation import index as ivfpq
from seco.evaluation import nearest
from seco.evaluation.index import ApproximateIndex, build, build_index, measure_recall, open_index
from seco.evaluation.nearest import ExactIndex
from seco.evaluation.query import query
from seco.features import matrix
from seco.features.matrix import unit_vectors
from seco.features.store import read_features
from shards.errors import InputError
from tests.seco.made_features import clusters, write_clusters


def brute_force(
    x: NDArray[np.float32], queries: NDArray[np.float32], k: int
) -> list[list[tuple[float, int]]]:
    found = []
    for q in queries.astype(np.float64):
        cosines = [float(q @ r / (np.linalg.norm(q) * np.linalg.norm(r))) for r in x]
        found.append(sorted(((c, n) for n, c in enumerate(cosines)), reverse=True)[:k])
    return found


def test_blocks_give_what_a_loop_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "BLOCK_BYTES", 7 * 4 * 6)  # 7 rows a block
    monkeypatch.setattr(nearest, "_QUERIES_AT_ONCE", 4)
    x, _ = clusters(50, 6, 5, 1.0)
    rows = np.random.default_rng(0).permutation(50)[:33]
    queries = x[:11] * 3
    for gallery, chosen in ((x, None), (x[rows], rows)):
        cosines, found = ExactIndex(unit_vectors(x, chosen)).search(unit_vectors(queries), 9)
        expected = brute_force(gallery, queries, 9)
        assert found.tolist() == [[n for _, n in one] for one in expected]
        np.testing.assert_allclose(cosines, [[c for c, _ in one] for one in expected], atol=1e-5)


def test_more_than_there_is_and_rows_of_zeros() -> None:
    x, _ = clusters(20, 6, 2, 1.0)
    cosines, found = ExactIndex(unit_vectors(x * 50)).search(unit_vectors(x * 0.01), 100)
    assert cosines.shape == (20, 20)
    assert found[:, 0].tolist() == list(range(20))
    cosines, found = ExactIndex(unit_vectors(x)).search(
        unit_vectors(np.zeros((1, 6), np.float32)), 3
    )
    assert not cosines.any()
    assert len(set(found[0].tolist())) == 3


def test_candidates_are_compared_exactly() -> None:
    x, _ = clusters(3000, 64, 40, 0.5)
    queries = unit_vectors(x[:200])
    settings = IndexSettings(ivfpq_above=1000, code_bytes=8, probes=8)
    index = build_index(unit_vectors(x), settings)
    assert isinstance(index, ApproximateIndex)
    cosines, found = index.search(queries, 10)
    true_cosines, true = ExactIndex(unit_vectors(x)).search(queries, 10)
    for q in range(200):  # the cosines are those of the videos found, not of their codes
        expected = [
            float(v)
            for v in unit_vectors(x).take(found[q]) @ unit_vectors(x).take(np.array([q]))[0]
        ]
        np.testing.assert_allclose(cosines[q], expected, atol=1e-5)
        assert cosines[q].tolist() == sorted(cosines[q].tolist(), reverse=True)
    shared = share(true, found)
    assert shared > 0.8
    plain = ApproximateIndex(index.index, unit_vectors(x), 0)
    near, by_codes = plain.search(queries, 10)
    assert share(true, by_codes) < shared
    assert abs(near[:, 1:] - true_cosines[:, 1:]).mean() < 0.2
    with pytest.raises(InputError, match="too few"):
        build_index(unit_vectors(x[:100]), IndexSettings(ivfpq_above=50))


def share(true: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(true, found, strict=True)]))


def test_the_stated_recall_is_the_share_found() -> None:
    x, _ = clusters(2000, 32, 40, 0.5)
    chosen = np.arange(0, 2000, 2)
    gallery = unit_vectors(x, chosen)
    settings = IndexSettings(ivfpq_above=1, code_bytes=4, probes=2, rerank=0)
    index = build_index(gallery, settings)
    stated = measure_recall(index, gallery)
    asked = np.sort(np.random.Generator(np.random.PCG64(2)).permutation(1000)[:256])
    for k in (1, 10):
        shares = []
        for q in asked.tolist():
            query_row = x[chosen[q]][None]
            true = [n for _, n in brute_force(x[chosen], query_row, k + 1)[0] if n != q][:k]
            _, found = index.search(unit_vectors(query_row), 11)
            got = [n for n in found[0].tolist() if n not in (q, -1)][:k]
            shares.append(len(set(true) & set(got)) / k)
        assert stated[f"recall@{k}"] == pytest.approx(np.mean(shares))
    assert 0.1 < stated["recall@10"] < 0.95
    assert measure_recall(ExactIndex(gallery), gallery)["recall@10"] == 1


def test_a_row_that_no_probed_list_holds_is_not_found() -> None:
    x, _ = clusters(600, 16, 40, 0.1)
    index = build_index(unit_vectors(x), IndexSettings(ivfpq_above=1, probes=1, code_bytes=16))
    cosines, found = index.search(unit_vectors(x[:20]), 400)
    assert (found[:, -1] == -1).all()
    assert np.isneginf(cosines[:, -1]).all()
    assert (found[:, 0] == np.arange(20)).all()


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        ({"ivfpq_above": -1}, "--ivfpq-above"),
        ({"code_bytes": 0}, "--code-bytes"),
        ({"probes": 0}, "--probes"),
        ({"rerank": -1}, "--rerank"),
    ],
)
def test_settings_that_cannot_work(wrong: dict[str, int], option: str) -> None:
    with pytest.raises(InputError, match=option):
        build_index(unit_vectors(np.ones((3, 4), np.float32)), IndexSettings(**wrong))


def test_devices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    x, _ = clusters(600, 16, 5, 0.5)
    with pytest.raises(InputError, match="unknown device"):
        ExactIndex(unit_vectors(x), "tpu")
    if not faiss.get_num_gpus():
        with pytest.raises(InputError, match="no GPU"):
            ExactIndex(unit_vectors(x), "cuda")
    settings = IndexSettings(ivfpq_above=1, code_bytes=16)
    _, on_cpu = build_index(unit_vectors(x), settings, "cpu").search(unit_vectors(x[:9]), 5)

    called: list[str] = []
    moved: list[Any] = []

    def knn_gpu(resources: object, *given: Any, **named: Any) -> Any:
        called.append("knn_gpu")
        return faiss.knn(*given, **named)

    class Options:
        def __init__(self) -> None:
            self.useFloat16 = False

    def to_gpus(index: Any, options: Any = None) -> Any:
        moved.append((type(index).__name__, options is not None and options.useFloat16))
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", Options, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpus)
    ExactIndex(unit_vectors(x), "cpu").search(unit_vectors(x[:9]), 5)
    assert called == []
    _, exact = ExactIndex(unit_vectors(x)).search(unit_vectors(x[:9]), 5)
    assert called
    _, found = build_index(unit_vectors(x), settings).search(unit_vectors(x[:9]), 5)
    assert moved == [("IndexFlatL2", False), ("IndexPreTransform", True)]
    assert found.tolist() == on_cpu.tolist()
    assert exact[:, 0].tolist() == list(range(9))

    monkeypatch.setattr(ivfpq, "_GPU_MOST", 20)
    build_index(unit_vectors(x), settings).search(
        unit_vectors(x[:9]), 5
    )  # fewer candidates, no fault

    def refuses(index: Any, options: Any = None) -> Any:
        if options is None:
            return index
        raise RuntimeError("Error in void faiss\nno kernel for 7 bytes")

    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", refuses)
    _, found = build_index(unit_vectors(x), settings).search(unit_vectors(x[:9]), 5)
    assert found.tolist() == on_cpu.tolist()
    assert "on the CPU: no kernel for 7 bytes" in capsys.readouterr().err
    with pytest.raises(InputError, match="no kernel for 7 bytes"):
        build_index(unit_vectors(x), settings, "cuda")


@pytest.mark.parametrize("above", [0, 100])
def test_a_saved_index_is_of_these_features_only(tmp_path: Path, above: int) -> None:
    write_clusters(tmp_path / "f", videos=400)
    built = build(BuildConfig(features=str(tmp_path / "f"), ivfpq_above=above, probes=3))
    path, features = built.path, read_features(tmp_path / "f")
    saved = open_index(path, features)
    exact = ExactIndex(unit_vectors(features.features))
    assert query(features, "v004", 1, saved) == query(features, "v004", 1, exact)
    told = json.loads((tmp_path / "f/retrieval.faiss.json").read_text())
    as_faiss = faiss.read_index(str(path))
    assert (as_faiss.ntotal, as_faiss.d) == (400, 16)
    if above:
        assert (told["kind"], told["probes"], told["code_bytes"]) == ("ivfpq", 3, 16)
        assert 0.5 < told["recall"]["recall@10"] <= 1
        assert f"recall@10 {100 * told['recall']['recall@10']:.1f}%" in built.table()
        wide = open_index(path, features, probes=1000)
        assert isinstance(wide, ApproximateIndex)
        assert faiss.extract_index_ivf(wide.index).nprobe == told["lists"]
        with pytest.raises(InputError, match="--probes"):
            open_index(path, features, probes=0)
    else:
        assert told["kind"] == "flat"
        unit = features.features / np.linalg.norm(features.features, axis=1, keepdims=True)
        np.testing.assert_allclose(as_faiss.reconstruct_n(0, 400), unit, atol=1e-6)

    write_clusters(tmp_path / "other", videos=400, sha256="cd" * 32)
    with pytest.raises(InputError, match="another encoder"):
        open_index(path, read_features(tmp_path / "other"))
    write_clusters(tmp_path / "fewer", videos=30)
    with pytest.raises(InputError, match="other videos"):
        open_index(path, read_features(tmp_path / "fewer"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="damaged"):
        open_index(path, features)
    if above:
        path.write_bytes(bytes(len(whole)))
        with pytest.raises(InputError, match="damaged"):
            open_index(path, features)
    path.with_name(path.name + ".json").write_text("[]")
    with pytest.raises(InputError, match="no readable description"):
        open_index(path, features)


def test_a_build_that_is_refused_leaves_the_index_before(tmp_path: Path) -> None:
    write_clusters(tmp_path, videos=111)
    path = build(BuildConfig(features=str(tmp_path))).path
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match="too few for an approximate index"):
        build(BuildConfig(features=str(tmp_path), ivfpq_above=50))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    open_index(path, read_features(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_that_was_read_is_not_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.ones((8192, 1024), np.float32))  # 32 MB
    mapped = np.load(path, mmap_mode="r")

    def resident_kb() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        first = next(n for n, line in enumerate(lines) if line.endswith(str(path)))
        return int(next(ln for ln in lines[first:] if ln.startswith("Rss:")).split()[1])

    assert mapped.sum() == 8192 * 1024
    assert resident_kb() > 30_000
    assert sum(len(block) for _, block in unit_vectors(mapped[:, :1000]).blocks()) == 8192
    assert resident_kb() < 1000
