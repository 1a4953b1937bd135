"""``seco retrieve``: recalls against a loop, indexes of the right features only, and the page."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli import run
from seco.config import EvaluateConfig
from seco.data.crops import decode_jpeg
from seco.evaluation.nearest import ExactIndex
from seco.evaluation.query import of_video, query, render_query_page, right_among_nearest
from seco.evaluation.retrieval import evaluate
from seco.features.matrix import unit_vectors
from seco.features.store import read_features, write_features
from seco.pages import frames_of
from seco.report.results import parse_retrieval
from shards.errors import InputError
from shards.opening import open_shards
from tests.browser import DESKTOP_PX, PHONE_PX, open_page
from tests.made_shards import drawn_frame, make_set
from tests.seco.made_features import META, clusters, made_rows, write_clusters

HOSTILE = "<img src=x onerror=alert(1)>\"'\x1b[31m"


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_recalls_against_a_loop(tmp_path: Path) -> None:
    write_clusters(tmp_path, spread=2.5)
    result = evaluate(EvaluateConfig(features=str(tmp_path)))
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
    result = evaluate(EvaluateConfig(features=str(tmp_path)))
    assert result.same_video[10] < 0.5
    assert result.videos == 59
    assert result.label == {}
    assert len(result.notes) == 2
    assert "not measured" in result.table()


def test_two_folders(tmp_path: Path) -> None:
    labels: list[int | None] = [n % 3 for n in range(60)]
    for name, value, shift in (("a", "train", 0.0), ("b", "val", 0.01)):
        rows = made_rows(labels, [{"official": value}] * 60)
        write_clusters(tmp_path / name, rows=rows, shift=shift)  # the same keys, other videos
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    result = evaluate(EvaluateConfig(features=a, test_features=b))
    assert (result.queries, result.gallery, result.label[1]) == (60, 60, 1.0)


def test_a_query_leaves_itself_out(tmp_path: Path) -> None:
    rows = made_rows([n % 3 for n in range(59)] + [None], [{"1": "train"}] * 60)
    write_clusters(tmp_path, rows=rows)
    features = read_features(tmp_path)
    index = ExactIndex(unit_vectors(features.features))
    nearest = query(features, "v000", 7, index)
    assert len(nearest) == 7
    assert "v000" not in {n.key for n in nearest}
    similarities = [n.similarity for n in nearest]
    assert similarities == sorted(similarities, reverse=True)
    assert all(n.right for n in nearest)
    assert len(query(features, "v000", 1000, index)) == 59
    assert {n.right for n in query(features, "v059", 5, index)} == {None}
    with pytest.raises(InputError, match="no video 'nobody'"):
        query(features, "nobody", 3, index)
    with pytest.raises(InputError, match="neighbours"):
        query(features, "v000", 0, index)


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
        if len(wanted) == 2:
            return [b"no picture"]
        return [drawn_frame(len(wanted), n) for n in range(count)]

    nearest = query(features, key, 25, ExactIndex(unit_vectors(features.features)))
    share = right_among_nearest(features, 25, ExactIndex(unit_vectors(features.features)))
    shown = [of_video(features, key, nearest, pictures)]
    html = render_query_page(features, shown, share, pictures)
    page = Page(html)
    assert wanted[0] == (key, 5)
    assert [k for k, _ in wanted[1:]] == [n.key for n in nearest]
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 5 + 24 * 3
    assert all(source and source.startswith("data:image/jpeg;base64,") for source in sources)
    shown = base64.b64decode(str(sources[0]).partition(",")[2])
    assert shown != drawn_frame(1, 0)  # made anew
    near = decode_jpeg(shown).astype(float) - decode_jpeg(drawn_frame(1, 0))
    assert abs(near).mean() < 8
    assert "no readable frame" in page.words
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
    arguments = ["retrieve", "query", "--features", str(folder), "--html", str(page)]
    query_it = [*arguments, "--neighbours", "4", "--video"]
    assert run([*query_it, shards.keys[3]]) == 0
    without_index = page.read_bytes()

    assert run(["retrieve", "build", "--features", str(folder)]) == 0
    assert run(["retrieve", "evaluate", "--features", str(folder)]) == 0
    assert "R@1 " in capsys.readouterr().out
    assert run([*query_it, shards.keys[3]]) == 0
    assert page.read_bytes() == without_index
    assert run([*query_it, "nobody"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert run([*query_it, shards.keys[3], "--video", shards.keys[4]]) == 0
    both = open_page(page)
    assert both.faults() == []
    assert len(both.images) == 2 * (5 + 4 * 3)
    assert run([*query_it, shards.keys[3]]) == 0

    for size in (DESKTOP_PX, PHONE_PX):
        opened = open_page(page, size_px=size)
        assert opened.faults() == []
        assert len(opened.images) == 5 + 4 * 3
        assert shards.keys[3] in opened.text
        dark = open_page(page, size_px=size, dark=True)
        assert dark.faults() == []
        assert dark.background != opened.background


def test_how_many_of_the_nearest_are_right_is_averaged_over_the_test_videos(
    tmp_path: Path,
) -> None:
    write_clusters(tmp_path, spread=2.5)
    features = read_features(tmp_path)
    found = right_among_nearest(features, 7, ExactIndex(unit_vectors(features.features)))
    assert found is not None
    tests = [v for v in range(60) if features.splits["1"][v] == "test"]
    right = []
    for v in tests:
        others = [w for w in range(60) if w != v]
        others.sort(key=lambda w: -cosine(features.features[v], features.features[w]))
        right += [features.labels[w] == features.labels[v] for w in others[:7]]
    assert found.share == pytest.approx(np.mean(right))
    assert 0.4 < found.share < 1
    assert (found.queries, found.tests) == (len(tests), True)
    assert f"averaged over {len(tests)} test videos" in found.sentence()
    without = dataclasses.replace(features, labels=np.full(60, -1))
    assert right_among_nearest(without, 7, ExactIndex(unit_vectors(features.features))) is None


def test_all_splits_are_averaged(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    features, labels = clusters(90, 16, 3, 2.5)
    splits = [
        {name: str(rng.choice(["train", "test"])) for name in ("1", "2", "3")} for _ in range(90)
    ]
    splits[0]["2"] = "unused"
    rows = made_rows(labels.tolist(), splits)
    write_features(tmp_path, features, np.stack([features] * 2, 1), rows, META)
    one = {n: evaluate(EvaluateConfig(features=str(tmp_path), split=n)) for n in ("1", "2", "3")}
    result = evaluate(EvaluateConfig(features=str(tmp_path), split="all"))
    for k in (1, 5, 10, 20, 50):
        assert result.label[k] == pytest.approx(np.mean([r.label[k] for r in one.values()]))
    assert len({r.label[1] for r in one.values()}) > 1
    assert result.same_video == one["1"].same_video
    assert result.queries == sum(r.queries for r in one.values())
    assert [s.queries + s.gallery for s in result.splits] == [90, 89, 90]
    table = result.table()
    assert "mean of 3 splits" in table
    assert "2 test" in table
    written = json.loads((tmp_path / "retrieval.json").read_text())
    assert [s["label"]["1"] for s in written["splits"]] == [r.label[1] for r in one.values()]
    assert parse_retrieval(written).label == result.label
    write_clusters(tmp_path / "one")
    with pytest.raises(InputError, match="a mean needs two numbered splits"):
        evaluate(EvaluateConfig(features=str(tmp_path / "one"), split="all"))


def test_an_approximate_evaluation_states_its_recall(tmp_path: Path) -> None:
    write_clusters(tmp_path, videos=900, spread=1.0)
    exact = evaluate(EvaluateConfig(features=str(tmp_path)))
    result = evaluate(EvaluateConfig(features=str(tmp_path), ivfpq_above=300))
    assert (exact.index, result.index) == ("flat", "ivfpq")
    (split,) = result.splits
    assert split.recall is not None
    assert split.recall["queries"] == 256
    assert 0.5 < split.recall["recall@10"] <= 1
    assert "recall@10" in result.table()
    assert exact.splits[0].recall is None
    assert result.label[50] == pytest.approx(exact.label[50], abs=0.05)
    # The halves are searched in an index of their own.
    coarse = {"ivfpq_above": 300, "probes": 1, "rerank": 0}
    rough = evaluate(EvaluateConfig(features=str(tmp_path), **coarse))  # type: ignore[arg-type]
    assert rough.same_video_recall is not None
    assert rough.same_video_recall["recall@1"] < 0.9
    assert "IVF-PQ, halves, compared with exact" in rough.table()
    assert json.loads((tmp_path / "retrieval.json").read_text())["same_video_recall"] is not None
    assert exact.same_video_recall is None


def test_mistakes_are_found_before_the_search(tmp_path: Path) -> None:
    write_clusters(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        evaluate(EvaluateConfig(features=str(tmp_path / "a"), out=str(tmp_path / "file")))
    rows = made_rows([n % 3 for n in range(60)], [{}] * 60)
    write_clusters(tmp_path / "none", rows=rows)
    with pytest.raises(InputError, match="has no split '7'"):
        evaluate(EvaluateConfig(features=str(tmp_path / "none"), split="7"))
    with pytest.raises(InputError, match=r"60 videos are in both train and test \("):
        none = str(tmp_path / "none")
        evaluate(EvaluateConfig(features=none, test_features=none))
