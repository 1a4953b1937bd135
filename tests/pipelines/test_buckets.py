"""Raw videos in a bucket: the same shards as from a folder, over a bad line, in little space."""

from __future__ import annotations

import errno
import random
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
from PIL import Image

from pipelines import _engine, _prepare, _remote
from pipelines._adapter import Video
from pipelines._config import PrepareConfig
from pipelines._remote import RemoteFile, Spool, outline
from shards import storage
from shards.errors import InputError, TooManyExcluded
from shards.index import tar_members
from tests.data import ROOT
from tests.http_server import serving
from tests.pipelines.made_videos import draw_video
from tests.pipelines.running import driver, errors, hashes, programs_naming, run, wait_until
from tests.pipelines.test_faults import require_done, started
from tests.pipelines.test_lists import tar_of
from tests.pipelines.test_sequences import sequence
from tests.s3_server import bad_line, s3_bucket

H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-g", "25", "-pix_fmt", "yuv420p")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "folder": ("raw/videos", {}),
    "clips": ("raw/recordings", {"clip_seconds": 2, "cut_scenes": True}),
    "frames": ("raw/frames", {"frame_rate": 10}),
    "images": ("raw/frames", {}),
    "list": ("raw/list.csv", {}),
    "wds": ("raw/web", {"name": "web"}),
    "clips in tars": ("raw/web", {"name": "web", "clip_seconds": 0.2}),
    "ucf101": ("raw/ucf", {"frames": None}),
    "got10k": ("raw/got", {"frames": None}),
    "otb100": ("raw/otb", {"frames": None}),
}
DATASETS = {"clips": "folder", "clips in tars": "wds"}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tree for every dataset that is tried."""
    root = tmp_path_factory.mktemp("here")
    raw = root / "raw"
    for name in ("a/0.mp4", "a/1 & ü.avi", "b/2.mkv", "b/3.mp4"):
        draw_video(raw / "videos" / name, frames=12)
    (raw / "videos/b/broken.mp4").write_bytes(b"not a video")
    for name in ("one.mp4", "two.ts", "three.mkv"):
        draw_video(raw / "recordings" / name, frames=150, options=H264)
    rng = np.random.default_rng(0)
    for number in range(8):
        path = raw / f"frames/{'xy'[number % 2]}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(path)
    rows = ["path,label,start,end,note", "videos/a/0.mp4,x,,,n", "videos/b/2.mkv,y,0,0.2,m"]
    rows += [f"recordings/two.ts,{label},{at},{at + 1},{label}" for at, label in enumerate("zxy")]
    (raw / "list.csv").write_text("\n".join([*rows, "videos/b/3.mp4,y,,,", ""]))
    told = {"0.json": b'{"caption": "a dog"}', "0.txt": b"text", "0.cls": b"3"}
    videos = {"0.mp4": raw / "videos/a/0.mp4", "1.mkv": raw / "videos/b/2.mkv"}
    tar_of(raw / "web/00000.tar", {**told, **videos})
    tar_of(raw / "web/00001.tar", {"5.mp4": raw / "videos/b/3.mp4"})
    for group, clip in ((8, 1), (8, 2), (1, 1)):
        name = f"v_Archery_g{group:02d}_c{clip:02d}.avi"
        draw_video(raw / "ucf/UCF-101/Archery" / name, frames=6)
    lists = raw / "ucf/ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n")
    for part in "123":
        train = [f"Archery/v_Archery_g08_c{clip:02d}.avi 1" for clip in (1, 2)]
        (lists / f"trainlist0{part}.txt").write_text("\n".join(train))
        (lists / f"testlist0{part}.txt").write_text("Archery/v_Archery_g01_c01.avi\n")
    sequence(raw / "got/train/GOT-10k_Train_000001", images="")
    (raw / "got/train/list.txt").write_text("GOT-10k_Train_000001\n")
    sequence(raw / "otb/Crossing")
    for folder in ("frames/y", "otb/Crossing/img", "got/train/GOT-10k_Train_000001"):
        (raw / folder / "Thumbs.db").write_bytes(b"of a file manager")
    return root


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, which is empty in the end; short, for sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="s") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def bucket(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same folder in a bucket; the waits between tries are short."""
    monkeypatch.setattr(storage, "_FIRST_WAIT_SECONDS", 0.01)
    with s3_bucket(monkeypatch) as address:
        fsspec.filesystem("s3").put(f"{here / 'raw'}/", f"{address}/raw/", recursive=True)
        yield address


def settings(case: str) -> dict[str, Any]:
    return {"dataset": DATASETS.get(case, case), "max_failures": 50, **CASES[case][1]}


