"""``seco report``: what is found, what stands beside the paper, and what the page may not do."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seco.paper_tables import (
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLES,
    Measured,
    PaperTable,
    fill,
    known_dataset,
    probe_metric,
    set_size_note,
)
from seco.report import render_report, write_report
from seco.report_charts import chance_levels, downsample, draw_charts
from seco.report_sources import find_results, read_log
from shards.errors import InputError

CONFIG = """\
tasks = "inter,intra,order"
arch = "resnet50"
intra = "three-way"
queue_size = 4096
epochs = 4
"""
HOSTILE = "<script>alert('x')</script>"


def write_run(folder: Path, steps: int = 20, config: str = CONFIG) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config)
    with (folder / "metrics.jsonl").open("w") as log:
        for step in range(steps):
            row = {"step": step, "epoch": step // 5, "loss": 9.0 - step / 10, "lr": 0.1}
            row |= {"loss_inter": 8.0, "loss_intra": 1.0, "loss_order": 0.6, "acc_order": 0.5}
            log.write(json.dumps(row) + "\n")
    return folder


def write_features(folder: Path, dataset: str, **probe: Any) -> Path:
    folder.mkdir(parents=True)
    values: dict[str, Any] = {"method": "svm", "C": 1.0, "top1": 0.6102, "split": "official val"}
    values |= {"n_train": 240_000, "n_test": 19_800} | probe
    values.setdefault("encoder", {"arch": "resnet50", "tasks": "inter,intra,order"})
    (folder / "probe.json").write_text(json.dumps(values))
    (folder / "meta.json").write_text(json.dumps({"dataset": dataset}))
    return folder


def page(tmp_path: Path) -> str:
    write_report([tmp_path], tmp_path / "report.html")
    return (tmp_path / "report.html").read_text("utf-8")


class Tags(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_run_appears_with_curves_chance_levels_and_settings(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one")
    text = page(tmp_path)
    for title in ("Loss, all parts", "Loss, inter", "Loss, intra", "Loss, order", "Order accuracy"):
        assert f"<strong>{title}</strong>" in text
    assert f"ln(1+K) = {math.log(4097):.2f}" in text
    assert f"ln 3 = {math.log(3):.2f}" in text
    assert f"ln 2 = {math.log(2):.2f}" in text
    assert "stroke-dasharray" in text
    assert "Contrast accuracy" not in text  # the log has none
    assert re.search(r"<code>queue_size</code></th><td>4096</td>", text)


def test_chance_levels_follow_the_settings() -> None:
    levels = chance_levels({"queue_size": 131_072, "intra": "pairwise"})
    assert levels["loss_inter"] == pytest.approx(11.7835, abs=1e-4)
    assert levels["loss_intra"] == pytest.approx(0.6931, abs=1e-4)
    assert levels["acc_intra"] == 0.5
    assert "loss_inter" not in chance_levels({"queue_size": "many"})
    assert "loss_intra" not in chance_levels({})


def test_tasks_left_out_have_no_chart(tmp_path: Path) -> None:
    steps = np.arange(5.0)
    metrics = {"step": steps, "loss_inter": steps, "loss_order": steps, "acc_order": steps / 5}
    titles = [chart.title for chart in draw_charts(metrics, {"tasks": "inter"}, "x")]
    assert titles == ["Loss, inter"]


def test_downsample_is_the_mean_of_equal_bins_and_keeps_gaps() -> None:
    steps = np.arange(10_000.0)
    values = steps * 2
    values[5_004] = math.inf
    x, y = downsample(steps, values, 1000)
    assert len(x) == len(y) == 1000
    np.testing.assert_allclose(x, steps.reshape(1000, 10).mean(1))
    assert np.flatnonzero(np.isnan(y)).tolist() == [500]
    there = ~np.isnan(y)
    np.testing.assert_allclose(y[there], values.reshape(1000, 10).mean(1)[there])
    uneven, _ = downsample(np.arange(1501.0), np.arange(1501.0), 1000)
    assert len(uneven) == 1000
    assert (np.diff(uneven) > 0).all()


def test_log_takes_the_later_of_repeated_steps_and_forgives_a_cut_last_line(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n{"step": 2, "loss": 3.5, "extra": 1}\n'
        '{"step": 3, "loss": NaN}\nnot json\n[1]\n{"step": 4, "lo'
    )
    columns, skipped = read_log(path)
    assert columns["step"].tolist() == [1, 2, 3]
    assert columns["loss"].tolist() == [5, 3.5, math.inf]
    assert np.isnan(columns["extra"]).tolist() == [True, False, True]
    assert skipped == 2


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": NaN}\n')
    assert "1 values are not finite" in page(tmp_path)


def test_speed_log_joins_by_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    (folder / "speed.jsonl").write_text('{"step": 2, "images_per_s": 512}\n')
    (run,) = find_results([tmp_path]).runs
    assert run.metrics["images_per_s"][2] == 512
    assert np.isnan(run.metrics["images_per_s"][[0, 1, 3]]).all()


def test_headline_shows_probe_and_retrieval(tmp_path: Path) -> None:
    folder = write_features(tmp_path / "f", "hmdb51", top1=0.5521, top5=0.913)
    recalls = {"label": {"1": 0.4104, "5": 0.69, "10": 0.8}, "same_video": {"1": 0.9734}}
    (folder / "retrieval.json").write_text(json.dumps(recalls))
    cells = re.findall(r'<td class="number">([^<]*)</td>', page(tmp_path))
    assert cells[:6] == ["55.2", "91.3", "41.0", "69.0", "80.0", "97.3"]


def test_demo_rows_are_shown_with_what_is_missing_as_a_dash(tmp_path: Path) -> None:
    rows = [
        {"encoder": "SeCo", "probe_top1": 0.82, "knn": 0.7, "r_at_1": 0.66},
        {"encoder": "random initialisation", "probe_top1": 0.5, "same_video_r_at_1": 0.9},
    ]
    (tmp_path / "demo.json").write_text(json.dumps({"rows": rows, "dataset": "shapes", "seed": 3}))
    text = page(tmp_path)
    cells = re.findall(r'<td class="number">([^<]*)</td>', text)
    assert cells[:8] == ["82.0", "70.0", "66.0", "–", "50.0", "–", "–", "90.0"]
    assert "data set shapes, seed 3" in text


def test_class_table_and_confusion_picture(tmp_path: Path) -> None:
    per_class = [{"label_name": HOSTILE, "accuracy": 0.25, "count": 8}]
    folder = write_features(tmp_path / "f", "x", per_class=per_class, mean_class=0.25)
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, format="PNG")
    (folder / "probe-confusion.png").write_bytes(png.getvalue())
    text = page(tmp_path)
    assert "&lt;script&gt;" in text
    assert 'src="data:image/png;base64,iVBOR' in text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("probe.json", '{"top1": 61.9}', "not a fraction"),
        ("probe.json", "[]", "not a JSON object"),
        ("probe.json", "{}", "holds no accuracy"),
        ("probe.json", '{"top1": 0.5, "per_class": [3]}', "per_class is not a list"),
        ("probe.json", '{"top1": 1' + "0" * 400 + "}", "not a fraction"),
        ("retrieval.json", '{"label": {"1": true}}', "not a fraction"),
        ("retrieval.json", '{"label": 4}', "holds no recall"),
        ("demo.json", '{"rows": 4}', "rows is not a list"),
        ("demo.json", "\ufeff{", "Expecting property name"),
        ("metrics.jsonl", "\n{}\n", "no usable line"),
        ("finetune.json", '{"dataset": "ucf101"}', "holds none of"),
        ("track.json", "[" * 100_000, ""),
    ],
)
def test_malformed_file_is_named_and_does_not_stop_the_rest(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    write_features(tmp_path / "good", "x")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / name).write_text(content)
    found = write_report([tmp_path], tmp_path / "report.html")
    assert len(found.features) == 1
    (unread,) = found.unread
    assert unread.path == tmp_path / "bad" / name
    assert reason in unread.reason
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "Could not be read" in text
    assert f"bad/{name}" in text


def test_broken_settings_and_picture_leave_the_figures(tmp_path: Path) -> None:
    write_run(tmp_path / "run", config="this is = = not toml")
    folder = write_features(tmp_path / "f", "x")
    (folder / "probe-confusion.png").write_bytes(b"<svg onload=alert(1)>")
    found = find_results([tmp_path])
    assert [item.path.name for item in found.unread] == ["probe-confusion.png", "config.toml"]
    assert found.runs[0].config == {}
    assert "chance levels that depend on it are missing" in render_report(found)


def test_nothing_found_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no results found"):
        find_results()
    with pytest.raises(InputError, match="is not a folder"):
        find_results([tmp_path / "absent"])
    (tmp_path / "probe.json").write_text("{")
    with pytest.raises(InputError, match=r"probe\.json: Expecting"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    write_run(tmp_path / "runs" / "a")
    write_features(tmp_path / "features" / "b", "x")
    found = find_results()
    assert (len(found.runs), len(found.features)) == (1, 1)
    assert len(find_results(["runs", "runs/a"]).runs) == 1


def test_page_is_self_contained_escaped_and_repeatable(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_run(results / "a", config=CONFIG + f'shards = ["{HOSTILE}"]\n')
    write_run(results / f"b{HOSTILE.replace('/', '')}")
    write_features(
        results / "f", HOSTILE, split=HOSTILE, method=HOSTILE, encoder={"checkpoint": HOSTILE}
    )
    write_report([results], tmp_path / "1.html")
    write_report([results], tmp_path / "2.html")
    text = (tmp_path / "1.html").read_text("utf-8")
    assert text == (tmp_path / "2.html").read_text("utf-8")
    assert "://" not in text
    tags = Tags(text).found
    names = {tag for tag, _ in tags}
    assert names.isdisjoint({"script", "link", "iframe", "object", "metadata"})
    links = [a[k] or "" for _, a in tags for k in ("href", "src", "xlink:href") if k in a]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    for link in links:
        assert not link.startswith("#") or link[1:] in ids
    for clip in re.findall(r"url\(#([^)]*)\)", text):
        assert clip in ids
    assert "#010203" not in text


def test_tables_hold_the_papers_figures_in_every_cell() -> None:
    rows = {row.method: row.figures for table in TABLES for row in table.rows}
    assert rows["SeCo-Inter+Intra+Order"] == ("61.91", "68.55", "71.86", "51.78")
    assert rows["VINCE [8]"] == ("36.20", "-", "62.90", "46.50")
    assert rows["SeCo (ResNet18)"] == ("50.81",)
    assert rows["SeCo"] == ("88.26", "55.55")
    for table, count in ((TABLE_1, 6), (TABLE_2, 9), (TABLE_3, 9)):
        own = [row for row in table.rows if not row.extra]
        assert len(own) == count
        for row in own:
            assert len(row.figures) == len(table.columns)
            assert all(re.fullmatch(r"\d\d\.\d\d|-", figure) for figure in row.figures)

    # The text's own differences (§5.3, abstract) hold between the figures.
    def gains(table: PaperTable, method: str, over: str) -> list[float]:
        figures = {row.method: row.figures for row in table.rows}
        pairs = zip(figures[method], figures[over], strict=True)
        return [round(float(ours) - float(theirs), 2) for ours, theirs in pairs]

    imagenet = "Supervised ImageNet Pre-training"
    assert gains(TABLE_1, "SeCo-Inter+Intra+Order", imagenet)[:3] == [9.57, 1.36, 2.32]
    assert gains(TABLE_3, "SeCo", imagenet) == [2.96, 6.47]


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("kinetics", 400, "kinetics400"),
        ("kinetics", None, None),
        ("kinetics", 600, None),
        ("Kinetics-400", None, "kinetics400"),
        ("k400-val", 400, "kinetics400"),
        ("kinetics400", 8, None),
        ("kinetics600", 400, None),
        ("k400-rendered", None, None),
        ("my-ucf101", None, None),
        ("UCF101", 101, "ucf101"),
        ("ucf101", 4, None),
        ("activitynet", None, "activitynet"),
        ("", None, None),
    ],
)
def test_known_dataset(name: str, classes: int | None, expected: str | None) -> None:
    assert known_dataset(name, classes) == expected


def test_only_a_linear_svm_on_a_validation_set_corresponds() -> None:
    assert probe_metric("kinetics400", "official val", "svm", 400) == "kinetics400-svm"
    assert probe_metric("kinetics400", "official val", "knn", 400) is None
    assert probe_metric("kinetics400", "train", "svm", 400) is None
    assert probe_metric("ucf101", "val", "svm", 101) is None


def measured(**changes: Any) -> Measured:
    values: dict[str, Any] = {"metric": "kinetics400-svm", "encoder": "mine", "arch": "resnet50"}
    values |= {"tasks": ("inter", "intra", "order"), "percent": 50.0, "note": ""}
    return Measured(**(values | changes))


def test_our_figure_takes_the_row_of_its_method_only() -> None:
    def places(table: PaperTable, item: Measured) -> list[tuple[str, int]]:
        rows = fill(table, [item])
        return [(row.method, n) for row in rows for n, cell in enumerate(row.ours) if cell]

    assert places(TABLE_1, measured()) == [("SeCo-Inter+Intra+Order", 0)]
    assert places(TABLE_1, measured(tasks=("inter",))) == [("SeCo-Inter", 0)]
    assert places(TABLE_1, measured(tasks=None)) == [("mine", 0)]
    assert places(TABLE_1, measured(tasks=("order",))) == [("mine", 0)]
    assert places(TABLE_2, measured()) == []
    assert places(TABLE_1, measured(arch="resnet18")) == []
    assert places(TABLE_2, measured(arch="resnet18")) == [("SeCo (ResNet18)", 0)]
    assert places(TABLE_3, measured(metric="hmdb51-finetune")) == [("SeCo", 1)]
    assert places(TABLE_3, measured()) == []


def test_figures_reach_the_page_beside_the_paper(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "seco")
    encoder = {"arch": "resnet50", "checkpoint": str(run / "last.pt")}
    write_features(tmp_path / "k", "kinetics400", encoder=encoder, n_test=1_980)
    write_features(tmp_path / "u", "ucf101", encoder=encoder, top1=0.7777)
    (run / "finetune.json").write_text(
        json.dumps(
            {"dataset": "ucf101", "split": 1, "top1": 0.8712, "classes": 101, "n_test": 3_783}
            | {"encoder": encoder}
        )
    )
    text = page(tmp_path)
    here = re.findall(r'<span class="here">([^<]*)</span><small>([^<]*)</small>', text)
    assert [figure for figure, _ in here] == ["61.02", "87.12"]
    assert "partial set: 1980 of 20000 videos" in here[0][1]
    assert "split 1, 3783 videos" in here[1][1]
    assert "not measured" in text
    assert "not comparable with the paper" in text
    row = text[text.index("SeCo-Inter+Intra+Order") :]
    assert row.index("61.02") < row.index("</tr>")


def test_set_size_note() -> None:
    assert set_size_note("kinetics400", 19_404) == "19404 videos"
    assert set_size_note("otb100", 4) == "partial set: 4 of 100 sequences"
    assert "unknown" in set_size_note("ucf101", None)
