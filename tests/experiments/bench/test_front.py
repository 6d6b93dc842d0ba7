"""Memory against step time: what is measured beside what, and how it is shown."""

import pytest
import torch
from support.shell import fails
from support.tiny import text_of
from torch import nn

from fxlocal.experiments.bench import front
from fxlocal.experiments.bench.front import SHARES, bench_front
from fxlocal.experiments.bench.turns import place_job
from fxlocal.experiments.report.front import front_table, plot_front
from fxlocal.experiments.training.settings import Machine, SettingsError


def make_job(compiled=False):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    return place_job("tiny", net, torch.randn(4, 8), torch.arange(4), Machine(compile=compiled))


def test_the_front_has_plain_training_first_and_the_chosen_plan():
    results = bench_front(make_job(), 0.6, repeats=1)
    first, *others = results["rows"]
    assert (first["kind"], first["time_ratio"]) == ("plain", 1.0)
    assert {row["kind"] for row in others} == {"checkpoint", "changed"}
    (chosen,) = (row for row in results["rows"] if row["chosen"])
    assert chosen["bytes"] == results["measured_bytes"] <= results["limit"]
    assert all(row["predicted_bytes"] == row["bytes"] for row in results["rows"])
    assert "<- auto" in text_of(front_table(results))
    (axes,) = plot_front(results)["front.png"].axes
    drawn = sum(len(line.get_xdata()) for line in axes.lines[:-1])
    assert drawn == len(results["rows"])


def test_torchs_budgets_stand_beside_compiled_plans(monkeypatch):
    """Without a compiler: under which budget each would have been compiled."""
    budgets = []

    def prepare(self):
        from torch._functorch import config

        budgets.append((self.mode, config.activation_memory_budget))
        self.saved_bytes = 1

    monkeypatch.setattr(front.Variant, "prepare", prepare)
    monkeypatch.setattr(front.Variant, "time_turn", lambda self: 1.0)
    rows = bench_front(make_job(compiled=True), 0.6, repeats=1)["rows"]
    assert [share for mode, share in budgets if mode == "compiled" and share < 1] == [*SHARES]
    assert [row["kind"] for row in rows if row["mode"] == "compiled"] == [
        "plain",
        *("torch", "checkpoint"),
        *("torch", "torch"),  # with the loss, no exact plan keeps half or a quarter
    ]


def test_no_rounds_are_refused():
    with pytest.raises(SettingsError, match="repeats=0"):
        bench_front(make_job(), 0.5, repeats=0)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (("--auto", "much", "--batch", "2"), "memory='much': give bytes"),
        (("--auto", "1GiB", "--nproc", "2"), "--auto: finds plans of its own"),
    ],
)
def test_a_budget_that_means_nothing_gets_one_clear_line(told, said):
    assert said in fails("bench", "resnet8", *told)


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_what_compiled_steps_keep_is_counted(monkeypatch):
    monkeypatch.setattr(front, "SHARES", (0.5,))
    rows = bench_front(make_job(compiled=True), 0.6, repeats=1)["rows"]
    compiled = [row["bytes"] for row in rows if row["mode"] == "compiled"]
    assert all(compiled)
