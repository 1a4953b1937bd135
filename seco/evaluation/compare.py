"""``seco compare``: which of several encoders is better on one dataset, and can that be told?

All encoders are measured on the same videos with the same draws of labels, so differences are
paired: what makes a video hard for all of them cancels out. Every measure that uses labels is
repeated with a part of them: the classifier, or the gallery of R@1, has the labelled videos alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from seco.checkpoints.convert import read_weights
from seco.checkpoints.io import LAST
from seco.checkpoints.named import has_architectures, is_named, weights_file
from seco.checkpoints.weights import RANDOM
from seco.config import CompareConfig, ExtractConfig, check_compare, fractions_of, values_of_c
from seco.data.splits import UNLABELLED, held_out
from seco.evaluation.comparison import (
    FEWEST_VIDEOS,
    RANK,
    CompareResult,
    Difference,
    Measure,
    Pair,
    draw,
    place,
    render_compare_page,
    shown_rows,
)
from seco.evaluation.intervals import UNDECIDED, GroupBootstrap, Interval, decide
from seco.evaluation.knn import knn_votes
from seco.evaluation.metrics import predictions_of
from seco.evaluation.nearest import ExactIndex
from seco.evaluation.splits import (
    TEST_SHARE,
    TrainTest,
    held_out_split,
    train_test,
    video_groups,
)
from seco.evaluation.svm import LinearSVM, fit_svm
from seco.features.matrix import FeatureMatrix, FeaturesTooLarge, Scaling, fit_scaling, unit_vectors
from seco.features.store import Features, read_features
from seco.models.backbones import (
    TIMM_PREFIX,
    backbone_spec,
    feature_dim,
    pretrained_timm,
    require_size,
    require_timm_weights,
    told_by_tensors,
)
from seco.processes.device import resolve_device
from shards.atomic import atomic_path, require_writable, write_json, write_text
from shards.errors import InputError
from shards.progress import progress
from shards.settings import as_settings
from shards.untrusted import real_path

FEATURES = "features"  # the folder in --out for extracted features
_NAME = re.compile(r"[\w.+-]+")
_SETTINGS = ("frames", "short_edge", "crop_size")
_NONE = np.empty(0, dtype=np.int64)

Extract = Callable[[ExtractConfig], object]


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder named by the user; ``source`` is a file, a name, ``timm:NAME`` or ``random``."""

    name: str
    source: str
    arch: str | None = None  # of random weights, and of names with weights for several
    seed: int = 0
    network: str = field(default="", compare=False)  # the architecture, however it is known


class NamedFolders(NamedTuple):
    """The feature folders of an encoder."""

    name: str
    train: Path
    test: Path | None


@dataclass(frozen=True)
class Compared:
    """One encoder's features of the compared videos.

    Args:
        name: the encoder's name.
        train: its feature folder.
        test: its folder of test videos; the same object if there is only one folder.
        train_order: (V,) the row of ``train`` for each video of the first encoder.
        test_order: the same for ``test``.
    """

    name: str
    train: Features
    test: Features
    train_order: NDArray[np.int64]
    test_order: NDArray[np.int64]


def parse_encoders(given: Sequence[str], arch: str | None) -> list[EncoderSpec]:
    """Parse ``--encoder``.

    Files are read here, so that an unusable one is reported before anything slow starts.

    Args:
        given: strings ``[NAME=]SOURCE``.
        arch: architecture of a source that names none: of ``random`` (by default that of the first
            file), of ``imagenet-v1`` and ``imagenet-v2``, and of state dicts of timm or a plug-in.

    Raises:
        InputError: a file is missing or is not an encoder, random weights have no architecture, or
            two encoders have the same name.
    """
    if arch is not None:
        backbone_spec(arch)  # raises for an unknown name
    specs = []
    for text in given:
        name, source = _named(text)
        if source.split(":")[0] == RANDOM:
            specs.append(_random(name, source))
        elif source.startswith(TIMM_PREFIX):
            require_timm_weights(source)
            specs.append(EncoderSpec(name or _as_name(source), source, source))
        elif is_named(source):
            own = arch if has_architectures(source) and told_by_tensors(arch or "") else None
            specs.append(EncoderSpec(name or _as_name(source), source, own))
        else:
            path = _checkpoint(source)
            file = Path(path)
            usual = real_path(file.parent).name if file.name == LAST else file.stem
            specs.append(EncoderSpec(name or _as_name(usual), path))
    _require_different([spec.name for spec in specs], "--encoder")
    archs = {spec.name: _arch_of(spec, arch) for spec in specs if spec.source != RANDOM}
    usual_arch = arch or next(iter(archs.values()), None)

    def complete(spec: EncoderSpec) -> EncoderSpec:
        if spec.source == RANDOM:
            spec = _with_arch(spec, usual_arch)
            return dataclasses.replace(spec, network=str(spec.arch))
        network = archs[spec.name]
        told = is_named(spec.source) or network != arch
        return dataclasses.replace(spec, arch=spec.arch if told else arch, network=network)

    return [complete(spec) for spec in specs]


