"""What is written of steps and epochs while runs go on."""

import json
import math
import sys
import types

import pytest
import torch
from support.shell import TINY, fails, succeeds
from support.tiny import (
    LOCAL,
    dropout_net,
    experiment,
    interrupted,
    resnet,
    schedule_of,
    small_comparison,
)

from fxlocal.experiments import tracking
from fxlocal.experiments.report.picture import block_pixels
from fxlocal.experiments.tracking import Board, JsonLines, RunStart, Step, Tracker
from fxlocal.experiments.training.ranks import train_parallel
from fxlocal.experiments.training.results import DivergedError
from fxlocal.experiments.training.settings import Settings
from fxlocal.experiments.training.trainer import train_run

STEP = {"kind", "strategy", "seed", "epochs", "epoch", "step", "loss", "lr", "boundary"} | {
    *("batch_size", "seconds")
}
EPOCH = STEP | {"saved_bytes", "predicted_bytes", "compile_seconds", "error_percent", "flops"}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


def train(folder, model=None, schedule=LOCAL, tracker=None, **options):
    tracker = tracker or Tracker(JsonLines(folder))
    how = {name: options.pop(name) for name in ("checkpoint", "resume") if name in options}
    return train_run(
        experiment(model or dropout_net(), schedule, **options), tracker=tracker, **how
    )


def test_lines_say_what_the_record_says(tmp_path):
    steps = Settings(epochs=3, batch_size=16, evaluate_every=2)
    record = train(tmp_path, settings=steps, strategy="s", seed=5)
    lines = lines_of(tmp_path)
    assert [line["kind"] for line in lines] == (["step"] * 4 + ["epoch"]) * 3
    epochs = [line for line in lines if line["kind"] == "epoch"]
    taken = [line for line in lines if line["kind"] == "step"]
    assert all(set(line) == (EPOCH if line in epochs else STEP) for line in lines)
    assert {(line["strategy"], line["seed"], line["epochs"]) for line in lines} == {("s", 5, 3)}
    assert [line["step"] for line in taken] == list(range(12))
    for name in ("loss", "boundary", "batch_size", "saved_bytes", "predicted_bytes"):
        assert [line[name] for line in epochs] == getattr(record, name)
    assert [line["error_percent"] is None for line in epochs] == [True, False, False]
    assert sum(line["seconds"] for line in epochs) == pytest.approx(record.train_seconds)
    for line in epochs:
        mine = [one for one in taken if one["epoch"] == line["epoch"]]
        mean = sum(one["loss"] for one in mine) / len(mine)
        assert mean == pytest.approx(line["loss"], rel=1e-6)
        assert {one["lr"] for one in mine} == {line["lr"]} and line["step"] == mine[-1]["step"]
        assert {one["boundary"] for one in mine} == {line["boundary"]}
        assert all(one["seconds"] > 0 for one in mine)


def test_tracking_changes_no_number(tmp_path):
    plain, tracked = (
        train_run(experiment(dropout_net(), LOCAL), tracker=tracker)
        for tracker in (None, Tracker(JsonLines(tmp_path)))
    )
    assert plain.loss == tracked.loss and plain.errors == tracked.errors


def test_the_size_of_a_block_changes_no_line(tmp_path, monkeypatch):
    train(tmp_path / "usual")
    for block in (1, 3, 4, 100):
        monkeypatch.setattr(tracking, "BLOCK", block)
        train(tmp_path / "other")
        usual, other = map(lines_of, (tmp_path / "usual", tmp_path / "other"))
        assert without_times(usual) == without_times(other), block


def test_no_step_reads_its_loss(monkeypatch):
    """A read waits for the device; none comes before a block is full, or the epoch over."""
    written = []
    writer = types.SimpleNamespace(start=lambda run: None, write=lambda *a: written.append(a[0]))
    tracker = Tracker(writer)
    tracker.start_run(RunStart({"seed": 0}, 0, 0, torch.device("cpu"), lambda: None))
    tracker.start_epoch()
    read = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(1) or [0.5] * len(self))
    for _ in range(tracking.BLOCK + 7):
        tracker.step(Step(0, torch.tensor(0.5), 0.1, 0, 16, 0, 9))
    assert len(read) == 1 and [len(lines) for lines in written] == [tracking.BLOCK]
    tracker.end_epoch(0, {"loss": 0.5}, None)
    assert len(read) == 2 and [len(lines) for lines in written] == [tracking.BLOCK, 7, 1]
    assert written[-1][0]["step"] == tracking.BLOCK + 6


