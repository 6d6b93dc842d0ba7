"""LoCal+SGD's tables, of both versions: their numbers, what makes ours, and the small ones."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.papers import make_results, published
from support.shell import fails, succeeds

from fxlocal.experiments.papers.grids import choose_best, meet_budgets
from fxlocal.experiments.papers.runner import choose_cells, reproduce, settings_of, tabulate
from fxlocal.experiments.papers.tables import data_of, find_table, shrink
from fxlocal.experiments.training.settings import SettingsError

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

FRONTIERS, ICLR = "local-sgd", "local-sgd-iclr"
BOTH = [(FRONTIERS, number) for number in "1234567"] + [(ICLR, number) for number in "12345678"]
TOY = ("--epochs", "2", "--batch-size", "16", "--num-train", "64", "--num-test", "20")
TOY += ("--seeds", "0", "--width", "4")


def numbers_of(paper, table, data, model):
    """What the paper has of each row."""
    cells = choose_cells(find_table(paper, table), data)[model]
    return {cell.row: tuple(cell.paper.values()) for cell in cells if cell.paper}


# The papers'


@pytest.mark.parametrize(
    ("paper", "table", "data", "model", "numbers"),
    [
        (
            FRONTIERS,
            "1",
            "folder:x",
            "resnet50",
            "24.02 1.0 24.51 1.42 24.45 1.37 26.76 1.08 24.89 1.32 24.84 1.49",
        ),
        (
            FRONTIERS,
            "1",
            "folder:x",
            "resnet34",
            "26.6 1.0 27.0 1.34 27.04 1.26 27.89 1.13 27.32 1.36",
        ),
        (FRONTIERS, "2", "cifar10", "resnet18", "6.06 1.0 6.17 1.53 6.23 1.43 6.79 1.35 6.51 1.65"),
        (FRONTIERS, "2", "cifar100", "vgg13", "31.36 1.0 31.56 1.3 31.59 1.32 31.94 1.42"),
        (FRONTIERS, "3", "folder:x", "mobilenetv2", "28.94 29.18"),
        (FRONTIERS, "3", "cifar10", "vgg13", "7.25 7.56"),
        (FRONTIERS, "4", "folder:x", "resnet50", "24.06 1.0 24.48 1.27 24.51 1.34"),
        (FRONTIERS, "5", "cifar100", "resnet18", "23.63 23.75"),
        (FRONTIERS, "6", "cifar10", "resnet18", "7.7 1.0 7.96 1.48"),
        (FRONTIERS, "7", "isbi2012", "unet", "0.948 1.0 0.943 1.26"),
        (ICLR, "1", "folder:x", "mobilenetv2", "28.41 1.0 28.94 1.31 30.53 1.17 29.49 1.52"),
        (
            ICLR,
            "1",
            "folder:x",
            "resnet50",
            "24.02 1.0 24.41 1.36 26.76 1.08 24.89 1.32 25.64 1.44",
        ),
        (ICLR, "2", "cifar10", "resnet18", "6.06 1.0 6.23 1.51 6.79 1.35 6.51 1.65"),
        (ICLR, "4", "folder:x", "mobilenetv2", "28.82 1.36 29.94 1.31"),
        (ICLR, "5", "folder:x", "resnet34", "27.04 27.1"),
        (ICLR, "6", "folder:x", "mobilenetv2", "138 28.92 1.0 146 28.94 1.24"),
        (ICLR, "8", "folder:x", "resnet50", "24.51 1.41"),
    ],
)
def test_numbers_are_the_papers(paper, table, data, model, numbers):
    found = [
        str(number) for row in numbers_of(paper, table, data, model).values() for number in row
    ]
    assert " ".join(found) == numbers


def test_settings_are_the_papers():
    table = find_table(FRONTIERS, "2")
    cifar10, cifar100 = (settings_of(table, "vgg13", data) for data in ("cifar10", "cifar100"))
    first = (cifar10.epochs, cifar10.batch_size, cifar10.lr, cifar10.weight_decay)
    assert first == (90, 64, 0.05, 5e-4)
    assert (cifar100.epochs, cifar100.lr) == (150, 0.025)
    own = [settings_of(find_table(ICLR, "1"), m, "folder:x") for m in ("resnet34", "mobilenetv2")]
    found = [(s.epochs, s.lr, s.weight_decay, s.batch_size) for s in own]
    assert found == [(90, 0.025, 4e-5, 64), (150, 0.0125, 4e-5, 64)]
    assert own[1].lr_schedule == "cosine"
    several = settings_of(find_table(FRONTIERS, "4"), "resnet50", "folder:x")
    assert (several.batch_size, several.lr) == (256, 0.1)
    assert settings_of(find_table(FRONTIERS, "6"), "resnet18", "cifar10").optimizer == "adam"


def test_the_local_rate_falls_as_the_data_set_has_it():
    decays = {}
    for paper, data, model in ((FRONTIERS, "cifar10", "vgg13"), (ICLR, "folder:x", "resnet50")):
        table = find_table(paper, "2" if data == "cifar10" else "1")
        cells = choose_cells(table, data)[model]
        arguments = [cell.arguments for cell in cells if "rate" in cell.arguments]
        assert arguments and {own["rate"] for own in arguments} == {0.01}
        decays[data] = [own["rate_decay"] for own in arguments]
    assert decays == {"cifar10": [[0.5, 30]] * 2, "folder:x": [[0.1, 30]]}


def test_frozen_layers_are_those_of_the_versions_own_rule():
    names = [
        [(cell.row, cell.strategy) for cell in choose_cells(find_table(paper, "2"), "cifar10")[m]]
        for paper, m in ((FRONTIERS, "resnet18"), (ICLR, "vgg13"))
    ]
    local = [("static", "local-static"), ("dynamic", "local-dynamic")]
    others = [("stochastic depth", "stochastic-depth"), ("frozen", "freeze")]
    assert names[0][1:] == local + others
    # A VGG has no blocks to leave out.
    assert names[1][1:] == [("LoCal+SGD", "local-dynamic"), ("frozen", "freeze-dynamic")]


# Grids and budgets


def test_a_row_of_a_grid_is_a_cell_per_setting():
    table = find_table(ICLR, "4")
    tuned = [c for c in choose_cells(table, "folder:x")["resnet34"] if c.row == "fine-tuned"]
    names = [cell.name for cell in tuned]
    assert names[0] == "fine-tuned, alpha=0.8, largest=0.6" and len(set(names)) == 6
    assert tuned[1].arguments["largest"] == 0.75 and tuned[1].arguments["average"] == "window"
    told = choose_cells(table, "folder:x", told={"alpha": 0.7})["resnet34"]
    assert [c.arguments["alpha"] for c in told[1:]] == [0.7] * 3  # two of the grid are left
    assert told[1].name == "fine-tuned, largest=0.6"


def row(name, error, speedup, loss=None, network="m"):
    method = "sgd" if name == "SGD" else "local"
    return {
        **{"network": network, "row": name, "method": method, "modules": None},
        **{"error_percent_mean": error, "speedup": speedup, "error_loss_mean": loss},
    }


def test_the_best_of_a_grid_has_the_lowest_error():
    rows = [row("SGD", 5.0, 1.0), row("a", None, None), row("a", 6.0, 1.2), row("a", 5.5, 1.1)]
    rows += [row("b", None, None), row("a", 7.0, 1.3, network="n")]
    assert choose_best(rows) == [rows[0], rows[3], rows[4], rows[5]]


def test_budgets_take_the_fastest_within_and_the_best_that_takes_no_longer():
    local = [row("L", 5.1, 1.1, 0.1), row("L", 5.2, 1.3, 0.2), row("L", 5.15, 1.2, 0.15)]
    local += [row("L", 6.0, 1.9, 1.0), row("L", None, None)]
    frozen = [row("F", 5.05, 1.0, 0.05), row("F", 5.3, 1.3, 0.3), row("F", 5.4, 1.5, 0.4)]
    met = meet_budgets([row("SGD", 5.0, 1.0, 0.0), *local, *frozen], [0.05, 0.1, 0.5, 1.0])
    assert [(m["local"] and m["local"]["error_loss_mean"]) for m in met] == [None, 0.1, 0.2, 1.0]
    assert [(m["frozen"] and m["frozen"]["error_loss_mean"]) for m in met] == [None, 0.3, 0.3, None]


# What is shown


@pytest.mark.parametrize(
    ("paper", "number", "line"),
    [
        (FRONTIERS, "2", r"ResNet-18 +static +12\.50 \+- 0\.71 +6\.17 +1\.00 +1\.53"),
        (FRONTIERS, "1", r"MobileNetV2 +frozen +12\.50 \+- 0\.71 +29\.31 +1\.00 +1\.54"),
        (FRONTIERS, "3", r"ResNet-34 +SGD, same time +12\.50 \+- 0\.71 +27\.36 +1\.00"),
        (FRONTIERS, "4", r"LoCal\+SGD, growing batch +12\.50 \+- 0\.71 +24\.51 +1\.00 +1\.34"),
        (FRONTIERS, "5", r"ResNet-50 +without +12\.50 \+- 0\.71 +24\.49"),
        (FRONTIERS, "6", r"LoCal\+Adam +12\.50 \+- 0\.71 +7\.96 +1\.00 +1\.48"),
        (FRONTIERS, "7", r"LoCal\+SGD +0\.875 +0\.943 +1\.00 +1\.26"),
        (ICLR, "1", r"ResNet-50 +LoCal\+SGD +12\.50 \+- 0\.71 +24\.41 +1\.00 +1\.36"),
        (ICLR, "2", r"VGG-13 +frozen +12\.50 \+- 0\.71 +7\.43 +1\.00 +1\.42"),
        (ICLR, "3", r"LoCal\+SGD +12\.50 \+- 0\.71 +24\.48 +1\.00 +1\.27"),
        (ICLR, "4", r"ResNet-34 +fine-tuned \(alpha 0.8, +12\.50 \+- 0\.71 +26\.93 +1\.00 +1\.32"),
        (ICLR, "5", r"VGG-13 +with +12\.50 \+- 0\.71 +7\.25"),
        (ICLR, "6", r"ResNet-50 +SGD +1\.0 +76 +12\.50 \+- 0\.71 +24\.4 +1\.00 +1\.0"),
        (ICLR, "8", r"MobileNetV2 +static +12\.50 \+- 0\.71 +28\.9 +1\.00 +1\.33"),
    ],
)
def test_ours_stand_beside_theirs(paper, number, line, tmp_path, capsys):
    data = "cifar10" if (paper, number, "VGG" in line) == (ICLR, "5", True) else "glyphs"
    text, _, _ = published(paper, number, [12.0, 13.0], tmp_path, capsys, data=data)
    assert re.search(rf"^{line}", text, re.MULTILINE), text


def test_budgets_have_a_line_each(tmp_path, capsys):
    text, page, _ = published(ICLR, "7", [12.0, 13.0], tmp_path, capsys)
    own = "0.8/0.3 | 0.00 | 1.00"
    assert f"|  | 0.05 | {own} | 0.08 | {own} | 0.04 |" in page
    assert re.search(r"budget +LoCal\+SGD +loss.*paper +frozen +loss", text), text
    assert page.count("\n|  | ") == 6  # and the header


def test_runs_are_compared_where_they_have_equal_errors():
    table = find_table(ICLR, "6")
    cells = choose_cells(table, "glyphs", models=["resnet50"])
    results = make_results([("sgd", 0, 4.0, 4.0), ("LoCal+SGD", 0, 9.0, 6.0)])
    curves = ([9.0, 8.0, 5.0, 4.0], [9.0, 5.5, 6.0])
    for run, errors in zip(results["runs"], curves, strict=True):
        epochs = range(1, len(errors) + 1)
        run |= {"errors": errors, "error_epochs": list(epochs), "loss": [0.1] * len(errors)}
        run["images"] = 100 * len(errors)
        run |= {"seconds": [1.0 * e if run["strategy"] == "sgd" else 2.0 * e for e in epochs]}
    settings = {"resnet50": settings_of(table, "resnet50", "glyphs")}
    sgd, local = reproduce(table, cells, settings, lambda *told: results)["rows"]
    assert (sgd["epochs"], sgd["error_percent_mean"], sgd["speedup"]) == (3, 5.0, 1.0)
    assert (local["epochs"], local["error_percent_mean"], local["speedup"]) == (2, 5.5, 3 / 4)


def test_a_baseline_without_a_reference_diverged():
    cells = choose_cells(find_table(FRONTIERS, "3"), "cifar10")["vgg13"]
    results = make_results([("sgd", 0, 10.0, 8.0), ("LoCal+SGD", 0, None, 1.0)])
    assert [r["error_percent_mean"] for r in tabulate(cells, results)] == [10.0, None, None]


# The small ones


def test_small_tables_change_settings_and_nothing_else():
    usual, small = find_table(ICLR, "1"), shrink(find_table(ICLR, "1"))
    assert small.numbers == usual.numbers and small.methods == usual.methods
    settings = settings_of(small, "mobilenetv2", "glyphs", {"batch_size": 8})
    assert (settings.epochs, settings.lr, settings.batch_size) == (12, 0.0125, 8)
    arguments = choose_cells(small, "glyphs")["resnet50"][1].arguments
    assert (arguments["rate"], arguments["alpha"]) == (1e-4, 0.95)
    (pruned,) = (c for c in choose_cells(small, "glyphs")["resnet50"] if c.row == "pruned")
    assert pruned.arguments == {"share": 0.25, "every": 3}
    with pytest.raises(SettingsError, match="backlink has no small tables"):
        shrink(find_table("backlink", "1"))


def test_a_folder_is_learned_by_models_for_large_images():
    table = find_table(FRONTIERS, "1")
    assert table.model_of("resnet50", "folder:/x", None) == "torchvision:resnet50"
    assert table.model_of("resnet50", "folder:/x", 8) == "resnet50"
    assert table.model_of("resnet50", "glyphs", None) == "resnet50"
    assert table.theirs_on("folder:/x") == "imagenet"
    assert data_of(find_table(FRONTIERS, "2"), "") == "cifar10"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FRONTIERS, "1"), "is of ImageNet: give --data folder:PATH .* --small, or other --data"),
        (("backlink", "1", "--small"), "--small: backlink has no small tables"),
        (
            (FRONTIERS, "7", "--data", "fake", *TOY, "--size", "8"),
            "table 7 is of segmentation; data 'fake' are not",
        ),
        (
            (ICLR, "2", "--small", "--data", "membranes", *TOY, "--size", "16"),
            "table 2 is of classification; data",
        ),
    ],
)
def test_what_cannot_be_run_gets_one_clear_line(arguments, message, tmp_path):
    assert re.search(message, fails("reproduce", *arguments))
    assert not list(tmp_path.iterdir())


def test_small_sets_what_is_not_given(monkeypatch, tmp_path):
    asked = {}

    def compare(experiment, strategies, seeds, *, settings, **others):
        asked.update(experiment=experiment, strategies=strategies, seeds=seeds, settings=settings)
        runs = [(name, seed, 12.0, 8.0) for name in strategies for seed in seeds]
        return SimpleNamespace(to_json=lambda: make_results(runs))

    monkeypatch.setattr("fxlocal.experiments.cli.reproduce.compare_with_bars", compare)
    options = ("--num-train", "8", "--num-test", "8", "--size", "8", "--lr", "0.2", "--out", "o")
    succeeds("reproduce", ICLR, "3", "--small", *options)
    experiment = asked["experiment"]
    assert (experiment.data.name, experiment.data.shape) == ("glyphs", (3, 8, 8))
    assert (experiment.settings.epochs, experiment.settings.lr) == (12, 0.2)
    assert (experiment.model, asked["seeds"]) == ("resnet50", [0, 1])
    names = ["sgd", "LoCal+SGD", "LoCal+SGD, growing batch"]
    assert list(asked["strategies"]) == names
    assert asked["strategies"][names[1]].arguments["local-dynamic"]["rate"] == 1e-4
    assert asked["settings"] == {names[2]: replace(experiment.settings, grow_batch=True)}
    assert experiment.build(0).conv1.out_channels == 8
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["networks"]["resnet50"]["width"] == 8


def test_a_baseline_of_a_table_is_no_spec(monkeypatch):
    asked = {}

    def compare(experiment, strategies, seeds, **others):
        asked.update(strategies)
        return SimpleNamespace(to_json=lambda: make_results([("sgd", 0, 12.0, 8.0)]))

    monkeypatch.setattr("fxlocal.experiments.cli.reproduce.compare_with_bars", compare)
    options = ("--data", "fake", "--models", "resnet34", *TOY, "--size", "8", "--out", "o")
    succeeds("reproduce", FRONTIERS, "3", *options)
    assert asked["SGD, same time"] == "sgd-same-time" and asked["sgd"].text == "sgd"


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(("paper", "number"), BOTH)
def test_every_small_table_runs(paper, number, tmp_path):
    """With the first network and, of a grid, one alpha."""
    table = find_table(paper, number)
    model = next(iter(next(iter(table.numbers.values()))))
    size = "16" if model == "unet" else "8"
    grid = ("--set", "alpha=0.95") if any("grid" in m for m in table.methods.values()) else ()
    options = ("--models", model, "--size", size, "--epochs", "1", *grid, "--out", "o")
    succeeds("reproduce", paper, number, "--small", *TOY, *options)
    page = (tmp_path / "o" / f"{paper}-{number}.md").read_text()
    assert "diverged" not in page and "ours: " in page