@pytest.fixture(scope="module")
def whole(here: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What is made of the folder."""
    out = tmp_path_factory.mktemp("whole")
    for case, (src, _) in CASES.items():
        run(here / src, out / case, **settings(case))
    return {case: hashes(out / case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes_over_a_bad_line(
    case: str,
    bucket: str,
    whole: dict[str, dict[str, str]],
    tmp_path: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    src = f"{bucket}/{CASES[case][0]}"
    for fault in ("drop", "error"):
        with bad_line(monkeypatch, fault) as line:
            line.every = 5 if case == "folder" else 7  # requests; few are made of small files
            run(src, tmp_path / fault, **settings(case))
            assert line.spoilt
        assert hashes(tmp_path / fault) == whole[case]
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("kills", [0, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize("case", CASES)
def test_two_workers_of_every_dataset(case: str, kills: int, here: Path, tmp_path: Path) -> None:
    src, out = here / CASES[case][0], tmp_path / "out"
    given = {"frames": 4, **settings(case), "videos_per_shard": 1}
    run(src, tmp_path / "one", **given)
    command = driver(src, out, 2, **given)
    rng = random.Random(case)
    for _ in range(kills):
        process = started(command)
        if rng.random() < 0.8:  # later than the imports
            wait_until(lambda: out.exists() or process.poll() is not None)  # noqa: B023
        signal.sigtimedwait([], 0.8 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_until(lambda: not programs_naming(out))
    require_done(command)
    assert hashes(out) == hashes(tmp_path / "one")


def test_two_workers_killed_at_any_moment(
    bucket: str, whole: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = {**settings("clips"), "frames": 4, "videos_per_shard": 240}
    command = driver(f"{bucket}/{CASES['clips'][0]}", out, 2, **given)
    rng = random.Random(3)
    for _ in range(3):
        process = started(command)
        wait_until(lambda: out.exists() or process.poll() is not None)  # noqa: B023
        signal.sigtimedwait([], rng.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_until(lambda: not programs_naming(out))
    require_done(command)
    assert hashes(out) == whole["clips"]


def test_a_node_of_a_cluster_has_a_spool_of_its_own(
    bucket: str,
    whole: dict[str, dict[str, str]],
    tmp_path: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def on_nodes(plans: Any, workers: int, on_shard: Any, on_progress: Any) -> None:
        for plan in plans:
            there = replace(plan, spool=replace(plan.spool, folder="/not/on/this/node"))
            on_shard(plan, _engine._build_on_node(there, 1))

    (scratch / "seco-spool-killed").mkdir()
    (scratch / "seco-spool-killed/.lock").touch()
    monkeypatch.setattr(_prepare, "build_shards", on_nodes)
    run(f"{bucket}/{CASES['folder'][0]}", tmp_path / "out", **settings("folder"))
    assert hashes(tmp_path / "out") == whole["folder"]
    assert not list(scratch.iterdir())


def test_a_list_elsewhere_than_its_videos(
    bucket: str, here: Path, whole: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    root = f"{bucket}/raw"
    run(here / "raw/list.csv", tmp_path / "root", **settings("list"), root=root)
    assert hashes(tmp_path / "root") == whole["list"]
    addresses = tmp_path / "list.csv"
    text = (here / "raw/list.csv").read_text()
    for folder in ("videos", "recordings"):
        text = text.replace(f"{folder}/", f"{root}/{folder}/")
    addresses.write_text(text + f"{root}/videos/no.mp4,y,,,\n")
    run(addresses, tmp_path / "below", **settings("list"), root=root)
    assert errors(tmp_path / "below/list.errors.csv") == [("videos/no.mp4", "missing")]
    with pytest.raises(InputError, match=r"line 2: s3://.* is an address — give what it begins wi"):
        run(addresses, tmp_path / "no", **settings("list"))
    run(addresses, tmp_path / "any", **settings("list"), allow_outside=True)
    assert {source for source, _ in errors(tmp_path / "any/list.errors.csv")} == {
        f"{root}/videos/no.mp4"
    }


@pytest.mark.parametrize("path", ["../x.mp4", "a/../../x.mp4", "/etc/x.mp4", ".."])
def test_paths_of_a_list_that_lead_out_of_a_bucket(tmp_path: Path, path: str) -> None:
    (tmp_path / "list.csv").write_text(f"path\n{path}\n")
    with pytest.raises(InputError, match=r"line 2: .* leads out of s3://bucket/videos"):
        run(tmp_path / "list.csv", tmp_path / "out", dataset="list", root="s3://bucket/videos")


@pytest.mark.parametrize("path", ["http::s3://x/y.mp4", "pipe:1", "subfile:,x", "file:///etc/x"])
def test_addresses_of_a_list_that_are_none(tmp_path: Path, path: str) -> None:
    (tmp_path / "list.csv").write_text(f'path\n"{path}"\n')
    with pytest.raises(InputError, match=r"line 2: .* is an address, not a path"):
        run(tmp_path / "list.csv", tmp_path / "out", dataset="list", allow_outside=True)


def test_an_outage_is_no_fault_of_the_videos(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_LONGEST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)  # ours are enough: a minute less
    fetch = _remote._part

    def part(*given: Any) -> bytes:
        line.fault = "gone"  # once the first video is wanted
        return fetch(*given)

    monkeypatch.setattr(_remote, "_part", part)
    with bad_line(monkeypatch, "drop") as line:
        line.every = 10**9
        with pytest.raises(InputError, match=r"videos/./.*: cannot be reached"):
            run(f"{bucket}/raw/videos", tmp_path / "out", max_failures=100)
    assert not list((tmp_path / "out").glob("*.idx"))
    monkeypatch.setattr(_remote, "_part", fetch)
    run(f"{bucket}/raw/videos", tmp_path / "out", max_failures=50)


def test_what_is_not_there(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"s3://.*/nothing: there is no such folder"):
        run(f"{bucket}/nothing", tmp_path / "out")
    with pytest.raises(InputError, match=r"s3://.*/raw/frames: holds no videos"):
        run(f"{bucket}/raw/frames", tmp_path / "out")
    with pytest.raises(InputError, match=r"no.csv: is not at its address"):
        run(f"{bucket}/no.csv", tmp_path / "out", dataset="list")
    with pytest.raises(InputError, match="nothing://x: cannot be opened"):
        run("nothing://x", tmp_path / "out")


def test_the_spool_has_a_limit(here: Path, bucket: str, tmp_path: Path) -> None:
    names = sorted(path.name for path in (here / "raw/recordings").iterdir())
    sizes = {name: (here / "raw/recordings" / name).stat().st_size for name in names}
    folder = tmp_path / "spool"
    spool = Spool(str(folder), max(sizes.values()) + 1000)

    def video(name: str, span: tuple[float, float] | None = (0, 1)) -> Video:
        address = f"{bucket}/raw/recordings/{name}"
        return Video(source=name, path=Path(name), address=address, span=span)

    def held() -> int:
        files = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*")
                 if path.is_file()}  # fmt: skip
        return sum(files.values())

    for name in [*names, *names]:
        with spool.at_hand(video(name)) as local:
            assert local.path.name == name and local.address is None
            assert local.path.read_bytes() == (here / "raw/recordings" / name).read_bytes()
            assert held() <= spool.limit_bytes
    # What is in use stays, and its space is not given to another.
    *_, second, largest = sorted(names, key=sizes.__getitem__)
    with spool.at_hand(video(largest)) as local:
        cache = _remote._Cache(folder, spool.limit_bytes, {"x": _remote._Size(sizes[second])})
        assert cache.fetch("x", wait=False) is None
        assert local.path.exists()
    with spool.at_hand(video(names[1], None)):
        pass
    assert not list(folder.glob("*.tar"))  # a short video is wanted once
    with (
        pytest.raises(InputError, match=r"--spool-gb: .* is less than the largest file"),
        Spool(str(folder), 1000).at_hand(video(names[0])),
    ):
        pass


@pytest.mark.parametrize("name", ["one.mp4", "two.ts", "three.mkv"])
def test_headers_are_enough_to_plan(
    here: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(_remote, "_END_BYTES", 8_000)
    path = here / "raw/recordings" / name
    with outline(Video(source=name, path=path, address=f"{bucket}/raw/recordings/{name}")) as head:
        assert head.path.stat().st_size == path.stat().st_size > 20_000
        assert head.path.read_bytes() != path.read_bytes()  # not all of it was fetched
        from pipelines._clips import duration_of
        from pipelines._ffmpeg import ffmpeg_binary

        found = duration_of(head.path, ffmpeg_binary())
    assert found == duration_of(path, ffmpeg_binary()) == pytest.approx(6.0, abs=0.1)


def test_only_the_headers_of_a_tar_are_read(
    bucket: str, here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    big = tmp_path / "big.tar"
    tar_of(big, {f"{n}.mp4": bytes(300_000) for n in range(5)})
    fsspec.filesystem("s3").put_file(str(big), f"{bucket}/big.tar")
    taken: list[int] = []
    fetch = _remote._part

    def part(address: str, first: int, last: int) -> bytes:
        taken.append(last - first)
        return fetch(address, first, last)

    monkeypatch.setattr(_remote, "_part", part)
    from shards.index import members_of

    found = list(members_of(RemoteFile(f"{bucket}/big.tar"), "big.tar"))
    assert found == list(tar_members(big))
    assert sum(taken) < 500_000


def test_names_from_elsewhere_stay_in_their_folder(tmp_path: Path) -> None:
    good = draw_video(tmp_path / "a.mp4").read_bytes()
    store = fsspec.filesystem("memory")
    store.store.clear()
    names = ("ok.mp4", "../../escape.mp4", "x/../../../escape.mp4", "x//y.mp4", "a\0b.mp4")
    for name in (*names, "n" * 300 + ".mp4", "ok.mp4/inside.mp4"):
        file = fsspec.implementations.memory.MemoryFile(store, f"/set/{name}", good)
        store.store[f"/set/{name}"] = file
    here = tmp_path / "deep/er/set"
    assert len(_remote.mirror("memory://set", here)) == 6
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert found == [tmp_path / "a.mp4", here / "ok.mp4"]
    store.store.clear()


class Web(BaseHTTPRequestHandler):
    """Files by range, but for those whose names are other answers (get-403: to a GET only)."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.asked.append(self.path)
        path = self.root / unquote(self.path).lstrip("/")
        told = path.stem.removeprefix("get-")
        refused = told.isdecimal() and (body or told == path.stem) and len(told) == 3
        status = 200 if path.is_file() else int(told) if refused else 404
        data = path.read_bytes() if path.is_file() else b""
        if told != path.stem and not body:
            status, data = 200, bytes(100)
        size = len(data)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and status == 200:
            status, data = 206, data[int(span[1]) : int(span[2] or size) + 1]
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def web(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(storage, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(storage, "_LONGEST_WAIT_SECONDS", 0.01)
    with serving(type("Handler", (Web,), {"root": here, "asked": []})) as url:
        yield f"{url}/raw"


def test_a_list_on_the_web(web: str, whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    run(f"{web}/list.csv", tmp_path / "out", **settings("list"))
    assert hashes(tmp_path / "out") == whole["list"]
    with pytest.raises(InputError, match="folders of a web server cannot be listed"):
        run(f"{web}/videos", tmp_path / "folder")
    (tmp_path / "list.csv").write_text(
        "path\nvideos/a/1 & ü.avi\nvideos/b/3.mp4\nvideos/403.mp4\nvideos/no.mp4\nvideos/a#b.mp4\n"
        "videos/451.mp4\nvideos/get-403.mp4\nvideos/get-410.mp4\nvideos/get-451.mp4\n"
    )
    run(tmp_path / "list.csv", tmp_path / "some", dataset="list", root=web, max_failures=80)
    assert sorted(errors(tmp_path / "some/list.errors.csv")) == [
        ("videos/403.mp4", "unreadable"),
        ("videos/451.mp4", "unreadable"),
        ("videos/a#b.mp4", "missing"),
        ("videos/get-403.mp4", "unreadable"),
        ("videos/get-410.mp4", "missing"),
        ("videos/get-451.mp4", "unreadable"),
        ("videos/no.mp4", "missing"),
    ]


def test_an_outage_of_a_web_server(web: str, tmp_path: Path) -> None:
    for status in ("429", "503", "get-429", "get-503"):
        (tmp_path / "list.csv").write_text(f"path\nvideos/{status}.mp4\n")
        with pytest.raises(InputError, match=rf"{status}.mp4: cannot be reached"):
            run(tmp_path / "list.csv", tmp_path / "out", dataset="list", root=web)
    (tmp_path / "list.csv").write_text("path\nvideos/a/0.mp4\n")
    nobody = "http://127.0.0.1:9/raw"
    with pytest.raises(InputError, match=r"0.mp4: cannot be reached"):
        run(tmp_path / "list.csv", tmp_path / "out", dataset="list", root=nobody)


@pytest.mark.parametrize("path", ["%2e%2e/x.mp4", "a/..%2f%2e%2e/x.mp4", "a::s3://b/x.mp4"])
def test_addresses_that_lead_out_in_disguise(tmp_path: Path, path: str) -> None:
    (tmp_path / "list.csv").write_text(f"path\nhttps://host/videos/{path}\n")
    with pytest.raises(InputError, match=r"line 2: .* leads out of"):
        run(tmp_path / "list.csv", tmp_path / "out", dataset="list", root="https://host/videos")


def test_a_picture_that_is_not_there_excludes_its_folder(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files_below = _remote._files_below

    def gone(address: str) -> list[tuple[str, str, int]]:
        found = files_below(address)
        if address.endswith("/x"):  # once the plan is made
            fsspec.filesystem("s3").rm_file(found[-1][1])
        return found

    monkeypatch.setattr(_remote, "_files_below", gone)
    run(f"{bucket}/raw/frames", tmp_path / "out", dataset="frames", max_failures=50)
    assert errors(tmp_path / "out/frames.errors.csv") == [("x", "missing")]


def test_what_killed_workers_had_in_use_makes_way(bucket: str, tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "spool"), 70_000)

    def video(name: str) -> Video:
        address = f"{bucket}/raw/recordings/{name}"
        return Video(source=name, path=Path(name), address=address, span=(0, 1))

    with spool.at_hand(video("two.ts")) as local:
        dead = local.path.parent.with_name("use-dead")
        dead.mkdir()
        (dead / ".lock").touch()
        (dead / "two.ts").hardlink_to(local.path)
    with spool.at_hand(video("one.mp4")), spool.at_hand(video("three.mkv")):
        pass  # together more than there is beside the dead one's
    assert not dead.exists()


def test_another_run_leaves_the_spool_alone(bucket: str, tmp_path: Path) -> None:
    config = PrepareConfig(dataset="folder", src=f"{bucket}/raw/videos", out=str(tmp_path / "out"))
    killed = Path(tempfile.mkdtemp(prefix="seco-spool-"))
    (killed / ".lock").touch()
    with _remote.spooled(config) as spool:
        run(f"{bucket}/raw/videos", tmp_path / "out", dry_run=True)
        assert Path(spool.folder).is_dir() and not killed.exists()
    assert not Path(spool.folder).exists()


def test_a_fragmented_recording_has_its_whole_length(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_remote, "_END_BYTES", 4_000)
    flags = ("-movflags", "frag_keyframe+empty_moov")
    draw_video(tmp_path / "raw/x.mp4", frames=150, options=(*H264, *flags))
    fsspec.filesystem("s3").put_file(str(tmp_path / "raw/x.mp4"), f"{bucket}/f/raw/x.mp4")
    run(tmp_path / "raw", tmp_path / "here", clip_seconds=1)
    run(f"{bucket}/f/raw", tmp_path / "there", clip_seconds=1)
    assert hashes(tmp_path / "there") == hashes(tmp_path / "here")


def test_a_file_here_says_nothing_about_one_elsewhere(
    bucket: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.csv").write_text("path\n3.mp4\n")
    (tmp_path / "3.mp4").write_bytes(b"another")
    monkeypatch.chdir(tmp_path)
    run(Path("list.csv"), "out", dataset="list", root=f"{bucket}/raw/videos/b")
    assert not Path("out/list.errors.csv").exists()
    run(Path("list.csv"), "out", dataset="list", root=f"{bucket}/raw/videos/b")


def test_a_full_disk_is_no_odd_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pipe_file("/set/a.mp4", b"x")

    def full(*given: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(InputError, match="No space left on device"):
        _remote.mirror("memory://set", tmp_path / "here")
    store.store.clear()


def test_a_dry_run_reads_headers(
    bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(f"{bucket}/raw/videos", tmp_path / "out", dry_run=True)
    said = capfd.readouterr().err
    assert "videos: 5 videos, 2 labels" in said and "(from 4 videos)" in said
    assert not (tmp_path / "out").exists()


def test_too_many_that_may_not_be_read(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\nno/1.mp4\nraw/videos/a/0.mp4\n")
    with pytest.raises(TooManyExcluded):
        run(tmp_path / "list.csv", tmp_path / "out", dataset="list", root=bucket)
    fsspec.filesystem("s3").cp_file(f"{bucket}/raw/videos/b/3.mp4", f"{bucket}/no/1.mp4")
    run(tmp_path / "list.csv", tmp_path / "out", dataset="list", root=bucket, retry_failed=True)
    assert not (tmp_path / "out/list.errors.csv").exists()


def test_ctrl_c_while_fetching(bucket: str, tmp_path: Path, scratch: Path) -> None:
    command = driver(f"{bucket}/raw/recordings", tmp_path / "out", 2, clip_seconds=1)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: bool(list(scratch.glob("seco-spool-*/use-*"))) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate()
    assert said.startswith(("Stopped", "done")), error
    assert "Traceback" not in error
    assert not list(scratch.iterdir())
