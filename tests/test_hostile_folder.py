"""Commands run in a folder of files that came with a dataset and must not be run."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import click
import pytest

import cli
from tests import commands
from tests.made_sequences import make_sequences
from tests.made_shards import make_set
from tests.pipelines.made_videos import draw_video

SMALL = ("--arch=resnet10_w16", "--crop-size=32", "--batch-size=4", "--device=cpu", "--workers=1")
TRAINING = (*SMALL, "--bn-group=2", "--epochs=1")
FEATURES = ("--frames=3", "--short-edge=36")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for every module there is, each of which leaves a mark when it runs."""
    folder = tmp_path_factory.mktemp("hostile")
    installed = importlib.metadata.packages_distributions()
    for name in {*sys.stdlib_module_names, *installed, "seco", "shards", "pipelines", "cli"}:
        if name.isidentifier():
            code = f"open({str(folder / 'RAN')!r}, 'a').write({name + ' '!r})\n"
            (folder / f"{name}.py").write_text(code + "raise SystemExit(99)\n")
    return folder


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> set[str]:
    found: set[str] = set()
    for name, command in group.commands.items():
        here = (*path, name)
        found |= leaves(command, here) if isinstance(command, click.Group) else {" ".join(here)}
    return found


def test_no_command_runs_a_file_of_the_current_folder(hostile: Path, tmp_path: Path) -> None:
    for number in range(4):
        draw_video(tmp_path / "raw" / "ab"[number % 2] / f"{number}.mp4")
    shards = make_set(tmp_path / "made", videos=18, frames=4, per_shard=7)
    tracks = make_sequences(tmp_path / "tracks", sequences=4)
    run, tuned, tracker = (tmp_path / name / "last.pt" for name in ("run", "tuned", "tracker"))
    features, made = tmp_path / "features", ("--shards", shards)
    query = next((tmp_path / "raw").rglob("*.mp4"))
    given: dict[str, tuple[object, ...]] = {
        "prepare": ("folder", "--src", tmp_path / "raw", "--out", tmp_path / "set", "--workers=2",
                    "--videos-per-shard=2"),
        "verify": (shards,),
        "index": (shards,),
        "inspect": (shards,),
        "pretrain": (*made, "--out", run.parent, *TRAINING, "--queue-size=12",
                     "--processes=2"),
        "extract-features": (*made, "--checkpoint", run, "--out", features, *FEATURES,
                             *SMALL[1:]),
        "probe": ("--features", features),
        "compare": ("--features", features, "--features", f"other={features}"),
        "retrieve evaluate": ("--features", features),
        "retrieve build": ("--features", features),
        "retrieve query": ("--features", features, "--video", "video_0003", "--out",
                           tmp_path / "q.html"),
        "retrieve duplicates": ("--features", features),
        "finetune": (*made, "--checkpoint", run, "--out", tuned.parent, *TRAINING[1:],
                     "--segments=2", "--clips=2", "--clip-frames=2", "--test-size=36"),
        "finetune-eval": (*made, "--checkpoint", tuned, "--device=cpu", "--workers=1"),
        "track train": ("--shards", tracks, "--checkpoint", run, "--out", tracker.parent,
                        "--feature-layer=layer3", "--channels=8", "--epochs=1", "--batch-size=2",
                        "--workers=1", "--device=cpu"),
        "track eval": ("--shards", tracks, "--tracker", tracker, "--device=cpu", "--out",
                       tmp_path / "tracked"),
        "track run": ("--tracker", tracker, "--box=4,4,20,20", "--device=cpu", "--out",
                      tmp_path / "boxes.csv", "--video", query),
        "export": (run, "--format=torchvision", "--out", tmp_path / "out.pth"),
        "import": (run, "--out", tmp_path / "in.pt"),
        "publish": (run.parent, "--out", tmp_path / "published", "--results", features),
        "report": (run.parent, features, "--out", tmp_path / "report.html"),
        "render-demo": (tmp_path / "demo", "--clips-per-class=5"),
        "doctor": (),
        "demo": ("--help",),  # nothing but the stages above
    }  # fmt: skip
    assert set(given) == leaves(cli.seco)
    for command, options in given.items():
        process = commands.start(*command.split(), *options, cwd=hostile)
        _, error = process.communicate(timeout=300)
        ran = hostile / "RAN"
        assert not ran.exists(), f"seco {command} ran {ran.read_text()}"
        assert process.returncode == 0, f"seco {command}: {error}"
