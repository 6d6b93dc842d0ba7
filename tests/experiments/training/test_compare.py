"""Several strategies side by side: the form of the results, and what is left out of them."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.tiny import SETTINGS, fake_data, resnet, small_comparison, text_of

from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.report.page import render_page
from fxlocal.experiments.report.tables import comparison_table
from fxlocal.experiments.training.compare import _warm_up
from fxlocal.experiments.training.results import Results, Run, write_results
from fxlocal.experiments.training.settings import Experiment, Machine
from fxlocal.experiments.training.specs import StrategyError, parse_spec

TOP = {"data", "model", "epochs", "metric", "device", "compile", "versions", "runs", "summary"}
PER_RUN = {
    "strategy",
    "seed",
    "error_percent",
    "train_seconds",
    "compile_seconds",
    "saved_bytes",
    "boundary",
    "loss",
    "errors",
    "error_epochs",
    "seconds",
    "batch_size",
    "flops",
    "predicted_bytes",
    "wire_bytes",
    "work",
    "images",
    "reached",
}
SUMMARY = {"strategy", "error_percent_mean", "error_percent_std", "speedup", "images_per_second"}


THREE = ("sgd", "local-static", "freeze")


def finished(strategy, seed, error, seconds):
    return Run(strategy, seed, error, seconds, 0.5, [9], [0], [0.1], images=100)


def summary_of(runs):
    return Results("d", "m", 4, Machine(), runs=runs).to_json()["summary"]


def test_results_have_the_form_that_readers_rely_on(tmp_path):
    results = json.loads(
        write_results(small_comparison(THREE, (0, 1)).to_json(), tmp_path / "new").read_text()
    )
    assert set(results) == TOP
    assert (results["data"], results["model"], results["epochs"]) == ("fake", "tiny", 4)
    assert [(run["seed"], run["strategy"]) for run in results["runs"]] == [
        (seed, name) for seed in (0, 1) for name in ("sgd", "local-static", "freeze")
    ]
    for run in results["runs"]:
        assert set(run) == PER_RUN
        for key in ("saved_bytes", "boundary", "loss", "errors", "error_epochs", "seconds"):
            assert len(run[key]) == 4
        assert run["error_percent"] == run["errors"][-1]
    assert all(set(entry) == SUMMARY for entry in results["summary"])
    assert results["summary"][0]["speedup"] == 1


def test_strategies_start_equal_and_the_frozen_prefix_follows_the_local_one():
    runs = small_comparison(THREE).runs
    assert len({run.loss[0] for run in runs}) == 1
    sgd, local, frozen = (run.boundary for run in runs)
    assert set(sgd) == {0} and local == frozen and local[-1] > 0


def test_callbacks_hear_of_every_run_epoch_and_step():
    runs, epochs, steps = [], [], []
    small_comparison(
        ("freeze",),
        (3,),
        on_run=lambda *run: runs.append(run),
        on_epoch=lambda run: epochs.append(len(run.loss)),
        on_step=lambda one: steps.append((one.epoch, one.epochs, one.step, one.num_steps)),
    )
    assert runs == [("freeze", 3)]
    assert epochs == [1, 2, 3, 4]
    assert steps == [(epoch, 4, step, 4) for epoch in range(4) for step in range(1, 5)]


def test_diverged_runs_are_null_and_the_others_go_on(tmp_path):
    data = fake_data()
    spoil = {"sgd": float("inf"), "freeze": 0.0}
    results = small_comparison(
        ("sgd", "freeze"), data=data, on_run=lambda name, seed: data.train.images.fill_(spoil[name])
    )
    content = results.to_json()
    text = write_results(content, tmp_path).read_text()
    sgd, frozen = json.loads(text, parse_constant=pytest.fail)["runs"]
    assert sgd["error_percent"] is None and sgd["loss"] == [None]
    assert frozen["error_percent"] is not None and len(frozen["loss"]) == 4
    assert content["summary"][0]["error_percent_mean"] is None
    assert content["summary"][1]["speedup"] is None  # nothing to set it against


def test_summary_is_over_seeds_that_both_finished():
    runs = [
        finished("sgd", 0, 2.0, 10.0),
        finished("sgd", 1, 4.0, 30.0),
        finished("freeze", 0, 3.0, 5.0),
        finished("freeze", 1, None, 1.0),
        finished("freeze", 2, 5.0, 7.0),
    ]
    sgd, frozen = summary_of(runs)
    assert sgd["error_percent_mean"] == 3.0
    assert sgd["error_percent_std"] == pytest.approx(math.sqrt(2))
    assert frozen["error_percent_mean"] == 4.0
    assert frozen["speedup"] == 2.0


def test_skipped_images_are_no_speed_but_fewer_epochs_are():
    sgd = replace(finished("sgd", 0, 2.0, 10.0), loss=[0.1] * 4, images=400)
    grown = replace(sgd, strategy="grown", train_seconds=5.0, images=360)
    short = replace(sgd, strategy="short", train_seconds=5.0, loss=[0.1] * 2, images=200)
    rows = summary_of([sgd, grown, short])
    assert [row["speedup"] for row in rows] == pytest.approx([1.0, 1.8, 2.0])


def test_results_are_handed_out_after_each_seed():
    seen = []
    once = replace(SETTINGS, epochs=1)
    results = small_comparison(("freeze",), (0, 1), settings=once, on_seed=seen.append)
    assert [len(partial.runs) for partial in seen] == [1, 2]
    assert seen[1] is results


def test_a_warm_up_run_of_each_strategy_changes_nothing():
    warmed = []

    def spy(job, specs):
        _warm_up(job, specs)
        warmed.append([spec.parts[0].name for spec in specs])

    names, once = ("sgd", "local-static"), replace(SETTINGS, epochs=1)
    plain = [run.loss for run in small_comparison(names, settings=once).runs]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    _warm_up(Experiment(fake_data(), resnet, settings=SETTINGS), map(parse_spec, names))
    assert torch.equal(state, torch.get_rng_state())
    assert [run.loss for run in small_comparison(names, settings=once, warm_up=spy).runs] == plain
    assert warmed == [list(names)]


def test_a_seed_may_be_any_integer():
    runs = small_comparison(("freeze",), (2**70, -3), build=resnet).runs
    assert [run.seed for run in runs] == [2**70, -3]
    assert all(run.error_percent is not None for run in runs)


def test_tables_say_which_boundaries_seeds_ended_at_and_what_diverged():
    runs = [replace(finished("sgd", seed, 2.0, 10.0), boundary=[seed + 3]) for seed in (0, 1)]
    runs += [replace(runs[0], strategy="x"), replace(runs[1], strategy="x", error_percent=None)]
    runs += [replace(runs[0], strategy="y", reached=False)]
    text = text_of(comparison_table(Results("d", "m", 1, Machine(), runs=runs).to_json(), 10))
    assert re.search(r"^sgd .* 3 to 4 of 10$", text, re.MULTILINE)
    assert re.search(r"^x \(1 diverged\) .* 3 of 10$", text, re.MULTILINE)
    assert re.search(r"^y \(1 not reached\) ", text, re.MULTILINE)


def test_one_seed_has_no_spread_and_no_sgd_no_speedup():
    (entry,) = summary_of([finished("freeze", 0, 3.0, 5.0)])
    assert entry["error_percent_std"] is None
    assert entry["speedup"] is None


@pytest.mark.parametrize(
    ("strategies", "seeds", "message"),
    [
        (("sgd", "sgd"), (0,), "none twice"),
        (("sgd",), (1, 1), "at least one seed"),
        ((), (0,), "at least one strategy"),
        (("sgd", "frozen"), (0,), "'frozen'.*'freeze'"),
    ],
)
def test_bad_lists_are_refused_before_anything_is_trained(strategies, seeds, message):
    with pytest.raises(StrategyError, match=message):
        small_comparison(strategies, seeds, on_run=lambda *_: pytest.fail("trained"))


# Other models


def smaller(seed):
    return build_model("resnet8", num_classes=10, in_channels=3, width=2, seed=seed)


def test_another_model_is_trained_by_sgd_on_the_same_batches():
    results = small_comparison(("sgd", "freeze"), (0, 1), others={"small": smaller})
    assert [(run.seed, run.strategy) for run in results.runs] == [
        (seed, name) for seed in (0, 1) for name in ("sgd", "freeze", "small")
    ]
    assert results.to_json()["other_models"] == ["small"]
    sgd, _, small = results.runs[:3]
    assert small.boundary == [0] * 4 and small.saved_bytes[0] < sgd.saved_bytes[0]
    alone = small_comparison(("sgd",), build=smaller)
    assert alone.runs[0].loss == small.loss
    assert "other_models" not in alone.to_json()
    assert results.to_json()["summary"][2]["speedup"] > 0


@pytest.mark.slow
def test_another_model_is_a_row_without_a_boundary_of_the_first_one():
    results = small_comparison(("sgd", "freeze"), others={"small": smaller}).to_json()
    text = text_of(comparison_table(results, 10))
    assert re.search(r"^small .* -$", text, re.MULTILINE)
    assert re.search(r"^sgd .* 0 of 10$", text, re.MULTILINE)
    assert "sgd on another model: small" in text
    assert "But small: plain sgd on another model" in render_page(results)
    assert "another model" not in render_page(small_comparison(("sgd",)).to_json())


def test_another_model_may_not_have_a_strategys_name():
    with pytest.raises(StrategyError, match="none twice"):
        small_comparison(("sgd",), (0,), others={"sgd": smaller})


def test_an_approximation_and_a_combination_compare():
    runs = small_comparison(("sgd", "zero", "freeze+zero")).runs
    assert [run.strategy for run in runs] == ["sgd", "zero", "freeze+zero"]
    assert runs[1].loss[0] == runs[2].loss[0] != runs[0].loss[0]
    assert runs[1].boundary[-1] == 0 < runs[2].boundary[-1]


def test_epochs_are_known_to_be_equal_before_a_boundary_moves():
    sgd, freeze, zero = small_comparison(("sgd", "freeze", "zero")).runs
    moved = [at > 0 for at in freeze.boundary]
    assert not moved[0] and all(moved[1:]) and len({*sgd.work}) == 1
    assert [a != b for a, b in zip(freeze.work, sgd.work, strict=True)] == moved
    assert [a == b for a, b in pairwise(freeze.boundary)] == [
        a == b for a, b in pairwise(freeze.work)
    ]
    assert sgd.work[0] not in zero.work
