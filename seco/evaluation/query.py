"""``seco retrieve query``: a page of the videos nearest to one of the dataset or to a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from seco.checkpoints.named import is_named
from seco.checkpoints.weights import RANDOM, load_backbone
from seco.config import QueryConfig
from seco.data.crops import BrokenJpeg, center_crop, decode_jpeg
from seco.data.splits import UNLABELLED
from seco.data.transforms import normalise
from seco.evaluation.index import INDEX, open_index
from seco.evaluation.nearest import ExactIndex, NearestIndex
from seco.features.matrix import FeatureMatrix, unit_vectors
from seco.features.store import Features, encoder_name, read_features
from seco.models.backbones import TIMM_PREFIX, known_archs, told_by_tensors
from seco.pages import FramesOf, frames_of, render_page, thumbnail
from seco.processes.device import resolve_device
from seco.text import percent
from shards.atomic import require_writable, write_text
from shards.dataset import ShardSet
from shards.errors import InputError
from shards.format import read_manifest
from shards.opening import open_shards
from shards.terminal import printable

_FRAMES_AT_ONCE = 64
_JUDGED_AT_MOST = 1000
_TESTS = ("test", "val")
# Defaults of `seco prepare`; a dataset's manifest has the values used.
_SHORT_EDGE_PX, _QUALITY = 256, 90


class DecodeFile(Protocol):
    """Evenly spaced frames of a video file as JPEGs; implemented in ``pipelines/``."""

    def __call__(
        self, path: Path, *, frames: int, short_edge: int, quality: int, timeout_seconds: float
    ) -> list[bytes]: ...


@dataclass(frozen=True)
class Neighbour:
    """A neighbour; ``right`` (same label as the query) is None if one of the two has no label."""

    row: int
    key: str
    similarity: float
    label_name: str
    right: bool | None


def query(features: Features, key: str, neighbours: int, index: NearestIndex) -> list[Neighbour]:
    """The videos nearest to the video ``key``, without itself, nearest first.

    Args:
        index: index of all rows of ``features``.

    Raises:
        InputError: the video is not found.
    """
    row = features.find(key)
    asked = unit_vectors(features.features, np.array([row]))
    return _neighbours(features, asked, neighbours, index, row)


def query_vector(
    features: Features, vector: NDArray[np.float32], neighbours: int, index: NearestIndex
) -> list[Neighbour]:
    """The videos nearest to a feature (D,) of the same encoder, nearest first."""
    return _neighbours(features, unit_vectors(vector[None]), neighbours, index, None)


@dataclass(frozen=True)
class NearestShare:
    """Average fraction of the nearest videos that have the query's label."""

    share: float
    neighbours: int
    queries: int
    tests: bool  # the queries are test videos only

    def sentence(self) -> str:
        """Say it in words."""
        which = "test videos" if self.tests else "videos with a label"
        return (
            f"averaged over {self.queries} {which}, {percent(self.share)} % of the "
            f"{self.neighbours} nearest have the query's label"
        )


