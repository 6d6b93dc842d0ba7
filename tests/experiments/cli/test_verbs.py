"""What a shell asks of the command line itself, and what is made of a run that has been trained."""

import pytest
from support.shell import succeeds
from typer.testing import CliRunner

import fxlocal as library
from fxlocal.experiments.cli.app import PANELS, app

pytestmark = pytest.mark.usefixtures("unrendered")


def test_the_version_is_the_installed_ones():
    assert succeeds("--version").startswith(f"fxlocal {library.__version__}, torch ")
    assert library.__version__[0].isdigit() and not hasattr(library, "__versions__")


@pytest.mark.parametrize(
    ("words", "found"),
    [("tr", {"train"}), ("train --ep", {"--epochs"}), ("train --resume nowhere --se", {"--seed"})],
)
def test_a_shell_completes_verbs_and_options_and_hears_nothing_else(words, found):
    told = {"COMP_WORDS": f"fxlocal {words}", "COMP_CWORD": str(len(words.split()))}
    told["_FXLOCAL_COMPLETE"] = "complete_bash"
    result = CliRunner().invoke(app, [], prog_name="fxlocal", env=told)
    assert {*result.stdout.split()} == found and not result.stderr


def test_the_help_groups_the_verbs():
    page = succeeds("--help")
    places = [page.index(f" {name} ") for panel in PANELS for name in (panel, *PANELS[panel])]
    assert places == sorted(places)
