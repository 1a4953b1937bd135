"""The commands ``seco bench NAME``; nothing heavy is imported before one runs."""

from __future__ import annotations

from typing import Any

import click

from cli import settings_options
from seco.config import FEATURE_LAYERS, ExtractConfig, PretrainConfig
from shards.errors import InputError


@click.group()
def bench() -> None:
    """Measure a stage against its physical limit and the plain way to do it."""


@bench.command("prepare")
@click.option("--src", multiple=True, required=True, help="Videos to measure on: files or folders.")
@click.option("--repeats", default=5, show_default=True, help="Measurements of each figure.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--only-clips", is_flag=True, help="Leave out scaling and planning.")
def bench_prepare(src: tuple[str, ...], repeats: int, as_json: bool, only_clips: bool) -> None:
    """CPU time of preparing: ours, the limit, ffmpeg writing JPEG files, and a second encode.

    \b
    Example: seco bench prepare --src clips/
    """
    from benchmarks.prepare import bench_prepare as run
    from benchmarks.prepare_table import table

    whole = not only_clips
    found = run(list(src), repeats, scaling=whole, planning=whole)
    print(found.to_json() if as_json else table(found))


@bench.command("loader")
@click.option("--shards", multiple=True, required=True, help="Local shards to measure on.")
@click.option("--triplets", default=128, show_default=True, help="Triplets of one measurement.")
@click.option("--repeats", default=5, show_default=True, help="Measurements of each figure.")
@click.option(
    "--workers", default="1,2", show_default=True, help="Numbers of loader workers to compare."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--only-costs", is_flag=True, help="Leave out opening a thousand shards.")
def bench_loader(
    shards: tuple[str, ...],
    triplets: int,
    repeats: int,
    workers: str,
    as_json: bool,
    only_costs: bool,
) -> None:
    """CPU time of a triplet: ours, the limit, the plain chain, stock WebDataset.

    \b
    Example: seco bench loader --shards shards/k400.json
    """
    counts = _whole_numbers(workers, "--workers")
    from benchmarks.loader import bench_loader as run
    from benchmarks.tables import as_json as to_json
    from benchmarks.tables import loader_table

    found = run(shards, triplets, repeats, workers=counts, start=not only_costs)
    print(to_json(found) if as_json else loader_table(found))


@bench.command("views")
@click.option("--shards", multiple=True, required=True, help="Local shards to measure on.")
@click.option("--repeats", default=5, show_default=True, help="Measurements of each figure.")
@click.option("--device", default="auto", show_default=True, help="Device that augments the views.")
@click.option("--batch", type=int, help="Views per batch [default: 2048 on a GPU, else 64].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench_views(
    shards: tuple[str, ...], repeats: int, device: str, batch: int | None, as_json: bool
) -> None:
    """The kernels a view is made of, and the device part of the views in batches.

    \b
    Example: seco bench views --shards shards/k400.json
    """
    from benchmarks.tables import as_json as to_json
    from benchmarks.tables import views_table
    from benchmarks.views import bench_views as run

    found = run(shards, repeats, device=device, batch=batch)
    print(to_json(found) if as_json else views_table(found))


_STEP = (
    *("shards", "preset", "tasks", "arch", "batch_size", "lr", "queue_size", "mask_same_video"),
    *("heads", "intra", "sampling", "embedding_dim", "crop_size", "bn_group", "accumulate"),
    *("precision", "channels_last", "compile", "device", "workers", "decode", "views_on"),
)


@bench.command("step")
@settings_options(PretrainConfig, only=_STEP)
@click.option("--repeats", default=10, show_default=True, help="Measurements of each figure.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--only-step", is_flag=True, help="Leave out the options and the simple implementation."
)
def bench_step(repeats: int, as_json: bool, only_step: bool, **settings: Any) -> None:
    """A training step beside its bare cost and the plain way to write it.

    On synthetic views; with --shards also fed by the real loader.

    \b
    Example: seco bench step --arch resnet18 --crop-size 112 --batch-size 64
    """
    from benchmarks.step import bench_step as run
    from benchmarks.tables import as_json as to_json
    from benchmarks.tables import step_table

    whole = not only_step
    found = run(PretrainConfig(**settings), repeats, switches=whole, plain=whole)
    print(to_json(found) if as_json else step_table(found))


@bench.command("extract")
@settings_options(ExtractConfig, required=("shards",))
@click.option("--repeats", default=3, show_default=True, help="Measurements of each figure.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench_extract(repeats: int, as_json: bool, **settings: Any) -> None:
    """Features beside bare forwards of the backbone and the plain way to extract them.

    Without --checkpoint of random weights (a ResNet-50 unless --arch says another).

    \b
    Example: seco bench extract --shards shards/ucf101.json
    """
    from benchmarks.extract import bench_extract as run
    from benchmarks.tables import as_json as to_json
    from benchmarks.tables import extract_table

    settings["checkpoint"] = settings["checkpoint"] or "random"
    found = run(ExtractConfig(**settings), repeats)
    print(to_json(found) if as_json else extract_table(found))


@bench.command("probe")
@click.option("--features", help="Feature folder to measure on [default: made features].")
@click.option("--rows", default=9537, show_default=True, help="Training rows of made features.")
@click.option("--classes", default=101, show_default=True, help="Number of classes.")
@click.option("--dimension", default=2048, show_default=True, help="Dimension of the features.")
@click.option("-C", "c", default=1.0, show_default=True, help="The SVM's C.")
@click.option("--repeats", default=3, show_default=True, help="Measurements of each figure.")
@click.option(
    "--device", default="auto", show_default=True, help="Device for this toolkit's solver."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--only-ours", is_flag=True, help="Leave out LIBLINEAR (large sizes).")
@click.option(
    "--most-rounds",
    default=40,
    show_default=True,
    help="Stop this toolkit's solver after so many rounds.",
)
def bench_probe(features: str | None, as_json: bool, only_ours: bool, **sizes: Any) -> None:
    """The SVM of all classes beside LIBLINEAR and its bare matrix products, with peak memory.

    \b
    Example: seco bench probe --rows 9537 --classes 101
    """
    from benchmarks.probe import bench_probe as run
    from benchmarks.tables import as_json as to_json
    from benchmarks.tables import probe_table

    found = run(features, rivals=not only_ours, **sizes)
    print(to_json(found) if as_json else probe_table(found))


@bench.command("track")
@click.option("--shards", multiple=True, help="Tracking shards, to measure being fed from them.")
@click.option("--arch", default="resnet50", show_default=True, help="Backbone.")
@click.option(
    "--feature-layer",
    default="layer4",
    show_default=True,
    type=click.Choice(FEATURE_LAYERS),
    help="Stage of the backbone to take features from.",
)
@click.option("--batch-size", default=8, show_default=True, help="Pairs of a training step.")
@click.option("--workers", default=2, show_default=True, help="Loader workers, on a GPU.")
@click.option("--device", default="auto", show_default=True, help="Device to compute on.")
@click.option("--repeats", default=5, show_default=True, help="Measurements of each figure.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench_track(as_json: bool, arch: str, feature_layer: str, **settings: Any) -> None:
    """Tracking a frame, and a training step, beside their bare cost and the plain way.

    \b
    Example: seco bench track --arch resnet18 --shards shards/otb100.json
    """
    from benchmarks.tables import as_json as to_json
    from benchmarks.tables import track_table
    from benchmarks.track import bench_track as run

    found = run(arch, feature_layer, **settings)
    print(to_json(found) if as_json else track_table(found))


def _whole_numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"{text!r} is no list of whole numbers", option, "for example 1,2"
        ) from error
    if not numbers or min(numbers) < 1:
        raise InputError("must be 1 or more", option)
    return numbers