def right_among_nearest(
    features: Features, neighbours: int, index: NearestIndex
) -> NearestShare | None:
    """Average over the labelled test videos, or over all labelled videos if none are test videos.

    Uses at most 1,000 queries. None if there are no labels.
    """
    labelled = features.labels != UNLABELLED
    tests = np.zeros(len(features), dtype=bool)
    for values in features.splits.values():
        tests |= labelled & np.isin(values, _TESTS)
    rows = np.flatnonzero(tests if tests.any() else labelled)
    rows = rows[:: -(-len(rows) // _JUDGED_AT_MOST)] if len(rows) else rows
    if not len(rows):
        return None
    _, found = index.search(unit_vectors(features.features, rows), neighbours + 1)
    shares = []
    for row, others in zip(rows, found, strict=True):
        near = others[(others != row) & (others != -1)][:neighbours]
        near = near[labelled[near]]
        if len(near):
            shares.append(np.mean(features.labels[near] == features.labels[row]))
    if not shares:
        return None
    return NearestShare(float(np.mean(shares)), neighbours, len(shares), bool(tests.any()))


def frames_of_file(
    path: Path, features: Features, shards: ShardSet, decode: DecodeFile, timeout_seconds: float
) -> list[bytes]:
    """JPEG frames of the file, sampled and encoded as those of the features' dataset.

    Raises:
        InputError: the file cannot be decoded.
    """
    stored = _prepared_with(shards)
    count = _whole(features, "frames")
    if isinstance(stored.get("frames"), int):
        count = min(count, stored["frames"])
    short_edge, quality = stored.get("short_edge"), stored.get("quality")
    return decode(
        path,
        frames=count,
        short_edge=short_edge if isinstance(short_edge, int) else _SHORT_EDGE_PX,
        quality=quality if isinstance(quality, int) else _QUALITY,
        timeout_seconds=timeout_seconds,
    )


def encode_frames(
    jpegs: Sequence[bytes], features: Features, checkpoint: str | None, device: str = "auto"
) -> NDArray[np.float32]:
    """The feature (D,) of a video's frames, with the encoder and crops of ``features``.

    Args:
        checkpoint: the encoder's file; by default the path recorded in the features.

    Raises:
        InputError: the checkpoint is of another encoder, or a frame does not decode.
    """
    encoder = features.encoder
    source = str(checkpoint or encoder.get("checkpoint"))
    without_file = source == RANDOM or is_named(source) or source.startswith(TIMM_PREFIX)
    if checkpoint is None and not without_file and not Path(source).is_file():
        raise InputError("not found", source, "give the encoder's file with --checkpoint")
    seed = encoder.get("seed")
    named = encoder.get("arch")  # older features, and those of a module, name none or a class
    arch = named if isinstance(named, str) else None
    if not without_file and not _needs_its_name(arch):
        arch = None
    own_seed = seed if isinstance(seed, int) else 0
    try:
        backbone = load_backbone(source, arch, own_seed)
    except InputError as error:
        if without_file or arch is None:
            raise
        try:
            backbone = load_backbone(source)  # of another encoder?
        except InputError:
            raise error from None
    if backbone.sha256 != encoder["sha256"]:
        own = {"arch": backbone.arch, "checkpoint": source, "sha256": backbone.sha256}
        raise InputError(
            f"is another encoder ({encoder_name(own)}) than that of {features.folder} "
            f"({encoder_name(encoder)})",
            "--checkpoint",
            "give the features' encoder",
        )
    short_edge, crop_size = _whole(features, "short_edge"), _whole(features, "crop_size")
    try:
        crops = [center_crop(decode_jpeg(jpeg), short_edge, crop_size) for jpeg in jpegs]
    except BrokenJpeg as error:  # we encoded it ourselves, so memory or disk is at fault
        raise InputError(f"a decoded frame is damaged ({error})", "--file") from error
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    on = resolve_device(device)
    network = backbone.network.to(on).eval()
    with torch.inference_mode():
        parts = [
            network(normalise(part.to(on))).float().cpu() for part in images.split(_FRAMES_AT_ONCE)
        ]
    mean: NDArray[np.float32] = torch.cat(parts).numpy().mean(0)
    return mean


def _needs_its_name(arch: str | None) -> bool:
    """Whether the tensors of this architecture do not tell it."""
    if arch is None or told_by_tensors(arch):
        return False
    return arch.startswith(TIMM_PREFIX) or arch in known_archs()


def _neighbours(
    features: Features, asked: FeatureMatrix, count: int, index: NearestIndex, row: int | None
) -> list[Neighbour]:
    if count < 1:
        raise InputError("must be 1 or more", "--neighbours")
    similarity, found = index.search(asked, count + 1)
    label = UNLABELLED if row is None else features.labels[row]
    nearest = []
    for other, s in zip(found[0].tolist(), similarity[0].tolist(), strict=True):
        if other in (row, -1):
            continue
        labelled = UNLABELLED not in (label, features.labels[other])
        right = bool(label == features.labels[other]) if labelled else None
        name = features.label_names[other]
        nearest.append(Neighbour(other, features.keys[other], s, name, right))
    return nearest[:count]


def _prepared_with(shards: ShardSet) -> dict[str, Any]:
    """The settings in the manifest next to the shards, if there is one."""
    first = Path(shards.addresses[0])
    manifest = first.with_name(f"{shards.name}.json")
    return read_manifest(manifest).settings if manifest.is_file() else {}


def _whole(features: Features, name: str) -> int:
    value = features.meta.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"does not record {name}", features.folder, "extract the features again")
    return value


FRAMES_OF_QUERY = 5
FRAMES_OF_NEIGHBOUR = 3


def write_query_page(config: QueryConfig, decode: DecodeFile) -> str:
    """Write the page of the videos nearest to those of ``config.video``, or to ``config.file``.

    Uses the index saved by ``seco retrieve build``, if there is one.

    Args:
        decode: decodes the frames of a video file.

    Returns:
        Text for the user: the nearest videos, and the path of the page.

    Raises:
        InputError: the video is not found, the file cannot be decoded, the encoder or the index
            does not match the features, or the shards cannot be opened.
    """
    if bool(config.video) == (config.file is not None):
        raise InputError("give exactly one of these", "--video KEY, --file PATH")
    if config.file is None and config.checkpoint is not None:
        raise InputError("needs --file", "--checkpoint", "remove it")
    path = Path(config.html)
    require_writable(path.parent)  # before anything slow
    features = read_features(config.features)
    shards = open_shards(config.shards or tuple(features.meta.get("shards", ())))
    pictures = frames_of(shards)
    if config.file is None:
        index = _index(config, features)
        shown = [
            of_video(features, key, query(features, key, config.neighbours, index), pictures)
            for key in config.video
        ]
    else:
        file = Path(config.file)
        frames = frames_of_file(file, features, shards, decode, config.timeout)
        vector = encode_frames(frames, features, config.checkpoint, config.device)
        index = _index(config, features)
        shown = [_of_file(file, frames, query_vector(features, vector, config.neighbours, index))]
    share = right_among_nearest(features, config.neighbours, index)
    write_text(path, render_query_page(features, shown, share, pictures))
    lines = []
    for one in shown:
        if len(shown) > 1:
            lines.append(f"{one.key}  {one.label}")
        lines += [
            f"{rank:>4}  {n.similarity:6.3f}  {printable(n.key)}  {printable(n.label_name)}"
            for rank, n in enumerate(one.nearest, start=1)
        ]
    return "\n".join([*map(str.rstrip, lines), *([share.sentence()] if share else []), str(path)])


@dataclass(frozen=True)
class Query:
    """A query as shown on the page, with the videos nearest to it."""

    key: str
    label: str
    source: str
    frames: list[bytes]  # JPEG
    nearest: Sequence[Neighbour]


def of_video(
    features: Features, key: str, nearest: Sequence[Neighbour], pictures: FramesOf
) -> Query:
    """A query by a video of the dataset, with its neighbours from :func:`query`."""
    row = features.find(key)
    return Query(
        key=printable(key),
        label=printable(features.label_names[row]),
        source=printable(features.sources[row]),
        frames=pictures(key, FRAMES_OF_QUERY),
        nearest=nearest,
    )


def _of_file(file: Path, frames: Sequence[bytes], nearest: Sequence[Neighbour]) -> Query:
    shown = [frames[len(frames) * n // FRAMES_OF_QUERY] for n in range(FRAMES_OF_QUERY)]
    return Query(printable(file.name), "", "a file", shown, nearest)


def render_query_page(
    features: Features, shown: Sequence[Query], share: NearestShare | None, pictures: FramesOf
) -> str:
    """The page as self-contained HTML.

    Args:
        share: the result of :func:`right_among_nearest`.
        pictures: returns the frames of the neighbours.
    """
    return render_page(
        "retrieval.html.j2",
        title=f"Nearest to {shown[0].key if len(shown) == 1 else f'{len(shown)} videos'}",
        queries=[_query_values(one, pictures) for one in shown],
        share=share,
        videos=len(features),
        encoder=printable(encoder_name(features.encoder)),
    )


def _query_values(one: Query, pictures: FramesOf) -> dict[str, Any]:
    judged = [n.right for n in one.nearest if n.right is not None]
    return {
        "key": one.key,
        "label": one.label,
        "source": one.source,
        "pictures": _thumbnails(one.frames),
        "right": sum(judged),
        "judged": len(judged),
        "neighbours": [
            {
                "rank": rank,
                "key": printable(n.key),
                "label": printable(n.label_name),
                "similarity": f"{n.similarity:.3f}",
                "right": n.right,
                "pictures": _thumbnails(pictures(n.key, FRAMES_OF_NEIGHBOUR)),
            }
            for rank, n in enumerate(one.nearest, start=1)
        ],
    }


def _index(config: QueryConfig, features: Features) -> NearestIndex:
    # faiss knows only cpu and cuda; GPU numbers are torch's.
    device = config.device.partition(":")[0]
    saved = Path(config.out or config.features) / INDEX
    if saved.is_file():
        return open_index(saved, features, device, config.probes)
    if config.probes is not None:
        raise InputError("index not found", saved, "run `seco retrieve build`, or remove --probes")
    return ExactIndex(unit_vectors(features.features), device)


def _thumbnails(jpegs: Sequence[bytes]) -> list[str]:
    return [uri for uri in map(thumbnail, jpegs) if uri is not None]
