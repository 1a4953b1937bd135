"""The ``seco`` command: parse options, build settings, call the API. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from pipelines._config import PrepareConfig
from seco import __version__
from seco.config import (
    EXTRACTION,
    BuildConfig,
    CompareConfig,
    DemoConfig,
    DuplicatesConfig,
    EvaluateConfig,
    ExportConfig,
    ExtractConfig,
    FinetuneConfig,
    FinetuneTestConfig,
    ImportConfig,
    PretrainConfig,
    ProbeConfig,
    PublishConfig,
    QueryConfig,
    TrackEvalConfig,
    TrackRunConfig,
    TrackTrainConfig,
)
from shards.errors import (
    EXIT_FAILED,
    EXIT_PEER_LOST,
    EXIT_STOPPED,
    EXIT_TOO_MANY_EXCLUDED,
    InputError,
    PeerLost,
    Stopped,
    TooManyExcluded,
)
from shards.settings import own_first
from shards.signals import STOPPING, interrupt, interrupt_no_more, not_lost
from shards.terminal import say, show, show_everywhere
from shards.untrusted import SANDBOX_VARIABLE, read_regular, real_path, set_max_pixels


class _Finite(click.types.FloatParamType):
    """Option type for finite floats; NaN would pass every range check."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class _Whole(click.types.IntParamType):
    """Option type for 64-bit integers of ``least`` or more."""

    def __init__(self, least: int = -(2**63)) -> None:
        self._least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        number = super().convert(value, param, ctx)
        if not self._least <= number < 2**63:
            self.fail(f"{value} is not in the range {self._least} to {2**63 - 1}.", param, ctx)
        return number


_TYPES = {"int": _Whole(), "float": _Finite(), "str": click.STRING}
_FILE = click.Path(dir_okay=False, path_type=Path)
_Command = TypeVar("_Command", bound=Callable[..., Any])


def settings_options(
    config: type,
    required: Sequence[str] = (),
    arguments: Sequence[str] = (),
    only: Sequence[str] = (),
    config_file: bool = True,
) -> Callable[[_Command], _Command]:
    """Return a decorator that adds an option per field, and ``--config`` to read them from TOML.

    Args:
        config: a settings dataclass.
        required: fields whose options are required.
        arguments: fields without an option, because the command has an argument of that name.
        only: the fields to make options of; empty for all.
        config_file: whether to add ``--config``; false for the second dataclass of a command.
    """

    def decorate(command: _Command) -> _Command:
        for field in reversed(own_first(config)):
            left_out = field.name in arguments or bool(only and field.name not in only)
            if not field.metadata.get("hidden") and not left_out:
                command = _option(field, field.name in required)(command)
        if not config_file:
            return command
        read_config = click.option(
            "--config",
            type=click.Path(dir_okay=False),
            callback=_read_config,
            is_eager=True,
            expose_value=False,
            help="TOML file with these options, for example the config.toml of a run.",
        )
        return read_config(command)

    return decorate


def _option(field: dataclasses.Field[Any], required: bool) -> Callable[[_Command], _Command]:
    meta = field.metadata
    base = str(field.type).removesuffix(" | None")
    flag = "--" + field.name.replace("_", "-")
    source = f" ({meta['source']})" if meta.get("source") else ""
    arguments: dict[str, Any] = {
        "help": f"{meta['help']}{source}.",
        "default": field.default,
        "show_default": field.default not in (None, (), "", False),
    }
    if base == "bool":
        arguments |= {"is_flag": True}
        if base != str(field.type):  # None, the third value: depends on the device
            flag += "/--no-" + flag.removeprefix("--")
    elif base.startswith("tuple"):
        arguments |= {"multiple": True, "metavar": "SPEC"}
    elif field.name == "seed":
        arguments["type"] = _Whole(0)  # random generators reject negative seeds
    else:
        arguments["type"] = click.Choice(meta["choices"]) if meta.get("choices") else _TYPES[base]
    if required:
        # An explicit default, even None, would count as a given value.
        arguments |= {"required": True}
        del arguments["default"], arguments["show_default"]
    other = [meta["flag"]] if meta.get("flag") else []
    names = [*([] if "/" in "".join(other) else [flag]), *other, field.name]
    return click.option(*dict.fromkeys(names), **arguments)


