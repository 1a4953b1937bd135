"""Rehearses a machine that lacks packages: these can be imported from the kit or not at all.

Python imports this by itself where this folder is in ``PYTHONPATH``; ``SECO_GPU_PACKAGES`` is where
``gpu.sh`` has unpacked the kit's wheels.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType

# All that the toolkit and its tests depend on, but for what images for deep learning hold.
ABSENT = frozenset(
    {
        *("av", "boto3", "botocore", "braceexpand", "faiss", "ffmpeg", "got10k", "imageio_ffmpeg"),
        *("moto", "ray", "s3fs", "simplejpeg", "tenacity", "tomli_w", "webdataset"),
    }
)
COMPILED = frozenset({"simplejpeg"})  # its wheel is for Python 3.12; in another it is this one's


class _FromTheKit(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in ABSENT or (fullname in COMPILED and sys.version_info[:2] != (3, 12)):
            return None
        folder = os.environ.get("SECO_GPU_PACKAGES", "")
        found = importlib.machinery.PathFinder.find_spec(fullname, [folder]) if folder else None
        if found is None:
            raise ModuleNotFoundError(f"No module named {fullname!r} in the kit", name=fullname)
        return found


sys.meta_path.insert(0, _FromTheKit())
