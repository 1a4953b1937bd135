"""Saved indexes: ``retrieval.faiss`` and what it was made of, ``retrieval.faiss.json``."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from seco.features.matrix import FeatureMatrix, unit_vectors
from seco.features.store import Features, discard, encoder_name, read_features
from seco.pages.text import percent
from seco.retrieve.config import BuildConfig, validate_index
from seco.retrieve.ivfpq import (
    RECALL_QUERIES,
    ApproximateIndex,
    index_kind,
    measure_recall,
    train_ivfpq,
)
from seco.retrieve.nearest import ExactIndex, NearestIndex
from shards.atomic import atomic_path, write_json
from shards.errors import InputError
from shards.progress import size_text

INDEX = "retrieval.faiss"
_FORMAT_VERSION = 2
_BUILD_AGAIN = "run `seco retrieve build` again"


@dataclass(frozen=True)
class BuiltIndex:
    """A saved index, for people."""

    path: Path
    description: dict[str, Any]
    seconds: float  # of training and adding

    def table(self) -> str:
        """Lines for a terminal."""
        told = self.description
        lines = [
            f"{self.path}: {told['videos']} videos, {told['kind']}, {size_text(told['bytes'])}"
        ]
        if told["kind"] == "ivfpq":
            lines.append(
                f"{told['lists']} lists, {told['code_bytes']} bytes a video, "
                f"{told['probes']} lists probed, built in {self.seconds:.1f} s"
            )
            lines.append(recall_line(told["recall"]))
        return "\n".join(lines)


def recall_line(recall: dict[str, Any]) -> str:
    """What an approximate index is worth, as a line for people."""
    shares = ", ".join(
        f"{name} {percent(value)}%" for name, value in recall.items() if name != "queries"
    )
    return f"against the exact (flat) search, {recall['queries']} queries: {shares}"


def build(config: BuildConfig) -> BuiltIndex:
    """Save an index of all videos with a description of it.

    Exact searches of this toolkit read ``features.npy`` itself; a flat index is for other users of
    faiss. Of an IVF-PQ the description states the recall against the exact search.

    Raises:
        InputError: the feature folder cannot be used, or the file not be written.
    """
    validate_index(config)
    features = read_features(config.features)
    path = Path(config.out or config.features) / INDEX
    vectors = unit_vectors(features.features)
    told = {**_identity(features), "kind": index_kind(len(vectors), config)}
    began = time.monotonic()
    if told["kind"] == "flat":
        _withdraw(path)
        _write_flat(vectors, path)
        seconds = time.monotonic() - began
    else:
        index = train_ivfpq(vectors, config, config.device)
        seconds = time.monotonic() - began
        _withdraw(path)
        _write_ivfpq(index, path)
        ivf: Any = faiss.downcast_index(index.index)
        searched = ApproximateIndex(index, vectors, config.rerank, config.device)
        told |= {
            "lists": ivf.nlist,
            "code_bytes": ivf.pq.M,
            "probes": ivf.nprobe,
            "rerank": config.rerank,
            "recall": stated_recall(searched, vectors, config.device),
        }
    told["bytes"] = path.stat().st_size
    write_json(_description(path), told)
    return BuiltIndex(path, told, seconds)


def _withdraw(path: Path) -> None:
    """Take an earlier index out of use, once there is one to take its place.

    The description is written last: without it an index is not used.
    """
    discard(_description(path))


def stated_recall(index: NearestIndex, vectors: FeatureMatrix, device: str) -> dict[str, Any]:
    """What is written of an approximate index: queries, and the recalls against exact search."""
    queries = min(RECALL_QUERIES, len(vectors))
    return {"queries": queries, **measure_recall(index, vectors, device)}


def open_index(
    path: Path, features: Features, device: str = "auto", probes: int | None = None
) -> NearestIndex:
    """Open a saved index, which must be of these features.

    Args:
        probes: lists of an IVF-PQ to look into; as built if not given.

    Raises:
        InputError: damaged, or an index of another encoder or of other videos.
    """
    told = _read_description(path, features)
    if probes is not None and probes < 1:
        raise InputError("must be 1 or more", "--probes")
    if not path.is_file() or path.stat().st_size != told["bytes"]:
        # Looked at first: faiss does not notice every end that comes too early.
        raise InputError("is missing or damaged", path, _BUILD_AGAIN)
    vectors = unit_vectors(features.features)
    if told["kind"] == "flat":
        return ExactIndex(vectors, device)
    try:
        index = faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise InputError("is damaged", path, _BUILD_AGAIN) from error
    if (index.ntotal, index.d) != features.features.shape:
        raise InputError(f"holds {index.ntotal} x {index.d} values", path, _BUILD_AGAIN)
    if probes is not None:
        ivf = faiss.extract_index_ivf(index)
        ivf.nprobe = min(probes, ivf.nlist)
    return ApproximateIndex(index, vectors, int(told["rerank"]), device)


def _write_flat(vectors: FeatureMatrix, path: Path) -> None:
    """A faiss ``IndexFlatIP`` of the vectors, written block by block.

    faiss itself could only write it from memory. The file is an empty index's with the two counts
    set, then the rows; that faiss reads it is seen before it gets its name.
    """
    header = bytearray(faiss.serialize_index(faiss.IndexFlatIP(vectors.dimension)).tobytes())
    struct.pack_into("<q", header, 8, len(vectors))
    struct.pack_into("<Q", header, len(header) - 8, len(vectors) * vectors.dimension)
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(header)
            for _, block in vectors.blocks():
                file.write(np.ascontiguousarray(block, dtype="<f4").data)
        written = faiss.read_index(str(temporary), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
        last = vectors.take(np.array([len(vectors) - 1]))[0]
        if written.ntotal != len(vectors) or not np.array_equal(
            written.reconstruct(len(vectors) - 1), last
        ):
            raise AssertionError(f"faiss {faiss.__version__} reads another layout of flat indexes")


def _write_ivfpq(index: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # faiss's for any failing write
            raise InputError("cannot be written", path, "free some space") from error


def _identity(features: Features) -> dict[str, Any]:
    keys = hashlib.sha256("\n".join(features.keys).encode()).hexdigest()
    return {
        "format_version": _FORMAT_VERSION,
        "encoder": features.encoder,
        "frames": [features.meta.get(name) for name in ("frames", "short_edge", "crop_size")],
        "videos": len(features),
        "keys_sha256": keys,
    }


def _read_description(path: Path, features: Features) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(_description(path).read_bytes())
        encoder, videos = dict(told["encoder"]), (told["keys_sha256"], told["frames"])
        known = told["format_version"] == _FORMAT_VERSION and told["kind"] in ("flat", "ivfpq")
        known = known and isinstance(told["bytes"], int)
        if told["kind"] == "ivfpq":
            known = known and isinstance(told["rerank"], int)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("has no readable description", path, _BUILD_AGAIN) from error
    if not known:
        raise InputError("is of another version of this toolkit", path, _BUILD_AGAIN)
    if encoder.get("sha256") != features.encoder["sha256"]:
        raise InputError(
            f"is of another encoder ({encoder_name(encoder)}) than {features.folder} "
            f"({encoder_name(features.encoder)})",
            path,
            _BUILD_AGAIN,
        )
    wanted = _identity(features)
    if videos != (wanted["keys_sha256"], wanted["frames"]):
        raise InputError(f"is of other videos or frames than {features.folder}", path, _BUILD_AGAIN)
    return told


def _description(path: Path) -> Path:
    return path.with_name(path.name + ".json")
