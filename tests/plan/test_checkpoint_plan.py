"""A Plan with checkpointing: what it refuses, before any model is seen and of one."""

import pytest
from support.nets import NETS

import fxlocal
from fxlocal import Checkpoint, Driver, LocalModules, Plan, PlanError
from fxlocal.schedules.base import Horizon


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"count": 0}, r"Checkpoint\(count=0\): give a whole number"),
        ({"count": True}, r"Checkpoint\(count=True\)"),
        ({"count": 2, "balance": "halves"}, "balance='halves'"),
        ({"count": 3, "balance": ("conv2",)}, "give the 2 blocks that begin"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        Checkpoint(**arguments)


def test_what_is_no_checkpoint_is_refused():
    with pytest.raises(PlanError, match="checkpoint=3: give Checkpoint"):
        Plan(checkpoint=3)


def test_local_modules_are_not_checkpointed():
    with pytest.raises(PlanError, match="contradicts"):
        Plan(checkpoint=Checkpoint(2), modules=LocalModules(2, num_classes=5))


def test_a_plan_prints_as_it_is_made():
    plan = Plan(checkpoint=Checkpoint(2, ["conv2"]))
    assert eval(repr(plan), vars(fxlocal)) == plan
    assert hash(plan) == hash(Plan(checkpoint=Checkpoint(2, ("conv2",))))


def test_too_many_stages_are_refused():
    with pytest.raises(PlanError, match=r"Checkpoint\(count=9\): the model has 3 blocks"):
        fxlocal.transform(NETS["chain"].build(), Plan(checkpoint=Checkpoint(9, "blocks")))


def test_costs_are_needed_where_the_balance_is_of_them():
    with pytest.raises(PlanError, match="give example inputs, or balance='blocks'"):
        fxlocal.transform(NETS["chain"].build(), Plan(checkpoint=Checkpoint(2)))


class Later:
    """Plain training first, then this Plan."""

    def __init__(self, plan):
        self.later = plan

    def plan(self, analysis, epoch, step=0, rank=0):
        return self.later if epoch == 3 else Plan()

    def horizon(self):
        return Horizon(epochs=4)


@pytest.mark.parametrize(
    "count,compile,message",
    [(9, False, "count=9"), (2, "cudagraph", "nor the second forward of checkpointing")],
)
def test_a_driver_refuses_at_once_what_is_to_come(count, compile, message):
    schedule = Later(Plan(checkpoint=Checkpoint(count, "blocks")))
    with pytest.raises(PlanError, match=message):
        Driver(NETS["chain"].build(), schedule, compile=compile)
