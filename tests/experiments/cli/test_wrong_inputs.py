"""Wrong commands of every verb: one line, an exit status, and all files as they were."""

import shutil

import pytest
from support import wrong

from fxlocal.experiments.cli.app import VERBS

TABLE = wrong.read_table()
QUICK = 20  # every so manieth that is about no run is unmarked


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture
def built(place, request, monkeypatch):
    """Be in the place, where there are runs if the command asks for them."""
    monkeypatch.chdir(place)
    if not (place / "photos").exists():
        wrong.build_place()
    if wrong.needs_runs(request.getfixturevalue("command")) and not (place / "run").exists():
        wrong.build_runs()
    return place


def cases():
    alone = [command for command in TABLE if not wrong.needs_runs(command)]
    quick = {*alone[::QUICK]}
    for command in TABLE:
        yield pytest.param(command, marks=() if command in quick else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", list(cases()))
def test_what_is_wrong_is_said_in_a_line_and_all_files_stay(command, built, monkeypatch):
    before, (message, begun) = wrong.contents(built), TABLE[command]
    result = wrong.drive(command, monkeypatch)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == (1 if message.startswith("the loss is") else 2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line, line
    if begun:
        shutil.rmtree("new", ignore_errors=True)  # of a run that came to nothing
    assert wrong.contents(built) == before


def test_the_table_is_of_all_verbs_and_long():
    verbs = [next(word for word in command.split() if "=" not in word) for command in TABLE]
    assert {*verbs} == {*VERBS, "trian"} and len(TABLE) >= 150
