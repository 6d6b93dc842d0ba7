"""Names become schedules, with the options that they were given."""

from dataclasses import replace

import pytest
from tiny import resnet

import fxlocal
from fxlocal import Freeze, Hebbian, Oja, Plan
from fxlocal.experiments.strategies import STRATEGIES, Options, StrategyError, build_schedule
from fxlocal.schedules import Constant, Dynamic, Static


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