def _read_config(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        settings = tomllib.loads(read_regular(value).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"is not TOML ({error})", value) from error
    known = {p.name: p for p in context.command.params}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise InputError(f"unknown option {unknown[0]!r}", value, "see --help for the names")
    for name, given in settings.items():
        kind, several = known[name].type, getattr(known[name], "multiple", False)
        values = given if several and isinstance(given, list) else [given]
        if not all(isinstance(one, (str, int, float)) for one in values):
            raise InputError(f"{name} is not a plain value", value)
        if isinstance(kind, click.types.BoolParamType) and not isinstance(given, bool):
            raise InputError(f"{name} is {given!r}, not true or false", value)
        if isinstance(kind, _Whole) and isinstance(given, float):
            raise InputError(f"{name} is {given}, not a whole number", value)
    context.default_map = {**(context.default_map or {}), **settings}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="seco")
@click.option(
    "--max-pixels",
    type=_Whole(1),
    default=None,
    help="Larger pictures and video frames are not decoded [default: 64 million].",
)
@click.option(
    "--sandbox",
    is_flag=True,
    help="Decode videos in a sandbox without network or other files (Linux, bubblewrap).",
)
def seco(max_pixels: int | None, sandbox: bool) -> None:
    """Learn visual representations from unlabelled video (SeCo, AAAI 2021).

    \b
    seco prepare ucf101 --src raw/
    seco pretrain --shards "shards/ucf101-{000..055}.tar"
    seco extract-features --shards shards/ucf101.json --checkpoint runs/ucf101/last.pt
    seco probe --features features/ucf101
    """
    if max_pixels is not None:
        set_max_pixels(max_pixels)
    if sandbox:
        os.environ[SANDBOX_VARIABLE] = "1"  # also for the processes started from here


@seco.command()
@click.argument("dataset")
@settings_options(PrepareConfig, required=("src",), arguments=("dataset",))
def prepare(**settings: Any) -> None:
    """Decode the videos of DATASET into shards.

    DATASET is kinetics, activitynet, ucf101, hmdb51, got10k or otb100, or for your own data folder
    (any tree of videos), list, frames, wds or images.

    \b
    Example: seco prepare kinetics --src raw/ --out shards/
    """
    from pipelines._prepare import prepare as run

    run(PrepareConfig(**settings))


@seco.command()
@click.argument("shards", metavar="SHARDS...", nargs=-1, required=True)
@click.option(
    "--workers", type=int, default=None, help="Shards read in parallel [default: number of CPUs]."
)
def verify(shards: tuple[str, ...], workers: int | None) -> None:
    """Check shards: checksums, frames, counts and indexes.

    SHARDS are manifests, folders or patterns.

    \b
    Example: seco verify shards/k400.json
    """
    from shards.verify import verify as run

    found = run(shards, workers)
    show(found.table())
    if found.faults:
        raise InputError(f"faults found: {len(found.faults)}", " ".join(shards))


@seco.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Also replace existing indexes.")
def index(shards: tuple[str, ...], force: bool) -> None:
    """Write the missing indexes of SHARDS.

    SHARDS may be any WebDataset tars.

    \b
    Example: seco index "foreign/*.tar"
    """
    from shards.verify import reindex

    show(reindex(shards, force))


@seco.command()
@settings_options(PretrainConfig, required=("shards",))
@click.pass_context
def pretrain(context: click.Context, /, **settings: Any) -> None:
    """Pre-train an encoder on shards.

    \b
    Example: seco pretrain --shards "shards/k400-{000..999}.tar" --out runs/k400
    """
    written = (context.default_map or {}).get("preset", settings["preset"])
    if written != settings["preset"]:
        raise InputError(
            f"is {settings['preset']}, but the --config file sets all options of preset {written}",
            "--preset",
            "leave one of them out",
        )
    from seco.config import resolve_pretrain
    from seco.processes.launch import launch

    again = "resume with the same command and --resume auto"
    if code := launch(PretrainConfig(**settings), pretrain_here, resolve_pretrain, again=again):
        raise click.exceptions.Exit(code)


def pretrain_here(config: PretrainConfig) -> int:
    """Pre-train on one rank and return the exit code; rank 0 prints the checkpoint's path."""

    def work() -> None:
        from seco.api import pretrain as run

        done = run(config)
        if os.environ.get("RANK", "0") == "0":
            show(done.checkpoint)

    return exit_code(work)


