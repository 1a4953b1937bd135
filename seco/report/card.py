"""The model card of a published run: what is known of its data, recipe, results and limits.

Nothing in a card is taken on trust from where it came: values are text of bounded length, paths of
this machine are left out, and results count only if they name the very weights that are published.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from markupsafe import Markup

from seco import __version__
from seco.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PretrainConfig,
    optimizer_of,
    resolve_pretrain,
    task_list,
)
from seco.models.backbones import PLUGINS, RESNETS, TORCHVISION, backbone_spec
from seco.pages import render_markdown
from seco.report.report import EvaluationRow, FeatureRow, report_content
from seco.report.results import Comparison, Found, words
from seco.report.tables import NOT_COMPARABLE, TRAIN_VIDEOS
from seco.text import percent
from seco.training.logging import LoggedRun
from shards.progress import size_text
from shards.settings import as_settings, resumable_settings
from shards.terminal import printable

_LONGEST_TEXT = 300  # characters of a value
_MOST_ROWS = 60  # of a table
_MOST_COLUMNS = 8  # encoders of a comparison
_MOST_NOTES = 5  # of a result
_MOST_METRICS = 20
_SHARDS_LISTED = 12
_COLLAPSED = 0.1  # feature std; 1 for embeddings spread evenly over the sphere
_MAIN = (
    *("tasks", "epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "queue_size"),
    *("temperature", "ema", "crop_size", "precision", "split", "seed"),
)
_OF_FINETUNING = ("epochs", "segments", "batch_size", "lr", "freeze_bn")
_OF_TRACKING = ("epochs", "feature_layer", "raw_features", "scales")

PAPER = """\
@inproceedings{yao2021seco,
  title     = {{SeCo}: Exploring Sequence Supervision for Unsupervised Representation Learning},
  author    = {Yao, Ting and Zhang, Yiheng and Qiu, Zhaofan and Pan, Yingwei and Mei, Tao},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2021}
}"""
TOOLKIT = f"""\
@software{{seco_toolkit,
  title   = {{{{SeCo}} toolkit}},
  author  = {{{{The SeCo toolkit maintainers}}}},
  version = {{{__version__}}},
  license = {{Apache-2.0}}
}}"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The published files of the encoder.

    Args:
        arch: name of the backbone.
        width: C, numbers per feature.
        sha256: digest of the tensors, which results name.
        file_sha256: digest of the weights' file.
        file_bytes: its size.
        crop_px: side of the images it was trained on.
        mean, std: of RGB values between 0 and 1, with which images are normalised.
        timm: whether timm and transformers load it.
    """

    arch: str
    width: int
    sha256: str
    file_sha256: str
    file_bytes: int
    crop_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    timm: bool


@dataclass(frozen=True, kw_only=True)
class PretrainedRun:
    """A run of ``seco pretrain``, as its last checkpoint and its log say.

    Args:
        name: of the model.
        config: resolved settings.
        step: steps done.
        total_steps: steps of the whole run; None if unknown.
        epochs: epochs done; None if unknown.
        videos: digest of the training videos.
        unreadable: samples that others replaced.
        log: the last values of its log; None if it has none.
    """

    name: str
    config: PretrainConfig
    step: int
    total_steps: int | None
    epochs: float | None
    videos: str
    unreadable: int
    log: LoggedRun | None

    @property
    def unfinished(self) -> bool:
        """Whether it is known that training did not reach its end."""
        if self.total_steps is not None:
            return self.step < self.total_steps
        return self.epochs is not None and self.epochs < self.config.epochs


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The shards of a run; they hold the videos that it recorded.

    Args:
        datasets: names, of a sample of the videos.
        shards: (file, SHA-256, videos) of each.
        sha256: of the lines that ``sha256sum`` prints for the shards.
        size_bytes: of all shards.
        videos: in the shards.
        trained: of these, those that the run trained on.
        frames: stored frames of all videos.
    """

    datasets: list[str]
    shards: list[tuple[str, str, int]]
    sha256: str
    size_bytes: int
    videos: int
    trained: int
    frames: int


@dataclass(frozen=True)
class ResultRow:
    """A result: what was measured on what, how, and the metrics."""

    task: str
    dataset: str
    protocol: str
    metrics: str


