"""Self-contained HTML pages: templates, thumbnails as data URIs, charts as inline SVG."""

from __future__ import annotations

import base64
import io
import re
import struct
from collections.abc import Callable
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from seco.text import percent
from shards.dataset import ShardSet
from shards.sampling import evenly_spaced
from shards.storage import UnreadableFrame
from shards.terminal import printable
from shards.untrusted import require_pixels

INK = "#010203"  # placeholder that becomes the page's text colour
SERIES = ("#2f7ed8", "#d1701f", "#2f9e68", "#9a63c9")  # 3:1 or more on white and on near-black
CHART_INCHES = (4.4, 2.5)

_DROPPED = re.compile(
    r"<\?xml[^>]*\?>|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", re.DOTALL
)
_NUMBERED_ID = re.compile(r' id="[A-Za-z0-9.]+_\d+"')
_SVG_TAG = re.compile(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>")
# Also what makes a link of a bare address: the slash of https:// and the dot of www.
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|~&$]|(?<=:)/|(?<=www)\.", re.IGNORECASE)
_FONT = re.compile(r"font-family: [^;\"]*;? ?")


def new_chart(
    height_inches: float = CHART_INCHES[1], width_inches: float = CHART_INCHES[0]
) -> Figure:
    """Create an empty figure of the right size for :func:`figure_svg`."""
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def style_axes(axes: Axes) -> None:
    """Style thin axes in the page's text colour, for light and dark pages."""
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_alpha(0.4)


def figure_svg(figure: Figure, label: str, salt: str) -> Markup:
    """Render a figure as an ``<svg>`` element without a fixed size or background.

    The same figure gives the same bytes.

    Args:
        label: text for screen readers.
        salt: unique among the charts of a page. Ids are hashes of it; a chart that shares ids with
            one in a closed ``<details>`` would lose its clip paths.
    """
    # Text instead of outlines: smaller, selectable, in the page's font and colour.
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    svg = _DROPPED.sub("", drawn.getvalue())
    svg = _FONT.sub("", _NUMBERED_ID.sub("", svg)).replace(INK, "currentColor")
    head = Markup('<svg role="img" aria-label="{}" ').format(label)
    return Markup(_SVG_TAG.sub(lambda tag: f"{head}{tag[1]}>", svg, count=1).strip())


def data_uri(data: bytes, media_type: str) -> str:
    """Encode a picture's bytes as a ``data:`` URI."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def render_page(template: str, **values: Any) -> str:
    """Fill a template of ``templates/``; every value is escaped unless it is ``Markup``."""
    return _environment(autoescape=True, finalize=_shown).get_template(template).render(**values)


def render_markdown(template: str, **values: Any) -> str:
    """Fill a template of ``templates/``; every value is escaped to text unless it is ``Markup``."""
    environment = _environment(autoescape=False, finalize=_markdown_text)
    return environment.get_template(template).render(**values)


def _environment(autoescape: bool, finalize: Callable[[Any], Any]) -> Environment:
    environment = Environment(
        loader=PackageLoader("seco", "templates"),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment


def _shown(value: Any) -> Any:
    # File names may contain bytes that are not text.
    return value if isinstance(value, Markup) else printable(value)


def _markdown_text(value: Any) -> str:
    if isinstance(value, Markup):
        return str(value)
    return _MARKDOWN.sub(r"\\\g<0>", printable(value))


THUMBNAIL_PX = (320, 180)  # twice what a page shows, for sharp screens
_JPEG_QUALITY = 78
_UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,  # raised by Pillow for a broken PNG
    struct.error,
    Image.DecompressionBombError,
)
# (key, count) -> JPEG bytes in time order; fewer or none if there are not enough.
FramesOf = Callable[[str, int], list[bytes]]


def small_picture(data: bytes, box_px: tuple[int, int]) -> Image.Image | None:
    """Decode a picture to RGB, scaled to fit the box (width, height); None if it is broken."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as stored:
            require_pixels(*stored.size)
            stored.draft("RGB", box_px)  # libjpeg decodes at reduced size
            picture: Image.Image = stored.convert("RGB")
    except _UNDECODABLE:
        return None
    picture.thumbnail(box_px)
    return picture


def thumbnail(data: bytes, box_px: tuple[int, int] = THUMBNAIL_PX) -> str | None:
    """Re-encode a small picture as a data URI, so that nothing else of the file gets through."""
    picture = small_picture(data, box_px)
    if picture is None:
        return None
    encoded = io.BytesIO()
    picture.save(encoded, format="JPEG", quality=_JPEG_QUALITY)
    return data_uri(encoded.getvalue(), "image/jpeg")


def frames_of(shards: ShardSet) -> FramesOf:
    """Return a reader of evenly spaced stored frames; it leaves out unreadable ones."""

    def read(key: str, count: int) -> list[bytes]:
        video = shards.find(key)
        numbers = evenly_spaced(shards.frame_count(video), count)
        found = shards.read_frames([(video, number) for number in numbers])
        return [data for data in found if not isinstance(data, UnreadableFrame)]

    return read
