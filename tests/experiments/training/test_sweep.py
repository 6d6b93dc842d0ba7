"""Sweeps: what is varied, what is refused, which settings are on the front, what the page says."""

import json
import math
import random
import re
from dataclasses import replace

import pytest
from support.shell import TINY, fails, succeeds
from support.tiny import text_of

from fxlocal.experiments.report.page import write_page
from fxlocal.experiments.report.sweep_plots import plot_sweep
from fxlocal.experiments.report.tables import sweep_table
from fxlocal.experiments.training.results import Results, Run
from fxlocal.experiments.training.settings import Machine, Settings
from fxlocal.experiments.training.specs import StrategyError, parse_spec
from fxlocal.experiments.training.sweep import (
    build_settings,
    build_variants,
    find_front,
    parse_grid,
    summarise_sweep,
)

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

LOCAL = parse_spec("local-static")
GRID = {"largest": (0.8, 0.4), "curve": ("linear", "quadratic")}


def swept(grid=GRID, seeds=(0, 1), diverged=()):
    """Results of a sweep that nobody ran: the more layers are local, the faster and the worse."""
    variants = build_variants(LOCAL, grid, 4)
    runs = []
    for seed in seeds:
        for i, (name, spec) in enumerate(variants.items()):
            told = spec.parts[0].arguments
            error = 1.0 + seed + (told["largest"] if i else 0)
            seconds = 10.0 - (5 * told["largest"] + (told["curve"] == "linear") if i else 0)
            error = None if i in diverged or (i, seed) in diverged else error
            loss = [1.0, math.nan if error is None else 0.5]
            run = Run(name, seed, error, seconds, 0.5, [2**21, 2**20], [0, i], loss)
            runs.append(replace(run, images=100))
    results = Results("digits", "resnet14", 4, Machine(), runs=runs)
    return summarise_sweep(results, LOCAL, grid)


# What is varied


def test_values_have_the_type_of_the_argument():
    assert parse_grid(["largest=0.4, 1", "align=true,False", "curve=linear,quadratic"], LOCAL) == {
        "largest": (0.4, 1.0),
        "align": (True, False),
        "curve": ("linear", "quadratic"),
    }
    assert parse_grid(["rate-decay=none,(0.5,10)"], LOCAL) == {"rate_decay": (None, (0.5, 10))}


def test_every_combination_is_a_spec_beside_sgd():
    variants = build_variants(parse_spec("freeze(start=0.1)"), GRID, 12)
    assert {name: spec.text for name, spec in variants.items()} == {
        "sgd": "sgd",
        "largest=0.8 curve=linear": "freeze(start=0.1,largest=0.8,curve=linear)",
        "largest=0.8 curve=quadratic": "freeze(start=0.1,largest=0.8,curve=quadratic)",
        "largest=0.4 curve=linear": "freeze(start=0.1,largest=0.4,curve=linear)",
        "largest=0.4 curve=quadratic": "freeze(start=0.1,largest=0.4,curve=quadratic)",
    }


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ((), "at least one --vary"),
        (("largest",), "give NAME=VALUE,VALUE"),
        (("largets=0.1,0.2",), "local-static has no argument 'largets'. Nearest: 'largest'"),
        (("largest=",), "'' is no value"),
        (("largest=0.4,big",), "largest=big is not a number"),
        (("align=true,maybe",), "align=maybe is not true or false"),
        (("curve=linear,cubic",), "cubic is not one of linear, quadratic, exponential"),
        (("rate_decay=none,0.5",), "0.5 is not (a number, a whole number) or none"),
        (("largest=0.4",), "two values or more; a spec takes one"),
        (("largest=0.4,0.40",), "a value comes twice"),
        (("largest=0.4,0.5", "largest=0.6,0.7"), "largest comes twice"),
    ],
)
def test_bad_grids_are_refused(vary, message):
    with pytest.raises(StrategyError, match=re.escape(message)):
        parse_grid(vary, LOCAL)


@pytest.mark.parametrize(
    ("spec", "vary", "message"),
    [
        ("sgd", "largest=0.4,0.6", "sgd has no argument 'largest'"),
        ("freeze", "rate=1e-4,1e-3", "freeze has no argument 'rate'"),
        ("local-static", "largest=0.4,2.0", "largest=2.0: a fraction"),
        ("freeze(c1=1,c2=0.1)", "largest=0.4,0.6", "largest=0.4: changes nothing"),
    ],
)
def test_what_cannot_be_swept_is_refused(spec, vary, message):
    spec = parse_spec(spec)
    with pytest.raises(StrategyError, match=re.escape(message)):
        build_variants(spec, parse_grid([vary], spec), 4)


# What is found


