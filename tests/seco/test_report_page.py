"""The report in headless Chromium, as it looks on a desk and on a phone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from seco.report.report import write_report
from tests.browser import DESKTOP_PX, PHONE_PX, open_page
from tests.seco.made_results import HOSTILE, write_everything, write_features

# What a reader with eyes would notice: text too faint for what is behind it, curves not drawn,
# words that run out of their cells.
_LOOK = """
(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = text => { const [r, g, b] = rgb(text).map(c => { c /= 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const contrast = colour => { const [a, b] = [light(colour), page].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05); };
  const seen = [...document.querySelectorAll("h1, h2, p, td, th, small, a, summary, .here, dt")];
  const words = [...document.querySelectorAll("svg text")];
  const curves = [...document.querySelectorAll("svg path")];
  const wide = [...document.querySelectorAll(".scroll")];
  return {
    faintest: Math.min(...seen.map(e => contrast(getComputedStyle(e).color))),
    faintest_word: Math.min(...words.map(e => contrast(getComputedStyle(e).fill))),
    faintest_curve: Math.min(...curves.filter(e => getComputedStyle(e).stroke.startsWith("rgb("))
      .map(e => contrast(getComputedStyle(e).stroke))),
    words: words.length,
    charts: [...document.querySelectorAll("figure svg")].filter(e => e.checkVisibility()
      && e.getBoundingClientRect().width > 200).length,
    sideways: wide.filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth)
      .map(e => e.innerText.slice(0, 80)),
    scripts: document.scripts.length,
  };
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_everything(folder / "all")
    write_features(
        folder / "all" / "hostile",
        f"<img src=http://x.invalid/{HOSTILE}>",
        per_class=[{"label_name": "<img src=x onerror=alert(1)>", "accuracy": 0.5}],
    )
    write_report([folder / "all"], folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size_px", [DESKTOP_PX, PHONE_PX])
def test_report_opens_without_a_fault(page: Path, size_px: tuple[int, int], dark: bool) -> None:
    opened = open_page(page, size_px=size_px, dark=dark, script=_LOOK)
    assert opened.faults() == []
    assert opened.images  # the confusion matrix
    assert ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)") == opened.background
    look = opened.answer
    assert look["scripts"] == 0
    assert look["charts"] == 30  # of three runs: 8, 10 and 12
    assert look["words"] >= 10 * look["charts"]  # of their axes
    assert look["faintest"] >= 4.5  # WCAG AA for text
    assert look["faintest_word"] >= 4.5
    assert look["faintest_curve"] >= 3  # and for graphics
    assert look["sideways"] == []
    for text in ("61.91", "Differs: epochs 100 (paper 400)", "partial set: 4 of 100", "alert(1)"):
        assert re.search(re.escape(text), opened.text), text