# Resume


def test_a_broken_run_leaves_the_lines_of_an_unbroken_one(tmp_path):
    whole, broken, path = tmp_path / "whole", tmp_path / "broken", tmp_path / "checkpoint.pt"
    train(whole)
    interrupted(path, 2, dropout_net(), tracker=Tracker(JsonLines(broken)))
    assert lines_of(broken)[-1]["epoch"] == 1
    # As a run leaves it that is killed in its third epoch while it writes.
    with (broken / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "step", "epoch": 2, "step": 8}) + '\n{"kind": "st')
    train(broken, checkpoint=path, resume=True)
    assert without_times(lines_of(broken)) == without_times(lines_of(whole))


def test_steps_go_on_counting_where_there_is_no_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    interrupted(path, 3, dropout_net())
    train(tmp_path, checkpoint=path, resume=True)
    assert [line["step"] for line in lines_of(tmp_path)] == [12, 13, 14, 15, 15]


def test_a_finished_run_keeps_its_lines(tmp_path):
    path = tmp_path / "checkpoint.pt"
    train(tmp_path, checkpoint=path)
    before = lines_of(tmp_path)
    train(tmp_path, checkpoint=path, resume=True)
    assert lines_of(tmp_path) == before


def test_a_new_run_drops_the_old_ones_lines(tmp_path):
    train(tmp_path, strategy="old")
    train(tmp_path, strategy="new")
    assert {line["strategy"] for line in lines_of(tmp_path)} == {"new"}


def test_growing_batches_count_their_own_steps(tmp_path):
    settings = Settings(epochs=4, batch_size=16, grow_batch=True)
    path = tmp_path / "checkpoint.pt"
    schedule = schedule_of("freeze(start=0.25)")
    record = train(tmp_path / "whole", schedule=schedule, settings=settings)
    assert record.batch_size[-1] > 16
    tracker = Tracker(JsonLines(tmp_path / "broken"))
    interrupted(path, 3, dropout_net(), schedule, settings=settings, tracker=tracker)
    again = {"checkpoint": path, "resume": True, "settings": settings}
    train(tmp_path / "broken", schedule=schedule, **again)
    whole, broken = (lines_of(tmp_path / name) for name in ("whole", "broken"))
    assert without_times(whole) == without_times(broken)
    factor = record.batch_size[-1] / 16
    assert whole[-2]["lr"] == pytest.approx(whole[-1]["lr"])
    assert whole[-2]["lr"] == pytest.approx(0.05 / 100 * factor)  # after two falls


# Runs that end otherwise, several runs, several processes


def test_a_diverged_run_shows_its_last_steps(tmp_path):
    with pytest.raises(DivergedError):
        train(tmp_path, settings=Settings(epochs=2, batch_size=16, lr=1e30))
    lines = lines_of(tmp_path)
    assert lines[-1]["kind"] == "epoch" and lines[-1]["loss"] is None
    assert any(line["loss"] is None for line in lines if line["kind"] == "step")


def test_a_comparison_has_the_lines_of_all_its_runs(tmp_path):
    tracker = Tracker(JsonLines(tmp_path))
    names = ["sgd", "freeze", "sgd-same-error"]
    results = small_comparison(names, seeds=(0, 1), tracker=tracker)
    epochs = [line for line in lines_of(tmp_path) if line["kind"] == "epoch"]
    for run in results.runs:
        mine = [line for line in epochs if line["strategy"] == run.strategy]
        mine = [line for line in mine if line["seed"] == run.seed]
        if run.strategy in ("sgd", "freeze"):
            assert [line["loss"] for line in mine] == run.loss
        else:  # it is a part of sgd's
            assert not mine


@pytest.mark.slow  # starts processes
def test_ranks_are_tracked_by_the_first(tmp_path):
    job = experiment(resnet(), schedule_of("dgl(modules=2)"), Settings(epochs=2, batch_size=16))
    record = train_parallel(job, 2, tracker=Tracker(JsonLines(tmp_path)))
    lines = lines_of(tmp_path)
    assert [line["kind"] for line in lines] == (["step"] * 4 + ["epoch"]) * 2
    assert {line["loss"] for line in lines if line["kind"] == "step"} == {None}
    assert [line["loss"] for line in lines if line["kind"] == "epoch"] == record.loss


# TensorBoard


