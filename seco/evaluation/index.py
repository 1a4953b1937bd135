"""Saved faiss indexes, exact or approximate: ``retrieval.faiss`` and ``retrieval.faiss.json``.

The approximate index is faiss's IVF-PQ (Jégou et al. 2011). Vectors have length 1, so the order by
distance is the order by cosine. PCA first rotates them and cuts them to 256 values: the features of
a video encoder fill few directions, and lists and codes of shorter vectors are faster to build and
more accurate. To make up for what this costs, the candidates are compared again with the full
vectors, which stay where they are.
"""

from __future__ import annotations

import hashlib
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import faiss
import msgspec
import numpy as np
from numpy.typing import NDArray

from seco.config import BuildConfig, IndexSettings, validate_index
from seco.evaluation.nearest import ExactIndex, Found, NearestIndex, gpus_for, nothing_found
from seco.features.matrix import FeatureMatrix, release, unit_vectors
from seco.features.store import Features, discard, encoder_name, read_features
from seco.text import percent
from shards.atomic import atomic_path, write_json
from shards.errors import InputError
from shards.progress import progress, size_text
from shards.terminal import say
from shards.untrusted import Count, decode_json, read_regular

RECALL_QUERIES = 256
RECALL_KS = (1, 10)

_LEAST_ROWS = 256  # an 8-bit codebook has 256 entries
_MOST_VALUES = 256  # after the PCA
_PCA_ROWS = 32_768
_ROWS_A_LIST = 64  # training rows; faiss warns of poor clusters below 39
_LEAST_ROWS_A_LIST = 39
_ROWS_A_CODE, _CODE_ROUNDS = 64, 10
_LEAST_TRAINED_ON = _ROWS_A_CODE * 256
_GPU_MOST = 2048  # candidates and probes that a GPU search supports
_QUERIES_AT_ONCE = 256
_COMPARED_AT_ONCE = 16  # queries whose scattered candidates are mapped at a time


class ApproximateIndex:
    """A trained IVF-PQ over ``vectors``, which are read to re-rank the candidates exactly.

    Args:
        index: the result of :func:`train_ivfpq`.
        vectors: the indexed vectors.
        rerank: candidates per requested video; 0 keeps the approximate order and cosines.
        device: where to search; ``auto`` uses GPUs if faiss can.
    """

    def __init__(
        self, index: Any, vectors: FeatureMatrix, rerank: int, device: str = "auto"
    ) -> None:
        self.index = index
        self._vectors = vectors
        self._rerank = rerank
        self._placed, self._on_gpu = _place(index, device)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def search(self, queries: FeatureMatrix, k: int, title: str = "") -> Found:
        """See :class:`seco.evaluation.nearest.NearestIndex`."""
        k = min(k, len(self))
        wanted = min(len(self), k * max(1, self._rerank))
        if self._on_gpu:
            wanted = max(k, min(wanted, _GPU_MOST))
        cosines, found = nothing_found(len(queries), k)
        with progress(title, len(queries), "queries", quiet=not title) as shown:
            for start in range(0, len(queries), _QUERIES_AT_ONCE):
                some = slice(start, min(start + _QUERIES_AT_ONCE, len(queries)))
                asked = queries.take(np.arange(some.start, some.stop))
                squared, at = self._placed.search(asked, wanted)
                if self._rerank:
                    self._compare(asked, at, cosines[some], found[some])
                else:
                    # |a - b|² = 2 - 2 a·b for unit vectors.
                    cosines[some] = np.where(at[:, :k] < 0, -np.inf, 1 - squared[:, :k] / 2)
                    found[some] = at[:, :k]
                shown.advance(len(asked))
        return cosines, found

    def _compare(
        self,
        queries: NDArray[np.float32],
        candidates: NDArray[np.int64],
        cosines: NDArray[np.float32],
        found: NDArray[np.int64],
    ) -> None:
        k = cosines.shape[1]
        for row, query in enumerate(queries):
            at = np.sort(candidates[row][candidates[row] >= 0])  # in file order
            exact = self._vectors.take(at) @ query
            best = np.argsort(-exact, kind="stable")[:k]
            cosines[row, : len(best)] = exact[best]
            found[row, : len(best)] = at[best]
            if row % _COMPARED_AT_ONCE == _COMPARED_AT_ONCE - 1:
                release(self._vectors.array)
        release(self._vectors.array)


def build_index(
    vectors: FeatureMatrix, config: IndexSettings, device: str = "auto", title: str = ""
) -> NearestIndex:
    """Build an exact index, or above ``config.ivfpq_above`` vectors an approximate one.

    Raises:
        InputError: too few vectors for an IVF-PQ, or invalid settings.
    """
    validate_index(config)
    if index_kind(len(vectors), config) == "flat":
        return ExactIndex(vectors, device)
    return ApproximateIndex(
        train_ivfpq(vectors, config, device, title), vectors, config.rerank, device
    )


def index_kind(rows: int, config: IndexSettings) -> str:
    """The kind of index for so many rows: ``flat`` or ``ivfpq``."""
    return "ivfpq" if 0 < config.ivfpq_above < rows else "flat"


