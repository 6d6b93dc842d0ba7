"""What the documentation shows is what happens: doctests, pages, examples, names, sizes."""

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import fxlocal
from fxlocal.compiler import debug

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def modules():
    """Every module of the core and its passes; fxlocal.experiments has tests of its own."""
    found = (module.name for module in pkgutil.walk_packages(fxlocal.__path__, "fxlocal."))
    passes = (module.name for module in pkgutil.iter_modules(fxlocal.passes.__path__))
    names = ["fxlocal", *found, *(f"fxlocal.passes.{name}" for name in passes)]
    return [name for name in names if not name.startswith("fxlocal.experiments")]


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_the_main_functions_have_an_example():
    for name in ("analyze", "capture", "format_graph", "transform", "Driver"):
        assert ">>>" in inspect.getdoc(getattr(fxlocal, name))
    assert ">>>" in inspect.getdoc(fxlocal.schedules.Static)


def python_blocks(page):
    """Yield each python block of a page with the text block that follows it, if one does."""
    blocks = FENCE.findall(page.read_text())
    for (language, code), (next_language, text) in pairwise([*blocks, ("", "")]):
        if language == "python":
            yield code, text if next_language == "text" else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_prints_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for code, expected in python_blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        if expected is not None:
            assert printed.getvalue().rstrip() == expected.rstrip()


def test_the_readme_shows_a_diff():
    blocks = [expected for _, expected in python_blocks(ROOT / "README.md") if expected]
    assert any("%detach = call_method detach" in text for text in blocks)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
@pytest.mark.filterwarnings("error::fxlocal.NoEffectWarning")
def test_an_example_runs(path, tmp_path, monkeypatch, capsys):
    """In this process, with a namespace of its own: importing torch anew would take longer."""
    assert len(path.read_text().splitlines()) <= 80
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", fxlocal.__all__)
def test_a_public_name_is_documented(name):
    assert getattr(fxlocal, name).__doc__, f"{name} has no docstring"
    pages = "\n".join(page.read_text() for page in PAGES)
    assert re.search(rf"\b{name}\b", pages), f"{name} is in no page"


def test_the_table_of_environment_variables_is_the_codes():
    table = (ROOT / "docs" / "debugging.md").read_text()
    assert re.findall(r"^\| `(FXLOCAL_\w+)` \|", table, re.MULTILINE) == list(debug.ENVIRONMENT)
    read = set()
    for folder in ("fxlocal", "passes"):
        for path in (ROOT / folder).rglob("*.py"):
            found = set(re.findall(r"FXLOCAL_[A-Z]+", path.read_text()))
            assert found <= set(debug.ENVIRONMENT), path
            read |= found
    assert read == set(debug.ENVIRONMENT)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("folder,most", [("fxlocal", 350), ("passes", 350), ("tests", 400)])
def test_no_file_is_long(folder, most):
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sizes and not {name: size for name, size in sizes.items() if size > most}


def test_importing_the_core_is_silent_and_needs_no_extras():
    code = (
        "import sys, fxlocal; sys.exit(bool({'torchvision', 'sklearn', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
