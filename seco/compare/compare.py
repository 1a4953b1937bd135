"""``seco compare``: which of several encoders is better on one dataset, and can that be told?

All encoders are measured on the same videos with the same draws of labels, so that differences are
paired: what makes a video hard for all of them falls out of their intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seco.checkpoints.weights import RANDOM
from seco.compare.config import CompareConfig, check_compare, fractions_of, values_of_c
from seco.compare.encoders import (
    Compared,
    Extract,
    differing_settings,
    extract_missing,
    given_folders,
    open_encoders,
)
from seco.compare.intervals import UNDECIDED, GroupBootstrap, Interval, decide
from seco.compare.measures import (
    SCALINGS,
    Classified,
    Rights,
    SvmChoice,
    draw_labelled,
    effective_rank,
    hold_outs,
    same_video,
)
from seco.compare.page import FEWEST_VIDEOS, draw, place, render_compare_page, shown_rows
from seco.compare.result import RANK, CompareResult, Difference, Measure, Pair
from seco.compare.videos import choose_videos
from seco.evaluation.splits import TrainTest
from seco.extract.config import ExtractConfig
from seco.processes.device import resolve_device
from shards.atomic import atomic_path, require_writable, write_json, write_text
from shards.errors import InputError
from shards.progress import progress
from shards.settings import as_settings

RESULT, PAGE, MAPS = "compare.json", "compare.html", "maps.png"
_RANK_BLOCKS = 64  # of groups; the effective rank is computed without each of them


def compare(config: CompareConfig, extraction: ExtractConfig, extract: Extract) -> CompareResult:
    """Extract what is missing, measure every encoder, write the result, its page and its maps.

    Args:
        config: as given.
        extraction: settings of the features that are missing.
        extract: extracts features; raises where it cannot.

    Raises:
        InputError: settings, shards, checkpoints or feature folders cannot be used.
    """
    check_compare(config)
    out = Path(config.out)
    require_writable(out)  # before anything that takes long
    if config.features:
        folders = given_folders(config)
    else:
        folders = extract_missing(config, extraction, extract)
    encoders = open_encoders(folders)
    baselines = _baselines(encoders, config.baseline)
    device = resolve_device(extraction.device, spare_cores=0)
    comparison = _Comparison(config, encoders, baselines, device)
    maps = comparison.maps()
    result = comparison.run()
    write_json(out / RESULT, result.to_json())
    (out / MAPS).unlink(missing_ok=True)  # of an earlier comparison
    if maps is not None:
        with atomic_path(out / MAPS) as path:
            path.write_bytes(maps)
    write_text(out / PAGE, render_compare_page(result, maps))
    return result


def _baselines(encoders: Sequence[Compared], wanted: Sequence[str]) -> list[str]:
    """The names of the encoders that the others are compared with."""
    names = [encoder.name for encoder in encoders]
    for name in wanted:
        if name not in names:
            raise InputError(f"no encoder is named {name!r}", "--baseline", ", ".join(names))
    if len(encoders) > 1 and set(names) <= set(wanted):
        raise InputError("names all encoders", "--baseline", "leave one to compare with them")
    random = (e.name for e in encoders if e.train.encoder.get("checkpoint") == RANDOM)
    return list(dict.fromkeys(wanted)) or [next(random, names[-1])]


class _Comparison:
    """Measures that are taken one after the other, with their differences from the baseline."""

    def __init__(
        self,
        config: CompareConfig,
        encoders: Sequence[Compared],
        baselines: Sequence[str],
        device: torch.device,
    ) -> None:
        self._config = config
        self._encoders = encoders
        self._baselines = baselines
        self._device = device
        self._notes = differing_settings(encoders)
        self._videos = choose_videos(encoders, config, self._notes)
        self._measures: list[Measure] = []
        # By encoder and baseline.
        self._differences: dict[tuple[str, str], list[Difference]] = {
            (encoder.name, baseline): []
            for baseline in baselines
            for encoder in encoders
            if encoder.name not in baselines
        }
        self._svm: dict[str, dict[str, dict[str, Interval]]] = {}
        self._choices: dict[str, SvmChoice] = {}

    def run(self) -> CompareResult:
        """Measure everything.

        Raises:
            InputError: there is nothing to measure, or features are too large for the SVM.
        """
        first, labelled = self._encoders[0], self._videos.labelled
        if len(self._videos.all_rows) < 2:
            raise InputError("holds nothing to compare", first.test.folder, "two videos are needed")
        if labelled is not None:
            self._by_labels(labelled)
        self._same_video()
        self._effective_rank()
        groups = len(set(self._videos.test_groups or self._videos.all_groups))
        return CompareResult(
            dataset=first.test.dataset,
            train_split=labelled.train_split if labelled else "none",
            test_split=labelled.test_split if labelled else "none",
            settings={**as_settings(self._config), "baseline": list(self._baselines)},
            encoders={encoder.name: self._described(encoder) for encoder in self._encoders},
            groups=f"{groups} {self._videos.kind}",
            measures=self._measures,
            pairs=[Pair(*names, found) for names, found in self._differences.items()],
            svm=self._svm,
            notes=list(dict.fromkeys(self._notes)),
        )

    def maps(self) -> bytes | None:
        """Maps of the test videos, or of all where none have labels, baselines first; a PNG."""
        labelled = self._videos.labelled
        rows = shown_rows(
            labelled.test_rows if labelled else self._videos.all_rows, self._config.seed
        )
        if len(rows) < FEWEST_VIDEOS:
            return None
        first = self._encoders[0].test
        ordered = sorted(self._encoders, key=lambda e: e.name not in self._baselines)
        try:
            maps = {
                e.name: place(e.test.features[e.test_order[rows]], self._config.seed)
                for e in ordered
            }
        except ImportError:
            self._notes.append("no maps: they need scikit-learn (pip install scikit-learn)")
            return None
        return draw(maps, [first.label_names[row] for row in rows])

    def _by_labels(self, labelled: TrainTest) -> None:
        """SVM, kNN and R@1 with each percentage of the labels."""
        config, labels = self._config, labelled.train_labels
        bootstrap = GroupBootstrap(self._videos.test_groups, config.resamples, config.seed)
        amounts = draw_labelled(labels, fractions_of(config), config.repeats, config.seed)
        if lost := set(fractions_of(config)) - {amount.percent for amount in amounts}:
            shown = ", ".join(f"{percent:g} %" for percent in sorted(lost))
            self._notes.append(f"{shown} of the labels are as few videos as the next percentage")
        parts = hold_outs(labels, self._videos.train_groups)
        if not parts:
            self._notes.append(
                "no training videos can be held out: the SVM has raw features and the middle C"
            )
        fits = len(parts) * len(values_of_c(config)) + sum(len(one.draws) for one in amounts)
        fits *= len(SCALINGS) * len(self._encoders)
        rights: dict[str, dict[str, Rights]] = {}
        with progress("Comparing", fits, "SVMs") as shown_progress:
            for encoder in self._encoders:
                classified = Classified(
                    self._videos.of(encoder), values_of_c(config), self._device,
                    shown_progress.advance,
                )  # fmt: skip
                choice = classified.choose(parts)
                scaled = {
                    amount.key: {
                        how: classified.svm(classified.fit_svms(amount, how, choice.c[how]), how)
                        for how in SCALINGS
                    }
                    for amount in amounts
                }
                rights[encoder.name] = {
                    f"{what}@{amount.key}": right
                    for amount in amounts
                    for what, right in (
                        ("svm", scaled[amount.key][choice.scaling]),
                        ("knn", classified.knn(amount, config.neighbours, config.temperature)),
                        ("r1", classified.nearest(amount)),
                    )
                }
                self._choices[encoder.name] = choice
                self._svm[encoder.name] = {
                    key: {how: bootstrap.mean(right, 0, 1) for how, right in by_scaling.items()}
                    for key, by_scaling in scaled.items()
                }
                if classified.not_converged:
                    self._notes.append(
                        f"SVMs of {encoder.name} that did not converge: {classified.not_converged}"
                    )
        for what, title in (("svm", "SVM"), ("knn", "kNN"), ("r1", "R@1")):
            for amount in amounts:
                key = f"{what}@{amount.key}"
                found = {name: right[key] for name, right in rights.items()}
                title_of = f"{title}, {amount.key} % of labels"
                self._add(key, title_of, found, bootstrap, labelled=amount.videos)

    def _same_video(self) -> None:
        """Of all videos that have two halves."""
        frames = np.stack([e.test.frames[e.test_order] for e in self._encoders])
        halved: NDArray[np.bool_] = np.all(frames >= 2, axis=0)[self._videos.all_rows]
        rows = self._videos.all_rows[halved]
        if len(rows) < 2:
            self._notes.append("videos of one frame have no halves: no same-video R@1")
            return
        groups = [g for g, two in zip(self._videos.all_groups, halved, strict=True) if two]
        bootstrap = GroupBootstrap(groups, self._config.resamples, self._config.seed)
        found = {
            e.name: same_video(e.test.halves, e.test_order[rows], self._device)
            for e in self._encoders
        }
        self._add("same_video", "same-video R@1", found, bootstrap, chance=1 / len(rows))

    def _effective_rank(self) -> None:
        config, rows = self._config, self._videos.all_rows
        bootstrap = GroupBootstrap(
            self._videos.all_groups, config.resamples, config.seed, most_blocks=_RANK_BLOCKS
        )
        ranks = {
            e.name: effective_rank(e.test.features, e.test_order[rows], bootstrap.blocks)
            for e in self._encoders
        }
        values = {name: bootstrap.of_influence(*rank) for name, rank in ranks.items()}
        self._measures.append(Measure(RANK, "effective rank", values, len(rows), bootstrap.groups))
        widths = {e.name: e.test.features.shape[1] for e in self._encoders}
        for (name, baseline), found in self._differences.items():
            if widths[name] != widths[baseline]:
                reason = (
                    f"features of {widths[name]} values cannot be compared in it with features "
                    f"of {widths[baseline]}"
                )
                found.append(Difference(RANK, None, UNDECIDED, reason))
                continue
            (value, influence), (other, other_influence) = ranks[name], ranks[baseline]
            interval = bootstrap.of_influence(value - other, influence - other_influence)
            found.append(Difference(RANK, interval, *decide(interval, bootstrap.groups)))

    def _add(
        self,
        key: str,
        title: str,
        rights: dict[str, Rights],
        bootstrap: GroupBootstrap,
        labelled: int | None = None,
        chance: float | None = None,
    ) -> None:
        """A measure of outcomes (R, M) of each encoder, and the differences from the baseline's."""
        some = next(iter(rights.values()))
        self._measures.append(
            Measure(
                key=key,
                title=title,
                values={name: bootstrap.mean(right, 0, 1) for name, right in rights.items()},
                videos=some.shape[1],
                groups=bootstrap.groups,
                labelled=labelled,
                draws={n: right.mean(axis=1).tolist() for n, right in rights.items()},
                chance=chance,
            )
        )
        for (name, baseline), found in self._differences.items():
            interval = bootstrap.mean(rights[name] - rights[baseline].astype(np.float64), -1, 1)
            found.append(Difference(key, interval, *decide(interval, bootstrap.groups)))

    def _described(self, encoder: Compared) -> dict[str, Any]:
        """Where it comes from, for the result."""
        choice = self._choices.get(encoder.name)
        meta = encoder.train.meta
        said = ("shards", "dataset", "frames", "short_edge", "crop_size", "precision", "toolkit")
        return {
            **encoder.train.encoder,
            "features": str(encoder.train.folder),
            "test_features": str(encoder.test.folder),
            "digest": meta.get("digest"),
            "extraction": {name: meta.get(name) for name in said},
            "svm": dataclasses.asdict(choice) if choice else None,
        }
