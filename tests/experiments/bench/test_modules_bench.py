"""Local modules beside their rivals: all measured, and what is made of the numbers is right."""

import json

import pytest
import torch
from support.shell import fails, succeeds
from support.tiny import resnet

import fxlocal
from fxlocal import PlanError
from fxlocal.experiments.bench import turns as bench
from fxlocal.experiments.bench.modules import Summed, bench_modules, modules_table
from fxlocal.experiments.data.task import Goal
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.report.modules_plots import plot_modules, read_drops
from fxlocal.experiments.training.settings import Machine, SettingsError
from fxlocal.experiments.training.steps import Stepper
from fxlocal.experiments.training.strategies import Options, build_schedule

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(4)
TINY = ("resnet8", "--width", "4", "--batch", "2", "--input-size", "8", "--repeats", "1")


def measured(counts=(2, 4), links=(0, 1, 2), model=None, **told):
    told = {"repeats": 1, "num_classes": 10, "balance": "blocks", "head": "linear", **told}
    job = ("tiny", model or resnet(), X, Y, counts, links, told.pop("machine", Machine()))
    return bench_modules(*job, **told)


@pytest.fixture(scope="module")
def results():
    torch.set_num_threads(1)
    return measured()


def test_every_method_is_measured_where_its_link_fits(results):
    names = [(row["method"], row["modules"], row["link"]) for row in results["rows"]]
    rivals = ("checkpoint", "summed", "infopro", "greedy")
    assert names == [
        ("sgd", 1, 0),
        *((method, 2, 0) for method in rivals),
        *(("backlink", 2, link) for link in (1, 2)),
        *((method, 4, 0) for method in rivals),
        ("backlink", 4, 1),  # modules are of one block
    ]
    assert [row["split"] for row in results["rows"]][:2] == [[], [2, 2]]
    assert all(row["milliseconds"] > 0 and row["saved_bytes"] > 0 for row in results["rows"])
    assert json.loads(json.dumps(results)) == results


def test_memory_is_saved_by_all_but_sums_of_losses(results):
    kept = {(r["method"], r["modules"], r["link"]): r["memory_ratio"] for r in results["rows"]}
    assert kept["sgd", 1, 0] == 1
    for count in (2, 4):
        assert kept["greedy", count, 0] < 0.75 < 1 < kept["summed", count, 0]
        assert kept["checkpoint", count, 0] < 0.75
        assert kept["greedy", count, 0] <= kept["backlink", count, 1] < 1
    assert kept["greedy", 4, 0] < kept["greedy", 2, 0]


def test_the_model_stays(results):
    model = resnet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    heard = []
    measured([2], [0], model, on_step=heard.append)
    assert len(heard) == 5 * 2
    assert set(heard) == {
        "eager sgd",
        *(f"eager {name}, K=2" for name in ("checkpoint", "summed", "infopro", "greedy")),
    }
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_ratios_are_medians_of_each_rounds(monkeypatch):
    seconds = {"sgd": 4.0, "greedy, K=2": 3.0, "checkpoint, K=2": 5.0}
    now, real = [0.0], bench.Variant._update

    def update(variant, loss):
        real(variant, loss)
        now[0] += seconds.get(variant.strategy, 8.0) * (1, 2, 16, 1)[len(variant.seconds)]

    monkeypatch.setattr(bench, "clock", lambda device: now[0])
    monkeypatch.setattr(bench.Variant, "_update", update)
    rows = {row["method"]: row for row in measured([2], [0], repeats=3)["rows"]}
    assert [rows[name]["time_ratio"] for name in ("sgd", "greedy", "checkpoint")] == [1, 0.75, 1.25]
    assert rows["greedy"]["milliseconds"] == 6000