def of_encoder(found: Found, sha256: str) -> tuple[Found, list[tuple[Path, str]]]:
    """The results of the encoder with this digest; which others are left out, and why.

    Features are named by their folder, other results by their file.
    """
    kept = Found()
    left: list[tuple[Path, str]] = []

    def is_ours(where: Path, named: Sequence[Any]) -> bool:
        if sha256 not in named:
            why = "was measured with other weights" if any(named) else "does not name its weights"
            left.append((where, why))
        return sha256 in named

    for item in found.features:
        if is_ours(item.folder, [item.encoder.get("sha256")]):
            stale = item.retrieval and item.retrieval.encoder.get("sha256", sha256) != sha256
            kept.features.append(dataclasses.replace(item, retrieval=None) if stale else item)
    for folder, evaluation in found.evaluations:
        where = folder / f"{evaluation.kind}.json"
        if is_ours(where, [evaluation.encoder.get("sha256")]):
            kept.evaluations.append((folder, evaluation))
    for folder, comparison in found.comparisons:
        if is_ours(folder / "compare.json", list(comparison.sha256.values())):
            kept.comparisons.append((folder, comparison))
    return kept, left


def render_card(
    model: Model,
    run: PretrainedRun,
    data: TrainingData | None,
    results: Found,
    *,
    license: str | None,
    data_license: str | None,
    repository: str | None,
) -> str:
    """Return the card as Markdown with the Hub's front matter.

    Args:
        data: None if the shards are not known.
        results: of this encoder only, from :func:`of_encoder`.
        license: of the weights, an identifier of the Hub.
        data_license: of the training data, in words.
        repository: of the Hub, where the files are to lie; a checked name.
    """
    content = report_content(results)
    rows = _result_rows(content.features, content.evaluations)
    return render_markdown(
        "model_card.md.j2",
        front_matter=Markup(front_matter(model, license)),
        videos=_text(run.videos),
        model=model,
        run=run,
        name=_text(run.name),
        tasks=", ".join(task_list(run.config)),
        size=size_text(model.file_bytes),
        license=license,
        data=data,
        data_license=_text(data_license) if data_license else None,
        data_size=size_text(data.size_bytes) if data else None,
        datasets=", ".join(_text(name) for name in data.datasets[:_MOST_ROWS]) if data else "",
        shards=[tuple(map(_text, row)) for row in data.shards[:_SHARDS_LISTED]] if data else [],
        split=_text(run.config.split) if run.config.split else None,
        init=_text(_file_name(run.config.init)) if run.config.init else None,
        main=main_settings(run.config),
        changed=Markup(tomli_w.dumps(changed_settings(run.config)).rstrip()),
        progress=_progress(run),
        last=_last_logged(run.log),
        results=rows[:_MOST_ROWS],
        comparisons=[_comparison(one, model.sha256) for _, one in content.comparisons[:_MOST_ROWS]],
        limits=limits(run, data, bool(rows or content.comparisons), license, data_license),
        snippets=[(title, Markup(code)) for title, code in loading_code(model, repository)],
        citations=[Markup(PAPER), Markup(TOOLKIT)],
        version=__version__,
    )


def front_matter(model: Model, license: str | None) -> str:
    """Metadata of the Hub as YAML; texts are in JSON's quotes, which YAML reads as they are."""
    said: dict[str, str | list[str]] = {} if license is None else {"license": license}
    if model.timm:
        said["library_name"] = "timm"
    said["pipeline_tag"] = "image-feature-extraction"
    said["tags"] = [
        *("seco", "self-supervised-learning", "contrastive-learning", "video", model.arch),
    ]
    lines = [
        f"{name}: {json.dumps(value)}"
        if isinstance(value, str)
        else "\n".join([f"{name}:", *(f"- {json.dumps(one)}" for one in value)])
        for name, value in said.items()
    ]
    return "\n".join(["---", *lines, "---"])


