"""``seco retrieve query``: a page of pictures of the videos nearest to some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seco.features.matrix import unit_vectors
from seco.features.store import Features, encoder_name, read_features
from seco.pages.html import render_page
from seco.pages.text import printable
from seco.pages.thumbnails import FramesOf, frames_of, thumbnail
from seco.retrieve.config import QueryConfig
from seco.retrieve.index_files import INDEX, open_index
from seco.retrieve.nearest import ExactIndex, NearestIndex
from seco.retrieve.query import (
    DecodeFile,
    NearestShare,
    Neighbour,
    encode_frames,
    frames_of_file,
    query,
    query_vector,
    right_among_nearest,
)
from shards.atomic import require_writable, write_text
from shards.errors import InputError
from shards.opening import open_shards

FRAMES_OF_QUERY = 5
FRAMES_OF_NEIGHBOUR = 3


def write_query_page(config: QueryConfig, decode: DecodeFile) -> str:
    """Write the page of the videos nearest to those of ``config.video``, or to ``config.file``.

    An index saved by ``seco retrieve build`` is used if there is one.

    Args:
        decode: gives the frames of a video file.

    Returns:
        What to show the user: the videos, the nearest first, and where the page is.

    Raises:
        InputError: no such video, a file that cannot be decoded, another encoder, an index of
            other features, or the shards cannot be opened.
    """
    if bool(config.video) == (config.file is not None):
        raise InputError("give one of them", "--video KEY, --file PATH")
    if config.file is None and config.checkpoint is not None:
        raise InputError("is for --file", "--checkpoint", "leave it out")
    path = Path(config.html)
    require_writable(path.parent)  # before anything that takes long
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
    """A query as the page shows it, and the videos nearest to it."""

    key: str
    label: str
    source: str
    frames: list[bytes]  # JPEG
    nearest: Sequence[Neighbour]


def of_video(
    features: Features, key: str, nearest: Sequence[Neighbour], pictures: FramesOf
) -> Query:
    """A video of the set with the videos nearest to it (:func:`seco.retrieve.query.query`)."""
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
    """The page as HTML; nothing is loaded from elsewhere.

    Args:
        share: of :func:`seco.retrieve.query.right_among_nearest`.
        pictures: gives the frames of the neighbours.
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
    # faiss knows cpu and cuda alone; a GPU by its number is torch's.
    device = config.device.partition(":")[0]
    saved = Path(config.out or config.features) / INDEX
    if saved.is_file():
        return open_index(saved, features, device, config.probes)
    if config.probes is not None:
        raise InputError(
            "there is no saved index", saved, "run `seco retrieve build`, or leave --probes out"
        )
    return ExactIndex(unit_vectors(features.features), device)


def _thumbnails(jpegs: Sequence[bytes]) -> list[str]:
    return [uri for uri in map(thumbnail, jpegs) if uri is not None]