def _arch_of(spec: EncoderSpec, usual_arch: str | None) -> str:
    if spec.source.startswith(TIMM_PREFIX):
        return spec.source
    path, named = weights_file(spec.source, spec.arch)
    assumed = None if named else usual_arch
    try:
        return read_weights(path, assumed).arch
    except InputError as error:
        if assumed is None:
            raise
        try:
            return read_weights(path).arch  # --arch is that of another encoder
        except InputError:
            raise error from None


def extract_missing(
    config: CompareConfig, extraction: ExtractConfig, extract: Extract
) -> list[NamedFolders]:
    """Extract the features of ``--shards`` missing from ``--out``; return the folders of all.

    Features of another checkpoint or with other settings are replaced.

    Args:
        extraction: extraction settings; shards, checkpoint and out are filled in here.
        extract: extracts the features, unless they are complete already.
    """
    below = Path(config.out, FEATURES)
    found = []
    specs = parse_encoders(config.encoder, extraction.arch)
    _require_baselines([spec.name for spec in specs], config.baseline)
    for spec in specs:  # before anything slow starts
        require_size(spec.network, extraction.crop_size)
    for spec in specs:  # timm fetches the weights here, not after the others' hours of extraction
        if spec.source.startswith(TIMM_PREFIX):
            pretrained_timm(spec.source)
    for spec in specs:
        test = below / f"{spec.name}.test" if config.test_shards else None
        found.append(NamedFolders(spec.name, below / spec.name, test))
        for shards, folder in ((config.shards, found[-1].train), (config.test_shards, test)):
            if folder is not None:
                extract(
                    dataclasses.replace(
                        extraction, shards=shards, checkpoint=spec.source, out=str(folder),
                        arch=spec.arch, seed=spec.seed, overwrite=True,
                    )
                )  # fmt: skip
    return found


def given_folders(config: CompareConfig) -> list[NamedFolders]:
    """The folders given by ``--features`` and ``--test-features``.

    Raises:
        InputError: two encoders have the same name, or a baseline is none of them.
    """
    tests = config.test_features or (None,) * len(config.features)
    found = []
    for text, test in zip(config.features, tests, strict=True):
        name, folder = _named(text)
        usual = _as_name(real_path(folder).name)
        found.append(NamedFolders(name or usual, Path(folder), Path(test) if test else None))
    names = [one.name for one in found]
    _require_different(names, "--features")
    _require_baselines(names, config.baseline)
    return found


def open_encoders(folders: Sequence[NamedFolders]) -> list[Compared]:
    """Open the features of all encoders.

    Raises:
        InputError: a folder cannot be read, or the folders differ in videos or labels.
    """
    opened: list[Compared] = []
    for name, folder, test_folder in folders:
        train = read_features(folder, finite=False)
        test = train if test_folder is None else read_features(test_folder, finite=False)
        first = opened[0] if opened else Compared(name, train, test, _NONE, _NONE)
        orders = _order(first.train, train), _order(first.test, test)
        opened.append(Compared(name, train, test, *orders))
    return opened


def differing_settings(encoders: Sequence[Compared]) -> list[str]:
    """A note for each extraction setting in which the folders differ."""
    notes = []
    for name in _SETTINGS:
        values = {encoder.name: encoder.train.meta.get(name) for encoder in encoders}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{value} for {key}" for key, value in values.items())
            notes.append(f"the features differ in {name} ({said}), which affects the comparison")
    return notes


