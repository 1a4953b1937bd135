"""``seco index``: indexes made from the tars, ours or foreign WebDataset tars of JPEG members."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from shards.errors import InputError
from shards.index import ShardIndex, build_index, read_index, write_index
from shards.progress import progress
from shards.spec import local_tars


def reindex(spec: str | Iterable[str], force: bool = False) -> str:
    """Write the index of every tar that has none, or one of another size; returns a summary.

    An index that is replaced hands on what is not in the tar (what the shard was made from, and
    which videos could not be stored), if it is of this very tar.

    Args:
        force: of all tars.

    Raises:
        InputError: some of them could not be indexed; all others have been.
    """
    tars = local_tars(spec)
    made, kept = 0, 0
    failures: list[InputError] = []
    with progress("index", len(tars), "shards") as bar:
        for tar in tars:
            path = tar.with_suffix(".idx")
            old = _readable(path)
            try:
                if old is not None and not force and _describes(old, tar):
                    kept += 1
                else:
                    write_index(path, _made(tar, old))
                    made += 1
            except InputError as error:
                failures.append(error)
            bar.advance()
    summary = f"{made} indexes written, {kept} were there already"
    if failures:
        raise InputError(
            f"{len(failures)} of {len(tars)} shards could not be indexed: "
            + "; ".join(map(str, failures[:3]))
            + ("; …" if failures[3:] else ""),
            fix=summary,
        )
    return summary


def _readable(path: Path) -> ShardIndex | None:
    try:
        return read_index(path)
    except InputError:
        return None


def _describes(index: ShardIndex, tar: Path) -> bool:
    return (index.info.file, index.info.bytes) == (tar.name, tar.stat().st_size)


def _made(tar: Path, old: ShardIndex | None) -> ShardIndex:
    index = build_index(tar)
    if old is None or old.info.sha256 != index.info.sha256:
        return index
    return replace(index, plan_digest=old.plan_digest, exclusions=old.exclusions)
