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
import typer
from test_imports import LAW
from typer.main import get_command

import fxlocal
from fxlocal.compiler import debug
from fxlocal.experiments.cli.app import VERBS, app
from fxlocal.experiments.training.compare import read_contestants
from fxlocal.experiments.training.specs import is_model, split_list

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
CARDS = sorted((ROOT / "docs" / "methods").glob("*.md"))
SECTIONS = [
    "What it does",
    "When to use it",
    "Settings that matter",
    "Cost and gain",
    "What speaks against it",
    "Source",
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SLOW = {
    "data_parallel",
    "ddp",
    "fsdp",
    "model_parallel",
    "moving_boundary",
    "own_rule",
    "replay",
}  # start processes, or train for long
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


def modules():
    """Every module of the core and its passes; fxlocal.experiments has tests of its own."""
    found = (module.name for module in pkgutil.walk_packages(fxlocal.__path__, "fxlocal."))
    passes = (module.name for module in pkgutil.iter_modules(fxlocal.passes.__path__))
    names = ["fxlocal", *found, *(f"fxlocal.passes.{name}" for name in passes)]
    return [name for name in names if not name.startswith("fxlocal.experiments")]


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    if name.startswith("fxlocal.integrations."):
        pytest.importorskip(name.rpartition(".")[2])  # the package that it is for
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


@pytest.mark.sample(15)
@pytest.mark.usefixtures("fresh_compiler")  # which has met no other batch sizes
@pytest.mark.parametrize("page", PAGES, ids=name_of)
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


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


@pytest.mark.parametrize("card", CARDS, ids=name_of)
def test_a_card_has_its_sections_and_the_readme_names_it(card):
    text = card.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert "](../results/" in text.split("## Cost and gain")[1].split("\n## ")[0]
    assert list(python_blocks(card))
    table = (ROOT / "README.md").read_text().split("## Methods")[1].split("\n## ")[0]
    assert f"(docs/methods/{card.name})" in table


def test_the_index_of_results_names_each_page():
    index = ROOT / "docs" / "results" / "index.md"
    pages = {page.name for page in index.parent.glob("*.md")} - {"index.md"}
    rows = re.findall(r"^\| \[[^]]*\]\(([^)]*)\) \|", index.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(pages)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in SLOW)) for p in EXAMPLES],
    ids=lambda path: path.name,
)
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


def anchors(page):
    """The fragments by which GitHub links to a page's headings."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        path = (page.parent / target) if target else page
        assert path.exists(), f"links to {target}"
        assert not anchor or anchor in anchors(path), f"links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    for path in re.findall(r"`((?:fxlocal|passes|tests|examples|docs)/[\w/.]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def rows_below(page, heading):
    """The rows of the first table below a heading, without its head: lists of cells."""
    lines = page.read_text().split(f"## {heading}\n")[1].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return rows[2:]


def test_the_import_law_of_the_page_is_the_tests():
    core = {folder for folder in LAW if not folder.startswith("experiments")}
    words = {"nothing": set(), "the core": core}
    page = ROOT / "docs" / "architecture.md"
    law = {
        folder: set().union(*(words.get(word, {word}) for word in allowed.split(", ")))
        for folder, allowed in rows_below(page, "The import law")
    }
    assert law == LAW


def test_the_tree_of_the_page_is_the_packages():
    tree = FENCE.findall((ROOT / "docs" / "architecture.md").read_text())[0][1]
    shown = set(re.findall(r"^ +(\w+)/ ", tree, re.MULTILINE))
    files = [*(ROOT / "fxlocal").glob("**/__init__.py")]
    assert shown == {file.parent.name for file in files} - {"fxlocal"}


COMMAND = re.compile(
    r"(?:^ +|`|&& |limited \d+ )fxlocal ([a-z-]+)((?:[^`\n\\]|\\\n)*)", re.MULTILINE
)
WITH_COMMANDS = [page for page in PAGES if page.name != "CHANGELOG.md"] + [ROOT / ".ci" / "gpu"]


def options_of(verb):
    group = get_command(app)
    _, command, _ = group.resolve_command(typer.Context(group), [verb])
    return {name for p in command.params for name in [*p.opts, *p.secondary_opts]}


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_the_commands_that_a_page_shows_exist(page):
    for verb, rest in COMMAND.findall(page.read_text()):
        assert verb in VERBS
        given = set(re.findall(r"(?<!\S)--[a-z-]+", rest))
        assert given <= {*options_of(verb), "--help"}, f"fxlocal {verb}"
        for specs in re.findall(r"--strateg(?:y|ies) \"?([^\"\s$`]+)", rest):
            others = () if verb != "bench" else ("noised", "summed")  # which it alone knows
            texts = [text for text in split_list(specs) if text.split("(")[0] not in others]
            read_contestants([text for text in texts if not is_model(text)])


def test_the_oldest_versions_are_the_lower_bounds():
    """Those that CI runs; linters and other packages run once, on the newest."""
    project = (ROOT / "pyproject.toml").read_text()
    project = re.sub(r"\npackages = \[\n    \"fxlocal.*?\n\]", "", project, flags=re.S)
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', project))
    for tool in ("setuptools", "ruff", "mypy"):
        del bounds[tool]
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert oldest == bounds


@pytest.mark.parametrize("folder", ["fxlocal", "passes", "tests"])
def test_no_file_is_long(folder):
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sizes and not {name: size for name, size in sizes.items() if size > 350}


def test_importing_the_core_is_silent_and_needs_no_extras():
    code = (
        "import sys, fxlocal; sys.exit(bool({'torchvision', 'sklearn', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
