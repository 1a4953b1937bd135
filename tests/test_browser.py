"""The headless browser of the tests sees what it should: else a page's test could not fail."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from tests.browser import PHONE_PX, open_page

PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>body {{ background: #fff }}
@media (prefers-color-scheme: dark) {{ body {{ background: #111 }} }}</style>
<body><p>Words</p>{body}</body>"""


def page(folder: Path, body: str) -> Path:
    path = folder / "page.html"
    path.write_text(PAGE.format(body=body))
    return path


def picture() -> str:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def test_a_whole_page_has_no_faults(tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    path = page(tmp_path, f'<img src="{picture()}"><img loading="lazy" src="{picture()}">')
    opened = open_page(path, dark=True, size_px=PHONE_PX, screenshot=shot, script="1 + 1")
    assert opened.faults() == []
    assert [loaded for _, loaded in opened.images] == [True, True]
    assert opened.text.strip() == "Words"
    assert opened.background == "rgb(17, 17, 17)"
    assert opened.answer == 2
    with Image.open(shot) as seen:
        assert seen.width == 2 * PHONE_PX[0]


def test_every_fault_is_told(tmp_path: Path) -> None:
    body = (
        '<img src="data:image/jpeg;base64,AAAA"><img src="https://example.com/a.png">'
        '<div style="width: 2000px">x</div>'
        '<script>console.error("told"); nothing.here</script>'
    )
    opened = open_page(page(tmp_path, body))
    assert opened.background == "rgb(255, 255, 255)"
    faults = "\n".join(opened.faults())
    for part in (
        "console: told",
        "nothing is not defined",
        "asks for https://example.com/a.png",
        "picture does not load: data:image/jpeg;base64,AAAA",
        "picture does not load: https://example.com/a.png",
        "2008 px of content in 1280 px",
    ):
        assert part in faults, part
