"""What a StochasticDepth is made of, and what it refuses."""

import pytest

from fxlocal import Plan, PlanError, StochasticDepth, schedules


def test_survival_falls_to_the_last_block():
    assert StochasticDepth(0.5).survivals(4) == (0.875, 0.75, 0.625, 0.5)
    assert StochasticDepth(0.5, curve="uniform").survivals(2) == (0.5, 0.5)


def test_the_repr_can_be_pasted_back():
    plan = Plan(drop=StochasticDepth(0.25, "block", seed=3))
    assert eval(repr(plan)) == plan
    assert hash(plan) == hash(eval(repr(plan)))


@pytest.mark.parametrize(
    "given",
    [
        {"rate": 1.0},
        {"rate": -0.1},
        {"rate": "half"},
        {"rate": float("nan")},
        {"rate": True},
        {"mode": "rows"},
        {"curve": "cosine"},
        {"replace": 1},
        {"seed": -1},
        {"mode": "block", "replace": True},
    ],
)
def test_values_out_of_range_are_refused(given):
    with pytest.raises(PlanError, match=next(iter(given))):
        StochasticDepth(**given)


def test_a_plan_refuses_what_is_none():
    with pytest.raises(PlanError, match="give StochasticDepth"):
        Plan(drop=0.5)


def test_schedules_join_what_they_drop():
    drop, other = Plan(drop=StochasticDepth(0.5)), Plan(drop=StochasticDepth(0.4))
    plain, two = schedules.Constant(Plan()), schedules.Constant(drop)
    assert schedules.combine(plain, two).plan(None, 0) == drop
    with pytest.raises(PlanError, match="leaves out blocks in one way"):
        schedules.combine(two, schedules.Constant(other)).plan(None, 0)
