"""The papers' tables: their numbers, the strategies that make them, and ours beside them."""

import re
from functools import cache

import pytest
import torch
from support.papers import make_results, published
from support.tiny import fake_data, resnet

import fxlocal
from fxlocal import TopK
from fxlocal.compiler.split import find_split, find_units
from fxlocal.experiments.data.task import Goal
from fxlocal.experiments.models.catalogue import MODELS, build_model
from fxlocal.experiments.papers.runner import KERNELS, choose_cells, settings_of, tabulate
from fxlocal.experiments.papers.tables import PAPERS, Cell, find_table, list_tables
from fxlocal.experiments.report.paper_tables import publish_table
from fxlocal.experiments.training.baselines import BASELINES
from fxlocal.experiments.training.settings import Settings, SettingsError, build_scheduler
from fxlocal.experiments.training.specs import is_model, parse_spec

GA, BACKLINK, LOCAL_SGD = "gradient-approximation", "backlink", "local-sgd"
ICLR = "local-sgd-iclr"
TRAINED = [table for table in list_tables() if table.numbers]
CELLS = [
    pytest.param(table, data, id=f"{table.paper} {table.number} {data}")
    for table in TRAINED
    for data in table.numbers
]


@cache
def analysis_of(model):
    return fxlocal.analyze(build_model(model, num_classes=10, width=2, seed=0))


def schedule_of(cell):
    return parse_spec(cell.strategy).told(**cell.arguments).schedule(12, Goal(10))


def numbers_of(paper, table, data, model, row):
    cells = choose_cells(find_table(paper, table), data)[model]
    return [cell.paper for cell in cells if cell.row == row]


# The papers'


SLOWER = {"speedup_percent": -100.0, "best_accuracy_loss": 0.1, "slower": True}


@pytest.mark.parametrize(
    ("table", "model", "row", "numbers"),
    [
        ("2", "cnn2", "random, cnn2", {"speedup_percent": -38.0, "best_accuracy_loss": -0.8}),
        ("2", "cnn2", "topk, cnn2", {"speedup_percent": -6.6, "best_accuracy_loss": 1.0}),
        ("3", "resnet20", "zero, schedule 1", {"speedup_percent": 7.1, "best_accuracy_loss": 1.5}),
        ("3", "resnet20", "topk, schedule 1", {"speedup_percent": 3.5, "best_accuracy_loss": 0.75}),
        ("3", "resnet20", "resnet14", {"speedup_percent": 22.0, "best_accuracy_loss": 1.0}),
        ("4", "vgg19", "random, schedule 1", SLOWER),
        ("5", "resnet20", "full", {"best_accuracy_percent": 91.8}),
        ("5", "resnet20", "zero, schedule 2", {"best_accuracy_percent": 91.6}),
        ("5", "resnet20", "random, schedule 3", {"best_accuracy_percent": 87.9}),
        ("5", "resnet20", "topk, schedule 3", {"best_accuracy_percent": 91.7}),
        ("5", "resnet20", "resnet14", {"best_accuracy_percent": 90.8}),
    ],
)
def test_gradient_approximations_numbers_are_the_papers(table, model, row, numbers):
    assert numbers_of(GA, table, "cifar10", model, row) == [numbers]


@pytest.mark.parametrize(
    ("table", "data", "model", "row", "errors"),
    [
        ("1", "cifar10", "alexnet", "l=2", [11.93, 11.96]),
        ("1", "cifar10", "vgg16-backlink", "BP", [7.41]),
        ("1", "cifar10", "resnet32", "GLL", [10.35, 15.02, 20.59, 24.21]),
        ("1", "cifar10", "resnet110", "l=4", [8.25, 12.54, 13.62]),
        ("1", "cifar100", "resnet32", "l=1", [33.60, 41.92, 45.12, 46.76]),
        ("2", "cifar10", "resnet32", "DGL", [8.69, 11.48, 14.17, 16.22]),
        ("2", "cifar10", "resnet110", "InfoPro", [7.01, 7.96, 9.40, 10.78]),
        ("2", "cifar10", "resnet110", "l=3", [6.36, 7.92, 9.29, 9.75]),
    ],
)
def test_backlinks_numbers_are_the_papers(table, data, model, row, errors):
    found = numbers_of(BACKLINK, table, data, model, row)
    assert [cell["error_percent"] for cell in found] == errors


