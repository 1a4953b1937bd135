"""What several tests of preparing start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data import shared
from tests.pipelines.made_videos import link_into
from tests.pipelines.running import hashes, run


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """28 real clips, and the files an undisturbed run makes of them."""
    root = tmp_path_factory.mktemp("clips")
    for folder in ("pick", "golf"):
        found = sorted(shared(f"hmdb51/videos/{folder}").iterdir())[:14]
        link_into(root / "raw" / folder, found)
    settings: dict[str, object] = {"workers": 2, "videos_per_shard": 1, "frames": 8}
    run(root / "raw", root / "whole", **settings)
    return root / "raw", hashes(root / "whole")
