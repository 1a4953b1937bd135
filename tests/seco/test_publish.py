"""``seco publish``: what the folder holds, what its card says, what is refused, and the upload."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import load_file

import cli
import seco
from seco.checkpoints.deploy import timm_model
from seco.checkpoints.io import load_checkpoint, save_torch_file
from seco.models.backbones import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from seco.report import publish as publishing
from seco.report.card import PAPER, TOOLKIT, Model, loading_code
from tests import commands
from tests.data import ROOT
from tests.hub_server import READ_ONLY, TOKEN, hub_server
from tests.made_shards import make_set
from tests.seco.made_results import HOSTILE

TINY = "--epochs 2 --batch-size 4 --bn-group 2 --queue-size 12 --crop-size 32 --workers 0"
TINY += " --device cpu --log-every 1 --loggers none"
SMALL = shlex.split("--frames 3 --short-edge 36 --crop-size 32 --workers 0 --device cpu")
FILES = {"model.safetensors", "config.json", "README.md", "seco.json"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(tmp_path_factory.mktemp("shards"), videos=18, frames=4, per_shard=7)


def trained(folder: Path, shards: str, arch: str, *options: str) -> Path:
    arguments = ["--shards", shards, "--out", str(folder), "--arch", arch, *options]
    assert cli.run(["pretrain", *arguments, *shlex.split(TINY)]) == 0
    return folder


@pytest.fixture(scope="module")
def run(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "made", shards, "resnet10_w16")


@pytest.fixture(scope="module")
def results(run: Path, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with features, a probe, a retrieval and a comparison."""
    folder = tmp_path_factory.mktemp("results")
    out, checkpoint = str(folder / "features"), str(run / "last.pt")
    given = ["--shards", shards, "--checkpoint", checkpoint, "--out", out]
    assert cli.run(["extract-features", *given, *SMALL]) == 0
    assert cli.run(["probe", "--features", out]) == 0
    assert cli.run(["retrieve", "evaluate", "--features", out]) == 0
    encoders = ["--encoder", f"seco={run}", "--encoder", "random", "--fractions", "100"]
    given = ["--shards", shards, *encoders, "--out", str(folder / "compared"), "--svm-c", "0.01"]
    assert cli.run(["compare", *given, *SMALL]) == 0
    return folder


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny", "vit_b_16", "timm:test_vit"])
def test_the_code_of_a_card_is_code(arch: str) -> None:
    model = Model(
        arch=arch, width=8, sha256="", file_sha256="", file_bytes=1, crop_px=224,
        mean=IMAGENET_MEAN, std=IMAGENET_STD, timm=timm_model(arch) is not None,
    )  # fmt: skip
    found = dict(loading_code(model, None))
    for code in found.values():
        compile(code, arch, "exec")
    assert ("With torchvision" in found) == (not arch.startswith("timm:"))
    smaller = dict(loading_code(dataclasses.replace(model, crop_px=96), None))
    assert ("With torchvision" in smaller) == (arch in ("resnet18", "convnext_tiny"))
    other = dict(loading_code(dataclasses.replace(model, mean=(0.5, 0.5, 0.5)), None))
    assert any(title.startswith("With the toolkit, whose input is minus (0.4") for title in other)
    if code := found.get("With torchvision"):
        lines = [line for line in code.splitlines() if line.startswith("model")][:2]
        there: dict[str, Any] = {"torchvision": torchvision, "torch": torch}
        exec("\n".join(lines), there)
        assert there["model"].state_dict().keys() == build_backbone(arch).state_dict().keys()


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run that a test may spoil."""
    return Path(shutil.copytree(run, tmp_path / "runs" / "made"))


def publish(run: Path, out: Path, *options: object) -> str:
    """Publish; returns the card."""
    assert cli.run(["publish", str(run), "--out", str(out), *map(str, options)]) == 0
    return (out / "README.md").read_text("utf-8")


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = load_checkpoint(path)
    change(content)
    save_torch_file(path, content)


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_card_says_what_is_known(
    run: Path, results: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--shards", shards, "--results", results, "--license", "cc-by-4.0")
    card = publish(run, tmp_path / "out", *given, "--data-license", "CC BY 4.0")
    assert capsys.readouterr().err == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "cc-by-4.0"
    assert head["pipeline_tag"] == "image-feature-extraction"
    assert "library_name" not in head  # timm has no such network
    assert "resnet10_w16" in head["tags"]

    data = section(card, "Training data")
    assert "| videos | 18, of which 18 were trained on |" in data
    assert "| frames | 72 |" in data and "| dataset | made |" in data
    assert "| licence of the data | CC BY 4.0 |" in data
    tars = sorted(Path(shards).parent.glob("*.tar"))
    digests = [hashlib.sha256(tar.read_bytes()).hexdigest() for tar in tars]
    lines = "".join(f"{d}  {tar.name}\n" for d, tar in zip(digests, tars, strict=True))
    assert hashlib.sha256(lines.encode()).hexdigest() in data
    assert all(f"| {digest} |" in data for digest in digests)
    assert load_checkpoint(run / "last.pt")["videos"] in data

    recipe = section(card, "Training")
    assert "| trained for | step 8 of 8, 2 of 2 epochs |" in recipe
    assert "| optimizer | sgd |" in recipe
    toml = re.search(r"```toml\n(.*?)```", recipe, re.S)
    assert toml and toml[1].splitlines() == [
        'arch = "resnet10_w16"', "epochs = 2", "batch_size = 4", "queue_size = 12",
        "crop_size = 32", "bn_group = 2",
    ]  # fmt: skip
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"loss {log[-1]['loss']:.4g}" in recipe

    found = section(card, "Results")
    probe = json.loads((results / "features" / "probe.json").read_text())
    retrieval = json.loads((results / "features" / "retrieval.json").read_text())
    protocol = "linear SVM, C = 1, features scaled: none, split 1 test, 12 training and 6 test"
    assert f"{protocol} videos, 3 frames per video, 32 px" in found
    assert f"top-1 {100 * probe['top1']:.1f}, top-5" in found
    assert f"R@1 {100 * retrieval['label']['1']:.1f}" in found
    compared = json.loads((results / "compared" / "compare.json").read_text())
    assert "no maps: fewer than 12 test videos" in compared["notes"]
    assert "trained on 1 train, tested on 1 test; in parentheses 95 % intervals over 6" in found
    assert "| measure | seco (this model) | random |" in found
    for measure in compared["measures"][:3]:
        ours = measure["values"]["seco"]
        ends = [f"{100 * ours[name]:.1f}" for name in ("value", "low", "high")]
        assert f"| {ends[0]} ({ends[1]} to {ends[2]}) |" in found.replace("\\", "")

    limits = section(card, "Limits")
    assert "It was trained on 18 videos; the paper's was on 240,000." in limits
    assert "The run is 2 of the paper's 400 epochs long." in limits
    assert "not been evaluated" not in limits and "No licence" not in limits
    assert str(tmp_path.parent) not in card  # no path of this machine


def test_a_card_of_little_names_what_is_missing(copy: Path, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "speed.jsonl", "config.toml", "report.html"):
        (copy / name).unlink()
    card = publish(copy, tmp_path / "out", "--name", "small")
    assert "\n# small\n" in card
    assert "license" not in yaml.safe_load(card.split("---")[1])
    assert "None are known." in section(card, "Results")
    limits = section(card, "Limits")
    for missing in (
        "has not been evaluated",
        "number of training videos is not recorded",
        "No licence of the weights",
        "licence of the training data is not recorded",
    ):
        assert missing in limits  # fmt: skip
    assert "last logged" not in card


def test_an_unfinished_run_says_so(
    shards: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(copy / "last.pt", lambda content: content.update(step=6))
    card = publish(copy, tmp_path / "out")
    assert "step 6 of 8, 1.5 of 2 epochs" in card
    assert "Training was not finished" in section(card, "Limits")
    assert "the run has not ended, and the card says so" in capsys.readouterr().err
    # A checkpoint of an earlier version does not know; the shards do.
    changed(copy / "last.pt", lambda content: content.pop("steps_per_epoch"))
    assert "| trained for | step 6 |" in publish(copy, tmp_path / "old")
    again = publish(copy, tmp_path / "old", "--shards", shards)
    assert "step 6 of 8, 1.5 of 2 epochs" in again


def test_other_programs_load_it(shards: str, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", shards, "resnet18", "--split", "1", "--seed", "3")
    out = tmp_path / "out"
    card = publish(run, out)
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "timm"
    assert 'split = "1"' in card and "seed = 3" in card
    network = torchvision.models.resnet18(weights=None)
    network.fc = torch.nn.Identity()
    network.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = seco.load_backbone(run / "last.pt")(images)
        assert torch.equal(network.eval()(images), expected)
        assert torch.equal(seco.load_backbone(out / "model.safetensors")(images), expected)
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert torch.allclose(model(images), expected, atol=1e-6)
        sizes = timm.data.resolve_model_data_config(model)
        assert sizes["input_size"] == [3, 32, 32] and sizes["mean"] == [0.485, 0.456, 0.406]
        resize = timm.data.create_transform(**sizes).transforms[0]
        assert f"the shorter edge resized to {resize.size} px, the central 32 × 32 px" in card
        auto = transformers.AutoModel.from_pretrained(str(out)).eval()
        pooled = auto(pixel_values=images).pooler_output.flatten(1)
        assert torch.allclose(pooled, expected, atol=1e-6)


TRICKS = "](javascript:alert(1)) `x` | <img src=x> ![i](http://x.invalid) \n# big\n\x1b[31m\u202e"
TRICKS += " https://x.invalid www.x.invalid ```\n---\n" + HOSTILE


def tokens(card: str) -> list[Any]:
    """The card's Markdown as a reader's program takes it, front matter apart."""
    text = card.split("---\n", 2)[2]
    found = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    return [*found, *(child for token in found for child in token.children or [])]


def test_hostile_names_stay_text(run: Path, copy: Path, tmp_path: Path) -> None:
    sha256 = publishing.tensors_sha256(load_backbone_state(copy))
    encoder = {"sha256": sha256, "arch": TRICKS, "checkpoint": "/home/me/secret/last.pt"}
    folder = tmp_path / "results"
    folder.mkdir()
    common = {"dataset": TRICKS, "split": TRICKS, "encoder": encoder, "notes": [TRICKS] * 40}
    probe = {"method": TRICKS, "top1": 0.5, "normalise": TRICKS, "n_train": 3, "n_test": 4}
    recalls = {str(k): 0.5 for k in range(1, 500)}
    measures = [
        {"key": "a", "title": TRICKS, "values": {TRICKS: {"value": 0.5}, "b|c": {"value": 0.25}}}
    ]
    for name, values in {
        "probe": probe,
        "retrieval": {"label": recalls, "queries": 1, "gallery": 2},
        "finetune": {"top1": 0.25, "protocol": {"epochs": TRICKS, "lr": TRICKS}},
        "track": {"success_auc": 0.75, "settings": {"scales": [TRICKS], "epochs": 1}},
        "compare": {
            "measures": measures,
            "groups": TRICKS,
            "train_split": TRICKS,
            "encoders": {TRICKS: encoder},
            "comparisons": [{"sentence": TRICKS}],
        },
    }.items():
        (folder / f"{name}.json").write_text(json.dumps({**common, **values}))
    with (copy / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 9, TRICKS: 1.0}) + "\n")
    settings = {"split": TRICKS, "init": f"/home/me/{TRICKS}", "out": "/home/me/x"}
    changed(copy / "last.pt", lambda content: content["config"].update(settings))
    named = ("--results", folder, "--data-license", TRICKS, "--name", TRICKS)
    card = publish(copy, tmp_path / "out", *named)
    assert all(one in card for one in ("50.0", "25.0", "75.0"))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", card)
    assert "/home/me" not in card and len(card) < 60_000
    head = yaml.safe_load(card.split("---")[1])
    assert set(head) == {"pipeline_tag", "tags"}
    hostile = tokens(card)
    kinds = {token.type for token in hostile}
    assert not kinds & {"link_open", "image", "html_block", "html_inline", "hr", "lheading_open"}
    plain = tokens(publish(run, tmp_path / "plain"))
    for kind in ("heading_open", "fence", "bullet_list_open"):
        count = [sum(token.type == kind for token in found) for found in (hostile, plain)]
        assert count[0] == count[1], kind
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert max(len(re.findall(r"(?<!\\)\|", row)) for row in rows) <= 5
    assert "://" not in re.sub(r"```.*?```", "", card, flags=re.S)


def load_backbone_state(run: Path) -> dict[str, torch.Tensor]:
    return seco.load_backbone(run / "last.pt").network.state_dict()


def complaint(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal; no folder is left."""
    capsys.readouterr()
    assert cli.run(["publish", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("seco: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


def test_runs_that_cannot_be_published(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, last = tmp_path / "out", copy / "last.pt"

    def refused(run: Path = copy) -> str:
        line = complaint([run, "--out", out], capsys)
        assert not out.exists() and not list(tmp_path.glob("*.part"))
        return line

    assert "is not a folder — give the folder of a `seco pretrain` run" in refused(last)
    kept = last.read_bytes()
    last.unlink()
    assert "the run has not saved a checkpoint yet — wait for it, or resume" in refused()
    outside = tmp_path / "mine.pt"
    outside.write_bytes(kept)
    last.symlink_to(outside)
    assert "is a link to a file outside of the run" in refused()
    last.unlink()
    last.write_bytes(kept[:5000])
    assert "last.pt" in refused()
    said = {"labels": [0], "label_names": ["a"], "dataset": "d", "encoder": {}}
    spoilt: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda c: c.update(finetuned=said), "is of `seco finetune`, which is not published"),
        (lambda c: c.pop("optimizer"), "is not of `seco pretrain`"),
        (lambda c: c["config"].update(epochs="many"), "has unknown settings (epochs: expected"),
        (lambda c: c["config"].update(preset="mine"), "settings that no run has (unknown preset"),
        (lambda c: c["config"].update(batch_size=1), "settings that no run has (--batch-size"),
    ]
    for change, message in spoilt:
        last.write_bytes(kept)
        changed(last, change)
        assert message in refused()
    assert "holds no run (no last.pt)" in refused(tmp_path)


def test_results_and_shards_of_others(
    copy: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    other = {"sha256": "0" * 64}
    probe = {"top1": 0.5, "dataset": "zz", "encoder": other}
    (copy / "probe.json").write_text(json.dumps(probe))
    (copy / "compare.json").write_text("[]")
    card = publish(copy, out)
    assert "zz" not in card and "None are known." in card
    said = capsys.readouterr().err
    assert f"left out: {copy}: was measured with other weights" in said
    assert f"{copy / 'compare.json'}: cannot be read: is not a JSON object" in said
    for name, message in {
        "probe.json": "was measured with other weights — leave it out",
        "compare.json": "is not a JSON object",
        "config.toml": "is not a result — give folders, or files named probe.json",
        "track.json": "does not exist",
    }.items():
        arguments: list[object] = [copy, "--out", tmp_path / "new", "--results", copy / name]
        assert message in complaint(arguments, capsys)
    # A link in the run's folder may lead to a file of the reader's own.
    mine = tmp_path / "mine.json"
    sha256 = publishing.tensors_sha256(load_backbone_state(copy))
    mine.write_text(json.dumps({**probe, "encoder": {"sha256": sha256}}))
    (copy / "probe.json").unlink()
    (copy / "probe.json").symlink_to(mine)
    assert "zz" not in publish(copy, tmp_path / "linked")
    (copy / "probe.json").unlink()
    shutil.copy(mine, copy / "probe.json")
    assert "zz" in publish(copy, tmp_path / "linked")
    stale = {"label": {"1": 0.123}, "encoder": other}  # of features that were extracted again
    (copy / "retrieval.json").write_text(json.dumps(stale))
    assert "12.3" not in publish(copy, tmp_path / "linked")
    others = make_set(tmp_path / "others", videos=17, frames=4, name="others")
    line = complaint([copy, "--out", tmp_path / "new", "--shards", others], capsys)
    assert "these are not the videos that the run was trained on" in line
    assert not (tmp_path / "new").exists()


def test_a_folder_is_made_whole_or_not_at_all(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments: list[object] = [run, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "render_card", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.run(["publish", *map(str, arguments)])
        assert list(tmp_path.iterdir()) == []
    out.mkdir()  # an empty folder is taken
    first = publish(run, out)
    (out / "picture.png").write_bytes(b"mine")
    assert publish(run, out, "--license", "mit") != first
    assert {path.name for path in out.iterdir()} == FILES | {"picture.png"}
    (out / "README.md").write_text("my own words")
    assert "was edited since it was written — rename it" in complaint(arguments, capsys)
    (out / "README.md").rename(out / "mine.md")
    assert publish(run, out) == first
    move = os.replace
    for stops in range(4):  # interrupted between two files
        moved = []

        def replace(source: Path, target: Path, moved: Any = moved, stops: int = stops) -> None:
            if Path(target).parent == out:
                if len(moved) == stops:
                    raise KeyboardInterrupt
                moved.append(target)
            move(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            assert cli.run(["publish", *map(str, arguments), "--license", "mit"]) == 75
        assert len(moved) == stops
        assert not (out / "README.md").exists()
        assert "mit" in publish(run, out, "--license", "mit")
    assert publish(run, out) == first
    (out / "seco.json").unlink()
    assert "is not empty, and not of `seco publish`" in complaint(arguments, capsys)
    (out / "seco.json").write_text("{}")
    assert "is not of `seco publish`" in complaint(arguments, capsys)
    assert "is not empty" in complaint([run, "--out", run], capsys)
    file = tmp_path / "file"
    file.touch()
    assert "is a file, not a folder" in complaint([run, "--out", file], capsys)
    assert "identifier" in complaint([*arguments[:2], file, "--license", "My own: X"], capsys)


def pushed(run: Path, out: Path, *options: str, **environment: str) -> tuple[int, str, str]:
    given = ["publish", run, "--out", out, "--push", *options]
    environment = {"HF_HOME": str(out.parent / "home"), "HF_TOKEN": "", **environment}
    process = commands.start(*given, **environment)
    shown, error = process.communicate(timeout=120)
    assert "Traceback" not in error
    return process.returncode or 0, shown, error


def test_push_uploads_the_files_as_one_commit(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with hub_server() as hub:
        for count in (1, 2):
            code, shown, error = pushed(run, out, "me/seco-made", **hub.environment())
            assert code == 0, error
            assert shown.splitlines() == [str(out), f"{hub.address}/me/seco-made"]
            assert hub.commits == count
        assert hub.private == {"me/seco-made": True}
        files = hub.files["me/seco-made"]
        assert files == {path.name: path.read_bytes() for path in out.iterdir()}
        assert files.keys() == FILES
        assert "hf\\-hub" not in (out / "README.md").read_text()
        # An existing repository has to have the visibility that is asked for.
        code, _, error = pushed(run, out, "me/seco-made", "--public", **hub.environment())
        assert code == 1 and "me/seco-made: exists and is private — give --private" in error
        assert pushed(run, out, "me/open", "--public", **hub.environment())[0] == 0
        assert hub.private["me/open"] is False
        code, _, error = pushed(run, out, "me/open", **hub.environment())
        assert code == 1 and "me/open: exists and is public — give --public" in error
        assert hub.commits == 3


def test_a_push_that_fails_is_one_line(run: Path, tmp_path: Path) -> None:
    out, new = tmp_path / "out", tmp_path / "new"

    def refused(folder: Path, *options: str, **environment: str) -> str:
        code, shown, error = pushed(run, folder, *options, **environment)
        lines = [line for line in error.splitlines() if line.startswith("seco: ")]
        assert code == 1 and shown == "" and len(lines) == 1, error
        assert TOKEN not in error
        return lines[0]

    complete = f"{out} is complete; run the command again to upload it"
    with hub_server() as hub:
        line = refused(out, "me/made", **hub.environment("hf_wrong"))
        assert "--push me/made: the Hub refuses the token (401)" in line and complete in line
        line = refused(out, "me/made", **hub.environment(READ_ONLY))
        assert "the token may not write there (403)" in line
        hub.fault = 400, "Invalid metadata\nin \x1b[31mREADME.md"
        line = refused(out, "me/made", **hub.environment())
        assert "the Hub answered 400: Invalid metadata" in line and "\x1b" not in line
        asked = len(hub.paths)
        for name in ("made", "me/ma/de", "me/../x", "me/a b", "https://x.invalid/me/made"):
            assert "is not OWNER/NAME" in refused(new, name, **hub.environment())
        line = refused(new, "me/made", **{**hub.environment(), "HF_TOKEN": ""})
        assert "no token of the Hugging Face Hub was found — log in with" in line
        assert len(hub.paths) == asked and not new.exists()  # known before any work
        environment = hub.environment()
    line = refused(out, "me/made", **environment)  # the server is gone
    assert "the upload failed (ConnectError" in line and complete in line


def test_without_the_package_one_line_says_how_to_get_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint([run, "--out", tmp_path / "out", "--public"], capsys)
    assert line.endswith("--public: has no effect without --push — leave it out")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = complaint([run, "--out", tmp_path / "out", "--push", "me/made"], capsys)
    assert line.endswith('huggingface_hub is not installed — pip install "seco-video[hub]"')


def test_the_python_function(run: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished = seco.Run(run, run / "last.pt")
    found = seco.publish(finished, out, results=results / "features", license="mit")
    assert found.folder == out and found.url is None
    card = (out / "README.md").read_text("utf-8")
    assert publish(run, out, "--results", results / "features", "--license", "mit") == card
    with pytest.raises(seco.InputError, match="did you mean license"):
        seco.publish(run, out, licence="mit")
    with pytest.raises(seco.InputError, match="is not OWNER/NAME"):
        seco.publish(run, out, push="made")


def test_the_citations_are_those_of_the_repository() -> None:
    assert PAPER in (ROOT / "README.md").read_text("utf-8")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    said = TOOLKIT.replace("{", "").replace("}", "")
    for text in (cited["title"], cited["authors"][0]["name"], cited["version"], cited["license"]):
        assert text in said
