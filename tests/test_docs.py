"""The commands in the documents exist, with the options they are given."""

from __future__ import annotations

import re
import shlex

import click
import pytest

import cli
from tests.data import ROOT

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
