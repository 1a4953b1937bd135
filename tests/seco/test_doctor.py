"""``seco doctor``: on this machine, and on machines where something is missing or broken."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cli
from pipelines._ffmpeg import FfmpegFacts, ffmpeg_binary, ffmpeg_version
from seco import doctor
from seco import doctor as distributions
from seco import doctor as libraries
from seco.doctor import CHECKS, KNOWN, MACHINE, OTHER_PACKAGES, Check, check_libraries, run_check
from tests.data import ROOT, lacking

CORE = {name for name, known in KNOWN.items() if known.core}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """Exit code and report on this machine, in a folder of modules that must not be imported."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("torch", "faiss", "PIL", "json", "ctypes", "contextlib"):
        (folder / f"{name}.py").write_text("raise RuntimeError('from the current folder')")
    shown = io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(shown):
            code = cli.run(["doctor", "--json"])
    finally:
        os.chdir(before)
    return code, json.loads(shown.getvalue())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder at the beginning of the path, here and in processes started from here."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
    distributions._installed.cache_clear()
    yield folder
    distributions._installed.cache_clear()


def install(
    site: Path, name: str, version: str, package: str, *, code: str | None = "", requires: str = ""
) -> None:
    """A distribution as pip leaves it; without code, its files have gone."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    )
    (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{package}/__init__.py,sha256=x,1\n")
    if code is not None:
        (site / package).mkdir(exist_ok=True)
        (site / package / "__init__.py").write_text(code)


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> dict[str, libraries.Found]:
    """Makes every part but ffmpeg work, without looking; tests change single libraries."""
    found = {name: libraries.Found("ok", "1.0") for name in CHECKS}
    monkeypatch.setattr(
        doctor, "MACHINE", {name: lambda: libraries.Found("ok") for name in MACHINE}
    )
    monkeypatch.setattr(doctor, "check_libraries", lambda names: {n: found[n] for n in names})
    return found


def report(capsys: pytest.CaptureFixture[str], code: int) -> tuple[dict[str, Any], str]:
    """The parts of ``seco doctor --json`` by name, and what it wrote to standard error."""
    assert cli.run(["doctor", "--json"]) == code
    shown = capsys.readouterr()
    whole = json.loads(shown.out)
    assert whole["ok"] == (code == 0)
    return {part["name"]: part for part in whole["parts"]}, shown.err


def test_every_part_has_a_row(here: tuple[int, dict[str, Any]]) -> None:
    code, found = here
    assert [part["name"] for part in found["parts"]] == list(KNOWN)
    assert set(KNOWN) == {*MACHINE, *CHECKS, "ffmpeg", "video codecs"}
    for part in found["parts"]:
        assert set(part) == {"name", "state", "version", "detail", "cost", "fix"}
        assert part["state"] in ("ok", "missing", "broken", "not used")
        lacking_it = part["state"] in ("missing", "broken")
        assert bool(part["cost"]) == bool(part["fix"]) == lacking_it, part
        assert "current folder" not in part["detail"]
    assert (code, found["ok"]) == (0, True)


def test_the_report_is_true_here(here: tuple[int, dict[str, Any]]) -> None:
    parts = {part["name"]: part for part in here[1]["parts"]}
    assert {parts[name]["state"] for name in CORE} == {"ok"}
    assert parts["torch"]["version"] == torch.__version__
    assert parts["simplejpeg"]["version"] == metadata.version("simplejpeg")
    assert re.search(r"libjpeg-turbo \d+\.\d+", parts["simplejpeg"]["detail"])
    binary = ffmpeg_binary()
    assert parts["ffmpeg"]["version"] == ffmpeg_version(binary)
    assert binary in parts["ffmpeg"]["detail"]
    assert (parts["GPU"]["state"] == "ok") == torch.cuda.is_available()
    assert parts["nvJPEG"]["state"] == ("ok" if torch.cuda.is_available() else "not used")
    extras = {"Ray": "ray", "ONNX": "onnx", "Hugging Face": "huggingface_hub"}
    extras |= {name: name for name in ("faiss", "s3fs", "gcsfs", "pyarrow", "timm")}
    for name, package in extras.items():
        there = importlib.util.find_spec(package) is not None
        assert parts[name]["state"] == ("ok" if there else "missing"), name


def test_every_requirement_is_checked() -> None:
    text = (ROOT / "setup.py").read_text()
    required = re.search(r"install_requires=\[(.*?)\]", text, re.DOTALL)
    assert required
    names = set(re.findall(r'"([\w.-]+)', required[1]))
    packages = {check.owns for check in CHECKS.values()} | set(OTHER_PACKAGES)
    # This test runs under click; nothing imports ffmpeg-python; the others are seen to elsewhere.
    names -= {"click", "ffmpeg-python", "imageio-ffmpeg", "tomli"}
    assert {name.replace("-", "_") for name in names} <= packages


def test_it_imports_no_library_itself() -> None:
    code = "import sys, seco.doctor; print(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in shown.stdout.split()}
    third_party = {check.owns for check in CHECKS.values()} | set(OTHER_PACKAGES)
    assert not loaded & third_party


@pytest.mark.parametrize(
    ("part", "package", "names"),
    [
        ("faiss", "faiss", ("faiss-cpu", "faiss-gpu")),
        ("faiss", "faiss", ("faiss-gpu", "faiss-gpu-cu12")),
        ("Pillow", "PIL", ("pillow", "Pillow-SIMD")),
    ],
)
def test_two_distributions_of_one_package(
    part: str, package: str, names: tuple[str, str], site: Path
) -> None:
    for name in names:
        install(site, name, "9.9", package)
    (found,) = check_libraries([part]).values()
    assert found.state == "broken"
    for name in names:
        assert f"{name.lower()} 9.9" in found.detail
        assert name.lower() in (found.fix or "").split(",")[0].split()


def test_a_mixture_whose_other_half_has_lost_its_files(site: Path) -> None:
    """Installed over each other, then one of them uninstalled; here it is the real one that is."""
    install(site, "faiss-gpu-cu99", "1.0", "faiss", code=None)
    (found,) = check_libraries(["faiss"]).values()
    assert found.state == "broken"
    assert "faiss-gpu-cu99 1.0" in found.detail


def test_one_later_on_the_path_does_no_harm(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = site.parent / "later"
    later.mkdir()
    monkeypatch.syspath_prepend(str(later))
    monkeypatch.syspath_prepend(str(site))
    install(site, "madeup-simd", "2.0", "madeup")
    install(later, "madeup", "1.0", "madeup")
    assert tried("madeup").state == "ok"
    assert distributions.owners_of("madeup")[0].version == "2.0"


def tried(package: str) -> libraries.Found:
    """The check of a package that only has to be importable."""

    def check() -> libraries.Found:
        importlib.import_module(package)
        return libraries.Found("ok")

    sys.modules.pop(package, None)
    importlib.invalidate_caches()
    return run_check(Check(check, package))


def test_files_that_have_gone(site: Path) -> None:
    assert tried("madeup").state == "missing"
    distributions._installed.cache_clear()
    install(site, "madeup", "1.5", "madeup", code=None)
    found = tried("madeup")
    assert (found.state, found.version) == ("broken", "1.5")
    assert "files are missing" in found.detail
    assert found.fix == "pip install --force-reinstall --no-deps madeup"
    (site / "madeup" / "libs").mkdir(parents=True)  # what uninstalling the other one may leave
    assert tried("madeup") == found


@pytest.mark.parametrize(("version", "state"), [("2.9.1", "broken"), ("2.10.0+cu130", "ok")])
def test_a_version_that_is_too_old(version: str, state: str, site: Path) -> None:
    install(site, "seco-video", "9.0", "other", requires="madeup >=2.10")
    install(site, "madeup", version, "madeup")
    found = tried("madeup")
    assert found.state == state
    assert ("2.10 or newer" in found.detail) == (state == "broken")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libgomp.so.1: cannot open\\n shared object')", "cannot open shared"),
        ("raise OSError('libcudart.so.12: no such file')", "OSError: libcudart"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "nms does not exist"),
        ("raise SystemExit('no')", "SystemExit"),
        ("import no_such_module_at_all", "needs no_such_module_at_all"),
        ("def :", "SyntaxError"),
        ("import os; os.write(2, b'OMP: Error #15'); os.abort()", "crashes (SIGABRT): OMP: Error"),
        ("import os; os.kill(os.getpid(), 11)", "crashes (SIGSEGV)"),
        ("import os; os._exit(3)", "exits with code 3"),
    ],
)
def test_a_library_that_cannot_be_imported_hides_no_other(code: str, said: str, site: Path) -> None:
    install(site, "faiss-cpu", "1.0", "faiss", code=f"print('{{}}')\n{code}")
    install(site, "adlfs", "7.0", "adlfs")
    found = check_libraries(["faiss", "faiss on GPUs", "adlfs"])
    assert found["faiss"].state == "broken"
    assert said in found["faiss"].detail
    assert "Traceback" not in found["faiss"].detail and "\n" not in found["faiss"].detail
    if said.startswith("needs"):
        assert found["faiss"].fix == "pip install faiss-cpu"
    else:
        assert found["faiss"].fix == "pip install --force-reinstall --no-deps faiss-cpu"
    assert found["faiss on GPUs"].state == "not used"
    assert found["adlfs"][:2] == ("ok", "7.0")


def test_a_library_that_hangs(site: Path) -> None:
    code = "import time, warnings\nwarnings.warn('slow')\ntime.sleep(100_000)"
    install(site, "faiss-cpu", "1.0", "faiss", code=code)
    (found,) = check_libraries(["faiss"], limit_seconds=2).values()
    assert (found.state, found.detail) == ("broken", "no answer within 2 s")


class FakeCuda:
    """``torch.cuda`` of a machine that is not here."""

    def __init__(self, gpus: int, reason: str = "") -> None:
        self.gpus = gpus
        self.reason = reason

    def is_available(self) -> bool:
        return self.gpus > 0

    def device_count(self) -> int:
        return self.gpus

    def init(self) -> None:
        raise RuntimeError(self.reason)

    def get_device_properties(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(name="NVIDIA H100", total_memory=85 * 10**9, major=9, minor=0)


def gpu(
    monkeypatch: pytest.MonkeyPatch,
    cuda: FakeCuda,
    driver: tuple[str | None, str | None],
    build: str | None = "13.0",
    ones: Callable[..., Any] = lambda count, device: torch.ones(count),
) -> libraries.Found:
    version = SimpleNamespace(cuda=build, hip=None)
    fake = SimpleNamespace(cuda=cuda, version=version, ones=ones)
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(libraries, "_nvidia_driver", lambda: driver)
    return run_check(CHECKS["GPU"])


def test_gpus_are_counted_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu(monkeypatch, FakeCuda(8), ("580.65", "13.0"))
    assert found.state == "ok"
    assert found.version == "driver 580.65"
    gpus = "8 x NVIDIA H100, 79 GiB, compute capability 9.0; driver supports CUDA 13.0"
    assert found.detail == gpus


def test_a_gpu_that_this_torch_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(count: int, device: str) -> torch.Tensor:
        if device == "cuda:1":
            raise RuntimeError("CUDA error: no kernel image is available\nMore words")
        return torch.ones(count)

    found = gpu(monkeypatch, FakeCuda(2), ("580.65", "13.0"), ones=ones)
    assert found.state == "broken"
    assert found.detail == "RuntimeError: GPU 1: CUDA error: no kernel image is available"


@pytest.mark.parametrize(
    ("reason", "driver", "build", "state", "fix"),
    [
        ("Found no NVIDIA driver on your system. Go", (None, None), "13.0", "missing", None),
        ("No CUDA GPUs are available", ("580.65", "13.0"), "13.0", "missing", None),
        ("The driver is too old. Go", ("535.1", "12.2"), "13.0", "broken", "update the NVIDIA"),
        ("", ("580.65", "13.0"), None, "broken", "torch and torchvision for CUDA 13.0 or older"),
        ("", (None, None), None, "missing", None),
    ],
)
def test_why_there_is_no_gpu(
    reason: str,
    driver: tuple[str | None, str | None],
    build: str | None,
    state: str,
    fix: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = gpu(monkeypatch, FakeCuda(0, reason), driver, build)
    assert found.state == state
    assert found.detail == (reason.partition(". ")[0] if build else "torch is built without CUDA")
    assert (fix is None) == (found.fix is None)
    assert fix is None or fix in (found.fix or "")


def test_the_driver_is_asked(tmp_path: Path) -> None:
    """A library with NVML's four functions stands in for NVIDIA's."""
    if MACHINE["C compiler"]().state != "ok":
        lacking("a C compiler")
    source = tmp_path / "nvml.c"
    source.write_text(
        "#include <string.h>\n"
        "int nvmlInit_v2(void) { return 0; }\n"
        "int nvmlSystemGetDriverVersion(char *to, unsigned n)"
        ' { strncpy(to, "535.161.08", n); return 0; }\n'
        "int nvmlSystemGetCudaDriverVersion_v2(int *to) { *to = 12020; return 0; }\n"
    )
    library = tmp_path / "libnvidia-ml.so.1"
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    code = "from seco.doctor import _nvidia_driver; print(_nvidia_driver())"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "('535.161.08', '12.2')"


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert MACHINE["C compiler"]().state == "missing"
    for name in ("gcc", "g++"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'Python.h: No such file' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    found = MACHINE["C compiler"]()
    assert found.state == "broken"
    assert "Python.h: No such file" in found.detail


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("kind", ["nowhere", "not executable", "no program", "another program"])
def test_an_ffmpeg_that_is_none(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    binary = tmp_path / "ffmpeg"
    if kind != "nowhere":
        binary.write_bytes(b"#!/bin/sh\necho hello\n" if kind == "another program" else b"\0\1\2")
        binary.chmod(0o644 if kind == "not executable" else 0o755)
    monkeypatch.setenv("SECO_FFMPEG", str(binary))
    parts, error = report(capsys, code=1)
    assert parts["ffmpeg"]["state"] == "broken"
    assert str(binary) in parts["ffmpeg"]["detail"]
    assert parts["video codecs"]["state"] == "not used"
    (line,) = (line for line in error.splitlines() if "cannot work" in line)
    assert line.startswith("seco: cannot work without ffmpeg (broken)")


@pytest.mark.usefixtures("sound")
def test_no_ffmpeg(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SECO_FFMPEG", raising=False)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert report(capsys, code=1)[0]["ffmpeg"]["state"] == "missing"


@pytest.mark.usefixtures("sound")
def test_an_ffmpeg_without_av1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It also has a version that would colour the terminal."""
    binary = tmp_path / "ffmpeg"
    binary.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*-version*) printf 'ffmpeg version \\033[31m9.9 Copyright\\n' ;;\n"
        '*-decoders*) for c in h264 hevc vp9 av1 mpeg4; do echo " V..... $c  x"; done ;;\n'
        '*) for c in libvpx libvpx-vp9 mpeg4 mjpeg; do echo " V..... $c  x"; done ;;\n'
        "esac\n"
    )
    binary.chmod(0o755)
    monkeypatch.setenv("SECO_FFMPEG", str(binary))
    parts, _ = report(capsys, code=0)
    assert parts["ffmpeg"]["version"] == "\x1b[31m9.9"
    assert parts["video codecs"]["detail"] == "AV1 decoder, libx264 encoder"
    assert cli.run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b[31m9.9, from SECO_FFMPEG" in shown


@pytest.mark.parametrize("state", ["missing", "broken"])
@pytest.mark.parametrize("name", CHECKS)
def test_only_the_core_changes_the_exit_code(
    name: str,
    state: str,
    sound: dict[str, libraries.Found],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    facts = FfmpegFacts("ffmpeg", "9.9", "SECO_FFMPEG", ("H.264",), ())
    monkeypatch.setattr("pipelines._ffmpeg.ffmpeg_facts", lambda: facts)
    sound[name] = libraries.Found(state, detail="a reason\x1b[2J")
    assert cli.run(["doctor"]) == (1 if name in CORE else 0)
    shown = capsys.readouterr()
    (row,) = (line for line in shown.out.splitlines() if line.startswith(f"{name:<15}"))
    assert state in row and "a reason\\x1b" in row
    assert f"cost: {KNOWN[name].cost}" in shown.out
    assert f"get it: {KNOWN[name].fix}" in shown.out
    assert (f"without {name} ({state})" in shown.err) == (name in CORE)
    last = shown.out.splitlines()[-1]
    for ability in KNOWN[name].serves:
        ready, _, not_ready = last.partition("Not ready: ")
        assert ability not in ready.removeprefix("Ready: ").rstrip(". ").split("; ")
        assert f"{ability} ({name})" in not_ready


@pytest.mark.usefixtures("sound")
def test_everything_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Ready: prepare; pretrain, finetune")
    assert "--decode nvjpeg" in last and "s3://" in last
    assert "Not ready" not in last
