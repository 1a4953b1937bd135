"""Evaluation of trackers: what is written, what real trees become, what is left out."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

import seco.evaluation.otb
from cli import run
from pipelines._ffmpeg import run_ffmpeg
from pipelines._files import open_video, write_video
from seco.checkpoints.io import load_checkpoint, save_checkpoint
from seco.checkpoints.weights import load_tracker
from seco.config import TrackerConfig, TrackEvalConfig, TrackTrainConfig
from seco.evaluation.otb import curves, mean_curves, track_eval
from seco.evaluation.tracker import Tracker, with_boxes
from seco.training.track import track_train
from shards.errors import InputError
from shards.opening import open_shards
from shards.pairs import boxes_of
from tests.data import shared
from tests.made_sequences import SIZE, make_sequences, patch_frames
from tests.made_shards import make_set
from tests.pipelines.running import run as prepare
from tests.seco.test_otb_metrics import SEQUENCES, toolkit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a random backbone, trained for two steps on patches."""
    folder = tmp_path_factory.mktemp("tracker")
    config = TrackTrainConfig(
        shards=(make_sequences(folder / "set", sequences=8),),
        checkpoint="random",
        arch="resnet18",
        feature_layer="layer2",
        out=str(folder / "run"),
        epochs=2,
        batch_size=8,
        workers=0,
        device="cpu",
    )
    return track_train(config)


class Cheap:
    """Stands for the tracker where only what is around it is tested: the first box, drifting."""

    def __init__(self, *_: object) -> None:
        self.score = 0.5

    def init(self, frame: NDArray[np.uint8], box: Any) -> None:
        if min(box[2:]) <= 0:
            raise ValueError("the first box is empty")
        self.box = np.array(box, dtype=np.float64)

    def update(self, frame: NDArray[np.uint8]) -> NDArray[np.float64]:
        self.box = self.box + np.array([0.7, 0.31, 0.05, 0])
        return self.box


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seco.evaluation.otb, "Tracker", Cheap)


def evaluate(shards: str, tracker: Path, out: Path, **changed: Any) -> dict[str, Any]:
    config = TrackEvalConfig(
        shards=(shards,), tracker=str(tracker), out=str(out), device="cpu", **changed
    )
    track_eval(config, write_video)
    found: dict[str, Any] = json.loads((out / "track.json").read_text())
    return found


# The tracker itself


def test_a_patch_that_moves_and_grows_is_followed(tracker: Path, tmp_path: Path) -> None:
    spec = make_sequences(tmp_path / "set", sequences=1, frames=40, first=100, grows_to=1.7)
    found = evaluate(spec, tracker, tmp_path / "out")
    assert found["success_auc"] > 0.7
    assert found["precision_20"] == 1
    assert found["frames"] == 40
    assert found["fps"] > 0
    rows = np.loadtxt(tmp_path / "out" / "patches" / "seco" / "patch_100.txt", delimiter=",")
    assert rows[-1][2] == pytest.approx(1.7 * 36, rel=0.2)
    fixed = evaluate(spec, tracker, tmp_path / "fixed", scales=1)  # of one size for ever
    assert fixed["success_auc"] < found["success_auc"] - 0.1


def following(tracker: Path, **settings: Any) -> Tracker:
    return Tracker(load_tracker(tracker)[0], TrackerConfig(**settings), CPU)


@pytest.mark.parametrize(
    "box",
    [
        [1, 1, 1, 1],  # one pixel, in the corner
        [240, 160, 1, 1],
        [-20, -15, 60, 50],  # partly outside
        [200, 100, 80, 90],
        [-100, -100, 440, 360],  # larger than the frame
    ],
)
def test_odd_boxes_are_followed_within_the_frame(tracker: Path, box: list[float]) -> None:
    frames, _ = patch_frames(3, 3)
    follow = following(tracker)
    follow.init(frames[0], box)
    for frame in frames[1:]:
        found = follow.update(frame)
        assert np.isfinite(found).all()
        centre = found[:2] - 1 + (found[2:] - 1) / 2
        assert (centre >= 0).all() and (centre <= [SIZE[1] - 1, SIZE[0] - 1]).all()
        assert (found[2:] >= 0.2 * np.array(box[2:])).all()
        assert (found[2:] <= 5 * np.array(box[2:])).all()
        assert 0 <= follow.score <= 1


