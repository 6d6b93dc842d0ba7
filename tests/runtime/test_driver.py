"""The driver: one network per plan, what it records, no waiting for the device, exact resume."""

import math
from dataclasses import dataclass

import pytest
import torch
from support import laws
from support.drivers import SGD, STATIC, X, local, run, small
from support.nets import NETS
from torch.utils._python_dispatch import TorchDispatchMode

import fxlocal
from fxlocal import Driver, Hebbian, PlanError
from fxlocal.schedules import Constant, Static

# --- epochs ---------------------------------------------------------------------------------------


def test_boundary_history_and_losses():
    model = NETS["residual"].build()
    driver = Driver(model, STATIC, optimizer=torch.optim.SGD(model.parameters(), **SGD))
    expected = [STATIC.plan(driver.analysis, epoch).local for epoch in range(6)]
    expected = [part.until if part else 0 for part in expected]
    assert expected == sorted(expected) and len(set(expected)) > 2
    for epoch in range(6):
        assert (driver.epoch, driver.boundary) == (epoch, expected[epoch])
        losses = run(driver, 1, NETS["residual"].inputs(), steps=3)
        assert driver.losses[epoch] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert driver.history == expected
    assert driver.epoch == 6 and len(driver.losses) == 6


def test_an_epoch_without_a_loss_has_none():
    driver = Driver(small(), Constant())
    driver.start_epoch()
    driver.end_epoch()
    assert math.isnan(driver.losses[0])


def test_each_epoch_trains_the_layers_of_its_plan():
    model = NETS["residual"].build()
    driver = Driver(model, STATIC)
    for _ in range(6):
        driver.start_epoch()
        laws.step(driver.network(), NETS["residual"].inputs())
        for layer in driver.analysis.layers:
            gradient = model.get_parameter(layer.weight).grad
            assert (gradient is None) == (layer.index < driver.boundary)
        driver.end_epoch()


def test_a_driver_does_what_transform_does():
    plan, models = local(2), [small(), small()]
    optimizers = [torch.optim.SGD(model.parameters(), **SGD) for model in models]
    run(Driver(models[0], Constant(plan), optimizer=optimizers[0]), 2, X)
    net = fxlocal.transform(models[1], plan)
    for _ in range(4):
        laws.loss_of(net(*X)).square().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    laws.assert_equal(models[0].state_dict(), models[1].state_dict(), "state")


def test_a_driver_works_without_an_optimizer():
    driver, other = (Driver(small(), Constant(local(2))) for _ in range(2))
    run(driver, 2, X)
    other.load_state_dict(driver.state_dict())
    assert driver.history == other.history == [2, 2]


# --- networks -------------------------------------------------------------------------------------


@pytest.fixture
def emitted(monkeypatch):
    """The plans that were emitted."""
    plans, rewrite = [], fxlocal.runtime.driver.rewrite

    def counting(captured, resolved, analysis):
        plans.append(resolved.plan)
        return rewrite(captured, resolved, analysis)

    monkeypatch.setattr("fxlocal.runtime.driver.rewrite", counting)
    return plans


def test_one_emission_per_plan_though_the_rate_decays(emitted):
    driver = Driver(NETS["residual"].build(), STATIC)
    run(driver, 6, NETS["residual"].inputs(), steps=3)
    rates = {STATIC.plan(driver.analysis, epoch).rate for epoch in range(6)}
    assert len(rates) > len(set(driver.history))
    assert [plan.local.until if plan.local else 0 for plan in emitted] == sorted(
        set(driver.history)
    )


def test_the_rate_of_each_step_is_the_plans():
    model = small()
    schedule = Static(epochs=3, largest=0.7, start=0, rule=Hebbian(0.5), rate_decay=(0.1, 1))
    driver = Driver(model, schedule)
    for epoch in range(3):
        driver.start_epoch()
        for _ in range(2):
            before = model[0].weight.detach().clone()
            driver.network()(*X)
            moved = float((model[0].weight.detach() - before).norm())
            rate = schedule.plan(driver.analysis, epoch).rate
            assert (rate > 0) == (driver.boundary > 0)
            assert moved == pytest.approx(rate, rel=1e-4)  # the weight's own rounding
        driver.end_epoch()
    assert driver.boundary == 2


