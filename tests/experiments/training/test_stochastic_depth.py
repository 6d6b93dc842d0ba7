"""Stochastic depth in comparisons, and beside noise in bench."""

import dataclasses

import pytest
import torch
from support.tiny import SETTINGS, fake_data, resnet, small_comparison, text_of

from fxlocal import Plan, PlanError, StochasticDepth, schedules
from fxlocal.experiments.bench.steps import Entry, bench_steps
from fxlocal.experiments.bench.turns import place_job
from fxlocal.experiments.bench.variants import Noised
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.models.networks import vit
from fxlocal.experiments.report.page import render_page
from fxlocal.experiments.report.tables import comparison_table
from fxlocal.experiments.training.settings import Machine
from fxlocal.runtime.driver import Driver

ONCE = dataclasses.replace(SETTINGS, epochs=1)
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_comparison_says_what_is_left_out():
    names = ("sgd", "stochastic-depth(rate=0.6)")
    results = small_comparison(names, settings=ONCE, build=resnet).to_json()
    text = f"{names[1]}: 3 residual blocks, computed for 80% to 40% of the rows"
    assert text in " ".join(text_of(comparison_table(results, 10)).split())
    assert text in render_page(results)
    plain, dropped = results["runs"]
    assert plain["loss"] != dropped["loss"]


def test_a_comparison_refuses_a_model_without_blocks_before_it_trains():
    def build(seed):
        return build_model("cnn2", num_classes=10, width=4, seed=seed)

    with pytest.raises(PlanError, match="no residual blocks"):
        small_comparison(
            ("sgd", "stochastic-depth"),
            settings=ONCE,
            build=build,
            data=fake_data(),
            on_run=lambda *_: pytest.fail("trained"),
        )


def test_noise_is_torchvisions_on_all_rows():
    drop = schedules.Constant(Plan(drop=StochasticDepth(0.5)))
    job = place_job("tiny", resnet(), X, torch.arange(8), Machine())
    entries = [Entry("drop", drop), Entry("noised", drop, noised=True)]
    rows = bench_steps(job, entries, repeats=1)["rows"]
    assert [row["strategy"] for row in rows] == ["sgd", "drop", "noised"]
    model = resnet()
    driver = Driver(model, drop, example_inputs=(X,))
    driver.start_epoch()
    stepper, sizes = Noised(driver, Machine()), []
    for module in model.modules():
        module.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    stepper.take(X, torch.arange(8))
    assert set(sizes) == {8}
    assert "stochastic_depth" in str(driver.network().code) or "_add_noised" in str(
        driver.network().code
    )


def test_a_transformers_own_is_replaced():
    model = vit(3, 10, width=6)
    x = torch.randn(4, 3, 32, 32)
    driver = Driver(
        model, schedules.Constant(Plan(drop=StochasticDepth(replace=True))), example_inputs=(x,)
    )
    driver.start_epoch()
    assert str(driver.network().code).count("draw_each_row(") == 24