def test_a_target_that_leaves_stops_at_the_border(
    tracker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow = following(tracker, scale_step=1.5, scale_update=1.0)
    frame = patch_frames(3, 1)[0][0]
    follow.init(frame, [220, 140, 20, 20])
    # The response that is farthest to the lower right, again and again, at the largest scale.
    monkeypatch.setattr(
        "seco.evaluation.tracker.peak",
        lambda *_: torch.tensor([2, 271, 271, 0.0], dtype=torch.float64),
    )
    for _ in range(5):
        found = follow.update(frame)
    assert follow.target[:2] == (SIZE[1] - 1, SIZE[0] - 1)
    assert found[2:].tolist() == pytest.approx([100, 100])  # five times the first box


@pytest.mark.parametrize(
    ("box", "why"),
    [
        ([5, 5, 0, 10], "is empty"),
        ([5, 5, 10, -1], "is empty"),
        ([5, 5, float("nan"), 10], "is empty"),
        ([400, 5, 10, 10], "centre is outside"),
        ([5, -30, 10, 10], "centre is outside"),
    ],
)
def test_first_boxes_that_hold_nothing_are_refused(
    tracker: Path, box: list[float], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        following(tracker).init(patch_frames(3, 1)[0][0], box)


@pytest.mark.parametrize(("response", "score"), [(-2000.0, 0.0), (0.0, 0.5), (2000.0, 1.0)])
def test_scores_of_responses_of_any_size(
    tracker: Path, monkeypatch: pytest.MonkeyPatch, response: float, score: float
) -> None:
    follow = following(tracker, scales=1)
    follow._bias = 0.0
    frame = patch_frames(3, 1)[0][0]
    follow.init(frame, [50, 50, 20, 20])
    found = torch.tensor([0, 136, 136, response], dtype=torch.float64)
    monkeypatch.setattr("seco.evaluation.tracker.peak", lambda *_: found)
    follow.update(frame)
    assert follow.score == score


def test_a_static_target_stays(tracker: Path) -> None:
    frames, boxes = patch_frames(5, 1)
    follow = following(tracker, scales=1)
    follow.init(frames[0], boxes[0])
    for _ in range(2):
        assert follow.update(frames[0]) == pytest.approx(boxes[0], abs=1.5)


# What is written


def require_the_toolkits_figures(found: dict[str, Any], report: dict[str, Any]) -> None:
    ours = {row["sequence"]: row for row in found["per_sequence"]}
    assert set(ours) == set(SEQUENCES) == set(report["seq_wise"])
    for name, theirs in report["seq_wise"].items():
        assert ours[name]["success_auc"] == pytest.approx(theirs["success_score"], abs=1e-6)
        assert ours[name]["precision_20"] == pytest.approx(theirs["precision_score"], abs=1e-6)
        assert ours[name]["success_curve"] == pytest.approx(theirs["success_curve"], abs=1e-6)
        assert ours[name]["precision_curve"] == pytest.approx(theirs["precision_curve"], abs=1e-6)
        assert theirs["speed_fps"] > 0
    overall = report["overall"]
    assert found["success_auc"] == pytest.approx(overall["success_score"], abs=1e-6)
    assert found["precision_20"] == pytest.approx(overall["precision_score"], abs=1e-6)
    assert found["precision_auc"] == pytest.approx(np.mean(overall["precision_curve"]), abs=1e-6)
    assert found["success_curve"] == pytest.approx(overall["success_curve"], abs=1e-6)


def reported(name: str, out: Path, reports: Path, root: Path | None = None) -> dict[str, Any]:
    experiment = toolkit(out, reports, root)
    with contextlib.redirect_stdout(io.StringIO()):
        found: dict[str, Any] = experiment.report([name])[name]
    return found


def test_result_files_are_read_by_the_toolkit(tracker: Path, cheap: None, tmp_path: Path) -> None:
    prepare(shared("otb"), tmp_path / "shards", dataset="otb100", frames=None)
    out = tmp_path / "out"
    found = evaluate(str(tmp_path / "shards" / "otb100.json"), tracker, out, name="drift")
    require_the_toolkits_figures(found, reported("drift", out, tmp_path / "reports"))
    assert 0.05 < found["success_auc"] < 0.7
    assert (found["sequences"], found["of_sequences"]) == (4, 100)
    assert (found["dataset"], found["frames"]) == ("otb100", 678)
    assert found["encoder"]["arch"] == "resnet18"
    assert found["settings"]["feature_layer"] == "layer2"
    assert (found["settings"]["epochs"], found["settings"]["epochs_planned"]) == (2, 2)
    for plot in ("success.png", "precision.png"):
        with Image.open(out / plot) as picture:
            assert min(picture.size) > 400
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


@pytest.mark.parametrize(
    ("step", "steps_per_epoch", "epochs"), [(2, 1, 2), (3, 2, 1.5), (1, 3, 0.33), (2, None, None)]
)
def test_how_far_a_tracker_was_trained_is_told(
    tracker: Path,
    cheap: None,
    tmp_path: Path,
    step: int,
    steps_per_epoch: int | None,
    epochs: float | None,
) -> None:
    content = {**load_checkpoint(tracker), "step": step, "steps_per_epoch": steps_per_epoch}
    if steps_per_epoch is None:
        del content["steps_per_epoch"]  # as older ones
    save_checkpoint(tmp_path / "some.pt", content)
    spec = make_sequences(tmp_path / "set", 1, 2)
    settings = evaluate(spec, tmp_path / "some.pt", tmp_path / "out")["settings"]
    assert settings.get("epochs") == epochs
    assert settings["epochs_planned"] == 2
    assert [Path(shards).name for shards in settings["train_shards"]] == ["patches.json"]
    expected = {
        **{"batch_size": 8, "lr": 1e-2, "final_lr": 1e-5, "momentum": 0.9, "weight_decay": 5e-4},
        **{"pairs_per_sequence": 1, "max_gap": 99, "max_stretch": 0.05},
        **{"positive_radius": 16, "response_scale": 1e-3, "feature_layer": "layer2"},
    }
    assert {name: settings[name] for name in expected} == expected


def test_a_real_tracker_on_real_sequences(tracker: Path, tmp_path: Path) -> None:
    raw, frames = tmp_path / "raw", 16
    for name in SEQUENCES:
        (raw / name / "img").mkdir(parents=True)
        for image in sorted((shared("otb") / name / "img").iterdir())[:frames]:
            shutil.copy(image, raw / name / "img")
        truth = (shared("otb") / name / "groundtruth_rect.txt").read_text().splitlines()
        (raw / name / "groundtruth_rect.txt").write_text("\n".join(truth[:frames]) + "\n")
    prepare(raw, tmp_path / "shards", dataset="otb100", frames=None)
    spec, out = str(tmp_path / "shards" / "otb100.json"), tmp_path / "out"
    found = evaluate(spec, tracker, out, scales=1)
    require_the_toolkits_figures(found, reported("seco", out, tmp_path / "reports", raw))
    shards = open_shards(spec)
    truths = [boxes_of(shards.record(number)) for number in range(len(SEQUENCES))]
    still = mean_curves([curves(np.tile(truth[:1], (frames, 1)), truth) for truth in truths])
    assert found["success_auc"] > still.success_auc + 0.1
    assert found["precision_auc"] > still.precision_auc


def test_targets_of_shared_sequences_have_the_toolkits_names(
    tracker: Path, cheap: None, tmp_path: Path
) -> None:
    def change(number: int, fields: dict[str, Any]) -> None:
        if number == 5:
            fields["splits"] = {}
        if number == 6:
            fields["key"] = "../../Elsewhere"
        if number == 7:
            fields["source_frames"] = 81
        if number == 4:
            fields["source_frames"] = None

    keys = ["Jogging-1", "Jogging-2", "Skating2-1", "Human4-2", "David", "David_old", "Other"]
    keys.append("Skiing")
    spec = make_sequences(tmp_path / "set", 8, 3, dataset="otb100", keys=keys, change=change)
    found = evaluate(spec, tracker, tmp_path / "out")
    assert found["notes"] == [
        "left out: David_old: is not part of OTB-100",
        "left out: ../../Elsewhere: '../../Elsewhere' is not a valid file name",
        "left out: Skiing: 3 of 81 frames are stored, OTB-100 uses all",
    ]
    folder = tmp_path / "out" / "OTB2015" / "seco"
    expected = {"Jogging.1", "Jogging.2", "Skating2.1", "Human4", "David"}
    assert {path.name.removesuffix(".txt") for path in folder.glob("*.txt")} == expected
    times = {path.name.removesuffix("_time.txt") for path in (folder / "times").iterdir()}
    assert times == expected


def test_finished_sequences_are_not_tracked_again(
    tracker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = make_sequences(tmp_path / "set", 3, 4), tmp_path / "out"

    class Interrupted(Cheap):
        started = 0

        def init(self, frame: NDArray[np.uint8], box: Any) -> None:
            Interrupted.started += 1
            if Interrupted.started == 3:
                raise KeyboardInterrupt
            super().init(frame, box)

    monkeypatch.setattr(seco.evaluation.otb, "Tracker", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(spec, tracker, out)
    assert not (out / "track.json").exists()
    found = evaluate(spec, tracker, out)
    assert Interrupted.started == 4
    monkeypatch.setattr(seco.evaluation.otb, "Tracker", Cheap)
    whole = evaluate(spec, tracker, tmp_path / "whole")
    for row, other in zip(found["per_sequence"], whole["per_sequence"], strict=True):
        assert {**row, "fps": 0} == {**other, "fps": 0}
    with pytest.raises(InputError, match="results of another tracker or with other settings"):
        evaluate(spec, tracker, out, window=0.3)


def test_what_cannot_be_evaluated_is_named_and_left_out(
    tracker: Path, cheap: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(number: int, fields: dict[str, Any]) -> None:
        if number == 1:
            fields["boxes"] = fields["boxes"][:1]
        if number == 2:
            fields["boxes"] = [[1, 2, 3]] * 4
        if number == 3:
            fields["boxes"] = [[5.0, 5, 0, 0], *fields["boxes"][1:]]
        if number == 4:
            fields["absence"] = [0, 1, 1, 0]
        if number == 5:
            fields["absence"] = [1, 0, 0, 0]

    spec = make_sequences(tmp_path / "set", 6, 4, change=change)
    found = evaluate(spec, tracker, tmp_path / "out")
    assert [row["sequence"] for row in found["per_sequence"]] == ["patch_000", "patch_004"]
    assert [row["frames"] for row in found["per_sequence"]] == [4, 2]
    damaged = found["notes"].pop(2)
    assert damaged.startswith("left out: patch_002: ") and "boxes[0]: expected" in damaged
    assert found["notes"] == [
        "patch_004: 2 frames without the target are not counted",
        "left out: patch_001: 1 boxes for 4 frames",
        "left out: patch_003: the first box is empty",
        "left out: patch_005: the target is absent from the first frame",
    ]
    assert capsys.readouterr().err.count("seco: left out: ") == 4


def test_an_unreadable_frame_keeps_the_box_before(
    tracker: Path, cheap: None, tmp_path: Path
) -> None:
    spec = make_sequences(tmp_path / "set", 2, 5)
    tar = tmp_path / "set" / "patches-000.tar"
    data = bytearray(tar.read_bytes())
    for name in (b"patch_000.0002.jpg", b"patch_001.0000.jpg"):
        at = data.index(name) + 512
        data[at : at + 200] = bytes(200)
    whole = tar.read_bytes()
    tar.write_bytes(data)
    found = evaluate(spec, tracker, tmp_path / "out")
    rows = np.loadtxt(tmp_path / "out" / "patches" / "seco" / "patch_000.txt", delimiter=",")
    assert rows[2].tolist() == rows[1].tolist() != rows[3].tolist()
    assert found["notes"][0].startswith("patch_000: frame 2 cannot be read: ")
    assert found["notes"][1].startswith("left out: patch_001: the first frame cannot be read: ")
    assert found["sequences"] == 1
    again = evaluate(spec, tracker, tmp_path / "out")
    assert again["notes"] == found["notes"]
    tar.write_bytes(whole)
    mended = evaluate(spec, tracker, tmp_path / "out")
    assert mended["notes"] == []
    assert mended["sequences"] == 2
    rows = np.loadtxt(tmp_path / "out" / "patches" / "seco" / "patch_000.txt", delimiter=",")
    assert rows[2].tolist() != rows[1].tolist()


def test_a_single_frame_is_the_given_box(tracker: Path, cheap: None, tmp_path: Path) -> None:
    found = evaluate(make_sequences(tmp_path / "set", 1, 1), tracker, tmp_path / "out")
    assert found["success_auc"] == pytest.approx(20 / 21)
    assert (found["precision_20"], found["fps"]) == (1, None)


def test_sets_without_boxes_are_one_line(
    tracker: Path, cheap: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = make_set(tmp_path / "videos", videos=20)
    arguments = ["track", "eval", "--shards", videos, "--out", str(tmp_path / "out")]
    assert run([*arguments, "--tracker", str(tracker), "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no boxes — prepare a tracking dataset" in line


def test_of_many_sequences_that_are_left_out_a_few_are_shown(
    tracker: Path, cheap: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(number: int, fields: dict[str, Any]) -> None:
        if number:
            fields["boxes"] = fields["boxes"][:1]

    spec = make_sequences(tmp_path / "set", 14, 2, change=change)
    arguments = ["track", "eval", "--shards", spec, "--out", str(tmp_path / "out")]
    assert run([*arguments, "--tracker", str(tracker), "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    for text in (shown.err, shown.out):
        assert [line for line in text.splitlines() if "left out: " in line] == [
            f"{'seco: ' if text == shown.err else ''}left out: {what}"
            for what in (
                *(f"patch_{number:03d}: 1 boxes for 2 frames" for number in range(1, 11)),
                "3 more",
            )
        ]
    notes = json.loads((tmp_path / "out" / "track.json").read_text())["notes"]
    assert sum(note.startswith("left out: patch_") for note in notes) == 13


# Trees that people have


def frame_files(folder: Path, pictures: list[NDArray[np.uint8]], pattern: str, first: int) -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures, start=first):
        grey = picture.ndim == 2
        data = simplejpeg.encode_jpeg(
            picture[:, :, None] if grey else picture, colorspace="GRAY" if grey else "RGB"
        )
        (folder / (pattern % number)).write_bytes(data)


def rows_of(boxes: list[list[float]], delimiter: str) -> str:
    return "".join(delimiter.join(f"{value:g}" for value in box) + "\n" for box in boxes)


def test_copies_of_otb100_prepare_and_evaluate(
    tracker: Path, cheap: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    for number, (name, delimiter) in enumerate(
        {"Jogging": "\t", "Board": " ", "Car1": ",", "Toy": ","}.items()
    ):
        pictures, boxes = patch_frames(number, 5)
        if name == "Car1":
            pictures = [np.ascontiguousarray(picture[:, :, 1]) for picture in pictures]
        frame_files(raw / name / "img", pictures, "%05d.jpg" if name == "Board" else "%04d.jpg", 1)
        text = rows_of(boxes, delimiter)
        if name == "Jogging":
            (raw / name / "groundtruth_rect.1.txt").write_text(text)
            (raw / name / "groundtruth_rect.2.txt").write_text(text.replace("\t", ","))
        elif name == "Toy":
            (raw / name / "groundtruth_rect.txt").write_text(text + "1,2,3\n")
        else:
            (raw / name / "groundtruth_rect.txt").write_text(text)
    # Football1 is annotated from 1 to 74; one copy is whole, another already cut.
    pictures, boxes = patch_frames(9, 76)
    frame_files(raw / "Football1" / "img", pictures, "%04d.jpg", 1)
    (raw / "Football1" / "groundtruth_rect.txt").write_text(rows_of(boxes[:74], ","))
    frame_files(raw / "Freeman4" / "img", pictures[:3], "%04d.jpg", 1)
    (raw / "Freeman4" / "groundtruth_rect.txt").write_text(rows_of(boxes[:3], "\t"))
    settings = {"dataset": "otb100", "frames": None, "max_failures": 50}
    (made,) = prepare(raw, tmp_path / "shards", **settings).sets
    assert [(row.source, row.kind, row.message) for row in made.excluded] == [
        ("Toy", "bad-annotation", "groundtruth_rect.txt line 6: '1,2,3' is not x,y,w,h")
    ]
    found = evaluate(str(tmp_path / "shards" / "otb100.json"), tracker, tmp_path / "out")
    frames = {row["sequence"]: row["frames"] for row in found["per_sequence"]}
    assert frames == {
        **{"Board": 5, "Car1": 5, "Football1": 74, "Freeman4": 3},
        **{"Jogging.1": 5, "Jogging.2": 5},
    }
    assert (found["sequences"], found["of_sequences"]) == (6, 100)


def test_copies_of_got10k_train_and_evaluate(tracker: Path, cheap: None, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for split in ("Train", "Val", "Test"):
        names = []
        for number in range(1, 4):
            pictures, boxes = patch_frames(number, 5)
            folder = raw / split.lower() / f"GOT-10k_{split}_{number:06d}"
            frame_files(folder, pictures, "%08d.jpg", 1)
            boxes = boxes[:1] if split == "Test" else boxes
            (folder / "groundtruth.txt").write_text(rows_of(boxes, ","))
            (folder / "absence.label").write_text("0\n0\n1\n0\n0\n")
            (folder / "cover.label").write_text("8\n8\n0\n7\n1\n")
            (folder / "cut_by_image.label").write_text("0\n" * 5)
            (folder / "meta_info.ini").write_text("[METAINFO]\nanno_fps: 10Hz\n")
            names.append(folder.name)
        (raw / split.lower() / "list.txt").write_text("\n".join(names) + "\n")
    prepare(raw, tmp_path / "shards", dataset="got10k", frames=None)
    spec = str(tmp_path / "shards" / "got10k.json")
    config = TrackTrainConfig(
        shards=(spec,),
        checkpoint="random",
        arch="resnet18",
        feature_layer="layer2",
        out=str(tmp_path / "run"),
        epochs=1,
        batch_size=1,
        workers=0,
        device="cpu",
    )
    trained = track_train(config)
    assert load_checkpoint(trained)["step"] == 3
    found = evaluate(str(tmp_path / "shards" / "got10k-val.json"), trained, tmp_path / "out")
    assert (found["sequences"], found["of_sequences"], found["frames"]) == (3, 3, 12)
    with pytest.raises(InputError, match="1 boxes for 5 frames"):
        evaluate(str(tmp_path / "shards" / "got10k-test.json"), trained, tmp_path / "test")


# Videos


def decoded(path: Path) -> Iterator[NDArray[np.uint8]]:
    with open_video(path) as video:
        for _, jpeg in video:
            yield simplejpeg.decode_jpeg(jpeg)


def test_eval_writes_videos_with_boxes(tracker: Path, cheap: None, tmp_path: Path) -> None:
    spec = make_sequences(tmp_path / "set", 1, 4)
    evaluate(spec, tracker, tmp_path / "out", video=True)
    found = list(decoded(tmp_path / "out" / "videos" / "patch_000.mp4"))
    frames, boxes = patch_frames(0, 4)
    assert len(found) == 4
    for number, (shown, frame, box) in enumerate(zip(found, frames, boxes, strict=True)):
        assert shown.shape == frame.shape
        tracked = np.array(boxes[0]) + number * np.array([0.7, 0.31, 0.05, 0])
        expected = with_boxes(frame, [(box, (64, 220, 96)), (tracked, (255, 64, 32))])
        assert np.abs(shown.astype(int) - expected.astype(int)).mean() < 6


def test_boxes_are_drawn_where_they_are() -> None:
    frame = np.zeros((40, 60, 3), np.uint8)
    drawn = with_boxes(frame, [([11, 6, 20, 10], (255, 0, 0))])
    rows, columns = np.nonzero(drawn[:, :, 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 14, 10, 29)
    assert len(rows) == 2 * 20 + 2 * 8
    assert not frame.any()
    for box in ([-5, -5, 4, 4], [100, 100, 5, 5], [-50, -50, 500, 500]):
        assert not with_boxes(frame, [(box, (255, 0, 0))]).any()
    assert with_boxes(frame, [([60, 40, 0.2, 0.2], (255, 0, 0))])[39, 59, 0] == 255


def test_run_follows_a_target_through_a_file(
    tracker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames, boxes = patch_frames(100, 6, size=(121, 161))
    clip = tmp_path / "a clip.mp4"
    write_video(clip, 12.5, iter(frames))
    command = ["track", "run", "--video", str(clip), "--box", ",".join(map(str, boxes[0]))]
    out, shown = tmp_path / "boxes.csv", tmp_path / "shown.mp4"
    command += ["--tracker", str(tracker), "--device", "cpu"]
    assert run([*command, "--out", str(out), "--out-video", str(shown)]) == 0
    assert capsys.readouterr().out.split("\n")[:2] == [str(out), str(shown)]
    header, *rows = out.read_text().splitlines()
    assert header == "frame,seconds,x,y,width,height,score"
    found = np.array([[float(word) for word in row.split(",")] for row in rows])
    assert found[:, 0].tolist() == [*range(6)]
    assert found[:, 1] == pytest.approx([number / 12.5 for number in range(6)], abs=1e-3)
    away = np.abs(
        found[:, 2:4] + found[:, 4:6] / 2 - np.array(boxes)[:, :2] - np.array(boxes)[:, 2:] / 2
    )
    assert away.max() < 8
    pictures = list(decoded(shown))
    assert len(pictures) == 6
    assert pictures[0].shape == (122, 162, 3)


def test_run_keeps_what_came_before_damage(
    tracker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames, boxes = patch_frames(100, 4)
    whole, cut = tmp_path / "whole.avi", tmp_path / "cut.avi"
    clip = np.stack(frames).tobytes()
    size = f"{SIZE[1]}x{SIZE[0]}"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", "10", "-i", "pipe:0"]
    run_ffmpeg([*raw, "-c:v", "mjpeg", "-y", str(whole)], stdin=clip)
    data = whole.read_bytes()
    cut.write_bytes(data[: data.rindex(b"\xff\xd8") - 2000])
    command = ["track", "run", "--video", str(cut), "--box", ",".join(map(str, boxes[0]))]
    command += ["--tracker", str(tracker), "--device", "cpu", "--scales", "1"]
    command += ["--out", str(tmp_path / "b.csv"), "--out-video", str(tmp_path / "v.mp4")]
    assert run(command) == 0
    assert "damaged, some frames are missing" in capsys.readouterr().err
    assert 2 <= len((tmp_path / "b.csv").read_text().splitlines()) <= 4
    assert (tmp_path / "v.mp4").is_file()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"--box": "1,2,3"}, "--box: '1,2,3' is not x,y,w,h"),
        ({"--box": "1,2,0,4"}, "--box: '1,2,0,4' is not a valid box"),
        ({"--box": "900,2,10,4"}, "--box: the first box's centre is outside the frame of 240x160"),
        ({"--video": "nowhere.mp4"}, "nowhere.mp4: cannot be read (No such file"),
        ({"--video": __file__}, "Invalid data"),
        ({"--tracker": "nowhere.pt"}, "nowhere.pt: "),
        ({"--tracker": __file__}, "test_track_eval.py: "),
        ({"--scales": "2"}, "--scales: must be odd"),
        ({"--out-video": "clip.mp4"}, "would be overwritten"),
        ({"--out": "one", "--out-video": "./one"}, "one: is given for both boxes and video"),
        ({"--out": "."}, "is a folder — give --out the name of a file"),
        ({"--out-video": ".."}, "is a folder — give --out-video the name of a file"),
    ],
)
def test_mistakes_of_run_are_one_line(
    tracker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, str],
    why: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(Path("clip.mp4"), 10, iter(patch_frames(1, 2)[0]))
    options = {"--video": "clip.mp4", "--box": "50,50,30,30", "--tracker": str(tracker)}
    options |= {"--device": "cpu", **changed}
    assert run(["track", "run", *[word for pair in options.items() for word in pair]]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_tracker_is_no_encoder_and_an_encoder_no_tracker(
    tracker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_sequences(tmp_path / "set", 2, 3)
    command = ["extract-features", "--shards", spec, "--out", str(tmp_path / "features")]
    assert run([*command, "--checkpoint", str(tracker)]) == 1
    content = load_checkpoint(tracker)
    other = {"config": content["config"], "model": content["model"]}
    save_checkpoint(tmp_path / "encoder.pt", other)
    command = ["track", "eval", "--shards", spec, "--out", str(tmp_path / "out")]
    assert run([*command, "--tracker", str(tmp_path / "encoder.pt")]) == 1
    spoiled = {**content, "model": {**content["model"], "head.bias": torch.zeros(3)}}
    save_checkpoint(tmp_path / "spoiled.pt", spoiled)
    assert run([*command, "--tracker", str(tmp_path / "spoiled.pt")]) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert "last.pt" in first
    assert "encoder.pt: holds no tracker" in second
    assert "spoiled.pt: is a damaged tracker" in third


def test_a_video_is_whole_or_not_there(tmp_path: Path) -> None:
    def broken() -> Iterator[NDArray[np.uint8]]:
        yield from patch_frames(1, 3)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "out.mp4", 10, broken())
    assert not list(tmp_path.iterdir())
    shutil.rmtree(tmp_path)
