"""Weights by name: fetched once, resumed, checked against published and recorded digests."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

import cli
from seco.checkpoints import named
from seco.checkpoints.convert import read_weights
from seco.checkpoints.io import load_checkpoint
from seco.checkpoints.named import NAMES, NamedWeights, fetch_weights, named_weights, weights_file
from seco.checkpoints.weights import load_backbone
from seco.evaluation.compare import parse_encoders
from seco.evaluation.query import encode_frames
from seco.features.store import read_features
from seco.report.results import run_of
from shards import storage
from shards.errors import InputError
from tests import commands
from tests.data import ROOT
from tests.http_server import serving
from tests.made_shards import drawn_frame, make_set
from tests.seco.test_foreign_checkpoints import moco, saved, whole_network

PATH = "/models/file-of.weights.pth"


@dataclass
class Site:
    """What the server has, what it does wrong, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    tags: bool = True  # send an ETag
    ranges: bool = True  # answer ranges
    lengths: bool = True  # send Content-Length
    shift: int = 0  # say that a range begins this much later
    drops: list[int] = field(default_factory=list)  # of each answer in turn, close after n bytes
    codes: list[int] = field(default_factory=list)  # of each answer in turn, the HTTP code
    redirects: dict[str, str] = field(default_factory=dict)
    before: Callable[[str], None] = lambda path: None  # called with the path of each request
    asked: list[tuple[str, str]] = field(default_factory=list)  # (path, range)
    url: str = ""

    @property
    def ranges_asked(self) -> list[str]:
        """The range of each request for a file."""
        return [ranges for path, ranges in self.asked if path in self.files]