@seco.command("extract-features")
@settings_options(ExtractConfig, required=("shards", "checkpoint"))
def extract_features(**settings: Any) -> None:
    """Write one frozen feature per video.

    \b
    Example: seco extract-features --shards shards/k400-val.json \\
               --checkpoint runs/k400/last.pt --out features/k400-val
    """
    from seco.config import check_extract

    config = ExtractConfig(**settings)
    check_extract(config)
    if config.engine == "ray":
        from seco.features.ray_engine import extract_on_cluster

        show(extract_on_cluster(config))
        return
    from seco.processes.launch import launch

    if code := launch(config, extract_here):
        raise click.exceptions.Exit(code)


def extract_here(config: ExtractConfig, announce: bool = True) -> int:
    """Extract features on one rank and return the exit code; rank 0 prints the feature folder."""

    def work() -> None:
        from seco.features.extract import extract_features as run

        folder = run(config)
        if announce and os.environ.get("RANK", "0") == "0":
            show(folder)

    return exit_code(work)


@seco.command()
@settings_options(CompareConfig)
@settings_options(ExtractConfig, only=EXTRACTION, config_file=False)
def compare(**settings: Any) -> None:
    """Compare encoders on one dataset.

    Prints 95 % intervals and verdicts. Missing features are extracted into --out; finished ones are
    reused. The options from --arch on are those of extract-features; --arch is of encoders that do
    not tell it, and random without it is of the first other encoder's.

    \b
    Example: seco compare --shards shards/mine.json --encoder runs/mine --encoder random
    Example: seco compare --features features/a --features features/b
    """
    from seco.evaluation.compare import compare as run
    from seco.processes.launch import launch

    extraction = ExtractConfig(**{name: settings.pop(name) for name in EXTRACTION})

    def extract(config: ExtractConfig) -> None:
        if code := launch(config, partial(extract_here, announce=False)):
            raise click.exceptions.Exit(code)

    show(run(CompareConfig(**settings), extraction, extract).table())


@seco.command("import")
@click.argument("file")
@settings_options(ImportConfig, required=("out",), arguments=("file",))
def import_(**settings: Any) -> None:
    """Convert FILE to a checkpoint of this toolkit.

    FILE is a checkpoint of MoCo v1 or v2 or of SeCo's authors, or a state dict (.pth or
    safetensors; those of timm and of plug-ins need --arch), or a name: imagenet-v1:ARCH,
    imagenet-v2:ARCH, moco-v2, vclr. All tensor names must match. --init and --checkpoint also read
    such files and names directly.

    \b
    Example: seco import moco_v2_200ep_pretrain.pth.tar --out moco.pt
    """
    from seco.checkpoints.exchange import import_checkpoint

    show(import_checkpoint(ImportConfig(**settings)))


@seco.command("export")
@click.argument("file")
@settings_options(ExportConfig, required=("format", "out"), arguments=("file",))
def export(**settings: Any) -> None:
    """Convert checkpoint FILE to another layout.

    torchvision and safetensors hold the query backbone. moco (v2) and seco-authors also hold the
    heads, the key encoder and the queue; they support only torchvision's ResNets.

    onnx, torch-export and huggingface (a folder for timm and transformers) run without this
    toolkit: images (N, 3, --size, --size) to features (N, C).

    \b
    Example: seco export runs/k400/last.pt --format torchvision --out k400-resnet50.pth
    Example: seco export runs/k400/last.pt --format onnx --out k400-resnet50.onnx
    """
    from seco.checkpoints.exchange import export_checkpoint

    show(export_checkpoint(ExportConfig(**settings)))


@seco.command()
@click.argument("run")
@settings_options(PublishConfig, required=("out",), arguments=("run",))
def publish(**settings: Any) -> None:
    """Write a folder to share: the encoder of RUN and its model card.

    RUN is a folder of `seco pretrain`. The folder holds model.safetensors, config.json and
    README.md, a card of what is known: data, recipe, results and their protocols, limits. timm and
    transformers load torchvision's ResNets and timm's networks from it.

    \b
    Example: seco publish runs/k400 --out publish/k400 --license apache-2.0 \\
               --shards shards/k400.json --results features/k400-val
    Example: seco publish runs/k400 --out publish/k400 --push me/seco-k400
    """
    from seco.report.publish import publish as publish_run

    found = publish_run(PublishConfig(**settings))
    show(found.folder)
    if found.url:
        show(found.url)


