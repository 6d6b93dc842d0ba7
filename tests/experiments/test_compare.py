"""Several strategies side by side: the form of the results, and what is left out of them."""

import json
import math

import pytest
from tiny import OPTIONS, SETTINGS, fake_data, resnet

from fxlocal.experiments.compare import collect_results, compare, write_results
from fxlocal.experiments.settings import Machine
from fxlocal.experiments.strategies import StrategyError
from fxlocal.experiments.train import Run

TOP = {"data", "model", "epochs", "metric", "device", "versions", "runs", "summary"}
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
    "predicted_bytes",
    "images",
}
SUMMARY = {
    "strategy",
    "error_percent_mean",
    "error_percent_std",
    "speedup",
    "images_per_second",
}


def small_comparison(strategies=("sgd", "local-static", "freeze"), seeds=(0, 1), data=None, **on):
    data = data or fake_data()
    return compare(data, "tiny", resnet, strategies, seeds, SETTINGS, Machine(), OPTIONS, **on)


def finished(strategy, seed, error, seconds):
    return Run(strategy, seed, error, seconds, 0.5, [9], [0], [0.1])


def test_results_have_the_form_that_readers_rely_on(tmp_path):
    results = json.loads(write_results(small_comparison(), tmp_path / "new").read_text())
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
    runs = small_comparison(seeds=(0,))["runs"]
    assert len({run["loss"][0] for run in runs}) == 1
    sgd, local, frozen = (run["boundary"] for run in runs)
    assert set(sgd) == {0} and local == frozen and local[-1] > 0


def test_callbacks_hear_of_every_run_epoch_and_step():
    runs, epochs, steps = [], [], []
    small_comparison(
        ("freeze",),
        (3,),
        on_run=lambda *run: runs.append(run),
        on_epoch=lambda run: epochs.append(len(run.loss)),
        on_step=lambda: steps.append(None),
    )
    assert runs == [("freeze", 3)]
    assert epochs == [1, 2, 3, 4]
    assert len(steps) == 4 * 64 // 16


def test_diverged_runs_are_null_and_the_others_go_on(tmp_path):
    data = fake_data()
    spoil = {"sgd": float("inf"), "freeze": 0.0}
    results = small_comparison(
        ("sgd", "freeze"),
        (0,),
        data,
        on_run=lambda name, seed: data.train.images.fill_(spoil[name]),
    )
    text = write_results(results, tmp_path).read_text()
    sgd, frozen = json.loads(text, parse_constant=pytest.fail)["runs"]
    assert sgd["error_percent"] is None and sgd["loss"] == [None]
    assert frozen["error_percent"] is not None and len(frozen["loss"]) == 4
    assert results["summary"][0]["error_percent_mean"] is None
    assert results["summary"][1]["speedup"] is None  # nothing to set it against


def test_summary_is_over_seeds_that_both_finished():
    runs = [
        finished("sgd", 0, 2.0, 10.0),
        finished("sgd", 1, 4.0, 30.0),
        finished("freeze", 0, 3.0, 5.0),
        finished("freeze", 1, None, 1.0),
        finished("freeze", 2, 5.0, 7.0),
    ]
    sgd, frozen = collect_results("d", "m", 1, Machine(), runs)["summary"]
    assert sgd["error_percent_mean"] == 3.0
    assert sgd["error_percent_std"] == pytest.approx(math.sqrt(2))
    assert frozen["error_percent_mean"] == 4.0
    assert frozen["speedup"] == 2.0


def test_one_seed_has_no_spread_and_no_sgd_no_speedup():
    (entry,) = collect_results("d", "m", 1, Machine(), [finished("freeze", 0, 3.0, 5.0)])["summary"]
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
