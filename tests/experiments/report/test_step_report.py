"""Measured steps: the table says what there is to say, the plots have a curve for each method."""

import json

import pytest

from fxlocal.experiments.report.bench_tables import steps_table
from fxlocal.experiments.report.step_plots import plot_modules, read_drops
from fxlocal.experiments.training.settings import SettingsError

NOTHING = dict.fromkeys(("method", "modules", "link", "split", "head", "balance"))
NOTHING |= {"boundary": 0, "path": "conv1", "num_layers": 0, "exact_layers": []}


def make_row(strategy, ratio=1.0, memory=1.0, **others):
    return {
        **NOTHING,
        "mode": "eager",
        "strategy": strategy,
        "milliseconds": 10 * ratio,
        "milliseconds_quartiles": [9 * ratio, 12 * ratio],
        "speedup": 1 / ratio,
        "time_ratio": ratio,
        "time_ratio_quartiles": [0.9 * ratio, 1.2 * ratio] if ratio != 1 else [1, 1],
        "saved_bytes": None if memory is None else 2**20 * memory,
        "memory_ratio": memory,
        "first_turn_seconds": 0.5,
        "switching_percent": None,
        **others,
    }


def of_modules(method, count, link=0, memory=0.5):
    name = f"{method}, l={link}, K={count}" if link else f"{method}, K={count}"
    told = {"method": method, "modules": count, "link": link, "split": [1] * count}
    told |= {"head": None if method == "checkpoint" else "linear", "balance": "blocks"}
    return make_row(name, 1.25, memory / count, **told)


def make_results(*rows, **others):
    facts = {"model": "tiny", "num_layers": 10, "batch_size": 4, "device": "cpu (1 threads)"}
    rows = [make_row("sgd"), *rows]
    return {**facts, "repeats": 3, "width": None, "rows": rows, "columns": [], **others}


METHODS = ("checkpoint", "summed", "infopro", "greedy")
MODULES = make_results(
    *(of_modules(method, count) for count in (2, 4) for method in METHODS),
    *(of_modules("backlink", 2, link) for link in (1, 2)),
    of_modules("backlink", 4, 1),
)


def cells(table):
    return {str(column.header).replace("\n", " "): list(column.cells) for column in table.columns}


# The table


def test_prefixes_have_a_boundary_and_nothing_else():
    rows = [make_row(name, 0.8, 0.4, boundary=6) for name in ("local", "freeze")]
    table = steps_table(make_results(*rows))
    found = cells(table)
    assert "/".join(found) == (
        "strategy/boundary/step ms/of SGD's time/kept MiB/of SGD's bytes/first s"
    )
    assert found["strategy"] == ["sgd", "local", "freeze"]
    assert found["boundary"] == ["-", "6 of 10", "6 of 10"]
    assert found["step ms"] == ["10.0\n(9.0..12.0)", *["8.0\n(7.2..9.6)"] * 2]
    assert found["of SGD's time"] == ["1.00", *["0.80\n(0.72..0.96)"] * 2]
    assert found["kept MiB"] == ["1.0", "0.4", "0.4"] and found["of SGD's bytes"][1] == "0.40"
    assert "medians of 3 rounds" in table.caption and "kept for backward" in table.caption
    modes = make_results(make_row("local", mode="compiled"), device="cuda (H200)")
    found = cells(steps_table(modes))
    assert found["mode"] == ["eager", "compiled"] and "peak MiB" in found
    assert "peak of GPU memory" in steps_table(modes).caption


def test_approximations_say_what_switching_costs_and_what_stays_exact():
    switching = {"switching_percent": 2.5, "switching_percent_quartiles": [-0.5, 3]}
    rows = [
        make_row("zero schedule-1", 0.9, None, num_layers=2),
        make_row("topk schedule-2", 0.9, num_layers=3, exact_layers=["a"], **switching),
    ]
    table = steps_table(make_results(*rows))
    found = cells(table)
    assert found["of SGD's time"][1] == "~0.90\n(0.81..1.08)"
    assert found["switching %"] == ["-", "-", "~+2.5\n(-0.5..+3.0)"]
    assert found["exact"] == ["-", "0 of 2", "1 of 3"]
    assert found["kept MiB"][1] == found["of SGD's bytes"][1] == "-"  # was not measured
    assert "switching: " in table.caption and "exact: " in table.caption
    assert "boundary" not in found


