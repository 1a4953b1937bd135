"""The page of ``seco retrieve duplicates``: each pair as two strips of frames."""

from __future__ import annotations

from collections.abc import Callable

from seco.pages.html import render_page
from seco.pages.text import printable
from seco.pages.thumbnails import thumbnail
from seco.retrieve.duplicate_records import Duplicates
from seco.retrieve.fingerprints import COPY

MOST_SHOWN = 200  # pairs; some 60 kB each
_FRAMES = 4

# (group, key, how many) -> JPEG bytes in time order.
FramesOfGroup = Callable[[str, str, int], list[bytes]]


def render_duplicates_page(found: Duplicates, frames_of: FramesOfGroup) -> str:
    """The page as HTML; pictures are embedded, nothing is loaded from elsewhere.

    Args:
        frames_of: gives the pictures.
    """
    pairs = [
        {
            "kind": pair.kind,
            "mirrored": pair.mirrored,
            "similarity": f"{pair.similarity:.3f}",
            "appearance": f"{pair.match.appearance:.3f}" if pair.match else "–",
            "motion": f"{pair.match.motion:.3f}" if pair.match else "–",
            "shift": f"{pair.match.shift_seconds:+.2f}" if pair.match else "–",
            "videos": [
                {
                    "key": printable(key),
                    "split": printable(split),
                    "pictures": [
                        uri
                        for jpeg in frames_of(split, key, _FRAMES)
                        if (uri := thumbnail(jpeg)) is not None
                    ],
                }
                for key, split in ((pair.key, pair.split), (pair.near_key, pair.near_split))
            ],
        }
        for pair in found.pairs[:MOST_SHOWN]
    ]
    return render_page(
        "duplicates.html.j2",
        pairs=pairs,
        all=len(found.pairs),
        copies=sum(pair.kind == COPY for pair in found.pairs),
        compared=found.compared,
        unreadable=len(found.unreadable),
        path=printable(found.path),
    )