@seco.command()
@settings_options(ProbeConfig, required=("features",))
def probe(**settings: Any) -> None:
    """Report the accuracy of a classifier on frozen features.

    The classifier is a linear SVM, kNN, or a linear layer trained by SGD.

    \b
    Example: seco probe --features features/ucf101 --split 1
    Example: seco probe --features features/ucf101 --sweep 0.01,0.1,1,10
    """
    from seco.evaluation.probe import probe as run

    show(run(ProbeConfig(**settings)).table())


@seco.command()
@click.argument("dataset", required=False, default=None)
@settings_options(FinetuneConfig, required=("checkpoint",), arguments=("dataset",))
def finetune(**settings: Any) -> None:
    """Fine-tune an encoder on labelled videos, then test it.

    DATASET (ucf101, hmdb51) selects the shards if --shards is not given.

    \b
    Example: seco finetune ucf101 --shards shards/ucf101.json \\
               --checkpoint runs/k400/last.pt --split 1
    """
    from seco.config import resolve_finetune
    from seco.processes.launch import launch

    again = "resume with the same command and --resume auto"
    if code := launch(FinetuneConfig(**settings), finetune_here, resolve_finetune, again=again):
        raise click.exceptions.Exit(code)


def finetune_here(config: FinetuneConfig) -> int:
    """Fine-tune on one rank and return the exit code."""

    def work() -> None:
        from seco.training.finetune import finetune as run

        if text := run(config):
            show(text)

    return exit_code(work)


@seco.command("finetune-eval")
@settings_options(FinetuneTestConfig, required=("shards", "checkpoint"))
def finetune_eval(**settings: Any) -> None:
    """Test a fine-tuned checkpoint on its split's test videos.

    \b
    Example: seco finetune-eval --shards shards/ucf101.json \\
               --checkpoint runs/ucf101-finetune-1/last.pt
    """
    from seco.config import require_test_ranges
    from seco.processes.launch import launch

    config = FinetuneTestConfig(**settings)
    if code := launch(config, finetune_eval_here, lambda given, _: require_test_ranges(given)):
        raise click.exceptions.Exit(code)


def finetune_eval_here(config: FinetuneTestConfig) -> int:
    """Test a fine-tuned checkpoint on one rank and return the exit code."""

    def work() -> None:
        from seco.evaluation.video_test import finetune_eval as run

        if text := run(config):
            show(text)

    return exit_code(work)


@seco.group()
def retrieve() -> None:
    """Search features for the nearest videos, with faiss."""


@retrieve.command("evaluate")
@settings_options(EvaluateConfig, required=("features",))
def retrieve_evaluate(**settings: Any) -> None:
    """Report R@k of test videos among training videos.

    Also reports how often the first half of a video finds its own second half.

    \b
    Example: seco retrieve evaluate --features features/ucf101 --split all
    """
    from seco.evaluation.retrieval import evaluate

    show(evaluate(EvaluateConfig(**settings)).table())


@retrieve.command("build")
@settings_options(BuildConfig, required=("features",))
def retrieve_build(**settings: Any) -> None:
    """Save a faiss index of the features.

    For IVF-PQ, also reports its recall against exact search.

    \b
    Example: seco retrieve build --features features/k400 --ivfpq-above 100000
    """
    from seco.evaluation.index import build

    show(build(BuildConfig(**settings)).table())


@retrieve.command("query")
@settings_options(QueryConfig, required=("features",))
def retrieve_query(**settings: Any) -> None:
    """Write a page of the videos nearest to a query.

    The query is a video of the dataset (--video) or a video file (--file).

    \b
    Example: seco retrieve query --features features/ucf101 --video v_Archery_g01_c01
             seco retrieve query --features features/ucf101 --file mine.mp4 --checkpoint last.pt
    """
    from pipelines._files import decode_file
    from seco.evaluation.query import write_query_page

    show(write_query_page(QueryConfig(**settings), decode_file))


@retrieve.command("duplicates")
@settings_options(DuplicatesConfig, required=("features",))
def retrieve_duplicates(**settings: Any) -> None:
    """List near-duplicates between training and test videos.

    Candidates are compared frame by frame.

    \b
    Example: seco retrieve duplicates --features features/ucf101 --html duplicates.html
    """
    from seco.evaluation.duplicates import duplicates

    show(duplicates(DuplicatesConfig(**settings)).table())


@seco.group()
def track() -> None:
    """Track a target with SiamFC on frozen features."""