def loading_code(model: Model, repository: str | None) -> list[tuple[str, str]]:
    """(title, Python code) of each way to load the published files."""
    found = []
    if model.timm:
        timm_name = f"hf-hub:{repository}" if repository else "local-dir:."
        found += [
            (
                "With timm",
                f'import timm\n\nmodel = timm.create_model("{timm_name}", pretrained=True).eval()',
            ),
            (
                "With transformers, which uses timm",
                "from transformers import AutoModel\n\n"
                f'model = AutoModel.from_pretrained("{repository or "."}").eval()',
            ),
        ]
    spec = backbone_spec(model.arch)
    # torchvision's ViTs take images of one size.
    takes_them = not model.arch.startswith("vit_") or model.crop_px == spec.size
    if spec.family in (RESNETS, TORCHVISION) and takes_them:
        first, *others = spec.classifier[0].rstrip(".").split(".")
        head = first + "".join(f"[{name}]" for name in others)
        found.append(
            (
                "With torchvision",
                "import torch\nimport torchvision\nfrom safetensors.torch import load_file\n\n"
                f"model = torchvision.models.{model.arch}()\n"
                f"model.{head} = torch.nn.Identity()\n"
                'model.load_state_dict(load_file("model.safetensors"))\nmodel.eval()',
            )
        )
    toolkit = 'import seco\n\nmodel = seco.load_backbone("model.safetensors")'
    title = "With the toolkit"
    if (model.mean, model.std) != (IMAGENET_MEAN, IMAGENET_STD):
        mean, std = (", ".join(map(str, values)) for values in (IMAGENET_MEAN, IMAGENET_STD))
        title += f", whose input is minus ({mean}) and divided by ({std}) instead"
    if spec.family == PLUGINS:
        title += ", and the package that adds this backbone to it"
    return [*found, (title, toolkit)]


def main_settings(config: PretrainConfig) -> list[tuple[str, str]]:
    """The settings that every reader asks for, as (name, value)."""
    settings = {**as_settings(config), "optimizer": optimizer_of(config)}
    return [(n.replace("_", " "), _text(settings[n])) for n in _MAIN if n in settings]


def changed_settings(config: PretrainConfig) -> dict[str, Any]:
    """All settings that can change a result and are not the defaults, which are the paper's."""
    default = as_settings(resolve_pretrain(PretrainConfig(preset=config.preset)))
    may_differ = resumable_settings(config) - {"preset"}
    default["preset"] = PretrainConfig().preset
    return {
        name: _text(value) if isinstance(value, str) else value
        for name, value in as_settings(config).items()
        # 0 shards as a window is how a run records that it has none.
        if name not in may_differ
        and value != default.get(name)
        and not (name == "window_shards" and value == 0)
    }


def limits(
    run: PretrainedRun,
    data: TrainingData | None,
    evaluated: bool,
    license: str | None,
    data_license: str | None,
) -> list[str]:
    """What a user of the model has to know, in sentences."""
    said = []
    if run.unfinished:
        said.append("Training was not finished: these are the weights of an intermediate step.")
    epochs, full = run.config.epochs, PretrainConfig().epochs
    if epochs < full:
        said.append(f"The run is {epochs:,} of the paper's {full:,} epochs long.")
    whole = TRAIN_VIDEOS["kinetics400"]
    if data is None:
        said.append("The number of training videos is not recorded here.")
    elif data.trained < whole:
        said.append(f"It was trained on {data.trained:,} videos; the paper's was on {whole:,}.")
    std = run.log.curves.get("feature_std") if run.log else None
    if std is not None and std.last < _COLLAPSED:
        said.append(
            f"The embeddings had collapsed at the end of the log (feature std {std.last:.3f}; 1 is "
            "that of embeddings spread evenly)."
        )
    if run.unreadable:
        said.append(f"{run.unreadable:,} samples could not be read and were replaced by others.")
    if not evaluated:
        said.append("No result of this model is known: it has not been evaluated.")
    else:
        said.append(
            "A result without an interval is one measurement; differences of a few points between "
            "such results can be chance."
        )
        said.append(NOT_COMPARABLE)
    if run.config.split is None:
        said.append(
            "It was trained on all videos of its shards. Results on videos of the same dataset are "
            "of videos that were seen in training, without their labels, unless the shards held "
            "training videos only."
        )
    said.append(
        "It describes single RGB images: motion enters only through what training made it see. It "
        "reflects what its training videos show and leave out, and has not been tested for biases."
    )
    if license is None:
        said.append("No licence of the weights is stated. Ask their authors before you use them.")
    if data_license is None:
        said.append("The licence of the training data is not recorded here.")
    return said


def _progress(run: PretrainedRun) -> str:
    of_steps = f" of {run.total_steps:,}" if run.total_steps is not None else ""
    said = f"step {run.step:,}{of_steps}"
    return said if run.epochs is None else f"{said}, {run.epochs:g} of {run.config.epochs:,} epochs"


