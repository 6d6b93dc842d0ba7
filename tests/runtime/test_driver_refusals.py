"""What a driver is given wrongly is refused before anything of the run has changed."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from support import laws
from support.drivers import X as INPUTS
from support.drivers import run, small
from torch import nn

from fxlocal import (
    CheckpointError,
    Custom,
    Driver,
    Freeze,
    Hebbian,
    LocalModules,
    LocalPrefix,
    Plan,
    PlanError,
    Zero,
)
from fxlocal.schedules import Approximation, Constant, Dynamic, Horizon, Static, combine

(X,) = INPUTS


def driver_of(schedule):
    model = small()
    return Driver(model, schedule, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def train(driver, epochs):
    run(driver, epochs, (X,))
    return driver


def state_of(driver):
    """All of the run that an error may not touch."""
    state = copy.deepcopy(driver.state_dict())
    return state["model"], repr({**state, "model": None, "boundary": driver.boundary})


def assert_same(driver, before):
    laws.assert_equal(state_of(driver)[0], before[0], "model")
    assert state_of(driver)[1] == before[1]


LOSSES = [
    (torch.ones(3), r"got \(3,\) for a loss: give a tensor of one element"),
    (torch.ones(0), r"got \(0,\) for a loss"),
    (1.0, "got float for a loss"),
]


@pytest.mark.parametrize("loss,message", LOSSES, ids=range(len(LOSSES)))
def test_a_loss_that_is_no_scalar_is_refused_when_observed(loss, message):
    driver = driver_of(Constant())
    driver.start_epoch()
    with pytest.raises(ValueError, match=message):
        driver.observe(loss)
    for value in (torch.tensor(1.0), torch.tensor([3.0])):
        driver.observe(value)
    driver.end_epoch()
    assert driver.losses == [2.0]


@pytest.mark.parametrize("schedule", [Constant(), Dynamic(5)], ids=["constant", "dynamic"])
def test_an_epoch_that_was_not_begun_cannot_end(schedule):
    driver = driver_of(schedule)
    for epochs in (0, 2):
        train(driver, epochs)
        before = state_of(driver)
        with pytest.raises(RuntimeError, match=rf"epoch {epochs}, which was not begun: call start"):
            driver.end_epoch()
        assert_same(driver, before)
    resumed = driver_of(schedule)
    resumed.start_epoch()
    resumed.load_state_dict(driver.state_dict())
    with pytest.raises(RuntimeError, match="epoch 2, which was not begun"):
        resumed.end_epoch()


def test_an_epoch_whose_update_cannot_be_measured_does_not_end(monkeypatch):
    driver = driver_of(Dynamic(5))
    driver.start_epoch()
    before = state_of(driver)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_before", [])
        with pytest.raises(ValueError):
            driver.end_epoch()
    assert_same(driver, before)
    driver.end_epoch()
    assert len(driver.schedule.update_norms) == len(driver.losses) == len(driver.history) == 1


def spoiled(weight, pre, post):
    return weight * torch.where(pre.abs().max() > 100, torch.nan, 1.0)


@pytest.mark.filterwarnings("error:.*returned NaN")
def test_a_warning_that_is_an_error_comes_after_the_epoch_has_ended():
    driver = driver_of(Constant(Plan(local=LocalPrefix(1, Custom(spoiled)))))
    driver.start_epoch()
    driver.observe(driver.network()(X * 1e4).sum())
    with pytest.raises(UserWarning, match="returned NaN or inf 1 times in epoch 0"):
        driver.end_epoch()
    assert (driver.epoch, len(driver.losses), driver.history) == (1, 1, [1])
    train(driver, 1)  # the count begins anew


@pytest.mark.parametrize("learned", [{}, None, {"update_norms": None}], ids=str)
def test_a_schedules_state_that_is_not_whole_is_refused_untouched(learned):
    driver = train(driver_of(Dynamic(5)), 2)
    before, norms = state_of(driver), list(driver.schedule.update_norms)
    state = {**train(driver_of(Dynamic(5)), 3).state_dict(), "schedule": learned}
    with pytest.raises(CheckpointError, match=r"Dynamic\(.*cannot take up its state.*Nothing was"):
        driver.load_state_dict(state)
    assert_same(driver, before)
    assert driver.schedule.update_norms == norms


def noisy(weight, pre, post, by=1.0):
    return by * torch.randn_like(weight)


def test_a_run_with_a_rule_that_draws_resumes_exactly():
    schedule = Static(6, largest=0.7, start=0, rule=Custom(noisy, 0.1))
    straight = train(driver_of(schedule), 4)
    assert straight.history == [0, 1, 1, 1]
    resumed = driver_of(schedule)
    resumed.load_state_dict(train(driver_of(schedule), 2).state_dict())
    assert_same(train(resumed, 2), state_of(straight))


@dataclass(frozen=True)
class Noisy:
    by: float

    def __call__(self, weight, pre, post):
        return noisy(weight, pre, post, self.by)


@pytest.mark.parametrize(
    "make", [Noisy, lambda by: partial(noisy, by=by)], ids=["object", "partial"]
)
def test_rules_of_other_arguments_are_other_schedules(make):
    def build(by):
        return driver_of(Constant(Plan(local=LocalPrefix(1, Custom(make(by))))))

    build(2.0).load_state_dict(build(2.0).state_dict())
    with pytest.raises(CheckpointError, match="another schedule"):
        build(2.0).load_state_dict(build(3.0).state_dict())


def test_the_end_of_an_epoch_tells_of_deltas_left_out():
    driver = driver_of(Constant(Plan(local=LocalPrefix(1, Custom(spoiled)))))
    driver.start_epoch()
    driver.network()(X * 1e4)
    with pytest.warns(UserWarning, match=r"the rule \S+spoiled returned NaN or inf 1 times in"):
        driver.end_epoch()


class Late:
    """Local modules from the second epoch on."""

    def plan(self, analysis, epoch, step=0, rank=0):
        return Plan(modules=LocalModules(2, num_classes=4)) if epoch else Plan()

    def horizon(self):
        return Horizon(epochs=2)


class Standardised(nn.Module):
    """Its second convolution computes its weight; the last layer shares the first one's."""

    def __init__(self, tied):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
        self.tied = tied

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            weight = layer.weight
            if i == 4 and not self.tied:
                weight = weight - weight.mean(1, keepdim=True)
            x = torch.relu(nn.functional.linear(x, weight, layer.bias))
        return nn.functional.linear(x, self.layers[5].weight) if self.tied else x


