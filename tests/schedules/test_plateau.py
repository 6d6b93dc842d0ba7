"""Approximations until the loss stops falling: against a loop by hand, and in a driver."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.nets import NETS

from fxlocal import CheckpointError, Driver, Freeze, LocalPrefix, Plan, PlanError, Zero
from fxlocal.schedules import Approximation, Constant, Dynamic, Plateau, combine

EARLY = Constant(Plan(weight_grads={"conv2": Zero()}))


def switch_by_hand(losses, patience, threshold):
    """Section 3.2 as `Plateau` says it, for each epoch from the start; a NaN is no fall."""
    for last in range(patience, len(losses)):
        earlier = [x for x in losses[: last - patience + 1] if not math.isnan(x)]
        fallen = []
        for loss in losses[last - patience + 1 : last + 1]:
            best = min(earlier) if earlier else math.inf
            allowed = (1 - threshold) * best if best >= 0 else (1 + threshold) * best
            fallen.append(loss < allowed)
        if True not in fallen:
            return last + 1
    return None


LOSSES = st.lists(
    st.sampled_from([4.0, 2.0, 1.0, 0.99, 0.98, 0.5, 0.0, -1.0, -1.02, math.nan, math.inf])
    | st.floats(0.1, 3),
    max_size=15,
)


@given(LOSSES, st.integers(1, 4), st.sampled_from([0, 0.01, 0.5]))
def test_a_plateau_is_the_oracles_and_nothing_comes_back(losses, patience, threshold):
    schedule = Plateau(EARLY, patience, threshold)
    for epoch, loss in enumerate([*losses, 0.0]):  # asked for as the losses come in
        switch = switch_by_hand(losses[:epoch], patience, threshold)
        for asked in range(epoch + 3):
            full = switch is not None and asked >= switch
            assert schedule.plan(None, asked) == (Plan() if full else EARLY.fixed)
        schedule.end_epoch(None, 0.0, loss)
    again = Plateau(EARLY, patience, threshold)
    assert again.switch is None
    again.load_state_dict(schedule.state_dict())
    assert again.switch == schedule.switch
    assert again.state_dict().keys() == schedule.state_dict().keys() == {"losses", "schedule"}


def test_slow_progress_adds_up_within_the_patience():
    """Each epoch falls by 0.5 %: too little in one epoch, enough in three."""
    losses = [0.995**epoch for epoch in range(20)]
    impatient, patient = Plateau(Constant(), 1), Plateau(Constant(), 3)
    for loss in losses:
        impatient.end_epoch(None, 0.0, loss)
        patient.end_epoch(None, 0.0, loss)
    assert (impatient.switch, patient.switch) == (2, None)


def test_a_negative_loss_falls_too():
    schedule = Plateau(Constant(), 1)
    for loss in (1.0, -1.0, -1.02, -1.025):  # the last falls by less than 1 %
        schedule.end_epoch(None, 0.0, loss)
    assert schedule.switch == 4


def test_the_schedule_before_the_plateau_learns():
    first, second = Plateau(Dynamic(9)), Plateau(Plateau(Dynamic(9), 2))
    for norm, loss in ((1.0, 3.0), (0.5, 2.0)):
        first.end_epoch(None, norm, loss)
        second.end_epoch(None, norm, loss)
    assert first.schedule.update_norms == [1.0, 0.5]
    again = Plateau(Plateau(Dynamic(9), 2))
    again.load_state_dict(second.state_dict())
    assert again.schedule.losses == [3.0, 2.0]
    assert again.schedule.schedule.update_norms == [1.0, 0.5]


def test_after_the_plateau_a_local_prefix_stays():
    local = LocalPrefix(2, Freeze())
    schedule = Plateau(Constant(Plan(local, {"conv5": Zero()})), patience=1)
    for _ in range(2):
        schedule.end_epoch(None, 0.0, 1.0)
    plans = [schedule.plan(None, epoch) for epoch in (1, 2)]
    assert plans == [Plan(local, {"conv5": Zero()}), Plan(local)]


# With patience 2, epoch 4 is the first of full gradients.
TOLD = [3.0, 2.0, 2.5, 1.9921875, 1.0, 0.5]


def tell(driver, losses):
    for loss in losses:
        driver.start_epoch()
        if loss is not None:
            driver.observe(torch.tensor(loss - 0.25))
            driver.observe(torch.tensor(loss + 0.25))
        driver.end_epoch()
    return driver


def driver_of(schedule):
    return Driver(NETS["residual"].build(), schedule)


def approximates(driver):
    plan = driver.schedule.plan(driver.analysis, driver.epoch)
    return bool(plan.weight_grads)


def test_a_driver_tells_the_mean_loss_and_a_plateau_switches():
    schedule = combine(Dynamic(9), Plateau(Approximation(Zero()), patience=2))
    straight, seen = driver_of(schedule), []
    for loss in TOLD:
        seen.append(approximates(straight))
        tell(straight, [loss])
    assert seen == [True] * 4 + [False] * 2
    assert straight.schedule.second.losses == straight.losses == TOLD
    first, resumed = tell(driver_of(schedule), TOLD[:3]), driver_of(schedule)
    resumed.load_state_dict(first.state_dict())
    tell(resumed, TOLD[3:])
    assert resumed.schedule.state_dict() == straight.schedule.state_dict()
    assert not approximates(resumed) and schedule.second.losses == []
    with pytest.raises(CheckpointError, match="another schedule"):
        driver_of(Plateau(Approximation(Zero()))).load_state_dict(first.state_dict())


def test_a_driver_that_is_told_no_loss_ends_with_full_gradients():
    driver = tell(driver_of(Plateau(Approximation(Zero()))), [None] * 3)
    assert approximates(driver)
    assert not approximates(tell(driver, [None]))
    assert all(map(math.isnan, driver.schedule.losses))


REFUSED = [
    (lambda: Plateau(Plan()), r"schedule=Plan\(\): give a schedule"),
    (lambda: Plateau(Constant(), 0), "patience=0: give a whole number of epochs from 1"),
    (lambda: Plateau(Constant(), 1.5), "patience=1.5: give a whole number"),
    (lambda: Plateau(Constant(), True), "patience=True: give a whole number"),
    (lambda: Plateau(Constant(), threshold=1), r"threshold=1: a fraction .*, in \[0, 1\)"),
    (lambda: Plateau(Constant(), threshold=-0.1), "threshold=-0.1: a fraction of the best loss"),
    (lambda: Plateau(Constant(), threshold=math.nan), "threshold=nan: a fraction"),
]


@pytest.mark.parametrize("make,message", REFUSED, ids=range(len(REFUSED)))
def test_refusals(make, message):
    with pytest.raises(PlanError, match=message):
        make()
