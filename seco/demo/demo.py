"""``seco demo``: the whole chain on a small set, by the commands a user would type.

Each step is one command of the toolkit, printed before it runs, so that the demo is also the
recipe. Its scale (short edge, crop, batch, queue) is what a two-core machine trains in minutes; it
shows that the parts work together and that pre-training helps, not what SeCo reaches at full size.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seco.demo.config import DemoConfig
from shards.atomic import write_json
from shards.errors import EXIT_STOPPED, InputError, Stopped, TooManyExcluded
from shards.format import Manifest, read_manifest

Command = Callable[[list[str]], int]


@dataclass(frozen=True)
class Scale:
    """How large the demo is; measured choices are in ``benchmarks/results/demo.md``."""

    steps: int
    clips_per_class: int
    crop_px: int = 32
    stored_short_edge_px: int = 72
    feature_short_edge_px: int = 54
    feature_crop_px: int = 48
    frames: int = 16
    batch: int = 32
    bn_group: int = 16
    lr: float = 0.02
    temperature: float = 0.2
    ema: float = 0.99
    queue_share: float = 0.2  # of 3 keys a video: beyond it a query's own video is a negative


FULL = Scale(steps=1500, clips_per_class=36)
QUICK = Scale(steps=12, clips_per_class=4, batch=8, bn_group=4, frames=4)


def demo(config: DemoConfig, command: Command) -> str:
    """Run the chain; returns the closing table.

    Args:
        config: settings.
        command: runs one ``seco`` command line in this process and returns its exit code.

    Raises:
        InputError: a step failed; its own line says why.
    """
    return _Demo(config, command).run()


class _Demo:
    def __init__(self, config: DemoConfig, command: Command) -> None:
        self.config = config
        self.command = command
        self.scale = QUICK if config.quick else FULL
        self.steps = config.steps or self.scale.steps
        # Each set has a folder of its own, so that one demo never shows another's figures.
        self.out = Path(config.out) / _folder_name(config)
        self.run_name = f"{config.tasks.replace(',', '-')}-seed{config.seed}"
        self.began = time.monotonic()

    def run(self) -> str:
        manifest = self._shards()
        shards = str(self.out / "shards" / f"{manifest.name}.json")
        self._step("inspect", shards, "--html", str(self.out / "shards.html"))
        run = self._pretrain(manifest, shards)
        encoders = {"SeCo": str(run / "last.pt"), "random initialisation": "random"}
        rows = [self._evaluate(name, source, shards) for name, source in encoders.items()]
        nearest = self._nearest_page()
        summary = {"dataset": manifest.dataset, "seed": self.config.seed, "rows": rows}
        write_json(self.out / "demo.json", {**summary, "tasks": self.config.tasks})
        report = self.out / "report.html"
        self._step("report", str(self.out), "--out", str(report))
        return self._table(rows, report, nearest)

    def _shards(self) -> Manifest:
        """Render or take the videos, and prepare them."""
        dataset, source = self.config.dataset, self.config.src
        if source is None:
            dataset, source = "ucf101", str(self.out / "raw")
            if not (self.out / "raw" / "ucfTrainTestlist").is_dir():
                clips = ["--clips-per-class", str(self.scale.clips_per_class)]
                self._step("render-demo", source, *clips, "--seed", "0")
        self._step(
            *("prepare", dataset, "--src", source, "--out", str(self.out / "shards")),
            *("--short-edge", str(self.scale.stored_short_edge_px), "--frames", "24"),
            *("--videos-per-shard", "64"),
        )
        manifests = sorted((self.out / "shards").glob("*.json"))
        if not manifests:
            raise InputError("holds no prepared set", self.out / "shards")
        return max((read_manifest(path) for path in manifests), key=_videos)

    def _pretrain(self, manifest: Manifest, shards: str) -> Path:
        scale, videos = self.scale, _videos(manifest)
        batch = min(scale.batch, max(2, videos // 2))
        epochs = max(1, round(self.steps / max(1, videos // batch)))
        queue = max(batch, int(scale.queue_share * 3 * videos) // 32 * 32)
        run = self.out / "runs" / self.run_name
        self._step(
            *("pretrain", "--shards", shards, "--out", str(run), "--resume", "auto"),
            *("--arch", "resnet18", "--tasks", self.config.tasks, "--epochs", str(epochs)),
            *("--batch-size", str(batch), "--queue-size", str(queue), "--lr", str(scale.lr)),
            *("--temperature", str(scale.temperature), "--ema", str(scale.ema)),
            *("--bn-group", str(scale.bn_group if batch % scale.bn_group == 0 else batch)),
            *("--crop-size", str(scale.crop_px), "--seed", str(self.config.seed)),
            *("--workers", "1", "--checkpoint-every-steps", "500"),
        )
        return run

    def _evaluate(self, name: str, source: str, shards: str) -> dict[str, Any]:
        scale = self.scale
        folder = self._features(source)
        self._step(
            *("extract-features", "--shards", shards, "--checkpoint", source),
            *("--out", str(folder), "--overwrite", "--arch", "resnet18"),
            *("--seed", str(self.config.seed)),
            *("--frames", str(scale.frames), "--short-edge", str(scale.feature_short_edge_px)),
            *("--crop-size", str(scale.feature_crop_px), "--workers", "1"),
        )
        row: dict[str, Any] = {"encoder": name}
        if _has_train_and_test(folder):
            self._step("probe", "--features", str(folder))
            row["probe_top1"] = _read_json(folder / "probe.json")["top1"]
        else:
            reason = "no labelled training and test videos of two classes, so nothing to probe"
            print(f"{folder}: {reason}", file=sys.stderr)
        self._step("retrieve", "evaluate", "--features", str(folder))
        retrieval = _read_json(folder / "retrieval.json")
        for figure, found in (("r_at_1", "label"), ("same_video_r_at_1", "same_video")):
            if "1" in retrieval[found]:
                row[figure] = retrieval[found]["1"]
        return row

    def _features(self, source: str) -> Path:
        kind = "random" if source == "random" else "seco"
        return self.out / "features" / f"{kind}-{self.run_name}"

    def _nearest_page(self) -> Path:
        """The nearest videos of the first test video."""
        folder = self._features("seco")
        rows = _table_of(folder)
        tests = [row for row in rows if "test" in _splits(row)]
        page = self.out / "nearest.html"
        key = (tests or rows)[0]["key"]
        self._step(
            "retrieve", "query", "--features", str(folder), "--video", key, "--html", str(page)
        )
        return page

    def _step(self, *arguments: str) -> None:
        line = f"\n[{self._clock()}] $ seco {shlex.join(arguments)}"
        print(line, file=sys.stderr, flush=True)
        code = self.command(list(arguments))
        if code == EXIT_STOPPED:
            raise Stopped("the demo stopped; run the same command again and it goes on from there")
        if code == 3:
            raise TooManyExcluded("too many videos could not be used", self.config.src)
        if code:
            raise InputError(f"the step 'seco {arguments[0]}' failed with exit code {code}")

    def _table(self, rows: list[dict[str, Any]], report: Path, nearest: Path) -> str:
        names = {"probe_top1": "SVM top-1", "r_at_1": "R@1", "same_video_r_at_1": "same video R@1"}
        lines = [f"{'encoder':<24}" + "".join(f"{title:>16}" for title in names.values())]
        for row in rows:
            figures = "".join(
                f"{100 * row[name]:>15.1f}%" if name in row else f"{'–':>16}" for name in names
            )
            lines.append(f"{row['encoder']:<24}{figures}")
        if self.config.quick:
            lines.append("(--quick: a few steps on a few clips; these figures mean nothing)")
        elif self.config.src is None:
            # Measured over seeds: benchmarks/results/demo.md.
            lines.append(
                "(so short a run moves same-video retrieval, which it trains for; its SVM differs "
                "by some 8 points from seed to seed)"
            )
        lines += [f"report: {report}", f"nearest videos: {nearest}", f"took {self._clock()}"]
        return "\n" + "\n".join(lines)

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        return f"{minutes}:{seconds:02d}"


def _folder_name(config: DemoConfig) -> str:
    """``rendered``, or data set and folder; folders of the same name are told apart by a digest."""
    quick = "-quick" if config.quick else ""
    if config.src is None:
        return f"rendered{quick}"
    digest = hashlib.sha1(str(Path(config.src).resolve()).encode()).hexdigest()[:6]
    return f"{config.dataset}-{digest}{quick}"


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _table_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "videos.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _splits(row: dict[str, str]) -> set[str]:
    return {value for name, value in row.items() if name.startswith("split.")}


def _has_train_and_test(folder: Path) -> bool:
    labelled = [(row["label"], _splits(row)) for row in _table_of(folder) if row["label"]]
    learned = {label for label, splits in labelled if "train" in splits}
    return len(learned) > 1 and any(splits & {"test", "val"} for _, splits in labelled)


def _videos(manifest: Manifest) -> int:
    return sum(shard.videos for shard in manifest.shards)
