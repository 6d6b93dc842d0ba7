"""The gradient approximation paper's tables: their numbers, ours beside them, the command."""

import json
import re
from dataclasses import replace

import pytest
import torch
from support.shell import FAKE, fails, succeeds
from support.tiny import resnet

from fxlocal.experiments.models.catalogue import MODELS
from fxlocal.experiments.papers.tables import TABLES, Row, tabulate
from fxlocal.experiments.training.compare import collect_results
from fxlocal.experiments.training.settings import Machine, Settings, build_scheduler
from fxlocal.experiments.training.strategies import Options, build_schedule, is_model
from fxlocal.experiments.training.trainer import Run

QUICK = [*FAKE, "--size", "16", "--width", "2", "--epochs", "2", "--batch-size", "16"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def row(number, name):
    (found,) = (row for row in TABLES[number].rows if row.name == name)
    return found


# The paper's


def test_the_numbers_are_the_papers():
    assert row(2, "random, cnn2") == Row("random", "cnn2", speedup=-38.0, loss=-0.8)
    assert row(2, "topk, cnn2") == Row("topk", "cnn2", speedup=-6.6, loss=1.0)
    assert row(3, "zero, schedule 1") == Row("zero", "schedule-1", speedup=7.1, loss=1.5)
    assert row(3, "topk, schedule 1") == Row("topk", "schedule-1", speedup=3.5, loss=0.75)
    assert row(3, "resnet14") == Row("resnet14", speedup=22.0, loss=1.0)
    assert row(4, "random, schedule 1") == Row("random", "schedule-1", -100.0, 0.1, slower=True)
    assert row(5, "sgd").accuracy == 91.8
    assert row(5, "zero, schedule 2").accuracy == 91.6
    assert row(5, "random, schedule 3").accuracy == 87.9
    assert row(5, "topk, schedule 3").accuracy == 91.7
    assert row(5, "resnet14").accuracy == 90.8


def test_every_table_can_be_run():
    for table in TABLES.values():
        assert table.model in MODELS and table.rows[0].name == "sgd"
        assert len({row.name for row in table.rows}) == len(table.rows)
        for row in table.rows:
            if row.schedule:
                build_schedule(row.strategy, 1, replace(Options(), approximate=row.schedule))
            else:
                assert row.strategy == "sgd" or is_model(row.strategy)


@pytest.mark.parametrize("epochs", [1, 5])
def test_the_learning_rate_falls_to_a_hundredth_by_equal_factors(epochs):
    settings = Settings(epochs=epochs, lr=0.5, lr_schedule="exponential")
    optimizer = torch.optim.SGD(resnet().parameters(), lr=settings.lr)
    scheduler = build_scheduler(optimizer, settings)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(epochs):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5 * 0.01 ** (i / epochs) for i in range(epochs + 1)])
    assert rates[-1] == pytest.approx(0.005)


# Ours beside them


def results(runs):
    made = [
        Run(name, seed, error, seconds, 0.0, [9], [0], [0.1], images=100)
        for name, seed, error, seconds in runs
    ]
    return collect_results("d", "m", 1, Machine(), made)


def test_losses_are_by_seed_and_speed_is_time_saved():
    names = [row.name for row in TABLES[2].rows]
    runs = [("sgd", 0, 10.0, 8.0), ("sgd", 1, 14.0, 8.0)]
    runs += [(names[1], 0, 12.0, 6.0), (names[1], 1, 15.0, 6.0)]
    runs += [(names[2], 0, None, 1.0), (names[2], 1, 16.0, 32.0)]
    runs += [(names[3], 0, None, 1.0), (names[3], 1, None, 1.0)]
    full, zero, random, topk = tabulate(TABLES[2], results(runs))
    assert (full["accuracy_percent_mean"], full["accuracy_loss_mean"]) == (88.0, 0.0)
    assert full["speedup_percent"] == 0.0
    assert zero["accuracy_loss_mean"] == 1.5
    assert zero["accuracy_loss_std"] == pytest.approx(0.5**0.5)
    assert zero["speedup_percent"] == pytest.approx(25.0)
    assert random["accuracy_loss_mean"] == 2.0  # of the seed that both finished
    assert random["speedup_percent"] == pytest.approx(-300.0)
    assert random["accuracy_loss_std"] is None
    assert topk["accuracy_percent_mean"] is None and topk["speedup_percent"] is None
    assert zero["paper"]["speedup_percent"] == -5.7 and zero["paper"]["accuracy_loss"] == 0.2


