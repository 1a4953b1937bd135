"""The real test data: clips and numbers that are not part of this repository.

They lie in the folder that ``SECO_TEST_DATA`` names (with ``data/`` and ``golden/`` in it), or in
``../shared`` beside the checkout. Without it the tests that need it are skipped, or fail when
``SECO_REQUIRE_DATA=1``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def _find(relative: str) -> Path:
    folder = Path(os.environ.get("SECO_TEST_DATA") or ROOT.parent / "shared")
    path = folder / relative
    if not path.exists():
        lacking(f"{path} is not there; set SECO_TEST_DATA")
    return path


def lacking(what: str) -> NoReturn:
    """Skip the test for want of something; fail it where everything must be there."""
    if os.environ.get("SECO_REQUIRE_DATA") == "1":
        pytest.fail(what)
    pytest.skip(what)


def shared(relative: str) -> Path:
    """A file or folder of the real data, for example ``shared("hmdb51/videos")``."""
    return _find(f"data/{relative}")


def golden(name: str) -> dict[str, Any]:
    """The arrays of a golden ``.npz`` file."""
    with np.load(_find(f"golden/{name}"), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def paper_text() -> str:
    """The text of the paper."""
    return _find("paper/seco-aaai2021.txt").read_text("utf-8")
