"""Plain SGD for as long, or to the same error, as another strategy."""

from dataclasses import replace

import pytest
import torch
from support.tiny import fake_data, resnet, small_comparison, text_of

from fxlocal import Plan
from fxlocal.experiments.report.page import render_page
from fxlocal.experiments.report.plots import plot_results
from fxlocal.experiments.report.tables import comparison_table
from fxlocal.experiments.training.baselines import (
    find_reference,
    other_lengths,
    same_error,
    same_time,
)
from fxlocal.experiments.training.results import Run
from fxlocal.experiments.training.specs import StrategyError
from fxlocal.schedules import Constant


def make_run(epochs, error, seconds=0.0, strategy="sgd", seed=0):
    each = {"saved_bytes": [9] * epochs, "boundary": [0] * epochs, "loss": [0.1] * epochs}
    return Run(strategy, seed, error, seconds, 0.5, images=100 * epochs, **each)


class Trainer:
    """Pretends to train; the error of each length is known beforehand."""

    def __init__(self, errors):
        self.errors, self.asked = errors, []

    def __call__(self, epochs):
        self.asked.append(epochs)
        return make_run(epochs, self.errors[epochs], float(epochs))


# The length of a run


@pytest.mark.parametrize(
    ("seconds", "epochs"), [(74.0, 7), (80.0, 8), (119.0, 12), (150.0, 15), (3.0, 1)]
)
def test_same_time_is_the_nearest_number_of_epochs(seconds, epochs):
    sgd, reference = make_run(12, 2.0, 120.0), make_run(12, 3.0, seconds)
    train = Trainer({epochs: 4.0})
    assert same_time(sgd, reference, train).error_percent == 4.0
    assert train.asked == [epochs]


@pytest.mark.parametrize("enough", range(1, 13))
def test_same_error_finds_the_fewest_epochs(enough):
    errors = {n: 3.0 if n >= enough else 5.0 for n in range(1, 13)}
    train = Trainer(errors)
    run = same_error(make_run(12, errors[12], 12.0), make_run(12, 3.0), train)
    assert (len(run.loss), run.error_percent, run.train_seconds) == (enough, 3.0, float(enough))
    assert len(train.asked) <= 4


def test_same_error_is_all_of_sgd_where_sgd_does_not_reach_it():
    for error in (3.1, None):
        sgd, train = make_run(12, error), Trainer({})
        assert same_error(sgd, make_run(12, 3.0), train) == replace(sgd, reached=False)
        assert not train.asked


def test_a_diverged_length_is_too_short():
    train = Trainer({1: None, 2: None, 3: 2.0})
    assert len(same_error(make_run(4, 2.0), make_run(4, 3.0), train).loss) == 3


# What they are measured against


def test_reference_is_the_first_other_strategy():
    names = ("sgd-same-time", "freeze", "sgd", "local-static")
    assert find_reference({name: name for name in names}) == ("sgd", "freeze")


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        (("sgd", "sgd-same-time"), "sgd-same-time: no strategy to match in sgd, sgd-same-time"),
        (("sgd-same-error",), "sgd-same-error: plain sgd says .* add sgd to"),
        (("freeze", "sgd-same-error", "sgd-same-time"), "add sgd to freeze"),
    ],
)
def test_nothing_to_match_is_refused_before_anything_is_trained(strategies, message):
    with pytest.raises(StrategyError, match=message):
        small_comparison(strategies, on_run=lambda *_: pytest.fail("trained"))


def test_another_model_is_no_reference():
    with pytest.raises(StrategyError, match="no strategy to match in sgd, sgd-same-time"):
        small_comparison(
            ("sgd", "sgd-same-time"),
            others={"resnet14": resnet},
            on_run=lambda *_: pytest.fail("trained"),
        )


# In a comparison


@pytest.fixture(scope="module")
def results():
    torch.set_num_threads(1)
    return small_comparison(("sgd-same-error", "sgd", "sgd-same-time", "freeze"), (0, 1)).to_json()


