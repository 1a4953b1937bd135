"""``seco retrieve``: recalls against a loop, indexes of the right features only, and the page."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli import run
from seco.duplicates import duplicates
from seco.eval_config import RetrieveConfig
from seco.feature_store import read_features, write_features
from seco.nearest import build_index, search
from seco.report_records import parse_retrieval
from seco.retrieval import build, evaluate, open_index, query
from seco.retrieval_page import frames_of, render_query_page, write_query_page
from shards.errors import InputError
from shards.opening import open_shards
from tests.made_shards import make_set
from tests.seco.made_features import META, clusters, made_rows, write_clusters

HOSTILE = "<img src=x onerror=alert(1)>\"'\x1b[31m"


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_recalls_against_a_loop(tmp_path: Path) -> None:
    write_clusters(tmp_path, spread=2.5)
    result = evaluate(RetrieveConfig(features=str(tmp_path)))
    f = read_features(tmp_path)
    train = [v for v in range(60) if f.splits["1"][v] == "train"]
    test = [v for v in range(60) if f.splits["1"][v] == "test"]
    assert (result.queries, result.gallery) == (len(test), len(train))
    for k in (1, 5, 10, 20, 50):
        hits = 0
        for v in test:
            nearest = sorted(train, key=lambda t: -cosine(f.features[v], f.features[t]))[:k]
            hits += any(f.labels[t] == f.labels[v] for t in nearest)
        assert result.label[k] == pytest.approx(hits / len(test)), k
    assert 0 < result.label[1] < result.label[5] <= 1
    for k in (1, 5, 10):
        hits = 0
        for v in range(60):
            order = sorted(range(60), key=lambda t: -cosine(f.halves[v, 0], f.halves[t, 1]))
            hits += v in order[:k]
        assert result.same_video[k] == pytest.approx(hits / 60)
    assert result.same_video[1] > 0.9

    written = json.loads((tmp_path / "retrieval.json").read_text())
    assert written["label"]["1"] == result.label[1]
    assert written["encoder"]["sha256"] == "ab" * 32
    parsed = parse_retrieval(written)  # as `seco report` reads it
    assert parsed.same_video == result.same_video
    assert parsed.gallery == len(train)


def test_unrelated_halves_are_not_found(tmp_path: Path) -> None:
    features, _ = clusters(60, 16, 3, 0.3)
    halves = np.random.default_rng(0).standard_normal((60, 2, 16)).astype(np.float32)
    rows = made_rows([None] * 60, [{}] * 60)
    rows[0]["frames"] = 1
    write_features(tmp_path, features, halves, rows, META)
    result = evaluate(RetrieveConfig(features=str(tmp_path)))
    assert result.same_video[10] < 0.5
    assert result.videos == 59
    assert result.label == {}
    assert len(result.notes) == 2
    assert "not measured" in result.table()


def test_two_folders(tmp_path: Path) -> None:
    labels: list[int | None] = [n % 3 for n in range(60)]
    for name, value in (("a", "train"), ("b", "val")):
        write_clusters(tmp_path / name, rows=made_rows(labels, [{"official": value}] * 60))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    result = evaluate(RetrieveConfig(features=a, test_features=b))
    assert (result.queries, result.gallery, result.label[1]) == (60, 60, 1.0)
    found = duplicates(RetrieveConfig(features=a, test_features=b, threshold=0.99999))
    assert {(p[0], p[2]) for p in found.pairs} == {(f"v{n:03d}",) * 2 for n in range(60)}


def test_near_duplicates_across_splits(tmp_path: Path) -> None:
    features, labels = clusters(60, 64, 60, 0.0)
    features[3] = 2 * features[40]  # train and test: the same direction
    features[5] = features[7]  # both in train
    features[9] = features[41]  # train and unused
    values = ["train"] * 30 + ["test"] * 11 + ["unused"] * 19
    rows = made_rows(labels.tolist(), [{"1": v} for v in values])
    write_features(tmp_path, features, np.stack([features] * 2, 1), rows, META)
    found = duplicates(RetrieveConfig(features=str(tmp_path)))
    assert [pair[:4] for pair in found.pairs] == [("v003", "train", "v040", "test")]
    assert found.pairs[0][4] == pytest.approx(1)
    lines = (tmp_path / "duplicates.csv").read_text().splitlines()
    assert lines[0] == "key,split,near_key,near_split,similarity"
    assert len(lines) == 2
    assert "v040" in found.table()


def test_the_approximate_index_finds_most(tmp_path: Path) -> None:
    x, _ = clusters(2000, 32, 40, 0.4)
    exact, approximate = build_index(x), build_index(x, ivfpq_above=1000)
    assert type(exact).__name__ == "IndexFlatIP"
    assert type(approximate).__name__ == "IndexIVFPQ"
    _, true = search(exact, x[:200], 10)
    _, found = search(approximate, x[:200], 10)
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(true, found, strict=True)])
    assert shared > 0.6
    assert type(build_index(x, ivfpq_above=2000)).__name__ == "IndexFlatIP"
    with pytest.raises(InputError, match="too few"):
        build_index(x[:100], ivfpq_above=50)
    with pytest.raises(InputError, match="ivfpq-above"):
        build_index(x, ivfpq_above=-1)
    with pytest.raises(InputError, match="unknown device"):
        search(exact, x[:1], 1, "tpu")


def test_search_returns_cosines_whatever_the_length() -> None:
    x, _ = clusters(20, 6, 2, 1.0)
    similarity, found = search(build_index(x * 50), x * 0.01, 100)
    assert similarity.shape == (20, 20)
    assert found[:, 0].tolist() == list(range(20))
    for v in range(20):
        expected = [cosine(x[v], x[t]) for t in found[v]]
        np.testing.assert_allclose(similarity[v], expected, atol=1e-5)
    similarity, _ = search(build_index(x), np.zeros((1, 6), np.float32), 3)
    assert not similarity.any()


def test_a_saved_index_is_of_these_features_only(tmp_path: Path) -> None:
    write_clusters(tmp_path / "f")
    config = RetrieveConfig(features=str(tmp_path / "f"))
    path = build(config)
    features = read_features(tmp_path / "f")
    saved = open_index(path, features)
    assert query(features, "v004", 5, saved) == query(features, "v004", 5)

    write_clusters(tmp_path / "other", sha256="cd" * 32)
    with pytest.raises(InputError, match="another encoder"):
        open_index(path, read_features(tmp_path / "other"))
    write_clusters(tmp_path / "fewer", videos=30)
    with pytest.raises(InputError, match="other videos"):
        open_index(path, read_features(tmp_path / "fewer"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        open_index(path, features)
    path.with_name(path.name + ".json").unlink()
    with pytest.raises(InputError, match="no readable description"):
        open_index(path, features)


def test_a_query_leaves_itself_out(tmp_path: Path) -> None:
    rows = made_rows([n % 3 for n in range(59)] + [None], [{"1": "train"}] * 60)
    write_clusters(tmp_path, rows=rows)
    features = read_features(tmp_path)
    nearest = query(features, "v000", 7)
    assert len(nearest) == 7
    assert "v000" not in {n.key for n in nearest}
    similarities = [n.similarity for n in nearest]
    assert similarities == sorted(similarities, reverse=True)
    assert all(n.right for n in nearest)
    assert len(query(features, "v000", 1000)) == 59
    assert {n.right for n in query(features, "v059", 5)} == {None}
    with pytest.raises(InputError, match="no video 'nobody'"):
        query(features, "nobody", 3)
    with pytest.raises(InputError, match="neighbours"):
        query(features, "v000", 0)


class Page(HTMLParser):
    """Collects the tags and the words of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_shows_pictures_and_escapes_names(tmp_path: Path) -> None:
    rows = made_rows([n % 3 for n in range(60)], [{"1": "train"}] * 60)
    for row in rows:
        row |= {"source": HOSTILE, "label_name": HOSTILE, "key": f"{row['key']}{HOSTILE}"}
    write_clusters(tmp_path, rows=rows)
    features = read_features(tmp_path)
    key = features.keys[2]
    wanted: list[tuple[str, int]] = []

    def pictures(key: str, count: int) -> list[bytes]:
        wanted.append((key, count))
        return [] if len(wanted) == 2 else [f"{key}{n}".encode() for n in range(count)]

    nearest = query(features, key, 25)
    html = render_query_page(features, key, nearest, pictures)
    page = Page(html)
    assert wanted[0] == (key, 5)
    assert [k for k, _ in wanted[1:]] == [n.key for n in nearest]
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 5 + 24 * 3
    assert all(source and source.startswith("data:image/jpeg;base64,") for source in sources)
    assert base64.b64decode(str(sources[0]).partition(",")[2]) == f"{key}0".encode()
    assert "no frame can be read" in page.words
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    assert "\x1b" not in html
    assert page.words.count("✓ right") == sum(n.right is True for n in nearest) == 19
    assert page.words.count("✗ wrong") == 6
    assert "19 of 25" in page.words
    assert f"{nearest[0].similarity:.3f}" in page.words
    assert not re.search(r"""(src|href)=["']?https?:""", html)
    assert "prefers-color-scheme: dark" in html


