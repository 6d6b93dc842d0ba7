"""Which module may import which: a room stands above all that it imports, no arrow runs back up."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up. A module imports only what stands on a lower line; `passes`, `ops` and
# `schedules` are folders, whose own modules are looked at below.
FLOORS = [
    {"errors", "facts", "ops", "random_state", "verification"},
    {"plan", "graph", "tracing", "fakes", "topk_time"},
    {"network", "schedules", "show"},
    {"linking"},
    {"export", "passes", "runner", "cudagraph", "watch", "heads", "stages"},
    {"capture"},
    {"analysis"},
    {"split", "fingerprint"},
    {"local_modules"},
    {"compile"},
    {"transform", "verify"},
    {"driver", "parallel"},
    {"__init__"},
    {"experiments"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
OF_PASSES = {"errors", "facts", "fakes", "graph", "linking", "network", "ops", "plan"}


def imports_of(path, package):
    """Full names of all that a file of ``package`` imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms_of(path, package):
    """The rooms of fxlocal that a file enters; a public name comes from ``__init__``."""
    names = (name.split(".") for name in imports_of(path, package))
    inside = ([*name, ""][1] for name in names if name[0] == "fxlocal")
    return {room if room in FLOOR else "__init__" for room in inside}


CORE = sorted((ROOT / "fxlocal").glob("*.py"))
SCHEDULES = sorted((ROOT / "fxlocal/schedules").glob("*.py"))
OPS = sorted((ROOT / "fxlocal/ops").glob("*.py"))
PASSES = sorted(path for path in (ROOT / "passes").glob("*.py") if path.stem != "__init__")


FOLDERS = ("experiments", "ops", "parallel", "passes", "plan", "schedules")
PARALLEL = sorted(ROOT.glob("fxlocal/parallel/*.py"))


def test_every_room_is_on_a_floor():
    rooms = {path.stem for path in CORE} | set(FOLDERS)
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_imports_downwards(path):
    for room in rooms_of(path, "fxlocal"):
        assert FLOOR[room] < FLOOR[path.stem], f"{path.stem} imports {room}"


@pytest.mark.parametrize("path", PASSES, ids=lambda path: path.stem)
def test_a_pass_imports_no_other_pass(path):
    assert rooms_of(path, "fxlocal.passes") <= OF_PASSES


@pytest.mark.parametrize("path", OPS, ids=lambda path: path.stem)
def test_ops_know_nothing_of_graphs(path):
    names = set(imports_of(path, "fxlocal.ops"))
    assert not {name for name in names if name.startswith("torch.fx")}
    assert rooms_of(path, "fxlocal.ops") <= {"ops"}


@pytest.mark.parametrize("path", PARALLEL, ids=lambda path: path.stem)
def test_parallel_stands_where_the_driver_does(path):
    rooms = rooms_of(path, "fxlocal.parallel") - {"parallel"}
    assert all(FLOOR[room] < FLOOR["parallel"] for room in rooms)


@pytest.mark.parametrize("path", SCHEDULES, ids=lambda path: path.stem)
def test_schedules_know_the_plan_alone(path):
    assert rooms_of(path, "fxlocal.schedules") <= {"errors", "facts", "plan", "schedules"}


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


def test_the_rules_see_each_form_of_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from . import driver\nfrom .transform import emit\nimport fxlocal.analysis\n"
        "from fxlocal import Plan\ndef f():\n    from fxlocal import runner\n"
    )
    assert rooms_of(bad, "fxlocal") == {"driver", "transform", "analysis", "__init__", "runner"}
    bad.write_text("from .skips import find_skips\n")
    assert rooms_of(bad, "fxlocal.passes") == {"passes"}
    bad.write_text("from ..driver import Driver\n")
    assert rooms_of(bad, "fxlocal.passes") == {"driver"}