def _last_logged(log: LoggedRun | None) -> str:
    if log is None:
        return ""
    shown = [(n, c.last) for n, c in log.curves.items() if n not in ("epoch", "lr", "unreadable")]
    values = ", ".join(f"{_text(name)} {value:.4g}" for name, value in shown[:_MOST_METRICS])
    return f"at step {log.last_step:,g}: {values}" if values else ""


def _result_rows(
    features: Sequence[FeatureRow], evaluations: Sequence[EvaluationRow]
) -> list[ResultRow]:
    rows = []
    for item in features:
        dataset = _text(item.dataset or "unknown")
        if item.probe is not None:
            rows.append(_probe_row(item, dataset))
        if item.retrieval is not None:
            found = item.retrieval
            protocol = [f"split {_text(found.split)}"] if found.split else []
            protocol.append(f"{_count(found.queries)} queries in {_count(found.gallery)} videos")
            protocol += [item.extraction, *found.notes[:_MOST_NOTES]]
            recalls = [f"R@{k} {percent(value)}" for k, value in found.label.items()]
            recalls += [f"same video R@{k} {percent(v)}" for k, v in found.same_video.items()]
            row = ("retrieval", dataset, _joined(protocol), _joined(recalls[:_MOST_METRICS]))
            rows.append(ResultRow(*row))
    for one in evaluations:
        tuned = one.item.kind == "finetune"
        names = _OF_FINETUNING if tuned else _OF_TRACKING
        settings = one.item.settings
        split = [f"split {_text(one.item.split)}"] if one.item.split else []
        trained = [f"{one.item.n_train:,} training videos"] if one.item.n_train is not None else []
        stated = [f"{n.replace('_', ' ')} {_text(settings[n])}" for n in names if n in settings]
        protocol = [*split, *trained, *one.facts, *stated, *one.item.notes[:_MOST_NOTES]]
        metrics = [f"{name} {percent(value)}" for name, value in one.figures]
        task = "fine-tuning" if tuned else "tracking with SiamFC"
        dataset = _text(one.item.dataset or "unknown")
        rows.append(ResultRow(task, dataset, _joined(protocol), _joined(metrics)))
    return list(dict.fromkeys(rows))  # a result may have been named twice


def _probe_row(item: FeatureRow, dataset: str) -> ResultRow:
    probe = item.probe
    assert probe is not None
    classifier = {"svm": "linear SVM", "knn": "kNN", "linear": "linear layer"}
    protocol = [classifier.get(probe.method.lower(), probe.method or "unknown classifier")]
    protocol += [f"C = {probe.c:g}"] if probe.c is not None else []
    protocol += [f"tolerance {probe.tolerance:g}"] if probe.tolerance is not None else []
    protocol += [f"features scaled: {probe.normalise}"] if probe.normalise else []
    protocol += [f"split {probe.split}"] if probe.split else []
    protocol.append(f"{_count(probe.n_train)} training and {_count(probe.n_test)} test videos")
    protocol += [item.extraction, *probe.notes[:_MOST_NOTES]]
    found = (("top-1", probe.top1), ("top-5", probe.top5), ("mean class", probe.mean_class))
    metrics = [f"{name} {percent(value)}" for name, value in found if value is not None]
    return ResultRow("frozen features", dataset, _joined(protocol), _joined(metrics))


def _comparison(found: Comparison, sha256: str) -> dict[str, Any]:
    names = found.encoders[:_MOST_COLUMNS]
    return {
        "dataset": _text(found.dataset or "an unknown dataset"),
        "splits": f"trained on {_text(found.train_split)}, tested on {_text(found.test_split)}"
        if found.train_split
        else "",
        "groups": _text(found.groups),
        "encoders": [
            f"{_text(name)}{' (this model)' if found.sha256.get(name) == sha256 else ''}"
            for name in names
        ],
        "rows": [
            (_text(title), [_text(values.get(name, "–")) for name in names])
            for title, values in found.rows[:_MOST_ROWS]
        ],
        "sentences": [_text(sentence) for sentence in found.sentences[:_MOST_COLUMNS]],
    }


def _text(value: Any) -> str:
    """A value as one line of text of bounded length."""
    text = words(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"


def _joined(parts: Sequence[str]) -> str:
    return ", ".join(_text(part) for part in parts if part) or "not recorded"


def _count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


def _file_name(path: str | None) -> str:
    """The last part of a path: the others are of the machine it lay on."""
    return printable(path or "").rstrip("/").rpartition("/")[2]
