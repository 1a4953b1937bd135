"""Opening sets: from what a user names to a :class:`~shards.reader.ShardSet`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shards.access import Access, LocalAccess, RangeAccess
from shards.cache import CachedAccess, ShardCache
from shards.errors import InputError
from shards.format import read_manifest
from shards.index import ShardIndex, build_index, parse_index, read_index
from shards.progress import size_text
from shards.reader import ShardSet, require_distinct
from shards.remote import fetch_parts, in_words, is_remote, open_filesystem, told_of, try_again
from shards.sequential import SequentialStream
from shards.spec import PIPE, beside, expand_spec, read_remote_manifest
from shards.stream import Stream, TripletStream

_READERS = 16  # indexes read at a time: a shared disk answers many as quickly as one
DEFAULT_CACHE_GB = 100.0


_WINDOW_SHARDS = 64  # of sets that are fetched: some 15,000 videos of Kinetics, 11 GB


class NoIndex(InputError):
    """Shards that are not on this machine and have no index: they can only be streamed."""


@dataclass(frozen=True)
class CacheSettings:
    """Where remote shards are kept."""

    folder: str
    limit_gb: float = DEFAULT_CACHE_GB


def open_shards(spec: str | Iterable[str], cache: CacheSettings | None = None) -> ShardSet:
    """Open the shards a specification names (:func:`shards.spec.expand_spec`).

    A local shard without an index, or with an outdated one, is indexed in memory.

    Args:
        spec: local or remote, not both.
        cache: keep remote shards there; without it their frames are fetched one by one.

    Raises:
        InputError: no shards match, a tar is truncated, or the set holds no videos.
        NoIndex: remote shards without indexes, or ``pipe:`` addresses.
    """
    addresses = expand_spec(spec)
    kinds = {address.partition("://")[0] if is_remote(address) else "" for address in addresses}
    if any(address.startswith(PIPE) for address in addresses):
        raise NoIndex("can only be streamed, in pre-training", addresses[0], "copy it to a folder")
    if len(kinds) > 1:
        raise InputError("lie in more than one kind of place", addresses[0], "copy them to one")
    access: Access = LocalAccess()
    if kinds == {""}:
        with ThreadPoolExecutor(_READERS) as readers:
            indexes = list(readers.map(_index_of, map(Path, addresses)))
        label_names = _label_names(addresses)
    else:
        indexes = _remote_indexes(addresses)
        label_names = _label_names(addresses)
        access = RangeAccess()
        if cache is not None:
            infos = {a: index.info for a, index in zip(addresses, indexes, strict=True)}
            limit = int(cache.limit_gb * 1e9)
            access = CachedAccess(ShardCache(Path(cache.folder), limit, infos))
    shards = ShardSet(addresses, indexes, label_names, access)
    if not len(shards):
        raise InputError("hold no videos", addresses[0] if len(addresses) == 1 else spec)
    require_distinct(shards, spec)
    return shards


def open_stream(
    spec: str | Iterable[str],
    batch_size: int,
    sampling: str,
    seed: int,
    *,
    cache: CacheSettings | None = None,
    window_shards: int | None = None,
    steps_per_epoch: int | None = None,
    split: str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Stream:
    """The triplet stream of the shards a specification names.

    Args:
        spec: as for :func:`open_shards`; what has no index is streamed in its order.
        batch_size: B, the global batch.
        sampling: ``uniform`` or ``halves``.
        seed: the run's.
        cache: keep remote shards there.
        window_shards: shuffle within so many shards; 0: within the whole set; None: 64 for shards
            that are cached, else the whole set.
        steps_per_epoch: length of an epoch of shards without index, and of no others.
        split: the training videos of this split only.
        rank: this process's number of ``world_size`` processes.

    Raises:
        InputError: as :func:`open_shards` and the streams; or the cache does not hold two windows.
    """
    try:
        shards = open_shards(spec, cache)
    except NoIndex:
        given = {"--cache-dir": cache, "--window-shards": window_shards, "--split": split}
        for option, value in given.items():
            if value is not None:
                raise InputError("is for shards with an index", option, "leave it out") from None
        return SequentialStream(
            expand_spec(spec), batch_size, sampling, seed, steps_per_epoch, rank, world_size
        )
    if steps_per_epoch is not None:
        raise InputError(
            "is for shards without index alone; these have one", "--steps-per-epoch", "leave it out"
        )
    window = chosen_window(shards, cache, window_shards)
    return TripletStream(shards, batch_size, sampling, seed, rank, world_size, window, split)


def chosen_window(shards: ShardSet, cache: CacheSettings | None, window_shards: int | None) -> int:
    """How many shards are shuffled at a time, 0 for the whole set.

    Args:
        shards: opened with this cache.
        cache: where they are kept, if anywhere.
        window_shards: what the user says; None: 64 for shards that are cached, else the whole set.

    Raises:
        InputError: a cache for local shards, or one that does not hold two windows.
    """
    cached = isinstance(shards.access, CachedAccess)
    if cache is not None and not cached:
        raise InputError("is for remote shards, these are on this machine", "--cache-dir")
    if window_shards is None:
        window_shards = _WINDOW_SHARDS if cached else 0
    if cached and cache is not None:
        _require_room(shards, window_shards, int(cache.limit_gb * 1e9))
    return min(window_shards, len(shards.counts))


def _require_room(shards: ShardSet, window: int, limit_bytes: int) -> None:
    """The window being read and the one being fetched, or each shard is fetched many times."""
    sizes = sorted((index.info.bytes for index in shards.indexes), reverse=True)
    needed = sum(sizes[: 2 * window] if window else sizes)
    if needed > limit_bytes:
        raise InputError(
            f"{size_text(limit_bytes)} do not hold the {size_text(needed)} of "
            + (f"two windows of {window} shards" if window else "the whole set"),
            "--cache-gb",
            "raise it, or lower --window-shards",
        )


def _index_of(tar: Path) -> ShardIndex:
    path = tar.with_suffix(".idx")
    if not path.is_file():
        return build_index(tar)
    index = read_index(path)
    size = tar.stat().st_size
    if size < index.info.bytes:
        raise InputError(
            f"is truncated: {size} of {index.info.bytes} bytes", tar, "prepare or copy it again"
        )
    return index if size == index.info.bytes else build_index(tar)


def _remote_indexes(addresses: Sequence[str]) -> list[ShardIndex]:
    names = [beside(address, ".idx") for address in addresses]
    found = dict(zip(names, fetch_parts([(name, None, None) for name in names]), strict=True))
    missing = [a for a, n in zip(addresses, names, strict=True) if _is_missing(found[n])]
    if missing:
        _require_there(missing[0])
        if len(missing) < len(addresses):
            raise InputError(
                f"{len(missing)} of {len(addresses)} shards have no index (.idx) beside them",
                missing[0],
                "make them with `seco index` on a copy",
            )
        raise NoIndex(
            "has no index (.idx) beside it", missing[0], "make it with `seco index` on a copy"
        )
    return [parse_index(told_of(found[name], name), name) for name in names]


def _is_missing(content: bytes | Exception) -> bool:
    return isinstance(content, FileNotFoundError)


def _require_there(address: str) -> None:
    """Raises InputError when not even the tar is: the address is wrong."""
    system, path = open_filesystem(address)
    try:
        there = try_again(lambda: system.exists(path))
    except Exception as error:
        raise InputError(
            f"cannot be read ({in_words(error)})", address, "check address and credentials"
        ) from error
    if not there:
        raise InputError("no such shard", address, "is the address right?")


def _label_names(addresses: Sequence[str]) -> list[str]:
    """The label names of the sets' manifests; empty when there is none or they disagree."""
    found: list[list[str]] = []
    for stem in dict.fromkeys(a.removesuffix(".tar").rpartition("-")[0] for a in addresses):
        if is_remote(stem):
            with suppress(FileNotFoundError):
                found.append(read_remote_manifest(f"{stem}.json").label_names)
        elif Path(f"{stem}.json").is_file():
            found.append(read_manifest(Path(f"{stem}.json")).label_names)
    return found[0] if found and all(names == found[0] for names in found) else []