def _named(text: str) -> tuple[str | None, str]:
    """Split ``NAME=REST``; the name is None if there is none."""
    name, equals, rest = text.partition("=")
    if equals and _NAME.fullmatch(name) and not Path(text).exists():
        return name, rest
    return None, text


def _as_name(text: str) -> str:
    return "-".join(_NAME.findall(text)) or "encoder"


def _random(name: str | None, source: str) -> EncoderSpec:
    given = source.removeprefix(RANDOM).removeprefix(":")
    prefix = TIMM_PREFIX if given.startswith(TIMM_PREFIX) else ""
    arch, seed, *more = [*given.removeprefix(prefix).split(":"), "", ""]
    arch = prefix + arch
    if any(more) or (seed and not (seed.isascii() and seed.isdigit() and len(seed) < 19)):
        raise InputError(
            f"invalid encoder {source!r}", "--encoder", "random, random:ARCH or random:ARCH:SEED"
        )
    return EncoderSpec(name or _as_name(source), RANDOM, arch or None, int(seed or 0))


def _with_arch(spec: EncoderSpec, usual: str | None) -> EncoderSpec:
    arch = spec.arch or usual
    if not arch:
        raise InputError(
            "random weights need an architecture", "--encoder", "for example random:resnet50"
        )
    feature_dim(arch)  # raises if the architecture is unknown
    return dataclasses.replace(spec, arch=arch)


def _checkpoint(source: str) -> str:
    """A run's newest checkpoint, or the file as given: ``./moco-v2`` is one, ``moco-v2`` is not."""
    path = Path(source)
    if not path.exists():
        raise InputError("run folder or checkpoint not found", path)
    if not path.is_dir():
        return source
    if not (path / LAST).is_file():
        raise InputError(f"holds no {LAST}", path, "give a run folder or a checkpoint file")
    return str(path / LAST)


def _require_different(names: Sequence[str], option: str) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(
                f"two encoders are named {name!r}", option, f"rename one, such as {option} other=…"
            )