def test_summed_losses_have_the_gradients_of_immediate_backwards():
    schedule = build_schedule("greedy", 1, Options(modules=3, balance="blocks"), Goal(10))
    gradients, losses = [], []
    for kind in (Stepper, Summed):
        torch.manual_seed(0)
        driver = fxlocal.Driver(resnet().double(), schedule, example_inputs=(X.double(),))
        driver.start_epoch()
        losses.append(kind(driver, Machine()).take(X.double(), Y))
        gradients.append([p.grad for p in driver.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert losses[1] > 2 * losses[0]  # three of them


def test_bad_input_is_refused_before_anything_is_measured():
    def fail(name):
        pytest.fail("measured")

    with pytest.raises(SettingsError, match="--links 3: longer than a module, of 2 or 4"):
        measured(links=[0, 3], on_step=fail)
    with pytest.raises(PlanError, match=r"count=9.*4 blocks"):
        measured([2, 9], on_step=fail)
    with pytest.raises(ValueError, match="link=-1"):
        measured(links=[0, -1], on_step=fail)
    with pytest.raises(SettingsError, match="repeats=0"):
        measured(repeats=0, on_step=fail)


def test_the_table_has_a_line_for_each(results):
    table = modules_table(results)
    assert table.row_count == len(results["rows"])
    assert list(table.columns[2].cells)[6] == "backlink, l=2"
    assert "linear heads" in table.caption
    assert table.caption.endswith("left out, as longer than a module: l=2 of K=4")
    unknown = {**results, "rows": [{**results["rows"][1], "memory_ratio": None}]}
    assert list(modules_table(unknown).columns[3].cells) == ["-"]


# Plots


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_plots_have_a_curve_for_each_method(results):
    figures = plot_modules(results)
    assert list(figures) == ["memory_over_modules.png", "time_over_modules.png", "trade_off.png"]
    for figure in figures.values():
        assert labels(figure) == [
            *("checkpoint", "summed", "infopro", "greedy"),
            *("backlink, l=1", "backlink, l=2"),
        ]
        assert figure.get_suptitle().startswith("tiny, batch of 4, cpu (")
        assert "linear heads, balance blocks" in figure.get_suptitle()
    assert "numbers at points: K" in figures["trade_off.png"].get_suptitle()
    (axes,) = figures["memory_over_modules.png"].axes
    greedy = [r for r in results["rows"] if r["method"] == "greedy"]
    assert list(axes.lines[3].get_xdata()) == [2, 4]
    assert list(axes.lines[3].get_ydata()) == [100 * row["memory_ratio"] for row in greedy]


def test_drops_of_accuracy_come_from_tables_and_comparisons(results, tmp_path):
    rows = [("greedy", 2, 0, 5.0), ("backlink", 2, 1, 2.0), ("backlink", 4, 1, None)]
    told = {"head": "linear", "balance": "blocks"}
    table = {
        "networks": {"tiny": {"options": told}},
        "rows": [
            {"network": "tiny", "method": m, "modules": k, "link": link, "error_loss_mean": drop}
            for m, k, link, drop in rows
        ],
    }
    table["rows"].append({**table["rows"][0], "network": "other", "error_loss_mean": 99.0})
    errors = {"sgd": 10.0, "greedy": 14.0, "backlink": None, "checkpoint": 10.5}
    comparison = {
        "model": "tiny",
        "options": {"modules": 4, "link": 2, **told},
        "summary": [{"strategy": s, "error_percent_mean": e} for s, e in errors.items()],
    }
    paths = [tmp_path / "table.json", tmp_path / "compare.json"]
    for path, content in zip(paths, (table, comparison), strict=True):
        path.write_text(json.dumps(content))
    drops = read_drops(paths, results)
    assert drops == {
        ("greedy", 2, 0): 5.0,
        ("backlink", 2, 1): 2.0,
        ("greedy", 4, 0): 4.0,
        ("checkpoint", 4, 0): 0.5,
    }
    figure = plot_modules(results, drops)["trade_off.png"]
    assert labels(figure) == ["checkpoint", "greedy", "backlink, l=1"]
    memory, _ = figure.axes
    assert list(memory.lines[1].get_ydata()) == [5.0, 4.0]
    for wrong in (paths[0], tmp_path / "none.json"):
        (tmp_path / "none.json").write_text("[1]")
        with pytest.raises(SettingsError, match="says nothing of third in local modules"):
            read_drops([wrong], {**results, "model": "third"})
    for key, there in (("head", "linear"), ("balance", "blocks"), ("width", None)):
        for path in paths:
            with pytest.raises(SettingsError, match=f"{key} is {there} there and other here"):
                read_drops([path], {**results, key: "other"})


# The command


def test_the_command_prints_a_table_and_writes_json_and_plots(tmp_path):
    out, plots = tmp_path / "new" / "modules.json", tmp_path / "plots"
    told = ("--modules", "2", "--links", "0,1", "--head", "linear", "--balance", "blocks")
    text = succeeds("bench", *TINY, *told, "--plots", plots, "--out", out)
    for word in ("kept MiB", "of SGD's", "checkpoint", "backlink, l=1", "summed"):
        assert word in text
    results = json.loads(out.read_text())
    assert len(results["rows"]) == 6 and results["width"] == 4
    assert {path.name for path in plots.iterdir()} == {
        *("memory_over_modules.png", "time_over_modules.png", "trade_off.png")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--modules", "2,x"), "--modules '2,x': give integers"),
        (("--modules", "2", "--links", ""), "--links '': give integers"),
        (("--modules", "9"), "count=9"),
        (("--modules", "0"), "count=0"),
        (("--links", "1"), "--links: changes nothing without --modules"),
        (("--modules", "2", "--boundaries", "0.5"), "no prefixes with --modules"),
        (("--modules", "2", "--errors", "x.json"), "--errors: changes nothing without --plots"),
        (("--modules", "2", "--plots", "p", "--errors", "x.json"), "x.json"),
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_clear_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails("bench", *TINY, *arguments)


@pytest.mark.slow
def test_compiled_variants_stand_beside_the_eager_ones():
    rows = measured([2], [0], machine=Machine(compile=True))["rows"]
    compiled = [row["method"] for row in rows if row["mode"] == "compiled"]
    assert compiled == ["sgd", "infopro", "greedy"]
    assert [row["saved_bytes"] is None for row in rows][-2:] == [True] * 2


@pytest.mark.slow
def test_sixteen_modules_of_a_deep_network_keep_a_fifth():
    model = build_model("resnet110", num_classes=10, in_channels=3, width=16, seed=0)
    x, y = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)
    job = ("resnet110", model, x, y, [16], [0, 1], Machine())
    rows = bench_modules(*job, num_classes=10, balance="blocks", repeats=1)["rows"]
    kept = {(row["method"], row["link"]): row["memory_ratio"] for row in rows}
    assert kept["greedy", 0] <= 0.21 and kept["backlink", 1] <= 0.24
    assert kept["summed", 0] > 1