@pytest.mark.slow
def test_table_3_prints_ours_and_theirs_and_writes_a_folder(tmp_path):
    text = succeeds("table", "3", *QUICK, "--seeds", "0,1", "--out", "o")
    ours = r"-?\d+\.\d( \+- \d+\.\d)?"
    for name, loss, speed in (
        ("full", "0.0", "0.0"),
        ("zero, schedule 1", "1.5", "7.1"),
        ("topk, schedule 1", "0.75", "3.5"),
        ("resnet14", "1.0", "22.0"),
    ):
        line = rf"^{name} +{ours} +{ours} +{re.escape(loss)} +{ours} +{re.escape(speed)} *$"
        assert re.search(line, text, re.MULTILINE), text
    assert "resnet20 (width 2) on fake, 64 images of 3x16x16; 2 epochs, seeds 0, 1" in text
    assert "adam, learning rate 0.001 (exponential), batch of 16; topk of 1" in text
    assert "cpu (" in text and "paper: CIFAR-10, about 250 epochs" in text
    page = (tmp_path / "o" / "table-3.md").read_text()
    assert page.startswith("# Table 3: ResNet-20\n") and "| 0.75 |" in page
    assert text.splitlines()[-6] in page
    written = json.loads((tmp_path / "o" / "results.json").read_text())
    assert written["table"] == 3 and len(written["runs"]) == 10
    assert written["other_models"] == ["resnet14"]
    assert written["rows"][1]["paper"]["accuracy_loss"] == 1.5
    assert (written["settings"]["weight_decay"], written["options"]["force"]) == (0.0, True)
    losses = [run["loss"][0] for run in written["runs"][:4]]
    assert len(set(losses)) == 4  # topk approximates too


@pytest.mark.slow
@pytest.mark.parametrize("table", [2, 4, 5])
def test_the_other_tables_run(table, tmp_path):
    text = succeeds("table", table, *QUICK, "--seeds", "0", "--no-force", "--out", "o")
    rows = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert [row["row"] for row in rows] == [row.name for row in TABLES[table].rows]
    assert "topk of 1, where predicted to be faster" in text
    if table == 4:
        assert "below -100.0" in text
    if table == 5:
        assert text.count("paper") == 2  # a column of accuracies, and the caption
        assert re.search(r"^zero, schedule 2 +\d+\.\d +91\.6 ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1",), "table 1 times a kernel and trains nothing: run fxlocal kernels"),
        (("6",), "table 6: give 2 to 5, backlink-1 or backlink-2"),
        (("x",), "table x: give 2 to 5"),
        (("3",), "cannot load 'cifar10' .*--download"),
        (("3", *QUICK, "--epochs", "0"), "epochs=0"),
        (("3", *QUICK, "--k", "0"), "TopK.k=0."),
        (("2", *QUICK, "--momentum", "0.5"), "--momentum: adam has none"),
        (("3", *QUICK, "--seeds", "0,0"), "none twice"),
        (("3", "--data", "membranes", "--size", "16"), "no class per image to be right about"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_makes_no_table_gets_one_line_and_writes_nothing(arguments, message, tmp_path):
    assert re.search(message, fails("table", *arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["5", "backlink-1"])
def test_help_has_the_tables_name_once(name):
    assert f"table {name} [OPTIONS]" in succeeds("table", name, "--help").splitlines()[1].strip()


def test_a_table_that_diverged_says_so(tmp_path):
    line = fails("table", "2", *QUICK, "--lr", "1e30", "--seeds", "0", "--out", "o", code=1)
    assert "sgd, seed 0, in epoch" in line
    assert "| full | diverged | - |" in (tmp_path / "o" / "table-2.md").read_text()
