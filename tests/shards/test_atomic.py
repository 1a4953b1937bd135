"""Files appear whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from shards.atomic import atomic_path, require_writable, write_json, write_text
from shards.errors import InputError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_content_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"b": 1})
    inode = path.stat().st_ino
    write_json(path, {"b": 1})
    assert path.stat().st_ino == inode
    write_json(path, {"b": 2})
    assert path.read_text() == '{\n "b": 2\n}\n'


def test_a_place_that_cannot_be_written_to_is_found_out_first(tmp_path: Path) -> None:
    require_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        require_writable(tmp_path / "file" / "folder")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "__init__.py").write_text("")
    with pytest.raises(InputError, match="Python code"):
        require_writable(tmp_path / "code")


def test_a_kill_while_finding_out_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during: list[list[Path]] = []
    make = tempfile.TemporaryFile

    def made(**where: Any) -> Any:
        file = make(**where)
        during.append(list(tmp_path.iterdir()))
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", made)
    require_writable(tmp_path)
    assert during == [[]]