def test_baselines_train_within_their_seed_after_the_others(results):
    names = ["sgd", "freeze", "sgd-same-error", "sgd-same-time"]
    assert [(run["strategy"], run["seed"]) for run in results["runs"]] == [
        (name, seed) for seed in (0, 1) for name in names
    ]
    for seed in (0, 1):
        sgd, freeze, error, time = (r for r in results["runs"] if r["seed"] == seed)
        if sgd["error_percent"] <= freeze["error_percent"]:
            assert error["error_percent"] <= freeze["error_percent"]
        per_epoch = sgd["train_seconds"] / 4
        assert len(time["loss"]) == max(1, round(freeze["train_seconds"] / per_epoch))
        assert time["loss"][0] == sgd["loss"][0]  # the same weights and batches
    assert [row["strategy"] for row in results["summary"]] == names
    assert all(row["speedup"] > 0 for row in results["summary"])


def test_a_shorter_run_is_a_run_of_fewer_epochs_from_the_same_start(monkeypatch):
    asked = []

    def pretend(job, **on):
        epochs = job.settings.epochs
        asked.append((job.strategy, job.seed, epochs, job.schedule))
        seconds = epochs * (0.55 if job.strategy == "freeze" else 1.0)
        return make_run(epochs, 5.0 - 0.5 * epochs, seconds, job.strategy, job.seed)

    monkeypatch.setattr("fxlocal.experiments.training.compare.train_run", pretend)
    monkeypatch.setattr("fxlocal.experiments.training.compare._warm_up", lambda *_: None)
    names = ("sgd", "freeze", "sgd-same-time", "sgd-same-error")
    results = small_comparison(names, (7,)).to_json()
    assert [entry[:3] for entry in asked] == [
        *(("sgd", 7, 4), ("freeze", 7, 4)),
        ("sgd-same-time", 7, 2),
        *(("sgd-same-error", 7, 2), ("sgd-same-error", 7, 3)),
    ]
    assert {repr(entry[3]) for entry in asked if entry[0] != "freeze"} == {repr(Constant(Plan()))}
    assert [row["strategy"] for row in results["summary"]][2:] == [
        "sgd-same-time",
        "sgd-same-error",
    ]
    assert [row["speedup"] for row in results["summary"]] == [1.0, 4 / 2.2, 2.0, 1.0]


def test_a_reference_that_diverged_leaves_nothing_to_match():
    data = fake_data()
    spoil = {"sgd": 0.0, "freeze": float("inf")}
    results = small_comparison(
        ("sgd", "freeze", "sgd-same-time"),
        data=data,
        on_run=lambda name, seed: data.train.images.fill_(spoil[name]),
    )
    assert [run.strategy for run in results.runs] == ["sgd", "freeze"]


def test_other_lengths_are_said_and_shown(results):
    lengths = {**results, "runs": []}
    for seed, epochs in ((0, 2), (1, 3)):
        for name, number in (("sgd", 4), ("freeze", 4), ("sgd-same-error", 1), ("x", epochs)):
            run = make_run(number, 5.0, 2.0, name, seed)
            points = {"errors": [9.0] * number, "error_epochs": list(range(1, number + 1))}
            lengths["runs"].append({**vars(run), **points, "seconds": [1.0] * number})
    lengths["summary"] = [
        {**results["summary"][0], "strategy": name}
        for name in ("sgd", "freeze", "sgd-same-error", "x")
    ]
    assert other_lengths(lengths) == {"sgd-same-error": "1", "x": "2 to 3"}
    assert "epochs of sgd-same-error 1, x 2 to 3" in text_of(comparison_table(lengths, 10))
    assert "4 epochs each, sgd-same-error 1, x 2 to 3" in render_page(lengths, {})
    axes = plot_results(lengths)["error_over_epochs.png"].axes[0]
    assert sorted(len(line.get_xdata()) for line in axes.get_lines()) == [1, 2, 3, 4, 4]
