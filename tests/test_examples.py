"""The notebooks run from a clean folder, in their order, as a reader would run them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.data import ROOT, lacking

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3"]


def test_the_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import nbformat
        from nbclient import NotebookClient
    except ImportError:
        lacking("nbclient is not installed")
    monkeypatch.setenv("SECO_EXAMPLE_STEPS", "20")
    monkeypatch.setenv("SECO_EXAMPLE_CLIPS", "4")
    # `!seco` and the kernel are those of this interpreter.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}})
        client.execute()
        texts = [
            output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
        ]
        assert not any("Usage: seco" in text or "seco: " in text for text in texts), path.name
    assert (tmp_path / "runs" / "example" / "last.pt").is_file()
    assert (tmp_path / "compare" / "compare.html").is_file()
