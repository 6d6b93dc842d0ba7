"""Steps by approximation schedules: all measured, and what is made of the times is right."""

import json

import pytest
import torch
import typer
from support.tiny import resnet
from typer.testing import CliRunner

from fxlocal import PlanError
from fxlocal.experiments.bench import turns as bench
from fxlocal.experiments.bench.approximation import (
    METHODS,
    approximation_table,
    bench_approximations,
    bench_approximations_command,
)
from fxlocal.experiments.training.settings import Machine, SettingsError

X, Y = torch.ones(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
TABLES = ("schedule-1", "schedule-2", "schedule-3")


def measured(methods=("zero",), tables=TABLES, machine=None, **options):
    return bench_approximations(
        "tiny", resnet(), X, Y, methods, tables, machine or Machine(), **{"repeats": 1, **options}
    )


@pytest.fixture
def fake_seconds(monkeypatch):
    """Make each step of a variant take the seconds given, times 1, 2 and 16 in the three rounds."""
    now, seconds = [0.0], {}
    real_update = bench.Variant._update

    def update(variant, loss):
        real_update(variant, loss)
        now[0] += seconds[variant.strategy] * (1, 2, 16, 1)[len(variant.seconds)]

    monkeypatch.setattr(bench, "clock", lambda device: now[0])
    monkeypatch.setattr(bench.Variant, "_update", update)
    return seconds


def test_percentages_are_medians_of_each_rounds_ratios(fake_seconds):
    fake_seconds |= {
        "sgd": 4.0,
        "zero schedule-1": 3.0,
        "zero schedule-2": 3.75,
        "zero schedule-2, column 0": 2.0,  # and sgd's: 3 in the mean
        "zero schedule-3": 4.375,
        "zero schedule-3, column 0": 2.0,  # and three times sgd's: 3.5
    }
    results = measured(repeats=3)
    sgd, first, second, third = results["rows"]
    assert [row["milliseconds"] for row in results["rows"]] == [8000, 6000, 7500, 8750]
    assert (sgd["speedup_percent"], sgd["switching_percent"]) == (0, None)
    assert (first["speedup_percent"], first["switching_percent"]) == (25, None)
    assert (second["speedup_percent"], second["switching_percent"]) == (6.25, 25)
    assert (third["speedup_percent"], third["switching_percent"]) == (-9.375, 25)
    assert first["first_turn_seconds"] == 12  # four steps of three seconds
    columns = [(c["table"], c["steps"], c["speedup_percent"]) for c in results["columns"]]
    assert columns == [
        *(("schedule-2", [0], 50), ("schedule-2", [1], 0)),
        *(("schedule-3", [0], 50), ("schedule-3", [1, 2, 3], 0)),
    ]


def test_every_method_and_table_is_measured_and_the_model_stays():
    model, heard = resnet(), []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    results = bench_approximations(
        *("tiny", model, X, Y, tuple(METHODS), ("schedule-2", "cnn2"), Machine()),
        repeats=2,
        force=True,
        on_step=heard.append,
    )
    rows = results["rows"]
    assert [(row["method"], row["table"]) for row in rows] == [
        ("sgd", None),
        *((method, "schedule-2") for method in METHODS),
        *((method, "cnn2") for method in METHODS),
    ]
    assert results["steps"] == 2
    assert all(row["milliseconds"] > 0 and row["saved_bytes"] > 0 for row in rows)
    assert all(row["exact_layers"] == [] for row in rows)
    assert [row["num_layers"] for row in rows] == [0, 4, 4, 4, 1, 1, 1]
    assert len(heard) == len(set(heard)) * (1 + 2) == (1 + 6 + 6) * 3
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert json.loads(json.dumps(results)) == results


def test_what_the_cost_model_leaves_exact_is_named(no_warnings):
    (_, topk) = measured(["topk"], ["schedule-2"])["rows"]  # maps too small to gain anything
    assert len(topk["exact_layers"]) == topk["num_layers"] == 4
    assert "layer1.0.conv1" in topk["exact_layers"]


def test_a_table_keeps_what_its_greediest_step_keeps():
    class Pools(torch.nn.Sequential):
        """Only the convolution keeps its input: no ReLU has it too."""

        def __init__(self):
            conv, pool = torch.nn.Conv2d, torch.nn.AvgPool2d(2)
            super().__init__(conv(3, 8, 3), pool, conv(8, 4, 3), torch.nn.Flatten())

    job = ("tiny", Pools(), X, Y, ["zero"], ["schedule-1", "schedule-2"], Machine())
    sgd, every, second = bench_approximations(*job, repeats=1)["rows"]
    assert every["saved_bytes"] < sgd["saved_bytes"] == second["saved_bytes"]


def test_bad_input_is_refused_before_anything_is_measured():
    def fail(name):
        pytest.fail("measured")

    with pytest.raises(SettingsError, match=r"unknown method 'zeros'. Nearest: 'zero'"):
        measured(["zeros"], on_step=fail)
    with pytest.raises(PlanError, match=r"'schedule-4'. Nearest: 'schedule-"):
        measured(tables=["schedule-4"], on_step=fail)
    with pytest.raises(SettingsError, match="repeats=0"):
        measured(repeats=0, on_step=fail)
    with pytest.raises(PlanError, match="k=0"):
        measured(["topk"], k=0, on_step=fail)
    with pytest.raises(PlanError, match="make k smaller"):
        measured(["topk"], k=65, on_step=fail)


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    app = typer.Typer()
    app.command()(bench_approximations_command)
    tiny = ["resnet8", "--width", "4", "--batch", "2", "--input-size", "8", "--repeats", "1"]
    out = tmp_path / "new" / "steps.json"
    result = CliRunner().invoke(app, [*tiny, "--tables", "schedule-2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    for word in ("saved %", "switching %", "kept MiB", "exact layers"):
        assert word in result.stdout
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == ["sgd", "zero", "random", "topk"]
    for bad, said in (("--methods", "unknown method 'x'"), ("--tables", "named 'x'")):
        result = CliRunner().invoke(app, [*tiny, bad, "x"])
        assert result.exit_code == 2
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: ") and said in line


def test_the_table_says_what_was_not_measured():
    results = measured(tables=["schedule-1"])
    results["rows"][1]["saved_bytes"] = None
    assert list(approximation_table(results).columns[6].cells)[1] == "-"


@pytest.mark.slow
def test_compiled_variants_stand_beside_the_eager_ones():
    rows = measured(["zero", "topk"], ["schedule-2"], Machine(compile=True), force=True)["rows"]
    assert [row["mode"] for row in rows] == ["eager"] * 3 + ["compiled"] * 3
    assert all(row["saved_bytes"] is None for row in rows[3:])  # predicted without approximations
