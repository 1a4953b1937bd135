"""``seco demo``: the whole chain on a small dataset, with the commands a user would type.

Each step is one command of the toolkit, printed before it runs, so the demo is also the recipe. It
is small enough to train in three minutes on two cores: a narrow ResNet for small images and views
of 32 px. It shows that SeCo learns, not what SeCo reaches at full size.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from seco.config import DemoConfig
from seco.evaluation.intervals import BETTER, WORSE
from seco.text import percent
from shards.dataset import ShardSet
from shards.errors import EXIT_STOPPED, InputError, Stopped, TooManyExcluded
from shards.format import read_manifest
from shards.opening import open_shards
from shards.terminal import say
from shards.untrusted import real_path

Command = Callable[[list[str]], int]

SECO, UNTRAINED, UNTRAINED_RESNET18 = "SeCo", "untrained", "untrained-ResNet-18"
_MOST_QUERIES = 8  # on the page of nearest videos
_RENDERED_SEED = 1  # the settings below were chosen on the videos of seed 0


@dataclass(frozen=True)
class Scale:
    """Size and settings of the demo; ``benchmarks/results/learning.md`` lists what was tried."""

    steps: int
    clips_per_class: int
    arch: str = "resnet10_w16"
    crop_px: int = 32
    stored_short_edge_px: int = 72
    feature_short_edge_px: int = 54
    feature_crop_px: int = 48
    frames: int = 16
    batch: int = 32
    lr: float = 0.05
    temperature: float = 0.1
    ema: float = 0.9
    min_crop_area: float = 0.35
    votes: int = 6  # of the online kNN


FULL = Scale(steps=1300, clips_per_class=36)
OWN = replace(FULL, min_crop_area=0.1)  # for real videos: benchmarks/results/learning.md
QUICK = Scale(steps=12, clips_per_class=4, batch=8, frames=4, votes=1)


def demo(config: DemoConfig, command: Command) -> str:
    """Run all steps; returns the closing table.

    Args:
        config: settings.
        command: runs one ``seco`` command line in this process and returns its exit code.

    Raises:
        InputError: a step failed, and has reported why.
    """
    return _Demo(config, command).run()


class _Demo:
    def __init__(self, config: DemoConfig, command: Command) -> None:
        self.config = config
        self.command = command
        self.scale = QUICK if config.quick else FULL if config.src is None else OWN
        self.steps = config.steps or self.scale.steps
        # Each dataset has its own folder, so that one demo never shows another's results.
        self.out = Path(config.out) / _folder_name(config)
        self.began = time.monotonic()

    def run(self) -> str:
        shards = self._shards()
        videos = open_shards(shards)
        split = _split(videos)
        self._step("inspect", shards, "--html", str(self.out / "shards.html"))
        run = self._pretrain(shards, videos, split)
        table = self._compare(shards, run, split)
        nearest = self._nearest_page(videos, split)
        report, maps = self.out / "report.html", self.out / "compare" / "maps.png"
        self._step("report", str(self.out), "--out", str(report))
        return "\n".join(
            [
                "",
                table,
                self._conclusion(split),
                *([f"maps of the features: {maps}"] if maps.is_file() else []),
                f"comparison: {self.out / 'compare' / 'compare.html'}",
                f"nearest videos: {nearest}",
                f"report: {report}",
                f"took {self._clock()}",
            ]
        )

    def _shards(self) -> str:
        """Render the videos if none are given, and prepare them; returns the manifest's path."""
        dataset, source = self.config.dataset, self.config.src
        if source is None:
            dataset, source = "ucf101", str(self.out / "raw")
            if not (self.out / "raw" / "ucfTrainTestlist").is_dir():
                clips = ["--clips-per-class", str(self.scale.clips_per_class)]
                self._step("render-demo", source, *clips, "--seed", str(_RENDERED_SEED))
        self._step(
            *("prepare", dataset, "--src", source, "--out", str(self.out / "shards")),
            *("--short-edge", str(self.scale.stored_short_edge_px), "--frames", "24"),
            *("--videos-per-shard", "64"),
        )
        manifests = sorted((self.out / "shards").glob("*.json"))
        if not manifests:
            raise InputError("holds no prepared dataset", self.out / "shards")
        # Of a dataset in several parts, such as Kinetics, use the largest.
        sizes = {p: sum(shard.videos for shard in read_manifest(p).shards) for p in manifests}
        return str(max(manifests, key=sizes.__getitem__))

    def _pretrain(self, shards: str, videos: ShardSet, split: str | None) -> Path:
        """Pre-train; if there is a split, on its training videos only, so the rest stay unseen."""
        scale = self.scale
        count = len(videos) if split is None else videos.splits[split].count("train")
        batch = max(2, min(scale.batch, count // 2) // 2 * 2)
        epochs = max(1, round(self.steps / max(1, count // batch)))
        seen = ["--split", split] if split is not None else []
        knn = []
        if len(np.unique(videos.labels[videos.labels >= 0])) > 1:
            every = max(1, epochs // scale.votes)
            knn = ["--knn-shards", shards, "--knn-every-epochs", str(every)]
        run = self.out / "runs" / f"{self.config.tasks.replace(',', '-')}-seed{self.config.seed}"
        self._step(
            *("pretrain", "--shards", shards, *seen, "--out", str(run), "--resume", "auto"),
            *("--arch", scale.arch, "--tasks", self.config.tasks, "--epochs", str(epochs)),
            *("--batch-size", str(batch), "--bn-group", str(max(2, batch // 2))),
            *("--queue-size", "0", "--ema", str(scale.ema)),
            *("--lr", str(scale.lr), "--temperature", str(scale.temperature)),
            *("--crop-size", str(scale.crop_px), "--min-crop-area", str(scale.min_crop_area)),
            *("--seed", str(self.config.seed), "--workers", "1", "--views-on", "workers"),
            *("--checkpoint-every-steps", "500", *knn),
        )
        return run

    def _compare(self, shards: str, run: Path, split: str | None) -> str:
        """Compare the pre-trained network with two untrained ones; returns the table."""
        scale, seed = self.scale, self.config.seed
        encoders = {
            SECO: str(run),
            UNTRAINED: f"random:{scale.arch}:{seed}",
            UNTRAINED_RESNET18: f"random:resnet18:{seed}",
        }
        named = [part for name, of in encoders.items() for part in ("--encoder", f"{name}={of}")]
        baselines = [part for n in (UNTRAINED, UNTRAINED_RESNET18) for part in ("--baseline", n)]
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            self._step(
                *("compare", "--shards", shards, *named, *baselines),
                *(("--split", split) if split is not None else ()),
                *("--out", str(self.out / "compare"), "--frames", str(scale.frames)),
                *("--short-edge", str(scale.feature_short_edge_px)),
                *("--crop-size", str(scale.feature_crop_px), "--workers", "1"),
            )
        return shown.getvalue().rstrip()

    def _nearest_page(self, videos: ShardSet, split: str | None) -> Path:
        """Write the page with the nearest videos of the first test video of each class."""
        keys: dict[int, str] = {}
        for number, (key, label) in enumerate(zip(videos.keys, videos.labels, strict=True)):
            if split is None or videos.splits[split][number] == "test":
                keys.setdefault(int(label), key)
        asked = [p for key in list(keys.values())[:_MOST_QUERIES] for p in ("--video", key)]
        page = self.out / "nearest.html"
        features = str(self.out / "compare" / "features" / SECO)
        self._step("retrieve", "query", "--features", features, *asked, "--html", str(page))
        return page

    def _conclusion(self, split: str | None) -> str:
        """The result in words."""
        if self.config.quick:
            return "(--quick: a few steps on a few clips; these numbers mean nothing)"
        found = json.loads((self.out / "compare" / "compare.json").read_text("utf-8"))
        measures = {measure["key"]: measure for measure in found["measures"]}
        key, does = "svm@100", "linear SVM accuracy is"
        if key not in measures:
            key, does = "same_video", "same-video R@1 is"
        if key not in measures:
            return "There are too few videos, or they are too short, to show anything."
        values = {name: percent(one["value"]) for name, one in measures[key]["values"].items()}
        verdicts = {
            difference["verdict"]
            for pair in found["comparisons"]
            for difference in pair["differences"]
            if difference["key"] == key
        }
        unseen = " and without the test videos" if split is not None else ""
        figures = (
            f"{does} {values[SECO]} % with it, {values[UNTRAINED]} % with the untrained network, "
            f"{values[UNTRAINED_RESNET18]} % with an untrained ResNet-18"
        )
        if verdicts == {BETTER}:
            said = f"pre-training without labels{unseen} improved the features of these videos"
        elif WORSE in verdicts:
            said = "pre-training did not improve the features of these videos"
        else:
            said = "the results do not show whether pre-training helps on these videos"
        return f"Conclusion: {said}: {figures}."

    def _step(self, *arguments: str) -> None:
        line = f"\n[{self._clock()}] $ seco {shlex.join(arguments)}"
        say(line)
        code = self.command(list(arguments))
        if code == EXIT_STOPPED:
            raise Stopped("the demo stopped; run the same command again to resume")
        if code == 3:
            raise TooManyExcluded("too many videos could not be used", self.config.src)
        if code:
            raise InputError(f"the step 'seco {arguments[0]}' failed with exit code {code}")

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        return f"{minutes}:{seconds:02d}"


def _folder_name(config: DemoConfig) -> str:
    """``rendered``, or the dataset and a digest of the source folder's path."""
    quick = "-quick" if config.quick else ""
    if config.src is None:
        return f"rendered{quick}"
    digest = hashlib.sha1(str(real_path(config.src)).encode()).hexdigest()[:6]
    return f"{config.dataset}-{digest}{quick}"


def _split(videos: ShardSet) -> str | None:
    """Return the first split with labelled test videos and training videos of two classes."""
    for name, values in videos.splits.items():
        labels = {
            value: {label for of, label in zip(values, videos.labels, strict=True) if of == value}
            for value in ("train", "test")
        }
        if len(labels["train"] - {-1}) > 1 and labels["test"] - {-1}:
            return name
    return None
