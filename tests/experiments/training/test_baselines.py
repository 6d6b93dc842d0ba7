"""Plain SGD for as long, or to the same error, as another strategy."""

from dataclasses import replace

import pytest
import torch
from bokeh.models import MultiLine
from support.tiny import SETTINGS, fake_data, resnet, small_comparison, text_of

from fxlocal import Plan
from fxlocal.experiments.report.charts import draw_charts
from fxlocal.experiments.report.page import render_page
from fxlocal.experiments.report.tables import comparison_table
from fxlocal.experiments.training.baselines import (
    at_equal_error,
    find_reference,
    other_lengths,
    same_error,
    same_time,
)
from fxlocal.experiments.training.compare import Events, compare
from fxlocal.experiments.training.results import Run
from fxlocal.experiments.training.settings import Experiment
from fxlocal.experiments.training.specs import StrategyError, parse_spec
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


def measured(errors, seconds=10.0, every=1, **run):
    """A run of equal epochs whose error was measured after each ``every`` of them."""
    made = make_run(every * len(errors), errors[-1], seconds * every * len(errors), **run)
    epochs = [every * (i + 1) for i in range(len(errors))]
    times = [seconds * (i + 1) for i in range(len(made.loss))]
    return replace(made, errors=errors, error_epochs=epochs, seconds=times)


@pytest.mark.parametrize(
    ("reference", "every", "epochs"),
    [
        ([9.0, 3.0, 4.0], 1, 5),  # its lowest error, not its last
        ([9.0, 6.0], 1, 2),  # the first that is no higher; that it rises again is nothing
        ([9.0, 3.1], 3, 15),  # as fine as errors are measured
        ([7.0], 1, 1),
    ],
)
def test_same_error_is_sgd_itself_up_to_the_references_lowest(reference, every, epochs):
    sgd, train = measured([7.0, 6.0, 6.5, 5.0, 3.0, 2.5], every=every), Trainer({})
    run = same_error(sgd, measured(reference), train)
    error = sgd.errors[epochs // every - 1]
    assert (len(run.loss), run.error_percent, run.train_seconds) == (epochs, error, 10.0 * epochs)
    assert (run.errors[-1], run.error_epochs[-1], run.seconds[-1]) == (error, epochs, 10.0 * epochs)
    assert run.images == 100 * epochs and run.reached and not train.asked
    assert len(run.saved_bytes) == len(run.boundary) == epochs
    assert len(sgd.errors) == 6  # which stays as it is


def test_same_error_is_all_of_sgd_where_sgd_does_not_reach_it():
    for sgd in (measured([5.0, 3.1]), make_run(12, None)):
        assert same_error(sgd, measured([3.0]), Trainer({})) == replace(sgd, reached=False)


def test_at_equal_error_both_end_where_they_have_it():
    """The ICLR version's Table 6, by hand: 3 epochs of 8 s against 3 of 10 s, and 4 against 3."""
    runs = [measured([9.0, 8.0, 5.0, 4.0], 8.0)]
    runs += [measured([9.0, 6.0, 5.5, 6.5], 10.0, strategy="local")]
    more = [measured([9.0, 8.0, 5.0, 4.0], 8.0, seed=1)]
    more += [measured([9.0, 4.5, 4.0], 10.0, strategy="local", seed=1), make_run(1, 1.0, seed=2)]
    names = [{"strategy": "sgd"}, {"strategy": "local"}]
    rows = [run.to_json() for run in (*runs, *more)]
    ended = at_equal_error({"runs": rows, "summary": names, "epochs": 4})
    lengths = [(run["strategy"], run["seed"], len(run["loss"])) for run in ended["runs"]]
    assert lengths == [("sgd", 0, 3), ("local", 0, 3), ("sgd", 1, 4), ("local", 1, 3)]
    sgd, local = ended["summary"]
    assert (sgd["error_percent_mean"], local["error_percent_mean"]) == (4.5, 4.75)
    assert local["speedup"] == pytest.approx((3 * 8 + 4 * 8) / (3 * 10 + 3 * 10))
    assert ended["epochs"] == 4


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


def test_a_shorter_run_is_a_run_of_fewer_epochs_from_the_same_start():
    asked = []

    def pretend(job, **on):
        epochs = job.settings.epochs
        asked.append((job.strategy, job.seed, epochs, job.schedule))
        errors = [5.0 - 0.5 * epoch for epoch in range(1, epochs + 1)]
        if job.strategy == "freeze":
            return measured([*errors[:-1], 3.5], 0.55, strategy="freeze", seed=job.seed)
        return measured(errors, 1.0, strategy=job.strategy, seed=job.seed)

    names = ("sgd", "freeze", "sgd-same-time", "sgd-same-error")
    results = small_comparison(names, (7,), train=pretend).to_json()
    assert [entry[:3] for entry in asked] == [
        *(("sgd", 7, 4), ("freeze", 7, 4)),
        ("sgd-same-time", 7, 2),
    ]
    assert {repr(entry[3]) for entry in asked if entry[0] != "freeze"} == {repr(Constant(Plan()))}
    assert [row["strategy"] for row in results["summary"]][2:] == [
        "sgd-same-time",
        "sgd-same-error",
    ]
    speedups = [row["speedup"] for row in results["summary"]]
    assert speedups == pytest.approx([1.0, 4 / 2.2, 2.0, 4 / 3])


def test_a_strategy_may_have_settings_of_its_own():
    asked = {}

    def pretend(job, **on):
        asked[job.strategy] = (job.settings.grow_batch, job.settings.epochs)
        return measured([5.0] * 4, strategy=job.strategy)

    job = Experiment(fake_data(), resnet, settings=SETTINGS)
    both = {"a": parse_spec("freeze"), "b": parse_spec("freeze"), "sgd": parse_spec("sgd")}
    own = {"b": replace(SETTINGS, grow_batch=True)}
    compare(job, both, (0,), settings=own, events=Events(train=pretend))
    assert asked == {"a": (False, 4), "b": (True, 4), "sgd": (False, 4)}


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
    assert "4 epochs each, sgd-same-error 1, x 2 to 3" in render_page(lengths)
    (chart,) = (chart for chart in draw_charts(lengths) if chart.title == "Error")
    (lines,) = (r for r in chart.figure.renderers if isinstance(r.glyph, MultiLine))
    assert sorted(map(len, lines.data_source.data["epoch"])) == [1, 2, 3, 4, 4]
