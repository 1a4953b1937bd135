"""``seco retrieve query``: a page of pictures of the videos nearest to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from seco.eval_config import RetrieveConfig
from seco.feature_store import Features, encoder_name, read_features
from seco.pages import data_uri, printable, render_page
from seco.retrieval import INDEX, Neighbour, open_index, query
from shards.access import UnreadableFrame
from shards.atomic import write_text
from shards.opening import open_shards
from shards.reader import ShardSet

FRAMES_OF_QUERY = 5
FRAMES_OF_NEIGHBOUR = 3

# (key, how many) -> JPEG bytes in time order, fewer or none if there are no more.
FramesOf = Callable[[str, int], list[bytes]]


def write_query_page(config: RetrieveConfig, key: str, path: Path) -> Path:
    """Write the page of the videos nearest to ``key``; returns its path.

    An index saved by ``seco retrieve build`` is used if there is one.

    Raises:
        InputError: no such video, an index of other features, or the shards cannot be opened.
    """
    features = read_features(config.features)
    saved = Path(config.out or config.features) / INDEX
    index = open_index(saved, features) if saved.is_file() else None
    nearest = query(features, key, config.neighbours, index, config.device)
    shards = open_shards(config.shards or tuple(features.meta.get("shards", ())))
    write_text(path, render_query_page(features, key, nearest, frames_of(shards)))
    return path


def frames_of(shards: ShardSet) -> FramesOf:
    """Evenly spaced stored frames of a video; those that cannot be read are left out."""
    from seco.features import evenly_spaced

    def read(key: str, count: int) -> list[bytes]:
        video = shards.find(key)
        frames = []
        for number in evenly_spaced(shards.frame_count(video), count):
            try:
                frames.append(shards.read_frame(video, number))
            except UnreadableFrame:
                continue
        return frames

    return read


def render_query_page(
    features: Features, key: str, nearest: Sequence[Neighbour], frames_of: FramesOf
) -> str:
    """The page as HTML: the query, then its neighbours; nothing is loaded from elsewhere.

    Args:
        nearest: of :func:`seco.retrieval.query`.
        frames_of: gives the pictures.
    """
    row = features.find(key)
    judged = [n.right for n in nearest if n.right is not None]
    return render_page(
        "retrieval.html.j2",
        title=f"Nearest to {printable(key)}",
        query={
            "key": printable(key),
            "label": printable(features.label_names[row]),
            "source": printable(features.sources[row]),
            "pictures": _pictures(frames_of(key, FRAMES_OF_QUERY)),
        },
        neighbours=[
            {
                "rank": rank,
                "key": printable(n.key),
                "label": printable(n.label_name),
                "similarity": f"{n.similarity:.3f}",
                "right": n.right,
                "pictures": _pictures(frames_of(n.key, FRAMES_OF_NEIGHBOUR)),
            }
            for rank, n in enumerate(nearest, start=1)
        ],
        right=sum(judged),
        judged=len(judged),
        videos=len(features),
        encoder=printable(encoder_name(features.encoder)),
    )


def _pictures(jpegs: Sequence[bytes]) -> list[str]:
    return [data_uri(jpeg, "image/jpeg") for jpeg in jpegs]