def test_backlinks_gains_are_those_of_the_papers_text():
    def gain(table, data, worse, better):
        last = [numbers_of(BACKLINK, table, data, "resnet32", row)[-1] for row in (worse, better)]
        return round(last[0]["error_percent"] - last[1]["error_percent"], 2)

    assert gain("1", "cifar10", "GLL", "l=1") == 4.00
    assert gain("1", "cifar100", "GLL", "l=1") == 4.99
    assert gain("2", "cifar10", "InfoPro", "l=1") == 1.83


def test_the_kernels_stand_with_the_bars_to_reach():
    assert find_table(GA, "1").kernels and len(KERNELS) == 8
    assert KERNELS[256, 256, 8] == {"speedup": 1.7, "bar": 5}
    assert KERNELS[512, 512, 2] == {"speedup": 10.4, "bar": 1}


@pytest.mark.parametrize(("table", "data"), CELLS)
def test_every_cell_can_be_run(table, data):
    for model, cells in choose_cells(table, data).items():
        assert model in MODELS and cells[0].strategy == "sgd"
        assert len({cell.name for cell in cells}) == len(cells)
        settings_of(table, model, data)
        analysis = analysis_of(model)
        for cell in cells:
            if cell.strategy in BASELINES or is_model(cell.strategy):
                continue
            plan = schedule_of(cell).plan(analysis, 0)
            if cell.modules:
                assert len(find_split(analysis, plan.modules)) == cell.modules


@pytest.mark.parametrize(
    ("model", "units"),
    [("alexnet", 8), ("vgg16-backlink", 16), ("resnet32", 16), ("resnet110", 55)],
)
def test_networks_have_the_papers_units(model, units):
    with torch.device("meta"):
        network = build_model(model, num_classes=10)
    assert len(find_units(fxlocal.analyze(network))) == units
    assert model in find_table(BACKLINK, "1").networks


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


def test_settings_are_the_papers_but_for_what_is_told():
    settings = settings_of(find_table(BACKLINK, "1"), "alexnet", "glyphs", {"lr": 0.02})
    assert (settings.lr, settings.weight_decay, settings.momentum) == (0.02, 1e-4, 0.9)
    assert (settings.epochs, settings.batch_size, settings.lr_schedule) == (100, 512, "cosine")
    assert settings_of(find_table(GA, "3"), "resnet20", "glyphs").weight_decay == 0.0


def test_methods_have_arguments_that_a_user_may_change():
    table = find_table(BACKLINK, "2")
    given = {name for method in table.methods.values() for name in method}
    assert given - {"strategy", "settings"} == {"balance", "head", "link", "alpha", "weighting"}
    told = {"alpha": 0.7, "weighting": "compound"}
    cells = choose_cells(table, "cifar10", rows=["l=2"], counts=[4], told=told)
    told |= {"link": 2, "balance": "blocks", "head": "conv", "modules": 4}
    assert cells["resnet32"][1].arguments == told
    assert cells["resnet32"][0].arguments == {}
    topk = choose_cells(find_table(GA, "5"), "cifar10", told={"k": 3})["resnet20"][7]
    assert topk.arguments == {"approximate": "schedule-1", "k": 3, "force": True, "scale": None}
    topk = choose_cells(find_table(GA, "5"), "cifar10", told={"scale": 1.0})["resnet20"][7]
    assert schedule_of(topk).method == TopK(1, 1.0, force=True)


IDLE = "--set alpha: changes nothing about sgd, "
ALPHA, WIDE = {"alpha": 0.7}, {"models": ["resnet32"], "rows": ["GLL", "l=2"], "counts": [16]}


