"""How far a run is: bars and lines by a clock that is moved by hand, and what is left if quiet."""

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from support.shell import TINY, fails, fxlocal, succeeds
from support.tiny import SETTINGS, resnet, run

from fxlocal.experiments.cli.progress import Bars, Lines
from fxlocal.experiments.tracking import Reading
from fxlocal.experiments.training.results import Run
from fxlocal.schedules import Constant


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def read(step, loss=None, num_steps=50, epoch=2):
    return Reading(epoch, 12, step, num_steps, 8, loss)


def told(epochs, seconds, error=None):
    """A run after so many epochs, judged in the last one or before."""
    errors = {"errors": [12.5], "error_epochs": [epochs], "error_percent": error}
    losses = {"loss": [0.75] * epochs, "seconds": [seconds * (i + 1) for i in range(epochs)]}
    return Run("sgd", 3, **losses, **(errors if error is not None else {}))


@pytest.mark.parametrize("taken", [0.5, 7, 25, 61], ids=lambda seconds: f"{seconds} s a step")
def test_a_line_comes_each_minute_as_far_as_steps_allow_and_each_epoch(taken):
    clock, lines = Clock(), []
    shown = Lines(lambda text: lines.append((clock.now, text)), clock)
    shown.start("sgd, seed 3")
    for step in range(1, 51):
        clock.now += taken
        shown.step(read(step, 0.5 if step % 2 else None))
    times = [100.0, *(at for at, _ in lines), clock.now]
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps) <= max(60, taken) and all(gap > 60 - taken for gap in gaps[:-1])
    for at, text in lines:
        step, speed = round((at - 100) / taken), 8 / taken
        shape = f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"
        expected = f"step {step} of 50: loss 0.5, {shape} images/s"
        assert text == f"sgd, seed 3, epoch 3 of 12, {expected}"
    lines.clear()
    shown.epoch(told(3, 100.0, error=12.5))
    shown.epoch(told(4, 100.0))  # of which there is no step
    assert [text for _, text in lines] == [
        "sgd, seed 3, epoch 3 of 12: loss 0.75, error 12.50 %, 4.0 images/s",
        "sgd, seed 3: kept from before",
    ]


def test_a_rank_without_the_loss_says_none_and_a_new_run_not_the_last_ones():
    clock, lines = Clock(), []
    shown = Lines(lines.append, clock)
    for what, loss in (("one", 0.5), ("other", None)):
        shown.start(what)
        clock.now += 70
        shown.step(read(1, loss))
    assert "loss 0.5" in lines[0] and lines[1].startswith("other, epoch 3 of 12, step 1 of 50: 0.1")


def test_bars_show_loss_and_speed_and_count_on_from_a_checkpoint():
    clock, console = Clock(), Console(file=io.StringIO(), force_terminal=True)
    progress = Progress(console=console, auto_refresh=False)
    bars = Bars(progress, 12, clock)
    bars.start("sgd, seed 3")
    for step in (11, 12):
        clock.now += 4
        bars.step(read(step, 0.25 if step == 12 else None))
    epochs, steps = progress.tasks
    assert (epochs.completed, epochs.total) == (2, 12) and (steps.completed, steps.total) == (
        12,
        50,
    )
    assert steps.description == "loss 0.25, 2.0 images/s"
    bars.epoch(told(3, 1.0, error=12.5))
    assert epochs.completed == 3 and epochs.description == "sgd, seed 3: error 12.50 %"
    assert steps.completed == 0


def test_the_loss_is_read_once_in_a_second(monkeypatch):
    clock, seen = Clock(), []
    monkeypatch.setattr("time.monotonic", clock)

    def step(reading):
        clock.now += 0.4
        seen.append(reading)

    run(resnet(), settings=SETTINGS, schedule=Constant(), on_step=step)
    assert [one.step for one in seen] == [1, 2, 3, 4] * 4
    assert [one.loss is not None for one in seen] == [i % 3 == 0 for i in range(16)]


FAST = [*TINY, "--strategy", "sgd", "--epochs", "1"]


@pytest.mark.usefixtures("unrendered")
def test_quiet_leaves_the_place_alone_and_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert succeeds("train", *FAST, "--quiet", "--out", "run") == "run\n"
    job = json.loads(Path("run/job.json").read_text())
    assert job["options"]["epochs"] == 1 and "quiet" not in job["options"]  # nor when it goes on
    assert "--quiet: prints no table" in fails("bench", "resnet8", "--quiet")
    assert "unknown model" in fails("train", "--quiet", "--model", "resnet9")


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_without_a_terminal_each_epoch_has_a_line_and_a_sweep_keeps_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = (*FAST, "--epochs", "2", "--vary", "lr=0.01,0.02", "--seeds", "0", "--out", "s")
    line = r"^(.*), seed 0, epoch (\d) of 2: loss [\d.]+, error .* images/s$"
    found = re.findall(line, succeeds("sweep", *told), re.MULTILINE)
    names = list(dict.fromkeys(name for name, _ in found))
    assert found == [(name, epoch) for name in names for epoch in "12"] and len(names) >= 2
    lines = map(json.loads, Path("s/metrics.jsonl").read_text().splitlines())
    assert {line["strategy"] for line in lines} == {*names}
    assert succeeds("sweep", "--resume", "s", "--quiet") == "s/report.html\n"
    bench = ("bench", "resnet8", "--batch", "2", "--input-size", "8", "--repeats", "1")
    assert succeeds(*bench, "--quiet", "--out", "b.json") == "b.json\n"
    succeeds("compare", *TINY, "--epochs", "1", "--strategies", "sgd", "--out", "c")
    assert succeeds("compare", "--resume", "c", "--quiet") == "c/report.html\n"


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_a_warning_of_ours_is_a_note_in_a_line(tmp_path):
    done = fxlocal("train", *TINY, "--epochs", "4", "--out", tmp_path / "run")
    notes = [line for line in done.stderr.splitlines() if "layers are local where" in line]
    assert done.exit_code == 0 and len(notes) == 1 and notes[0].startswith("note: Static(")