def test_from_shards_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_set(tmp_path / "shards", videos=12)
    shards = open_shards(manifest)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 8)).astype(np.float32)
    rows = made_rows(
        [n % 3 for n in range(12)], [{"1": "train" if n % 2 else "test"} for n in range(12)]
    )
    for row, key in zip(rows, shards.keys, strict=True):
        row["key"] = key
    folder = tmp_path / "f"
    write_features(folder, x, np.stack([x, x], 1), rows, {**META, "shards": [manifest]})

    read = frames_of(shards)
    assert read(shards.keys[3], 2) == [shards.read_frame(3, 0), shards.read_frame(3, 5)]
    page = tmp_path / "nearest.html"
    config = RetrieveConfig(features=str(folder), neighbours=4)
    assert write_query_page(config, shards.keys[3], page) == page
    without_index = page.read_bytes()
    assert base64.b64encode(shards.read_frame(3, 0)) in without_index

    assert run(["retrieve", "build", "--features", str(folder)]) == 0
    assert run(["retrieve", "evaluate", "--features", str(folder)]) == 0
    assert "R@1 " in capsys.readouterr().out
    arguments = ["retrieve", "query", "--features", str(folder), "--video", shards.keys[3]]
    assert run([*arguments, "--html", str(page), "--neighbours", "4"]) == 0
    assert page.read_bytes() == without_index
    assert run([*arguments[:-1], "nobody", "--html", str(page)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