@pytest.mark.parametrize(
    ("paper", "number", "options", "message"),
    [
        ("gradient", "1", {}, f"unknown paper 'gradient'. Nearest: '{GA}'"),
        (GA, "6", {}, "no table '6'; it has 1, 2, 3, 4, 5"),
        (BACKLINK, "3", {}, "backlink has no table '3'; it has 1, 2"),
        (LOCAL_SGD, "8", {}, "local-sgd has no table '8'; it has 1, 2, 3, 4, 5, 6, 7"),
        (LOCAL_SGD, "2", {"rows": ["pruning"]}, "--rows pruning: the table has no 'pruning'"),
        (ICLR, "7", {"rows": ["frozen"]}, "--rows frozen: each line needs all rows"),
        (ICLR, "5", {"told": {"largest": 0.5, "curve": "linear"}}, "--set curve: changes nothing"),
        (BACKLINK, "2", {"models": ["alexnet"]}, "no 'alexnet'. Nearest: 'resnet"),
        (BACKLINK, "1", {"rows": ["GLL", "l=5"]}, "--rows GLL,l=5: .*no 'l=5'. Nearest: 'l="),
        (BACKLINK, "1", {"counts": [3]}, "--modules K=3: the table has no 'K=3'. Nearest: 'K=8'"),
        (GA, "2", {"counts": [3]}, "no 'K=3'"),
        (BACKLINK, "1", {"rows": ["GLL"], "told": ALPHA}, IDLE + "greedy; leave it out"),
        (GA, "2", {"told": ALPHA}, IDLE + "zero"),
        (BACKLINK, "1", WIDE, "row l=2 has no column K=16; it has K=2, 4, 8"),
        (BACKLINK, "1", {"models": ["alexnet"], "counts": [16]}, "no 'K=16'"),
    ],
)
def test_what_makes_no_table_is_refused(paper, number, options, message):
    with pytest.raises(SettingsError, match=message):
        choose_cells(find_table(paper, number), "cifar10", **options)


def test_all_papers_are_listed():
    assert list(dict.fromkeys(table.paper for table in list_tables())) == list(PAPERS)
    assert [table.number for table in list_tables() if table.paper == GA] == list("12345")


# Ours beside them


def test_errors_are_lost_by_seed_and_speed_is_time_saved():
    cells = choose_cells(find_table(GA, "2"), "cifar10")["cnn2"]
    names = [cell.name for cell in cells]
    assert names == ["sgd", "zero, cnn2", "random, cnn2", "topk, cnn2"]
    runs = [("sgd", 0, 10.0, 8.0), ("sgd", 1, 14.0, 8.0)]
    runs += [(names[1], 0, 12.0, 6.0), (names[1], 1, 15.0, 6.0)]
    runs += [(names[2], 0, None, 1.0), (names[2], 1, 16.0, 32.0)]
    runs += [(names[3], 0, None, 1.0), (names[3], 1, None, 1.0)]
    results = make_results(runs)
    for run in results["runs"]:  # better in its middle
        better = [run["error_percent"] - 0.5 - run["seed"] / 4] if run["error_percent"] else []
        run["errors"] = [99.0, *better, *run["errors"]]
    full, zero, random, topk = tabulate(cells, results)
    assert (full["error_percent_mean"], full["error_loss_mean"], full["speedup"]) == (12, 0, 1)
    assert zero["error_loss_mean"] == 1.5
    assert zero["error_loss_std"] == pytest.approx(0.5**0.5)
    assert zero["speedup"] == pytest.approx(8 / 6)
    assert random["error_loss_mean"] == 2.0  # of the seed that both finished
    assert random["speedup"] == pytest.approx(0.25)
    assert random["error_loss_std"] is None
    assert (full["best_error_percent_mean"], zero["best_error_percent_mean"]) == (11.375, 12.875)
    assert (zero["best_error_loss_mean"], random["best_error_loss_mean"]) == (1.5, 2.0)
    assert full["best_error_percent_std"] == pytest.approx(3.75 * 0.5**0.5)
    assert topk["best_error_percent_mean"] is None and topk["best_error_loss_mean"] is None
    assert topk["error_percent_mean"] is None and topk["error_loss_mean"] is None
    assert zero["paper"] == {"speedup_percent": -5.7, "best_accuracy_loss": 0.2}