class FakeWriter:
    """Keeps what torch's writer would write."""

    made: list["FakeWriter"]

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step = folder, purge_step
        self.scalars, self.images = [], []
        self.made.append(self)

    def add_scalar(self, name, value, step):
        assert isinstance(value, (int, float)) and math.isfinite(value)
        self.scalars.append((name, value, step))

    def add_image(self, name, pixels, step, dataformats):
        assert pixels.dtype == "uint8" and pixels.ndim == 3 and pixels.shape[2] == 3
        assert dataformats == "HWC"
        self.images.append((name, step))

    def flush(self):
        pass


@pytest.fixture
def written(monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.utils, "tensorboard", module, raising=False)
    FakeWriter.made = []
    return FakeWriter.made


def test_the_board_gets_numbers_and_a_picture_of_each_boundary(written, tmp_path):
    board = Board(tmp_path, block_pixels)
    record = train(None, tracker=Tracker(board), strategy="local-static(start=0.25)", seed=3)
    (writer,) = written
    assert writer.folder.parent == tmp_path / "tensorboard" and writer.purge_step == 0
    assert writer.folder.name == "local-static-start=0.25--3-4"
    names = {name for name, _, _ in writer.scalars}
    assert {"step/loss", "step/seconds", "step/boundary", "epoch/saved_bytes"} <= names
    assert not names & {"step/step", "epoch/epoch", "epoch/seed", "step/kind"}
    losses = [(v, step) for name, v, step in writer.scalars if name == "epoch/loss"]
    assert losses == list(zip(record.loss, (3, 7, 11, 15), strict=True))
    moves = [e for e, b in enumerate(record.boundary) if [b] != record.boundary[max(0, e - 1) : e]]
    assert writer.images == [("blocks", 4 * epoch + 3) for epoch in moves] and len(moves) > 1


def test_the_board_hides_what_a_resumed_run_writes_again(written, tmp_path):
    path = tmp_path / "checkpoint.pt"
    interrupted(path, 2, dropout_net())
    train(None, tracker=Tracker(Board(tmp_path, block_pixels)), checkpoint=path, resume=True)
    assert [writer.purge_step for writer in written] == [8]


def test_a_comparison_gives_each_run_a_folder(written, tmp_path):
    tracker = Tracker(Board(tmp_path, block_pixels))
    once = Settings(epochs=1, batch_size=16)
    small_comparison(["sgd", "freeze"], seeds=(0, 1), settings=once, tracker=tracker)
    assert len({writer.folder for writer in written}) == 4


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, board = tmp_path / "checkpoint.pt", Tracker(Board(tmp_path, block_pixels))
    record = train(None, tracker=board, checkpoint=path, strategy="s")
    read = EventAccumulator(str(tmp_path / "tensorboard" / "s-0-4")).Reload()
    losses = [event.value for event in read.Scalars("epoch/loss")]
    assert losses == pytest.approx(record.loss)
    assert read.Images("blocks")


# The command line


@pytest.mark.usefixtures("unrendered")
def test_commands_write_metrics_beside_their_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeeds("train", *TINY, "--out", "one")
    first = lines_of(tmp_path / "one")
    succeeds("train", *TINY, "--out", "one", "--resume")
    assert lines_of(tmp_path / "one") == first
    options = ("--strategies", "sgd,freeze", "--seeds", "0", "--out", "two")
    succeeds("compare", *TINY, *options)
    assert {line["strategy"] for line in lines_of(tmp_path / "two")} == {"sgd", "freeze"}


@pytest.mark.usefixtures("unrendered")
def test_tensorboard_on_the_command_line(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeeds("train", *TINY, "--out", "one", "--tensorboard")
    succeeds("compare", *TINY, "--strategies", "sgd", "--seeds", "0", "--tensorboard")
    assert len(written) == 2 and all(writer.images for writer in written)


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_tensorboard_that_is_missing_is_said_before_anything_is_written(
    verb, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = fails(verb, *TINY, "--out", str(tmp_path / "o"), "--tensorboard")
    assert "pip install 'fxlocal[tensorboard]'" in line
    assert not (tmp_path / "o").exists()


def test_a_run_that_goes_on_leaves_the_lines_of_the_next_one(tmp_path):
    writer = JsonLines(tmp_path, keep=True)
    for name, first in (("a", 0), ("a", 1), ("b", 0)):
        names = {"strategy": name, "seed": 0, "epochs": 2}
        writer.start(RunStart(names, first, first, torch.device("cpu"), lambda: None))
        for epoch in range(2):
            writer.write([{"kind": "epoch", **names, "epoch": epoch, "step": epoch}])
    lines = [(line["strategy"], line["epoch"]) for line in lines_of(tmp_path)]
    assert lines == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