UNFIT = {
    "a computed weight": (False, Static(60, start=0.9, largest=0.8), "computes its weight"),
    "a computed weight, by and by": (False, Dynamic(60), "computes its weight"),
    "tied weights": (True, Static(60, start=0.9, largest=0.8, align=False), "Tied weights"),
    "an unknown layer": (
        True,
        Approximation(Zero(), batches=slice(50, None)),
        "selects none of the model's 0 convolutions",
    ),
    "two prefixes": (
        True,
        combine(Static(60, start=0.9, rule=Freeze()), Static(60, start=0.8, rule=Freeze())),
        "both ask for a local prefix",
    ),
    "heads": (True, Late(), "brings in LocalModules"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_plan_to_come_that_does_not_fit_is_refused_before_the_first_step(name):
    tied, schedule, message = UNFIT[name]
    model = Standardised(tied)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=message):
        Driver(model, schedule, example_inputs=(X,))
    laws.assert_equal(model.state_dict(), before, "model")


def test_a_users_rule_is_tried_once_on_each_layer_that_it_will_reach():
    class Zeros:
        seen = []  # noqa: RUF012  of the class, as it is tried on a copy

        def __call__(self, weight, pre, post):
            self.seen.append(weight.shape)
            return torch.zeros_like(weight)

    schedule = Static(60, start=0.0, largest=0.5, rule=Custom(Zeros()))
    Driver(nn.Sequential(*(nn.Linear(4, 4) for _ in range(8))), schedule)
    assert len(Zeros.seen) == 4


class Lower:
    """Tells no horizon: its second epoch has a rate that narrow weights would lose."""

    def plan(self, analysis, epoch, step=0, rank=0):
        return Plan(local=LocalPrefix("4", Hebbian(0.5 if epoch == 0 else 1e-6)))


def test_a_rate_that_rounding_loses_is_refused_when_it_comes():
    driver = Driver(small().bfloat16(), Lower())
    driver.start_epoch()
    driver.network()(X.bfloat16())
    driver.end_epoch()
    with pytest.raises(PlanError, match="rounding would lose it"):
        driver.start_epoch()


def test_a_schedule_that_learns_has_to_be_saved():
    class Half(Constant):
        def end_epoch(self, analysis, update_norm, loss):
            pass

    with pytest.raises(PlanError, match="has end_epoch, and not both state_dict and load_state"):
        driver_of(Half())