@track.command("train")
@settings_options(TrackTrainConfig, required=("shards", "checkpoint"))
def track_train(**settings: Any) -> None:
    """Train a tracker's 1×1 convolution on a frozen backbone.

    \b
    Example: seco track train --shards "shards/got10k-{000..038}.tar" \\
               --checkpoint runs/k400/last.pt
    """
    from seco.config import check_training
    from seco.processes.launch import launch

    again = "resume with the same command and --resume auto"
    if code := launch(TrackTrainConfig(**settings), track_train_here, check_training, again=again):
        raise click.exceptions.Exit(code)


def track_train_here(config: TrackTrainConfig) -> int:
    """Train a tracker on one rank and return the exit code; rank 0 prints the checkpoint's path."""

    def work() -> None:
        from seco.training.track import track_train as run

        checkpoint = run(config)
        if os.environ.get("RANK", "0") == "0":
            show(checkpoint)

    return exit_code(work)


@track.command("eval")
@settings_options(TrackEvalConfig, required=("shards", "tracker"))
def track_eval(**settings: Any) -> None:
    """Evaluate a tracker on sequences with boxes.

    One-pass evaluation, for example on OTB-100.

    \b
    Example: seco track eval --shards shards/otb100.json --tracker runs/track-got10k/last.pt
    """
    from pipelines._files import write_video
    from seco.evaluation.otb import track_eval as run

    show(run(TrackEvalConfig(**settings), write_video).table())


@track.command("run")
@settings_options(TrackRunConfig, required=("video", "box", "tracker"))
def track_run(**settings: Any) -> None:
    """Track a target through a video file.

    Writes the boxes as CSV, and a video with the box drawn.

    \b
    Example: seco track run --video street.mp4 --box 120,80,40,60 \\
               --tracker runs/track-got10k/last.pt
    """
    from pipelines._files import open_video, write_video
    from seco.evaluation.tracker import track_run as run

    config = TrackRunConfig(**settings)
    with open_video(Path(config.video)) as video:
        for path in run(config, video, video.fps, write_video):
            show(path)
        if video.damage:
            say(
                f"seco: {config.video}: damaged, some frames are missing: {video.damage}",
            )


@seco.command()
@click.argument("shards", nargs=-1, required=True)
@click.option(
    "--html", default=None, help="Write an HTML page with a histogram and a contact sheet."
)
@click.option("--png", default=None, help="Write the contact sheet as a PNG file.")
def inspect(shards: tuple[str, ...], html: str | None, png: str | None) -> None:
    """Summarise shards: counts, sizes, labels, contact sheet.

    \b
    Example: seco inspect "shards/ucf101-*.tar" --html ucf101.html
    """
    from seco.report.inspect import inspect_set

    show(inspect_set(shards, html=html, png=png))


@seco.command()
@click.argument("runs", nargs=-1)
@click.option(
    "--out", type=_FILE, default="report.html", show_default=True, help="HTML page to write."
)
@click.option("--markdown", type=_FILE, help="Also write the report as Markdown to this file.")
@click.option("--json", type=_FILE, help="Also write the report as JSON to this file.")
def report(runs: tuple[str, ...], out: Path, markdown: Path | None, json: Path | None) -> None:
    """Compare results with the paper's tables.

    Reads every result under RUNS (default: runs/ features/).

    \b
    Example: seco report runs/ features/ --out report.html
    """
    from seco.report.report import write_report

    paths = [real_path(path) for path in (out, markdown, json) if path is not None]
    if len(set(paths)) < len(paths):
        raise InputError("name the same file", "--out, --markdown, --json", "give different files")
    found = write_report(runs, out, markdown, json)
    for item in found.unread:
        say(f"seco: {item.path}: cannot be read: {item.reason}")
    show("\n".join(str(file) for file in (out, markdown, json) if file is not None))


@seco.command()
@settings_options(DemoConfig)
def demo(**settings: Any) -> None:
    """Run every stage on a small dataset.

    The dataset is rendered, or made from your own videos with --src.

    \b
    Example: seco demo --src raw/ --dataset hmdb51
    """
    from seco.demo import demo as run_demo

    show(run_demo(DemoConfig(**settings), command=run))


