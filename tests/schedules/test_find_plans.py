"""Every Plan that a schedule can still produce is known beforehand."""

import itertools

import pytest
from torch import nn

import fxlocal
from fxlocal import Freeze, Hebbian, PlanError, TopK, Zero
from fxlocal.schedules import (
    Approximation,
    Constant,
    Dynamic,
    Plateau,
    Static,
    Table,
    combine,
    find_plans,
)

ANALYSIS = fxlocal.analyze(nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(10))))
PREFIX = Static(12, start=0.0, largest=0.7, rule=Hebbian(1e-3), rate_decay=(0.5, 3))
EVERY = Static(6, start=0.2, update_every=2, refresh_every=3)
SOMETIMES = Approximation(Zero(), batches=slice(3, 9, 2))
CELLS = Table([[Zero(), TopK(1)], [TopK(1), Zero()]])

FIXED = [
    Constant(),
    PREFIX,
    EVERY,
    SOMETIMES,
    CELLS,
    combine(EVERY, CELLS),
    combine(PREFIX, SOMETIMES),
]


def without_rates(plans):
    return {plan.with_rate(0.0) for plan in plans}


@pytest.mark.parametrize("schedule", FIXED, ids=repr)
@pytest.mark.parametrize("epoch", [0, 4])
def test_they_are_those_of_the_steps_to_come(schedule, epoch):
    steps = itertools.product(range(epoch, 15), range(40))
    coming = [schedule.plan(ANALYSIS, later, step) for later, step in steps]
    found = find_plans(schedule, ANALYSIS, epoch)
    assert without_rates(found) == without_rates(coming)
    assert len(without_rates(found)) == len(found)


@pytest.mark.parametrize("align", [True, False])
def test_a_dynamic_boundary_may_move_after_every_epoch(align):
    schedule = Dynamic(9, shift=0.2, largest=0.7, rule=Freeze(), align=align)
    found = [p.local.until if p.local else 0 for p in find_plans(schedule, ANALYSIS)]
    assert found == [0, 2, 4, 6, 7]
    for norm in (1.0, 0.1):  # once it has moved, there is no way back
        schedule.end_epoch(ANALYSIS, norm)
    assert [p.local.until for p in find_plans(schedule, ANALYSIS, 2)] == [2, 4, 6, 7]
    last = [p.local.until for p in find_plans(schedule, ANALYSIS, 8)]
    assert last == [2]  # no epoch is left to move after


def test_a_plateau_may_come_or_not():
    schedule = Plateau(SOMETIMES, patience=1)
    assert set(find_plans(schedule, ANALYSIS)) == {*find_plans(SOMETIMES, ANALYSIS), fxlocal.Plan()}
    both = find_plans(combine(Dynamic(9, rule=Freeze()), schedule), ANALYSIS)
    assert len(both) == len(set(both)) == 2 * 8


def test_what_contradicts_itself_only_later_is_refused():
    late = Static(60, start=0.9)
    with pytest.raises(PlanError, match="both ask for a local prefix"):
        find_plans(combine(late, Static(60, start=0.5, curve="step")), ANALYSIS)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    in_turns = combine(Approximation(Zero(), batches=even), Approximation(TopK(), batches=odd))
    assert len(find_plans(in_turns, ANALYSIS)) == 2


def test_of_a_users_schedule_the_next_plan_is_known():
    class Own:
        def plan(self, analysis, epoch, step=0, rank=0):
            return fxlocal.Plan(local=fxlocal.LocalPrefix(epoch + 1, Freeze()))

    assert [plan.local.until for plan in find_plans(Own(), ANALYSIS, 3)] == [4]
