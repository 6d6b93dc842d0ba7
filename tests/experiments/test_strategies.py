"""Names become schedules, with the options that they were given."""

import pytest
from tiny import resnet

import fxlocal
from fxlocal import Freeze, Hebbian, Plan
from fxlocal.experiments.strategies import STRATEGIES, Options, StrategyError, build_schedule
from fxlocal.schedules import Constant, Static


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
    options = Options("linear", 0.5, 0.2, 0.01, (0.5, 3), "eval", align=False)
    expected = Static(
        9,
        curve="linear",
        largest=0.5,
        start=0.2,
        rule=Hebbian(0.01),
        norm="eval",
        rate_decay=(0.5, 3),
        align=False,
    )
    assert build_schedule("local-static", 9, options) == expected


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
