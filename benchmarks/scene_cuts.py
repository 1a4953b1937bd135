"""How well scene cuts are found: our detector (ffmpeg's scdet) beside PySceneDetect's.

    pip install scenedetect opencv-python-headless
    python benchmarks/scene_cuts.py --work /tmp/cuts --src ../shared/data/hmdb51 --seeds 0,1,2

The recording is made of the first two seconds of videos that have no cut of their own, in random
order, fitted into 320x240 at 25 frames a second. A cut is found if a detector names a frame at most
two before or after it; what it names elsewhere is a false alarm.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

from pipelines._clips import CutDetector
from pipelines._decode import decoding
from pipelines._ffmpeg import ffmpeg_binary, local_url, run_ffmpeg

Detect = Callable[[Path], tuple[list[int], float]]
RATE = 25
SECONDS = 2
NEAR = 2  # frames
FITTED = (
    "scale=320:240:force_original_aspect_ratio=decrease,pad=320:240:(ow-iw)/2:(oh-ih)/2,"
    f"setsar=1,fps={RATE},tpad=stop=-1:stop_mode=clone,trim=duration={SECONDS},format=yuv420p"
)
ENCODED = ("-an", "-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-g", "250")


def make(videos: list[Path], path: Path) -> None:
    """Write the recording."""
    names = []
    for number, video in enumerate(videos):
        part = path.with_name(f"{path.stem}-{number}.mp4")
        run_ffmpeg(["-i", local_url(video), "-vf", FITTED, *ENCODED, "-y", local_url(part)])
        names.append(f"file {part.name}\n")
    listed = path.with_suffix(".txt")
    listed.write_text("".join(names))
    run_ffmpeg(["-f", "concat", "-i", str(listed), "-c", "copy", "-y", local_url(path)])
    for number in range(len(videos)):
        path.with_name(f"{path.stem}-{number}.mp4").unlink()


def ours(path: Path) -> tuple[list[int], float]:
    """Numbers of the first frames of scenes, and seconds in the detector."""
    detector, spent, found = CutDetector(), 0.0, []
    binary = ffmpeg_binary()
    with decoding(path, short_edge=256, timeout_seconds=None, binary=binary) as decoded:
        for number, frame in enumerate(decoded):
            luma = frame.planes[: decoded.width * decoded.height]
            began = time.perf_counter()
            if detector.is_cut(luma):
                found.append(number)
            spent += time.perf_counter() - began
    return found, spent


def theirs(name: str) -> Detect:
    """The same of a detector of PySceneDetect with its own settings."""
    import scenedetect
    from scenedetect import detectors

    def detect(path: Path) -> tuple[list[int], float]:
        video = scenedetect.open_video(str(path))
        detector = getattr(detectors, name)()
        spent, found, number = 0.0, list[int](), 0
        while (picture := video.read()) is not False:
            at = video.position
            began = time.perf_counter()
            found += [cut.frame_num for cut in detector.process_frame(at, picture)]
            spent += time.perf_counter() - began
            number += 1
        found += [cut.frame_num for cut in detector.post_process(video.position)]
        return found, spent

    return detect


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--src", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--videos", type=int, default=150)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    videos = sorted(path for path in given.src.rglob("*") if path.suffix in (".avi", ".mp4"))
    detectors: dict[str, Detect] = {"ours (scdet), 10": ours}
    for name in ("ContentDetector", "AdaptiveDetector", "HistogramDetector"):
        detectors[f"PySceneDetect's {name}"] = theirs(name)
    print("| detector | seed | of cuts found | false alarms | ms of a frame |")
    print("|---|---|---|---|---|")
    for seed in map(int, given.seeds.split(",")):
        path = given.work / f"recording{seed}.mp4"
        if not path.exists():
            make(random.Random(seed).sample(videos, given.videos), path)
        frames = given.videos * SECONDS * RATE
        cuts = range(SECONDS * RATE, frames, SECONDS * RATE)
        for name, detect in detectors.items():
            found, spent = detect(path)
            near = sum(any(abs(cut - number) <= NEAR for number in found) for cut in cuts)
            alarms = sum(all(abs(cut - number) > NEAR for cut in cuts) for number in found)
            share = f"{near} of {len(cuts)} ({near / len(cuts):.1%})"
            print(f"| {name} | {seed} | {share} | {alarms} | {1e3 * spent / frames:.2f} |")


if __name__ == "__main__":
    main()
