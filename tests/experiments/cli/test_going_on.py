"""Runs that go on from their folder, a folder that is another run's, and pages made again."""

import json
import os
import re
import signal

import pytest
from support.killing import kill, numbers_of
from support.shell import TINY, fails, fxlocal, succeeds

from fxlocal.experiments import files
from fxlocal.experiments.cli.progress import Lines

pytestmark = pytest.mark.usefixtures("unrendered", "in_an_empty_folder")


def read(path):
    return json.loads(path.read_text())


def stop_after(steps, monkeypatch):
    """Let a signal come in so many steps."""
    taken = []

    def step(lines, reading):
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Lines, "step", step)


def test_train_goes_on_where_a_signal_stopped_it_and_needs_nothing_typed(tmp_path, monkeypatch):
    succeeds("train", *TINY, "--out", "whole")
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        result = fxlocal("train", *TINY, "--out", "run")
    assert result.exit_code == 128 + signal.SIGTERM
    told = "stopped in epoch 2, step 2; go on with fxlocal train --resume run"
    assert result.stderr.strip() == told
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    line = fails("train", "--resume", "run", "--lr", "0.1")
    assert "checkpoint.pt is of another run: lr is 0.05 there and 0.1 here" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert "note:" not in succeeds("train", "--resume", "run")
    assert "note: this run had ended" in succeeds("train", "--resume", "run")
    whole, run = (numbers_of(read(tmp_path / name / "results.json")) for name in ("whole", "run"))
    assert whole == run
    (tmp_path / "run" / "checkpoint.pt").unlink()  # of a run that has ended: it is not made again
    assert "no checkpoint at run/checkpoint.pt" in fails("train", "--resume", "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "run"), "run has no run to go on with: job.json"),
        (("train", "--resume", "nowhere"), "nowhere has no run to go on with"),
        (("compare", "--resume", "mine"), "mine is a run of fxlocal train, not of compare"),
        (("train", "mine"), "mine: a folder goes with --resume"),
        (("train", "--resume", "mine", "--out", "else"), "--out else: --resume goes on in mine"),
        (("train", "--resume", "mine", "--overwrite"), "--overwrite and --resume: give one"),
        (("train", "--save-every", "2", "--nproc", "2"), "--save-every: ranks are kept at an"),
        (("report", "mine"), "mine has no results.json or sweep.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_folder_that_is_no_runs_gets_one_clear_line(arguments, message, tmp_path):
    (tmp_path / "mine").mkdir()
    job = tmp_path / "mine" / "job.json"
    job.write_text(json.dumps({"verb": "train", "options": {"epochs": 2}}))
    before = job.read_bytes()
    assert message in fails(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and job.read_bytes() == before


def test_one_run_at_a_time_writes_a_folder(tmp_path):
    with files.lock(tmp_path / "run"):
        assert "another run writes into run" in fails("train", *TINY, "--out", "run")
    assert not list((tmp_path / "run").iterdir())


def test_overwrite_removes_the_old_run_first(tmp_path, monkeypatch):
    run = tmp_path / "run"
    files.write_all({run / name: "old" for name in ("checkpoint.pt", "results.json", "notes.txt")})
    stop_after(1, monkeypatch)
    monkeypatch.setattr("fxlocal.experiments.training.trainer.save_checkpoint", lambda *_: None)
    assert fxlocal("train", *TINY, "--out", "run", "--overwrite").exit_code == 143
    assert sorted(p.name for p in run.iterdir()) == ["job.json", "metrics.jsonl", "notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("compare", *TINY, "--strategies", "sgd,freeze"),
        ("sweep", *TINY, "--strategy", "freeze", "--vary", "largest=0.4,0.6"),
    ],
    ids=lambda command: command[0],
)
def test_runs_that_have_ended_are_kept(command, tmp_path, monkeypatch):
    name = "results.json" if command[0] == "compare" else "sweep.json"
    succeeds(*command, "--seeds", "0,1", "--out", "whole")
    with monkeypatch.context() as patch:
        stop_after(11, patch)  # in the second run
        result = fxlocal(*command, "--seeds", "0", "--out", "run")
    assert result.exit_code == 143 and "seed 0, in epoch 1, step 3; go on with" in result.stderr
    (line,) = (tmp_path / "run" / "runs.jsonl").read_text().splitlines()
    line_of = fails(command[0], "--resume", "run", "--lr", "0.1")
    assert "run is of another run: lr is 0.05 there and 0.1 here" in line_of
    succeeds(command[0], "--resume", "run", "--seeds", "0,1")
    whole, run = (read(tmp_path / folder / name) for folder in ("whole", "run"))
    assert numbers_of(whole) == numbers_of(run)
    assert run["runs"][0] == json.loads(line)[1]  # its seconds too
    assert "report: run" in succeeds("report", "run")


@pytest.mark.slow
def test_a_page_is_made_again_and_of_several_runs(tmp_path):
    for folder, strategies, lr in (("a", "sgd,freeze", 0.05), ("b", "sgd", 0.05), ("c", "zero", 1)):
        seed = "1" if folder == "b" else "0"
        options = ("--seeds", seed, "--lr", lr, "--out", folder)
        succeeds("compare", *TINY, "--epochs", "1", "--strategies", strategies, *options)
    page = tmp_path / "a" / "report.html"
    first = page.read_text()
    page.unlink()
    succeeds("report", "a")
    ids = re.compile(r"\bp\d{4,}\b")  # Bokeh counts in each process
    assert ids.sub("", page.read_text()) == ids.sub("", first)
    assert "give its folder, --out" in fails("report", "a", "b")
    assert "settings is {'lr': 0.05} in a and {'lr': 1.0} in c" in fails(
        "report", "a", "c", "--out", "both"
    )
    succeeds("report", "a", "b", "--out", "both")
    both = read(tmp_path / "both" / "results.json")
    assert [(r["strategy"], r["seed"]) for r in both["runs"]] == [
        ("sgd", 0),
        ("freeze", 0),
        ("sgd", 1),
    ]
    assert both["summary"][0]["error_percent_std"] is not None
    (tmp_path / "b" / "results.json").write_text("{")
    assert "results.json holds no results" in fails("report", "b")


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_exactly(tmp_path):
    assert kill(["train"], 1, tmp_path, names=["SIGKILL"]) == 0
