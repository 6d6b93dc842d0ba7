"""The BackLink paper's tables: their numbers, ours beside them, the command."""

import json
import re

import pytest
import torch
from support.shell import FAKE, fails, succeeds

import fxlocal
from fxlocal.compiler.split import find_split, find_units
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.papers.backlink_numbers import (
    BACKLINK_TABLES,
    COUNTS,
    NETWORKS,
    Cell,
    find_cells,
)
from fxlocal.experiments.papers.backlink_tables import tabulate
from fxlocal.experiments.training.compare import collect_results
from fxlocal.experiments.training.settings import Machine
from fxlocal.experiments.training.strategies import Options, build_schedule
from fxlocal.experiments.training.trainer import Run

QUICK = [*FAKE, "--size", "8", "--width", "4", "--epochs", "1", "--batch-size", "16"]
ALL = [
    (name, data, model)
    for name, table in BACKLINK_TABLES.items()
    for data, errors in table.errors.items()
    for model in errors
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def cells(name, data, model, counts=COUNTS):
    return find_cells(BACKLINK_TABLES[name].errors[data][model], counts)


# The paper's


def paper(name, data, model, row):
    return [cell.paper for cell in cells(name, data, model) if cell.row == row]


def test_the_numbers_are_the_papers():
    assert paper("backlink-1", "cifar10", "alexnet", "l=2") == [11.93, 11.96]
    assert paper("backlink-1", "cifar10", "vgg16-backlink", "BP") == [7.41]
    assert paper("backlink-1", "cifar10", "resnet32", "GLL") == [10.35, 15.02, 20.59, 24.21]
    assert paper("backlink-1", "cifar10", "resnet110", "l=4") == [8.25, 12.54, 13.62]
    assert paper("backlink-1", "cifar100", "resnet32", "l=1") == [33.60, 41.92, 45.12, 46.76]
    assert paper("backlink-2", "cifar10", "resnet32", "DGL") == [8.69, 11.48, 14.17, 16.22]
    assert paper("backlink-2", "cifar10", "resnet110", "InfoPro") == [7.01, 7.96, 9.40, 10.78]
    assert paper("backlink-2", "cifar10", "resnet110", "l=3") == [6.36, 7.92, 9.29, 9.75]


def test_the_gains_are_those_of_the_papers_text():
    def gain(name, data, worse, better):
        last = [paper(name, data, "resnet32", row)[-1] for row in (worse, better)]
        return round(last[0] - last[1], 2)

    assert gain("backlink-1", "cifar10", "GLL", "l=1") == 4.00
    assert gain("backlink-1", "cifar100", "GLL", "l=1") == 4.99
    assert gain("backlink-2", "cifar10", "InfoPro", "l=1") == 1.83


@pytest.mark.parametrize(("name", "data", "model"), ALL, ids=" ".join)
def test_every_cell_splits_its_network(name, data, model):
    analysis = fxlocal.analyze(build_model(model, num_classes=10, width=1, seed=0))
    for cell in cells(name, data, model)[1:]:
        options = Options(modules=cell.modules, link=cell.link, balance="blocks")
        schedule = build_schedule(cell.strategy, 1, options)
        assert len(find_split(analysis, schedule.fixed.modules)) == cell.modules


@pytest.mark.parametrize(
    ("model", "units"),
    [("alexnet", 8), ("vgg16-backlink", 16), ("resnet32", 16), ("resnet110", 55)],
)
def test_networks_have_the_papers_units(model, units):
    with torch.device("meta"):
        network = build_model(model, num_classes=10)
    assert len(find_units(fxlocal.analyze(network))) == units
    assert model in NETWORKS


# Ours beside them


def test_errors_are_lost_by_seed():
    own = [Cell("BP", "sgd", 1, 0, 7.0), Cell("l=1", "backlink", 4, 1, 9.0)]
    own.append(Cell("GLL", "greedy", 4, 0, 10.0))
    runs = [("sgd", 0, 10.0), ("sgd", 1, 14.0), ("l=1, K=4", 0, 12.0), ("l=1, K=4", 1, 15.0)]
    runs += [("GLL, K=4", 0, None), ("GLL, K=4", 1, None)]
    made = [Run(name, s, error, 2.0, 0.0, [9], [0], [0.1], images=1) for name, s, error in runs]
    plain, linked, greedy = tabulate("m", own, collect_results("d", "m", 1, Machine(), made))
    assert (plain["error_percent_mean"], plain["error_loss_mean"]) == (12.0, 0.0)
    assert linked["error_loss_mean"] == 1.5 and linked["error_percent_mean"] == 13.5
    assert linked["error_loss_std"] == pytest.approx(0.5**0.5)
    assert (linked["network"], linked["modules"], linked["link"]) == ("m", 4, 1)
    assert linked["paper"] == {"error_percent": 9.0}
    assert greedy["error_percent_mean"] is None and greedy["error_loss_mean"] is None


def test_table_1_prints_ours_and_theirs_and_writes_a_folder(tmp_path):
    told = ("--models", "alexnet", "--modules", "2", "--rows", "l=1", "--lr", "0.02")
    text = succeeds("table", "backlink-1", *QUICK, *told, "--seeds", "0,1", "--out", "o")
    for method, theirs in (("BP", "11.44"), ("l=1", "12.24")):
        line = rf"^AlexNet +{method} .*\d+\.\d\d \+- \d+\.\d\d \({re.escape(theirs)}\)"
        assert re.search(line, text, re.MULTILINE), text
    assert "GLL" not in text
    assert "ours: fake, 64 images of 3x8x8; seeds 0, 1; alpha 0.5" in text
    assert "alexnet (width 4): 1 epoch, sgd, learning rate 0.02 (cosine), batch of 16" in text
    page = (tmp_path / "o" / "backlink-1.md").read_text()
    assert page.startswith("# Table 1: errors") and "(12.24) |" in page
    written = json.loads((tmp_path / "o" / "results.json").read_text())
    assert written["table"] == "backlink-1" and len(written["rows"]) == 2
    assert len(written["networks"]["alexnet"]["runs"]) == 4
    settings = written["networks"]["alexnet"]["settings"]
    assert (settings["weight_decay"], settings["momentum"]) == (1e-4, 0.9)
    options = written["networks"]["alexnet"]["options"]
    assert (options["head"], options["balance"]) == ("linear", "blocks")
    losses = {tuple(run["loss"]) for run in written["networks"]["alexnet"]["runs"]}
    assert len(losses) == 4


@pytest.mark.slow
def test_table_2_runs_with_every_method(tmp_path):
    told = ("--models", "resnet32", "--modules", "2", "--seeds", "0")
    text = succeeds("table", "backlink-2", *QUICK, *told, "--out", "o")
    rows = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert [row["row"] for row in rows] == [
        *("BP", "GLL", "DGL", "InfoPro", "l=1", "l=2", "l=3", "l=4")
    ]
    assert "K=2" in text and "K=16" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("backlink-3",), "table backlink-3: give 2 to 5, backlink-1 or backlink-2"),
        (("backlink-2", "--models", "alexnet"), "no 'alexnet'. Nearest: 'resnet"),
        (("backlink-1", "--rows", "GLL,l=5"), "no 'l=5'. Nearest: 'l="),
        (("backlink-1", "--modules", "3"), "no column K=3; give some of 2, 4, 8, 16"),
        (("backlink-1", "--modules", "x"), "--modules 'x': give integers"),
        (("backlink-1",), "cannot load 'cifar10' .*--download"),
        (("backlink-1", *QUICK, "--epochs", "0"), "epochs=0"),
        (("backlink-1", "--alpha", "2"), "alpha=2"),
        (
            ("backlink-1", "--rows", "GLL", "--alpha", "0.7"),
            "--alpha: changes nothing about sgd, g",
        ),
        (
            ("backlink-1", "--models", "resnet32", "--rows", "GLL,l=2", "--modules", "16"),
            "row l=2 has no column K=16; it has K=2, 4, 8",
        ),
        (("backlink-1", "--models", "alexnet", "--modules", "16"), "no column K=16"),
        (("backlink-1", "--data", "membranes", "--size", "16"), "no class per image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_makes_no_table_gets_one_line_and_writes_nothing(arguments, message, tmp_path):
    assert re.search(message, fails("table", *arguments))
    assert not list(tmp_path.iterdir())


def test_a_table_that_diverged_says_so(tmp_path):
    told = (
        "--models",
        "alexnet",
        "--modules",
        "2",
        "--rows",
        "GLL",
        "--seeds",
        "0",
        "--lr",
        "1e30",
    )
    line = fails("table", "backlink-1", *QUICK, *told, "--out", "o", code=1)
    assert "sgd, seed 0, in epoch" in line
    assert "| AlexNet | BP | diverged | - |" in (tmp_path / "o" / "backlink-1.md").read_text()