def test_local_modules_have_a_line_for_each():
    table = steps_table(MODULES)
    assert table.row_count == len(MODULES["rows"])
    assert cells(table)["strategy"][9] == "backlink, l=1, K=2"
    assert "linear heads" in table.caption


# The plots


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_plots_have_a_curve_for_each_method():
    figures = plot_modules(MODULES)
    assert list(figures) == ["memory_over_modules.png", "time_over_modules.png", "trade_off.png"]
    for figure in figures.values():
        assert labels(figure) == [*METHODS, "backlink, l=1", "backlink, l=2"]
        assert figure.get_suptitle().startswith("tiny, batch of 4, cpu (")
        assert "linear heads, balance blocks" in figure.get_suptitle()
    assert "numbers at points: K" in figures["trade_off.png"].get_suptitle()
    (axes,) = figures["memory_over_modules.png"].axes
    assert list(axes.lines[3].get_xdata()) == [2, 4]
    assert list(axes.lines[3].get_ydata()) == [25, 12.5]


def test_drops_of_accuracy_come_from_tables_and_comparisons(tmp_path):
    told = {"head": "linear", "balance": "blocks"}
    rows = [("greedy", 2, 0, 5.0), ("backlink", 2, 1, 2.0), ("backlink", 4, 1, None)]
    keys = ("method", "modules", "link", "error_loss_mean")
    shared = {"network": "tiny", "arguments": told}
    table = {"networks": {"tiny": {}}}
    table["rows"] = [{**shared, **dict(zip(keys, row, strict=True))} for row in rows]
    table["rows"].append({**table["rows"][0], "network": "other", "error_loss_mean": 99.0})
    table["rows"].append({**table["rows"][0], "method": "sgd", "modules": None})
    errors = {"sgd": 10.0, "greedy(modules=4)": 14.0, "backlink": None, "checkpoint": 10.5}
    comparison = {
        "model": "tiny",
        "options": {
            "sgd": {"sgd": {}},
            "greedy(modules=4)": {"greedy": {"modules": 4, **told}},
            "backlink": {"backlink": {"modules": 4, "link": 2, **told}},
            "checkpoint": {"checkpoint": {"modules": 4, "balance": "blocks"}},
        },
        "summary": [{"strategy": s, "error_percent_mean": e} for s, e in errors.items()],
    }
    paths = [tmp_path / "table.json", tmp_path / "compare.json"]
    for path, content in zip(paths, (table, comparison), strict=True):
        path.write_text(json.dumps(content))
    drops = read_drops(paths, MODULES)
    assert drops == {
        ("greedy", 2, 0): 5.0,
        ("backlink", 2, 1): 2.0,
        ("greedy", 4, 0): 4.0,
        ("checkpoint", 4, 0): 0.5,
    }
    figure = plot_modules(MODULES, drops)["trade_off.png"]
    assert labels(figure) == ["checkpoint", "greedy", "backlink, l=1"]
    memory, _ = figure.axes
    assert list(memory.lines[1].get_ydata()) == [5.0, 4.0]
    (tmp_path / "none.json").write_text("[1]")
    for wrong in (paths[0], tmp_path / "none.json"):
        with pytest.raises(SettingsError, match="says nothing of third in local modules"):
            read_drops([wrong], {**MODULES, "model": "third"})
    for path in paths:
        with pytest.raises(SettingsError, match="width is None there and 8 here"):
            read_drops([path], {**MODULES, "width": 8})
        for key, there in told.items():
            odd = [{**row, key: row[key] and "other"} for row in MODULES["rows"]]
            with pytest.raises(SettingsError, match=f"{key} is {there} there and other here"):
                read_drops([path], {**MODULES, "rows": odd})
