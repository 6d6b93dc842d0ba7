"""BackLink's alpha is chosen from a grid for each network, by a command that can be stopped."""

import json
import re

import pytest
from support.papers import make_results
from support.shell import FAKE, fails, succeeds
from support.tiny import fake_data

from fxlocal.experiments.papers.runner import choose_cells, reproduce, settings_of
from fxlocal.experiments.papers.tables import find_table
from fxlocal.experiments.report.paper_tables import publish_table

# Of each network and alpha, the errors at K=2 and K=4.
ERRORS = {
    "alexnet": {0.25: [20.0, 21.0], 0.75: [10.0, 29.0]},
    "resnet32": {0.25: [7.0, None], 0.75: [8.0, 9.0]},
}


def test_the_best_alpha_of_a_network_is_shown_with_the_grid(tmp_path):
    table = find_table("backlink", "1")
    rows = {"models": list(ERRORS), "counts": [2, 4], "rows": ["GLL", "l=1"]}
    cells = choose_cells(table, "fake", **rows, grids={"alpha": [0.25, 0.75]})
    settings = {model: settings_of(table, model, "fake") for model in cells}

    def train(model, own, settings, on_seed):
        left = {alpha: iter(errors) for alpha, errors in ERRORS[model].items()}
        errors = [next(left[c.setting["alpha"]]) if c.setting else 50.0 for c in own]
        return make_results([(c.name, 0, e, 8.0) for c, e in zip(own, errors, strict=True)])

    results = reproduce(table, cells, settings, train, width=4)
    page = publish_table(table, results, fake_data(), tmp_path, 4).read_text()
    for line in (
        "| AlexNet | GLL | - | 50.00 (12.43) | 50.00 (12.44) |",
        "| AlexNet | l=1 | - | 10.00 (12.24) | 29.00 (12.43) |",  # by the mean, not by each K
        "| AlexNet | l=1 (alpha 0.25) | - | 20.00 (12.24) | 21.00 (12.43) |",
        "| ResNet-32 | l=1 | - | 8.00 (10.02) | 9.00 (14.27) |",
        "| ResNet-32 | l=1 (alpha 0.25) | - | 7.00 (10.02) | diverged |",
        "AlexNet has the first of, by the rows' mean error: alpha 0.75 19.50, alpha 0.25 20.50",
        "ResNet-32 has the first of, by the rows' mean error: alpha 0.75 8.50, alpha 0.25 diverged",
    ):
        assert line in page, page


OPTIONS = ("--models", "alexnet", "--width", "4", "--modules", "2", "--rows", "l=1")
OPTIONS += ("--epochs", "1", "--batch-size", "16", "--out", "o")


@pytest.mark.slow
def test_a_stopped_command_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("reproduce", "backlink", "1", *FAKE, *OPTIONS)
    succeeds(*command, "--set", "alpha=0.25,0.5", "--seeds", "0")
    log = tmp_path / "o" / "runs.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    names = ["sgd", "l=1, K=2, alpha=0.25", "l=1, K=2, alpha=0.5"]
    assert [run["strategy"] for _, run in lines] == names
    for _, run in lines:
        run["error_percent"] = 3.0  # so that they are known again
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '[{"model": "al')
    grid = ("--resume", "--set", "alpha=0.25,0.75", "--seeds", "0")
    assert "alexnet: 2 runs are kept" in succeeds(*command, *grid)
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    kept = [run["error_percent"] == 3.0 for run in results["networks"]["alexnet"]["runs"]]
    assert kept == [True, True, False]
    assert len(log.read_text().splitlines()) == 4
    other = ("--resume", "--set", "alpha=0.25,0.5", "--seeds", "0", "--lr", "0.02")
    other += ("--set", "head=conv")
    assert "kept" not in succeeds(*command, *other)  # of other settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("backlink", "1", "--set", "alpha=0.5,x"), "alpha=x is not a number"),
        (("backlink", "1", "--set", "alpha=0.5,1.5"), r"alpha=1.5\): give a number in \[0, 1\]"),
        (("backlink", "1", "--set", "alpha=0.5,0.50"), "'alpha=0.5,0.50': give nothing twice"),
        (("backlink", "1", "--set", "alpha=1", "--set", "alpha=0.5"), "give nothing twice"),
        (("backlink", "1", "--set", "weighting=once,twice"), "weighting=twice is not one of once"),
        (("backlink", "2", "--set", "alpha=0,1", "--rows", "DGL"), "--set alpha: changes nothing"),
        (("gradient-approximation", "1", "--set", "alpha=0,1"), "the table takes k alone"),
    ],
)
def test_what_makes_no_grid_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fails("reproduce", *arguments, "--data", "fake"))
    assert not list(tmp_path.iterdir())
