"""The rooms of the design: who may import whom, what the wheel holds, what help costs."""

from __future__ import annotations

import ast
import runpy
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"shards": set(), "pipelines": {"shards"}, "seco": {"shards"}}
HEAVY = {"torch", "torchvision", "numpy", "matplotlib", "faiss", "PIL", "webdataset", "rich"}


def imports(path: Path, module_level: bool = False) -> set[str]:
    """The top-level names a file imports, at any depth or at module level alone."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if module_level else list(ast.walk(tree))
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert len(files) > 5
    others = (set(ROOMS) | {"cli", "tests"}) - {room} - ROOMS[room]
    for file in files:
        allowed = {"seco/api.py": {"pipelines"}, "seco/__main__.py": {"cli"}}.get(
            str(file.relative_to(ROOT)), set()
        )
        assert not imports(file) & (others - allowed), f"{file} imports another room"
        if room != "seco":
            assert not imports(file) & {"torch", "torchvision"}, f"{file.name} imports torch"


def test_the_folders_of_seco_stand_on_each_other_and_never_in_a_circle() -> None:
    above: dict[str, set[str]] = {}
    for file in sorted((ROOT / "seco").rglob("*.py")):
        room = file.relative_to(ROOT / "seco").parts[0].removesuffix(".py")
        named = (
            node.module.split(".")[1]
            for node in ast.walk(ast.parse(file.read_text("utf-8")))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seco.")
        )
        above.setdefault(room, set()).update(set(named) - {room})
    assert {"data", "models"} <= above["training"] and "training" not in above["evaluation"]
    # Raises CycleError, which names the circle.
    assert set(TopologicalSorter(above).static_order()) >= set(above)


def test_the_picture_of_the_architecture_is_drawn_from_these_imports() -> None:
    drawn = runpy.run_path(str(ROOT / "docs/architecture.py"))["svg"]()
    stored = (ROOT / "docs/architecture.svg").read_text("utf-8")
    assert drawn == stored, "run python docs/architecture.py"


def test_the_command_line_imports_nothing_heavy_at_module_level() -> None:
    assert not imports(ROOT / "cli.py", module_level=True) & HEAVY


def modules_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_help_loads_nothing_heavy_and_prepare_never_torch() -> None:
    loaded = modules_after("import cli\nassert cli.run(['--help']) == 0")
    assert not loaded & HEAVY
    assert "click" in loaded
    assert "torch" not in modules_after(
        "import cli\nassert cli.run(['prepare', 'folder', '--src', 'docs', '--dry-run']) == 1"
    )
    everything = "import pkgutil, importlib, pipelines, cli, pipelines._prepare\n"
    everything += "for m in pkgutil.iter_modules(pipelines.__path__, 'pipelines.'):\n"
    everything += "    importlib.import_module(m.name)"
    loaded = modules_after(everything)
    assert "torch" not in loaded
    assert "pipelines._prepare" in loaded


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a copy: setuptools would take stale files from the checkout's build/
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    # hubconf.py is at the root because PyTorch Hub looks there; it must not join the wheel.
    for name in ("cli.py", "hubconf.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(out), str(source)], check=True)
    (file,) = out.glob("seco_video-*.whl")
    return zipfile.ZipFile(file)


def test_the_wheels_top_level_is_exactly_the_layout(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "seco",
        "pipelines",
        "shards",
        "cli.py",
    }


def test_the_wheel_holds_code_and_templates_and_no_data(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {Path(name).suffix for name in names} == {".py", ".j2", ".typed"}
    in_repository = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".j2", ".typed")
    }
    assert set(names) == in_repository | {"cli.py"}
