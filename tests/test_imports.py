"""Which folder may import which: a room stands above all that it imports, no arrow runs back up."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent

# The import law: what the files of a folder may import besides each other.
LAW = {
    "errors": "",
    "facts": "",
    "plan": "errors",
    "schedules": "errors facts plan",
    "ops": "",
    "ir": "errors facts plan ops",
    "tracing": "errors ops ir",
    "passes": "errors facts plan ops ir",
    "compiler": "errors facts plan ops ir tracing passes",
    "runtime": "errors facts plan schedules ops ir tracing passes compiler",
    "parallel": "errors facts plan ops ir compiler runtime",
    "inspection": "errors facts plan ops ir tracing compiler",
    "budget": "errors facts plan schedules ops ir tracing passes compiler runtime inspection",
    "integrations": "errors facts plan schedules ops ir tracing passes compiler runtime inspection",
}
CORE = " ".join(LAW)
LAW |= {
    "experiments.own": CORE,
    "experiments.files": "",
    "experiments.stopping": "",
    "experiments.forking": "experiments.stopping",
    "experiments.models": f"{CORE} experiments.own",
    "experiments.data": f"{CORE} experiments.own",
    "experiments.tracking": f"{CORE} experiments.files",
    "experiments.training": f"{CORE} experiments.own experiments.models experiments.data "
    "experiments.tracking experiments.files experiments.stopping",
    "experiments.papers": f"{CORE} experiments.models experiments.data experiments.training",
    "experiments.bench": f"{CORE} experiments.models experiments.data experiments.training "
    "experiments.papers",
    "experiments.report": f"{CORE} experiments.models experiments.data experiments.training "
    "experiments.papers experiments.bench experiments.files",
    "experiments.cli": f"{CORE} experiments.own experiments.models experiments.data "
    "experiments.tracking experiments.training experiments.papers experiments.bench "
    "experiments.report experiments.files experiments.stopping",
    "experiments.python": f"{CORE} experiments.own experiments.models experiments.data "
    "experiments.training experiments.report experiments.cli experiments.files",
}
LAW = {folder: frozenset(allowed.split()) for folder, allowed in LAW.items()}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["fxlocal", *parts] if parts[0] == "passes" else parts)


def room_of(module):
    """The folder that a module lies in; the package itself is called ``__init__``."""
    parts = [*module.split("."), "", ""][1:3]
    room = ".".join(parts) if parts[0] == "experiments" else parts[0]
    return room.rstrip(".") if room.rstrip(".") in LAW else "__init__"


@functools.cache
def imports_of(path, module):
    """Full names of all that a file imports, wherever in the file."""
    package = module.removesuffix(".__init__") if path.stem == "__init__" else ""
    package, found = package or module.rpartition(".")[0], []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            imported = ".".join([*base, *filter(None, [node.module])])
            found += [f"{imported}.{alias.name}" for alias in node.names]
    return found


def rooms_of(path, module):
    """The rooms of fxlocal that a file enters."""
    return {room_of(name) for name in imports_of(path, module) if name.split(".")[0] == "fxlocal"}


FILES = {
    module_of(path): path
    for folder in ("fxlocal", "passes")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
ROOMS = {module: room_of(module) for module in FILES}


def test_every_room_has_a_law():
    assert {*ROOMS.values()} - {"__init__"} == set(LAW)


def test_no_arrow_runs_up():
    arrows = [(folder, other) for folder, allowed in LAW.items() for other in allowed]
    assert networkx.is_directed_acyclic_graph(networkx.DiGraph(arrows))


@pytest.mark.parametrize("module", [m for m, room in ROOMS.items() if room != "__init__"])
def test_a_file_imports_what_its_room_may(module):
    room = ROOMS[module]
    assert rooms_of(FILES[module], module) <= LAW[room] | {room}


@pytest.mark.parametrize("module", [m for m in FILES if m.startswith("fxlocal.passes.")])
def test_a_pass_imports_no_other_pass(module):
    if FILES[module].stem != "__init__":
        assert "passes" not in rooms_of(FILES[module], module)


@pytest.mark.parametrize("module", [m for m, room in ROOMS.items() if room == "ops"])
def test_ops_know_nothing_of_graphs(module):
    assert not [name for name in imports_of(FILES[module], module) if name.startswith("torch.fx")]


def test_a_wheel_holds_every_folder():
    packages = (
        (ROOT / "pyproject.toml")
        .read_text()
        .split("[tool.setuptools]\npackages = [")[1]
        .split("]")[0]
    )
    listed = {line.strip(' ",') for line in packages.splitlines() if line.strip()}
    inits = {module for module, path in FILES.items() if path.name == "__init__.py"}
    assert listed == {module.removesuffix(".__init__") for module in inits}


def test_no_folder_is_full():
    folders = {path.parent for path in FILES.values()}
    counts = {folder: len(list(folder.glob("*.py"))) for folder in folders}
    assert all(count <= (24 if f.name == "passes" else 15) for f, count in counts.items())


@pytest.mark.parametrize("module", ["plan", "schedules", "errors", "facts"])
def test_module_imports_no_torch(module):
    """Nor does what it imports: run them where torch cannot be imported."""
    code = (
        "import importlib, sys, types; sys.modules['torch'] = None;"
        "package = types.ModuleType('fxlocal'); package.__path__ = [sys.argv[1]];"
        "sys.modules['fxlocal'] = package;"
        "importlib.import_module('fxlocal.' + sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(ROOT / "fxlocal"), module]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_of_fxlocal_leaves_triton_and_the_compiler_alone():
    """Each takes as long as the rest of the package; the first use imports it."""
    slow = {"triton", "torch._inductor", "torch._dynamo"}
    code = f"import sys, fxlocal; print({slow} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_rules_see_each_form_of_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from . import driver\nfrom ..compiler.transform import emit\nimport fxlocal.ir.text\n"
        "from fxlocal import Plan\ndef f():\n    from fxlocal.experiments.cli import app\n"
    )
    found = {"runtime", "compiler", "ir", "__init__", "experiments.cli"}
    assert rooms_of(bad, "fxlocal.runtime.bad") == found
    other = tmp_path / "other.py"
    other.write_text("from .find_skips import find_skips\n")
    assert rooms_of(other, "fxlocal.passes.other") == {"passes"}
    third = tmp_path / "third.py"
    third.write_text("from ..runtime.driver import Driver\n")
    assert rooms_of(third, "fxlocal.passes.third") == {"runtime"}
