"""The commands in the documents exist, with the options they are given."""

from __future__ import annotations

import re
import shlex

import click
import pytest

import cli
from tests.data import ROOT


def commands_of(document: str) -> list[str]:
    text = (ROOT / "docs" / document).read_text("utf-8")
    return re.findall(r"^    (seco .*?)(?:\s+#.*)?$", text, re.MULTILINE)


def require_known(line: str) -> None:
    words = shlex.split(line)[1:]
    command: click.Command = cli.seco
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"no such command: {line}"
        command, words = found, words[1:]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known, line


def test_commands_of_the_reproduction_exist() -> None:
    lines = commands_of("reproduce.md")
    assert len(lines) >= 20
    for line in lines:
        require_known(line)


def test_unknown_commands_and_options_are_found() -> None:
    for line in ("seco retrain --shards x", "seco probe --feature x", "seco retrieve find"):
        with pytest.raises(AssertionError):
            require_known(line)
