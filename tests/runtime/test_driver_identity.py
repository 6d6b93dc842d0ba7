"""What a Driver refuses when it is made, whose checkpoint it takes, and an epoch's middle."""

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from support.drivers import SGD, STATIC, X, run, small
from support.tiny import same_state
from torch import nn

from fxlocal import (
    CheckpointError,
    Driver,
    Hebbian,
    LocalPrefix,
    PassError,
    Plan,
    PlanError,
    capture,
    transform,
)
from fxlocal.compiler.runner import run_passes
from fxlocal.schedules import Constant, Dynamic, Static


class Own:
    """A user's schedule, without a __repr__."""

    def __init__(self, plan=None, after=0, **fields):
        self.given, self.after = plan, after
        vars(self).update(fields)

    def plan(self, analysis, epoch, step=0, rank=0):
        return Plan() if epoch < self.after else self.given


OTHERS = torch.optim.SGD(small().parameters(), lr=0.1)
REFUSED = {
    "another model's": (Constant(), OTHERS, "the SGD is of another model: .* none of the 6"),
    "a name": (Constant(), "sgd", "the optimizer is a str: give a torch.optim.Optimizer"),
    "a class": (Constant(), torch.optim.SGD, "the optimizer is SGD: give"),
    "a plan": (Plan(), None, r"schedule=Plan\(\): give a schedule"),
    "none": (None, None, "schedule=None: give a schedule"),
    "no plan": (Own(7), None, "Own returned 7: give a Plan"),
    "an object": (Own(Plan(), key=object()), None, "the schedule holds <object object at"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_is_refused_when_the_driver_is_made(name):
    schedule, optimizer, message = REFUSED[name]
    with pytest.raises(PlanError, match=message):
        Driver(small(), schedule, optimizer=optimizer)


def test_what_a_schedule_returns_later_is_refused_when_it_comes():
    driver = Driver(small(), Own(None, after=1))
    run(driver, 0, X)
    driver.start_epoch()
    with pytest.raises(PlanError, match="Own returned None"):
        driver.end_epoch()


@pytest.mark.parametrize("plan", [None, Constant(), LocalPrefix(1)])
def test_transform_takes_a_plan_alone(plan):
    with pytest.raises(PlanError, match=r"transform\(model, .*\): give a Plan"):
        transform(small(), plan)


def test_an_epoch_that_has_steps_is_not_begun_again():
    driver = Driver(small(), Constant())
    driver.start_epoch()
    driver.start_epoch()  # loses nothing
    driver.network()
    with pytest.raises(RuntimeError, match="in epoch 0, of which 1 steps are taken"):
        driver.start_epoch()


def test_an_epoch_past_the_end_of_the_schedule_is_told_of_once():
    driver = Driver(small(), Static(epochs=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(driver, 3, X)
    told = [str(one.message) for one in caught if "past the end" in str(one.message)]
    assert len(told) == 1 and told[0].startswith("epoch 1 (from 0) is past the end")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Static(epochs=9, c1=3.0, c2=0.1, largest=0.5), "largest=0.5: changes nothing"),
        (lambda: Static(epochs=9, refresh_every=1), "refresh_every=1: every step would"),
        (lambda: Hebbian(1e300), "finite and at least 0, in float32"),
        (lambda: LocalPrefix(1, Hebbian(), rates=(1e39,)), "finite and at least 0"),
    ],
)
def test_values_without_a_meaning_are_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SKIP", "insert_cut", "FXLOCAL_SKIP: there is no pass 'insert_cut'. .*'insert_cuts'"),
        ("DEBUG", "4", "FXLOCAL_DEBUG='4': give 0, 1"),
        ("DEBUG", "all", "FXLOCAL_DEBUG='all': give 0, 1"),
    ],
)
def test_environment_variables_say_what_there_is(name, value, message, monkeypatch):
    monkeypatch.setenv(f"FXLOCAL_{name}", value)
    with pytest.raises(PlanError, match=message):
        transform(small(), Plan(local=LocalPrefix(1)))


def test_each_network_of_a_schedule_is_dumped(monkeypatch, tmp_path):
    monkeypatch.setenv("FXLOCAL_DUMP", str(tmp_path))
    run(Driver(small(), Static(epochs=3, start=0, largest=0.9)), 3, X)
    kept = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*_insert_cuts.txt")}
    assert kept == {"02_insert_cuts.txt", "2/02_insert_cuts.txt"}
    assert "until=2" in (tmp_path / "2" / "plan.txt").read_text()


def test_a_mistake_in_a_users_pass_is_the_users():
    def breaks(network):
        raise KeyError("mine")

    with pytest.raises(PassError, match=f"KeyError: 'mine'.*not fxlocal's but of {__name__}"):
        run_passes(capture(small()), [breaks], Plan())


# Whose checkpoint it is


def exchanged():
    model = small()
    model[1] = nn.Tanh()
    return model


@dataclass
class Named:
    """A schedule whose repr has an address: that of a function."""

    chosen: object
    share: float = 0.5

    def plan(self, analysis, epoch, step=0, rank=0):
        return Plan()


SAME = {
    "fields": (lambda: Own(Plan(), k=1), lambda: Own(Plan(), k=1)),
    "a function": (lambda: Named(run), lambda: Named(run)),
    "a part": (lambda: Own(Plan(), part=Own(k=[1])), lambda: Own(Plan(), part=Own(k=[1]))),
}
OTHER = {
    "fields": (lambda: Own(Plan(), k=1), lambda: Own(Plan(), k=2), "schedule.*k=1.*k=2"),
    "a function": (lambda: Named(run), lambda: Named(small), "schedule.*drivers.run.*small"),
    "a part": (lambda: Own(Plan(), part=Own(k=1)), lambda: Own(Plan(), part=Own(k=2)), "schedule"),
}


@pytest.mark.parametrize("name", SAME)
def test_a_users_schedule_is_known_by_its_fields(name):
    here, there = (make() for make in SAME[name])
    Driver(small(), here).load_state_dict(Driver(small(), there).state_dict())
    here, there, message = OTHER[name]
    state = Driver(small(), here()).state_dict()
    with pytest.raises(CheckpointError, match=message):
        Driver(small(), there()).load_state_dict(state)


def test_an_activation_makes_another_model():
    state = Driver(exchanged(), Constant()).state_dict()
    with pytest.raises(CheckpointError, match=r"another model: 1: Tanh\(\) .* 1: ReLU\(\)"):
        Driver(small(), Constant()).load_state_dict(state)


@pytest.mark.sample(3)
@pytest.mark.parametrize("taken", [1, 2, 3])
@pytest.mark.parametrize("schedule", [STATIC, Dynamic(epochs=6, alpha=1.0, shift=0.3)])
def test_a_run_goes_on_exactly_inside_an_epoch(taken, schedule):
    def step(driver, k):
        loss = driver.network()(X[0] * (k + 1)).square().mean()
        loss.backward()
        driver.optimizer.step()
        driver.optimizer.zero_grad()
        driver.observe(loss)

    def fresh():
        model = small()
        return Driver(model, schedule, torch.optim.SGD(model.parameters(), **SGD))

    whole, again = fresh(), fresh()
    run(whole, 3, X)
    whole.start_epoch()
    for k in range(taken):
        step(whole, k)
    state = copy.deepcopy(whole.state_dict())
    again.load_state_dict(state)
    assert again.step == taken
    for driver in (whole, again):
        for k in range(taken, 4):
            step(driver, k)
        driver.end_epoch()
        run(driver, 2, X)
    assert same_state(whole.state_dict(), again.state_dict())