def test_the_front_is_what_nothing_dominates():
    generator = random.Random(0)
    for _ in range(200):
        points = [
            (generator.choice([None, 1, 2, 3, 4]), generator.choice([None, 1, 2, 3, 4]))
            for _ in range(generator.randrange(8))
        ]
        expected = []
        for error, speed in points:
            beaten = error is None or speed is None
            for other_error, other_speed in points:
                if beaten or other_error is None or other_speed is None:
                    continue
                no_worse = other_error <= error and other_speed >= speed
                beaten = no_worse and (other_error < error or other_speed > speed)
            expected.append(not beaten)
        assert find_front(points) == expected


def test_rows_say_setting_time_and_place():
    results = swept(diverged=(1,))
    assert (results["strategy"], results["vary"]["largest"]) == ("local-static", [0.8, 0.4])
    sgd, lost, fast, linear, slow = results["summary"]
    assert sgd["setting"] == {} and sgd["train_seconds_mean"] == 10
    assert lost["setting"] == {"largest": 0.8, "curve": "linear"}
    assert lost["train_seconds_mean"] is None and not lost["on_front"]
    assert (fast["train_seconds_mean"], linear["train_seconds_mean"]) == (6, 7)
    assert [row["on_front"] for row in (sgd, fast, linear, slow)] == [True, True, True, False]


def test_a_setting_that_diverged_once_is_not_on_the_front():
    assert [row["on_front"] for row in swept()["summary"]] == [True, True, False, True, False]
    results = swept(diverged=[(1, 1)])
    assert [row["on_front"] for row in results["summary"]] == [True, False, True, True, False]
    assert results["summary"][1]["speedup"] == 2
    assert "largest=0.8 curve=linear (1 diverged)" in text_of(sweep_table(results))


def test_values_that_are_nearly_equal_are_told_apart():
    close = (0.4, 0.4000001)
    variants = build_variants(LOCAL, {"largest": close}, 4)
    assert list(variants) == ["sgd", "largest=0.4", "largest=0.4000001"]
    with pytest.raises(StrategyError, match=r"'largest=0\.4' comes twice"):
        build_variants(LOCAL, {"largest": (0.4, 0.5, 0.4)}, 4)


# What is shown


def test_the_plots_show_each_setting_the_front_and_each_option():
    results = json.loads(json.dumps(swept()))
    figures = plot_sweep(results)
    assert set(figures) == {"pareto.png", "effect_of_largest.png", "effect_of_curve.png"}
    (axes,) = figures["pareto.png"].axes
    front = axes.get_lines()[-1]
    assert list(front.get_xdata()) == pytest.approx([1, 7 / 10, 1 / 2])
    assert list(front.get_ydata()) == pytest.approx([98.5, 98.1, 97.7])
    assert [text.get_text() for text in axes.texts] == ["1", "3", "0"]
    upper, lower = figures["effect_of_largest.png"].axes
    mean = upper.get_lines()[2]
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([0.4, 0.8], [1.9, 2.3])
    times = [(7 / 10 + 8 / 10) / 2, (5 / 10 + 6 / 10) / 2]
    assert list(lower.get_lines()[2].get_ydata()) == pytest.approx(times)
    assert axes.xaxis_inverted() and axes.get_xlabel().startswith(lower.get_ylabel())


def test_orders_of_magnitude_get_a_logarithmic_scale():
    figures = plot_sweep(swept({"rate": (1e-5, 1e-3), "largest": (0.4, 0.8)}))
    scales = {name: figure.axes[-1].get_xscale() for name, figure in figures.items()}
    assert scales["effect_of_rate.png"] == "log"
    assert scales["effect_of_largest.png"] == "linear"


def test_a_sweep_that_diverged_altogether_has_a_page(tmp_path):
    page = write_page(swept(diverged=range(5)), tmp_path).read_text()
    assert page.count("diverged</span>") == 5 and "<img" not in page


