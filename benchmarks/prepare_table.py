"""The figures of ``seco bench prepare`` as a table for people."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.prepare import Bench


def table(bench: Bench) -> str:
    """Markdown, so that it can be kept as it is."""
    return "\n".join(_lines(bench))


def _lines(bench: Bench) -> Iterator[str]:
    machine = ", ".join(f"{name} {value}" for name, value in bench.machine.items())
    yield f"{machine}; medians of {bench.repeats} repeats, CPU ms of all processes"
    if bench.clips:
        yield ""
        yield "| clip | frames | ours | limit | (a) | (b) | 30: ours | 30: limit | kB a frame |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in bench.clips:
            yield (
                f"| {row.clip} | {row.frames} | {row.ours:.0f} | {row.limit:.0f} "
                f"| {row.jpeg_files:.0f} | {row.encoded_again:.0f} | {row.ours_thirty:.0f} "
                f"| {row.limit_thirty:.0f} | {row.bytes_a_frame / 1e3:.1f}, "
                f"{row.bytes_a_frame_jpeg_files / 1e3:.1f} |"
            )
        yield ""
        yield from _pairs("Medians over the clips", bench.ratios())
    yield from _pairs("Short clips", bench.short)
    yield from _pairs("Scaling, all frames", bench.scaling)
    yield from _pairs("Planning", bench.planning)


def _pairs(title: str, values: dict[str, float]) -> Iterator[str]:
    if values:
        shown = "; ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        yield f"{title}: {shown}"