@dataclass(frozen=True)
class Alternate:
    """The boundary of each step, over and over."""

    untils: tuple[int, ...]

    def plan(self, analysis, epoch, step=0, rank=0):
        return local(self.untils[step % len(self.untils)])


def test_a_schedule_may_change_the_plan_with_each_step(emitted):
    model = small()
    driver = Driver(model, Alternate((0, 1, 2)))
    driver.start_epoch()
    for step in range(6):
        net = driver.network()
        laws.step(net, X)
        parameters = [model[i].weight for i in (0, 2, 4)]
        assert [p.grad is None for p in parameters] == [i < step % 3 for i in range(3)]
    assert len(emitted) == 3


def test_a_stale_gradient_is_released_when_the_boundary_moves():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    driver = Driver(model, Alternate((0, 2)), optimizer=optimizer)
    driver.start_epoch()
    laws.step(driver.network(), X)
    optimizer.step()  # and no zero_grad
    laws.step(driver.network(), X)
    weights = [p.detach().clone() for p in model[:3].parameters()]
    optimizer.step()
    assert all(map(torch.equal, weights, model[:3].parameters()))


def test_a_network_trains_whatever_mode_the_model_was_in_when_it_was_emitted():
    """As after an evaluation at the end of the epoch before."""
    model = small()
    driver = Driver(model, Constant(local(2)))
    model.eval()
    driver.start_epoch()
    model.train()
    laws.step(driver.network(), X)
    assert [model[i].weight.grad is None for i in (0, 2, 4)] == [True, True, False]


def test_a_plan_that_does_not_fit_is_refused_before_an_epoch():
    with pytest.raises(PlanError, match="past the last layer"):
        Driver(small(), Constant(local(3)))


@pytest.mark.parametrize("compile", [True, False, {"backend": "eager"}, {}])
def test_compile_takes_a_switch_or_options(monkeypatch, compile):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda net, **options: calls.append(options) or net)
    driver = Driver(small(), Constant(local(1)), compile=compile)
    run(driver, 1, X)
    options = compile if isinstance(compile, dict) else {}
    assert calls[-1:] == ([] if compile is False else [{"fullgraph": True, **options}])


# --- no waiting for the device --------------------------------------------------------------------


class RefuseSync(TorchDispatchMode):
    """Raises where a value would be read back from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"):
            raise AssertionError(f"a host sync: {name}")
        return func(*args, **(kwargs or {}))


def test_nothing_inside_an_epoch_waits_for_the_device():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    driver = Driver(model, Alternate((0, 1, 2)), optimizer=optimizer)
    with RefuseSync():
        with pytest.raises(AssertionError, match="host sync"):
            float(torch.ones(()))
        driver.start_epoch()
        for _ in range(4):
            loss = driver.network()(*X).square().mean()
            loss.backward()
            optimizer.step()
            driver.observe(loss)
    driver.end_epoch()
    assert math.isfinite(driver.losses[0])


def test_observing_leaves_the_losses_as_they_are():
    driver = Driver(small(), Constant())
    driver.start_epoch()
    losses = [torch.tensor(value, requires_grad=True) * 1 for value in (1.0, 2.0, 6.0)]
    for loss in losses:
        driver.observe(loss)
    assert [float(loss.detach()) for loss in losses] == [1, 2, 6]
    driver.end_epoch()
    assert driver.losses == [3.0]


def test_the_mean_of_many_narrow_losses_is_exact():
    driver = Driver(small(), Constant())
    driver.start_epoch()
    for _ in range(1000):
        driver.observe(torch.ones((), dtype=torch.bfloat16))
    driver.end_epoch()
    assert driver.losses == [1.0]
