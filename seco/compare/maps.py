"""A map of the videos for each encoder: t-SNE of their features, coloured by class."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from seco.pages.text import printable

FEWEST_VIDEOS = 12  # no neighbourhoods to speak of among fewer
_MOST_VIDEOS = 2000  # a map of more takes minutes and shows no more
_PERPLEXITY = 30.0  # van der Maaten and Hinton 2008: 5 to 50
_COLOURS = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
_MARKERS = "os^Dvp<P>X"
_OTHER = "#b8bec4"
_INCHES = 3.2


def shown_rows(rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The rows themselves, or a drawn part of them that a map can show."""
    if len(rows) <= _MOST_VIDEOS:
        return rows
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))[:_MOST_VIDEOS]
    return rows[np.sort(drawn)]


def place(features: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Places in the plane for features (M, D): (M, 2), by t-SNE of their directions.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    directions = features / np.maximum(lengths, np.finfo(np.float64).tiny)
    perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
    # Of features that do not vary there are no principal components to start from.
    varied = features.shape[1] > 1 and directions.std(axis=0).max() > 1e-6
    init = "pca" if varied else "random"
    tsne = TSNE(perplexity=perplexity, init=init, random_state=seed, n_jobs=1)
    with threadpool_limits(1):  # so few videos are slower on several, on a busy machine by far
        places: NDArray[np.float32] = tsne.fit_transform(directions.astype(np.float32))
    return places


def draw(maps: Mapping[str, NDArray[np.float32]], classes: Sequence[str]) -> bytes:
    """The maps side by side as a PNG.

    Args:
        maps: by encoder, (M, 2) places of the same videos.
        classes: (M,) their class names, "" for none; those of most videos get a colour.
    """
    named = Counter(name for name in classes if name)
    coloured = sorted(name for name, _ in named.most_common(len(_COLOURS)))
    figure = Figure(figsize=(_INCHES * len(maps), _INCHES + 0.7), layout="constrained", dpi=150)
    axes_of = figure.subplots(1, len(maps), squeeze=False)[0]
    of_class = np.array(classes)
    handles = []
    for axes, (encoder, places) in zip(axes_of, maps.items(), strict=True):
        others = ~np.isin(of_class, coloured)
        style = {"s": 13, "linewidths": 0}
        if others.any():
            axes.scatter(*places[others].T, color=_OTHER, marker=".", **style)
        handles = [
            axes.scatter(*places[of_class == name].T, color=colour, marker=marker, **style)
            for name, colour, marker in zip(coloured, _COLOURS, _MARKERS, strict=False)
        ]
        axes.set_title(_text(encoder), fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#d9dee3")
    figure.legend(
        handles, [_text(name) for name in coloured], loc="outside lower center",
        ncols=min(4, max(1, len(coloured))), frameon=False, fontsize=8, handletextpad=0.1,
    )  # fmt: skip
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    return drawn.getvalue()


def _text(name: str) -> str:
    """Without matplotlib's markup."""
    return printable(name)[:24].replace("$", r"\$")