def test_rows_say_which_modules_they_are_of():
    own = [Cell("m", "BP", None, "sgd", {}, {"error_percent": 7.0})]
    own.append(Cell("m", "l=1", 4, "backlink", {"modules": 4, "link": 1}, {"error_percent": 9.0}))
    runs = [("sgd", 0, 10.0, 2.0), ("l=1, K=4", 0, 12.0, 2.0)]
    plain, linked = tabulate(own, make_results(runs))
    assert (plain["network"], plain["modules"], plain["link"]) == ("m", None, 0)
    assert (linked["row"], linked["method"], linked["modules"]) == ("l=1", "backlink", 4)
    assert (linked["link"], linked["saved_bytes"], linked["train_seconds_mean"]) == (1, 9, 2.0)


def test_a_grid_has_a_column_per_number_of_modules(tmp_path, capsys):
    cells = {"models": ["alexnet"], "counts": [2], "rows": ["l=1"]}
    told = {"lr": 0.02, "epochs": 1, "batch_size": 16}
    text, page, results = published(BACKLINK, "1", [12.0, 13.0], tmp_path, capsys, told, **cells)
    for method, theirs in (("BP", "11.44"), ("l=1", "12.24")):
        line = rf"^AlexNet +{method} .*12\.50 \+- 0\.71 \({re.escape(theirs)}\)"
        assert re.search(line, text, re.MULTILINE), text
    assert "GLL" not in text
    assert "ours: fake, 64 images of 3x8x8; seeds 0, 1" in text
    assert "alpha 0.5" in text and "head linear" in text
    assert "alexnet (width 4): 1 epoch, sgd, learning rate 0.02 (cosine), batch of 16" in text
    assert page.startswith("# Table 1: errors") and "(12.24) |" in page
    assert (tmp_path / "backlink-1.md").exists()
    assert results["table"] == "1" and len(results["rows"]) == 2
    assert results["networks"]["alexnet"]["settings"]["weight_decay"] == 1e-4
    assert results["networks"]["alexnet"]["width"] == 4


def test_a_list_has_ours_and_the_papers_where_it_has_numbers(tmp_path, capsys):
    text, page, _ = published(GA, "3", [12.0, 13.0], tmp_path, capsys, {"epochs": 2})
    ours = r"-?\d+\.\d( \+- \d+\.\d)?"
    for name, loss, speed in (
        ("full", "0.0", "0.0"),
        ("zero, schedule 1", "1.5", "7.1"),
        ("topk, schedule 1", "0.75", "3.5"),
        ("resnet14", "1.0", "22.0"),
    ):
        line = rf"^{name} +{ours} +{ours} +{re.escape(loss)} +{ours} +{re.escape(speed)} *$"
        assert re.search(line, text, re.MULTILINE), text
    assert "k 1, force True" in text and "paper: cifar10, TensorFlow 1.13" in text
    assert "resnet20 (width 4): 2 epochs, adam, learning rate 0.001 (exponential)" in text
    assert page.startswith("# Table 3: ResNet-20\n") and "| 0.75 |" in page
    text, _, _ = published(GA, "4", [12.0], tmp_path, capsys)
    assert "below -100.0" in text
    text, _, results = published(GA, "5", [12.0], tmp_path, capsys)
    assert text.count("paper") == 2  # a column of accuracies, and the caption
    assert re.search(r"^zero, schedule 2 +88\.0 +91\.6 +88\.0 ", text, re.MULTILINE), text
    assert re.search(r"^ +accuracy, best +paper +accuracy, last +time saved %", text, re.MULTILINE)
    assert "best: of the evaluations every 10 epochs and of the last, as theirs" in text
    for row in results["rows"]:
        row["best_error_percent_mean"] = 9.5
    publish_table(find_table(GA, "5"), results, fake_data(), tmp_path, 4)
    text = capsys.readouterr().out
    assert re.search(r"^zero, schedule 2 +90\.5 +91\.6 +88\.0 ", text, re.MULTILINE), text


def test_a_table_that_diverged_says_so(tmp_path, capsys):
    _, page, _ = published(GA, "2", [None], tmp_path, capsys)
    assert "| full | diverged | - |" in page
    _, page, _ = published(BACKLINK, "2", [None], tmp_path, capsys, models=["resnet32"], counts=[2])
    assert "| ResNet-32 | BP | diverged | - |" in page