class Handler(BaseHTTPRequestHandler):
    """A web server as object stores are, with faults on demand."""

    site: Site

    def do_GET(self) -> None:
        site, path = self.site, urlsplit(self.path).path
        site.asked.append((path, self.headers.get("Range", "")))
        site.before(path)
        code = site.codes.pop(0) if site.codes else 200
        if path in site.redirects:
            self.send_response(302)
            self.send_header("Location", site.redirects[path])
            self.end_headers()
            return
        data = site.files.get(path)
        if data is None or code != 200:
            self.send_error(404 if data is None else code)
            return
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        start = self._start(tag)
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if site.tags:
            self.send_header("ETag", tag)
        if start:
            self.send_header("Content-Range", f"bytes {start + site.shift}-{len(data) - 1}/*")
        if site.lengths:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        sent = data[start:]
        self.wfile.write(sent[: site.drops.pop(0)] if site.drops else sent)

    def _start(self, tag: str) -> int:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", tag) == tag
        return int(found[1]) if found and same and self.site.ranges else 0

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(storage, "_FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(storage, "_LONGEST_WAIT_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    made = Site(files={PATH: b"PK\3\4" + np.random.default_rng(0).bytes(2_999_996)})
    with serving(type("Of", (Handler,), {"site": made})) as made.url:
        yield made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder of weights, not made yet."""
    monkeypatch.setenv("SECO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def entry(site: Site, published: tuple[str, str] | None = None, path: str = PATH) -> NamedWeights:
    return NamedWeights(
        name="some-weights",
        arch="resnet18",
        url=site.url + path,
        published=published,
        licence="of nobody",
        citation="nobody, 2021",
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def refused(weights: NamedWeights) -> str:
    """The error of a fetch, which is one line."""
    with pytest.raises(InputError) as caught:
        fetch_weights(weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Fetching.


@pytest.mark.parametrize("algorithm", ["sha256", "md5", None])
def test_a_file_is_fetched_once_and_shown(
    algorithm: str | None, site: Site, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = site.files[PATH]
    published = (algorithm, hashlib.new(algorithm, data).hexdigest()[:8]) if algorithm else None
    weights = entry(site, published)
    path = fetch_weights(weights)
    assert path == weights.file == cache / "file-of.weights.pth"
    assert path.read_bytes() == data
    said = capsys.readouterr().err
    assert f"sha256 {sha256(data)}, recorded" in said
    assert "licence: of nobody; cite nobody, 2021" in said
    assert "3/3 MB" in said
    assert ("no digest is published" in said) == (algorithm is None)
    record = Path(f"{path}.sha256").read_text()
    assert record == f"{sha256(data)}  file-of.weights.pth\n"  # as sha256sum writes it
    assert fetch_weights(weights) == path
    assert capsys.readouterr().err == ""
    assert len(site.asked) == 1
    assert sorted(p.suffix for p in cache.iterdir()) == [".lock", ".pth", ".sha256"]


def test_a_cut_connection_is_resumed_where_it_ended(site: Site, cache: Path) -> None:
    site.drops = [1_000_000, 500_000]
    path = fetch_weights(entry(site))
    assert path.read_bytes() == site.files[PATH]
    assert site.ranges_asked == ["", "bytes=1000000-", "bytes=1500000-"]


def test_a_later_call_continues_what_an_earlier_one_left(site: Site, cache: Path) -> None:
    site.drops, site.codes = [2_000_000], [200, 503, 503, 503, 503]
    message = refused(entry(site))
    assert "503" in message
    part = cache / "file-of.weights.pth.part"
    assert part.stat().st_size == 2_000_000
    site.asked.clear()
    assert fetch_weights(entry(site)).read_bytes() == site.files[PATH]
    assert site.ranges_asked == ["bytes=2000000-"]


@pytest.mark.parametrize("how", ["another version", "no ranges", "another range", "no tag"])
def test_a_part_that_cannot_be_continued_is_fetched_again(
    how: str, site: Site, cache: Path
) -> None:
    site.tags, site.ranges = how != "no tag", how != "no ranges"
    site.shift = int(how == "another range")
    site.drops, site.codes = [2_000_000], [200, 503, 503, 503, 503]
    refused(entry(site))
    if how == "another version":
        site.files[PATH] = b"PK\3\4" + site.files[PATH][:3:-1]
    assert fetch_weights(entry(site)).read_bytes() == site.files[PATH]


def test_a_whole_part_is_not_fetched_again(site: Site, cache: Path) -> None:
    """As left by a process that was killed right after the last byte."""
    site.drops, site.codes = [2_000_000], [200, 503, 503, 503, 503]
    refused(entry(site))
    (cache / "file-of.weights.pth.part").write_bytes(site.files[PATH])
    assert fetch_weights(entry(site)).read_bytes() == site.files[PATH]
    assert site.ranges_asked[-1] == "bytes=3000000-"
    assert not list(cache.glob("*.part*"))


def test_a_part_longer_than_the_file_is_fetched_again(site: Site, cache: Path) -> None:
    site.drops, site.codes = [2_000_000], [200, 503, 503, 503, 503]
    refused(entry(site))
    (cache / "file-of.weights.pth.part").write_bytes(site.files[PATH] + b"more")
    assert fetch_weights(entry(site)).read_bytes() == site.files[PATH]


def test_a_download_that_stays_truncated_is_refused(site: Site, cache: Path) -> None:
    site.drops = [10, 10, 10, 10, 10]
    assert "ended after 50 of 3000000 bytes" in refused(entry(site))
    assert not (cache / "file-of.weights.pth").exists()


def test_what_the_server_lacks_is_not_tried_again(site: Site, cache: Path) -> None:
    message = refused(entry(site, path="/models/none.pth"))
    assert "HTTP 404" in message
    assert f"{site.url}/models/none.pth" in message
    assert f"put the file at {cache}/none.pth" in message
    assert len(site.asked) == 1


def test_redirects_stay_on_the_web(site: Site, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    site.redirects = {
        "/file": f"file://{tmp_path}/secret",
        "/ftp": "ftp://127.0.0.1/secret",
        "/plain": "http://example.com/secret",
        "/round": "/round",
        "/moved": PATH,
    }
    for path in ("/file", "/ftp", "/plain", "/round"):
        refused(entry(site, path=path))
        assert not (cache / path[1:]).exists()
    assert fetch_weights(entry(site, path="/moved")).read_bytes() == site.files[PATH]
    for url in ("http://example.com/x", "file:///etc/passwd", "ftp://example.com/x", "x"):
        assert "is not an https address" in refused(replace(entry(site), url=url))


@pytest.mark.parametrize("lengths", [True, False])
def test_a_file_larger_than_the_bound_is_refused(
    lengths: bool, site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.lengths = lengths
    monkeypatch.setattr(named, "_MOST_BYTES", 2_999_999)
    assert "the limit is 3 MB" in refused(entry(site))
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]
    assert len(site.asked) == 1
    monkeypatch.setattr(named, "_MOST_BYTES", 3_000_000)
    assert fetch_weights(entry(site)).read_bytes() == site.files[PATH]


def test_without_a_network_one_line_says_what_to_do(site: Site, cache: Path) -> None:
    weights = replace(entry(site, ("sha256", sha256(site.files[PATH])[:8])), url=f"{site.url}9/x")
    nowhere = replace(weights, url="http://127.0.0.1:9/models/file-of.weights.pth")
    message = refused(nowhere)
    assert nowhere.url in message
    assert f"put the file at {cache}/file-of.weights.pth" in message
    nowhere.file.write_bytes(b"another file")
    assert "is not the published file" in refused(nowhere)
    assert not nowhere.file.exists()
    nowhere.file.write_bytes(site.files[PATH])
    assert fetch_weights(nowhere) == nowhere.file
    assert Path(f"{nowhere.file}.sha256").is_file()


def test_a_full_or_closed_disk_is_one_line(site: Site, cache: Path, tmp_path: Path) -> None:
    cache.parent.write_text("a file where the cache should be")
    assert "cannot be written" in refused(entry(site))


# Digests.


def test_a_wrong_digest_is_refused_and_the_file_deleted(site: Site, cache: Path) -> None:
    weights = entry(site, ("md5", "01234567"))
    assert "does not begin with 01234567; it was deleted" in refused(weights)
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]


def test_a_page_instead_of_a_file_is_not_recorded(site: Site, cache: Path) -> None:
    whole, site.files[PATH] = site.files[PATH], b"<html>Please log in</html>"
    assert "is not a file of torch; it was deleted" in refused(entry(site))
    site.files[PATH] = whole
    assert fetch_weights(entry(site)).read_bytes() == whole


@pytest.mark.parametrize("published", [True, False])
def test_a_file_is_compared_with_the_first_download_ever_after(
    published: bool, site: Site, cache: Path
) -> None:
    data = site.files[PATH]
    weights = entry(site, ("md5", hashlib.md5(data).hexdigest()[:8]) if published else None)
    path = fetch_weights(weights)
    path.write_bytes(data[:-1])
    refused(weights)
    assert not path.exists()
    assert fetch_weights(weights).read_bytes() == data
    path.unlink()
    site.files[PATH] = b"\x80 its publisher has replaced it"
    message = refused(weights)
    assert not path.exists()
    if not published:
        assert sha256(data) in message
        assert f"delete {path}.sha256" in message
        Path(f"{path}.sha256").unlink()
        assert fetch_weights(weights).read_bytes() == site.files[PATH]


# Processes.

FETCH = """
import sys, urllib.request
from seco.checkpoints import named
named.say = lambda text: urllib.request.urlopen({url!r} + "/said/" + text.split()[1]).close()
weights = named.NamedWeights(name="w", arch="", url={url!r} + {path!r}, published=None, licence="",
                             citation="")
print(named.fetch_weights(weights))
"""


def test_of_two_processes_one_fetches(site: Site, cache: Path) -> None:
    """The server answers when the second process has reported that it waits."""
    asked, waits = threading.Event(), threading.Event()

    def before(path: str) -> None:
        if path == "/said/waiting":
            waits.set()
        elif path == PATH:
            asked.set()
            assert waits.wait(600)

    site.before = before
    code = FETCH.format(url=site.url, path=PATH)
    site.files |= {"/said/waiting": b"-", "/said/w:": b"-"}
    first = commands.start("-c", code)
    assert asked.wait(600)
    second = commands.start("-c", code)
    for process in (first, second):
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert out.strip() == str(cache / "file-of.weights.pth")
    assert [path for path, _ in site.asked].count(PATH) == 1
    assert Path(out.strip()).read_bytes() == site.files[PATH]


INTERRUPTED = """
import dataclasses
import cli
from seco.checkpoints import named
named._OTHERS = (dataclasses.replace(named._OTHERS[0], name="moco-v2", url={url!r} + {path!r},
                                     published=None),)
cli.main(["import", "moco-v2", "--out", "out.pt"])
"""


def test_a_download_stopped_by_a_signal_is_continued(
    site: Site, cache: Path, tmp_path: Path
) -> None:
    asked, stopped = threading.Event(), threading.Event()

    def before(path: str) -> None:
        if len(site.asked) == 2:
            asked.set()
            assert stopped.wait(600)

    site.before, site.drops = before, [1_000_000]
    code = INTERRUPTED.format(url=site.url, path=PATH)
    process = commands.start("-c", code, cwd=tmp_path)
    assert asked.wait(600)
    process.terminate()
    _, err = process.communicate(timeout=600)
    stopped.set()
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert (cache / "file-of.weights.pth.part").stat().st_size == 1_000_000
    site.drops, site.before = [], lambda path: None
    assert fetch_weights(entry(site)).read_bytes() == site.files[PATH]
    assert site.ranges_asked[-1] == "bytes=1000000-"


# Names.


def test_every_torchvision_architecture_with_weights_has_an_address() -> None:
    found = named_weights("imagenet-v1")
    assert found is not None
    assert (found.arch, found.url.rpartition("/")[2]) == ("resnet50", "resnet50-0676ba61.pth")
    assert found.published == ("sha256", "0676ba61")
    for source, arch in (("imagenet-v1:resnet18", None), ("imagenet-v1", "resnet18")):
        found = named_weights(source, arch)
        assert found is not None
        assert found.url == "https://download.pytorch.org/models/resnet18-f37072fd.pth"
        assert found.published == ("sha256", "f37072fd")
    for arch in ("resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"):
        for name in ("imagenet-v1", "imagenet-v2"):
            found = named_weights(name, arch)
            assert found is not None
            assert found.published is not None
            assert re.fullmatch(r"[0-9a-f]{8}", found.published[1])
            assert found.url.startswith("https://")


def test_mistakes_are_found_before_anything_is_fetched() -> None:
    for source, arch, message in (
        ("imagenet-v2", "resnet18", "no such weights for resnet18 — there are for resnet50, "),
        ("imagenet-v1", "resnet10_w16", "no such weights for resnet10_w16"),
        ("imagenet-v1", "resnet19", "unknown architecture 'resnet19'"),
        ("imagenet-v1:resnet19", None, "unknown architecture 'resnet19'"),
        ("imagenet-v1:resnet18", "resnet50", "are weights of a resnet18, not of a resnet50"),
        ("moco-v2", "resnet18", "are weights of a resnet50, not of a resnet18"),
        ("vclr:resnet18", None, "are weights of a resnet50, not of a resnet18"),
    ):
        with pytest.raises(InputError, match=message):
            named_weights(source, arch)
    with pytest.raises(InputError, match="moco_v2: no such file — give a path, or a name: image"):
        load_backbone("moco_v2")


def test_a_name_is_no_path_and_a_path_is_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("moco-v2"), whole_network("resnet18"))
    for source in ("./moco-v2", Path("moco-v2"), str(tmp_path / "moco-v2")):
        assert load_backbone(source).arch == "resnet18"
        assert weights_file(source) == (Path(source), None)
    (spec,) = parse_encoders(["./moco-v2"], None)
    assert (spec.name, spec.source) == ("moco-v2", "./moco-v2")
    assert named_weights("moco-v2.pth") is None


def test_weights_given_by_name_are_of_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report in a run's folder does not take them for the run's."""
    monkeypatch.chdir(tmp_path)
    runs: Any = [SimpleNamespace(folder=Path("."))]
    assert run_of({"checkpoint": "last.pt"}, runs) is runs[0]
    found = named_weights("moco-v2")
    assert found is not None
    assert run_of({"checkpoint": "moco-v2", **found.record()}, runs) is None


def test_the_cache_is_where_it_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SECO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named.cache_folder() == tmp_path / ".cache" / "seco"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert named.cache_folder() == tmp_path / ".cache" / "seco"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert named.cache_folder() == Path("/somewhere/seco")
    monkeypatch.setenv("SECO_CACHE", "here")
    assert named.cache_folder() == Path("here")


def test_the_document_has_the_table() -> None:
    text = (ROOT / "docs/checkpoints.md").read_text("utf-8")
    for name in NAMES:
        weights = named_weights(name)
        assert weights is not None
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert weights.licence in row
        assert weights.citation in row
        if name.startswith("imagenet"):
            assert f"torchvision's `{named._IMAGENET[name]}`" in row
        else:
            assert weights.url in row
            digest = f"{weights.published[0]} `{weights.published[1]}" if weights.published else ""
            assert (digest or "recorded at the first download") in row


# Commands.

SMALL = ["--crop-size", "32", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def published(site: Site, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """ImageNet weights of ResNet-18, MoCo v2 as well, on the test's server."""
    weights = saved(tmp_path / "w", whole_network("resnet18")).read_bytes()
    path = f"/models/resnet18-{sha256(weights)[:8]}.pth"
    site.files[path] = weights
    site.files["/moco.pth.tar"] = saved(tmp_path / "w", moco("resnet18", size=96)).read_bytes()
    monkeypatch.setattr(named, "_torchvisions", lambda *_: SimpleNamespace(url=site.url + path))
    (real,) = (weights for weights in named._OTHERS if weights.name == "moco-v2")
    md5 = hashlib.md5(site.files["/moco.pth.tar"]).hexdigest()[:8]
    ours = replace(real, arch="resnet18", url=f"{site.url}/moco.pth.tar", published=("md5", md5))
    monkeypatch.setattr(named, "_OTHERS", (ours,))
    return site


def test_a_file_of_another_architecture_is_not_taken(published: Site, tmp_path: Path) -> None:
    there = named.fetch_weights(named._OTHERS[0])
    other = saved(tmp_path / "w", moco("resnet34", size=96))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(named, "fetch_weights", lambda weights: other)
        with pytest.raises(InputError, match="holds a resnet34, not the resnet18 of moco-v2"):
            load_backbone("moco-v2")
    assert load_backbone("moco-v2").arch == "resnet18" and there.is_file()


@pytest.mark.parametrize("name", ["imagenet-v1", "moco-v2"])
def test_pretrain_starts_from_a_name(
    name: str, published: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_set(tmp_path / "shards", videos=8, frames=4)
    run = tmp_path / "run"
    command = ["pretrain", "--shards", shards, "--out", str(run), "--init", name, *SMALL]
    command += ["--arch", "resnet18", "--batch-size", "4", "--queue-size", "8", "--epochs", "1"]
    assert cli.run([*command, "--loggers", "none"]) == 0
    said = capsys.readouterr().err
    (line,) = (line for line in said.splitlines() if "--init" in line)
    licence = "CC BY-NC 4.0" if name == "moco-v2" else "not stated"
    assert line.startswith(f"seco pretrain: --init {name} (licence: {licence}")
    assert "loaded the backbone" in line
    assert f'init = "{name}"' in (run / "config.toml").read_text()
    assert load_checkpoint(run / "last.pt")["step"] == 2
    assert cli.run([*command, "--loggers", "none", "--arch", "resnet34"]) == 1


def test_features_name_their_weights_and_are_made_again_from_them(
    published: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_set(tmp_path / "shards", videos=4, frames=3)
    out = tmp_path / "features"
    command = ["extract-features", "--shards", shards, "--checkpoint", "imagenet-v1", *SMALL]
    command += ["--arch", "resnet18", "--frames", "2", "--short-edge", "36", "--out", str(out)]
    assert cli.run(command) == 0
    encoder = json.loads((out / "meta.json").read_text())["encoder"]
    assert (encoder["checkpoint"], encoder["arch"]) == ("imagenet-v1", "resnet18")
    assert encoder["url"].startswith(f"{published.url}/models/resnet18-")
    assert "not stated" in encoder["licence"]
    assert encoder["sha256"] == load_backbone("imagenet-v1:resnet18").sha256
    jpegs = [drawn_frame(0, frame) for frame in range(2)]
    assert encode_frames(jpegs, read_features(out), None, "cpu").shape == (512,)
    assert len(published.asked) == 1


def test_import_takes_a_name(
    published: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moco.pt"
    assert cli.run(["import", "moco-v2", "--out", str(out)]) == 0
    assert "MoCo v2, resnet18, epoch 200" in capsys.readouterr().out
    imported = load_checkpoint(out)["imported"]
    assert imported["name"] == "moco-v2"
    assert imported["url"] == f"{published.url}/moco.pth.tar"
    assert imported["sha256"] == sha256(published.files["/moco.pth.tar"])
    assert torch.equal(
        read_weights(out).query.backbone["conv1.weight"],
        load_backbone("moco-v2").network.state_dict()["conv1.weight"],
    )


def test_compare_takes_names(published: Site) -> None:
    given = ["imagenet-v1", "other=imagenet-v1:resnet18", "moco-v2", "random"]
    specs = parse_encoders(given, "resnet18")
    assert [(spec.name, spec.source, spec.arch) for spec in specs] == [
        ("imagenet-v1", "imagenet-v1", "resnet18"),
        ("other", "imagenet-v1:resnet18", None),
        ("moco-v2", "moco-v2", None),
        ("random", "random", "resnet18"),
    ]
    for arch in ("resnt101", "timm:nosuch"):
        with pytest.raises(InputError, match=r"unknown architecture|no such model"):
            parse_encoders(["imagenet-v1", "moco-v2"], arch)
    (spec,) = parse_encoders(["moco-v2"], "timm:test_vit")
    assert (spec.arch, spec.network) == (None, "resnet18")