@seco.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Report what works on this machine.

    Also prints what missing parts are needed for and how to get them. Exits with code 1 if a part
    that every user needs is missing or broken.

    \b
    Example: seco doctor
    """
    from pipelines._ffmpeg import ffmpeg_facts
    from seco.doctor import examine

    say("seco: loading all libraries; this may take a minute")
    found = examine(ffmpeg_facts)
    show(found.to_json() if as_json else found.table())
    found.require_core()


@seco.command("render-demo")
@click.argument("out")
@click.option("--clips-per-class", default=36, show_default=True, help="Clips per class.")
@click.option("--seed", default=0, show_default=True, help="Random seed.")
def render_demo(out: str, clips_per_class: int, seed: int) -> None:
    """Render the demo's videos into OUT, in UCF101's layout.

    \b
    Example: seco render-demo raw/
    """
    from pipelines._demo_set import render_demo_set

    render_demo_set(Path(out), clips_per_class=clips_per_class, seed=seed)


class _Benches(click.Group):
    """The benchmarks, which exist only in the source tree."""

    def list_commands(self, context: click.Context) -> list[str]:
        return self._found().list_commands(context)

    def get_command(self, context: click.Context, cmd_name: str) -> click.Command | None:
        return self._found().get_command(context, cmd_name)

    def _found(self) -> click.Group:
        root = Path(__file__).resolve().parent
        if not (root / "benchmarks" / "commands.py").is_file():
            raise InputError(
                "not part of the installed package",
                "seco bench",
                "clone the repository and run pip install -e . in it",
            )
        if str(root) not in sys.path:
            sys.path.append(str(root))
        from benchmarks.commands import bench as found

        return found


@seco.group(cls=_Benches)
def bench() -> None:
    """Benchmark a stage of the toolkit.

    Compares it with its physical limit and with a plain implementation.
    """


def main(arguments: Sequence[str] | None = None, interruptible: bool = False) -> None:
    """Run the command line and exit; an error is one line on standard error and an exit code.

    Args:
        arguments: of the command line; None for this process's.
        interruptible: whether Ctrl-C ends the process silently until now, and interrupts from here.
    """
    show_everywhere()
    sys.unraisablehook = not_lost
    if interruptible:
        signal.signal(signal.SIGINT, interrupt)
    # A scheduler's signal and a closed terminal, too, leave time to remove half-written files.
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, interrupt)
    code = EXIT_STOPPED
    with contextlib.suppress(KeyboardInterrupt):  # while an error was reported
        code = run(arguments)
        interrupt_no_more()
    # Another signal must not end the interpreter's shutdown with a traceback.
    for stopping in STOPPING:
        if signal.getsignal(stopping) in (interrupt, signal.default_int_handler):
            signal.signal(stopping, signal.SIG_DFL)
    # Python remembers a KeyboardInterrupt that came within an exec of text, as in the making of a
    # named tuple, and under -m would end with SIGINT, until the next exec.
    exec("")
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: seco.main(args=arguments, prog_name="seco", standalone_mode=False))


def exit_code(work: Callable[[], object]) -> int:
    """Run ``work`` and return its exit code; print an error as one line on standard error."""
    try:
        code = work()  # click returns the code of an Exit
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except TooManyExcluded as error:
        return _fail(error, EXIT_TOO_MANY_EXCLUDED)
    except InputError as error:
        return _fail(error, EXIT_FAILED)
    except PeerLost as error:
        return _fail(error, EXIT_PEER_LOST)
    except Stopped as stopped:
        return _fail(stopped, EXIT_STOPPED)
    except (KeyboardInterrupt, click.Abort):
        return _fail(
            "interrupted; no file is half-written — run the same command again", EXIT_STOPPED
        )
    except BrokenPipeError:
        # The reader closed the pipe (`seco … | head`): not an error to report.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except RuntimeError as error:
        return _fail(_known_fault(error), EXIT_FAILED)
    except OSError as error:
        # A full disk, a missing folder, a file without permission: the system's message is enough.
        return _fail(f"{error.filename or 'the disk'}: {error.strerror or error}", EXIT_FAILED)


def _known_fault(error: RuntimeError) -> str:
    """Return one line for the two torch errors that users can fix; raise all others again."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory — lower --batch-size or --crop-size"
    if "DataLoader worker" in text:
        first = " ".join(text.split())[:200]
        return f"{first} — use --workers 0, or give the container more shared memory (/dev/shm)"
    raise error


def _fail(message: object, code: int) -> int:
    if str(message):  # empty: another rank prints it
        say(f"seco: {message}")
    return code


if __name__ == "__main__":
    main()
