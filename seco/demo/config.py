"""Settings of ``seco demo``. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from shards.settings import setting


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole chain, small: render or take videos, prepare, pre-train, extract, probe, report."""

    out: str = setting("demo", "folder of everything it makes")
    src: str | None = setting(None, "folder of your own videos [default: a rendered set]")
    dataset: str = setting("ucf101", "layout of --src: ucf101, hmdb51, kinetics or folder")
    seed: int = setting(0, "seed of weights and draws")
    tasks: str = setting(
        "inter",
        "proxy tasks; all three are inter,intra,order",
        source="paper Table 1, SeCo-Inter; measured in benchmarks/results/learning.md",
    )
    steps: int | None = setting(None, "training steps [default: what the demo's scale needs]")
    quick: bool = setting(False, "a few steps on a few clips: shows that the chain runs, no more")
