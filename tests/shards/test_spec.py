"""Shard specifications as people type them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.dataset import expand_spec, local_tars
from shards.errors import InputError
from shards.opening import open_shards
from tests.made_shards import make_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    make_set(path, videos=6, frames=3, per_shard=2)
    return path


@pytest.mark.parametrize(
    "pattern",
    [
        "{folder}/made-{{000..002}}.tar",
        "{folder}/made-<000..002>.tar",
        "{folder}/made-*.tar",
        "{folder}/made-00?.tar",
        "{folder}/made.json",
        "{folder}",
        "{folder}/made-000.tar,{folder}/made-{{001..002}}.tar",
        "{folder}/made-000.tar,{folder}/made.json",
        "{folder}/made.json,{folder}",
    ],
)
def test_each_form_names_all_three(folder: Path, pattern: str) -> None:
    names = [Path(tar).name for tar in expand_spec(pattern.format(folder=folder))]
    assert names == ["made-000.tar", "made-001.tar", "made-002.tar"]


def test_datasets_that_share_videos_are_named(folder: Path, tmp_path: Path) -> None:
    make_set(tmp_path, videos=3, frames=3, name="other", first=4)
    with pytest.raises(InputError, match=r"2 videos occur twice, for example video_0004, again in"):
        open_shards(f"{folder}/made.json,{tmp_path}/other.json")


def test_a_list_is_joined_without_repeats(folder: Path) -> None:
    spec = [f"{folder}/made-001.tar", f"{folder}/made-*.tar"]
    assert [p.name for p in local_tars(spec)] == ["made-001.tar", "made-000.tar", "made-002.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/none-*.tar", "matches no shards"),
        ("{folder}/made-{{000..009}}.tar", "7 of 10 shards do not exist"),
        ("{folder}/other.tar", "no such shard"),
        ("", "names no shards|no such shard|matches no shards"),
        ("{folder}/made-{{000..9.tar", "unbalanced braces"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        expand_spec(pattern.format(folder=folder))
    assert "\n" not in str(caught.value)


def test_a_manifest_whose_shards_are_gone(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, videos=4, frames=3, per_shard=2)
    (tmp_path / "made-001.tar").unlink()
    with pytest.raises(InputError, match=r"1 of its 2 shards are missing, first made-001\.tar"):
        expand_spec(manifest)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shards": [1]}', "\0"])
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match="is not a shard manifest"):
        expand_spec(str(path))


@pytest.mark.parametrize(
    ("pattern", "addresses"),
    [
        ("s3://b/k-{8..10}.tar", ["s3://b/k-8.tar", "s3://b/k-9.tar", "s3://b/k-10.tar"]),
        ("https://h/k-<008..009>.tar", ["https://h/k-008.tar", "https://h/k-009.tar"]),
        ("s3://b/a.tar,gs://c/b,c.tar", ["s3://b/a.tar", "gs://c/b,c.tar"]),
        ("pipe:cat k-{0..1}.tar", ["pipe:cat k-0.tar", "pipe:cat k-1.tar"]),
    ],
)
def test_remote_addresses(pattern: str, addresses: list[str]) -> None:
    assert expand_spec(pattern) == addresses
    with pytest.raises(InputError, match=r"is not on this machine.*copy it to a local folder"):
        local_tars(pattern)


def test_a_remote_folder_glob_and_manifest(folder: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    system.put(f"{folder}/", "/sets/made/", recursive=True)
    expected = [f"memory:///sets/made/made-00{n}.tar" for n in range(3)]
    for form in ("", "made-*.tar", "made-00[0-2].tar"):
        assert expand_spec(f"memory://sets/made/{form}") == expected
    stated = [f"memory://sets/made/made-00{n}.tar" for n in range(3)]
    assert expand_spec("memory://sets/made/made.json") == stated
    with pytest.raises(InputError, match="matches no shards"):
        expand_spec("memory://sets/none/")
    with pytest.raises(InputError, match=r"none\.json: not found"):
        expand_spec("memory://sets/none.json")
    with pytest.raises(InputError, match="cannot be opened"):
        expand_spec("nothing://sets/")


def test_a_manifest_may_not_name_shards_elsewhere(tmp_path: Path) -> None:
    path = Path(make_set(tmp_path / "set", videos=2, frames=3))
    for name in ("../made-000.tar", "/etc/made-000.tar", "pipe:x/y"):
        path.write_text(path.read_text().replace("made-000.tar", name))
        with pytest.raises(InputError, match="is not a shard manifest"):
            expand_spec(str(path))
        path.write_text(path.read_text().replace(name, "made-000.tar"))
