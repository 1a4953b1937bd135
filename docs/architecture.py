"""Draw ``architecture.svg``: which part of the toolkit imports which. Run from the repository."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH, ROW, BOX_HEIGHT, GAP = 960, 92, 46, 24  # px
# What each part is for: few words, since each stands in a box.
PARTS = {
    "cli.py": "commands",
    "pipelines": "videos to shards",
    "shards": "format, order, reading",
    "seco/api": "Python API",
    "seco/config": "settings",
    "seco/processes": "devices, ranks",
    "seco/models": "encoder, losses, queue",
    "seco/data": "triplets, clips, views",
    "seco/checkpoints": "read, write, import",
    "seco/features": "extraction",
    "seco/evaluation": "probes, retrieval, tests",
    "seco/training": "the loop",
    "seco/report": "results as a page",
}


def part_of(module: str) -> str | None:
    """``seco.data.loader`` is of ``seco/data``; None: not of the toolkit, or too small to draw."""
    names = module.split(".")
    part = "/".join(names[:2]) if names[0] == "seco" else names[0]
    return part if part in PARTS else "cli.py" if part == "cli" else None


def imports() -> dict[str, set[str]]:
    """For each part, the others it imports at any depth of its code."""
    found: dict[str, set[str]] = {part: set() for part in PARTS}
    for file in [ROOT / "cli.py", *(p for r in PARTS for p in (ROOT / r).rglob("*.py"))]:
        _add(file, found)
    for file in (ROOT / "seco").glob("*.py"):
        _add(file, found)
    return found


def _add(file: Path, found: dict[str, set[str]]) -> None:
    part = part_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
    if part is None:
        return
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            other = part_of(node.module)
            if other not in (None, part):
                found[part].add(str(other))


def rows(above: dict[str, set[str]]) -> list[list[str]]:
    """The parts by how long the longest chain of imports below them is; the lowest last."""
    height: dict[str, int] = {}
    for part in TopologicalSorter(above).static_order():
        height[part] = 1 + max((height[other] for other in above[part]), default=-1)
    return [
        [part for part in PARTS if height[part] == h] for h in range(max(height.values()), -1, -1)
    ]


def direct(above: dict[str, set[str]]) -> set[tuple[str, str]]:
    """The imports that no chain of others implies: what has to be drawn."""

    def below(part: str) -> set[str]:
        return above[part].union(*(below(other) for other in above[part]))

    return {
        (part, other)
        for part, others in above.items()
        for other in others
        if not any(other in below(between) for between in others - {other})
    }


def svg() -> str:
    """The picture."""
    above = imports()
    place: dict[str, tuple[float, float, float]] = {}  # left, top, width
    lines = rows(above)
    for y, parts in enumerate(lines):
        width = min(190.0, (WIDTH - GAP * (len(parts) + 1)) / len(parts))
        left = (WIDTH - len(parts) * width - (len(parts) - 1) * GAP) / 2
        for x, part in enumerate(parts):
            place[part] = (left + x * (width + GAP), 10 + y * ROW, width)
    height = 10 + len(lines) * ROW - (ROW - BOX_HEIGHT) + 10
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" text-anchor="middle">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for part, other in sorted(direct(above)):
        (x, y, w), (to_x, to_y, to_w) = place[part], place[other]
        y += BOX_HEIGHT
        start, end = x + w / 2, to_x + to_w / 2
        bend = (start, end) if to_y - y < 3 * ROW else (0, end)  # a long one goes round the boxes
        out.append(
            f'<path d="M{start:.0f} {y} C{bend[0]:.0f} {y + 30} {bend[1]:.0f} {to_y - 30} '
            f'{end:.0f} {to_y}" fill="none" stroke="#9aa4b2"/>'
        )
    for part, (x, y, w) in place.items():
        fill = "#e8f0fb" if part.startswith("seco") else "#e9f6ee"
        out += [
            f'<rect x="{x:.0f}" y="{y}" width="{w:.0f}" height="{BOX_HEIGHT}" rx="6" '
            f'fill="{fill}" stroke="#5b6b80"/>',
            f'<text x="{x + w / 2:.0f}" y="{y + 19}" font-size="14" fill="#1b2733">{part}</text>',
            f'<text x="{x + w / 2:.0f}" y="{y + 36}" font-size="11" fill="#445566">'
            f"{escape(PARTS[part])}</text>",
        ]
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    (ROOT / "docs/architecture.svg").write_text(svg(), "utf-8")
