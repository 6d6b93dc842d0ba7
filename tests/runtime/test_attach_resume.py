"""An attached model's run, broken off between steps and continued exactly."""

import copy
import functools

import pytest
import torch
from support.attached import MODULES, Y, attached
from support.copies import saved
from support.drivers import SGD, STATIC, X, small
from support.tiny import same_state

import fxlocal
from fxlocal import CheckpointError, Hebbian, NoEffectWarning, Plan
from fxlocal.schedules import Constant, Dynamic, Static, combine


def start(schedule):
    model = small()
    torch.manual_seed(2)
    driver = fxlocal.attach(model, schedule, example_inputs=X)
    driver.optimizer = torch.optim.SGD(model.parameters(), **SGD)
    return model, driver


def train(model, driver, until, steps=4):
    """Train until so many steps were made in all, from wherever the driver is."""
    while (made := driver.epoch * steps + driver.step) < until:
        if made % steps == 0 and not driver.step:
            driver.start_epoch()
        output = model(X[0] + torch.rand(3, 4), *([Y] if len(driver.heads) else []))
        loss = output[1] if len(driver.heads) else output.square().mean()
        loss.backward()
        driver.optimizer.step()
        driver.optimizer.zero_grad()
        if not len(driver.heads):
            driver.observe(loss)
        if driver.step == steps:
            driver.end_epoch()


SCHEDULES = {
    "moving": STATIC,
    "learning": Dynamic(epochs=4, average="window", rule=Hebbian(0.01), shift=0.4),
    "every other": Static(epochs=4, rule=Hebbian(0.01), update_every=2, weak_supervision=True),
    "modules": combine(Constant(MODULES), Constant(Plan())),
}


def ended(model, driver):
    train(model, driver, 14)
    return model.state_dict(), driver.heads.state_dict(), driver.history, driver.losses


@functools.cache
def unbroken(name):
    return ended(*start(SCHEDULES[name]))


@pytest.mark.sample(3)
@pytest.mark.parametrize("steps", [5, 7, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_is_exact_also_inside_an_epoch(name, steps):
    model, driver = start(SCHEDULES[name])
    train(model, driver, steps)
    kept = copy.deepcopy((model.state_dict(), driver.optimizer.state_dict()))
    states = {
        weights: saved(driver.state_dict(weights=weights), weights_only=True)
        for weights in (True, False)
    }
    for weights, state in states.items():
        again, other = start(SCHEDULES[name])
        if not weights:
            again.load_state_dict(kept[0])
            other.optimizer.load_state_dict(kept[1])
        other.load_state_dict(state)
        assert same_state(ended(again, other), unbroken(name))


def test_without_weights_the_state_is_small_and_needs_no_optimizer():
    model, driver = start(STATIC)
    train(model, driver, 6)
    state = driver.state_dict(weights=False)
    assert state["model"] is None and state["optimizer"] is None
    other = fxlocal.attach(small(), STATIC)
    other.load_state_dict(state)
    assert other.history == driver.history
    before = copy.deepcopy(other.model.state_dict())
    assert same_state(before, small().state_dict())
    with pytest.raises(CheckpointError, match="another schedule"):
        fxlocal.attach(small(), SCHEDULES["learning"]).load_state_dict(state)


def test_an_epoch_in_which_nothing_trained_warns():
    driver = attached(model := small())
    model.eval()(*X)
    with pytest.warns(NoEffectWarning, match="no forward of the attached Sequential trained in"):
        driver.end_epoch()


def test_gradients_of_the_prefix_are_dropped_on_request():
    """As a loop needs whose forward and backward run inside the optimizer's step."""
    model = small()
    driver = attached(model)
    model(*X).sum().backward()
    sum(p.square().sum() for p in model.parameters()).backward()
    driver.release()
    assert [p.grad is None for p in model.parameters()] == [True] * 4 + [False] * 2
