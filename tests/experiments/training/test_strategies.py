"""Names become schedules, with the options that they were given."""

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
from support.tiny import SETTINGS, resnet, run

import fxlocal
from fxlocal import Freeze, Hebbian, Oja, Plan, Random, TopK, Zero
from fxlocal.experiments.training.strategies import (
    APPROXIMATIONS,
    PREFIXES,
    STRATEGIES,
    Options,
    StrategyError,
    build_schedule,
    is_model,
)
from fxlocal.schedules import NAMED, Approximation, Constant, Dynamic, Plateau, Static


def test_sgd_never_rewrites():
    assert build_schedule("sgd", 9, Options()) == Constant(Plan())


def test_local_and_frozen_prefix_end_at_the_same_layer():
    analysis = fxlocal.analyze(resnet())
    local, frozen = (build_schedule(name, 9, Options()) for name in ("local-static", "freeze"))
    for epoch in range(9):
        ours, theirs = (s.plan(analysis, epoch).local for s in (local, frozen))
        assert (ours is None) == (theirs is None)
        if ours and theirs:
            assert ours.until == theirs.until
            assert (ours.rule, theirs.rule) == (Hebbian(1e-4), Freeze())
    assert local.plan(analysis, 8).local is not None


def test_boundary_waits_for_the_first_fall_of_the_learning_rate():
    analysis = fxlocal.analyze(resnet())
    schedule = build_schedule("freeze", 12, Options())
    moved = [schedule.plan(analysis, epoch).local is not None for epoch in range(12)]
    assert moved.index(True) >= 4


def test_options_reach_the_schedule():
    shared = dict(norm="eval", rate_decay=(0.5, 3), align=False, weak_supervision=False)
    curve = ("linear", 0.5, 0.2, -1.0, 2.0)
    options = Options(*curve, "window", 0.9, 0.1, "oja", 0.01, True, **shared)
    rule = Oja(0.01, relative=True)
    static = Static(9, *curve, rule=rule, **shared)
    assert build_schedule("local-static", 9, options) == static
    dynamic = Dynamic(9, "window", 0.9, 0.1, 0.5, rule=rule, **shared)
    assert build_schedule("local-dynamic", 9, options) == dynamic


def test_refresh_is_a_frozen_prefix_with_a_full_step_now_and_then():
    analysis = fxlocal.analyze(resnet())
    schedule = build_schedule("refresh", 9, Options())
    plans = [schedule.plan(analysis, 8, step).local for step in range(4)]
    assert plans[3] is None
    assert plans[0] == plans[1] == plans[2] == replace(plans[0], rule=Freeze(), norm="eval")
    every = build_schedule("refresh", 9, Options(refresh_every=2))
    assert every.plan(analysis, 8, 1).local is None


def test_unknown_name_gets_the_nearest():
    with pytest.raises(StrategyError, match=r"unknown strategy 'local'.*'local-static'"):
        build_schedule("local", 9, Options())


@pytest.mark.parametrize(
    "options", [Options(largest=1.5), Options(start=-1), Options(rate=float("nan"))]
)
def test_option_out_of_range_is_refused(options):
    with pytest.raises(StrategyError, match="'local-static'"):
        build_schedule("local-static", 9, options)


def test_every_strategy_makes_a_schedule():
    analysis = fxlocal.analyze(resnet())
    for name in STRATEGIES:
        assert isinstance(build_schedule(name, 9, Options()).plan(analysis, 8), Plan)


# Approximations


def test_an_approximation_has_its_method_and_the_schedule_of_that_name():
    told = Options(approximate="schedule-2", k=3, scale=0.5, force=True, std=0.1)
    methods = {"zero": Zero(), "random": Random(0.1), "topk": TopK(3, 0.5, force=True)}
    assert methods.keys() == APPROXIMATIONS.keys()
    for name, method in methods.items():
        assert build_schedule(name, 9, told) == Approximation.named("schedule-2", method)
    assert build_schedule("topk", 9, Options()) == Approximation.named("schedule-1", TopK())
    assert build_schedule("random", 9, Options()) == Approximation.named("schedule-1", Random())


def test_every_schedule_of_the_papers_can_be_chosen():
    hints = get_type_hints(Options)
    assert get_args(hints["approximate"]) == NAMED


def test_a_plateau_ends_the_approximation():
    schedule = build_schedule("zero", 9, Options(plateau=2))
    assert schedule == Plateau(Approximation.named("schedule-1", Zero()), patience=2)
    with pytest.raises(StrategyError, match="'topk': patience=0"):
        build_schedule("topk", 9, Options(plateau=0))


@pytest.mark.parametrize("name", ["zero", "random", "topk"])
def test_an_approximation_trains(name):
    schedule = build_schedule(name, 4, Options(force=True))
    record, plain = run(resnet(), schedule), run(resnet(), Constant(Plan()))
    assert record.loss[0] != plain.loss[0]
    assert record.boundary == [0] * 4


# Combinations


@pytest.mark.parametrize("name", ["freeze+zero", "topk+local-static", "refresh+random"])
def test_plans_of_a_combination_hold_both_parts(name):
    analysis = fxlocal.analyze(resnet())
    told = Options(largest=0.5, approximate="schedule-3")
    both = build_schedule(name, 9, told)
    prefix, other = sorted(name.split("+"), key=lambda part: part not in PREFIXES)
    local = build_schedule(prefix, 9, told).plan(analysis, 8).local
    methods = build_schedule(other, 9, told).plan(analysis, 8).weight_grads
    plan = both.plan(analysis, 8)
    assert plan.local == local
    later = {layer.path for layer in analysis.layers[analysis.boundary(local.until) :]}
    assert plan.weight_grads == {p: m for p, m in methods.items() if p in later}
    assert plan.weight_grads and len(plan.weight_grads) < len(methods)
    assert both.plan(analysis, 0) == Plan(weight_grads=methods)
    assert both.plan(analysis, 0, step=1) == Plan()


@pytest.mark.parametrize("name", ["local-static+zero", "freeze-eval+topk", "local-dynamic+random"])
def test_a_combination_trains(name):
    options = Options(start=0.25, largest=0.8, force=True, plateau=2, alpha=1.0, shift=0.3)
    record = run(resnet(), build_schedule(name, SETTINGS.epochs, options))
    assert len(record.loss) == SETTINGS.epochs and record.boundary[-1] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero+topk", "'zero.topk': its parts contradict"),
        ("local-static+freeze", "join one of local-static, .* and one of zero, random, topk"),
        ("zero+zero", "contradict each other or change nothing"),
        ("sgd+zero", "contradict each other or change nothing"),
        ("freeze+zero+random", "contradict"),
        ("freeze+zoro", "unknown strategy 'zoro' in 'freeze.zoro'. Nearest: 'zero'"),
        ("freeze+", "unknown strategy '' in 'freeze.'"),
        ("resnet14", "'resnet14' is a model: fxlocal compare"),
        ("torchvision:resnet18", "is a model"),
    ],
)
def test_what_is_no_combination_is_refused_in_one_line(name, message):
    with pytest.raises(StrategyError, match=message) as caught:
        build_schedule(name, 9, Options())
    assert "\n" not in str(caught.value)


def test_models_are_told_from_strategies():
    assert is_model("resnet14") and is_model("own.module:factory")
    assert not any(map(is_model, (*STRATEGIES, "sgd-same-time", "freeze+topk", "resnet15")))
