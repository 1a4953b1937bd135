"""Help texts and documents use the field's words: the glossary as patterns."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

import cli
from tests.data import ROOT

# What must not be written, and what to write instead. Each matches the wrong sense only.
NOT = {
    r"\bloader processes\b|\ba loader process\b": "workers",
    r"\bgo(?:es|ing)? on (?:with|from|exactly|where|in)\b|\bgone on with\b": "resume, continue",
    r"\bdata sets?\b": "dataset",
    r"\btold of\b|\btells of\b|\bsays so\b": "report, print, log",
    r"\b(?:is|are) no (?!longer|more|less|fewer|other|such|larger|smaller|worse|better|doubt)": (
        "is not a"
    ),
    r"\bshares? of right answers\b|\bright answers\b": "accuracy",
    r"\bwhat was saved\b": "checkpoint",
    r"\bsigns of life\b": "heartbeats",
    r"\bnobody knows\b": "unknown",
    r"\b(?:frames?|videos?|images?|steps?|queries|crops|clips?|lines?|bytes|rows?|shards?) an? "
    r"(?:second|video|class|shard|clip|frame|step|epoch|GPU|process|process's|batch)\b": "per",
    r"\bbeside (?:the|their|its|a|an|those|each|bare)\b": "compared with, next to",
    r"\ba machine's first\b": "once per node",
    r"\bspread\b(?! over| evenly)": "feature std",
    r"\babsent keys\b": "missing keys",
}


def helps(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    """(where, text) of a command's help and of its options', and of all below it."""
    yield name, command.help or ""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield f"{name} {parameter.opts[0]}", parameter.help or ""
    if isinstance(command, click.Group) and name != "seco bench":
        for each, sub in command.commands.items():
            yield from helps(sub, f"{name} {each}")


def documents() -> Iterator[tuple[str, str]]:
    """(where, paragraph) of the documents, without code."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
        text = re.sub(r"^    .*$", "", text, flags=re.M)
        for paragraph in re.split(r"\n\s*\n", re.sub(r"`[^`]*`", "``", text)):
            yield path.name, " ".join(paragraph.split())


@pytest.mark.parametrize("pattern", NOT)
def test_words_that_are_not_the_fields_are_not_used(pattern: str) -> None:
    places = [*helps(cli.seco, "seco"), *documents()]
    assert len(places) > 500
    found = [
        f"{where}: …{text[max(0, match.start() - 30) : match.end() + 30]}…"
        for where, text in places
        for match in re.finditer(pattern, text)
    ]
    assert not found, f"write {NOT[pattern]!r} instead:\n" + "\n".join(found)
