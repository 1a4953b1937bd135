"""The commands in the documents exist, with the options they are given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image

import cli
import seco.api
from seco.checkpoints.weights import random_backbone
from tests.data import ROOT
from tests.pipelines.made_videos import draw_video

DOCUMENTS = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]


def commands_of(document: str) -> list[str]:
    """Commands on lines of their own; one that ends in a backslash goes on in the next."""
    text = (ROOT / document).read_text("utf-8").replace("\\\n", " ")
    return re.findall(r"^    (seco [\w-]+ .*?)(?:\s+#.*)?$", text, re.MULTILINE)


def require_known(line: str) -> None:
    words = shlex.split(line)[1:]
    command: click.Command = cli.seco
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"no such command: {line}"
        command, words = found, words[1:]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known, line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_the_documents_exist(document: str) -> None:
    for line in commands_of(document):
        require_known(line)


def test_the_documents_hold_commands() -> None:
    assert len(commands_of("docs/reproduce.md")) >= 20
    assert sum(len(commands_of(document)) for document in DOCUMENTS) >= 50


def test_unknown_commands_and_options_are_found() -> None:
    for line in ("seco retrain --shards x", "seco probe --feature x", "seco retrieve find"):
        with pytest.raises(AssertionError):
            require_known(line)


_FILE = re.compile(r"``?([\w./-]*\w\.(?:py|sh))``?")


def test_files_that_are_named_exist() -> None:
    """In documents and docstrings; a name without its folder is enough."""
    rooms = [ROOT / room for room in ("seco", "shards", "pipelines", "benchmarks", "docs", "tests")]
    code = [path for room in rooms for path in room.rglob("*.py")]
    there = {p.name for p in [*code, *ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.sh")]}
    documents = [*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md"), ROOT / "README.md"]
    found = {
        (path.name, name)
        for path in [*code, *documents]
        for name in _FILE.findall(path.read_text("utf-8"))
    }
    assert len(found) > 40
    assert [(path, name) for path, name in sorted(found) if name.split("/")[-1] not in there] == []


# What makes the examples of the documents small enough for a test.
_SMALLER = {
    '"resnet50"': '"resnet10_w16"',
    "queue_size=65_536": "queue_size=48",
    "crop_size=224": "crop_size=32",
    "RandomResizedCrop(224": "RandomResizedCrop(32",
    "batch_size=256": "batch_size=4",
    "batch_size=32": "batch_size=4",
    "epochs=400": "epochs=1",
    "epochs=100": "epochs=1",
    "workers=8": "workers=0",
    "frames=30": "frames=3",
}


@pytest.mark.parametrize("document", ["README.md", "docs/api.md"])
def test_python_examples_run(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text("utf-8"), re.M | re.S)
    assert len(blocks) == {"README.md": 1, "docs/api.md": 5}[document]
    for name in ("Circle", "Square"):
        for number in range(4):
            path = tmp_path / "raw" / name / f"{name}{number}.mp4"
            draw_video(path, size="64x48", frames=6)
    monkeypatch.chdir(tmp_path)
    pretrain, extract = seco.api.pretrain, seco.api.extract
    small = {"crop_size": 32, "queue_size": 24, "device": "cpu", "workers": 0, "loggers": "none"}
    sizes = {"short_edge": 40, "crop_size": 32, "device": "cpu", "workers": 0}
    monkeypatch.setattr(
        seco.api, "pretrain", lambda **given: pretrain(**{"arch": "resnet10_w16", **small, **given})
    )
    monkeypatch.setattr(
        seco.api, "extract", lambda *given, **more: extract(*given, **{**sizes, **more})
    )
    code = "\n".join(blocks)
    for full, smaller in _SMALLER.items():
        code = code.replace(full, smaller)
    exec(compile(code, document, "exec"), {"__name__": "__main__"})
    assert list((tmp_path / "runs").glob("*/last.pt"))


def test_python_examples_of_exporting_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/export.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 6
    (tmp_path / "runs/k400").mkdir(parents=True)
    torch.save(random_backbone("resnet18", 0).state_dict(), tmp_path / "runs/k400/last.pt")
    (tmp_path / "frames").mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (80, 90, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"frames/{number}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    code = "\n".join(blocks).replace("path/to/clone", str(ROOT))
    given: dict[str, Any] = {}
    exec(compile(code, "docs/export.md", "exec"), given)
    assert given["features"].shape == (1, 512)
    shown = capsys.readouterr().out
    difference = re.search(r"^\d\S*$", shown, re.M)
    assert difference and float(difference[0]) <= 1e-4
    assert '"weights_sha256"' in shown