def train_ivfpq(
    vectors: FeatureMatrix, config: IndexSettings, device: str = "auto", title: str = "Adding"
) -> Any:
    """Train an IVF-PQ on a sample of the vectors and add all of them, block by block.

    Memory: 64 PCA-reduced vectors per list, one block of full vectors, and the index:
    ``config.code_bytes`` + 8 bytes per vector.

    Raises:
        InputError: too few vectors.
    """
    rows = len(vectors)
    if rows < _LEAST_ROWS:
        raise InputError(
            f"{rows} videos are too few for an approximate index", "--ivfpq-above", "raise it"
        )
    codes = min(config.code_bytes, vectors.dimension)
    values = codes * max(1, min(_MOST_VALUES, vectors.dimension) // codes)
    lists = max(1, min(round(4 * rows**0.5), rows // _LEAST_ROWS_A_LIST))
    pca = _principal_axes(vectors, values)
    trained_on = max(_LEAST_TRAINED_ON, _ROWS_A_LIST * lists)
    shortened = np.empty((min(trained_on, rows), values), dtype=np.float32)
    filled = 0
    for block in vectors.sample(trained_on, seed=1):
        shortened[filled : filled + len(block)] = pca.apply(block)
        filled += len(block)
    quantizer = faiss.IndexFlatL2(values)
    ivf = faiss.IndexIVFPQ(quantizer, values, lists, codes, 8)
    ivf.pq.cp.min_points_per_centroid = 1  # no warnings for small datasets
    # faiss's defaults of 256 points and 25 rounds take ten times as long for codes that are 2 %
    # closer, which re-ranking makes unnecessary.
    ivf.pq.cp.max_points_per_centroid, ivf.pq.cp.niter = _ROWS_A_CODE, _CODE_ROUNDS
    if gpus_for(device):  # only the list centroids are worth a GPU: the codes are few
        ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(values))
    ivf.train(shortened)
    del shortened
    ivf.nprobe = min(config.probes, lists)
    index = faiss.IndexPreTransform(pca, ivf)
    with progress(title, rows, "videos", quiet=not title) as shown:
        for _, block in vectors.blocks():
            index.add(block)
            shown.advance(len(block))
    return index


def _principal_axes(vectors: FeatureMatrix, values: int) -> Any:
    """The faiss transform from (B, D) to (B, values): PCA followed by a random rotation.

    Without the rotation, the first bytes of a code would carry most of a vector. The mean is not
    subtracted, which does not change distances. faiss's own ``PCAMatrix`` needs the whole sample
    in memory and takes ten times as long.
    """
    size = vectors.dimension
    total, products, rows = np.zeros(size), np.zeros((size, size)), 0
    for block in vectors.sample(_PCA_ROWS, seed=0):
        total += block.sum(axis=0, dtype=np.float64)
        products += block.T @ block
        rows += len(block)
    mean = total / rows
    _, axes = np.linalg.eigh(products / rows - np.outer(mean, mean))  # the strongest last
    rng = np.random.Generator(np.random.PCG64(3))
    turn, _ = np.linalg.qr(rng.standard_normal((values, values)))
    transform = faiss.LinearTransform(size, values, False)
    matrix = np.ascontiguousarray(turn @ axes[:, -values:].T, dtype=np.float32)
    faiss.copy_array_to_vector(matrix.ravel(), transform.A)
    transform.is_trained = True
    return transform


def measure_recall(
    index: NearestIndex, vectors: FeatureMatrix, device: str = "auto"
) -> dict[str, float]:
    """Recall of the index against exact search, with a sample of the vectors as queries.

    Returns:
        ``recall@1`` and ``recall@10``: the mean fraction of a query's k nearest vectors, without
        itself, that are among the k found.
    """
    rng = np.random.Generator(np.random.PCG64(2))
    chosen = np.sort(rng.permutation(len(vectors))[:RECALL_QUERIES])
    rows = chosen if vectors.rows is None else vectors.rows[chosen]
    queries = unit_vectors(vectors.array, rows)
    most = max(RECALL_KS) + 1
    _, true = ExactIndex(vectors, device).search(queries, most, "Recall against flat")
    _, found = index.search(queries, most)
    shares: dict[str, float] = {}
    for k in RECALL_KS:
        each = []
        for own, a, b in zip(chosen.tolist(), true.tolist(), found.tolist(), strict=True):
            wanted = [row for row in a if row != own][:k]
            got = [row for row in b if row not in (own, -1)][:k]
            each.append(len(set(wanted) & set(got)) / len(wanted))
        shares[f"recall@{k}"] = float(np.mean(each))
    return shares


def _place(index: Any, device: str) -> tuple[Any, bool]:
    """Move the index to where it is searched; also returns whether that is a GPU."""
    if not gpus_for(device):
        return index, False
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True  # with 64 bytes per code, the lookup tables fit in no other type
    try:
        return faiss.index_cpu_to_all_gpus(index, options), True
    except RuntimeError as error:  # out of memory, or a --code-bytes unsupported on GPUs
        reason = str(error).strip().splitlines()[-1][:120]
        if device == "cuda":
            raise InputError(
                f"the index does not fit on a GPU ({reason})", "--device", "use cpu"
            ) from error
        say(f"seco: searching the index on the CPU: {reason}")
        return index, False


INDEX = "retrieval.faiss"
_FORMAT_VERSION = 2
_BUILD_AGAIN = "run `seco retrieve build` again"


@dataclass(frozen=True)
class BuiltIndex:
    """A saved index and its description."""

    path: Path
    description: dict[str, Any]
    seconds: float  # to train and add

    def table(self) -> str:
        """Lines for a terminal."""
        told = self.description
        lines = [
            f"{self.path}: {told['videos']} videos, {told['kind']}, {size_text(told['bytes'])}"
        ]
        if told["kind"] == "ivfpq":
            lines.append(
                f"{told['lists']} lists, {told['code_bytes']} bytes per video, "
                f"{told['probes']} lists probed, built in {self.seconds:.1f} s"
            )
            lines.append(recall_line(told["recall"]))
        return "\n".join(lines)


def recall_line(recall: dict[str, Any]) -> str:
    """The recall of an approximate index, as a line for people."""
    shares = ", ".join(
        f"{name} {percent(value)}%" for name, value in recall.items() if name != "queries"
    )
    return f"compared with exact (flat) search, {recall['queries']} queries: {shares}"


def build(config: BuildConfig) -> BuiltIndex:
    """Save an index of all videos, and its description.

    This toolkit's exact search reads ``features.npy`` directly; a flat index is for other programs
    that use faiss. The description of an IVF-PQ includes its recall against exact search.

    Raises:
        InputError: the feature folder cannot be used, or the file cannot be written.
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
    """Invalidate an earlier index, once its replacement is ready.

    The description is written last; an index without one is not used.
    """
    discard(_description(path))


def stated_recall(index: NearestIndex, vectors: FeatureMatrix, device: str) -> dict[str, Any]:
    """The recall entry of the description: number of queries, and recalls against exact search."""
    queries = min(RECALL_QUERIES, len(vectors))
    return {"queries": queries, **measure_recall(index, vectors, device)}


def open_index(
    path: Path, features: Features, device: str = "auto", probes: int | None = None
) -> NearestIndex:
    """Open a saved index of these features.

    Args:
        probes: IVF-PQ lists to probe; by default as built.

    Raises:
        InputError: the index is damaged, or has another encoder or of other videos.
    """
    told = _read_description(path, features)
    if probes is not None and probes < 1:
        raise InputError("must be 1 or more", "--probes")
    if not path.is_file() or path.stat().st_size != told.bytes:
        # Checked first, since faiss does not detect every truncated file.
        raise InputError("is missing or damaged", path, _BUILD_AGAIN)
    vectors = unit_vectors(features.features)
    if told.kind == "flat":
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
    return ApproximateIndex(index, vectors, told.rerank or 0, device)


def _write_flat(vectors: FeatureMatrix, path: Path) -> None:
    """A faiss ``IndexFlatIP`` of the vectors, written block by block.

    faiss itself could only write it from memory. The file is an empty index with its two counts
    set, followed by the rows. It is read back with faiss before it is renamed.
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
            raise AssertionError(f"faiss {faiss.__version__} uses another layout for flat indexes")


def _write_ivfpq(index: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # from faiss, for any failed write
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


class _IndexedEncoder(msgspec.Struct):
    sha256: str
    arch: str | None = None
    checkpoint: str | None = None


class _IndexDescription(msgspec.Struct):
    format_version: int
    kind: Literal["flat", "ivfpq"]
    encoder: _IndexedEncoder
    frames: list[Count | None]
    keys_sha256: str
    bytes: Count
    rerank: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None


def _read_description(path: Path, features: Features) -> _IndexDescription:
    try:
        content = read_regular(_description(path))
    except InputError as error:
        raise InputError("has no readable description", path, _BUILD_AGAIN) from error
    what = "has no readable description"
    told = decode_json(_IndexDescription, content, path, what, _BUILD_AGAIN)
    if told.format_version != _FORMAT_VERSION or (told.kind == "ivfpq" and told.rerank is None):
        raise InputError("is from another version of this toolkit", path, _BUILD_AGAIN)
    if told.encoder.sha256 != features.encoder["sha256"]:
        held = encoder_name(msgspec.structs.asdict(told.encoder))
        raise InputError(
            f"has another encoder ({held}) than {features.folder} "
            f"({encoder_name(features.encoder)})",
            path,
            _BUILD_AGAIN,
        )
    wanted = _identity(features)
    if (told.keys_sha256, told.frames) != (wanted["keys_sha256"], wanted["frames"]):
        raise InputError(f"is of other videos or frames than {features.folder}", path, _BUILD_AGAIN)
    return told


def _description(path: Path) -> Path:
    return path.with_name(path.name + ".json")
