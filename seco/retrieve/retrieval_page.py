"""``seco retrieve query``: a page of pictures of the videos nearest to one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seco.features.store import Features, encoder_name, read_features
from seco.features.vectors import Vectors
from seco.pages.html import render_page
from seco.pages.text import printable
from seco.pages.thumbnails import FramesOf, frames_of, thumbnail
from seco.retrieve.config import QueryConfig
from seco.retrieve.index_files import INDEX, open_index
from seco.retrieve.nearest import ExactIndex, NearestIndex
from seco.retrieve.query import (
    DecodeFile,
    Neighbour,
    encode_frames,
    frames_of_file,
    query,
    query_vector,
)
from shards.atomic import require_writable, write_text
from shards.errors import InputError
from shards.opening import open_shards

FRAMES_OF_QUERY = 5
FRAMES_OF_NEIGHBOUR = 3


def write_query_page(config: QueryConfig, decode: DecodeFile) -> str:
    """Write the page of the videos nearest to ``config.video`` or ``config.file``.

    An index saved by ``seco retrieve build`` is used if there is one.

    Args:
        decode: gives the frames of a video file.

    Returns:
        What to show the user: the videos, the nearest first, and where the page is.

    Raises:
        InputError: no such video, a file that cannot be decoded, another encoder, an index of
            other features, or the shards cannot be opened.
    """
    if (config.video is None) == (config.file is None):
        raise InputError("give one of them", "--video KEY, --file PATH")
    if config.file is None and config.checkpoint is not None:
        raise InputError("is for --file", "--checkpoint", "leave it out")
    path = Path(config.html)
    require_writable(path.parent)  # before anything that takes long
    features = read_features(config.features)
    shards = open_shards(config.shards or tuple(features.meta.get("shards", ())))
    pictures = frames_of(shards)
    if config.video is not None:
        index = _index(config, features)
        nearest = query(features, config.video, config.neighbours, index)
        html = render_query_page(features, config.video, nearest, pictures)
    else:
        file = Path(str(config.file))
        frames = frames_of_file(file, features, shards, decode, config.timeout)
        vector = encode_frames(frames, features, config.checkpoint, config.device)
        index = _index(config, features)
        nearest = query_vector(features, vector, config.neighbours, index)
        shown = [frames[len(frames) * n // FRAMES_OF_QUERY] for n in range(FRAMES_OF_QUERY)]
        html = render_file_page(features, file, shown, nearest, pictures)
    write_text(path, html)
    lines = [
        f"{rank:>4}  {n.similarity:6.3f}  {printable(n.key)}  {printable(n.label_name)}".rstrip()
        for rank, n in enumerate(nearest, start=1)
    ]
    return "\n".join([*lines, str(path)])


def render_query_page(
    features: Features, key: str, nearest: Sequence[Neighbour], pictures: FramesOf
) -> str:
    """The page of a video of the set, as HTML; nothing is loaded from elsewhere.

    Args:
        nearest: of :func:`seco.retrieve.query.query`.
        pictures: gives the frames.
    """
    row = features.find(key)
    asked = {
        "key": printable(key),
        "label": printable(features.label_names[row]),
        "source": printable(features.sources[row]),
        "pictures": _thumbnails(pictures(key, FRAMES_OF_QUERY)),
    }
    return _render(features, asked, nearest, pictures)


def render_file_page(
    features: Features,
    file: Path,
    frames: Sequence[bytes],
    nearest: Sequence[Neighbour],
    pictures: FramesOf,
) -> str:
    """The page of a video file.

    Args:
        frames: of the file, those to show.
    """
    asked = {
        "key": printable(file.name),
        "label": "",
        "source": "a file",
        "pictures": _thumbnails(frames),
    }
    return _render(features, asked, nearest, pictures)


def _render(
    features: Features, asked: dict[str, Any], nearest: Sequence[Neighbour], pictures: FramesOf
) -> str:
    judged = [n.right for n in nearest if n.right is not None]
    return render_page(
        "retrieval.html.j2",
        title=f"Nearest to {asked['key']}",
        query=asked,
        neighbours=[
            {
                "rank": rank,
                "key": printable(n.key),
                "label": printable(n.label_name),
                "similarity": f"{n.similarity:.3f}",
                "right": n.right,
                "pictures": _thumbnails(pictures(n.key, FRAMES_OF_NEIGHBOUR)),
            }
            for rank, n in enumerate(nearest, start=1)
        ],
        right=sum(judged),
        judged=len(judged),
        videos=len(features),
        encoder=printable(encoder_name(features.encoder)),
    )


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
    return ExactIndex(Vectors(features.features), device)


def _thumbnails(jpegs: Sequence[bytes]) -> list[str]:
    return [uri for uri in map(thumbnail, jpegs) if uri is not None]
