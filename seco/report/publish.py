"""``seco publish``: a run's encoder and its model card as a folder, and on the Hugging Face Hub.

A run may come from others, and what is published is read by others still. Nothing outside the run's
folder, the named shards and the named results is read, and the folder appears whole: written under
another name and then moved, or, where one is replaced, file by file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from seco import __version__
from seco.checkpoints.deploy import Deployed, preprocessing, write_for_timm
from seco.checkpoints.exchange import export_checkpoint
from seco.checkpoints.io import FINETUNED, LAST, epochs_reached, load_checkpoint
from seco.checkpoints.weights import load_backbone
from seco.config import (
    PRESETS,
    ExportConfig,
    PretrainConfig,
    PublishConfig,
    resolve_pretrain,
)
from seco.models.backbones import RESNETS, TIMM, backbone_spec, feature_dim, tensors_sha256
from seco.models.siamfc import TRACKER
from seco.report.card import Model, PretrainedRun, TrainingData, of_encoder, render_card
from seco.report.results import RESULT_FILES, Found, read_results
from seco.training.loop import CONFIG
from shards.atomic import sync_folder, unwritable, write_json, write_text
from shards.errors import InputError
from shards.index import sha256_of
from shards.opening import open_stream
from shards.sampling import evenly_spaced
from shards.storage import UnreadableFrame
from shards.stream import IndexedStream
from shards.terminal import say
from shards.untrusted import convert, decode_json, read_regular, real_path

WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "config.json", "README.md"
RECORD = "seco.json"  # marks a folder as made by this command
FILES = (WEIGHTS, DESCRIPTION, RECORD, CARD)
_MAX_RECORD_BYTES = 1 << 20
_RECORDS_SAMPLED = 20  # videos whose records are asked for the dataset's name
_CROP_OF_EDGE = 0.875  # 224 / 256, as for extraction
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Published:
    """What was published: the folder, and its address on the Hub if it was uploaded."""

    folder: Path
    url: str | None = None


@dataclass(frozen=True)
class _Record:
    """``seco.json``: digests of the files as they were written."""

    files: dict[str, str]
    toolkit: str
    format_version: int = 1


def publish(config: PublishConfig) -> Published:
    """Write the folder, and upload it if ``config.push`` names a repository.

    Raises:
        InputError: the run, a result or the shards cannot be used; the folder holds other files, or
            cannot be written; the Hub refuses the upload. In the last case the folder is complete.
    """
    if config.license is not None and not _LICENSE.fullmatch(config.license):
        raise InputError(
            f"{config.license!r} is not an identifier of the Hub",
            "--license",
            "give one such as apache-2.0, cc-by-nc-4.0 or other",
        )
    if not config.private and config.push is None:
        raise InputError("has no effect without --push", "--public", "leave it out")
    out = real_path(config.out)
    replacing = _to_be_replaced(out)
    hub = _Hub(config.push, config.private) if config.push is not None else None
    folder = Path(config.run)
    checkpoint = _checkpoint(folder)
    before = _identity(checkpoint)
    found, files = _find_results(folder, config.results)
    run = _read_run(folder, checkpoint, config.name, found)
    data = None
    if config.shards:
        data, steps = _training_data(run, config.shards)
        total, epochs = steps * run.config.epochs, round(run.step / steps, 2)
        run = dataclasses.replace(run, total_steps=total, epochs=epochs)
    with _staged(out, replacing) as stage:
        model = write_model(checkpoint, stage, run.config.crop_size)
        if _identity(checkpoint) != before:
            raise InputError("has just been replaced", checkpoint, "wait until the run has ended")
        results, left = of_encoder(found, model.sha256)
        _require_named(left, files)
        card = render_card(
            model,
            run,
            data,
            results,
            license=config.license,
            data_license=config.data_license,
            repository=config.push,
        )
        write_text(stage / CARD, card)
        digests = {name: sha256_of(stage / name) for name in (WEIGHTS, DESCRIPTION, CARD)}
        write_json(stage / RECORD, dataclasses.asdict(_Record(digests, __version__)))
    if run.unfinished:
        say(f"seco publish: {folder}: the run has not ended, and the card says so")
    return Published(Path(config.out), hub.upload(out) if hub is not None else None)


def write_model(checkpoint: Path, folder: Path, crop_px: int) -> Model:
    """Write the encoder's weights and their description: the one place that knows their layout.

    torchvision's ResNets and timm's networks are described in timm's words, which
    ``timm.create_model`` and the ``AutoModel`` of transformers understand. The others can be built
    by this toolkit only.

    Args:
        checkpoint: of a run.
        folder: where the two files go.
        crop_px: side of the images it was trained on.

    Raises:
        InputError: the checkpoint cannot be used, or a file cannot be written.
    """
    weights = folder / WEIGHTS
    export_checkpoint(ExportConfig(file=str(checkpoint), format="safetensors", out=str(weights)))
    with safetensors.safe_open(weights, framework="pt") as opened:
        arch = opened.metadata()["arch"]
    spec = backbone_spec(arch)
    timm = spec.family in (RESNETS, TIMM)
    images = {
        "input_size": [3, crop_px, crop_px],
        "interpolation": "bilinear",
        "crop_pct": _CROP_OF_EDGE,
        "crop_mode": "center",
        "mean": spec.mean,
        "std": spec.std,
    }
    description: dict[str, Any] = {"architecture": arch, "num_classes": 0}
    description["num_features"] = feature_dim(arch)
    if spec.family == RESNETS:
        layers = {"num_classes": 0, "first_conv": "conv1", "classifier": "fc"}
        description["global_pool"] = "avg"
        description["pretrained_cfg"] = {"tag": "seco", "custom_load": False, **images, **layers}
    else:
        description |= {"library": "seco-video", "images": images}
    if spec.family == TIMM:
        write_for_timm(Deployed(load_backbone(checkpoint), preprocessing(arch, crop_px)), folder)
    else:
        write_json(folder / DESCRIPTION, description)
    return Model(
        arch=arch,
        width=feature_dim(arch),
        sha256=tensors_sha256(safetensors.torch.load_file(weights)),
        file_sha256=sha256_of(weights),
        file_bytes=weights.stat().st_size,
        crop_px=crop_px,
        mean=spec.mean,
        std=spec.std,
        timm=timm,
    )


def _checkpoint(folder: Path) -> Path:
    """The last checkpoint of a run.

    Raises:
        InputError: there is none, or it is a link that leads out of the folder.
    """
    advice = "give the folder of a `seco pretrain` run"
    if not folder.is_dir():
        raise InputError("is not a folder", folder, advice)
    path = folder / LAST
    if not os.path.lexists(path):
        if (folder / CONFIG).exists():
            raise InputError(
                f"has no {LAST}: the run has not saved a checkpoint yet",
                folder,
                "wait for it, or resume the run with --resume auto",
            )
        raise InputError(f"holds no run (no {LAST})", folder, advice)
    if real_path(folder) not in real_path(path).parents:
        raise InputError("is a link to a file outside of the run", path, "copy the file there")
    return path


def _read_run(folder: Path, checkpoint: Path, name: str | None, found: Found) -> PretrainedRun:
    content = load_checkpoint(checkpoint)
    for key, command in ((FINETUNED, "finetune"), (TRACKER, "track train")):
        if key in content:
            raise InputError(
                f"is of `seco {command}`, which is not published",
                checkpoint,
                f"publish the pre-training run, with --results {folder}/…",
            )
    if not {"optimizer", "videos", "step"} <= set(content):
        raise InputError("is not of `seco pretrain`", checkpoint, "give the folder of its run")
    config = convert(PretrainConfig, content["config"], checkpoint, "has unknown settings")
    _require_valid(config, checkpoint)
    total, epochs = None, epochs_reached(content)
    if content.get("steps_per_epoch"):
        total = config.epochs * int(content["steps_per_epoch"])
    log = next((run.log for run in found.runs if run.folder == folder), None)
    return PretrainedRun(
        name=name or real_path(folder).name,
        config=config,
        step=content["step"],
        total_steps=total,
        epochs=epochs,
        videos=content["videos"],
        unreadable=content.get("unreadable") or 0,
        log=log,
    )


def _require_valid(config: PretrainConfig, checkpoint: Path) -> None:
    try:
        if config.preset not in PRESETS:
            raise InputError(f"unknown preset {config.preset!r}")
        resolve_pretrain(config)
    except InputError as error:
        raise InputError(f"has settings that no run has ({error})", checkpoint) from error


def _training_data(run: PretrainedRun, specs: tuple[str, ...]) -> tuple[TrainingData, int]:
    """What the run was trained on, and the steps of an epoch.

    Raises:
        InputError: the shards cannot be read, or hold other videos than those of the run.
    """
    config = run.config
    if config.steps_per_epoch is not None:
        raise InputError(
            "the run streamed its shards, so its videos are not known", "--shards", "leave it out"
        )
    stream = open_stream(
        specs,
        config.batch_size,
        config.sampling or "uniform",
        config.seed,
        window_shards=config.window_shards,
        split=config.split,
        max_gap_seconds=config.max_gap_seconds,
        by_group=config.negatives == "other-groups",
    )
    if stream.digest() != run.videos or not isinstance(stream, IndexedStream):
        raise InputError(
            "these are not the videos that the run was trained on",
            "--shards",
            "give the shards that its config.toml names",
        )
    shards = stream.shards
    infos = shards.videos.infos
    lines = hashlib.sha256()
    for info in infos:
        lines.update(f"{info.sha256}  {info.file}\n".encode("utf-8", "surrogateescape"))
    sampled = shards.records(evenly_spaced(len(shards), _RECORDS_SAMPLED))
    names = [one.dataset for one in sampled if not isinstance(one, UnreadableFrame)]
    data = TrainingData(
        datasets=list(dict.fromkeys(filter(None, names))),
        shards=[(info.file, info.sha256, info.videos) for info in infos],
        sha256=lines.hexdigest(),
        size_bytes=shards.total_bytes,
        videos=len(shards),
        trained=len(stream.usable),
        frames=int(shards.frame_counts.sum()),
    )
    return data, stream.steps_per_epoch


def _find_results(folder: Path, named: tuple[str, ...]) -> tuple[Found, list[Path]]:
    """What lies in the run's folder and what is named, and the named files.

    Raises:
        InputError: something that is named does not exist or cannot be read.
    """
    folders, files = [folder], []
    for path in map(Path, named):
        if path.is_dir():
            folders.append(path)
        elif path.name in RESULT_FILES and path.exists():
            files.append(path)
        else:
            what = "is not a result" if path.exists() else "does not exist"
            raise InputError(what, path, f"give folders, or files named {', '.join(RESULT_FILES)}")
    found = read_results(list(dict.fromkeys(folders)), files)
    for item in found.unread:
        if item.path in files:
            raise InputError(item.reason, item.path)
        say(f"seco publish: {item.path}: cannot be read: {item.reason}")
    return found, files


def _require_named(left: list[tuple[Path, str]], files: list[Path]) -> None:
    """Report results that are left out; a file that was named must not be among them.

    Raises:
        InputError: it is.
    """
    for where, why in left:
        for file in files:
            if where in (file, file.parent):
                raise InputError(why, file, "leave it out, or publish the run of these weights")
        say(f"seco publish: left out: {where}: {why}")


def _identity(path: Path) -> tuple[int, int, int]:
    """Equal for a file as long as it is neither replaced nor written to."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _to_be_replaced(out: Path) -> bool:
    """Whether ``out`` is a folder of this command; false if it is empty or not there.

    Raises:
        InputError: it is anything else, or its card has been edited.
    """
    try:
        names = set(os.listdir(out)) if out.exists() else set()
    except OSError as error:
        raise unwritable(out, error) from error
    if not names:
        return False
    if RECORD not in names:
        raise InputError(
            "is not empty, and not of `seco publish`", out, "choose another --out, or empty it"
        )
    record = decode_json(
        _Record,
        read_regular(out / RECORD, _MAX_RECORD_BYTES),
        out / RECORD,
        "is not of `seco publish`",
        "choose another --out",
    )
    if CARD in names and sha256_of(out / CARD) != record.files.get(CARD):
        raise InputError(
            "was edited since it was written", out / CARD, "rename it to keep it, or delete it"
        )
    return True


