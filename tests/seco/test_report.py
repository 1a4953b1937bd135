"""``seco report``: what is found, what stands beside the paper, and what the page may not do."""

from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from seco.report.report import (
    chance_levels,
    draw_charts,
    render_report,
    report_content,
    write_report,
)
from seco.report.results import find_results
from shards.errors import InputError
from tests.seco.made_results import (
    CONFIG,
    HOSTILE,
    png,
    write_evaluation,
    write_everything,
    write_features,
    write_paper_run,
    write_run,
)


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


class Rows(HTMLParser):
    """The rows of all tables, as the texts of their cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[list[str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.found.append([])
        if tag in ("td", "th"):
            self.found[-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1][-1] = f"{self.found[-1][-1]} {data}".strip()


def rows_of(text: str) -> list[list[str]]:
    return Rows(text).found


def test_run_appears_with_curves_chance_levels_and_settings(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one")
    text = page(tmp_path)
    for title in ("Loss, all tasks", "Loss, inter", "Loss, intra", "Loss, order", "Order accuracy"):
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
    assert "loss_inter" not in chance_levels({"queue_size": "many", "batch_size": 32})
    without = chance_levels({"queue_size": 0, "batch_size": 32})
    assert without["loss_inter"] == pytest.approx(math.log(1 + 3 * 31))
    assert "loss_intra" not in chance_levels({})


def test_tasks_left_out_have_no_chart(tmp_path: Path) -> None:
    write_run(tmp_path / "run", config='tasks = "inter"\n')
    (run,) = find_results([tmp_path]).runs
    titles = [chart.title for chart in draw_charts(run, "x")]
    assert titles == ["Loss, inter", "Learning rate"]


def test_columns_of_other_stages_have_charts_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("segments = 7\n")
    log = [{"step": n, "epoch": 0, "loss": 4.6, "top1": n / 9, "grad_norm": 3.0} for n in range(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (run,) = find_results([tmp_path]).runs
    assert [chart.title for chart in draw_charts(run, "x")] == ["Loss", "top1", "grad norm"]


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": NaN}\n')
    assert "1 values are not finite" in page(tmp_path)


def test_speed_log_has_a_chart(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    (folder / "speed.jsonl").write_text('{"step": 2, "images_per_s": 512}\n')
    (run,) = find_results([tmp_path]).runs
    assert run.speed is not None
    assert run.speed.curves["images_per_s"].steps.tolist() == [2]
    (chart,) = [c for c in draw_charts(run, "x") if c.title == "Images per second"]
    assert "last: images/s 512" in chart.note


def test_headline_shows_probe_and_retrieval(tmp_path: Path) -> None:
    folder = write_features(tmp_path / "f", "hmdb51", top1=0.5521, top5=0.913)
    recalls = {"label": {"1": 0.4104, "5": 0.69, "10": 0.8}, "same_video": {"1": 0.9734}}
    (folder / "retrieval.json").write_text(json.dumps(recalls))
    row = rows_of(page(tmp_path))[1]
    assert row[3:] == ["55.2", "91.3", "–", "41.0", "69.0", "80.0", "97.3"]


def test_comparisons_are_shown_with_what_is_missing_as_a_dash(tmp_path: Path) -> None:
    svm = {"SeCo": {"value": 0.82, "low": 0.7, "high": 0.9}, "random": {"value": 0.5}}
    rank = {"SeCo": {"value": 12.34, "low": 11, "high": 13}}
    content = {
        "dataset": "shapes",
        "groups": "12 recordings",
        "measures": [
            {"key": "svm@100", "title": "SVM, 100 % of labels", "values": svm},
            {"key": "effective_rank", "title": "effective rank", "values": rank},
        ],
        "comparisons": [{"sentence": "SeCo is better <b>"}],
    }
    (tmp_path / "compare.json").write_text(json.dumps(content))
    text = page(tmp_path)
    assert rows_of(text)[1:3] == [
        ["SVM, 100 % of labels", "82.0 (70.0 to 90.0)", "50.0"],
        ["effective rank", "12.3 (11.0 to 13.0)", "–"],
    ]
    assert "over 12 recordings" in text
    assert "SeCo is better &lt;b&gt;" in text


def test_class_table_and_confusion_picture(tmp_path: Path) -> None:
    per_class = [{"label_name": HOSTILE, "accuracy": 0.25, "count": 8}]
    folder = write_features(tmp_path / "f", "x", per_class=per_class, mean_class=0.25)
    (folder / "probe-confusion.png").write_bytes(png())
    text = page(tmp_path)
    assert "&lt;script&gt;" in text
    assert 'src="data:image/png;base64,iVBOR' in text


def test_classes_of_a_fine_tuned_network_are_folded_away(tmp_path: Path) -> None:
    rows = [("b", 0.75, 4), ("a", 0.5, 8)]
    per_class = [{"label_name": n, "accuracy": a, "count": c} for n, a, c in rows]
    values = {"dataset": "x", "split": "2", "top1": 0.6, "mean_class": 0.625}
    write_evaluation(tmp_path / "f", "finetune", **values, per_class=per_class)
    text = page(tmp_path)
    assert '<a href="#classes">' in text
    assert "fine-tuned on x, split 2</h3>" in text
    assert "mean over classes 62.5" in text
    assert "<details><summary>Accuracy by class (2), lowest first</summary>" in text
    assert [row[:3] for row in rows_of(text)[-2:]] == [["a", "8", "50.0"], ["b", "4", "75.0"]]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("probe.json", '{"top1": 61.9}', "not a fraction"),
        ("finetune.json", '{"top1": 0.5, "per_class": [3]}', "per_class is not a list"),
        ("probe.json", "[]", "not a JSON object"),
        ("probe.json", "{}", "has no accuracy"),
        ("probe.json", '{"top1": 0.5, "per_class": [3]}', "per_class is not a list"),
        ("probe.json", '{"top1": 1' + "0" * 400 + "}", "not a fraction"),
        ("retrieval.json", '{"label": {"1": true}}', "not a fraction"),
        ("retrieval.json", '{"label": 4}', "has no recall"),
        ("compare.json", '{"measures": 4}', "measures is not a list"),
        ("compare.json", "\ufeff{", "Expecting property name"),
        ("metrics.jsonl", "\n{}\n", "no usable line"),
        ("finetune.json", '{"dataset": "ucf101"}', "has none of"),
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
    assert "chance levels that depend on it are missing" in render_report(report_content(found))


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


def test_figures_reach_the_page_beside_the_paper(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "seco")
    encoder = {"arch": "resnet50", "checkpoint": str(run / "last.pt")}
    write_features(tmp_path / "k", "kinetics400", encoder=encoder, n_test=1_980)
    write_features(tmp_path / "u", "ucf101", encoder=encoder, top1=0.7777)
    tuned = {"dataset": "ucf101", "split": 1, "top1": 0.8712, "classes": 101, "n_test": 3_783}
    write_evaluation(run, "finetune", encoder=encoder, **tuned)
    text = page(tmp_path)
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows["SeCo-Inter+Intra+Order"][0] == (
        "61.91 61.02 [1] partial set: 1980 of 20000 videos"
    )
    assert rows["SeCo"] == ["88.26 87.12 [2] split 1, 3783 videos", "55.55 not measured"]
    assert "not measured" in text
    assert "not comparable with the paper" in text


def test_thinned_curves_are_told(tmp_path: Path) -> None:
    write_paper_run(tmp_path / "long", "inter", points=3_000)
    text = page(tmp_path)
    assert "3,000 lines were logged: each point is the mean of up to 4 consecutive ones" in text
    assert "consecutive" not in page_of(write_run(tmp_path / "other" / "short"))


def page_of(folder: Path) -> str:
    return render_report(report_content(find_results([folder])))


def test_markdown_and_json_hold_what_the_page_holds(tmp_path: Path) -> None:
    write_everything(tmp_path / "all")
    markdown, as_json = tmp_path / "r.md", tmp_path / "r.json"
    write_report([tmp_path / "all"], tmp_path / "r.html", markdown, as_json)
    content = json.loads(as_json.read_text("utf-8"))
    # A method of two tables has another number of columns in each.
    page_rows = rows_of((tmp_path / "r.html").read_text("utf-8"))
    on_page = {(row[0], len(row)): row[1:] for row in page_rows}
    in_markdown = {
        (cells[0].replace("\\", ""), len(cells)): cells[1:]
        for cells in (
            [cell.strip() for cell in line.strip("|").split(" |")]
            for line in markdown.read_text("utf-8").splitlines()
            if line.startswith("|")
        )
    }
    compared = 0
    for table in content["tables"]:
        for row in table["rows"]:
            if row["kind"] != "paper":
                continue
            for column, (printed, here) in enumerate(zip(row["paper"], row["here"], strict=True)):
                for shown in (on_page, in_markdown):
                    cell = shown[row["method"], 1 + len(row["paper"])][column]
                    assert cell.startswith(printed)
                    for figure in here:
                        assert f"{figure['percent']:.2f}" in cell
                        compared += 1
    assert compared == 2 * (3 + 3 + 4)  # probes, a tracker's, three splits and their mean
    assert [run["last"]["loss"] is not None for run in content["runs"]] == [True] * 3
    assert content["unread"][0]["reason"] in (tmp_path / "r.html").read_text("utf-8")
    assert content["unread"][0]["reason"] in markdown.read_text("utf-8")


def test_hostile_names_stay_text_in_markdown_and_json(tmp_path: Path) -> None:
    name = HOSTILE + "![x](http://x/y.png)|`a`\ud800\x1b[2J"
    folder = write_features(
        tmp_path / "f", name, encoder={"checkpoint": name, "loss": math.nan}, notes=[name]
    )
    write_evaluation(folder, "track", success_auc=0.4, settings={"a": math.inf}, dataset=name)
    files = [tmp_path / name for name in ("r.html", "r.md", "r.json")]
    write_report([tmp_path], *files)
    html, markdown, as_json = (file.read_text("utf-8") for file in files)
    for text in (html, markdown, as_json):
        assert "\x1b" not in text
    assert "<script>" not in html
    for line in markdown.splitlines():
        assert "alert" not in line or r"\<script\>" in line
        assert "y.png" not in line or (r"!\[x\]" in line and r"\|" in line)
    assert "alert" in markdown
    assert json.loads(as_json, parse_constant=pytest.fail)["evaluations"][0]["settings"]


@pytest.mark.parametrize(("names", "shown"), [(b"caf\xe9", r"caf\udce9"), (b"a\nb", r"a\nb")])
def test_folder_names_that_are_no_text(tmp_path: Path, names: bytes, shown: str) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + names))
    write_features(folder, "x")
    text = page(tmp_path)
    assert shown in text


def test_a_pipe_and_a_giant_are_not_read(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    os.mkfifo(tmp_path / "probe.json")
    with (tmp_path / "compare.json").open("wb") as file:
        file.truncate(100 << 20)
    found = find_results([tmp_path])
    reasons = {item.path.name: item.reason for item in found.unread}
    assert reasons == {"probe.json": "is not a file", "compare.json": "is larger than 64 MiB"}


@pytest.mark.parametrize(
    "values",
    [
        {"sequences": "many", "fps": "fast", "settings": [1], "encoder": 4, "notes": {"a": 1}},
        {"sequences": None, "fps": math.nan, "notes": [None, 3, [4]], "of_sequences": None},
        {"frames": -1, "fps": 1e999, "encoder": {"arch": 7, "checkpoint": ["a"], "tasks": 3}},
    ],
)
def test_odd_values_of_a_result_do_not_stop_it(tmp_path: Path, values: dict[str, Any]) -> None:
    write_evaluation(tmp_path, "track", dataset="otb100", success_auc=0.4, **values)
    files = [tmp_path / name for name in ("r.html", "r.md", "r.json")]
    found = write_report([tmp_path], *files)
    assert found.unread == []
    assert "40.00" in files[0].read_text("utf-8")