@pytest.mark.slow
def test_the_page_has_a_row_per_setting_and_needs_nothing_from_elsewhere(tmp_path):
    grid = {"largest": (0.4, 0.8), "rate_decay": (None, (0.5, 10))}
    page = write_page(swept(grid) | {"command": "fxlocal <sweep>"}, tmp_path).read_text()
    body = re.search(r'<table class="summary">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    rows = [re.findall(r"<td>([^<]*)</td>", row) for row in body.split("</tr>")]
    assert re.findall(r"<span>([^<]*)</span></label></th>", body)[:2] == [
        "sgd",
        "largest=0.4 rate_decay=none",
    ]
    assert [row[:4] for row in rows[:3]] == [
        ["0", "-", "-", "1.50 &plusmn; 0.71"],
        ["1", "0.4", "none", "1.90 &plusmn; 0.71"],
        ["2", "0.4", "(0.5,10)", "1.90 &plusmn; 0.71"],
    ]
    ours = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    sources = re.findall(r'(?:src|href)="([^"]*)', ours)
    assert len(sources) == 3 and all(source.startswith("data:") for source in sources)
    assert not re.search(r"<link|@import|url\(|https?://", ours)
    assert "fxlocal &lt;sweep&gt;" in page
    assert "4 settings of local-static, with sgd beside them. Seeds: 0, 1. Epochs: 4." in page


# The command


@pytest.mark.usefixtures("unrendered")
def test_sweep_prints_a_table_and_writes_a_folder(tmp_path):
    spec = ("--strategy", "local-static(start=0)")
    vary = ("--vary", "largest=0.4,0.8", "--vary", "align=true,false")
    text = succeeds("sweep", *TINY, *spec, *vary, "--seeds", "0", "--out", "o")
    for number, name in enumerate(["sgd", "largest=0.4 align=true", "largest=0.4 align=false"]):
        assert re.search(
            rf"^{number} +{name} +\d+\.\d\d +\d+\.\d +~?\d\.\d\d +(yes|-)$", text, re.M
        )
    results = json.loads((tmp_path / "o" / "sweep.json").read_text())
    assert len(results["runs"]) == len(results["summary"]) == 5
    assert results["vary"] == {"largest": [0.4, 0.8], "align": [True, False]}
    assert any(row["on_front"] for row in results["summary"])
    last = [run["boundary"][-1] for run in results["runs"]]
    assert last[0] == 0 and last[1] < last[3]
    assert "batch_size 16" in (tmp_path / "o" / "report.html").read_text()


def test_sweep_refuses_before_anything_is_written(tmp_path):
    assert "'largets'" in fails("sweep", *TINY, "--vary", "largets=0.4,0.8")
    assert "largest=2" in fails("sweep", *TINY, "--vary", "largest=0.4,2")
    assert "sgd has no" in fails("sweep", *TINY, "--vary", "largest=0.4,0.8", "--strategy", "sgd")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unrendered")
def test_sweep_reports_divergence_and_still_writes_results(tmp_path):
    bad = ("--lr", "1e30", "--seeds", "0", "--out", "o")
    assert "sgd, seed 0" in fails("sweep", *TINY, "--vary", "largest=0.4,0.8", *bad, code=1)
    assert (tmp_path / "o" / "sweep.json").exists() and (tmp_path / "o" / "report.html").exists()


# What is of the run


def test_settings_of_the_run_are_swept_for_sgd_too():
    spec, settings = parse_spec("freeze"), Settings(epochs=4, lr=0.05)
    grid = parse_grid(["lr=0.05,0.1", "largest=0.4,0.6", "augment=none,standard+mixup"], spec)
    assert grid["lr"] == (0.05, 0.1) and grid["augment"] == ("none", "standard+mixup")
    variants = build_variants(spec, grid, 4, settings)
    own = build_settings(spec, grid, settings)
    assert [name for name in variants if name.startswith("sgd")] == [
        "sgd",
        *(f"sgd lr={lr} augment={a}" for lr in (0.05, 0.1) for a in ("none", "standard+mixup")),
    ]
    assert len(variants) == 5 + 8 and own.keys() == variants.keys() - {"sgd"}
    name = "lr=0.1 largest=0.4 augment=none"
    assert variants[name].text == "freeze(largest=0.4)"
    assert own[name] == replace(settings, lr=0.1, augment="none")
    plain = build_variants(spec, parse_grid(["lr=0.05,0.1"], spec), 4, settings)
    assert list(plain) == ["sgd", "sgd lr=0.1", "lr=0.05", "lr=0.1"]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("lr=0.1,x", "lr=x is not a number"),
        ("lrr=1,2", "no argument 'lrr'"),
        ("epochs=1,2", "no argument 'epochs'"),
        ("weights=a,b", "no argument 'weights'"),
    ],
)
def test_what_is_no_setting_of_a_sweep_is_refused(vary, message):
    with pytest.raises(StrategyError, match=message):
        parse_grid([vary], parse_spec("freeze"))


def test_each_row_of_sgd_is_its_own_in_the_summary_and_the_plots():
    spec = parse_spec("freeze")
    grid = parse_grid(["lr=0.05,0.1"], spec)
    runs = [
        Run(name, 0, 1.0 + i, 10.0 - i, saved_bytes=[1], boundary=[0], loss=[1.0], images=8)
        for i, name in enumerate(build_variants(spec, grid, 1, Settings()))
    ]
    content = summarise_sweep(Results("d", "m", 1, Machine(), runs=runs), spec, grid)
    assert [row["setting"] for row in content["summary"]] == [{}, {}, {"lr": 0.05}, {"lr": 0.1}]
    assert plot_sweep(content)