@contextlib.contextmanager
def _staged(out: Path, replacing: bool) -> Iterator[Path]:
    """Yield a folder for the files, which are moved to ``out`` if no exception ends the block."""
    beside = out if replacing else out.parent
    stage = beside / f"{out.name}.{secrets.token_hex(4)}.part"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        yield stage
        if replacing:
            # If this is interrupted, no card describes other weights, or seems edited.
            (out / CARD).unlink(missing_ok=True)
            for name in FILES:
                os.replace(stage / name, out / name)
        else:
            os.rename(stage, out)  # onto nothing, or onto an empty folder
        sync_folder(beside)
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


class _Hub:
    """A repository of the Hugging Face Hub; what can be known is checked before any work.

    Args:
        repository: OWNER/NAME.
        private: visibility, of a new repository and as an existing one must have it.

    Raises:
        InputError: the name is none, or the package or a token is missing.
    """

    def __init__(self, repository: str, private: bool) -> None:
        if not _REPOSITORY.fullmatch(repository):
            raise InputError(
                f"{repository!r} is not OWNER/NAME", "--push", "give a name such as me/seco-k400"
            )
        try:
            import huggingface_hub
        except ImportError as error:
            raise InputError(
                "huggingface_hub is not installed", "--push", 'pip install "seco-video[hub]"'
            ) from error
        if not huggingface_hub.get_token():
            raise InputError(
                "no token of the Hugging Face Hub was found",
                "--push",
                "log in with `hf auth login`, or set HF_TOKEN",
            )
        self._repository, self._private = repository, private
        self._api = huggingface_hub.HfApi(library_name="seco-video", library_version=__version__)
        self._file = huggingface_hub.CommitOperationAdd

    def upload(self, folder: Path) -> str:
        """Upload the files of this command as one commit; return the repository's address.

        Raises:
            InputError: the Hub cannot be reached or refuses it, or the repository exists with the
                other visibility.
        """
        try:
            made = self._api.create_repo(self._repository, private=self._private, exist_ok=True)
            if bool(self._api.repo_info(self._repository).private) != self._private:
                has, wanted = ("public", "--public") if self._private else ("private", "--private")
                raise InputError(f"exists and is {has}", self._repository, f"give {wanted}")
            self._api.create_commit(
                self._repository,
                [self._file(name, str(folder / name)) for name in FILES],
                commit_message=f"SeCo toolkit {__version__}: seco publish",
            )
        except InputError:
            raise
        except Exception as error:  # of the network, of the Hub, of three upload protocols
            raise InputError(
                self._reason(error),
                f"--push {self._repository}",
                f"{folder} is complete; run the command again to upload it",
            ) from error
        return str(made)

    def _reason(self, error: Exception) -> str:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status == 401:
            return "the Hub refuses the token (401)"
        if status == 403:
            return "the token may not write there (403)"
        text = str(getattr(error, "server_message", None) or error).partition("\n")[0][:200]
        if status is not None:
            return f"the Hub answered {status}: {text}"
        return f"the upload failed ({type(error).__name__}: {text})"