def _require_baselines(names: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            raise InputError(f"no encoder is named {name!r}", "--baseline", ", ".join(names))
    if len(names) > 1 and set(names) <= set(wanted):
        raise InputError("names all encoders", "--baseline", "leave one to compare with them")


def _order(first: Features, other: Features) -> NDArray[np.int64]:
    """(V,) the rows of ``other`` in the order of ``first``'s videos.

    Raises:
        InputError: the two differ in videos or labels.
    """
    places = {key: row for row, key in enumerate(other.keys)}
    common = sum(key in places for key in first.keys)
    if not len(first) == len(other) == common:
        raise InputError(
            f"holds {len(other)} videos, {first.folder} {len(first)}, and {common} are in both",
            other.folder,
            "extract all encoders from the same shards",
        )
    order = np.array([places[key] for key in first.keys], dtype=np.int64)
    if not np.array_equal(other.labels[order], first.labels):
        raise InputError(
            f"labels differ from those of {first.folder}",
            other.folder,
            "extract all encoders from the same shards",
        )
    return order


_NAMED = 3

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ComparedVideos:
    """Rows of the first encoder's folders; the other encoders' follow from their orders.

    Args:
        labelled: training and test rows; None if only measures without labels are possible.
        train_groups: (N,) groups of the training rows.
        test_groups: (M,) groups of the test rows.
        all_rows: (A,) rows of the test folder, in any split, for measures without labels.
        all_groups: (A,) their groups.
        kind: what the groups are, in words.
    """

    labelled: TrainTest | None
    train_groups: list[str]
    test_groups: list[str]
    all_rows: Rows
    all_groups: list[str]
    kind: str

    def of(self, encoder: Compared) -> TrainTest:
        """The labelled rows in the folders of ``encoder``."""
        assert self.labelled is not None
        return dataclasses.replace(
            self.labelled,
            train=encoder.train,
            train_rows=encoder.train_order[self.labelled.train_rows],
            test=encoder.test,
            test_rows=encoder.test_order[self.labelled.test_rows],
        )


def choose_videos(
    encoders: Sequence[Compared], config: CompareConfig, notes: list[str]
) -> ComparedVideos:
    """Select the videos whose features are finite for all encoders, by split.

    Args:
        notes: notes for the reader are appended.

    Raises:
        InputError: the split has no training or test rows.
    """
    first = encoders[0]
    apart = first.train is not first.test
    train = _finite([(e.train, e.train_order) for e in encoders])
    test = _finite([(e.test, e.test_order) for e in encoders]) if apart else train
    if left_out := int((~train).sum()) + (int((~test).sum()) if apart else 0):
        notes.append(f"{left_out} videos with non-finite features are left out for all encoders")
    labelled = _labelled(first, config, train, test, notes)
    train_groups, _ = video_groups(first.train)
    test_groups, kind = video_groups(first.test)
    all_rows = np.flatnonzero(test)
    return ComparedVideos(
        labelled=labelled,
        train_groups=[train_groups[row] for row in labelled.train_rows] if labelled else [],
        test_groups=[test_groups[row] for row in labelled.test_rows] if labelled else [],
        all_rows=all_rows,
        all_groups=[test_groups[row] for row in all_rows],
        kind=kind,
    )


def _labelled(
    first: Compared,
    config: CompareConfig,
    train_usable: NDArray[np.bool_],
    test_usable: NDArray[np.bool_],
    notes: list[str],
) -> TrainTest | None:
    train, test = first.train, first.test
    only = "only measures without labels are computed"
    if (train.labels == UNLABELLED).all() or (test.labels == UNLABELLED).all():
        notes.append(f"the videos have no labels: {only}")
        return None
    drawn = train is test and not train.splits
    if drawn:
        rows = held_out_split(train)
        notes.append(
            f"the videos have no splits: {TEST_SHARE:.0%} of each class are test videos, drawn by "
            f"{video_groups(train)[1]}"
        )
    else:
        rows = train_test(train, test, config.split, config.train_split, config.test_split)
    rows = dataclasses.replace(
        rows,
        train_rows=rows.train_rows[train_usable[rows.train_rows]],
        test_rows=rows.test_rows[test_usable[rows.test_rows]],
    )
    if not len(rows.test_rows) or len(np.unique(rows.train_labels)) < 2:
        notes.append(f"needs training videos of two classes, and test videos: {only}")
        return None
    notes += rows.notes()
    return rows


def _finite(folders: Sequence[tuple[Features, Rows]]) -> NDArray[np.bool_]:
    """(V,) whether a video's features are finite in all folders, in the first one's order."""
    usable = np.ones(len(folders[0][0]), dtype=bool)
    for features, order in folders:
        for array in (features.features, features.halves):
            finite = np.isfinite(array.reshape(len(array), -1))
            usable &= np.all(finite[order], axis=1)
    return usable


SCALINGS = ("none", "l2", "standard")
EPSILON = 1e-7  # Garrido et al. 2023, Eq. 1
_MOST_HOLD_OUTS = 5
_ENOUGH_HELD_OUT = 1000  # videos: standard error of at most 1.6 points

Rights = NDArray[np.bool_]  # (R, M) correct or not, for R draws and M test videos
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Labelled:
    """Draws of labelled training videos, each (n,) positions in the training rows."""

    percent: float
    draws: list[NDArray[np.int64]]

    @property
    def videos(self) -> int:
        """Labelled videos per draw, n."""
        return len(self.draws[0])

    @property
    def key(self) -> str:
        """The percentage as text."""
        return f"{self.percent:g}"


def draw_labelled(
    labels: NDArray[np.int64], percents: Sequence[float], repeats: int, seed: int
) -> list[Labelled]:
    """Draw each percentage of every class, at least one video per class.

    If several percentages give the same numbers of videos, the last is kept. 100 % is drawn once.
    """
    classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    found: dict[tuple[int, ...], Labelled] = {}
    for percent in percents:
        wanted = np.maximum(1, np.floor(counts * percent / 100 + 0.5).astype(np.int64))
        wanted = np.minimum(wanted, counts)
        every = bool((wanted == counts).all())
        draws = []
        for repeat in range(1 if every else repeats):
            rng = np.random.Generator(np.random.PCG64([seed, round(1000 * percent), repeat]))
            order = rng.permutation(len(labels))
            chosen = [
                order[place[order] == k][:n]
                for k, n in zip(range(len(classes)), wanted, strict=True)
            ]
            draws.append(np.sort(np.concatenate(chosen)))
        found.pop(tuple(wanted.tolist()), None)
        found[tuple(wanted.tolist())] = Labelled(percent, draws)
    return list(found.values())


@dataclass(frozen=True)
class SvmChoice:
    """The scaling and C chosen for one encoder's SVM.

    Args:
        c: the C chosen for each scaling.
        held_out: mean class accuracy of each scaling with that C on held-out training videos;
            empty if none could be held out.
        scaling: the best scaling.
    """

    c: dict[str, float]
    held_out: dict[str, float]
    scaling: str


class Classified:
    """Classifiers on the training and test rows of one encoder.

    Args:
        rows: the encoder's rows.
        values_of_c: candidates for the SVM's C.
        device: where products are computed.
        advance: called with the number of SVMs just fitted.
    """

    def __init__(
        self,
        rows: TrainTest,
        values_of_c: Sequence[float],
        device: torch.device,
        advance: Advance = lambda count: None,
    ) -> None:
        self._rows = rows
        self._values_of_c = list(values_of_c)
        self._device = device
        self._advance = advance
        self._train = FeatureMatrix(rows.train.features, rows.train_rows)
        self._test = FeatureMatrix(rows.test.features, rows.test_rows)
        self._labels = rows.train_labels
        # Means and deviations need no labels, so all training rows count, however few are labelled.
        self._scalings = {how: fit_scaling(self._train, how) for how in SCALINGS}
        self.not_converged = 0

    def choose(self, parts: Sequence[NDArray[np.bool_]]) -> SvmChoice:
        """Choose the scaling and C with the best mean class accuracy on held-out training videos.

        Mean over classes, since class frequencies may differ in the test videos: with few videos,
        an SVM with a small C may only prefer frequent classes. Ties go to the first: raw features
        and the smallest C. Test videos have no influence.

        Args:
            parts: the result of :func:`hold_outs`.
        """
        accuracy = {how: dict.fromkeys(self._values_of_c, 0.0) for how in SCALINGS}
        for outside in parts:
            inner, held = np.flatnonzero(~outside), np.flatnonzero(outside)
            for how in SCALINGS:
                scaling = fit_scaling(self._train.part(inner), how)
                test = self._train.part(held).scaled(scaling)
                for c in self._values_of_c:
                    svm = self._fit(inner, scaling, c)
                    right = _rights(svm, test, self._labels[held])
                    accuracy[how][c] += mean_over_classes(right, self._labels[held]) / len(parts)
        if not parts:
            middle = self._values_of_c[len(self._values_of_c) // 2]
            return SvmChoice(dict.fromkeys(SCALINGS, middle), {}, SCALINGS[0])
        chosen = {how: max(found, key=found.__getitem__) for how, found in accuracy.items()}
        best = {how: accuracy[how][c] for how, c in chosen.items()}
        return SvmChoice(chosen, best, max(SCALINGS, key=best.__getitem__))

    def fit_svms(self, labelled: Labelled, how: str, c: float) -> list[LinearSVM]:
        """Fit a linear SVM per draw, on features scaled ``how``."""
        return [self._fit(rows, self._scalings[how], c) for rows in labelled.draws]

    def svm(self, svms: Sequence[LinearSVM], how: str) -> Rights:
        """(R, M) whether the SVMs of :meth:`fit_svms`, on features scaled ``how``, are correct."""
        test = self._test.scaled(self._scalings[how])
        return np.stack([_rights(svm, test, self._rows.test_labels) for svm in svms])

    def knn(self, labelled: Labelled, neighbours: int, temperature: float) -> Rights:
        """(R, M) whether the vote of the nearest neighbours is correct."""
        found = []
        for rows in labelled.draws:
            labels = self._labels[rows]
            votes = knn_votes(
                self._train.part(rows), labels, self._test,
                neighbours=neighbours, temperature=temperature, device=self._device,
            )  # fmt: skip
            found.append(predictions_of(np.unique(labels), votes, self._rows.test_labels).right)
        return np.stack(found)

    def nearest(self, labelled: Labelled) -> Rights:
        """(R, M) R@1: whether the nearest labelled video is of the same class."""
        queries = unit_vectors(self._rows.test.features, self._rows.test_rows)
        found = []
        for rows in labelled.draws:
            gallery = unit_vectors(self._rows.train.features, self._rows.train_rows[rows])
            _, nearest = exact_index(gallery, self._device).search(queries, 1)
            found.append(self._labels[rows][nearest[:, 0]] == self._rows.test_labels)
        return np.stack(found)

    def _fit(self, rows: NDArray[np.int64], scaling: Scaling, c: float) -> LinearSVM:
        """Fit an SVM to some of the training rows."""
        train = self._train.part(rows).scaled(scaling)
        try:
            svm = fit_svm(train, self._labels[rows], c=c, device=self._device)
        except FeaturesTooLarge as error:
            raise InputError(
                "holds values too large for float32", self._rows.train.folder
            ) from error
        self.not_converged += not svm.converged.all()
        self._advance(1)
        return svm


def _rights(svm: LinearSVM, test: FeatureMatrix, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(M,) whether the SVM is correct."""
    scores = ((place, svm.scores(block)) for place, block in test.blocks())
    return predictions_of(svm.classes, scores, labels).right


def hold_outs(labels: NDArray[np.int64], groups: Sequence[str]) -> list[NDArray[np.bool_]]:
    """Masks that each hold out a fifth of the training videos, in whole groups; more if few videos.

    Empty if nothing can be held out or fewer than two classes would be left.
    """
    parts: list[NDArray[np.bool_]] = []
    for number in range(_MOST_HOLD_OUTS):
        # Renaming a group changes its digest and therefore its place in the order.
        outside = held_out(labels, [f"{number} {group}" for group in groups])
        if outside.any() and len(np.unique(labels[~outside])) > 1:
            parts.append(outside)
        if sum(int(part.sum()) for part in parts) >= _ENOUGH_HELD_OUT:
            break
    return parts


def exact_index(vectors: FeatureMatrix, device: torch.device) -> ExactIndex:
    """An exact index; on a GPU if torch uses one and faiss can."""
    return ExactIndex(vectors, "cpu" if device.type == "cpu" else "auto")


def mean_over_classes(right: NDArray[np.bool_], labels: NDArray[np.int64]) -> float:
    """Mean class accuracy over the classes in ``labels``; both arguments are (M,)."""
    _, rows, videos = np.unique(labels, return_inverse=True, return_counts=True)
    return float((np.bincount(rows, weights=right) / videos).mean())


def same_video(
    halves: NDArray[np.float32], rows: NDArray[np.int64], device: torch.device
) -> Rights:
    """(1, M) whether the second half nearest to each video's first half is its own.

    Args:
        halves: (V, 2, D).
        rows: (M,) the videos to use.
    """
    index = exact_index(unit_vectors(halves[:, 1], rows), device)
    _, nearest = index.search(unit_vectors(halves[:, 0], rows), 1)
    return np.asarray(nearest[:, 0] == np.arange(len(rows)))[None]


def effective_rank(
    features: NDArray[np.float32], rows: NDArray[np.int64], blocks: NDArray[np.int64]
) -> tuple[float, NDArray[np.float64]]:
    """RankMe: exp of the entropy of the normalised singular values (Garrido et al. 2023, Eq. 1).

    Args:
        features: (V, D).
        rows: (M,) the videos to use.
        blocks: (M,) their blocks, 0 … B-1.

    Returns:
        The effective rank of the (M, D) features, and each block's influence (B,) on it: its
        jackknife pseudo-value minus the mean. (A bootstrap would draw videos twice, and duplicates
        add nothing to a rank.)
    """
    count, dimension = len(rows), features.shape[1]
    number = int(blocks.max()) + 1
    places = [np.flatnonzero(blocks == block) for block in range(number)]
    without = np.empty(number)
    if count <= dimension:
        x = features[rows].astype(np.float64)
        gram = x @ x.T
        whole = _rank(gram)
        for block in range(number):
            kept = np.flatnonzero(blocks != block)
            without[block] = _rank(gram[np.ix_(kept, kept)])
    else:
        parts = (features[rows[place]].astype(np.float64) for place in places)
        gram = np.zeros((dimension, dimension))
        for part in parts:
            gram += part.T @ part
        whole = _rank(gram)
        for block, place in enumerate(places):
            part = features[rows[place]].astype(np.float64)
            without[block] = _rank(gram - part.T @ part)
    return whole, (number - 1) * (without.mean() - without)


def _rank(gram: NDArray[np.float64]) -> float:
    """Effective rank of a matrix whose squared singular values are the eigenvalues of ``gram``."""
    if not len(gram):
        return 0.0
    values = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0))
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total + EPSILON
    return float(np.exp(-(shares * np.log(shares)).sum()))


RESULT, PAGE, MAPS = "compare.json", "compare.html", "maps.png"
_RANK_BLOCKS = 64  # the jackknife computes the effective rank once without each block


def compare(config: CompareConfig, extraction: ExtractConfig, extract: Extract) -> CompareResult:
    """Extract missing features, measure every encoder, write the result, its page and its maps.

    Args:
        config: settings as given.
        extraction: settings for missing features.
        extract: extracts features; raises if it cannot.

    Raises:
        InputError: settings, shards, checkpoints or feature folders cannot be used.
    """
    check_compare(config)
    out = Path(config.out)
    require_writable(out)  # before anything slow
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
    (out / MAPS).unlink(missing_ok=True)  # left by an earlier comparison
    if maps is not None:
        with atomic_path(out / MAPS) as path:
            path.write_bytes(maps)
    write_text(out / PAGE, render_compare_page(result, maps))
    return result


def _baselines(encoders: Sequence[Compared], wanted: Sequence[str]) -> list[str]:
    """The names of the baselines; without any, the first of random weights or the last."""
    random = (e.name for e in encoders if e.train.encoder.get("checkpoint") == RANDOM)
    return list(dict.fromkeys(wanted)) or [next(random, encoders[-1].name)]


class _Comparison:
    """Computes the measures one by one, with their differences from the baselines."""

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
        # Keyed by (encoder, baseline).
        self._differences: dict[tuple[str, str], list[Difference]] = {
            (encoder.name, baseline): []
            for baseline in baselines
            for encoder in encoders
            if encoder.name not in baselines
        }
        self._svm: dict[str, dict[str, dict[str, Interval]]] = {}
        self._choices: dict[str, SvmChoice] = {}

    def run(self) -> CompareResult:
        """Compute all measures.

        Raises:
            InputError: there is nothing to measure, or features are too large for the SVM.
        """
        first, labelled = self._encoders[0], self._videos.labelled
        if len(self._videos.all_rows) < 2:
            raise InputError("has nothing to compare", first.test.folder, "two videos are needed")
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
        """Maps of the test videos (without labels: all videos) as a PNG, baselines first."""
        labelled = self._videos.labelled
        rows = shown_rows(
            labelled.test_rows if labelled else self._videos.all_rows, self._config.seed
        )
        if len(rows) < FEWEST_VIDEOS:
            self._notes.append(f"no maps: fewer than {FEWEST_VIDEOS} test videos")
            return None
        first = self._encoders[0].test
        ordered = sorted(self._encoders, key=lambda e: e.name not in self._baselines)
        try:
            maps = {
                e.name: place(e.test.features[e.test_order[rows]], self._config.seed)
                for e in ordered
            }
        except ImportError:
            self._notes.append("no maps: scikit-learn is not installed (pip install scikit-learn)")
            return None
        return draw(maps, [first.label_names[row] for row in rows])

    def _by_labels(self, labelled: TrainTest) -> None:
        """Compute SVM, kNN and R@1 with each percentage of the labels."""
        config, labels = self._config, labelled.train_labels
        bootstrap = GroupBootstrap(self._videos.test_groups, config.resamples, config.seed)
        amounts = draw_labelled(labels, fractions_of(config), config.repeats, config.seed)
        if lost := set(fractions_of(config)) - {amount.percent for amount in amounts}:
            shown = ", ".join(f"{percent:g} %" for percent in sorted(lost))
            self._notes.append(
                f"{shown} of the labels are left out: as many videos as the next percentage"
            )
        parts = hold_outs(labels, self._videos.train_groups)
        if not parts:
            self._notes.append(
                "no training videos can be held out: the SVM uses raw features and the middle C"
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
        """Compute same-video R@1 over all videos with two halves."""
        frames = np.stack([e.test.frames[e.test_order] for e in self._encoders])
        halved: NDArray[np.bool_] = np.all(frames >= 2, axis=0)[self._videos.all_rows]
        rows = self._videos.all_rows[halved]
        if len(rows) < 2:
            self._notes.append("no same-video R@1: videos of one frame have no halves")
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
                    f"effective ranks of features of width {widths[name]} and {widths[baseline]} "
                    "are not comparable"
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
        """Add a measure from outcomes (R, M) per encoder, and its differences."""
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
        """The encoder's provenance, for ``compare.json``."""
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
